"""Quantised linear layers in a network, as a checkpoint stores them, and what they compute to the letter.

What is *stored* and what is *executed* are two things. A `QuantizedLinear` is the first: it is read from a checkpoint
(sana_kernels/quant/checkpoint.py) or made of a 16-bit layer by rounding to nearest, and computes what its format says, in
fp32: the reference that `--exact` paints with. The plan turns it into a `PackedLinear` (sana_model/packed.py), which may
execute something else: no CPU and no GPU since Hopper multiplies int4, so there W4A4 and W4A8 run as W8A8.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_kernels.gemm import PACKED, pack
from sana_kernels.gemm.int4_reference import finish
from sana_kernels.quant.formats import fake_quantize
from sana_kernels.quant.layer import QuantizedLayer, round_to_nearest

SCHEMES = {"w8a8": ("int8", "int8"), "w4a8": ("int4", "int8"), "w4a4": ("int4", "int4"), "w4a16": ("int4", "16bit")}
"""By precision, the formats of weights and of activations."""

RANK_STEP = 32  # `gemm` takes K in 16 bits in multiples of it

KEPT = ("kv",)  # names of layers that rounding to nearest leaves in 16 bits: they run once per prompt


class LowRank(nn.Module):
    """(x · downᵀ) · upᵀ beside a layer: SVDQuant's branch (arXiv 2411.05007) and LoRA's (arXiv 2106.09685).

    down (r, K) and up (N, r) are of one floating dtype, in which x · downᵀ is rounded: rows, or what `packed` makes of them.
    """

    def __init__(self, down: Tensor, up: Tensor):
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    def packed(self, backend: str) -> "LowRank":
        """The same for `gemm` of a backend, the rank padded with zeros to a multiple of 32."""
        missing = -len(self.down) % RANK_STEP
        down, up = F.pad(self.down, (0, 0, 0, missing)), F.pad(self.up, (0, missing))
        if down.dtype not in PACKED or down.shape[1] % RANK_STEP or up.shape[0] % 16:
            return LowRank(down, up)
        return LowRank(pack(down, backend), pack(up, backend))

    def _apply(self, fn, recurse=True):
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.to(fn(buffer[:0]).device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) → (..., N) in fp32."""
        low = (x.float() @ self.down.float().t()).to(self.down.dtype)
        return low.float() @ self.up.float().t()


class QuantizedLinear(nn.Module):
    """y = Q(x / smooth) Wᵀ + b, and + branch(x): a layer of a quantised checkpoint, exactly.

    Weight, scales and bias keep their dtypes (`.to(dtype)` changes nothing).
    """

    def __init__(self, stored: QuantizedLayer, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features = stored.inputs, stored.outputs
        self.branch = None if stored.down is None else LowRank(stored.down, stored.up)
        self.stored = replace(stored, down=None, up=None)
        self.bias = None if bias is None else bias.detach()
        self._rows: Tensor | None = None  # the weight, dequantised when it is first needed

    def _apply(self, fn, recurse=True):
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor[..., :0]).device)

        self.stored = replace(self.stored, **{name: moved(tensor) for name, tensor in self.stored.tensors().items()})
        self.bias, self._rows = None if self.bias is None else moved(self.bias), None
        if self.branch is not None:
            self.branch._apply(fn)
        return self

    def exact(
        self, x: Tensor, silu: bool = False, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """residual + gate · SiLU(y), each part where asked for, of x (..., K), in x's dtype. Sums are fp32."""
        if self._rows is None:
            self._rows = self.stored.dequantized().float()
        smooth = self.stored.smooth
        y = fake_quantize(x.float() if smooth is None else x.float() / smooth, self.stored.activations) @ self._rows.t()
        if self.branch is not None:
            y = y + self.branch(x)
        return finish(y, self.bias, silu, gate, residual, x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features), in x's dtype."""
        return self.exact(x)

    def extra_repr(self) -> str:
        stored = self.stored
        return f"{self.in_features} → {self.out_features}, {stored.format} weights, {stored.activations} activations"


@torch.no_grad()
def quantize_linear_layers(module: nn.Module, precision: str) -> None:
    """Round, in place, the weights of the linear layers in `module` to nearest; those named as in KEPT stay as they are."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] not in KEPT:
            replace_layer(
                module, name, QuantizedLinear(round_to_nearest(layer.weight, *SCHEMES[precision]), layer.bias)
            )


def replace_layer(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the submodule called `name`."""
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)
