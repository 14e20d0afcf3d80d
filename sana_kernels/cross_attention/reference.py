"""Softmax attention of the image tokens to the text tokens, the specification.

    oₙ = Σ_{l < length} softmax_l(qₙ · k_l / √D) v_l           per image and head

Text tokens from `lengths[b]` on are padding and take no part (diffusers adds -10000 to their scores instead: the same to
the last bit in fp32, because exp(-10000) is 0). This is the library's scaled_dot_product_attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_kernels.gemm.reference import quantize


def cross_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """(B, N, H, D), (B, L, H, D), (B, L, H, D), (B,) integers or None → (B, N, H, D) contiguous, in q's dtype.

    `lengths` on the CPU can be looked at without waiting for a GPU: where all are equal the padding is cut off, and the
    library's kernels without a mask, which are faster, do the rest.
    """
    mask = None
    if lengths is not None:
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and len(set(lengths.tolist())) == 1:
            k, v = k[:, : int(lengths[0])], v[:, : int(lengths[0])]
        else:
            columns = torch.arange(k.shape[1], device=q.device)
            mask = (columns < lengths.to(q.device).unsqueeze(1))[:, None, None]  # (B, 1, 1, L)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous()


def cross_attention_quantized(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """The same, in q's dtype, as 8-bit rows: (B, N, H·D rounded up to a multiple of 64) in `dtype`, and (B, N) scales."""
    return quantize(cross_attention(q, k, v, lengths).flatten(2), dtype)
