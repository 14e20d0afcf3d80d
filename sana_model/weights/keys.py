"""The DiT's parameter names in the three places they live, in one table, and every conversion that follows from it.

    ours        one matrix per matrix product: qkv and kv are fused, 1×1 convolutions are linear layers
    diffusers   `SanaTransformer2DModel`: q, k and v apart
    original    the `.pth` of the SANA repository: qkv and kv fused, every layer of the Mix-FFN a convolution

The values are the same in all three, so a conversion makes views where it can: always on the way out, and on the way
in for everything but the fused matrices. The text encoder and the autoencoder already have the names that Hugging
Face uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sana_model.config import DiTConfig


@dataclass(frozen=True)
class Rule:
    """One parameter. `{}` stands for the number of the block, "theirs" for the name in a dialect."""

    ours: str
    diffusers: tuple[str, ...]  # several: ours is these, one below the other
    original: str
    conv: bool = False  # theirs is a 1×1 convolution (out, in, 1, 1), ours a linear layer (out, in)

    def theirs(self, dialect: str) -> tuple[str, ...]:
        return self.diffusers if dialect == "diffusers" else (self.original,)


def _pair(ours: str, diffusers: tuple[str, ...], original: str, conv: bool = False) -> list[Rule]:
    """Weight and bias of one layer."""

    def rule(kind: str, conv: bool) -> Rule:
        return Rule(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in diffusers), f"{original}.{kind}", conv)

    return [rule("weight", conv), rule("bias", False)]


_ENDS = [
    *_pair("patch_embed", ("patch_embed.proj",), "x_embedder.proj", conv=True),
    *_pair("time_embed.linear_1", ("time_embed.emb.timestep_embedder.linear_1",), "t_embedder.mlp.0"),
    *_pair("time_embed.linear_2", ("time_embed.emb.timestep_embedder.linear_2",), "t_embedder.mlp.2"),
    *_pair("modulation", ("time_embed.linear",), "t_block.1"),
    *_pair("caption_embed.linear_1", ("caption_projection.linear_1",), "y_embedder.y_proj.fc1"),
    *_pair("caption_embed.linear_2", ("caption_projection.linear_2",), "y_embedder.y_proj.fc2"),
    Rule("caption_embed.norm", ("caption_norm.weight",), "attention_y_norm.weight"),
    Rule("scale_shift_table", ("scale_shift_table",), "final_layer.scale_shift_table"),
    *_pair("head", ("proj_out",), "final_layer.linear"),
]
_GUIDANCE = [  # Sprint
    *_pair("guidance_embed.linear_1", ("time_embed.guidance_embedder.linear_1",), "cfg_embedder.mlp.0"),
    *_pair("guidance_embed.linear_2", ("time_embed.guidance_embedder.linear_2",), "cfg_embedder.mlp.2"),
]
_ATTENTION = [
    Rule("attention.qkv.weight", ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight"), "attn.qkv.weight"),
    *_pair("attention.out", ("attn1.to_out.0",), "attn.proj"),
    *_pair("cross_attention.q", ("attn2.to_q",), "cross_attn.q_linear"),
    *_pair("cross_attention.kv", ("attn2.to_k", "attn2.to_v"), "cross_attn.kv_linear"),
    *_pair("cross_attention.out", ("attn2.to_out.0",), "cross_attn.proj"),
]
_QK_NORM = [  # SANA-1.5 and Sprint
    Rule("attention.norm_q", ("attn1.norm_q.weight",), "attn.q_norm.weight"),
    Rule("attention.norm_k", ("attn1.norm_k.weight",), "attn.k_norm.weight"),
    Rule("cross_attention.norm_q", ("attn2.norm_q.weight",), "cross_attn.q_norm.weight"),
    Rule("cross_attention.norm_k", ("attn2.norm_k.weight",), "cross_attn.k_norm.weight"),
]
_MIX_FFN = [
    *_pair("mix_ffn.expand", ("ff.conv_inverted",), "mlp.inverted_conv.conv", conv=True),
    *_pair("mix_ffn.depthwise", ("ff.conv_depth",), "mlp.depth_conv.conv"),
    Rule("mix_ffn.project.weight", ("ff.conv_point.weight",), "mlp.point_conv.conv.weight", conv=True),
]
_BLOCK = [Rule("scale_shift_table", ("scale_shift_table",), "scale_shift_table"), *_ATTENTION, *_QK_NORM, *_MIX_FFN]

DROPPED = {
    "diffusers": (),
    # a table that can be recomputed, the caption of training's dropout, the loss weights of Sprint's training
    "original": ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias"),
}
"""Keys of a checkpoint that inference has no use for."""


def rules(config: DiTConfig) -> list[Rule]:
    """The table for one model: a rule per parameter of `DiT(config)`, in the order of the network."""

    def at(rule: Rule, i: int) -> Rule:
        names = tuple(f"transformer_blocks.{i}.{name}" for name in rule.diffusers)
        return Rule(f"blocks.{i}.{rule.ours}", names, f"blocks.{i}.{rule.original}", rule.conv)

    def without_emb(rule: Rule) -> Rule:  # diffusers nests the time embedder of Sprint one level less
        names = tuple(name.replace("time_embed.emb.", "time_embed.") for name in rule.diffusers)
        return Rule(rule.ours, names, rule.original, rule.conv)

    ends = [*map(without_emb, _ENDS), *_GUIDANCE] if config.guidance_embeds else _ENDS
    block = [rule for rule in _BLOCK if config.qk_norm or rule not in _QK_NORM]
    return [*ends, *(at(rule, i) for i in range(config.layers) for rule in block)]


def join(parts: list[Tensor], rule: Rule) -> Tensor:
    """Their tensors for one rule → ours. A view of theirs if there is just one."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.flatten(1) if rule.conv else whole


def split(whole: Tensor, rule: Rule, dialect: str) -> dict[str, Tensor]:
    """Our tensor for one rule → theirs, by name: contiguous views of ours."""
    names = rule.theirs(dialect)
    parts = whole.chunk(len(names)) if len(names) > 1 else (whole,)  # which may be a scalar
    return dict(zip(names, (part[..., None, None] if rule.conv else part for part in parts), strict=True))


def _out(state: Mapping[str, Tensor], config: DiTConfig, dialect: str) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for rule in rules(config):
        result |= split(state[rule.ours], rule, dialect)
    return result


def to_diffusers(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """`DiT(config).state_dict()` → the state dict of `SanaTransformer2DModel`, as views of the same memory."""
    return _out(state, config, "diffusers")


def to_original(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """`DiT(config).state_dict()` → the state dict of the original `.pth`, as views of the same memory."""
    return _out(state, config, "original")


def recognise(names: set[str]) -> str | None:
    """The dialect of a DiT checkpoint, by its keys; None where it is none."""
    for dialect, telltale in (("diffusers", "patch_embed.proj.weight"), ("original", "x_embedder.proj.weight")):
        if telltale in names:
            return dialect
    return None
