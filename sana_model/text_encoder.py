"""Gemma-2 as SANA uses it: token ids in, the last hidden states (after the final norm) out.

The network of "Gemma 2: Improving Open Language Models at a Practical Size" (arXiv 2408.00118) without the head that
predicts words. Parameter names are those of Hugging Face's `Gemma2Model`, so a checkpoint loads without renaming. It
rounds where their eager attention does, except that the scores are scaled and soft-capped in fp32.

Gemma-3 (arXiv 2503.19786) is the same but for four things, all in the configuration: queries and keys are normalised
instead of soft-capping the scores, five layers of six slide instead of every other one, and the layers that see
everything rotate by a base of their own.

Notation: B prompts, L tokens, P tokens of a cached prefix, S = P + L, D head dim, G = query heads per key/value head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_model.config import TextEncoderConfig


@dataclass(frozen=True)
class PrefixCache:
    """What the network keeps of P constant tokens that many prompts start with. A causal model computes it once."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]  # per layer: rotated keys and values, (P, kv_heads, D) each
    states: Tensor  # (P, hidden): the output states of the prefix itself

    def __len__(self) -> int:
        return self.states.shape[0]

    def take(self, count: int) -> "PrefixCache":
        """The cache of the first `count` tokens only."""
        return PrefixCache(tuple((k[:count], v[:count]) for k, v in self.keys_values), self.states[:count])


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight), in fp32, rounded once at the end."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).type_as(x)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and soft-capped scores.

    softmax(cap · tanh(q·kᵀ · scale / cap)) · v with scale = query_pre_attn_scalar^-½; written out, as PyTorch's fused
    attention knows no soft-cap.
    """

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.head_dim, self.kv_heads = config.head_dim, config.kv_heads
        self.groups = config.heads // config.kv_heads
        self.scale, self.softcap = config.query_pre_attn_scalar**-0.5, config.attn_softcap
        self.q_proj = nn.Linear(config.hidden, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, L, hidden), visible (B, 1, G·L, S) bool → (B, L, hidden), and the keys and values of all S tokens."""
        B, L, _ = x.shape
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))), *rotary)  # (B, L, heads, D)
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim))), *rotary)  # (B, L, kv_heads, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if past is not None:
            k, v = (torch.cat([p.expand(B, -1, -1, -1), new], dim=1) for p, new in zip(past, (k, v), strict=True))

        # The G query heads that share keys and values are folded into the rows: keys and values are never repeated.
        q = q.unflatten(2, (self.kv_heads, self.groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, kv_heads, G·L, D)
        scores = (q @ k.permute(0, 2, 3, 1)).float() * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        # The lowest finite number instead of -inf: a pad that sees nothing (sliding window) must not become NaN.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).to(q.dtype)
        out = (weights @ v.transpose(1, 2)).unflatten(2, (self.groups, L)).permute(0, 3, 1, 2, 4).flatten(2)
        return self.o_proj(out), (k, v)


class MLP(nn.Module):
    """down(gelu(gate(x)) · up(x)), with the tanh form of GELU."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Block(nn.Module):
    """Attention, then MLP, each normalised before *and* after, each added to the residual stream."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden, config.norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, keys_values = self.self_attn(self.input_layernorm(x), rotary, visible, past)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x, keys_values


class TextEncoder(nn.Module):
    """Gemma-2 or -3 without its head. Holds no buffers: it can be built on the meta device and filled afterwards."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        # Not nn.Embedding's normal distribution: drawing that on the meta device imports torch's compiler (1.2 s).
        table = torch.empty(config.vocab, config.hidden).uniform_(-1, 1)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)

    def forward(self, ids: Tensor, lengths: Tensor, prefix: PrefixCache | None = None) -> Tensor:
        """ids (B, L) int64, padded on the right; lengths (B,), how many in a row are no pads → states (B, L, hidden).

        With a `prefix`, the ids continue it: L and `lengths` count the new tokens only. No token sees a pad; the states
        of the pads themselves are those that Hugging Face's model gives.
        """
        return self._run(ids, lengths, prefix)[0]

    def prefix(self, ids: Tensor) -> PrefixCache:
        """The cache of a constant prefix, ids (P,) int64, for `forward`."""
        states, keys_values = self._run(ids[None], torch.tensor([len(ids)], device=ids.device), keep=True)
        return PrefixCache(tuple((k[0], v[0]) for k, v in keys_values), states[0])

    def _run(
        self, ids: Tensor, lengths: Tensor, prefix: PrefixCache | None = None, keep: bool = False
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        past = 0 if prefix is None else len(prefix)
        pasts = [None] * len(self.layers) if prefix is None else prefix.keys_values
        positions = torch.arange(past + ids.shape[1], device=ids.device)
        everything, window = masks(positions, past, past + lengths, self.config)
        x = self.embed_tokens(ids)
        x = x * x.new_full((), self.config.hidden**0.5)  # the factor, too, is rounded to the model's dtype
        bases = self.config.rope_theta, self.config.full_rope_theta or self.config.rope_theta
        local, far = (rotary_table(positions[past:], self.config.head_dim, base, x.dtype) for base in bases)
        kept = []
        for i, (layer, cached) in enumerate(zip(self.layers, pasts, strict=True)):
            rotary, visible = (far, everything) if self.config.sees_everything(i) else (local, window)
            x, keys_values = layer(x, rotary, visible, cached)
            if keep:
                kept.append(keys_values)
        return self.norm(x), kept


def masks(positions: Tensor, past: int, ends: Tensor, config: TextEncoderConfig) -> tuple[Tensor, Tensor]:
    """What the tokens from position `past` on may look at: bool (B, 1, G·L, S), without and with the sliding window.

    `positions` (S,) counts from 0; `ends` (B,) is the position after the last token of each row that is no pad.
    """
    distance = positions[past:, None] - positions
    groups = config.heads // config.kv_heads
    everything = ((distance >= 0) & (positions < ends[:, None, None])).repeat(1, groups, 1)[:, None]
    return everything, everything & (distance < config.sliding_window).repeat(groups, 1)


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (L, 1, D) of position · theta^(-2i/D), the D/2 frequencies twice in a row; computed in fp32.

    In exactly this order of operations: an angle of 1000 has an ulp of 6e-5, which shows in the states.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = (positions[:, None, None].float() * (1.0 / theta**exponents)).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of x (B, L, heads, D): channel i turns with channel i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
