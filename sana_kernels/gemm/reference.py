"""Matrix products with an epilogue, in 16 bits or in 8, the specification.

    y = x Wᵀ + b            then y = SiLU(y), then y = residual + gate · y, each where asked for

W8A8 (arXiv 2410.10629, section 3.3): both operands have 8-bit values and one fp32 scale per row, that is per token of x
and per output channel of W. Symmetric, so there is no zero point:

    scale = max |row| / most        values = row · (most / max |row|), rounded to nearest, ties to even

in fp32, with most = 127 for int8 and 448 for fp8 (e4m3); a row without any |element| ≥ 2⁻¹⁰⁰ counts as zero (scale 0).
Products of int8 values are summed as int32, exactly, and y = sum · (x's scale · W's scale) in fp32. Rows are padded with
zeros to a multiple of 64 values for the matrix units.

Precision: 8-bit products and all that follows them are fp32, rounded once, to the result's dtype. Of other operands, every
operation rounds to their dtype, as PyTorch does; a kernel may leave out any rounding but the last, and take subnormal
operands for zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 64  # 8-bit rows are padded to a multiple of this
SMALLEST = 2.0**-100  # the reciprocal of anything larger is finite in fp32
MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """(..., K) floating, finite → values (..., K rounded up to a multiple of 64) in `dtype` and scale (...,) fp32."""
    x, most = x.float(), MOST[dtype]
    largest = x.abs().amax(-1)
    zero = largest < SMALLEST
    divisor = torch.full_like(largest, most)  # dividing by or of a number, PyTorch may round twice
    scale = torch.where(zero, 0, largest / divisor)
    values = x * torch.where(zero, 0, divisor / largest)[..., None]
    if dtype == torch.int8:
        values = values.round()
    values = values.clamp(-most, most).to(dtype)
    padding = values.new_zeros(*values.shape[:-1], -x.shape[-1] % STEP)
    return torch.cat([values, padding], dim=-1), scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """The fp64 rows that 8-bit ones stand for; oracles are made of these."""
    return values.double() * scale.double()[..., None]


def gemm(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(B, M, K), (N, K) → (B, M, N) in `dtype`.

    Operands in one floating dtype, or in one of 8 bits with x_scale (B, M) and weight_scale (N,). bias (N,);
    residual (B, M, N), and with it or not gate (B, N), in any floating dtype.
    """
    if x_scale is None:
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    else:
        sums = x.double() @ weight.double().t()  # fp64 holds every sum of int8 products exactly
        y = sums.float() * (x_scale[..., None] * weight_scale)
        y = y if bias is None else y + bias.float()
    if silu:
        y = F.silu(y)
    if residual is not None:
        y = residual + (y if gate is None else gate.unsqueeze(1) * y)
    return y.to(dtype).contiguous()  # else it may have the residual's strides
