"""The competitors. A run is named `backend:precision`, or `backend@FOLDER` for what `sana quantize` made of the same model;
all of them paint from the same weights and the same noise.

    cpu, cuda, triton, reference    this library's pipeline with that plan
    reference-compile               its plain PyTorch form under torch.compile, max-autotune
    diffusers                       the installed pipeline of the code that others wrote, in the faster memory format
    diffusers-compile               the same with its DiT and decoder under torch.compile, max-autotune
    openvino                        the same with its DiT and decoder compiled by OpenVINO; w8a8 by NNCF
    onnxruntime, tensorrt           our exported graphs in those two (bench/exported.py)

`precision` is the DiT's, rounded to nearest where it is quantised; text encoder and decoder run in bf16 beside it (fp32
beside an fp32 DiT), or in the precision itself where the name ends in +. What a precision is executed in stands in the
row's plan; `reference:w4a4` and `reference@FOLDER` compute exactly what is stored. The weights exist once in memory, and
once more for each other dtype that a run asks for.
"""

import copy
import importlib.metadata
import itertools
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_bench import exported, openvino
from sana_model import memory
from sana_model.errors import UserError
from sana_model.interop import diffusers_autoencoder, diffusers_pipeline, diffusers_transformer
from sana_model.loaded import LoadedModel
from sana_model.ops import REFERENCE_OPS
from sana_model.pipeline import Pipeline
from sana_model.plan import PIPELINES, Plan, resolve
from sana_model.prompt import DEFAULT_INSTRUCTION
from sana_model.quantized_checkpoint import header_in
from sana_model.settings import DTYPES, OF_DECODERS, PRECISIONS, Settings, dtypes_of
from sana_model.weights import find, load_model

PARTS = ("dit", "text_encoder", "autoencoder")
OWN = tuple(PIPELINES)
CALIBRATION_STEPS = 4  # of one picture, for OpenVINO's W8A8
BASELINE_PRECISIONS = {
    "diffusers": DTYPES,
    "diffusers-compile": DTYPES,
    "openvino": (*DTYPES, "w8a8"),
} | exported.PRECISIONS
BASELINES = ("diffusers", "diffusers-compile", "onnxruntime", "openvino", "reference", "reference-compile", "tensorrt")


@dataclass(frozen=True)
class RunName:
    """`backend:precision`, with + for a precision that text encoder and decoder share, or `backend@FOLDER`."""

    backend: str
    precision: str
    everywhere: bool = False
    folder: str = ""  # a quantised model, whose precision this is

    @classmethod
    def parse(cls, text: str) -> "RunName":
        """Raises UserError for a backend or precision that is not known, and a folder that is not quantised."""
        backend, at, folder = text.strip().partition("@")
        backend, _, precision = backend.partition(":")
        known = dict.fromkeys((*OWN, *BASELINES))
        if backend not in known:
            raise UserError(f"run {text!r}: backend {backend!r} is not known; choose one of {', '.join(known)}")
        if at:
            if backend not in OWN or precision:
                raise UserError(f"run {text!r}: a quantised folder goes with one of {', '.join(OWN)}, as in cpu@FOLDER")
            header = header_in(Path(folder) / "transformer")
            if header is None:
                raise UserError(f"run {text!r}: {folder} holds no quantised DiT; `sana quantize` makes one")
            return cls(backend, header.precision, folder=folder)
        name = cls(backend, precision.removesuffix("+") or "bf16", precision.endswith("+"))
        allowed = PRECISIONS if backend in (*OWN, "reference-compile") else BASELINE_PRECISIONS[backend]
        if name.precision not in allowed:
            raise UserError(
                f"run {text!r}: precision {name.precision!r} is not known; choose one of {', '.join(allowed)}"
            )
        return name

    def __str__(self) -> str:
        return f"{self.backend}:{self.label}"

    @property
    def label(self) -> str:
        return (
            f"{self.precision}@{Path(self.folder).resolve().name}"
            if self.folder
            else self.precision + "+" * self.everywhere
        )

    @property
    def others(self) -> str:
        """The precision of text encoder and decoder."""
        return self.precision if self.everywhere or self.precision == "fp32" else "bf16"

    @property
    def precisions(self) -> dict[str, str]:
        """By part. The decoder has no form with 4-bit weights, nor in fp8."""
        decoder = self.others if self.others in OF_DECODERS else "bf16"
        return {"dit": self.precision, "text_encoder": self.others, "autoencoder": decoder}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return dtypes_of(self.precisions)


@dataclass(frozen=True)
class Moment:
    """One evaluation of the DiT, the same for every run: R rows, both halves of the guided batch."""

    latents: Tensor  # (R, 32, h, w) fp32
    timestep: Tensor  # (R,) fp32
    states: Tensor  # (R, L, caption channels)
    lengths: Tensor  # (R,) int64
    guidance: Tensor | None  # (R,) fp32, for models that take it as an input


class Weights:
    """The parts of one loaded model, shared by all runs: one copy per part and dtype."""

    def __init__(self, loaded: LoadedModel, device: torch.device):
        self.loaded, self.config, self.device = loaded, loaded.config, device
        modules = {
            part: getattr(loaded, part).to(device).eval().requires_grad_(False)
            for part in PARTS
            if getattr(loaded, part)
        }
        self.stored = {part: next(module.parameters()).dtype for part, module in modules.items()}
        self._parts = {(part, self.stored[part]): module for part, module in modules.items()}

    def part(self, part: str, dtype: torch.dtype) -> nn.Module:
        """A module of its own over shared parameters."""
        if (part, dtype) not in self._parts:
            self._parts[part, dtype] = _with_parameters(getattr(self.loaded, part), dtype)
        return _with_parameters(self._parts[part, dtype], dtype)

    def model(self, dtypes: dict[str, torch.dtype]) -> LoadedModel:
        """The whole model in these dtypes."""
        return replace(self.loaded, **{part: self.part(part, dtype) for part, dtype in dtypes.items()})

    def missing_bytes(self, dtypes: dict[str, torch.dtype]) -> int:
        """Memory that the copies for a run in these dtypes will take."""
        missing = {part: dtype for part, dtype in dtypes.items() if (part, dtype) not in self._parts}
        return sum(count(getattr(self.loaded, part)) * dtype.itemsize for part, dtype in missing.items())

    def reserve(self, name: "RunName", settings: Settings, again: tuple[str, ...] = ()) -> LoadedModel:
        """The model for a run. Raises MemoryError, before anything is allocated, where it would not fit.

        What is needed are the copies that the run takes, the activations of a picture, and the parts that it keeps
        `again` in a layout of its own.
        """
        parts = memory.estimate(self.config, settings, name.precisions, self.device)
        needed = self.missing_bytes(name.dtypes) + max(parts["denoise"], parts["decode"])
        needed += sum(parts[part] for part in again)
        free = memory.available(self.device)
        if needed > free:
            raise MemoryError(f"{needed / 1e9:.1f} GB more are needed, and {free / 1e9:.1f} GB are free")
        return self.model(name.dtypes)

    def bytes(self, precisions: dict[str, str]) -> int:
        """Size of the weights that a run in these precisions works with."""
        return sum(memory.weights(self.config, precisions).values())


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _with_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the module's structure on the same parameters, or on converted ones where the dtype differs."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    memo = {id(t): t if t.dtype == dtype else nn.Parameter(t.to(dtype), requires_grad=False) for t in tensors}
    return copy.deepcopy(module, memo)


class PipelineRun:
    """This library's pipeline with the plan of one backend. The interface of every run is that of this class."""

    again: tuple[str, ...] = ()  # parts whose weights it keeps once more, in another layout
    missing = "not available"  # its status where this machine lacks something

    def __init__(self, name: RunName, weights: Weights):
        self.name, self.weights = name, weights

    def prepare(self, settings: Settings) -> None:
        """Everything before the first picture. Raises MemoryError or MissingError where it can't be."""
        loaded = self.weights.reserve(self.name, settings, self.again)
        plan = resolve(
            loaded.config, self.name.backend.removesuffix("-compile"), self.weights.device, self.name.precisions
        )
        for block in loaded.dit.blocks:  # its own modules, of shared weights
            plan.prepare("dit", block)
        for layer in loaded.text_encoder.layers:
            plan.prepare("text_encoder", layer)
        plan.prepare("autoencoder", loaded.autoencoder)
        if self.name.folder:
            loaded = replace(loaded, dit=_quantized_dit(self.name.folder, plan, self.weights))
        self.pipeline = Pipeline(loaded, plan, self.weights.device, self.name.dtypes, low_memory=False)

    def text_encode(self, settings: Settings):
        """Whatever `denoise` wants to know of the prompts."""
        self.pipeline.plan.clock.reset()
        return self.pipeline.encode(settings)

    def denoise(self, settings: Settings, captions, noise: Tensor) -> Tensor:
        """Noise (B, 32, h, w) fp32 → latents, likewise."""
        start = time.perf_counter()
        latents = self.pipeline.denoise(settings, captions, noise=noise)
        self._outside_share = self.pipeline.plan.outside_share(time.perf_counter() - start)
        return latents

    def decode(self, latents: Tensor, settings: Settings) -> Tensor:
        """Latents → images (B, 3, height, width) fp32, one at a time as the pipeline does."""
        return torch.cat([self.pipeline.decode(latent, settings) for latent in latents.split(1)])

    def velocity(self, moment: Moment) -> Tensor:
        """The raw output of the DiT (R, 32, h, w) in fp32."""
        m = moment
        return self.pipeline.dit(m.latents, m.timestep, m.states, m.lengths, m.guidance).float()

    def plan(self) -> dict:
        """Which kernel computes what, as of the last picture."""
        return self.pipeline.plan.as_json() | {"outside_share": self._outside_share}

    def close(self) -> None:
        """Let go of everything that is not shared."""
        self.__dict__ = {"name": self.name, "weights": self.weights}


def _quantized_dit(folder: str, plan: Plan, weights: Weights) -> nn.Module:
    """The DiT of a quantised folder, as the plan executes it. Raises UserError where it is of another model."""
    source = find(folder)
    if replace(source.config.dit, sample_size=weights.config.dit.sample_size) != weights.config.dit:
        raise UserError(
            f"{folder} is no quantised {weights.config.name}; name the model that it was made from as --model"
        )
    prepare = {"dit": partial(plan.prepare, "dit")}
    loaded = load_model(source, precision=torch.bfloat16, parts=("dit",), prepare=prepare)
    return loaded.dit.to(weights.device)


class CompiledReference(PipelineRun):
    """The plain PyTorch form under torch.compile."""

    again = ("dit", "autoencoder")  # frozen, in the compiler's layout

    def prepare(self, settings: Settings) -> None:
        super().prepare(settings)
        dit, autoencoder = self.pipeline.dit, self.pipeline.autoencoder
        dit.ops = REFERENCE_OPS  # without the clocks around each op, which a compiled graph can't contain
        autoencoder.use(REFERENCE_OPS)
        self.options = compile_options(self.weights.device)
        dit.step = torch.compile(dit.step, **self.options)
        autoencoder.decode = torch.compile(autoencoder.decode, **self.options)

    def plan(self) -> dict:
        return {"backend": self.name.backend, "compiled": ["dit", "decoder"], "torch.compile": self.options}


class ExportedRun(PipelineRun):
    """Graphs of the same weights, in a runtime that others wrote."""

    def prepare(self, settings: Settings) -> None:
        loaded, name = self.weights.loaded, self.name
        self.pipeline, self.folder = exported.prepare(
            name.backend, name.precisions, loaded, settings, self.weights.device
        )

    def velocity(self, moment: Moment) -> Tensor:
        return super().velocity(replace(moment, states=moment.states.float()))  # as all inputs of a graph

    @property
    def missing(self) -> str:
        """Nobody has seen these engines run: an empty row of theirs says so."""
        return "not measured" if self.name.backend == "tensorrt" else "not available"


class DiffusersRun:
    """The installed diffusers pipeline over views of our weights."""

    again = ("autoencoder",)  # in the faster memory format
    missing = PipelineRun.missing

    def __init__(self, name: RunName, weights: Weights):
        self.name, self.weights = name, weights

    def prepare(self, settings: Settings) -> None:
        loaded = self.weights.reserve(self.name, settings, self.again)
        self.dtypes = self.name.dtypes
        self.pipe = diffusers_pipeline(loaded)
        self.pipe.set_progress_bar_config(disable=True)
        config = loaded.config
        self.guided = settings.guidance > 1 and not config.dit.guidance_embeds
        instruction = {"none": None, "default": DEFAULT_INSTRUCTION}.get(config.instruction, config.instruction)
        self._text = {
            "device": self.weights.device, "max_sequence_length": config.max_text_tokens,
            "complex_human_instruction": instruction and instruction.split("\n"),
        }  # fmt: skip
        self.format, self.trial_ms = self._faster_format(settings)

    def _faster_format(self, settings: Settings) -> tuple[torch.memory_format, dict[str, float]]:
        """The memory format in which the decoder takes less time, and the ms it took (512 px at most, best of two).

        Only the decoder asks this question: the DiT permutes its tokens, so its convolutions meet channels_last tensors
        in any case.
        """
        latents = torch.randn(
            1, self.weights.config.dit.in_channels, min(settings.height // 32, 16), min(settings.width // 32, 16)
        )
        took = {}
        for memory_format in (torch.contiguous_format, torch.channels_last):
            self.format = memory_format
            self.pipe.vae.decoder.to(memory_format=memory_format)
            times = []
            for _ in range(2):
                start = time.perf_counter()
                self.decode(latents, settings).sum().item()
                times.append(time.perf_counter() - start)
            took[memory_format] = min(times)
        fastest = min(took, key=took.get)
        self.pipe.vae.decoder.to(memory_format=fastest)
        return fastest, {str(memory_format).removeprefix("torch."): 1e3 * s for memory_format, s in took.items()}

    def text_encode(self, settings: Settings):
        prompts = list(settings.prompts)
        if self.weights.config.dit.guidance_embeds:
            states, mask = self.pipe.encode_prompt(prompts, **self._text)
            return {"prompt_embeds": states, "prompt_attention_mask": mask}
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
        values = self.pipe.encode_prompt(prompts, self.guided, settings.negative_prompt, **self._text)
        return dict(zip(names, values, strict=True))

    def denoise(self, settings: Settings, captions, noise: Tensor) -> Tensor:
        sprint = self.weights.config.dit.guidance_embeds
        times = (
            {"intermediate_timesteps": 1.3 if settings.steps == 2 else None} if sprint else {"negative_prompt": None}
        )
        return self.pipe(
            **captions, **times, latents=noise, height=settings.height, width=settings.width,
            num_inference_steps=settings.steps, guidance_scale=settings.guidance, use_resolution_binning=False,
            output_type="latent",
        ).images  # fmt: skip

    def decode(self, latents: Tensor, settings: Settings) -> Tensor:
        z = latents.to(self.weights.device, self.dtypes["autoencoder"]) / self.pipe.vae.config.scaling_factor
        z = z.contiguous(memory_format=self.format)
        return self.pipe.vae.decode(z, return_dict=False)[0].float()

    def velocity(self, moment: Moment) -> Tensor:
        dtype, length = self.dtypes["dit"], self.weights.config.max_text_tokens
        states = nn.functional.pad(moment.states, (0, 0, 0, length - moment.states.shape[1]))  # as their pipeline pads
        mask = (torch.arange(length, device=states.device) < moment.lengths[:, None]).long()
        extra = {}
        if moment.guidance is not None:
            extra["guidance"] = moment.guidance.to(dtype) * self.pipe.transformer.config.guidance_embeds_scale
        return self.pipe.transformer(
            moment.latents.to(dtype), encoder_hidden_states=states.to(dtype), encoder_attention_mask=mask,
            timestep=moment.timestep * self.weights.config.dit.timestep_scale, return_dict=False, **extra,
        )[0].float()  # fmt: skip

    def plan(self) -> dict:
        return {
            "backend": self.name.backend, "pipeline": type(self.pipe).__name__,
            "decoder_memory_format": str(self.format).removeprefix("torch."), "memory_format_trial_ms": self.trial_ms,
        }  # fmt: skip

    def close(self) -> None:
        self.__dict__ = {"name": self.name, "weights": self.weights}


class CompiledDiffusers(DiffusersRun):
    """The same with DiT and decoder compiled, as its users do; the text encoder stays as it is."""

    again = ("dit", "autoencoder")  # frozen, in the compiler's layout

    def prepare(self, settings: Settings) -> None:
        super().prepare(settings)
        self.options = compile_options(self.weights.device)
        self.pipe.transformer.compile(**self.options)
        self.pipe.vae.decoder.compile(**self.options)

    def plan(self) -> dict:
        return super().plan() | {"compiled": ["dit", "decoder"], "torch.compile": self.options}


class OpenVINO(DiffusersRun):
    """The same with DiT and decoder compiled by OpenVINO. (Its torch.compile backend fails on them.)"""

    again = ("dit", "autoencoder")  # in the compiler's layout

    def prepare(self, settings: Settings) -> None:
        for part in ("dit", "autoencoder"):
            openvino.check_installed(self.name.precisions[part])
        super().prepare(settings)
        inputs, latents = self._record(settings)
        fp32 = {part: copy.deepcopy(getattr(self.weights.loaded, part)).float() for part in ("dit", "autoencoder")}
        transformer, decoder = self.pipe.transformer, self.pipe.vae.decoder
        dit = openvino.compiled(diffusers_transformer(fp32["dit"]), inputs, self.name.precision, return_dict=False)
        decode = openvino.compiled(
            diffusers_autoencoder(fp32["autoencoder"]).decoder,
            [{"hidden_states": latents}],
            self.name.precisions["autoencoder"],
        )
        transformer.forward = lambda hidden_states, return_dict, attention_kwargs=None, **rest: (
            dit(hidden_states=hidden_states, **rest).to(self.dtypes["dit"]),
        )
        decoder.forward = lambda z: decode(hidden_states=z).to(self.dtypes["autoencoder"])

    def _record(self, settings: Settings) -> tuple[list[dict[str, Tensor]], Tensor]:
        """What the DiT is called with in the first steps of a picture, and the decoder after them."""
        calls, transformer = [], self.pipe.transformer
        hook = transformer.register_forward_pre_hook(
            lambda _module, args, inputs: calls.append({"hidden_states": args[0]} | inputs), with_kwargs=True
        )
        side = self.weights.config.autoencoder.spatial_compression
        noise = torch.randn(
            settings.count, self.weights.config.dit.in_channels, settings.height // side, settings.width // side
        )
        few = replace(settings, steps=min(settings.steps, CALIBRATION_STEPS))
        latents = self.denoise(few, self.text_encode(few), noise)
        hook.remove()
        tensors = [{name: value for name, value in call.items() if isinstance(value, Tensor)} for call in calls]
        return tensors, latents[:1] / self.pipe.vae.config.scaling_factor

    def plan(self) -> dict:
        return super().plan() | {"compiled": ["dit", "decoder"], "openvino": importlib.metadata.version("openvino")}


def compile_options(device: torch.device) -> dict:
    """torch.compile at its fastest: max-autotune, with frozen weights on a CPU and CUDA graphs on a GPU."""
    options = dict(torch._inductor.list_mode_options("max-autotune")) | {"freezing": device.type == "cpu"}
    return {"options": options, "dynamic": False}


KINDS = {
    "diffusers": DiffusersRun, "diffusers-compile": CompiledDiffusers, "openvino": OpenVINO,
    "reference-compile": CompiledReference, "onnxruntime": ExportedRun, "tensorrt": ExportedRun,
}  # fmt: skip


def make(name: RunName, weights: Weights):
    return KINDS.get(name.backend, PipelineRun)(name, weights)
