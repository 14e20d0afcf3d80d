"""SANA's Mix-FFN (diffusers: GLUMBConv), the specification: a gated inverted bottleneck that sees its neighbours.

    h = SiLU(x W₁ᵀ + b₁)                     1×1 expansion, C → 2F                             gemm
    h = depthwise 3×3 (h) + b_d              zero padding; over the H × W grid that the N tokens are
    a, g = the halves of h                   F each
    u = a · SiLU(g)                                                                            depthwise_glu
    y = u W₂ᵀ                                1×1 projection, F → C, no bias                    gemm
    y = residual + gate · y                  where asked for

Tokens are NHWC: a 1×1 convolution is a linear layer, and the depthwise convolution runs on a channels-last view; nothing is
transposed in memory.

Precision: every operation rounds to x's dtype, and takes the depthwise weight and bias in it. In W8A8, x and u are 8-bit
rows (sana_kernels/gemm/reference.py), h is bf16, and the depthwise convolution and the GLU are computed in fp32, of which u
is quantised; a kernel may do so in 16 bits too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_kernels.conv2d.reference import convolve
from sana_kernels.gemm.reference import gemm, quantize


def depthwise_glu(h: Tensor, height: int, width: int, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, height · width, 2F), (2F, 1, 3, 3), (2F,) → (B, height · width, F), in h's dtype."""
    h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, 2F, H, W) in shape, NHWC in memory
    h = convolve(h, weight.to(h.dtype), bias.to(h.dtype), padding=1, groups=h.shape[1])
    value, gate = h.chunk(2, dim=1)
    return (value * F.silu(gate)).permute(0, 2, 3, 1).flatten(1, 2)


def depthwise_glu_quantized(
    h: Tensor, height: int, width: int, weight: Tensor, bias: Tensor, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """The same as 8-bit rows: (B, N, F rounded up to a multiple of 64) in `dtype` and (B, N) scales."""
    return quantize(depthwise_glu(h.float(), height, width, weight.float(), bias.float()), dtype)


def mix_ffn(
    x: Tensor,
    x_scale: Tensor | None,
    height: int,
    width: int,
    expand_weight: Tensor,
    expand_scale: Tensor | None,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_scale: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """(B, N = height · width, C) → (B, N, C), in residual's dtype, else x's, or bf16 for 8-bit rows.

    Weights: (2F, C), (2F,), (2F, 1, 3, 3), (2F,), (C, F). The scales (B, N), (2F,), (C,) come with 8-bit x and weights;
    gate (B, C) and residual (B, N, C) together.
    """
    middle = x.dtype if x_scale is None else torch.bfloat16
    h = gemm(x, x_scale, expand_weight, expand_scale, expand_bias, True, None, None, middle)
    if x_scale is None:
        u, u_scale = depthwise_glu(h, height, width, depthwise_weight.to(h.dtype), depthwise_bias.to(h.dtype)), None
    else:
        u, u_scale = depthwise_glu_quantized(h, height, width, depthwise_weight, depthwise_bias, x.dtype)
    dtype = middle if residual is None else residual.dtype
    return gemm(u, u_scale, project_weight, project_scale, None, False, gate, residual, dtype)
