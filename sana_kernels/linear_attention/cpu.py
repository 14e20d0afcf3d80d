"""Hands tensors to the C++ kernel in csrc/linear_attention."""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension
from sana_kernels.gemm.cpu import address, empty_rows


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, norm_eps: float, eps: float
) -> Tensor:
    """As the reference; arguments as `_check` and `_accepts` of this package let them through."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _linear_attention(q, k, v, q_norm, k_norm, norm_eps, eps, out, None)
    return out


def linear_attention_quantized(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, norm_eps: float, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference; `dtype` is int8."""
    B, N, H, D = q.shape
    values, scale = empty_rows(B, N, H * D)
    _linear_attention(q, k, v, q_norm, k_norm, norm_eps, eps, values, scale)
    return values, scale


def _linear_attention(q, k, v, q_norm, k_norm, norm_eps, eps, out: Tensor, out_scale: Tensor | None) -> None:
    extension("_cpu")[0].linear_attention(
        [x.data_ptr() for x in (q, k, v, out)],
        address(out_scale),
        q.shape,
        [x.stride()[:3] for x in (q, k, v)],
        DTYPE_CODES[q.dtype],
        [None if w is None else (w.data_ptr(), DTYPE_CODES[w.dtype]) for w in (q_norm, k_norm)],
        norm_eps,
        eps,
        torch.get_num_threads(),
    )
