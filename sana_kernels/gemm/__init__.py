"""Matrix products with fused epilogues, and the 8-bit rows that they take."""

from typing import NamedTuple

import torch
from torch import Tensor

from sana_kernels import triton_ops
from sana_kernels.backend import call, define, register
from sana_kernels.gemm import cpu, cuda, reference


class Quantized(NamedTuple):
    """Rows of 8-bit values with one scale each: what `quantize` returns. A weight may be packed (`pack`)."""

    values: Tensor  # (..., K rounded up to a multiple of 64), int8 or float8_e4m3fn
    scale: Tensor  # (...,) fp32


def quantize(x: Tensor, dtype: torch.dtype = torch.int8, *, backend: str = "auto") -> Quantized:
    """One symmetric scale per row of x (..., K): per token of an activation, per output channel of a weight (N, K).

    dtype: torch.int8 or torch.float8_e4m3fn. x is floating, finite and contiguous in its last dimension.
    `reference.py` states the arithmetic to the bit. Raises ValueError or TypeError for arguments that no backend takes,
    BackendUnavailable where `backend` cannot run.
    """
    if not x.is_floating_point():
        raise TypeError(f"quantize takes floating dtypes; got {x.dtype}")
    if dtype not in reference.MOST:
        raise TypeError(f"quantize makes {' or '.join(map(str, reference.MOST))}, not {dtype}")
    if x.ndim < 1 or 0 in x.shape or x.stride(-1) != 1:
        raise ValueError(f"quantize takes rows of at least one value, with last stride 1; got {tuple(x.shape)}")
    return Quantized(*call("quantize", backend, x, dtype))


def gemm(
    x: Tensor | Quantized,
    weight: Tensor | Quantized,
    bias: Tensor | None = None,
    *,
    silu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """residual + gate · SiLU(x weightᵀ + bias), each part where asked for.

    x: (B, M, K), weight: (N, K) or what `pack` made of it; both of one floating dtype, or both `Quantized` in one dtype.
    bias: (N,). residual: (B, M, N); gate: (B, N), only beside a residual. Floating tensors have last stride 1.
    Returns (B, M, N), contiguous, in `dtype`: by default residual's, else x's, else bf16.
    `reference.py` states the arithmetic. Raises ValueError or TypeError for arguments that no backend takes,
    BackendUnavailable where `backend` cannot run.
    """
    (x, x_scale), (weight, weight_scale) = parts(x), parts(weight)
    if dtype is None:
        dtype = residual.dtype if residual is not None else x.dtype if x_scale is None else torch.bfloat16
    args = (x, x_scale, weight, weight_scale, bias, silu, gate, residual, dtype)
    _check(*args)
    return call("gemm", backend, *args)


PACKED = tuple(cpu.PER_LANE)  # the dtypes that `pack` packs


def pack(weight: Tensor, backend: str = "cpu") -> Tensor:
    """A (N, K) matrix, bf16 or int8, once and for all in the layout that a backend's `gemm` and `mix_ffn` read.

    For "cpu": (N / 16, K / n, 16 · n) with n elements in 4 bytes; N is a multiple of 16, and K of 64 bytes. Other backends
    read rows as they are. Raises ValueError for another matrix.
    """
    return cpu.pack(weight) if backend == "cpu" else weight


def unpack(weight: Tensor, backend: str = "cpu") -> Tensor:
    """The (N, K) matrix that `pack` was given."""
    return cpu.unpack(weight) if backend == "cpu" else weight


def parts(rows: Tensor | Quantized) -> tuple[Tensor, Tensor | None]:
    return (rows, None) if isinstance(rows, Tensor) else (rows.values, rows.scale)


def outputs(weight: Tensor) -> int:
    """N of a weight, of rows (N, K) or packed."""
    return weight.shape[0] if weight.ndim == 2 else 16 * weight.shape[0]


def inputs(weight: Tensor) -> int:
    return weight.shape[1] if weight.ndim == 2 else weight.shape[1] * weight.shape[2] // 16


def check_weight(op: str, weight: Tensor) -> None:
    """A matrix of rows, or what `pack` makes."""
    packed = weight.ndim == 3 and weight.shape[2] * weight.element_size() == reference.STEP and weight.is_contiguous()
    if not packed and weight.ndim != 2:
        raise ValueError(f"{op} takes weights as rows (N, K), or from pack; got {tuple(weight.shape)}")


def _rows_only(x, x_scale, weight, *args) -> str | None:
    return "it takes weights as rows (N, K), not packed" if weight.ndim != 2 else None


def _check(x, x_scale, weight, weight_scale, bias, silu, gate, residual, dtype) -> None:
    check_weight("gemm", weight)
    if x.ndim != 3 or 0 in (*x.shape, *weight.shape) or x.shape[2] != inputs(weight):
        raise ValueError(
            f"gemm takes x (B, M, K) and weight (N, K), none of them 0; got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype or (x_scale is None) != (weight_scale is None):
        raise TypeError(
            f"gemm takes x and weight in one dtype, both quantised or neither; got {x.dtype}, {weight.dtype}"
        )
    if x_scale is None and not x.is_floating_point():
        raise TypeError(f"gemm takes floating or quantised operands; got {x.dtype} without scales")
    if gate is not None and residual is None:
        raise ValueError("gemm takes a gate only beside a residual")
    B, M, N = *x.shape[:2], outputs(weight)
    rest = {"x's scale": x_scale, "weight's scale": weight_scale, "bias": bias, "gate": gate, "residual": residual}
    shapes = ((B, M), (N,), (N,), (B, N), (B, M, N))
    for (name, tensor), shape in zip(rest.items(), shapes, strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.device != x.device:
            raise ValueError(
                f"gemm takes {name} of shape {shape} on {x.device}; got {tuple(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"gemm takes {name} in a floating dtype; got {tensor.dtype}")
    if weight.device != x.device:
        raise ValueError(f"gemm takes tensors on one device; got {x.device} and {weight.device}")
    if any(t is not None and t.stride(-1) != 1 for t in (x, residual, gate, bias)):
        raise ValueError("gemm takes tensors with contiguous channels (last stride 1); call .contiguous()")


def call_for_rows(op: str, backend: str, args: tuple, quantize: torch.dtype | None) -> Tensor | Quantized:
    """An op that can end in 8-bit rows: `op`, or where `quantize` names their dtype, its kernel `op`_quantized."""
    if quantize is None:
        return call(op, backend, *args)
    if quantize not in reference.MOST:
        raise TypeError(f"{op} quantises to {' or '.join(map(str, reference.MOST))}, not {quantize}")
    return Quantized(*call(f"{op}_quantized", backend, *args, quantize))


def fake_quantize(x, dtype, backend):
    padded = -(-x.shape[-1] // reference.STEP) * reference.STEP
    return x.new_empty((*x.shape[:-1], padded), dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake(x, x_scale, weight, weight_scale, bias, silu, gate, residual, dtype, backend):
    return x.new_empty((*x.shape[:2], outputs(weight)), dtype=dtype)


register("quantize", "reference", reference.quantize)
triton_ops.register("quantize", "gemm", triton_ops.accepts_rows)
register("quantize", "cuda", cuda.quantize, device="cuda", accepts=cuda.accepts_quantize)
register("quantize", "cpu", cpu.quantize, device="cpu", accepts=cpu.accepts_quantize)
define("quantize", "Tensor x, ScalarType dtype", fake_quantize, returns="(Tensor, Tensor)")

register("gemm", "reference", reference.gemm, accepts=_rows_only)
triton_ops.register("gemm", "gemm", triton_ops.accepts_gemm)
register("gemm", "cuda", cuda.gemm, device="cuda", accepts=cuda.accepts)
register("gemm", "cpu", cpu.gemm, device="cpu", accepts=cpu.accepts)
define(
    "gemm",
    "Tensor x, Tensor? x_scale, Tensor weight, Tensor? weight_scale, Tensor? bias, bool silu, Tensor? gate,"
    " Tensor? residual, ScalarType dtype",
    _fake,
)
