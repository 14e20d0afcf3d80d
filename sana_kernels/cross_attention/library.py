"""PyTorch's own FlashAttention for captions of several lengths, which stays on the GPU: nothing reads `lengths`.

The kernel counts sequences by offsets, and of each sequence's keys takes as many as its length says. So the padded keys
and values are handed over as they lie, no padding is multiplied, and a CUDA graph serves every prompt.
scaled_dot_product_attention knows lengths only as a mask, over all of L, for which it leaves FlashAttention.
"""

from functools import cache

import torch
from torch import Tensor

MAX_HEAD_DIM = 256


def accepts(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention computes in bfloat16 and float16, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > MAX_HEAD_DIM:
        return f"FlashAttention supports head dims that are multiples of 8 up to {MAX_HEAD_DIM}, not {q.shape[3]}"
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        return "FlashAttention takes q, k and v with contiguous channels (last stride 1); call .contiguous()"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "FlashAttention needs a GPU of compute capability 8.0 or higher"
    return None


@cache
def offsets(sequences: int, length: int, device: torch.device) -> Tensor:
    """(sequences + 1,) int32: where each sequence of this length begins. Never let go: CUDA graphs hold its address."""
    return torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32, device=device)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """As the reference; arguments as this package and `accepts` let them through."""
    (B, N), L = q.shape[:2], k.shape[1]
    used = None if lengths is None else lengths.to(q.device, torch.int32)
    out, *_ = torch.ops.aten._flash_attention_forward(
        *(x.flatten(0, 1) for x in (q, k, v)), offsets(B, N, q.device), offsets(B, L, q.device), N, L,
        0.0, False, False, seqused_k=used,
    )  # fmt: skip
    return out.view(q.shape)
