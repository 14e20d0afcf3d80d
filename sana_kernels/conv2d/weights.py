"""Weights of convolutions: quantised, and laid out once as a backend reads them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_kernels.conv2d import reference
from sana_kernels.conv2d.transforms import CHUNK, quantize_transformed, transform_weight
from sana_kernels.gemm.reference import STEP

PACKED = (torch.float32, torch.bfloat16, torch.int8, torch.int16)
PANEL = 16  # output channels that lie side by side
PANELS = 8  # of a transformed kernel that are multiplied at a time (kWinogradPanels in csrc/conv2d)


class ConvWeight(NamedTuple):
    """A kernel (out, in, k, k), perhaps quantised, perhaps packed: what `conv2d` and `upsample` also take.

    One of `winograd_conv2d` or `winograd_upsample` is transformed: its integers have a scale for each of k × k positions.
    """

    values: Tensor  # (out, in, k, k), or as `pack_conv2d` says
    scale: Tensor | None  # fp32 beside integers: (out,), or where transformed (k, k, out)
    shape: tuple[int, ...]  # (out, in, k, k)

    @property
    def transformed(self) -> bool:
        return self.scale is not None and self.scale.ndim == 3


def quantize_conv2d(weight: Tensor) -> ConvWeight:
    """(out, in, k, k) floating → int8 with one scale per output channel; `reference.py` states the arithmetic."""
    return ConvWeight(*reference.quantize_weight(weight), tuple(weight.shape))


def winograd_conv2d(weight: Tensor, integers: torch.dtype) -> ConvWeight:
    """(out, in, 3, 3) floating → its transform, in integers, for `conv2d` with a stride of 1; `transforms.py` specifies it.

    A quarter of the multiplications. integers: torch.int8, for W8A8; torch.int16, which makes of x in any dtype a result as
    exact as bfloat16.
    """
    return _transformed(weight, 6, integers)


def winograd_upsample(weight: Tensor, integers: torch.dtype) -> ConvWeight:
    """(out, in, 3, 3) floating, of a convolution after nearest ×2, → its transform, for `upsample`: with 9/16 of what the
    folded kernel multiplies. integers: as `winograd_conv2d`."""
    return _transformed(weight, 3, integers)


def _transformed(weight: Tensor, k: int, integers: torch.dtype) -> ConvWeight:
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or not weight.is_floating_point():
        raise ValueError(f"a kernel to transform is floating (out, in, 3, 3); got {weight.dtype} {tuple(weight.shape)}")
    if integers not in (torch.int8, torch.int16):
        raise TypeError(f"kernels are transformed to torch.int8 or torch.int16; got {integers}")
    # Some at a time, which caches hold.
    parts = [quantize_transformed(transform_weight(some, k), integers) for some in weight.split(64)]
    values, scales = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))  # (k, k, out, in), (k, k, out)
    return ConvWeight(values.permute(2, 3, 0, 1), scales, (*weight.shape[:2], k, k))


def pack_conv2d(weight: Tensor | ConvWeight, phases: int = 1, backend: str = "cpu") -> ConvWeight:
    """A kernel once and for all in the layout that a backend reads; `phases` is 4 for a weight of `upsample`.

    weight: (out, in, k, k), float32, bfloat16, int8 or int16. For "cpu": (phases, out / 16, k, K / n, 16 · n) with n
    elements in 4 bytes, where the K values of a row of taps are k times `in`, padded to 4 bytes each and together to 64, and
    out / phases is padded to a multiple of 16; k × k positions of a transform are phases of k = 1, in an order of their own:
    PANELS · 16 output channels of all positions, then the next. In int8, before each chunk of a transform's K stand 4
    bytes, the int32 −128 · (the chunk's sum), for kernels whose other operand is unsigned: 128 more than the values.
    For "cuda" the same values, their channels last in memory, as NVIDIA's library reads them. Other backends read it as it
    is. Raises TypeError for another dtype.
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
    if weight.transformed:
        phases = weight.shape[2] ** 2
        values = values.permute(2, 3, 0, 1).reshape(-1, weight.shape[1], 1, 1)
    taps = values.unflatten(0, (phases, -1)).permute(0, 1, 3, 4, 2)  # (phases, out, k, k, in)
    taps = F.pad(taps, (0, -taps.shape[-1] % n)).flatten(3)
    taps = F.pad(taps, (0, -taps.shape[-1] % (STEP // size), 0, 0, 0, -taps.shape[1] % PANEL))
    if weight.transformed and size == 1:
        chunks = taps.contiguous().split(CHUNK[torch.int8], dim=-1)
        starts = [(-128 * chunk.sum(-1, keepdim=True, dtype=torch.int32)).view(torch.int8) for chunk in chunks]
        taps = torch.cat([piece for pair in zip(starts, chunks, strict=True) for piece in pair], dim=-1)
    panels = taps.contiguous().view(torch.int32).unflatten(1, (-1, PANEL))  # (phases, panels, 16, k, K / n)
    some = panels.split(PANELS if weight.transformed else panels.shape[1], dim=1)
    packed = torch.cat([t.permute(0, 1, 3, 4, 2).flatten() for t in some])
    return weight._replace(values=packed.view(values.dtype).view(packed_shape(weight, phases)))


def packed_shape(weight: ConvWeight, phases: int) -> tuple[int, ...]:
    """Of the values that `pack_conv2d` makes for "cpu"."""
    out, channels, k, _ = weight.shape
    if weight.transformed:
        out, k, phases = k * k * out, 1, k * k
    size = weight.values.element_size()
    n = max(1, 4 // size)
    taps = -(-k * -(-channels // n) * n * size // STEP) * STEP // size
    if weight.transformed and size == 1:
        taps += 4 * -(-taps // CHUNK[torch.int8])
    return phases, -(-out // phases // PANEL), k, taps // n, PANEL * n


def as_weight(weight: Tensor | ConvWeight) -> ConvWeight:
    return ConvWeight(weight, None, tuple(weight.shape)) if isinstance(weight, Tensor) else weight


def upsampled_channels(weight: ConvWeight) -> int:
    """Of what `upsample` makes."""
    return weight.shape[0] if weight.transformed else weight.shape[0] // 4
