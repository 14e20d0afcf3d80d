"""Weights of convolutions: quantised, and laid out once as a backend reads them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_kernels.conv2d import reference
from sana_kernels.gemm.reference import STEP

PACKED = (torch.float32, torch.bfloat16, torch.int8, torch.int16)
PANEL = 16  # output channels that lie side by side
WINOGRAD = 4  # k of the kernels that Winograd's transform makes of 3 × 3


class ConvWeight(NamedTuple):
    """A kernel (out, in, k, k), perhaps quantised, perhaps packed: what `conv2d` and `upsample` also take.

    int8 and int16 values of k = 4 are Winograd's, of a 3 × 3 kernel.
    """

    values: Tensor  # (out, in, k, k), or as `pack_conv2d` says
    scale: Tensor | None  # (out,) fp32 beside integers
    shape: tuple[int, ...]  # (out, in, k, k)


def quantize_conv2d(weight: Tensor, winograd: bool = False) -> ConvWeight:
    """(out, in, k, k) floating → int8 with one scale per output channel; `reference.py` states the arithmetic.

    winograd: of a 3 × 3 kernel, its 4 × 4 transform, for `conv2d` with a stride of 1: 4/9 of the multiplications.
    """
    if winograd:
        weight = reference.winograd_weight(weight)
    return ConvWeight(*reference.quantize_weight(weight), tuple(weight.shape))


def winograd_conv2d(weight: Tensor) -> ConvWeight:
    """(out, in, 3, 3) floating → its 4 × 4 transform in int16, with one scale per output channel, for `conv2d` with a stride
    of 1: as close to the convolution as bfloat16, with 4/9 of the multiplications; `reference.py` says where it is not."""
    values, scale = reference.quantize_int16(reference.winograd_weight(weight))
    return ConvWeight(values, scale, tuple(values.shape))


def pack_conv2d(weight: Tensor | ConvWeight, phases: int = 1, backend: str = "cpu") -> ConvWeight:
    """A kernel once and for all in the layout that a backend reads; `phases` is 4 for a weight of `upsample`.

    weight: (out, in, k, k), float32, bfloat16, int8 or int16. For "cpu": (phases, out / 16, k, K / n, 16 · n) with n
    elements in 4 bytes, where the K values of a row of taps are k times `in`, padded to 4 bytes each and together to 64, and
    out / phases is padded to a multiple of 16; Winograd's 4 × 4 values are 16 phases of k = 1. For "cuda" the same values,
    their channels last in memory, as NVIDIA's library reads them. Other backends read it as it is. Raises TypeError for
    another dtype.
    """
    weight = as_weight(weight)
    if backend == "cuda":
        return weight._replace(values=weight.values.contiguous(memory_format=torch.channels_last))
    if backend != "cpu" or weight.values.ndim != 4:
        return weight
    values, size = weight.values, weight.values.element_size()
    if values.dtype not in PACKED:
        raise TypeError(f"pack_conv2d takes float32, bfloat16, int8 and int16; got {values.dtype}")
    n = 4 // size
    if weight.shape[-1] == WINOGRAD:
        values, phases = values.permute(2, 3, 0, 1).reshape(-1, weight.shape[1], 1, 1), WINOGRAD**2
    taps = values.unflatten(0, (phases, -1)).permute(0, 1, 3, 4, 2)  # (phases, out, k, k, in)
    taps = F.pad(taps, (0, -taps.shape[-1] % n)).flatten(3)
    taps = F.pad(taps, (0, -taps.shape[-1] % (STEP // size), 0, 0, 0, -taps.shape[1] % PANEL))
    panels = taps.unflatten(1, (-1, PANEL)).unflatten(-1, (-1, n))  # (phases, panels, 16, k, K / n, n)
    return weight._replace(values=panels.permute(0, 1, 3, 4, 2, 5).flatten(4).contiguous())


def packed_shape(weight: ConvWeight, phases: int) -> tuple[int, ...]:
    """Of the values that `pack_conv2d` makes for "cpu"."""
    out, channels, k, _ = weight.shape
    if k == WINOGRAD:
        out, k, phases = k * k * out, 1, k * k
    size = weight.values.element_size()
    n = max(1, 4 // size)
    taps = -(-k * -(-channels // n) * n * size // STEP) * STEP // size
    return phases, -(-out // phases // PANEL), k, taps // n, PANEL * n


def as_weight(weight: Tensor | ConvWeight) -> ConvWeight:
    return ConvWeight(weight, None, tuple(weight.shape)) if isinstance(weight, Tensor) else weight
