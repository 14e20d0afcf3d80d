"""Linear layers whose weights lie as a backend's `gemm` reads them, in 16 bits or in 8.

    pack_linear_layers(module, dtype, lambda name: "cpu")       replaces the nn.Linear layers in a module

W8A8 follows SANA's paper (arXiv 2410.10629, section 3.3): the products over image tokens and of the text encoder run in
int8; norms, the core of the linear attention, the keys and values of the caption, embeddings and the output layer do not.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import sana_kernels
from sana_kernels import Quantized
from sana_kernels.gemm import PACKED, pack, unpack

HIGHER_PRECISION = ("kv",)  # names of layers that stay in 16 bits: they run once per prompt


class PackedLinear(nn.Module):
    """y = x Wᵀ + b, computed by `gemm` of one backend.

    Weight and bias are buffers that keep their dtypes (`.to(dtype)` changes nothing) and are not part of a state_dict:
    the layout is this machine's business, and checkpoints have their own.
    """

    def __init__(self, layer: nn.Linear, quantized: torch.dtype | None, backend: str):
        super().__init__()
        self.in_features, self.out_features, self.backend = layer.in_features, layer.out_features, backend
        weight = layer.weight.detach()
        if quantized is not None:
            weight = sana_kernels.quantize(weight, quantized)
        values, scale = weight if isinstance(weight, Quantized) else (weight, None)
        self.register_buffer("values", pack(values, backend), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float(), persistent=False)

    def _apply(self, fn, recurse=True):
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else buffer.to(fn(buffer[:0]).device)
        return self

    @property
    def weight(self) -> Tensor | Quantized:
        return self.values if self.scale is None else Quantized(self.values, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features), in x's dtype."""
        rows = x.reshape(1, -1, self.in_features)
        if self.scale is not None:
            rows = sana_kernels.quantize(rows, self.values.dtype, backend=self.backend)
        y = sana_kernels.gemm(rows, self.weight, self.bias, dtype=x.dtype, backend=self.backend)
        return y.view(*x.shape[:-1], self.out_features)

    def unpacked(self) -> nn.Linear:
        """The layer that it was made of, in 16 bits. Not for quantised ones, whose original is gone."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(unpack(self.values, self.backend), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.to(self.values.dtype), requires_grad=False)
        return layer

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.values.dtype}, {self.backend}"


def can_pack(layer: nn.Linear, dtype: torch.dtype, backend: str) -> bool:
    """Has this layer a form of its own on a backend? For the CPU's: 16 columns, and rows of 64 bytes (8 bits are padded)."""
    if backend != "cpu":
        return dtype.itemsize == 1
    if dtype not in PACKED or layer.out_features % 16:
        return False
    return dtype.itemsize == 1 or (layer.weight.dtype == dtype and layer.in_features % 32 == 0)


@torch.no_grad()
def pack_linear_layers(module: nn.Module, dtype: torch.dtype, backend: Callable[[str], str]) -> None:
    """Replace, in place, the linear layers in `module` by packed or quantised ones, where they have such a form.

    dtype: torch.bfloat16, or torch.int8 for W8A8, of which layers called as in HIGHER_PRECISION are excepted. `backend`
    tells from a layer's name which backend will run it; "library" and "reference" read 16-bit layers as they are.
    """
    for name, layer in list(module.named_modules()):
        parent, _, own = name.rpartition(".")
        kept = torch.bfloat16 if own in HIGHER_PRECISION else dtype
        if isinstance(layer, nn.Linear) and can_pack(layer, kept, backend(name)):
            quantized = kept if kept.itemsize == 1 else None
            where = "reference" if backend(name) == "library" else backend(name)
            setattr(module.get_submodule(parent), own, PackedLinear(layer, quantized, where))


def unpack_linear_layers(module: nn.Module) -> None:
    """Undo `pack_linear_layers`, in place, as far as layers are in 16 bits."""
    for name, layer in list(module.named_modules()):
        parent, _, own = name.rpartition(".")
        if isinstance(layer, PackedLinear) and layer.scale is None:
            setattr(module.get_submodule(parent), own, layer.unpacked())
