"""The elementwise frame around every part of a DiT block: adaptive layer norm before it, gated residual after it."""

import torch
from torch import Tensor

from sana_kernels import triton_ops
from sana_kernels.backend import DTYPE_CODES, call, define, register
from sana_kernels.gemm import Quantized, call_for_rows, fake_quantize
from sana_kernels.modulate import cpu, cuda, reference


def modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    quantize: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | Quantized:
    """LayerNorm(x) · (1 + scale) + shift, without affine parameters (arXiv 2212.09748, adaLN).

    x: (B, N, C); shift, scale: (B, C), in x's dtype or fp32. All with any strides but the last, which is 1: slices of a
    (B, 6, C) modulation table will do. Returns (B, N, C), contiguous, in x's dtype; with `quantize` (torch.int8 or
    torch.float8_e4m3fn) the same rows `Quantized`, for the next matrix product. `reference.py` states the arithmetic.
    Raises ValueError or TypeError for arguments that no backend takes, BackendUnavailable where `backend` cannot run.
    """
    _check("modulate", (x,), (shift, scale))
    return call_for_rows("modulate", backend, (x, shift, scale, eps), quantize)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """x + gate · y. x, y: (B, N, C); gate: (B, C), in x's dtype or fp32. Strides, result and errors as `modulate`."""
    _check("gate_residual", (x, y), (gate,))
    return call("gate_residual", backend, x, y, gate)


def _check(op: str, tokens: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> None:
    x = tokens[0]
    shape = x.shape
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"{op} takes x of shape (B, N, C), none of them 0; got {tuple(shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{op} takes floating dtypes; got {x.dtype}")
    for tensor, expected, dtypes in (
        *((t, shape, (x.dtype,)) for t in tokens),
        *((t, (shape[0], shape[2]), (x.dtype, torch.float32)) for t in rows),
    ):
        if tensor.shape != expected or tensor.device != x.device:
            raise ValueError(
                f"{op} takes one shape (B, N, C) for tokens and (B, C) for their modulation, on one device: here"
                f" {tuple(expected)} on {x.device}; got {tuple(tensor.shape)} on {tensor.device}"
            )
        if tensor.dtype not in dtypes:
            raise TypeError(f"{op} takes tokens of one dtype, and modulation in it or in float32; got {tensor.dtype}")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{op} takes tensors with contiguous channels (last stride 1); call .contiguous()")


def _accepts(x, *args) -> str | None:
    return None if x.dtype in DTYPE_CODES else f"it computes in float32, bfloat16 and float16, not {x.dtype}"


register("modulate", "reference", reference.modulate)
triton_ops.register("modulate", "modulate", triton_ops.accepts_rows)
register("modulate", "cuda", cuda.modulate, device="cuda", accepts=cuda.accepts)
register("modulate", "cpu", cpu.modulate, device="cpu", accepts=_accepts)
define("modulate", "Tensor x, Tensor shift, Tensor scale, float eps", lambda x, *args: x.new_empty(x.shape))

register("modulate_quantized", "reference", reference.modulate_quantized)
triton_ops.register("modulate_quantized", "modulate", triton_ops.accepts_rows)
register("modulate_quantized", "cuda", cuda.modulate_quantized, device="cuda", accepts=cuda.accepts)
register("modulate_quantized", "cpu", cpu.modulate_quantized, device="cpu", accepts=cpu.accepts_quantized)
define(
    "modulate_quantized",
    "Tensor x, Tensor shift, Tensor scale, float eps, ScalarType dtype",
    lambda x, shift, scale, eps, dtype, backend: fake_quantize(x, dtype, backend),
    returns="(Tensor, Tensor)",
)

register("gate_residual", "reference", reference.gate_residual)
triton_ops.register("gate_residual", "modulate", triton_ops.accepts_rows)
register("gate_residual", "cuda", cuda.gate_residual, device="cuda", accepts=cuda.accepts)
register("gate_residual", "cpu", cpu.gate_residual, device="cpu", accepts=_accepts)
define("gate_residual", "Tensor x, Tensor y, Tensor gate", lambda x, *args: x.new_empty(x.shape))
