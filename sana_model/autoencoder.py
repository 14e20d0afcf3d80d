"""DC-AE, the deep-compression autoencoder: one latent pixel for every 32 × 32 pixels of an image.

    encode   image  → conv → 6 stages of blocks, each but the last ends in a ½ downsampling → conv → latent
    decode   latent → conv → the stages in reverse, each but the first starts with a ×2 upsampling → norm → conv → image

The three outer stages, of high resolution, are made of `ResBlock`s; the three inner ones of `EfficientViTBlock`s.
Whatever changes the resolution carries a shortcut without parameters that only moves pixels into channels or back
("residual autoencoding", arXiv 2410.10733, section 3.2), so the convolution beside it learns a correction.

Inside, activations are NHWC: shape (B, H, W, C), contiguous, so norms and linear layers take the last dimension and
nothing is transposed. Parameters have the names that diffusers' AutoencoderDC gives them; its checkpoints load as they
are. Run it in fp32 or bf16: the published weights are not safe in fp16, whose range their activations can leave.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_model.config import AutoencoderConfig
from sana_model.errors import UserError
from sana_model.ops import REFERENCE_OPS, Ops


class Conv2d(nn.Conv2d):
    """A convolution of NHWC activations. The permutations are views: to PyTorch this is its channels_last format."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in channels) → (B, H', W', out channels)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class RMSNorm(nn.Module):
    """x / RMS(x) · weight + bias over the channels of each pixel (arXiv 1910.07467); the mean square is fp32."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # Two temporaries of x's size and dtype; F.rms_norm on a CPU makes fp32 ones, and they are the peak of a decode.
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + self.eps)
        return torch.addcmul(self.bias, x * scale.to(x.dtype), self.weight)


class ResBlock(nn.Module):
    """x + norm(conv(SiLU(conv(x)))); the norm comes last."""

    def __init__(self, config: AutoencoderConfig, channels: int):
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3, padding=1)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = RMSNorm(channels, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        # One expression: a name for an intermediate tensor would keep it alive until the end.
        return self.norm(self.conv2(F.silu(self.conv1(x), inplace=True))).add_(x)


class MultiScaleProjection(nn.Module):
    """Queries, keys and values that have looked around: a depthwise k × k, then a 1 × 1 in groups of D channels."""

    def __init__(self, channels: int, kernel: int, head_dim: int):
        super().__init__()
        self.proj_in = Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.proj_out = Conv2d(channels, channels, 1, groups=channels // head_dim, bias=False)

    def forward(self, qkv: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(qkv))


class MultiScaleLinearAttention(nn.Module):
    """x + norm(out(heads)): ReLU linear attention over all pixels, of qkv and of its multi-scale projections.

    A head of D = 32 is 96 *consecutive* channels of the concatenation of to_q, to_k and to_v: first its queries, then
    its keys, then its values. The three names are only names; head 0 lies entirely in to_q.
    """

    def __init__(self, config: AutoencoderConfig, channels: int, kernels: tuple[int, ...]):
        super().__init__()
        self.ops: Ops = REFERENCE_OPS
        self.head_dim, self.eps = config.head_dim, config.attention_eps
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(
            MultiScaleProjection(3 * channels, kernel, config.head_dim) for kernel in kernels
        )
        self.to_out = nn.Linear((1 + len(kernels)) * channels, channels, bias=False)
        self.norm_out = RMSNorm(channels, config.norm_eps)

    def attend(self, qkv: Tensor) -> Tensor:
        """(B, H, W, 3C) → (B, H, W, C). No head spans two scales, so each scale attends by itself."""
        heads = qkv.flatten(1, 2).unflatten(-1, (-1, 3 * self.head_dim))  # (B, N, C / D, 3D)
        q, k, v = heads.chunk(3, dim=-1)
        return self.ops.linear_attention(q, k, v, eps=self.eps).reshape(*qkv.shape[:3], -1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], dim=-1)
        scales = [self.attend(qkv), *(self.attend(project(qkv)) for project in self.to_qkv_multiscale)]
        return self.norm_out(self.to_out(torch.cat(scales, dim=-1))).add_(x)


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
        y = self.ops.mix_ffn(
            x.flatten(1, 2), height, width,
            self.conv_inverted.weight.flatten(1), self.conv_inverted.bias,
            self.conv_depth.weight, self.conv_depth.bias,
            self.conv_point.weight.flatten(1),
        )  # fmt: skip
        return self.norm(y.unflatten(1, (height, width))).add_(x)


class EfficientViTBlock(nn.Module):
    """Attention, which sees the whole image, then a Mix-FFN, which sees the neighbourhood (arXiv 2205.14756)."""

    def __init__(self, config: AutoencoderConfig, channels: int, kernels: tuple[int, ...]):
        super().__init__()
        self.attn = MultiScaleLinearAttention(config, channels, kernels)
        self.conv_out = GLUMBConv(config, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


class Downsample(nn.Module):
    """conv(x), stride 2, + shortcut: 2 × 2 pixels into channels, averaged in groups down to `out_channels`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        unshuffled = x.reshape(B, H // 2, 2, W // 2, 2, -1).permute(0, 1, 3, 5, 2, 4)  # (B, H/2, W/2, C, 2, 2)
        shortcut = unshuffled.reshape(B, H // 2, W // 2, self.conv.out_channels, -1).mean(-1)
        return shortcut.add_(self.conv(x))


class Upsample(nn.Module):
    """conv(nearest ×2 of x) + shortcut: channels, repeated up to 4 · out_channels, into 2 × 2 pixels."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.repeats = 4 * out_channels // in_channels
        self.conv = Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        nearest = x[:, :, None, :, None].expand(B, H, 2, W, 2, C).reshape(B, 2 * H, 2 * W, C)
        y = self.conv(nearest)
        # The repetition and the shuffle are both views; the one pass over memory is the addition.
        repeated = x.unsqueeze(-1).expand(B, H, W, C, self.repeats)
        shuffled = repeated.reshape(B, H, W, -1, 2, 2).permute(0, 1, 4, 2, 5, 3)  # (B, H, 2, W, 2, out channels)
        y.unflatten(2, (W, 2)).unflatten(1, (H, 2)).add_(shuffled)
        return y


def _blocks(config: AutoencoderConfig, stage: int, count: int) -> list[nn.Module]:
    channels, kind = config.widths[stage], config.block_types[stage]
    if kind == "ResBlock":
        return [ResBlock(config, channels) for _ in range(count)]
    if kind == "EfficientViTBlock":
        return [EfficientViTBlock(config, channels, config.qkv_multiscales[stage]) for _ in range(count)]
    raise UserError(f"autoencoder block {kind!r} is not supported; ResBlock and EfficientViTBlock are")


class Encoder(nn.Module):
    """Images (B, H, W, 3) → latents (B, H/32, W/32, 32)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for stage, count in enumerate(config.encoder_layers):
            down = [Downsample(*widths[stage : stage + 2])] if stage < len(widths) - 1 else []
            self.down_blocks.append(nn.Sequential(*_blocks(config, stage, count), *down))
        self.conv_out = Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down_blocks:
            for block in stage:
                x = block(x)
        return self.conv_out(x) + x.unflatten(-1, (self.conv_out.out_channels, -1)).mean(-1)


class Decoder(nn.Module):
    """Latents (B, h, w, 32) → images (B, 32h, 32w, 3)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        for stage, count in enumerate(config.decoder_layers):
            up = [Upsample(widths[stage + 1], widths[stage])] if stage < len(widths) - 1 else []
            self.up_blocks.append(nn.Sequential(*up, *_blocks(config, stage, count)))
        self.norm_out = RMSNorm(widths[0], config.norm_eps)
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z) + z.repeat_interleave(self.conv_in.out_channels // z.shape[-1], dim=-1)
        # Block by block rather than stage by stage: a variable here keeps its tensor alive, and at the full resolution
        # each weighs 256 MiB per image of 1024 px in bf16.
        for stage in reversed(self.up_blocks):
            for block in stage:
                x = block(x)
        return self.conv_out(F.relu(self.norm_out(x), inplace=True))


class Autoencoder(nn.Module):
    """The pair of networks. Latents are those of the networks: multiply by `config.scaling_factor` to get the DiT's.

    Inputs are cast to the dtype of the weights. Activations are channels_last; weights may be so too, by
    `autoencoder.to(memory_format=torch.channels_last)` after loading.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def use(self, ops: Ops) -> None:
        """Compute with these ops from now on."""
        for module in self.modules():
            if hasattr(module, "ops"):
                module.ops = ops

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → latents (B, 32, H/32, W/32). The encoder draws no sample.

        Raises UserError unless H and W are multiples of 32.
        """
        factor = self.config.spatial_compression
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise UserError(
                f"images must be (B, 3, H, W) with H and W multiples of {factor}; these are {tuple(images.shape)}"
            )
        x = images.to(self.encoder.conv_in.weight.dtype).permute(0, 2, 3, 1).contiguous()
        return self.encoder(x).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 32, h, w) → images (B, 3, 32h, 32w), about [-1, 1] and not clamped; physically NHWC."""
        channels = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise UserError(f"latents must be (B, {channels}, h, w); these are {tuple(latents.shape)}")
        z = latents.to(self.decoder.conv_in.weight.dtype).permute(0, 2, 3, 1).contiguous()
        return self.decoder(z).permute(0, 3, 1, 2)

    def tiled_decode(self, latents: Tensor, tile: int = 512, stride: int = 448) -> Tensor:
        """`decode` in tiles of `tile` pixels every `stride` pixels, cross-faded where they overlap; as diffusers tiles.

        Activations are bounded by one tile, but the picture is *not* that of `decode`: attention sees single tiles.
        Raises UserError unless 0 < stride <= tile, both multiples of 32.
        """
        factor = self.config.spatial_compression
        if not 0 < stride <= tile or tile % factor or stride % factor:
            raise UserError(
                f"tile {tile} and stride {stride} do not fit: both must be multiples of {factor}, 0 < stride <= tile"
            )
        B, _, H, W = latents.shape
        image = torch.empty(
            B, 3, H * factor, W * factor, dtype=self.decoder.conv_in.weight.dtype, device=latents.device
        )
        overlap, span, step = tile - stride, tile // factor, stride // factor
        above: dict[int, Tensor] = {}  # the bottom `overlap` rows of the tiles above, by column
        for top in range(0, H, step):
            beside = None  # the right `overlap` columns of the tile to the left
            for left in range(0, W, step):
                part = self.decode(latents[:, :, top : top + span, left : left + span])
                if top:
                    _cross_fade(above[left], part, dim=2)
                if left:
                    _cross_fade(beside, part, dim=3)
                y, x = top * factor, left * factor
                image[:, :, y : y + stride, x : x + stride] = part[:, :, :stride, :stride]
                above[left] = part[:, :, max(part.shape[2] - overlap, 0) :].clone()  # not a view: let the tile go
                beside = part[:, :, :, max(part.shape[3] - overlap, 0) :]
        return image


def _cross_fade(before: Tensor, after: Tensor, dim: int) -> None:
    """Fade in place from the end of `before` into the start of `after`, along `dim`, as far as both reach."""
    extent = min(before.shape[dim], after.shape[dim])
    shape = [1, 1, 1, 1]
    shape[dim] = extent
    weight = (torch.arange(extent, dtype=torch.float64) / max(extent, 1)).view(shape).to(after)
    start = after.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start.copy_(torch.lerp(end, start, weight))
