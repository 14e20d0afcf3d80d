"""What runs are called, the weights that they share, and the moment at which they are compared. See `runs`."""

import copy
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_bench import exported
from sana_model import memory
from sana_model.errors import UserError
from sana_model.plan import PIPELINES
from sana_model.settings import DTYPES, OF_DECODERS, PRECISIONS, Settings, dtypes_of
from sana_model.weights.loaded import LoadedModel
from sana_model.weights.quantized_checkpoint import header_in
from sana_model.weights.saving import stored_dtype

PARTS = ("dit", "text_encoder", "autoencoder")
OWN = tuple(PIPELINES)
EAGER = "-eager"  # ends the name of a run whose kernels are started one by one
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
    eager: bool = False  # without a CUDA graph

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
        eager = backend in OWN and precision.endswith(EAGER)
        precision = precision.removesuffix(EAGER) if eager else precision
        name = cls(backend, precision.removesuffix("+") or "bf16", precision.endswith("+"), eager=eager)
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
            else self.precision + "+" * self.everywhere + EAGER * self.eager
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

    def judged(self, executed: dict[str, str]) -> dict[str, str]:
        """By part, the precision whose limits hold (`check`), given what a plan executes: 4-bit weights have lost what they
        lost, and activations have as many bits as they are multiplied with."""
        return {
            part: "w4a8" if (precision, executed[part]) == ("w4a4", "w8a8") else precision
            for part, precision in self.precisions.items()
        }


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
        self.stored = {part: stored_dtype(module) for part, module in modules.items()}
        self._parts = {(part, self.stored[part]): module for part, module in modules.items()}
        self.kept_free = 0  # bytes that every run has to leave, for what comes after all of them are there

    def part(self, part: str, dtype: torch.dtype) -> nn.Module:
        """A module of its own over shared parameters."""
        if (part, dtype) not in self._parts:
            self._parts[part, dtype] = _with_parameters(getattr(self.loaded, part), dtype)
        return _with_parameters(self._parts[part, dtype], dtype)

    def model(self, dtypes: dict[str, torch.dtype]) -> LoadedModel:
        """The whole model in these dtypes."""
        return replace(self.loaded, **{part: self.part(part, dtype) for part, dtype in dtypes.items()})

    @property
    def shared_bytes(self) -> int:
        """What the copies take that were made so far, in dtypes other than the stored ones, for whichever runs come."""
        return sum(
            count(module) * dtype.itemsize
            for (part, dtype), module in self._parts.items()
            if dtype != self.stored[part]
        )

    def missing_bytes(self, dtypes: dict[str, torch.dtype]) -> int:
        """Memory that the copies for a run in these dtypes will take."""
        missing = {part: dtype for part, dtype in dtypes.items() if (part, dtype) not in self._parts}
        return sum(count(getattr(self.loaded, part)) * dtype.itemsize for part, dtype in missing.items())

    def reserve(
        self, name: "RunName", settings: Settings, again: tuple[str, ...] = (), in_bands: bool = False
    ) -> LoadedModel:
        """The model for a run. Raises MemoryError, before anything is allocated, where it would not fit.

        What is needed are the copies that the run takes, the parts that it keeps `again` in a layout of its own, and beside
        them the activations of a picture (decoded `in_bands`, or whole) or what is to be `kept_free`.
        """
        parts = memory.estimate(self.config, settings, name.precisions, self.device, in_bands)
        needed = self.missing_bytes(name.dtypes) + max(parts["denoise"], parts["decode"], self.kept_free)
        self.check_free(needed + sum(parts[part] for part in again))
        return self.model(name.dtypes)

    def check_free(self, needed: int) -> None:
        """Raise MemoryError where the device has fewer bytes left."""
        free = memory.available(self.device)
        if needed > free:
            raise MemoryError(f"{needed / 1e9:.1f} GB more are needed, and {free / 1e9:.1f} GB are free")

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
