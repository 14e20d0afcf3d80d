"""The formats of quantised tensors, to the bit. Checkpoints store them row-major as they stand here; backends pack at load.

int8 (W8A8)     per row: sana_kernels/gemm/reference.py, `quantize`.

int4 (W4A16, W4A8, W4A4)    symmetric in [−7, 7], no zero point, one scale per group of `group` neighbours along K:

    scale  = max |group| / 7, in fp32, rounded to `scale_dtype`
    values = group · (1 / scale), both steps in fp32, rounded to nearest, ties to even, kept within ±7

A group without any |element| ≥ 2⁻¹⁰⁰ counts as zero (scale 0). Rows are padded with zeros to a multiple of `group`: 5600 is
87.5 groups of 64. Two values share a byte, that of even k in the low nibble, as two's complement (−8 does not occur). Groups
are of 64; those of weights that meet 16-bit activations may be any multiple, such as 128.

SVDQuant (W4A4; arXiv 2411.05007)   y ≈ dequantised(x / smooth) · dequantised(W)ᵀ + (x · downᵀ) · upᵀ: int4 weights of the
smoothed residual; smooth (K,), fp32 or 16 bits; down (r, K), that has been divided by smooth, and up (N, r), in 16 bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sana_kernels.gemm.reference import SMALLEST, quantize

GROUP = 64
MOST = 7.0


class Int4(NamedTuple):
    """Rows of 4-bit values with a scale per group: what `quantize_int4` returns."""

    values: Tensor  # (..., Kp / 2) uint8, Kp: K rounded up to a multiple of the group
    scale: Tensor  # (..., Kp / group) fp32


def quantize_int4(
    x: Tensor, smooth: Tensor | None = None, group: int = GROUP, scale_dtype: torch.dtype = torch.float32
) -> Int4:
    """(..., K) floating, finite, divided by smooth (K,) in fp32 first → values (..., Kp / 2), scale (..., Kp / group).

    scale_dtype: torch.float32, or torch.bfloat16, in which scales take half the room in a checkpoint; they are fp32 here.
    """
    x = x.float() if smooth is None else x.float() / smooth.float()
    groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1)
    most = torch.full_like(largest, MOST)  # GPUs divide by a number through its reciprocal: two roundings
    scale = torch.where(largest < SMALLEST, 0, largest / most).to(scale_dtype).float()
    inverse = torch.where(scale == 0, 0, 1 / scale)
    values = (groups * inverse[..., None]).round().clamp(-MOST, MOST).flatten(-2).to(torch.int8)
    return Int4(pack_int4(values), scale)


def pack_int4(values: Tensor) -> Tensor:
    """(..., K) int8 in [−8, 7], K even → (..., K / 2) uint8, even k in the low nibble."""
    nibbles = (values.view(torch.uint8) & 15).unflatten(-1, (-1, 2))
    return nibbles[..., 0] | nibbles[..., 1] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """(..., K / 2) uint8 → (..., K) int8."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return ((nibbles ^ 8) - 8).view(torch.int8)


def dequantize_int4(rows: Int4) -> Tensor:
    """The fp64 rows (..., Kp) that 4-bit ones stand for; oracles are made of these."""
    values = unpack_int4(rows.values).double()
    return (values.unflatten(-1, (rows.scale.shape[-1], -1)) * rows.scale.double()[..., None]).flatten(-2)


def int4_to_int8(weight: Int4) -> tuple[Tensor, Tensor]:
    """4-bit weights (N, K) as 8-bit ones with a scale per output channel, for `gemm`: W4A8.

    Tensor cores since sm_90 and CPUs have no 4-bit products; what this second rounding costs is 23 dB below the first.
    """
    return quantize(dequantize_int4(weight).float(), torch.int8)
