"""Adaptive layer norm and gated residual, the specification (arXiv 2212.09748, adaLN-Zero, as SANA uses it).

    modulate(x)         = LayerNorm(x) · (1 + scale) + shift        no affine parameters of its own
    gate_residual(x, y) = x + gate · y

shift, scale and gate are one row per image, the same for all its tokens.

Precision: mean and variance (biased, over C) are fp32 or wider. PyTorch, and so this file, rounds to x's dtype after every
operation; a kernel computes in fp32 and rounds once, which is closer to the exact result. Quantised rows are made of the
fp32 result, before it is rounded to x's dtype (sana_kernels/gemm/reference.py says how).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_kernels.gemm.reference import quantize


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """(B, N, C), (B, C), (B, C) → (B, N, C) contiguous, in x's dtype."""
    y = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    return y.to(x.dtype).contiguous()


def modulate_quantized(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """The same as 8-bit rows: (B, N, C rounded up to a multiple of 64) in `dtype` and (B, N) scales."""
    return quantize(modulate(x.float(), shift.float(), scale.float(), eps), dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """(B, N, C), (B, N, C), (B, C) → (B, N, C) contiguous, in x's dtype."""
    return (x + gate.unsqueeze(1) * y).to(x.dtype).contiguous()
