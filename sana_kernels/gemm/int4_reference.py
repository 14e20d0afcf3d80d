"""Matrix products with 4-bit weights, the specification. sana_kernels/quant/formats.py has the formats.

    W4A16   y = x · Wᵀ                          x in 16 bits, W int4 in groups of 64 or a multiple
    W4A4    y = x · Wᵀ + low · upᵀ              x and W int4 in groups of 64; low = x₁₆ · downᵀ in 16 bits, or left out

and then the epilogue of `gemm`: + bias, SiLU, residual + gate · y, each where asked for.

Precision: products of 4-bit values are summed exactly within a group; groups, and products with 16-bit values, are summed
in fp32, and all that follows is fp32, rounded once, to the result's dtype. No dequantised weight is rounded to 16 bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_kernels.quant.formats import Int4, dequantize_int4


def finish(
    y: Tensor, bias: Tensor | None, silu: bool, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The epilogue, in y's dtype, fp32 or wider."""
    y = y if bias is None else y + bias.to(y.dtype)
    y = F.silu(y) if silu else y
    y = y if gate is None else gate.to(y.dtype).unsqueeze(1) * y
    y = y if residual is None else residual.to(y.dtype) + y
    return y.to(dtype).contiguous()  # else it may have the residual's strides


def gemm_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    silu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(B, M, K), int4 (N, Kp / 2), (N, Kp / group) → (B, M, N) in `dtype`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    w = dequantize_int4(Int4(weight, weight_scale)).to(wide)[:, : x.shape[2]]
    return finish(x.to(wide) @ w.t(), bias, silu, gate, residual, dtype)


def gemm_w4a4(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """int4 (B, M, Kp / 2), (B, M, Kp / 64), (N, Kp / 2), (N, Kp / 64); (B, M, r), (N, r) → (B, M, N) in `dtype`."""
    wide = torch.promote_types(x_scale.dtype, torch.float32)
    x, w = (dequantize_int4(Int4(*rows)).to(wide) for rows in ((x, x_scale), (weight, weight_scale)))
    y = x @ w.t()
    if low is not None:
        y = y + low.to(wide) @ up.to(wide).t()
    return finish(y, bias, silu, gate, residual, dtype)
