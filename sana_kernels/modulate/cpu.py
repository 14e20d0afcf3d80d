"""Hands tensors to the C++ kernels in csrc/modulate."""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """As the reference; arguments as `_check` and `_accepts` of this package let them through."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    extension("_cpu")[0].modulate(
        x.data_ptr(), out.data_ptr(), x.shape, x.stride()[:2], DTYPE_CODES[x.dtype], _row(shift), _row(scale), eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """As the reference; arguments as `_check` and `_accepts` of this package let them through."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    extension("_cpu")[0].gate_residual(
        x.data_ptr(), y.data_ptr(), out.data_ptr(), x.shape, x.stride()[:2], y.stride()[:2], DTYPE_CODES[x.dtype],
        _row(gate), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _row(row: Tensor) -> tuple[int, int, int]:
    """A (B, C) tensor as C++ sees it: address, stride of B, dtype."""
    return row.data_ptr(), row.stride(0), DTYPE_CODES[row.dtype]
