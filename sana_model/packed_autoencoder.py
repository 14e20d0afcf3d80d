"""The autoencoder in the form that kernels read, in 16 bits or in W8A8, and what the plan must know of its ops.

    pack_autoencoder(autoencoder, torch.int8, lambda op: "cpu")      replaces its convolutions and linear layers, in place

In W8A8 the decoder's products and convolutions have int8 weights, one scale per output channel, and int8 activations; those
that `kept` names stay in 16 bits. bench/notes/decoder.md has the measurement behind that choice.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sana_kernels.conv2d import ConvWeight, pack_conv2d, quantize_conv2d
from sana_model.autoencoder import Autoencoder
from sana_model.autoencoder_blocks import (
    BatchNorm,
    Downsample,
    GLUMBConv,
    MultiScaleLinearAttention,
    ResBlock,
    Upsample,
)
from sana_model.packed import PackedLinear, can_pack

kept = re.compile(r"encoder\.|decoder\.conv_in$|decoder\.conv_out(\.conv)?$").match
"""Is a layer, by its name, left in 16 bits? The encoder, and the ends of the decoder."""


class PackedConv2d(nn.Module):
    """Weight and bias of a convolution, as the op of one backend reads them; perhaps in int8.

    Like those of `PackedLinear`, they are buffers that keep their dtypes and are not part of a state_dict.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, eight_bit: bool, backend: str, phases: int = 1):
        super().__init__()
        values, scale, self.shape = pack_conv2d(quantize_conv2d(weight) if eight_bit else weight, phases, backend)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def _apply(self, fn, recurse=True):
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else buffer.to(fn(buffer[:0]).device)
        return self

    @property
    def weight(self) -> ConvWeight:
        return ConvWeight(self.values, self.scale, self.shape)

    def extra_repr(self) -> str:
        return f"{self.shape}, {self.values.dtype}"


@torch.no_grad()
def pack_autoencoder(autoencoder: Autoencoder, quantized: torch.dtype | None, backend: Callable[[str], str]) -> None:
    """Replace convolutions and linear layers, in place, where the backend of their op has a form of its own for them.

    quantized: torch.int8 for W8A8. `backend` tells which one computes an op: "conv2d", "upsample", "gemm", "mix_ffn".
    """
    for name, block in list(autoencoder.named_modules()):

        def eight_bit(layer: str, name: str = name) -> bool:
            return quantized is not None and not kept(f"{name}.{layer}")

        def convolution(layer: str, block: nn.Module = block, phases: int = 1, bits=eight_bit) -> None:
            own, where = getattr(block, layer), _executed(backend("conv2d" if phases == 1 else "upsample"))
            if isinstance(own, nn.Conv2d) and (where == "cpu" or bits(layer)):
                weight, bias = (own.weight, own.bias) if phases == 1 else block.phases()
                bias = None if bias is None else bias.detach()
                setattr(block, layer, PackedConv2d(weight.detach(), bias, bits(layer), where, phases))

        def linear(layer: str, weight: Tensor, bias: Tensor | None, op: str, block=block, bits=eight_bit) -> None:
            packed = _packed_linear(weight, bias, quantized if bits(layer) else None, _executed(backend(op)))
            if packed is not None:
                setattr(block, layer, packed)

        if name in ("encoder", "decoder"):
            for layer in ("conv_in", "conv_out"):
                convolution(layer)
        elif isinstance(block, ResBlock):
            if isinstance(block.norm, BatchNorm) and _executed(backend("conv2d")) == "cpu":
                _fold_norm(block)
            convolution("conv1")
            convolution("conv2")
        elif isinstance(block, Downsample):
            convolution("conv")
        elif isinstance(block, Upsample):
            convolution("conv", phases=1 if name == "decoder.conv_out" else 4)  # which is followed by no shortcut
        elif isinstance(block, MultiScaleLinearAttention):
            linear("to_qkv", torch.cat([block.to_q.weight, block.to_k.weight, block.to_v.weight]), None, "gemm")
            if block.to_qkv is not None:
                block.to_q = block.to_k = block.to_v = None
            linear("to_out", block.to_out.weight, None, "gemm")
        elif isinstance(block, GLUMBConv):
            for layer in (block.conv_inverted, block.conv_point):
                own = "conv_inverted" if layer is block.conv_inverted else "conv_point"
                linear(own, layer.weight.flatten(1), layer.bias, "mix_ffn")


def _executed(backend: str) -> str:
    """The library reads what the reference reads."""
    return "reference" if backend == "library" else backend


def _packed_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None, backend: str) -> PackedLinear | None:
    """Rows (N, K) as a packed layer, or None where the backend reads them as they are."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return PackedLinear.of(layer, dtype, backend) if can_pack(layer, dtype or weight.dtype, backend) else None


def _fold_norm(block: ResBlock) -> None:
    """Make the fixed scale and shift of a batch norm part of the convolution before it."""
    scale, shift = block.norm.scale_shift()
    conv = block.conv2
    conv.weight = nn.Parameter((conv.weight.float() * scale[:, None, None, None]).to(conv.weight.dtype), False)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), False)
    block.norm = None
