"""Hands tensors to the C++ kernel in csrc/cross_attention."""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension
from sana_kernels.gemm.cpu import address, empty_rows, only_int8


def accepts(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> str | None:
    if q.dtype not in DTYPE_CODES:
        return f"it computes in float32, bfloat16 and float16, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"it supports head dims that are multiples of 8 up to 128, not {q.shape[3]}"
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        return "it takes q, k and v with contiguous channels (last stride 1); call .contiguous()"
    return None


def accepts_quantized(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> str | None:
    return accepts(q, k, v, lengths) or only_int8(dtype)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """As the reference; arguments as this package lets them through."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _cross_attention(q, k, v, lengths, out, None)
    return out


def cross_attention_quantized(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As the reference; `dtype` is int8."""
    B, N, H, D = q.shape
    values, scale = empty_rows(B, N, H * D)
    _cross_attention(q, k, v, lengths, values, scale)
    return values, scale


def _cross_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, out: Tensor, out_scale: Tensor | None
) -> None:
    B, N, H, D = q.shape
    extension("_cpu")[0].cross_attention(
        [x.data_ptr() for x in (q, k, v, out)],
        address(out_scale),
        None if lengths is None else lengths.tolist(),
        (B, N, k.shape[1], H, D),
        [x.stride()[:3] for x in (q, k, v)],
        DTYPE_CODES[q.dtype],
        torch.get_num_threads(),
    )
