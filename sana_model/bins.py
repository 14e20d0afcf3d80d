"""The aspect-ratio bins that the published checkpoints were trained on (opt-in: `binning=True`).

A size is mapped to the bin of the nearest height/width ratio, painted there, resized to cover what was asked for, and
centre-cropped: exactly as diffusers' `use_resolution_binning`. Free sizes (any multiple of 32) need none of this.
"""

import torch.nn.functional as F
from torch import Tensor

from sana_model.errors import UserError

# (height, width) in units of 1/32 of the native side. The larger models have seven more.
_BINS = (
    (16, 64), (16, 58), (18, 56), (18, 54), (18, 52), (20, 50), (20, 48), (22, 46), (22, 44), (22, 42), (24, 42), (24, 40),
    (26, 38), (26, 36), (28, 36), (28, 34), (30, 34), (30, 32), (32, 32), (32, 30), (34, 30), (34, 28), (36, 28), (36, 26),
    (38, 26), (40, 24), (42, 24), (44, 22), (46, 22), (48, 20), (50, 20), (54, 18), (64, 16),
)  # fmt: skip
_LARGE_ONLY = ((16, 62), (16, 60), (52, 18), (56, 18), (58, 16), (60, 16), (62, 16))
NATIVE_SIZES = (512, 1024, 2048, 4096)


def bins(native: int) -> tuple[tuple[int, int], ...]:
    """All (height, width) in pixels of a model whose native side is `native`: 33 up to 1024 px, 40 above."""
    if native not in NATIVE_SIZES:
        raise UserError(
            f"aspect-ratio bins exist for models of {', '.join(map(str, NATIVE_SIZES))} px, and this one is a {native} px "
            "model; leave out --binning and ask for any multiple of 32"
        )
    table = _BINS if native <= 1024 else _BINS + _LARGE_ONLY
    return tuple(sorted((h * native // 32, w * native // 32) for h, w in table))


def nearest_bin(height: int, width: int, native: int) -> tuple[int, int]:
    """The bin whose ratio, rounded to two digits as published, is nearest to height / width."""
    return min(bins(native), key=lambda hw: abs(round(hw[0] / hw[1], 2) - height / width))


def resize_and_crop(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize of (B, 3, h, w) until it covers height × width, then the centre of it."""
    h, w = images.shape[-2:]
    if (h, w) == (height, width):
        return images
    ratio = max(height / h, width / w)
    h, w = max(height, int(h * ratio)), max(width, int(w * ratio))  # 480 / 832 * 832 is 479.99…
    images = F.interpolate(images, size=(h, w), mode="bilinear", align_corners=False)
    top, left = (h - height) // 2, (w - width) // 2
    return images[:, :, top : top + height, left : left + width]
