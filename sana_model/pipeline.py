"""prompt → picture: the whole story in one file.

    captions = text encoder(instruction + prompt)          sana_model/prompt.py, text_encoder.py
    latents  = noise of seed s, one generator per image    here
    latents  = solver(velocity) for `steps` steps          sana_model/denoise.py, scheduler.py, dit.py; graph.py
    images   = decoder(latents / scaling factor)           sana_model/autoencoder/

`load` makes a `Pipeline`; calling it with a prompt and any field of `Settings` gives a `Result`. The same settings give the
same picture, on any backend from the same noise.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sana_export import layout
from sana_model import graph, heap, memory, scheduler
from sana_model.autoencoder.family import with_decoder
from sana_model.bins import nearest_bin, resize_and_crop
from sana_model.config import ModelConfig
from sana_model.denoise import Inputs, Loop, denoise
from sana_model.dit import DiT, TextContext
from sana_model.errors import MissingError, UserError
from sana_model.plan import Plan, dtype_name, resolve
from sana_model.prompt import CaptionStates, PromptEncoder
from sana_model.settings import Settings, dtypes_of, is_guided, precisions_for, settings_for
from sana_model.weights import lora as lora_file
from sana_model.weights.lora import Loras
from sana_model.weights.models import LoadedModel, find, load_model

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, of) with stage "text_encode", "denoise" or "decode"."""


@dataclass(frozen=True)
class Result:
    """Pictures, and what they took."""

    images: list[Image.Image]
    latents: Tensor  # (count, 32, H/32, W/32) fp32, before the decoder
    timings: dict[str, float]  # milliseconds: text_encode, denoise, per_step, decode, other, total
    plan: dict  # the resolved plan, with the share of the denoising time outside the named backend
    settings: Settings


class Pipeline:
    """A loaded model, ready to paint. Thread-safe: pictures are painted one call at a time."""

    def __init__(
        self, model: LoadedModel, plan: Plan, device: torch.device, dtypes: dict[str, torch.dtype], *, low_memory: bool
    ):
        self.config: ModelConfig = model.config
        self.model, self.plan, self.device, self.dtypes, self.low_memory = model, plan, device, dtypes, low_memory
        self.dit, self.autoencoder = model.dit, model.autoencoder
        self.dit.ops = plan.ops("dit")
        if self.autoencoder is not None:  # calibration only denoises
            self.autoencoder.use(plan.ops("autoencoder"))
        self._prompt_encoder: PromptEncoder | None = None
        self.loras = Loras(self.dit, plan.wide_backend("dit"))
        self.graphs = graph.Graphs(0 if plan.eager else graph.limit(device))
        self._lock, self._holder, self._pid = threading.Lock(), None, os.getpid()

    def settings(self, prompt: str | list[str] | tuple[str, ...], **overrides) -> Settings:
        """The model's defaults with `overrides` applied and checked. Raises UserError naming what is wrong."""
        settings = settings_for(self.config, prompt, in_tiles=self.low_memory and not self.plan.in_bands, **overrides)
        if not isinstance(self.dit, DiT):
            _refuse_for_graphs(settings)
        return settings

    def __call__(self, prompt, *, progress: Progress | None = None, **overrides) -> Result:
        """Paint. `overrides` are fields of `Settings`; `progress` is told of every stage and step."""
        settings = self.settings(prompt, **overrides)
        progress = progress or (lambda stage, done, of: None)
        # The plan's clock records its events on the current GPU.
        gpu = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with self._alone(), torch.inference_mode(), torch.autocast(self.device.type, enabled=False), gpu:
            self.plan.clock.reset()
            clock = _StageClock(self.device)
            progress("text_encode", 0, 1)
            captions = self.encode(settings)
            clock.stop("text_encode")
            progress("text_encode", 1, 1)
            progress("denoise", 0, settings.steps)
            latents = self.denoise(settings, captions, progress=progress)
            denoise_ms = clock.stop("denoise")
            images = []
            for i, latent in enumerate(latents.split(1)):
                progress("decode", i, len(latents))
                images.append(_to_pil(self.decode(latent, settings)))
            clock.stop("decode")
            progress("decode", len(latents), len(latents))
            share = self.plan.outside_share(denoise_ms / 1e3)
            plan = self.plan.as_json() | {"eager": self.why_eager(settings), "outside_share": share}
        latents = latents.cpu().clone()  # by now no inference tensor, so that a user may change it
        return Result(images, latents, clock.timings(settings.steps), plan, settings)

    def add_lora(self, file: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Put a LoRA on the DiT (sana_model/weights/lora.py); its name is that of the file, unless given. Returns the name.

        Raises UserError for a file that does not fit the model.
        """
        if not isinstance(self.dit, DiT):
            raise UserError("LoRA is for the DiT of this library; exported graphs have their weights inside")
        lora = lora_file.read(Path(file), self.config.dit, name)
        self._change_loras(lambda: self.loras.add(lora, scale))
        return lora.name

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Change the strength of a LoRA: 0 is none, 1 as it was trained."""
        self._change_loras(lambda: self.loras.set_strength(name, scale))

    def remove_lora(self, name: str) -> None:
        """Take a LoRA off. Without any, the model is what it was before, to the bit."""
        self._change_loras(lambda: self.loras.remove(name))

    def _change_loras(self, change: Callable[[], None]) -> None:
        with self._alone():
            change()
            self.graphs.clear()

    def encode(self, settings: Settings) -> tuple[CaptionStates | None, CaptionStates]:
        """Caption states (negative, positive), one row per prompt; no negative where the model is not guided by one."""
        if self.low_memory:
            self.dit.to("cpu")
        encoder = self._prompts()
        prompts = list(settings.prompts)
        if is_guided(settings.guidance, self.config.dit):
            negative, positive = encoder.encode_pair(
                prompts, [settings.negative_prompt] * len(prompts), settings.instruction
            )
        else:
            negative, positive = None, encoder.encode(prompts, settings.instruction)
        if self.low_memory:
            self._prompt_encoder = self.model.text_encoder = None
            heap.give_back()
            self.dit.to(self.device)
        return negative, positive

    def denoise(
        self,
        settings: Settings,
        captions: tuple[CaptionStates | None, CaptionStates],
        *,
        noise: Tensor | None = None,
        progress: Progress | None = None,
        weighed: bool = False,
    ) -> Tensor:
        """Noise → latents (count, 32, H/32, W/32) in fp32. `noise` replaces the seed's initial latents.

        Raises MissingError where the picture would not fit into memory, its decoding included; not if that is `weighed`.
        """
        config, dit = self.config, self.dit
        if not weighed:
            memory.check_run(
                config,
                settings,
                self.plan.executed,
                self.device,
                low_memory=self.low_memory,
                in_bands=self.plan.in_bands,
            )
        height, width = (side // config.autoencoder.spatial_compression for side in self._canvas(settings))
        shape = (1, config.dit.in_channels, height, width)
        generators = [torch.Generator("cpu").manual_seed(settings.seed + i) for i in range(settings.count)]

        def draw() -> Tensor:
            noise = [torch.randn(shape, generator=g, dtype=torch.float32, device=g.device) for g in generators]
            return torch.cat(noise).to(self.device)

        schedule = scheduler.timesteps(replace(config.scheduler, kind=settings.sampler), settings.steps)
        loop = Loop.of(schedule, settings, config.dit, config.pag_layers)
        draws = [draw() if noise is None else noise.to(self.device, torch.float32)]
        draws += [draw() for _ in range(schedule.steps - 1) if schedule.kind == "scm"]
        times = torch.as_tensor(schedule.model_times, dtype=torch.float32, device=self.device)
        guidance, pag_scale = torch.tensor(
            (settings.guidance, settings.pag_scale), dtype=torch.float32, device=self.device
        )
        in_graph = self.why_eager(settings) is None
        inputs = Inputs(
            torch.stack(draws),
            dit.time(times, torch.full_like(times, settings.guidance) if config.dit.guidance_embeds else None),
            # A graph's captions are all of one length, so that it serves every prompt.
            self._text(settings, captions, loop.perturbed, config.max_text_tokens if in_graph else None),
            dit.positions(height, width, self.device),
            guidance,
            pag_scale,
        )

        def after_step(i: int, _x: Tensor, _x0: Tensor) -> None:
            if progress is not None:
                progress("denoise", i + 1, settings.steps)

        if in_graph:
            latents = self.graphs.denoise(dit, loop, inputs)
            after_step(settings.steps - 1, latents, latents)
        else:
            latents = denoise(dit, loop, inputs, after_step)
        if not bool(latents.isfinite().all()):
            raise UserError(
                f"the latents became NaN or infinite: {_overflow(self.dtypes['dit'], '--precision', 'guidance or LoRA')}"
            )
        return latents

    def decode(self, latents: Tensor, settings: Settings) -> Tensor:
        """Latents → images (B, 3, height, width), fp32 in [-1, 1] up to overshoot."""
        autoencoder = self.autoencoder
        z = latents.to(self.device, self.dtypes["autoencoder"]) / self.config.autoencoder.scaling_factor
        images = self.graphs.making_room(
            lambda: autoencoder.tiled_decode(z) if settings.tiled else autoencoder.decode(z)
        )
        if not bool(images.isfinite().all()):
            advice = _overflow(self.dtypes["autoencoder"], "--decoder-precision", "guidance")
            raise UserError(f"the picture became NaN or infinite: {advice}")
        if settings.binning:
            images = resize_and_crop(images, settings.height, settings.width)
        return images.float()

    def why_eager(self, settings: Settings) -> str | None:
        """Why the steps of this picture run launch by launch, not as a CUDA graph; None: they do run as one."""
        if self.plan.eager is not None:
            return self.plan.eager
        held = memory.estimate(self.config, settings, self.plan.executed, self.device)["denoise"]
        if held > self.graphs.limit:
            return (
                f"a graph of this size would hold {held / 1e9:.1f} GB, and {self.graphs.limit / 1e9:.1f} are for graphs"
            )
        return None

    def _canvas(self, settings: Settings) -> tuple[int, int]:
        if settings.binning:
            return nearest_bin(settings.height, settings.width, self.config.size)
        return settings.height, settings.width

    def _prompts(self) -> PromptEncoder:
        if self._prompt_encoder is None:
            if self.model.text_encoder is None:  # freed by --low-memory after an earlier picture
                self.model.text_encoder = self.model.load_text_encoder().to(self.device)
            self._prompt_encoder = PromptEncoder(self.model.text_encoder, self.model.tokenizer, self.config)
        return self._prompt_encoder

    def _text(
        self,
        settings: Settings,
        captions: tuple[CaptionStates | None, CaptionStates],
        perturbed: bool,
        length: int | None = None,
    ) -> TextContext:
        """Keys and values for the batch [negative | positive | perturbed], each of count rows (prompt-major).

        Captions are padded to `length`, or to the longest one.
        """
        present = [c for c in captions if c is not None]
        length = length or max(c.states.shape[1] for c in present)
        states = torch.cat([torch.nn.functional.pad(c.states, (0, 0, 0, length - c.states.shape[1])) for c in present])
        lengths = torch.cat([c.lengths for c in present])
        text = self.dit.text(states.to(self.device), lengths.to(self.device))
        prompts = len(settings.prompts)
        groups = [*range(len(present)), *([len(present) - 1] if perturbed else [])]
        index = [g * prompts + p for g in groups for p in range(prompts) for _ in range(settings.num_images)]
        return text if index == list(range(len(states))) else text.rows(index)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """For what one thread does at a time. Raises UserError where this one is doing it, and would wait for itself."""
        self._after_fork()
        if self._holder == threading.get_ident():
            raise UserError("this pipeline is painting: from a progress callback it can neither be changed nor paint")
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    def _after_fork(self) -> None:
        """A forked child has none of its parent's OpenMP threads: compute on one thread rather than wait for them."""
        if os.getpid() != self._pid:
            torch.set_num_threads(1)
            self._lock, self._holder, self._pid = threading.Lock(), None, os.getpid()


def load(
    model: str = "sana-tiny",
    *,
    backend: str = "auto",
    precision: str | None = None,
    device: str | None = None,
    text_precision: str | None = None,
    decoder_precision: str | None = None,
    decoder: str | None = None,
    dialect: str | None = None,
    exact: bool = False,
    lora: Sequence[str] = (),
    low_memory: bool = False,
    cuda_graph: bool = True,
    base: str | None = None,
    picture: dict | None = None,
) -> Pipeline:
    """Load a model: a built-in name, a diffusers folder, a single file (with `base` for the other parts) or a hub id.

    `precision` (fp32 | bf16 | fp16 | w8a8 | fp8 | w4a8 | w4a4) is the DiT's, by default what the folder is quantised in or
    its sana.json asks for, or bf16; text encoder (also w4a16) and decoder default to bf16, or fp32 beside an fp32 DiT.
    Weights that are not quantised yet are rounded to nearest. `exact` computes quantised layers as they are stored, in the
    arithmetic of the reference, instead of what the plan executes. `lora`: files, each perhaps with a :strength.

    `dialect`: "diffusers", the default, or "original" (docs/dialects.md); of exported graphs it is that of their export.

    `decoder`: another autoencoder for the same latents, "lite" or what `autoencoder.family.find_autoencoder` takes.

    `low_memory` lets the text encoder go after encoding, has only one of it and the DiT on a GPU, and decodes in tiles where
    the decoder cannot run in bands, which are exact and the default of the CPU's kernels. On a GPU the denoising loop is a
    CUDA graph, unless `cuda_graph` is False or the plan says why not. `picture`: fields of `Settings` that are going to be
    painted; what is wrong with them, or too large for this machine, is refused before anything is loaded.
    Raises UserError for a model that cannot be read and MissingError where this machine cannot run it.
    """
    target = _device(device, backend)
    exports = ("onnxruntime", "tensorrt")
    if backend in exports or layout.is_export(Path(model)):
        from sana_model.exported import pipeline as exported  # which builds pipelines, too

        if backend not in exports:
            raise UserError(f"{model} holds exported graphs, not weights; paint with --backend {' or '.join(exports)}")
        if lora or exact or low_memory or decoder:
            raise UserError(
                "exported graphs are as they were exported: --lora, --exact, --low-memory and --decoder change a model"
            )
        asked = {"dit": precision, "text_encoder": text_precision, "autoencoder": decoder_precision}
        if layout.is_export(Path(model)):
            stored = layout.read(model).dialect
            if dialect not in (None, stored):
                raise UserError(f"the graphs in {model} follow the dialect {stored!r}; leave out --dialect {dialect}")
            if picture is not None:
                _refuse_for_graphs(settings_for(find(model).config, **picture))
        return exported.load(model, backend, device=target, precisions=asked)
    source = find(model, base)
    if decoder is not None:
        source = with_decoder(source, decoder)
    precisions = precisions_for(
        source.precision_of("dit", precision) or source.precision or "bf16",
        source.precision_of("text_encoder", text_precision),
        decoder_precision,
    )
    dtypes = dtypes_of(precisions)
    files = [lora_file.parse(text) for text in ([lora] if isinstance(lora, str) else lora)]
    names = lora_file.names_of([file for file, _ in files])
    loras = [
        (lora_file.read(file, source.config.dit, name), scale) for (file, scale), name in zip(files, names, strict=True)
    ]
    plan = resolve(
        source.config, backend, target, precisions, exact=exact, low_memory=low_memory, cuda_graph=cuda_graph
    )
    if picture is not None:
        settings = settings_for(source.config, in_tiles=low_memory and not plan.in_bands, **picture)
    memory.check_load(source.config, plan.executed, target, low_memory)
    if picture is not None:
        memory.check_run(
            source.config, settings, plan.executed, target, loaded=False, low_memory=low_memory, in_bands=plan.in_bands
        )
    loaded = load_model(
        source, precision=dtypes["dit"], text_precision=dtypes["text_encoder"], decoder_precision=dtypes["autoencoder"],
        dialect=dialect or "diffusers",
        prepare={"dit": partial(plan.prepare, "dit"), "text": partial(plan.prepare, "text_encoder")},
    )  # fmt: skip
    plan.prepare("autoencoder", loaded.autoencoder)
    for part in (loaded.text_encoder, loaded.autoencoder, *([] if low_memory else [loaded.dit])):
        part.to(target)
    pipe = Pipeline(loaded, plan, target, dtypes, low_memory=low_memory)
    for one, scale in loras:
        pipe.loras.add(one, scale)
    return pipe


def _overflow(dtype: torch.dtype, option: str, strengths: str) -> str:
    """What to do about numbers beyond a dtype: fp16 ends at 65504, the others where it makes no difference."""
    if dtype == torch.float16:
        return f"this checkpoint overflows in fp16; run it with {option} bf16 or fp32"
    return f"beyond {dtype_name(dtype)}, most likely of a {strengths} that is too strong, or of the checkpoint"


def _refuse_for_graphs(settings: Settings) -> None:
    """Raise UserError where exported graphs cannot do what is asked for."""
    if settings.tiled:
        raise UserError("exported graphs decode whole pictures; leave out --tiled, or use another backend")
    if settings.pag_scale:
        raise UserError("exported graphs have no perturbed-attention guidance; leave out --pag, or use another backend")


def _device(device: str | None, backend: str) -> torch.device:
    wanted = device or ("cuda" if backend in ("cuda", "triton", "tensorrt") or torch.cuda.is_available() else "cpu")
    if backend in ("cpu", "onnxruntime") and device is None:
        wanted = "cpu"
    try:
        target = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"device {device!r} is not known; use cpu, cuda or cuda:N") from error
    if target.type not in ("cpu", "cuda"):
        raise UserError(f"device {device!r} is not supported; use cpu, cuda or cuda:N")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise MissingError(
            "no NVIDIA GPU can be used here (torch sees none); run with --backend cpu and no --device, or see `sana doctor`"
        )
    return target


def _to_pil(image: Tensor) -> Image.Image:
    """One decoded image (1, 3, H, W) → 8-bit RGB."""
    pixels = (image[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).cpu().numpy())


class _StageClock:
    """Wall time of each stage, in ms; on a GPU a stage ends when its work is done."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.start = self.last = time.perf_counter()
        self.stages: dict[str, float] = {}

    def stop(self, stage: str) -> float:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.stages[stage] = (now - self.last) * 1e3
        self.last = now
        return self.stages[stage]

    def timings(self, steps: int) -> dict[str, float]:
        total = (time.perf_counter() - self.start) * 1e3
        other = total - sum(self.stages.values())
        return {
            "text_encode": self.stages["text_encode"], "denoise": self.stages["denoise"],
            "per_step": self.stages["denoise"] / steps, "decode": self.stages["decode"], "other": other, "total": total,
        }  # fmt: skip
