"""The perceptual loss of the recipe against the same network made of PyTorch's layers."""

from collections import OrderedDict

import torch
from compare import relative_rms
from torch import nn

from recipes import perceptual


def lite0_like() -> nn.Module:
    """The first blocks of EfficientNet-Lite0 made of PyTorch's layers, with its names and random weights."""

    def same(kernel: int, stride: int, size: int) -> nn.Module:
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        return nn.ZeroPad2d((total // 2, total - total // 2, total // 2, total - total // 2))

    class Block(nn.Module):
        def __init__(self, i, o, expand, kernel, stride, size):
            super().__init__()
            middle = i * expand
            layers = OrderedDict()
            if expand > 1:
                layers["_expand_conv"] = nn.Conv2d(i, middle, 1, bias=False)
                layers |= {"_bn0": nn.BatchNorm2d(middle, 1e-3), "a": nn.ReLU6()}
            layers["pad"] = same(kernel, stride, size)
            layers["_depthwise_conv"] = nn.Conv2d(middle, middle, kernel, stride, groups=middle, bias=False)
            layers |= {"_bn1": nn.BatchNorm2d(middle, 1e-3), "b": nn.ReLU6()}
            layers |= {"_project_conv": nn.Conv2d(middle, o, 1, bias=False), "_bn2": nn.BatchNorm2d(o, 1e-3)}
            for name, layer in layers.items():
                self.add_module(name, layer)
            self.skip = stride == 1 and i == o

        def forward(self, x):
            y = x
            for layer in self.children():
                y = layer(y)
            return x + y if self.skip else y

    network = nn.Module()
    network._conv_stem, network._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, 1e-3)
    network.pad = same(3, 2, 64)
    stages = [(1, 16, 1, 3, 1), (2, 24, 6, 3, 2), (2, 40, 6, 5, 2), (3, 80, 6, 3, 2), (3, 112, 6, 5, 1)]
    network._blocks = nn.ModuleList()
    channels, size = 32, 32
    for repeats, out, expand, kernel, stride in stages:
        for i in range(repeats):
            network._blocks.append(Block(channels, out, expand, kernel, stride if i == 0 else 1, size))
            channels, size = out, size // stride if i == 0 else size
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2), module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2), nn.init.normal_(module.bias, 0, 0.3)
    return network.eval()


def test_perceptual_features_match_pytorch_layers():
    network = lite0_like()
    images = torch.randn(2, 3, 64, 64)
    features = perceptual.Features(network.state_dict())
    with torch.no_grad():
        x = nn.functional.relu6(network._bn0(network._conv_stem(network.pad(images))))
        expected = []
        for i, block in enumerate(network._blocks):
            x = block(x)
            if i in perceptual.LITE0.taps:
                expected.append(x)
        for ours, theirs in zip(features.taps(images), expected, strict=True):
            assert relative_rms(ours, theirs) < 1e-5
        network._blocks[0]._bn1.running_mean += 1  # control: the folding matters
        shifted = next(perceptual.Features(network.state_dict()).taps(images))
        assert relative_rms(shifted, expected[0]) > 1e-2
    same, near, far = (features.distance(images + e * torch.randn_like(images), images).item() for e in (0, 0.1, 0.5))
    assert same == 0 < near < far
