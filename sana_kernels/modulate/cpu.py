"""Hands tensors to the C++ kernels in csrc/modulate."""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension
from sana_kernels.gemm.cpu import address, empty_rows, only_int8


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """As the reference; arguments as `_check` and `_accepts` of this package let them through."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _modulate(x, shift, scale, eps, out, None)
    return out


def accepts_quantized(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> str | None:
    if x.dtype not in DTYPE_CODES:
        return f"it computes in float32, bfloat16 and float16, not {x.dtype}"
    return only_int8(dtype)


def modulate_quantized(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As the reference; `dtype` is int8."""
    values, values_scale = empty_rows(*x.shape)
    _modulate(x, shift, scale, eps, values, values_scale)
    return values, values_scale


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out: Tensor, out_scale: Tensor | None) -> None:
    extension("_cpu")[0].modulate(
        tokens(x), row(shift), row(scale), out.data_ptr(), address(out_scale), x.shape, DTYPE_CODES[x.dtype], eps,
        torch.get_num_threads(),
    )  # fmt: skip


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """As the reference; arguments as `_check` and `_accepts` of this package let them through."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    extension("_cpu")[0].gate_residual(
        tokens(x), tokens(y), row(gate), out.data_ptr(), x.shape, DTYPE_CODES[x.dtype], torch.get_num_threads()
    )  # fmt: skip
    return out


def row(x: Tensor) -> tuple[int, int, int]:
    """A (B, C) tensor as C++ sees it: address, stride of B, dtype."""
    return x.data_ptr(), x.stride(0), DTYPE_CODES[x.dtype]


def tokens(x: Tensor) -> tuple[int, int, int]:
    """A (B, N, C) tensor as C++ sees it: address, strides of B and N."""
    return x.data_ptr(), x.stride(0), x.stride(1)
