"""SANA's Mix-FFN (diffusers: GLUMBConv), the specification: a gated inverted bottleneck that sees its neighbours.

    h = SiLU(x W₁ᵀ + b₁)                     1×1 expansion, C → 2F
    h = depthwise 3×3 (h) + b_d              zero padding; over the H × W grid that the N tokens are
    a, g = the halves of h                   F each
    y = (a · SiLU(g)) W₂ᵀ                    1×1 projection, F → C, no bias

Tokens are NHWC: a 1×1 convolution is a linear layer, and the depthwise convolution runs on a channels-last view; nothing is
transposed in memory. Every operation rounds to x's dtype.
"""

import torch.nn.functional as F
from torch import Tensor


def mix_ffn(
    x: Tensor,
    height: int,
    width: int,
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
) -> Tensor:
    """(B, N = height · width, C) → (B, N, C), in x's dtype. Weights: (2F, C), (2F,), (2F, 1, 3, 3), (2F,), (C, F)."""
    h = F.silu(F.linear(x, expand_weight, expand_bias))
    h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, 2F, H, W) in shape, NHWC in memory
    h = F.conv2d(h, depthwise_weight, depthwise_bias, padding=1, groups=h.shape[1])
    value, gate = h.chunk(2, dim=1)
    h = value * F.silu(gate)
    return F.linear(h.permute(0, 2, 3, 1).flatten(1, 2), project_weight)
