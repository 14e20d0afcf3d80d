"""The networks as they are exported: the modules of `sana_model` behind the signatures of `sana_export.layout`.

`torch.export` looks into the reference form of every op (sana_kernels.backend.call), so a graph is made of standard
operators. Some things differ from what PyTorch computes eagerly, and none of them the result beyond rounding:

  - weights of linear layers lie as (K, N), so that a MatMul reads them without a Transpose (`GraphLinear`);
  - W8A8 is written as QuantizeLinear → DequantizeLinear before and DequantizeLinear at the weight of a MatMul, which an
    engine turns into an int8 product; activations have one static scale per layer, weights one per output channel;
  - cross-attention is a MatMul, a mask that is added, a Softmax and a MatMul, the pattern that engines fuse;
  - a convolution after upsampling meets the enlarged image, which engines do not store;
  - with `attention="plugin"` linear attention is a single node sana::linear_attention(q, k, v), (B, N, H, D) each, with
    the attribute eps. Query and key norms stay outside.
"""

import torch
from torch import Tensor, nn

from sana_export.ops import INT8_MOST, conv2d, dequantize_linear, graph_ops, quantize_linear
from sana_model.autoencoder.blocks import Upsample, channels_into_pixels

INT4_MOST, INT4_BLOCK = 7, 64


class TextEncoderGraph(nn.Module):
    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.text_encoder(ids, lengths).float()


class TransformerGraph(nn.Module):
    def __init__(self, dit: nn.Module):
        super().__init__()
        self.dit = dit

    def forward(
        self, latents: Tensor, timestep: Tensor, caption: Tensor, lengths: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        return self.dit(latents, timestep, caption, lengths, guidance).float()


class DecoderGraph(nn.Module):
    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents).float()


class EncoderGraph(nn.Module):
    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images).float()


MODULES = {
    "text_encoder": TextEncoderGraph, "transformer": TransformerGraph, "decoder": DecoderGraph, "encoder": EncoderGraph,
}  # fmt: skip


def for_export(
    graph: str, network: nn.Module, attention: str, activation_scales: dict[str, float] | None = None
) -> nn.Module:
    """The module of a graph around `network` (a DiT, a text encoder or an autoencoder), which is changed in place.

    activation_scales: of W8A8, by layer of the DiT. A text encoder that is to have int4 weights has gone through
    `quantize_weights` before.
    """
    replace_layers(network, activation_scales or {})
    if graph == "transformer":
        network.ops = graph_ops(attention)
    elif graph != "text_encoder":
        network.use(graph_ops(attention))
    return MODULES[graph](network).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ linear layers


class GraphLinear(nn.Module):
    """y = x W + b, W (K, N) in a floating dtype, or in int8 or int4 with scales.

    `weight` is the module itself: what the ops of `sana_model` are given, to be multiplied by `gemm`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None, x_scale: Tensor | None = None):
        super().__init__()
        self.register_buffer("values", weight)
        self.register_buffer("scale", scale)  # None, (N,) or (K / INT4_BLOCK, N)
        self.register_buffer("x_scale", x_scale)  # None or (), of int8 activations
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> "GraphLinear":
        return self

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.values.dtype if self.scale is None else self.scale.dtype

    def product(self, x: Tensor) -> Tensor:
        """x W."""
        if self.x_scale is not None:
            x = dequantize_linear(quantize_linear(x, self.x_scale), self.x_scale)
        return x @ (self.values if self.scale is None else dequantize_linear(self.values, self.scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    @classmethod
    def of(cls, layer: nn.Linear | nn.Conv2d) -> "GraphLinear":
        """Of a linear layer or a 1×1 convolution."""
        return cls(layer.weight.detach().flatten(1).t().contiguous(), _detached(layer.bias))

    @classmethod
    def int8(cls, layer: nn.Linear, activation_scale: float) -> "GraphLinear":
        """Weights with a scale per output channel, and a static one for the activations."""
        weight, dtype = layer.weight.detach().float().t(), layer.weight.dtype
        scale = rounded_up(weight.abs().amax(0).clamp_min(1e-30) / INT8_MOST, dtype)
        values = (weight / scale.float()).round().to(torch.int8).contiguous()
        x_scale = rounded_up(torch.tensor(activation_scale), dtype)
        return cls(values, _detached(layer.bias), scale, x_scale)

    @classmethod
    def int4(cls, layer: nn.Linear) -> "GraphLinear":
        """Weights with a scale for each INT4_BLOCK values along K, which that has to divide."""
        weight, dtype = layer.weight.detach().float().t(), layer.weight.dtype
        blocks = weight.unflatten(0, (-1, INT4_BLOCK))
        scale = rounded_up(blocks.abs().amax(1).clamp_min(1e-30) / INT4_MOST, dtype)
        values = (blocks / scale[:, None].float()).round().to(torch.int8)
        return cls(values.flatten(0, 1).contiguous(), _detached(layer.bias), scale)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 scales in the dtype of a DequantizeLinear's result, never smaller: nothing is clipped, and values are
    quantised with the scale that they will be multiplied by."""
    rounded = scale.to(dtype)
    return torch.where(rounded.float() < scale, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded)


class GraphUpsample(nn.Module):
    """As `sana_model.autoencoder.blocks.Upsample`."""

    def __init__(self, layer: Upsample):
        super().__init__()
        self.conv, self.shuffle = layer.conv, layer.shuffle

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        if self.shuffle:
            y = channels_into_pixels(conv2d(x, self.conv.weight, self.conv.bias))
        else:
            nearest = x[:, :, None, :, None].expand(B, H, 2, W, 2, C).reshape(B, 2 * H, 2 * W, C)
            y = conv2d(nearest, self.conv.weight, self.conv.bias)
        repeats = 4 * y.shape[-1] // C
        return y + channels_into_pixels(x[..., None].expand(B, H, W, C, repeats).reshape(B, H, W, C * repeats))


@torch.no_grad()
def replace_layers(network: nn.Module, activation_scales: dict[str, float]) -> None:
    """Linear layers and 1×1 convolutions become `GraphLinear`s, in int8 where there is a scale for their input."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) or (
            isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
        ):
            scale = activation_scales.get(name)
            _put(network, name, GraphLinear.of(layer) if scale is None else GraphLinear.int8(layer, scale))
        elif isinstance(layer, Upsample):
            _put(network, name, GraphUpsample(layer))


@torch.no_grad()
def quantize_weights(text_encoder: nn.Module) -> None:
    """The linear layers of a text encoder get int4 weights, in place, where K is a multiple of INT4_BLOCK."""
    for name, layer in list(text_encoder.named_modules()):
        if isinstance(layer, nn.Linear) and layer.in_features % INT4_BLOCK == 0:
            _put(text_encoder, name, GraphLinear.int4(layer))


def _put(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, layer)
