"""The autoencoder in the form that kernels read, in 16 bits or in W8A8, and what the plan must know of its ops.

    pack_autoencoder(autoencoder, torch.int8, lambda op, wide: "cpu")      replaces its convolutions and linear layers

In W8A8 the decoder's products and convolutions have int8 weights, one scale per output channel, and int8 activations; those
that `kept` names stay in 16 bits. The 3 × 3 kernels of ResBlocks, and those after an upsampling, are transformed where that
is faster (sana_kernels/conv2d/transforms.py): of bfloat16 to int16, of W8A8 to int8, or where a processor has no
instructions for that, to int16 too. bench/notes/decoder.md has the measurements.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sana_kernels.conv2d import (
    WINOGRAD_CHANNELS,
    ConvWeight,
    pack_conv2d,
    quantize_conv2d,
    winograd_conv2d,
    winograd_integers,
    winograd_upsample,
)
from sana_model.autoencoder.blocks import (
    BatchNorm,
    Downsample,
    GLUMBConv,
    MultiScaleLinearAttention,
    ResBlock,
    Upsample,
)
from sana_model.autoencoder.dc_ae import Autoencoder, Decoder, Encoder
from sana_model.packed import PackedLinear, can_pack

PACKING = ("cpu", "cuda")  # the backends with a layout of their own for convolutions
_KEPT = re.compile(r"encoder\.|decoder\.conv_in$|decoder\.conv_out(\.conv)?$")


def kept(name: str) -> bool:
    """Is a layer left in 16 bits? The encoder's, and the ends of the decoder, for every member of the family."""
    return _KEPT.match(name) is not None


class PackedConv2d(nn.Module):
    """Weight and bias of a convolution, as the op of one backend reads them; perhaps as integers.

    Like those of `PackedLinear`, they are buffers that keep their dtypes and are not part of a state_dict.
    """

    def __init__(self, weight: Tensor | ConvWeight, bias: Tensor | None, backend: str, phases: int = 1):
        super().__init__()
        values, scale, self.shape = pack_conv2d(weight, phases, backend)
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
def pack_autoencoder(
    autoencoder: Autoencoder, quantized: torch.dtype | None, backend: Callable[[str, bool], str]
) -> None:
    """Replace convolutions and linear layers, in place, where the backend of their op has a form of its own for them.

    quantized: torch.int8 for W8A8. `backend(op, wide)` tells which one computes an op: "conv2d", "upsample", "gemm",
    "mix_ffn"; `wide`: with weights that are not quantised, where there are both.
    """
    packer = _Packer(quantized, backend)
    for name, block in list(autoencoder.named_modules()):
        if isinstance(block, Encoder | Decoder):
            packer.convolution(name, block, "conv_in")
            packer.convolution(name, block, "conv_out")
        elif isinstance(block, ResBlock):
            if isinstance(block.norm, BatchNorm) and packer.backend("conv2d", name) in PACKING:
                _fold_norm(block)
            packer.convolution(name, block, "conv1", winograd=True)
            packer.convolution(name, block, "conv2", winograd=True)
        elif isinstance(block, Downsample):
            packer.convolution(name, block, "conv")
        elif isinstance(block, Upsample):
            last = name == "decoder.conv_out"  # which has no shortcut
            packer.convolution(name, block, "conv", phases=1 if last else 4, winograd=not last and not block.shuffle)
        elif isinstance(block, MultiScaleLinearAttention):
            qkv = torch.cat([block.to_q.weight, block.to_k.weight, block.to_v.weight])
            if packer.linear(name, block, "to_qkv", qkv, None, "gemm"):
                block.to_q = block.to_k = block.to_v = None
            packer.linear(name, block, "to_out", block.to_out.weight, None, "gemm")
        elif isinstance(block, GLUMBConv):
            for layer in ("conv_inverted", "conv_point"):
                own = getattr(block, layer)
                packer.linear(name, block, layer, own.weight.flatten(1), own.bias, "mix_ffn")


class _Packer:
    """Replaces one layer of a block by its packed form, where there is one."""

    def __init__(self, quantized: torch.dtype | None, backend: Callable[[str, bool], str]):
        self._quantized, self._backend = quantized, backend

    def backend(self, op: str, name: str) -> str:
        """The one that computes an op with the weight of this layer. The library reads what the reference reads."""
        # Only these have, in a plan of integers, a kernel for weights in 16 bits beside the other one.
        backend = self._backend(op, op in ("gemm", "conv2d") and self.dtype(name) is None)
        return "reference" if backend == "library" else backend

    def dtype(self, name: str) -> torch.dtype | None:
        """What a layer is rounded to, or None for 16 bits."""
        return None if kept(name) else self._quantized

    def convolution(self, name: str, block: nn.Module, layer: str, phases: int = 1, winograd: bool = False) -> None:
        """winograd: transformed, where that is faster."""
        own, op = getattr(block, layer), "conv2d" if phases == 1 else "upsample"
        backend, eight_bit = self.backend(op, f"{name}.{layer}"), self.dtype(f"{name}.{layer}") is not None
        if not isinstance(own, nn.Conv2d) or (backend not in PACKING and not eight_bit):
            return
        integers, wide = None, min(own.weight.shape[:2]) >= WINOGRAD_CHANNELS
        if winograd and wide and backend == "cpu" and (eight_bit or own.weight.dtype == torch.bfloat16):
            integers = winograd_integers(eight_bit)
        weight, bias = (own.weight, own.bias) if phases == 1 or integers is not None else block.phases()
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if integers is not None:
            weight = (winograd_conv2d if phases == 1 else winograd_upsample)(weight, integers)
        elif eight_bit:
            weight = quantize_conv2d(weight)
        setattr(block, layer, PackedConv2d(weight, bias, backend, phases))

    def linear(self, name: str, block: nn.Module, layer: str, weight: Tensor, bias: Tensor | None, op: str) -> bool:
        """Rows (N, K) as a packed layer; False where the backend reads them as they are."""
        dtype, backend = self.dtype(f"{name}.{layer}"), self.backend(op, f"{name}.{layer}")
        rows = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        rows.weight = nn.Parameter(weight, requires_grad=False)
        rows.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        if not can_pack(rows, dtype or weight.dtype, backend):
            return False
        setattr(block, layer, PackedLinear.of(rows, dtype, backend))
        return True


def _fold_norm(block: ResBlock) -> None:
    """Make the fixed scale and shift of a batch norm part of the convolution before it."""
    scale, shift = block.norm.scale_shift()
    conv = block.conv2
    conv.weight = nn.Parameter((conv.weight.float() * scale[:, None, None, None]).to(conv.weight.dtype), False)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), False)
    block.norm = None
