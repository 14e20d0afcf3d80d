"""The competitors. A run is named `backend:precision`, or `backend@FOLDER` for what `sana quantize` made of the same model;
all of them paint from the same weights and the same noise.

    cpu, cuda, triton, reference    this library's pipeline with that plan
    reference-compile               its plain PyTorch form under torch.compile, max-autotune
    diffusers                       the installed pipeline of the code that others wrote, in the faster memory format
    diffusers-compile               the same with its DiT and decoder under torch.compile, max-autotune
    openvino                        the same with its DiT and decoder compiled by OpenVINO; w8a8 by NNCF
    onnxruntime, tensorrt           our exported graphs in those two (bench/exported.py)

`precision` is the DiT's, rounded to nearest where it is quantised; text encoder and decoder run in bf16 beside it (fp32
beside an fp32 DiT), or in the precision itself where the name ends in +. On a GPU our denoising loop is one CUDA graph, but
for names that end in -eager (cuda:w8a8-eager): their rows show what the graph gains, and stand where a capture fails. What
a precision is executed in stands in the row's plan; `reference:w4a4` and `reference@FOLDER` compute exactly what is stored.
The weights exist once in memory, and once more for each other dtype that a run asks for.
"""

import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from sana_bench import exported
from sana_bench.baselines import CompiledDiffusers, DiffusersRun, OpenVINO, compile_options
from sana_bench.harness import free_memory, out_of_memory
from sana_bench.weights import Moment, RunName, Weights
from sana_model.errors import UserError
from sana_model.ops import REFERENCE_OPS
from sana_model.pipeline import Pipeline
from sana_model.plan import Plan, resolve
from sana_model.settings import DTYPES, Settings
from sana_model.weights.models import find, load_model


class PipelineRun:
    """This library's pipeline with the plan of one backend. The interface of every run is that of this class."""

    missing = "not available"  # its status where this machine lacks something

    def __init__(self, name: RunName, weights: Weights):
        self.name, self.weights = name, weights

    @property
    def again(self) -> tuple[str, ...]:
        """Parts whose weights it keeps beside the shared ones: in fewer bits, or packed for kernels of the CPU."""
        packed = self.name.backend in ("cpu", "auto") and self.weights.device.type == "cpu"
        return tuple(part for part, p in self.name.precisions.items() if p not in DTYPES or (packed and p != "fp32"))

    def prepare(self, settings: Settings) -> None:
        """Everything before the first picture. Raises MemoryError or MissingError where it can't be."""
        plan = resolve(
            self.weights.config, self.name.backend.removesuffix("-compile"), self.weights.device, self.name.precisions,
            cuda_graph=not self.name.eager,
        )  # fmt: skip
        loaded = self.weights.reserve(self.name, settings, self.again, plan.in_bands)
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
        plan = self.pipeline.plan
        latents = self.pipeline.denoise(settings, captions, noise=noise)
        self._outside_share = plan.outside_share(time.perf_counter() - start)
        # On a GPU the share stays that of the first picture, as it does where a graph replays the steps of all others:
        # what runs launch by launch would be slowed by the clock's events, and compared with what has none.
        plan.clock.running = not plan.clock.cuda
        return latents

    def decode(self, latents: Tensor, settings: Settings) -> Tensor:
        """Latents → images (B, 3, height, width) fp32, one at a time as the pipeline does."""
        return torch.cat([self.pipeline.decode(latent, settings) for latent in latents.split(1)])

    def velocity(self, moment: Moment) -> Tensor:
        """The raw output of the DiT (R, 32, h, w) in fp32."""
        m = moment
        return self.pipeline.dit(m.latents, m.timestep, m.states, m.lengths, m.guidance).float()

    @property
    def judged(self) -> dict[str, str]:
        """By part, the precision whose limits hold for this run."""
        return self.name.judged(self.pipeline.plan.executed)

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
        self.weights.check_free(self.weights.bytes(name.precisions) + self.weights.kept_free)
        self.pipeline, self.folder = exported.prepare(
            name.backend, name.precisions, loaded, settings, self.weights.device
        )

    def velocity(self, moment: Moment) -> Tensor:
        return super().velocity(replace(moment, states=moment.states.float()))  # as all inputs of a graph

    @property
    def missing(self) -> str:
        """Nobody has seen these engines run: an empty row of theirs says so."""
        return "not measured" if self.name.backend == "tensorrt" else "not available"


KINDS = {
    "diffusers": DiffusersRun, "diffusers-compile": CompiledDiffusers, "openvino": OpenVINO,
    "reference-compile": CompiledReference, "onnxruntime": ExportedRun, "tensorrt": ExportedRun,
}  # fmt: skip


def plain_velocity(run, settings: Settings, moment: Moment) -> Tensor | None:
    """`velocity` of plain PyTorch in the precision of a run, by which random weights are judged: None for trained ones, and
    where it does not fit.
    """
    if not run.weights.loaded.random:
        return None
    plain = PipelineRun(replace(run.name, backend="reference", everywhere=False, eager=False), run.weights)
    try:
        plain.prepare(settings)
        return plain.velocity(moment)
    except Exception as error:  # which would be taken for the run's own
        if out_of_memory(error):
            return None
        raise
    finally:
        plain.close()
        free_memory()


def make(name: RunName, weights: Weights):
    return KINDS.get(name.backend, PipelineRun)(name, weights)
