"""ReLU linear attention, the specification: self-attention whose cost grows with N, not with N².

With φ = ReLU, per image and head (arXiv 2410.10629, section 2.2; D channels per head):

    S = Σₙ φ(kₙ) vₙᵀ            the state, D × D
    z = Σₙ φ(kₙ)                its normaliser, D
    oₙ = Sᵀ φ(qₙ) / (z · φ(qₙ) + eps)

There is no 1/√D, no mask and no order among the tokens. A token whose φ(q) is all zero gives 0, not NaN: eps is added to
the denominator, never used as a floor. SANA-1.5 and Sprint normalise q and k before the ReLU, each token over all its heads.

Precision: q, k, v are widened to fp32 (fp64 stays fp64) before the ReLU'd products; sums, state and division are fp32, and
one rounding to q's dtype ends it. Sums may run in any order, as long as the same input gives the same bytes.
"""

import torch
from torch import Tensor

from sana_kernels.gemm.reference import gemm, quantize


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / RMS(x) · weight over the last dimension (arXiv 1910.07467), rounded where diffusers rounds.

    The mean square and the quotient are fp32. A 16-bit weight rounds the quotient to its dtype first, and the product
    again; a kernel may leave either rounding out, which brings it closer to the exact result. The result has the
    weight's dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return y.to(weight.dtype) * weight if weight.dtype in (torch.float16, torch.bfloat16) else y * weight


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-5,
    eps: float = 1e-15,
) -> Tensor:
    """(B, N, H, D) × 3 → (B, N, H, D) contiguous, in q's dtype; `q_norm`, `k_norm`: (H·D,) weights or None."""
    dtype = q.dtype
    if q_norm is not None:
        q = rms_norm(q.flatten(2), q_norm, norm_eps).view(q.shape)
    if k_norm is not None:
        k = rms_norm(k.flatten(2), k_norm, norm_eps).view(k.shape)
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (x.transpose(1, 2).to(wide) for x in (q.relu(), k.relu(), v))  # (B, H, N, D)
    state = k.transpose(2, 3) @ v
    normaliser = k.sum(2).unsqueeze(3)
    out = (q @ state) / (q @ normaliser + eps)
    return out.transpose(1, 2).to(dtype).contiguous()


def linear_attention_quantized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-5,
    eps: float = 1e-15,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor]:
    """The same, in q's dtype, as 8-bit rows: (B, N, H·D rounded up to a multiple of 64) in `dtype`, and (B, N) scales."""
    return quantize(linear_attention(q, k, v, q_norm, k_norm, norm_eps, eps).flatten(2), dtype)


def linear_attention_from(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    head_dim: int,
    eps: float = 1e-15,
) -> Tensor:
    """(B, N, K), (3 · H · D, K) → (B, N, H, D): the attention of q, k, v = x weightᵀ, in that order along the rows.

    q, k and v are rounded to x's dtype, or to bf16 where x and weight are 8-bit rows with scales (B, N) and (3 · H · D,).
    """
    dtype = x.dtype if x_scale is None else torch.bfloat16
    qkv = gemm(x, x_scale, weight, weight_scale, None, False, None, None, dtype)
    return linear_attention(*qkv.unflatten(2, (3, -1, head_dim)).unbind(2), eps=eps)
