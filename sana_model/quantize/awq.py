"""Where AWQ's scales (sana_kernels/quant/awq.py) go in Gemma: what reads the same input, and what absorbs 1/s.

    RMSNorm ──► q, k, v            its weight, which counts from 1: (1 + w) / s - 1
    v ────────► o                  rows of v; the query heads that share a head of v share their scales
    RMSNorm ──► gate, up           its weight
    up ───────► down               rows of up: gelu(gate) · up is linear in it

In exact arithmetic the network computes what it did before. Norms that absorb a scale (NORMS) hold fp32 from then on: where
s is large, w comes near to -1, and 16 bits would keep little of 1 + w.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sana_kernels.quant.awq import awq_scale
from sana_model.text_encoder import Block, RMSNorm, TextEncoder

READ = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
"""The layers of a block whose inputs `scale_block` looks at; the others read the same as one of these."""

NORMS = ("input_layernorm.weight", "pre_feedforward_layernorm.weight")
"""How the names end of the parameters that stay in fp32, in checkpoints and in memory."""


@torch.no_grad()
def scale_block(block: Block, inputs: Mapping[str, Tensor], rounded: Callable[[Tensor], Tensor]) -> None:
    """Scale the weights of a block, in place. inputs: (T, K) rows of each layer of READ; rounded: as in `awq_scale`."""
    attention, mlp = block.self_attn, block.mlp
    heads = attention.kv_heads, attention.groups, attention.head_dim
    q, o, gate, down = (inputs[name].float() for name in READ)

    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    scale = awq_scale(q, [layer.weight for layer in qkv], rounded)
    _multiply(scale, *qkv)
    _divide_norm(block.input_layernorm, scale)

    shared = o.abs().mean(0).view(heads).mean(1, keepdim=True)  # (kv_heads, 1, D)
    scale = awq_scale(o, [attention.o_proj.weight], rounded, shared.expand(heads).flatten())
    _multiply(scale, attention.o_proj)
    _divide_rows(attention.v_proj, scale.view(heads)[:, 0].flatten())

    scale = awq_scale(gate, [mlp.gate_proj.weight, mlp.up_proj.weight], rounded)
    _multiply(scale, mlp.gate_proj, mlp.up_proj)
    _divide_norm(block.pre_feedforward_layernorm, scale)

    scale = awq_scale(down, [mlp.down_proj.weight], rounded)
    _multiply(scale, mlp.down_proj)
    _divide_rows(mlp.up_proj, scale)


def scale_text_encoder(
    encoder: TextEncoder, ids: Tensor, lengths: Tensor, rounded: Callable[[Tensor], Tensor], rows: int = 512
) -> None:
    """Scale all blocks by what they read of the texts ids (B, L), lengths (B,), of which `rows` tokens are looked at."""
    seen: dict[str, Tensor] = {}
    real = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).flatten().nonzero()[:, 0]
    chosen = real[:: max(1, len(real) // rows)][:rows]

    def hook(name: str) -> Callable:
        return lambda _, args: seen.update({name: args[0].flatten(0, 1)[chosen]})

    names = {f"layers.{i}.{name}" for i in range(len(encoder.layers)) for name in READ}
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in encoder.named_modules() if name in names]
    try:
        with torch.inference_mode():
            encoder(ids, lengths)
    finally:
        for handle in handles:
            handle.remove()
    for i, block in enumerate(encoder.layers):
        scale_block(block, {name: seen[f"layers.{i}.{name}"] for name in READ}, rounded)


def _multiply(scale: Tensor, *layers: nn.Linear) -> None:
    for layer in layers:
        layer.weight.copy_(layer.weight.float() * scale)


def _divide_rows(layer: nn.Linear, scale: Tensor) -> None:
    layer.weight.copy_(layer.weight.float() / scale[:, None])


def _divide_norm(norm: RMSNorm, scale: Tensor) -> None:
    norm.weight = nn.Parameter((1 + norm.weight.float()) / scale - 1, requires_grad=False)
