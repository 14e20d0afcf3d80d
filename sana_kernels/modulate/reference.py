"""Adaptive layer norm and gated residual, the specification (arXiv 2212.09748, adaLN-Zero, as SANA uses it).

    modulate(x)         = LayerNorm(x) · (1 + scale) + shift        no affine parameters of its own
    gate_residual(x, y) = x + gate · y

shift, scale and gate are one row per image, the same for all its tokens.

Precision: mean and variance (biased, over C) are fp32 or wider. PyTorch, and so this file, rounds to x's dtype after every
operation; a kernel computes in fp32 and rounds once, which is closer to the exact result.
"""

import torch.nn.functional as F
from torch import Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """(B, N, C), (B, C), (B, C) → (B, N, C) contiguous, in x's dtype."""
    y = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    return y.to(x.dtype).contiguous()


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """(B, N, C), (B, N, C), (B, C) → (B, N, C) contiguous, in x's dtype."""
    return (x + gate.unsqueeze(1) * y).to(x.dtype).contiguous()
