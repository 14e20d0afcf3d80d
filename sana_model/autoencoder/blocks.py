"""What DC-AE is made of (arXiv 2410.10733): blocks that keep the resolution, and layers that change it.

Activations are NHWC: (B, H, W, C), contiguous, so norms and linear layers take the last dimension and nothing is
transposed. Parameters have the names that diffusers' AutoencoderDC gives them.

Layers that see only a neighbourhood also take an image on its way, row by row (`bands`): bands.py explains. The
attention, and with it the EfficientViTBlock, needs the whole image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_kernels.conv2d import Band, Rows, fold_upsample
from sana_model.autoencoder.bands import Bands, Neighbourhood, Window, in_one_piece, sweep, whole
from sana_model.config import AutoencoderConfig
from sana_model.errors import UserError
from sana_model.ops import REFERENCE_OPS, Ops
from sana_model.packed import linear, rows_for


class RMSNorm(nn.Module):
    """x / RMS(x) · weight + bias over the channels of each pixel (arXiv 1910.07467)."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.ops: Ops = REFERENCE_OPS
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """norm(x) + residual, (B, H, W, C)."""
        return self.ops.rms_norm(x, self.weight, self.bias, residual=residual, eps=self.eps)


class BatchNorm(nn.BatchNorm2d):
    """The running mean and variance of each channel normalise it; they stay fixed."""

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """(C,) each, in fp32: the norm is x · scale + shift."""
        scale = self.weight.float() * torch.rsqrt(self.running_var.float() + self.eps)
        return scale, self.bias.float() - self.running_mean.float() * scale

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """norm(x) + residual, (B, H, W, C)."""
        x = x.permute(0, 3, 1, 2)
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return y.permute(0, 2, 3, 1) + residual


def norm(kind: str, channels: int, eps: float) -> nn.Module:
    """The normalisation that a configuration names."""
    if kind not in ("rms_norm", "batch_norm"):
        raise UserError(f"autoencoder norm {kind!r} is not supported; rms_norm and batch_norm are")
    return RMSNorm(channels, eps) if kind == "rms_norm" else BatchNorm(channels, eps)


class ResBlock(nn.Module):
    """x + norm(conv(activation(conv(x)))); the norm comes last."""

    def __init__(self, config: AutoencoderConfig, channels: int, norm_kind: str, activation: str):
        super().__init__()
        self.ops: Ops = REFERENCE_OPS
        self.activation = activation
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = norm(norm_kind, channels, config.norm_eps)

    def first(self, x: Rows, band: Band) -> Tensor:
        return self.ops.conv2d(x, self.conv1.weight, self.conv1.bias, activation=self.activation, band=band)

    def second(self, y: Rows, band: Band, residual: Rows) -> Tensor:
        conv, norm = self.conv2, self.norm
        if isinstance(norm, BatchNorm):
            return norm(self.ops.conv2d(y, conv.weight, conv.bias, band=band), in_one_piece(residual))
        fused = {} if norm is None else {"norm": (norm.weight, norm.bias), "eps": norm.eps}  # None: in the convolution
        return self.ops.conv2d(y, conv.weight, conv.bias, residual=residual, band=band, **fused)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x, whole(x)), whole(x), x)

    def bands(self, x: Bands) -> Bands:
        window = Window(readers=2)  # the first convolution, and the second for its residual

        def second(y: Rows, band: Band) -> Tensor:
            result = self.second(y, band, window.rows(band.first, band.last))
            window.drop(band.last, reader=1)
            return result

        return Bands(x.height, sweep(second, Bands(x.height, sweep(self.first, x, window=window))))


class MultiScaleProjection(nn.Module):
    """Queries, keys and values that have looked around: a depthwise k × k, then a 1 × 1 in groups of D channels."""

    def __init__(self, channels: int, kernel: int, head_dim: int):
        super().__init__()
        self.ops: Ops = REFERENCE_OPS
        self.proj_in = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=channels // head_dim, bias=False)

    def forward(self, qkv: Tensor) -> Tensor:
        return self.ops.multi_scale(qkv, self.proj_in.weight, self.proj_out.weight)


class MultiScaleLinearAttention(nn.Module):
    """x + norm(out(heads)): ReLU linear attention over all pixels, of qkv and of its multi-scale projections.

    A head of D = 32 is 96 *consecutive* channels of the concatenation of to_q, to_k and to_v: first its queries, then
    its keys, then its values. The three names are only names; head 0 lies entirely in to_q. Packed, they are one, `to_qkv`.
    """

    def __init__(self, config: AutoencoderConfig, channels: int, kernels: tuple[int, ...], norm_kind: str):
        super().__init__()
        self.ops: Ops = REFERENCE_OPS
        self.head_dim, self.eps = config.head_dim, config.attention_eps
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_qkv: nn.Module | None = None
        self.to_qkv_multiscale = nn.ModuleList(
            MultiScaleProjection(3 * channels, kernel, config.head_dim) for kernel in kernels
        )
        self.to_out = nn.Linear((1 + len(kernels)) * channels, channels, bias=False)
        self.norm_out = norm(norm_kind, channels, config.norm_eps)

    def qkv(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, 3C)."""
        if self.to_qkv is None:
            return torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], dim=-1)
        return linear(self.ops, x.flatten(1, 2), self.to_qkv).unflatten(1, x.shape[1:3])

    def attend(self, qkv: Tensor) -> Tensor:
        """(B, H, W, 3C) → (B, H · W, C). No head spans two scales, so each scale attends by itself."""
        heads = qkv.flatten(1, 2).unflatten(-1, (-1, 3 * self.head_dim))  # (B, N, C / D, 3D)
        q, k, v = heads.chunk(3, dim=-1)
        return self.ops.linear_attention(q, k, v, eps=self.eps).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        scales = [self.attend(qkv), *(self.attend(project(qkv)) for project in self.to_qkv_multiscale)]
        y = linear(self.ops, torch.cat(scales, dim=-1), self.to_out)
        return self.norm_out(y.unflatten(1, x.shape[1:3]), x)


class GLUMBConv(nn.Module):
    """x + norm(MixFFN(x)): the Mix-FFN of the DiT, here with F = 4C and a norm."""

    def __init__(self, config: AutoencoderConfig, channels: int):
        super().__init__()
        self.ops: Ops = REFERENCE_OPS
        width = 4 * channels
        self.conv_inverted = nn.Conv2d(channels, 2 * width, 1)
        self.conv_depth = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.conv_point = nn.Conv2d(width, channels, 1, bias=False)
        self.norm = RMSNorm(channels, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        rows, dtype = x.flatten(1, 2), rows_for(self.conv_inverted)
        expand, project = (
            layer.weight.flatten(1) if isinstance(layer, nn.Conv2d) else layer.weight
            for layer in (self.conv_inverted, self.conv_point)
        )
        y = self.ops.mix_ffn(
            rows if dtype is None else self.ops.quantize(rows, dtype), height, width, expand, self.conv_inverted.bias,
            self.conv_depth.weight, self.conv_depth.bias, project,
        )  # fmt: skip
        return self.norm(y.unflatten(1, (height, width)), x)


class EfficientViTBlock(nn.Module):
    """Attention, which sees the whole image, then a Mix-FFN, which sees the neighbourhood (arXiv 2205.14756)."""

    def __init__(self, config: AutoencoderConfig, channels: int, kernels: tuple[int, ...], norm_kind: str):
        super().__init__()
        self.attn = MultiScaleLinearAttention(config, channels, kernels, norm_kind)
        self.conv_out = GLUMBConv(config, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


class Downsample(Neighbourhood, nn.Module):
    """Half the resolution, by a convolution of stride 2 or one whose 2 × 2 pixels then become channels (`unshuffle`).

    The shortcut moves 2 × 2 pixels into channels and averages groups of them down to `out_channels`.
    """

    step = 2

    def __init__(self, in_channels: int, out_channels: int, unshuffle: bool, shortcut: bool = True):
        super().__init__()
        self.ops: Ops = REFERENCE_OPS
        self.unshuffle, self.shortcut, self.out_channels = unshuffle, shortcut, out_channels
        self.below = 1 if unshuffle else 0
        own, stride = (out_channels // 4, 1) if unshuffle else (out_channels, 2)
        self.conv = nn.Conv2d(in_channels, own, 3, stride=stride, padding=1)

    def compute(self, x: Rows, band: Band) -> Tensor:
        fine = band._replace(first=2 * band.first, last=2 * band.last)
        if self.unshuffle:
            y = _pixels_into_channels(self.ops.conv2d(x, self.conv.weight, self.conv.bias, band=fine))
        else:
            y = self.ops.conv2d(x, self.conv.weight, self.conv.bias, stride=2, band=band)
        if not self.shortcut:
            return y
        moved = _pixels_into_channels(in_one_piece(x)[:, fine.first - fine.start : fine.last - fine.start])
        return moved.unflatten(-1, (self.out_channels, -1)).mean(-1) + y


class Upsample(Neighbourhood, nn.Module):
    """Twice the resolution, by a convolution of the nearest ×2 or one whose channels then become pixels (`shuffle`).

    The shortcut repeats channels up to 4 · out_channels and moves them into 2 × 2 pixels.
    """

    growth = 2

    def __init__(self, in_channels: int, out_channels: int, shuffle: bool):
        super().__init__()
        self.ops: Ops = REFERENCE_OPS
        self.shuffle = shuffle
        self.conv = nn.Conv2d(in_channels, 4 * out_channels if shuffle else out_channels, 3, padding=1)

    def phases(self) -> tuple[Tensor, Tensor]:
        """The weight as the op `upsample` takes it, and the bias."""
        weight, bias = self.conv.weight, self.conv.bias
        if not self.shuffle:
            return fold_upsample(weight), bias
        return tuple(t.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1) for t in (weight, bias))

    def compute(self, x: Rows, band: Band) -> Tensor:
        plain = isinstance(self.conv, nn.Conv2d)
        weight, bias = self.phases() if plain else (self.conv.weight, self.conv.bias)
        return self.ops.upsample(x, weight, bias, band=band)


class Convolution(Neighbourhood):
    """A convolution that is a layer of its own, as the decoder's last: after norm and activation, to 3 channels or, where
    its channels then become pixels (`shuffle`), to 12. Its parameters are those of whoever makes it.
    """

    def __init__(
        self, ops: Ops, conv: nn.Module, norm: RMSNorm | None = None, activation: str = "none", shuffle: bool = False
    ):
        self.ops, self.conv, self.norm, self.activation = ops, conv, norm, activation
        self.shuffle, self.growth = shuffle, 1 + shuffle

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def compute(self, x: Rows, band: Band) -> Tensor:
        conv, norm, before = self.conv, self.norm, {}
        if norm is not None:
            before = {"input_norm": (norm.weight, norm.bias), "input_activation": self.activation, "eps": norm.eps}
        y = self.ops.conv2d(x, conv.weight, conv.bias, band=band, **before)
        return channels_into_pixels(y) if self.shuffle else y


def _pixels_into_channels(x: Tensor) -> Tensor:
    """(B, H, W, C) → (B, H / 2, W / 2, 4C): channel 4c + 2dy + dx is channel c of pixel (dy, dx) of the 2 × 2."""
    B, H, W, C = x.shape
    return x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 5, 2, 4).reshape(B, H // 2, W // 2, 4 * C)


def channels_into_pixels(x: Tensor) -> Tensor:
    """(B, H, W, 4C) → (B, 2H, 2W, C): the inverse."""
    B, H, W, C = x.shape
    return x.reshape(B, H, W, C // 4, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(B, 2 * H, 2 * W, C // 4)
