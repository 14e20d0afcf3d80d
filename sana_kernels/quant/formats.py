"""The formats of quantised tensors, to the bit. Checkpoints store them row-major as they stand here; backends pack at load.

All are symmetric and have no zero point. Rounding is to nearest, ties to even. Rows are padded with zeros along K to a
multiple of 64, or of the group where that is larger, before they are quantised: 5600 becomes 5632. Zeros may be appended
to any row, and rows of zeros to any weight, without changing a product; a backend that wants more does so at load.

int8, fp8 (W8A8, W8A16)     one fp32 scale per row: sana_kernels/gemm/reference.py, `quantize`.

int4 (W4A16, W4A8, W4A4)    in [−7, 7], one scale per group of `group` neighbours along K:

    scale  = max |group| / 7, in fp32, rounded to `scale_dtype`
    values = group · (1 / scale), both steps in fp32, rounded to nearest, ties to even, kept within ±7

A group without any |element| ≥ 2⁻¹⁰⁰ counts as zero (scale 0). Two values share a byte, that of even k in the low nibble, as
two's complement (−8 does not occur). Groups are of 64; those of weights that meet 16-bit activations may be any multiple,
such as 128.

nvfp4 (storage only)        e2m1 values {0, ½, 1, 1½, 2, 3, 4, 6} in groups of 16, whose scales are e4m3 with an fp32 factor:

    tensor_scale = max |tensor| / (6 · 448), in fp32
    scale        = max |group| / 6 / tensor_scale, in fp32, rounded to e4m3, at most 448
    values       = group · (1 / (scale · tensor_scale)), in fp32, rounded to the nearest e2m1, ties to an even code

Codes are sign · 8 + index in the list above, two in a byte as for int4. A group whose scale rounds to 0 counts as zero.

SVDQuant (W4A4; arXiv 2411.05007)   y ≈ dequantised(x / smooth) · dequantised(W)ᵀ + (x · downᵀ) · upᵀ: int4 weights of the
smoothed residual; smooth (K,), fp32 or 16 bits; down (r, K), that has been divided by smooth, and up (N, r), in 16 bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sana_kernels.gemm.reference import SMALLEST, dequantize, quantize

GROUP, NVFP4_GROUP = 64, 16
MOST, E2M1_MOST, E4M3_MOST = 7.0, 6.0, 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
WEIGHTS = ("int8", "fp8", "int4", "nvfp4")  # formats of weights
ACTIVATIONS = ("int8", "fp8", "int4", "16bit")  # what they are multiplied with


class Int4(NamedTuple):
    """Rows of 4-bit values with a scale per group: what `quantize_int4` returns."""

    values: Tensor  # (..., Kp / 2) uint8, Kp: K rounded up to a multiple of the group
    scale: Tensor  # (..., Kp / group) fp32


class Nvfp4(NamedTuple):
    """Rows of e2m1 values with e4m3 scales: what `quantize_nvfp4` returns."""

    values: Tensor  # (..., Kp / 2) uint8, Kp: K rounded up to a multiple of 64
    scale: Tensor  # (..., Kp / 16) float8_e4m3fn
    tensor_scale: Tensor  # () fp32


# ------------------------------------------------------------------------------------------------ int4


def int4_steps(x: Tensor, group: int = GROUP, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(..., K) fp32 → integers (..., Kp / group, group) and scale (..., Kp / group), both fp32: int4 before packing."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    scale = int4_scale(groups, scale_dtype)
    return int4_round(groups, scale[..., None]), scale


def int4_scale(groups: Tensor, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """The fp32 scale (...,) of groups (..., group)."""
    largest = groups.abs().amax(-1)
    most = torch.full_like(largest, MOST)  # GPUs divide by a number through its reciprocal: two roundings
    return torch.where(largest < SMALLEST, 0, largest / most).to(scale_dtype).float()


def int4_round(x: Tensor, scale: Tensor) -> Tensor:
    """x in steps of a scale that broadcasts with it: integers in [−7, 7], in fp32."""
    return (x * torch.where(scale == 0, 0, 1 / scale)).round().clamp(-MOST, MOST)


def quantize_int4(
    x: Tensor, smooth: Tensor | None = None, group: int = GROUP, scale_dtype: torch.dtype = torch.float32
) -> Int4:
    """(..., K) floating, finite, divided by smooth (K,) in fp32 first → values (..., Kp / 2), scale (..., Kp / group).

    scale_dtype: torch.float32, or torch.bfloat16, in which scales take half the room in a checkpoint; they are fp32 here.
    """
    x = x.float() if smooth is None else x.float() / smooth.float()
    integers, scale = int4_steps(x, group, scale_dtype)
    return Int4(pack_int4(integers.flatten(-2).to(torch.int8)), scale)


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


# ------------------------------------------------------------------------------------------------ nvfp4


def quantize_nvfp4(x: Tensor) -> Nvfp4:
    """(..., K) floating, finite → values (..., Kp / 2), scale (..., Kp / 16), tensor_scale ()."""
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, NVFP4_GROUP))
    largest = groups.abs().amax(-1)
    tensor_scale = largest.max() / torch.tensor(E2M1_MOST * E4M3_MOST, device=x.device)
    relative = largest / torch.full_like(largest, E2M1_MOST) / tensor_scale
    scale = torch.where(tensor_scale == 0, 0, relative).clamp(max=E4M3_MOST).to(torch.float8_e4m3fn)
    step = (scale.float() * tensor_scale)[..., None]
    return Nvfp4(_pack(_e2m1_codes(groups * torch.where(step == 0, 0, 1 / step)).flatten(-2)), scale, tensor_scale)


def dequantize_nvfp4(rows: Nvfp4) -> Tensor:
    """The fp64 rows (..., Kp) that these stand for."""
    codes = torch.stack([rows.values & 15, rows.values >> 4], dim=-1).flatten(-2).long()
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64, device=codes.device)[codes]
    scale = rows.scale.double() * rows.tensor_scale.double()
    return (values.unflatten(-1, (-1, NVFP4_GROUP)) * scale[..., None]).flatten(-2)


def _e2m1_codes(x: Tensor) -> Tensor:
    """The codes (uint8) of the nearest e2m1 numbers. Steps are ½ up to 2, 1 up to 4 and 2 up to 6, codes 0, 4, 6, 7."""
    size = x.abs()
    code = torch.where(size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    return code.clamp(max=7).to(torch.uint8) | torch.signbit(x).to(torch.uint8) << 3


def _pack(codes: Tensor) -> Tensor:
    nibbles = codes.unflatten(-1, (-1, 2))
    return nibbles[..., 0] | nibbles[..., 1] << 4


# ------------------------------------------------------------------------------------------------ activations


def fake_quantize(x: Tensor, activations: str) -> Tensor:
    """The rows (..., K) in fp32 that x's quantised ones stand for; activations: one of ACTIVATIONS."""
    if activations == "16bit":
        return x.float()
    if activations == "int4":
        integers, scale = int4_steps(x.float())
        return (integers * scale[..., None]).flatten(-2)[..., : x.shape[-1]]
    return dequantize(*quantize(x, EIGHT_BITS[activations])).float()[..., : x.shape[-1]]
