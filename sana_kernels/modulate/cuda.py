"""Hands tensors to the CUDA kernels in csrc/modulate."""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension
from sana_kernels.gemm.cuda import MAX_ROW, empty_quantized, quantized_rows
from sana_kernels.modulate.cpu import row, tokens


def accepts(x, *args) -> str | None:
    if x.dtype not in DTYPE_CODES:
        return f"it computes in float32, bfloat16 and float16, not {x.dtype}"
    if x.shape[2] > MAX_ROW:
        return f"it supports up to {MAX_ROW} channels, not {x.shape[2]}"
    return None


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """As the reference; arguments as `_check` and `accepts` of this package let them through."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _modulate(x, shift, scale, eps, out.data_ptr(), None)
    return out


def modulate_quantized(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """As the reference: 8-bit rows and their scales."""
    out = empty_quantized(x, dtype)
    _modulate(x, shift, scale, eps, 0, quantized_rows(out))
    return out


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out: int, quantized: tuple | None) -> None:
    with torch.cuda.device(x.device):
        extension("_cuda")[0].modulate(
            tokens(x), row(shift), row(scale), out, quantized, x.shape, DTYPE_CODES[x.dtype], eps,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """As the reference; arguments as `_check` and `accepts` of this package let them through."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        extension("_cuda")[0].gate_residual(
            tokens(x), tokens(y), row(gate), out.data_ptr(), x.shape, DTYPE_CODES[x.dtype],
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return out
