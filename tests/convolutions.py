"""What the tests of the DC-AE's convolutions share: where they run, their inputs, images in bands."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch.utils._pytree import tree_map
from variants import double, on_cpu, signed, variants

from sana_kernels.conv2d import Band, ConvWeight, reference
from sana_kernels.conv2d.weights import quantize_conv2d, winograd_conv2d, winograd_upsample

ACTIVATIONS = tuple(reference.ACTIVATIONS)
VARIANTS = variants("conv2d", tiles=True)
CPU = on_cpu(tiles=True)
GPU = [v for v in VARIANTS if not isinstance(v, str)]
FLOATS = (torch.float32, torch.bfloat16)
# Of the products; those of integers between activations of bf16.
PRECISIONS = ("fp32", "bf16", "w8a8", "winograd int8", "winograd int16")
INTEGERS = PRECISIONS[2:]


def of_diffusers(module: str, name: str) -> type:
    """A class of diffusers' models. Skips the test where diffusers is not installed."""
    return getattr(pytest.importorskip(f"diffusers.models.{module}"), name)


def upsample_inputs(B: int, H: int, W: int, channels: int, C: int, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """x, the 3 × 3 kernel, bias."""
    tensors = signed(B, H, W, channels), torch.randn(C, channels, 3, 3) * channels**-0.5, torch.randn(C)
    return tuple(t.to(device, dtype) for t in tensors)


@dataclass(frozen=True)
class Case:
    B: int
    H: int
    W: int
    C: int
    N: int
    stride: int = 1
    activation: str = "none"
    around: str = ""  # of "bias", "norm", "residual", "input"

    def make(self, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple, dict]:
        """x and the kernel, and what stands around the convolution."""
        weight = torch.randn(self.N, self.C, 3, 3) * self.C**-0.5 / 3
        out = self.B, -(-self.H // self.stride), -(-self.W // self.stride), self.N
        made = {
            "bias": torch.randn(self.N).to(dtype),
            "norm": (signed(self.N, dtype=dtype), torch.randn(self.N).to(dtype)),
            "residual": signed(*out, dtype=dtype),
            "input": (torch.rand(self.C).to(dtype) + 0.5, torch.randn(self.C).to(dtype)),
        }
        around = {"input_norm" if name == "input" else name: made[name] for name in self.around.split()}
        around = tree_map(lambda t: t.to(device), around)
        if "input" in self.around:
            around["input_activation"] = "relu"
        x = signed(self.B, self.H, self.W, self.C, dtype=dtype).to(device)
        return (x, weight.to(device, dtype)), {"stride": self.stride, "activation": self.activation} | around


def in_double(weight: torch.Tensor | ConvWeight, around: dict) -> tuple:
    """For the oracle."""
    exact = weight._replace(scale=weight.scale.double()) if isinstance(weight, ConvWeight) else weight.double()
    wide = {k: tuple(double(*v)) if isinstance(v, tuple) else double(v)[0] for k, v in around.items()}
    return exact, wide


def quantized(weight: torch.Tensor, precision: str) -> torch.Tensor | ConvWeight:
    if precision.startswith("winograd"):
        return winograd_conv2d(weight, getattr(torch, precision.removeprefix("winograd ")))
    return quantize_conv2d(weight) if precision in INTEGERS else weight


def quantized_upsample(weight: torch.Tensor, precision: str) -> torch.Tensor | ConvWeight:
    """Of a kernel (out, in, 3, 3), what `upsample` takes."""
    if precision.startswith("winograd"):
        return winograd_upsample(weight, getattr(torch, precision.removeprefix("winograd ")))
    folded = reference.fold_upsample(weight)
    return quantize_conv2d(folded) if precision in INTEGERS else folded


def banded(x: torch.Tensor, ends: list[int], stride: int, reach: int, call) -> torch.Tensor:
    """The rows between consecutive `ends`, each computed from the rows of x that it needs."""
    H, parts = x.shape[1], []
    for first, last in pairwise(ends):
        start, end = max(0, stride * first - reach), min(H, stride * (last - 1) + reach + 1)
        parts.append(call(x[:, start:end].contiguous(), Band(start, first, last, H), first, last))
    return torch.cat(parts, dim=1)
