"""Seeded random weights that behave like trained ones, for when there is no checkpoint (the recipe: docs/weights.md).

A network drawn layer by layer with unit gains explodes, saturates or ignores its prompt after 20 to 60 blocks, and
then says nothing about kernels or quantisation. Here every branch of every DiT block adds a fixed fraction of the
residual stream, cross-attention is neither flat nor one-hot, some channels are outliers as in trained models, and
fp16 suffices.

Every value is a function of (seed, name of the parameter) and of nothing else: not of threads, dtype, loading order
or, but for the last bit of a DiT's branch scales, the machine.
"""

import hashlib
import math
import re
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from sana_model.autoencoder.blocks import BatchNorm
from sana_model.autoencoder.dc_ae import Autoencoder
from sana_model.config import AutoencoderConfig, DiTConfig, ModelConfig, TextEncoderConfig
from sana_model.dit import Block, DiT
from sana_model.ops import REFERENCE_OPS
from sana_model.text_encoder import TextEncoder
from sana_model.tokenizer import ByteTokenizer
from sana_model.weights.checkpoint import Prepare
from sana_model.weights.loaded import LoadedModel

OUTLIER = 30.0  # how much larger the values of an outlier channel are than those of the others
OUTLIER_SHARE = 0.001
SMALLEST = 1 / 16  # no drawn value is nearer to 0 than this many standard deviations: in fp16, none is subnormal

# (pattern of the name, mean, standard deviation, whether to divide that by √fan-in); the first that matches counts
Recipe = tuple[tuple[str, float, float, bool], ...]
_DIT: Recipe = (
    (r"norm(_[qk])?$", 1.0, 0.1, False),
    (r"scale_shift_table$", 0.0, 0.3, False),
    (r"^patch_embed\.weight$", 0.0, 0.25, True),  # the stream starts small, for it grows some 35 times
    (r"^patch_embed\.bias$", 0.0, 0.025, False),
    (r"^modulation\.weight$", 0.0, 0.5, True),
    (r"bias$", 0.0, 0.1, False),
    (r"weight$", 0.0, 1.0, True),
)
_TEXT_ENCODER: Recipe = (
    (r"norm\.weight$", 0.0, 0.1, False),  # Gemma multiplies by 1 + weight
    (r"weight$", 0.0, 1.0, True),
)
_AUTOENCODER: Recipe = (
    (r"decoder\.norm_out\.weight$", 1.0, 0.1, False),
    (r"norm(_out)?\.weight$", 0.5, 0.05, False),  # a block ends in a norm: its weight is what the block adds
    (r"(up|down)_blocks\.\d+\.\d+\.conv\.weight$", 0.0, 0.5, True),  # beside a shortcut
    (r"bias$", 0.0, 0.05, False),
    (r"weight$", 0.0, 1.0, True),
)


def random_model(
    config: ModelConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    text_dtype: torch.dtype | None = None,
    decoder_dtype: torch.dtype | None = None,
) -> LoadedModel:
    """All parts of `config`, and the byte tokenizer. `dtype` is the DiT's, and the default of the others."""
    return LoadedModel(
        config=config,
        dit=random_dit(config.dit, seed, dtype),
        text_encoder=random_text_encoder(config.text, seed, text_dtype or dtype),
        tokenizer=ByteTokenizer(),
        autoencoder=random_autoencoder(config.autoencoder, seed, decoder_dtype or dtype),
        source=f"{config.name} (random weights, seed {seed})",
        random=True,
        load_text_encoder=lambda: random_text_encoder(config.text, seed, text_dtype or dtype),
    )


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def random_dit(
    config: DiTConfig, seed: int = 0, dtype: torch.dtype = torch.float32, prepare: Prepare | None = None
) -> DiT:
    """A DiT whose every branch adds 0.3 (0.2 in models of more than 40 blocks) of the RMS of the residual stream.

    The blocks are drawn and run one after the other in fp32 on a small seeded input, the output layer of each branch is
    scaled to its target, and the block is then cast to `dtype` and given to `prepare`: beyond the result, one block is
    held in fp32.
    """
    dit = _empty(DiT, config, dtype)
    outliers = outlier_channels("dit", config.hidden, seed)
    ordinary = [i for i in range(config.hidden) if i not in outliers]
    share = 0.2 if config.layers > 40 else 0.3

    ends = _empty(DiT, replace(config, layers=0), torch.float32)  # all but the blocks
    _draw_all(ends, _DIT, "dit", seed)
    _raise_rows(ends.patch_embed, outliers)
    _copy(ends, dit)

    of_times = [0.1, 0.5, 0.9] if config.guidance_embeds else [100.0, 500.0, 900.0]  # Sprint's end at 1
    on_cpu = {"dtype": torch.float32, "device": "cpu"}
    times = torch.tensor(of_times, **on_cpu)
    images, side, words = len(times), 6, 16
    latents = torch.empty(images, config.in_channels, side, side, **on_cpu)
    caption = torch.empty(images, words, config.caption_channels, **on_cpu)
    for name, tensor in (("latents", latents), ("caption", caption)):
        draw(tensor, 0.0, 1.0, f"dit/calibration/{name}", seed)
    guidance = torch.full_like(times, 4.5) * config.guidance_embeds_scale
    _, modulation = ends.shared_modulation(times * config.timestep_scale, guidance)
    x, caption = ends.embed(latents), ends.caption_embed(caption)

    scratch = _empty(Block, config, torch.float32)
    for i, block in enumerate(dit.blocks):
        _draw_all(scratch, _DIT, f"dit/blocks.{i}", seed)
        scratch.scale_shift_table[[2, 5]] += 1  # the gates
        for layer in (scratch.attention.out, scratch.cross_attention.out, scratch.mix_ffn.project):
            _raise_rows(layer, outliers)
        x = _calibrate(scratch, x, modulation, caption, (side, side), share, ordinary)
        _copy(scratch, block)
        if prepare is not None:
            prepare(block)
    return dit


def _calibrate(
    block: Block,
    x: Tensor,
    modulation: Tensor,
    caption: Tensor,
    grid: tuple[int, int],
    share: float,
    ordinary: list[int],
) -> Tensor:
    """Scale the branches of an fp32 block for the residual stream `x` (B, N, C) → the stream after the block.

    RMS is over the `ordinary` channels: a few outliers would make it a matter of chance in a narrow model.
    """
    ops, cross = REFERENCE_OPS, block.cross_attention
    modulation = block.scale_shift_table + modulation
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.unbind(1)

    def add(after: Tensor, layer: nn.Linear) -> Tensor:
        branch = after - x
        factor = _step(share * _rms(x[..., ordinary]) / _rms(branch[..., ordinary]))
        _scale(layer, factor)
        return x + factor * branch

    x = add(block.attention(ops.modulate(x, shift_1, scale_1), ops, gate_1, x, 0), block.attention.out)

    keys, values = cross.keys_values(caption, ops)
    queries = cross.q(x)
    if cross.norm_q is not None:
        queries = queries * torch.rsqrt(queries.square().mean(-1, keepdim=True)) * cross.norm_q
    logits = torch.einsum("bnhd,blhd->bhnl", queries.unflatten(-1, keys.shape[2:]), keys) / math.sqrt(keys.shape[-1])
    factor = _step(1 / _rms(logits - logits.mean(-1, keepdim=True)))
    if cross.norm_q is None:
        _scale(cross.q, factor)
    else:
        cross.norm_q *= factor
    x = add(cross(x, (keys, values), None, ops), cross.out)

    after = block.mix_ffn(ops.modulate(x, shift_2, scale_2), grid, ops, gate_2, x)
    return add(after, block.mix_ffn.project)


@torch.no_grad()
def random_text_encoder(
    config: TextEncoderConfig, seed: int = 0, dtype: torch.dtype = torch.float32, prepare: Prepare | None = None
) -> TextEncoder:
    """A Gemma-2 whose every branch adds 0.3 of the RMS of the residual stream, which its norms alone can see to."""
    encoder = _empty(TextEncoder, config, dtype)
    outliers = outlier_channels("text_encoder", config.hidden, seed)
    _draw_all(encoder, _TEXT_ENCODER, "text_encoder", seed)
    encoder.embed_tokens.weight[:, outliers] *= OUTLIER
    stream = 1.0
    for layer in encoder.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            gain = 0.3 * stream * (1 + norm.weight.float())
            gain[outliers] *= OUTLIER
            norm.weight.copy_(gain - 1)
            stream *= math.sqrt(1 + 0.3**2)
        if prepare is not None:
            prepare(layer)
    return encoder


@torch.no_grad()
def random_autoencoder(config: AutoencoderConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """A DC-AE: every block adds a fixed amount, which its last norm sets, and the decoder ends with a norm of RMS 1."""
    autoencoder = _empty(Autoencoder, config, dtype)
    _draw_all(autoencoder, _AUTOENCODER, "autoencoder", seed)
    for module in autoencoder.modules():
        if isinstance(module, BatchNorm):
            module.reset_running_stats()
    return autoencoder


# ---------------------------------------------------------------------------------------------- drawing

_POOL, _CHUNK = 1 << 22, 1 << 15  # a chunk is too small for PyTorch to share out, and stays in the cache


def draw(out: Tensor, mean: float, std: float, name: str, seed: int) -> None:
    """Fill contiguous `out` with near-normal values of (seed, name).

    Drawing billions of normals takes minutes. Instead, one pool of 4 million is drawn, and every stretch of 2^18
    values is a copy from a place, and with a sign, of its own. Each value is the sum of four uniform 16-bit integers,
    which is exact, so all machines agree on every bit; the bit generator is numpy's PCG64, whose stream is guaranteed
    not to change.
    """
    pool = _pool(seed)
    flat = out.view(-1)
    places = _bits(name, seed, math.ceil(flat.numel() / _CHUNK))
    for place, piece in zip(places.tolist(), flat.split(_CHUNK), strict=True):
        start = (place >> 1) % (_POOL - _CHUNK)
        torch.mul(pool[start : start + piece.numel()], std if place & 1 else -std, out=piece)
    if mean:
        out += mean


@lru_cache(maxsize=1)
def _pool(seed: int) -> Tensor:
    """Sums of four uniform numbers (Irwin-Hall), mean 0 and variance 1, within ±3.5, none near 0."""
    sums = _bits("pool", seed, _POOL).view(np.uint16).reshape(_POOL, 4).sum(axis=1, dtype=np.int32)
    values = torch.from_numpy(sums - 2 * 65535).to(torch.float32) / math.sqrt((65536.0**2 - 1) / 3)
    return torch.where(values < 0, values.clamp(max=-SMALLEST), values.clamp(min=SMALLEST))


def _bits(name: str, seed: int, count: int) -> np.ndarray:
    """`count` random uint64 of (seed, name)."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16]
    return np.random.PCG64(int.from_bytes(key, "little")).random_raw(count)


def outlier_channels(network: str, channels: int, seed: int) -> list[int]:
    """Which channels of the residual stream of "dit" or "text_encoder" are outliers: 0.1 %, and at least one."""
    order = np.argsort(_bits(f"{network}/outliers", seed, channels), kind="stable")
    return sorted(order[: max(1, round(OUTLIER_SHARE * channels))].tolist())


def _draw_all(module: nn.Module, recipe: Recipe, prefix: str, seed: int) -> None:
    for name, parameter in module.named_parameters():
        _, mean, std, by_fan_in = next(row for row in recipe if re.search(row[0], name))
        if by_fan_in:
            std /= math.sqrt(parameter[0].numel())
        draw(parameter, mean, std, f"{prefix}.{name}", seed)


def _empty(kind: type[nn.Module], config, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        module = kind(config)
    return module.to(dtype).to_empty(device="cpu").requires_grad_(False).eval()


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Cast the parameters of `source` into those of the same name of `target`."""
    values = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name in values:
            parameter.copy_(values[name])


def _raise_rows(layer: nn.Linear, channels: list[int]) -> None:
    """Make output channels of a layer outliers."""
    layer.weight[channels] *= OUTLIER
    if layer.bias is not None:
        layer.bias[channels] *= OUTLIER


def _scale(layer: nn.Linear, factor: float) -> None:
    layer.weight *= factor
    if layer.bias is not None:
        layer.bias *= factor


def _rms(x: Tensor) -> float:
    return (torch.linalg.vector_norm(x) / math.sqrt(x.numel())).item()


def _step(factor: float) -> float:
    """The nearest 2^(k/16): what another machine rounds differently in the last place does not reach the weights."""
    return 2.0 ** (round(16 * math.log2(factor)) / 16)
