"""Which kernel computes which op, decided before the first step and open to inspection.

A pipeline backend is an ordered list: `cuda` means "CUDA C++ where it can, else Triton, else plain PyTorch". `resolve` asks
the registry of `sana_kernels` for every op with this model's shapes and dtype, and says for each op that did not get the
first choice why not. Nothing falls back later: an op that was planned on a kernel runs on it or raises.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
from torch import nn

import sana_kernels
from sana_kernels.backend import backend_status, extension, why_not
from sana_kernels.gemm import fake_quantize
from sana_model.config import ModelConfig
from sana_model.errors import MissingError, UserError
from sana_model.ops import REFERENCE_OPS, Ops
from sana_model.packed import pack_linear_layers
from sana_model.settings import PRECISIONS, QUANTIZED

PIPELINES = {
    "reference": ("reference",),
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
    "triton": ("triton", "reference"),
}


@dataclass(frozen=True)
class Row:
    """One line of the plan."""

    part: str  # text_encoder | dit | autoencoder
    op: str
    backend: str  # a kernel's backend, or "library" for what PyTorch does in any case
    precision: str
    reason: str  # why the backends before it in the list were passed over


class OpClock:
    """Seconds spent inside each (part, op), so that a result can say how much of its time the named backend had."""

    def __init__(self, cuda: bool):
        self.cuda = cuda
        self.reset()

    def reset(self) -> None:
        self._seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._events: list[tuple[tuple[str, str], torch.cuda.Event, torch.cuda.Event]] = []

    def wrap(self, key: tuple[str, str], run: Callable) -> Callable:
        def on_cpu(*args, **kwargs):
            if torch.compiler.is_compiling():  # a graph cannot read the clock
                return run(*args, **kwargs)
            start = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                self._seconds[key] += time.perf_counter() - start

        def on_gpu(*args, **kwargs):
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            result = run(*args, **kwargs)
            events[1].record()
            self._events.append((key, *events))
            return result

        return on_gpu if self.cuda else on_cpu

    def seconds(self) -> dict[tuple[str, str], float]:
        if self._events:
            torch.cuda.synchronize()
        total = defaultdict(float, self._seconds)
        for key, start, end in self._events:
            total[key] += start.elapsed_time(end) / 1e3
        return total


class Plan:
    """The rows, and the `Ops` that carry them out."""

    def __init__(self, backend: str, precisions: dict[str, str], rows: list[Row], clock: OpClock):
        self.backend, self.precisions, self.rows, self.clock = backend, precisions, rows, clock

    def ops(self, part: str) -> Ops:
        """The ops of "dit" or "autoencoder", each bound to its kernel and timed."""
        bound = {}
        for op in (f.name for f in fields(Ops)):
            backend, run = self._backend(part, op), getattr(REFERENCE_OPS, op)
            if backend not in ("reference", "library"):
                run = partial(getattr(sana_kernels, op), backend=backend)
            bound[op] = self.clock.wrap((part, op), run)
        return Ops(**bound)

    def prepare(self, part: str, module: nn.Module) -> None:
        """Bring a block of the DiT or a layer of the text encoder, in place, into the form that its kernels read."""
        precision = self.precisions[part]

        def backend(layer: str) -> str:
            return self._backend(part, "mix_ffn" if layer.startswith("mix_ffn.") else "gemm")

        pack_linear_layers(module, QUANTIZED.get(precision) or PRECISIONS[precision], backend)

    def _backend(self, part: str, op: str) -> str:
        return next((row.backend for row in self.rows if (row.part, row.op) == (part, op)), "reference")

    def outside_share(self, denoise_seconds: float) -> float:
        """Fraction of the denoising time since the clock's reset that was spent outside the named backend's kernels."""
        named = {("dit", row.op) for row in self.rows if row.part == "dit" and row.backend == self.backend}
        inside = sum(seconds for key, seconds in self.clock.seconds().items() if key in named)
        return max(0.0, 1 - inside / denoise_seconds) if denoise_seconds > 0 else 1.0

    def as_json(self) -> dict:
        return {"backend": self.backend, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        lines = [f"plan for backend {self.backend!r}: " + " → ".join(PIPELINES[self.backend])]
        for row in self.rows:
            why = f"   ({row.reason})" if row.reason else ""
            lines.append(f"  {row.part:<13} {row.op:<17} {row.backend:<10} {row.precision:<5}{why}")
        return "\n".join(lines)


def choose_backend(backend: str, device: torch.device) -> str:
    """Turn "auto" into the fastest pipeline backend of this machine; refuse one that cannot run here at all."""
    if backend == "auto":
        candidates = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
        return next((name for name in candidates if backend_status(name) is None), "reference")
    if backend not in PIPELINES:
        raise UserError(f"backend {backend!r} is not known; choose one of auto, {', '.join(PIPELINES)}")
    reason = backend_status(backend)
    if reason is None and backend in ("cuda", "triton") and device.type != "cuda":
        reason = f"the model is on {device.type}, and {backend} needs an NVIDIA GPU"
    if reason is not None:
        raise MissingError(
            f"backend {backend!r} cannot run here: {reason}. `sana doctor` tells what this machine can do"
        )
    return backend


def resolve(config: ModelConfig, backend: str, device: torch.device, precisions: dict[str, str]) -> Plan:
    """Choose a kernel for every op of the model. `precisions`: by part, as `settings.precisions_for` gives them.

    Raises MissingError where the named backend cannot run at all.
    """
    backend = choose_backend(backend, device)
    rows = []
    for part, examples in (
        ("text_encoder", _text_examples(config, precisions["text_encoder"])),
        ("dit", _dit_examples(config, precisions["dit"])),
        ("autoencoder", _autoencoder_examples(config, precisions["autoencoder"])),
    ):
        for op, args in examples.items():
            chosen, reasons = _first_that_can(op, PIPELINES[backend], args, device)
            if (op, chosen) == ("gemm", "reference") and precisions[part] not in QUANTIZED:
                chosen = "library"
            rows.append(Row(part, op, chosen, _precision_of(args, precisions[part]), "; ".join(reasons)))
    rows.append(Row("autoencoder", "conv2d", "library", precisions["autoencoder"], ""))
    return Plan(backend, precisions, rows, OpClock(device.type == "cuda"))


def _first_that_can(op: str, order: tuple[str, ...], args: tuple, device: torch.device) -> tuple[str, list[str]]:
    reasons = []
    for name in order:
        reason = why_not(op, name, *args, device=device) or _library_is_faster(op, name, args[0].dtype)
        if reason is None:
            return name, reasons
        reasons.append(f"{name}: {reason}")
    raise MissingError(f"no backend can run {op}: " + "; ".join(reasons))


def _precision_of(args: tuple, precision: str) -> str:
    """What an op with these arguments runs in: in a quantised part, some have no 8-bit operands or results."""
    dtypes = [arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in args]
    if precision in QUANTIZED and QUANTIZED[precision] not in dtypes:
        return dtype_name(PRECISIONS[precision])
    return precision


def _library_is_faster(op: str, backend: str, dtype: torch.dtype) -> str | None:
    """Our matrix products have no tuned form for processors without vector instructions that we know."""
    if op not in ("gemm", "mix_ffn") or backend != "cpu" or dtype == torch.int8:
        return None
    return "PyTorch's product is faster than portable C++" if extension("_cpu")[0].isa() == "portable" else None


def _text_examples(config: ModelConfig, precision: str) -> dict[str, tuple]:
    like, C = partial(torch.empty, dtype=PRECISIONS[precision], device="meta"), config.text.hidden
    return {"gemm": _gemm_example(like, precision, 1, config.max_text_tokens, C, config.text.ffn)}


def _dit_examples(config: ModelConfig, precision: str) -> dict[str, tuple]:
    """Arguments of every op as the DiT calls it, without memory (device "meta")."""
    dit, N, L = config.dit, config.dit.sample_size**2, config.max_text_tokens
    C = dit.hidden
    like = partial(torch.empty, dtype=PRECISIONS[precision], device="meta")
    x, row = like(2, N, C), like(2, C)
    norm = like(C) if dit.qk_norm else None
    q, k, v = like(2, N, 3, dit.heads, dit.head_dim).unbind(2)
    cross_q, cross_kv = like(2, N, dit.cross_heads, dit.cross_head_dim), like(2, L, dit.cross_heads, dit.cross_head_dim)
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    examples = {
        "modulate": (x, row, row, dit.norm_eps),
        "gemm": _gemm_example(like, precision, 2, N, C, 3 * C),
        "linear_attention": (q, k, v, norm, norm, dit.qk_norm_eps, dit.attention_eps),
        "gate_residual": (x, x, row),
        "cross_attention": (cross_q, cross_kv, cross_kv, lengths),
        "mix_ffn": _mix_ffn_example(like, precision, 2, dit.sample_size, C, dit.ffn),
    }
    if dtype := QUANTIZED.get(precision):
        examples |= {"modulate_quantized": (x, row, row, dit.norm_eps, dtype), "quantize": (x, dtype)}
    return examples


def _autoencoder_examples(config: ModelConfig, precision: str) -> dict[str, tuple]:
    ae, side = config.autoencoder, config.dit.sample_size
    C = ae.widths[-1]
    like = partial(torch.empty, dtype=PRECISIONS[precision], device="meta")
    q, k, v = like(1, side**2, C // ae.head_dim, 3, ae.head_dim).unbind(3)
    return {
        "linear_attention": (q, k, v, None, None, 1e-5, ae.attention_eps),
        "mix_ffn": _mix_ffn_example(like, precision, 1, side, C, 4 * C),
    }


def _rows_example(like: Callable[..., torch.Tensor], precision: str, *shape: int) -> tuple:
    """Rows in the model's dtype, or quantised: values and scales."""
    if precision not in QUANTIZED:
        return like(*shape), None
    return fake_quantize(like(*shape), QUANTIZED[precision], "")


def _gemm_example(like: Callable[..., torch.Tensor], precision: str, B: int, M: int, K: int, N: int) -> tuple:
    x, weight = _rows_example(like, precision, B, M, K), _rows_example(like, precision, N, K)
    return *x, *weight, None, False, None, None, like(0).dtype


def _mix_ffn_example(like: Callable[..., torch.Tensor], precision: str, B: int, side: int, C: int, F: int) -> tuple:
    x, expand = _rows_example(like, precision, B, side**2, C), _rows_example(like, precision, 2 * F, C)
    depthwise, project = (like(2 * F, 1, 3, 3), like(2 * F)), _rows_example(like, precision, C, F)
    return *x, side, side, *expand, like(2 * F), *depthwise, *project, None, None


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
