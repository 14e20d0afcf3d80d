"""DC-AE, the deep-compression autoencoder: one latent pixel for every 32 × 32 pixels of an image, or 64 × 64 or 128 × 128.

    encode   image  → conv → stages of blocks, each but the last ends in a ½ downsampling → conv → latent
    decode   latent → conv → the stages in reverse, each but the first starts with a ×2 upsampling → norm → conv → image

SANA's has 6 stages: the three outer ones, of high resolution, are made of `ResBlock`s; the three inner ones of
`EfficientViTBlock`s. Whatever changes the resolution carries a shortcut without parameters that only moves pixels into
channels or back ("residual autoencoding", arXiv 2410.10733, section 3.2), so the convolution beside it learns a
correction. The rest of the family is in family.py.

The outer stages, 85 % of the work and all the large tensors, can run in bands (`band_bytes`, bands.py): the same image in
bounded memory.

Activations are NHWC; parameters have the names that diffusers' AutoencoderDC gives them; its checkpoints load as they are.
Run it in fp32 or bf16: the published weights are not safe in fp16, whose range their activations can leave.
"""

import torch
from torch import Tensor, nn

from sana_model.autoencoder.bands import run
from sana_model.autoencoder.blocks import Convolution, Downsample, EfficientViTBlock, ResBlock, RMSNorm, Upsample
from sana_model.config import AutoencoderConfig
from sana_model.errors import UserError
from sana_model.ops import REFERENCE_OPS, Ops


def _blocks(config: AutoencoderConfig, side: str, stage: int) -> list[nn.Module]:
    """The blocks of a stage of the "encoder" or "decoder"."""
    C, kind = config.widths[stage], getattr(config, f"{side}_block_types")[stage]
    count = getattr(config, f"{side}_layers")[stage]
    norm, activation = (
        (config.decoder_norms[stage], config.decoder_activations[stage]) if side == "decoder" else ("rms_norm", "silu")
    )
    if kind == "ResBlock":
        return [ResBlock(config, C, norm, activation) for _ in range(count)]
    if kind == "EfficientViTBlock":
        kernels = getattr(config, f"{side}_qkv_multiscales")[stage]
        return [EfficientViTBlock(config, C, kernels, norm) for _ in range(count)]
    raise UserError(f"autoencoder block {kind!r} is not supported; ResBlock and EfficientViTBlock are")


class Encoder(nn.Module):
    """Images (B, H, W, 3) → latents (B, h, w, latent channels)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.ops: Ops = REFERENCE_OPS
        widths, unshuffle = config.widths, config.downsample == "pixel_unshuffle"
        self.shortcut = config.encoder_out_shortcut
        self.whole_resolution = bool(config.encoder_layers[0])  # without, the first layer halves it
        self.conv_in = (
            nn.Conv2d(3, widths[0], 3, padding=1)
            if self.whole_resolution
            else Downsample(3, widths[1], unshuffle, shortcut=False)
        )
        self.down_blocks = nn.ModuleList()
        for stage, count in enumerate(config.encoder_layers):
            down = count and stage < len(widths) - 1
            layers = [Downsample(*widths[stage : stage + 2], unshuffle)] if down else []
            self.down_blocks.append(nn.Sequential(*_blocks(config, "encoder", stage), *layers))
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, band_bytes: int | None = None) -> Tensor:
        first = Convolution(self.ops, self.conv_in) if self.whole_resolution else self.conv_in
        layers = [first, *(layer for stage in self.down_blocks for layer in stage)]
        outer = next((i for i, layer in enumerate(layers) if not hasattr(layer, "bands")), len(layers))
        x = run(layers[outer:], run(layers[:outer], x, band_bytes))
        y = self.ops.conv2d(x, self.conv_out.weight, self.conv_out.bias)
        return y + x.unflatten(-1, (y.shape[-1], -1)).mean(-1) if self.shortcut else y


class Decoder(nn.Module):
    """Latents (B, h, w, latent channels) → images (B, H, W, 3)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.ops: Ops = REFERENCE_OPS
        widths, self.shuffle = config.widths, config.upsample == "pixel_shuffle"
        self.shortcut, self.out_activation = config.decoder_in_shortcut, config.out_activation
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        for stage, count in enumerate(config.decoder_layers):
            up = count and stage < len(widths) - 1
            layers = [Upsample(widths[stage + 1], widths[stage], self.shuffle)] if up else []
            self.up_blocks.append(nn.Sequential(*layers, *_blocks(config, "decoder", stage)))
        self.whole_resolution = bool(config.decoder_layers[0])  # without, the last layer doubles it
        if not self.whole_resolution and not self.shuffle:
            raise UserError(
                "a decoder without layers at the full resolution is supported with pixel_shuffle, not with interpolate"
            )
        C = widths[0 if self.whole_resolution else 1]
        self.norm_out = RMSNorm(C, config.norm_eps)
        self.conv_out = nn.Conv2d(C, 3, 3, padding=1) if self.whole_resolution else Upsample(C, 3, self.shuffle)

    def forward(self, z: Tensor, band_bytes: int | None = None) -> Tensor:
        x = self.ops.conv2d(z, self.conv_in.weight, self.conv_in.bias)
        if self.shortcut:
            x = x + z.repeat_interleave(x.shape[-1] // z.shape[-1], dim=-1)
        layers = [layer for stage in reversed(self.up_blocks) for layer in stage]
        conv = self.conv_out if self.whole_resolution else self.conv_out.conv
        layers.append(Convolution(self.ops, conv, self.norm_out, self.out_activation, not self.whole_resolution))
        # Block by block rather than stage by stage: a variable here keeps its tensor alive, and at the full resolution
        # each weighs 256 MiB per image of 1024 px in bf16.
        inner = next(i for i in range(len(layers), -1, -1) if not i or not hasattr(layers[i - 1], "bands"))
        x = run(layers[:inner], x)
        return run(layers[inner:], x, band_bytes)


class Autoencoder(nn.Module):
    """The pair of networks. Latents are those of the networks: multiply by `config.scaling_factor` to get the DiT's.

    Inputs are cast to the dtype of the weights. Activations are channels_last; weights may be so too, by
    `autoencoder.to(memory_format=torch.channels_last)` after loading. With `band_bytes`, the convolutional stages run in
    bands of about that size.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.band_bytes: int | None = None
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, between 8-bit products too."""
        return self.decoder.norm_out.weight.dtype

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
        # In training, not always the decoder's.
        dtype = next(self.encoder.parameters(), self.decoder.norm_out.weight).dtype
        x = images.to(dtype).permute(0, 2, 3, 1).contiguous()
        return self.encoder(x, self.band_bytes).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 32, h, w) → images (B, 3, 32h, 32w), about [-1, 1] and not clamped; physically NHWC."""
        channels = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise UserError(f"latents must be (B, {channels}, h, w); these are {tuple(latents.shape)}")
        z = latents.to(self.dtype).permute(0, 2, 3, 1).contiguous()
        return self.decoder(z, self.band_bytes).permute(0, 3, 1, 2)

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
        image = torch.empty(B, 3, H * factor, W * factor, dtype=self.dtype, device=latents.device)
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
    weight = (torch.arange(extent, dtype=torch.float64, device=after.device) / max(extent, 1)).view(shape).to(after)
    start = after.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start.copy_(torch.lerp(end, start, weight))
