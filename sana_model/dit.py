"""SANA's linear diffusion transformer: noisy latents, a time and a caption in, a velocity out.

One block (arXiv 2410.10629, section 2.2) is

    x += gate₁ · attention(modulate(x, shift₁, scale₁))       ReLU linear attention, O(N)
    x += cross_attention(x, caption)                          softmax over the text; no norm, no gate
    x += gate₂ · mix_ffn(modulate(x, shift₂, scale₂))         1×1 expand → SiLU → depthwise 3×3 → GLU → 1×1 project

Everything is laid out as tokens (B, N = H·W, C), which *is* NHWC: a 1×1 convolution is a linear layer and nothing is ever
transposed. What does not depend on the latents is computed once and passed in: `DiT.time` (once per schedule) and `DiT.text`
(once per prompt: the keys and values of every cross-attention). Neither is remembered inside the model, so no call can meet
another call's prompt.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_kernels import Quantized
from sana_kernels.linear_attention.reference import rms_norm
from sana_model.config import DiTConfig
from sana_model.ops import REFERENCE_OPS, Ops
from sana_model.packed import is_plain, linear, rows_for

FP16_MAX = 65504.0
HEAD_EPS = 1e-6  # of the last norm, whatever that of the blocks is


@dataclass(frozen=True)
class TimeEmbedding:
    """What a block and the head need to know of the time: one row per image, or per step of a schedule."""

    embedding: Tensor  # (B, C), for the head
    modulation: Tensor  # (B, blocks, 6, C): shift, scale and gate of the attention, then of the Mix-FFN

    def step(self, i: int, batch: int) -> "TimeEmbedding":
        """Row i, for a batch of images that are all at the same time."""
        return TimeEmbedding(self.embedding[i].expand(batch, -1), self.modulation[i].expand(batch, -1, -1, -1))


@dataclass(frozen=True)
class TextContext:
    """Keys and values of one prompt batch for every block: (B, L, heads, D) each, and how many of the L are real."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    lengths: Tensor | None  # (B,) int64; None: all L

    def rows(self, index: slice | list[int]) -> "TextContext":
        """Those of some of the batch, in that order."""
        pairs = tuple((k[index], v[index]) for k, v in self.keys_values)
        return TextContext(pairs, None if self.lengths is None else self.lengths[index])


class LinearAttention(nn.Module):
    """ReLU linear self-attention over N tokens; heads of `head_dim` consecutive channels."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        C = config.hidden
        self.config = config
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.norm_q = nn.Parameter(torch.ones(C)) if config.qk_norm else None
        self.norm_k = nn.Parameter(torch.ones(C)) if config.qk_norm else None
        self.out = nn.Linear(C, C)

    def forward(self, x: Tensor | Quantized, ops: Ops, gate: Tensor, residual: Tensor, perturbed: int) -> Tensor:
        """residual + gate · attention(x), (B, N, C). The last `perturbed` images attend to themselves only (PAG: out(v))."""
        config = self.config
        B, N, _ = residual.shape
        if ops.linear_attention_from and is_plain(self.qkv) and self.norm_q is None and not perturbed:
            weight = self.qkv.weight
            y = ops.linear_attention_from(x, weight, head_dim=config.head_dim, eps=config.attention_eps)
        else:
            q, k, v = linear(ops, x, self.qkv).view(B, N, 3, config.heads, config.head_dim).unbind(2)
            kept = B - perturbed
            y = ops.linear_attention(
                q[:kept], k[:kept], v[:kept],
                q_norm=self.norm_q, k_norm=self.norm_k, norm_eps=config.qk_norm_eps, eps=config.attention_eps,
                quantize=None if perturbed else rows_for(self.out),
            )  # fmt: skip
            if perturbed:
                y = torch.cat([y, v[kept:]])
        y = y.flatten(2) if isinstance(y, Tensor) else y
        if config.clamp or residual.dtype == torch.float16:  # such weights never saw anything beyond fp16's range
            return ops.gate_residual(residual, linear(ops, y, self.out).clamp(-FP16_MAX, FP16_MAX), gate)
        return linear(ops, y, self.out, gate=gate, residual=residual)


class CrossAttention(nn.Module):
    """Softmax attention of the image tokens to the caption; its keys and values are made once per prompt."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        C = config.hidden
        self.config = config
        self.q = nn.Linear(C, C)
        self.kv = nn.Linear(C, 2 * C)
        self.norm_q = nn.Parameter(torch.ones(C)) if config.qk_norm else None
        self.norm_k = nn.Parameter(torch.ones(C)) if config.qk_norm else None
        self.out = nn.Linear(C, C)

    def _heads(self, x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = rms_norm(x, norm, self.config.cross_qk_norm_eps)
        return x.unflatten(-1, (self.config.cross_heads, self.config.cross_head_dim))

    def keys_values(self, caption: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        """(B, L, C) → two of (B, L, heads, D)."""
        k, v = linear(ops, caption, self.kv).chunk(2, dim=-1)
        return self._heads(k, self.norm_k), self._heads(v, None)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], lengths: Tensor | None, ops: Ops) -> Tensor:
        """x + attention(x), (B, N, C)."""
        q = self._heads(linear(ops, x, self.q), self.norm_q)
        y = ops.cross_attention(q, *keys_values, lengths, quantize=rows_for(self.out))
        return linear(ops, y.flatten(2) if isinstance(y, Tensor) else y, self.out, residual=x)


class MixFFN(nn.Module):
    """The gated inverted bottleneck with a depthwise 3×3 convolution that gives the model its sense of place."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        C, F_ = config.hidden, config.ffn
        self.expand = nn.Linear(C, 2 * F_)
        self.depthwise = nn.Conv2d(2 * F_, 2 * F_, 3, padding=1, groups=2 * F_)
        self.project = nn.Linear(F_, C, bias=False)

    def forward(self, x: Tensor | Quantized, grid: tuple[int, int], ops: Ops, gate: Tensor, residual: Tensor) -> Tensor:
        """residual + gate · Mix-FFN(x), (B, N, C)."""
        depthwise = self.depthwise.weight, self.depthwise.bias
        if is_plain(self.expand) and is_plain(self.project):
            return ops.mix_ffn(
                x, *grid, self.expand.weight, self.expand.bias, *depthwise, self.project.weight,
                gate=gate, residual=residual,
            )  # fmt: skip
        u = ops.depthwise_glu(
            linear(ops, x, self.expand, silu=True), *grid, *depthwise, quantize=rows_for(self.project)
        )
        return linear(ops, u, self.project, gate=gate, residual=residual)


class Block(nn.Module):
    """One transformer block; see the top of this file."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.zeros(6, config.hidden))
        self.attention = LinearAttention(config)
        self.cross_attention = CrossAttention(config)
        self.mix_ffn = MixFFN(config)

    def forward(
        self,
        x: Tensor,  # (B, N, C)
        modulation: Tensor,  # (B, 6, C), this block's own table added
        keys_values: tuple[Tensor, Tensor],
        lengths: Tensor | None,
        grid: tuple[int, int],
        ops: Ops,
        perturbed: int = 0,
    ) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.unbind(1)
        h = ops.modulate(x, shift_1, scale_1, eps=self.eps, quantize=rows_for(self.attention.qkv))
        x = self.attention(h, ops, gate_1, x, perturbed)
        x = self.cross_attention(x, keys_values, lengths, ops)
        h = ops.modulate(x, shift_2, scale_2, eps=self.eps, quantize=rows_for(self.mix_ffn.expand))
        return self.mix_ffn(h, grid, ops, gate_2, x)


class TimestepEmbedder(nn.Module):
    """A scalar per image → (B, C): 256 sinusoids [cos | sin], then a two-layer perceptron."""

    def __init__(self, hidden: int):
        super().__init__()
        self.linear_1 = nn.Linear(256, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, scalar: Tensor) -> Tensor:
        j = torch.arange(128, dtype=torch.float32, device=scalar.device)
        angles = scalar.float()[:, None] * torch.exp(-math.log(10000.0) * j / 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_2(F.silu(self.linear_1(waves.to(self.linear_1.weight.dtype))))


class CaptionEmbedder(nn.Module):
    """Text-encoder states (B, L, caption channels) → RMS-normalised (B, L, C)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.caption_channels, config.hidden)
        self.linear_2 = nn.Linear(config.hidden, config.hidden)
        self.norm = nn.Parameter(torch.full((config.hidden,), 0.01))  # trained from 0.01: the scale is in the weight

    def forward(self, states: Tensor) -> Tensor:
        y = self.linear_2(F.gelu(self.linear_1(states), approximate="tanh"))
        return rms_norm(y, self.norm, 1e-5)


class DiT(nn.Module):
    """The whole transformer. `forward` is the plain form; a sampler calls `time` and `text` once, then `step`."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.ops: Ops = REFERENCE_OPS
        C = config.hidden
        self.patch_embed = nn.Linear(config.in_channels, C)  # 1×1 patches
        self.time_embed = TimestepEmbedder(C)
        self.guidance_embed = TimestepEmbedder(C) if config.guidance_embeds else None
        self.modulation = nn.Linear(C, 6 * C)
        self.caption_embed = CaptionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, C))
        self.head = nn.Linear(C, config.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embed.weight.dtype

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        caption: Tensor,
        lengths: Tensor | None = None,
        guidance: Tensor | None = None,
        perturbed: int = 0,
    ) -> Tensor:
        """Velocity (B, out channels, H, W) of `latents` (B, in channels, H, W) at `timestep` (B,).

        `caption` is (B, L, caption channels), of which the first `lengths[b]` states count. `guidance` (B,) is the guidance
        scale where the model takes it as an input (Sprint). The last `perturbed` images of the batch have their
        self-attention replaced by the identity in every layer (see `step`).
        """
        text = self.text(caption, lengths)
        layers = range(len(self.blocks)) if perturbed else ()
        return self.step(latents, self.time(timestep, guidance), text, perturbed, layers)

    def time(self, timestep: Tensor, guidance: Tensor | None = None) -> TimeEmbedding:
        """Embed times (T,) (and guidance scales (T,) for Sprint): once for a whole schedule."""
        if guidance is not None:
            guidance = guidance * self.config.guidance_embeds_scale
        return self.embedded_time(timestep * self.config.timestep_scale, guidance)

    def embedded_time(self, timestep: Tensor, guidance: Tensor | None = None) -> TimeEmbedding:
        """As `time`, of times and guidance scales that have their factors already."""
        embedding, shared = self.shared_modulation(timestep, guidance)
        tables = torch.stack([block.scale_shift_table for block in self.blocks])
        return TimeEmbedding(embedding, shared[:, None] + tables)

    def shared_modulation(self, timestep: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The embedding (T, C), and the modulation (T, 6, C) to which every block adds a table of its own."""
        embedding = self.time_embed(timestep)
        if self.guidance_embed is not None:
            embedding = embedding + self.guidance_embed(guidance)
        return embedding, self.modulation(F.silu(embedding)).unflatten(-1, (6, -1))

    def text(self, caption: Tensor, lengths: Tensor | None = None) -> TextContext:
        """Project a caption (B, L, caption channels) and make the keys and values of every block: once per prompt."""
        y = self.caption_embed(caption.to(self.dtype))
        return TextContext(tuple(block.cross_attention.keys_values(y, self.ops) for block in self.blocks), lengths)

    def step(
        self,
        latents: Tensor,
        time: TimeEmbedding,
        text: TextContext,
        perturbed: int = 0,
        pag_layers=(),
        positions: Tensor | None = None,
    ) -> Tensor:
        """One evaluation: (B, in channels, H, W) → (B, out channels, H, W), in the model's dtype.

        Perturbed-attention guidance (arXiv 2403.17377): in the blocks listed in `pag_layers`, the last `perturbed` images
        of the batch skip the attention map. `positions`: those of this grid, where they are at hand.
        """
        grid = latents.shape[-2:]
        x = self.embed(latents, positions)
        for i, block in enumerate(self.blocks):
            rows = perturbed if i in pag_layers else 0
            x = block(x, time.modulation[:, i], text.keys_values[i], text.lengths, grid, self.ops, rows)
        return self.unembed(x, time.embedding, grid)

    def embed(self, latents: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, in channels, H, W) → tokens (B, N, C), row-major, with the position embedding of the 2K and 4K models."""
        # Contiguous: else PyTorch makes one product of it or one for each image, by whether weights require gradients.
        x = self.patch_embed(latents.to(self.dtype).flatten(2).transpose(1, 2).contiguous())
        if positions is None:
            positions = self.positions(*latents.shape[-2:], x.device)
        return x if positions is None else (x + positions).to(x)

    def positions(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """The position embedding (1, N, C) fp32 of the 2K and 4K models; None for the others, which have none."""
        config = self.config
        if config.pos_embed_scale is None:
            return None
        given = config.hidden, height, width, config.sample_size, config.pos_embed_scale, torch.device(device)
        if torch.compiler.is_compiling():  # sizes may be symbols, which are no keys, and engines know no fp64
            return position_embedding.__wrapped__(*given, torch.float32)
        return position_embedding(*given)

    def unembed(self, x: Tensor, embedding: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) → (B, out channels, H, W)."""
        shift, scale = (self.scale_shift_table + embedding[:, None]).unbind(1)
        y = self.head(self.ops.modulate(x, shift, scale, eps=HEAD_EPS))
        return y.transpose(1, 2).unflatten(-1, grid)


@lru_cache(maxsize=4)
def position_embedding(
    C: int, height: int, width: int, base: int, scale: float, device: torch.device, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Fixed 2-D sinusoids, (1, N, C) fp32: the column in the first C/2 channels, the row in the rest, [sin | cos] each.

    Coordinates always span [0, base / scale), whatever the grid, so that one model serves every size. Angles are of `dtype`.
    """
    frequency = 10000.0 ** (-torch.arange(C // 4, dtype=dtype, device="cpu") / (C / 4))

    def waves(n: int) -> Tensor:
        angles = torch.arange(n, dtype=dtype, device="cpu")[:, None] / (n / base) / scale * frequency
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (n, C/2)

    columns = waves(width)[None].expand(height, -1, -1)
    rows = waves(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, height * width, C).to(torch.float32).to(device)
