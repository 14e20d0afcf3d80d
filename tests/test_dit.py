"""The DiT against diffusers' SanaTransformer2DModel on the same memory: every variant, awkward shapes, and controls.

Weights come from the random recipe: signed, with outlier channels, every branch of every block audible in the output.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from compare import assert_close, relative_rms
from diffusers.models.attention_processor import PAGIdentitySanaLinearAttnProcessor2_0

from sana_model.config import BUILT_IN, DiTConfig
from sana_model.dit import DiT
from sana_model.weights.interop import diffusers_transformer
from sana_model.weights.random_weights import random_dit

LIMIT = 1e-5  # × the RMS of the output
CAPTION = 96

# The published variants with fewer channels and blocks; the dims of both kinds of heads are the true ones.
_06B = DiTConfig(hidden=288, layers=2, cross_heads=4, caption_channels=CAPTION, sample_size=8)
_16B = DiTConfig(hidden=448, layers=2, cross_heads=4, caption_channels=CAPTION, sample_size=8)
SPRINT = {"qk_norm": True, "guidance_embeds": True}
VARIANTS = {
    "0.6B": _06B,
    "1.6B": _16B,
    "1.6B-2K": replace(_16B, pos_embed_scale=1.0),
    "1.6B-4K": replace(_16B, pos_embed_scale=2.0),
    "1.5-1.6B": replace(_16B, qk_norm=True),
    "1.5-4.8B": replace(_16B, qk_norm=True, layers=6),
    "sprint-0.6B": replace(_06B, **SPRINT),
    "sprint-1.6B": replace(_16B, **SPRINT),
}
TRUE_WIDTH = replace(BUILT_IN["sana-0.6b"].dit, layers=2)


@cache
def pair(config: DiTConfig):
    """Our DiT and diffusers', sharing their parameters."""
    dit = random_dit(config, seed=3)
    return dit, diffusers_transformer(dit)


def inputs(config: DiTConfig, batch=2, grid=(7, 9), words=11, seed=5) -> dict:
    """Arguments of `DiT.forward`: captions with outlier channels, and of another length for each image."""
    g = torch.Generator().manual_seed(seed)
    caption = torch.randn(batch, words, config.caption_channels, generator=g)
    caption[..., ::40] *= 30
    sprint = config.guidance_embeds
    return {
        "latents": torch.randn(batch, config.in_channels, *grid, generator=g),
        "timestep": torch.tensor([0.937, 0.4, 0.03][:batch]) if sprint else torch.tensor([999, 428, 1][:batch]),
        "caption": caption,
        "lengths": torch.tensor([1 + (5 * b + 2) % words for b in range(batch)]),
        "guidance": torch.tensor([4.5, 4.0, 1.0][:batch]) if sprint else None,
    }


@torch.no_grad()
def theirs(model, config: DiTConfig, latents, timestep, caption, lengths, guidance) -> torch.Tensor:
    """diffusers' output for the arguments of ours."""
    dtype = model.dtype
    mask = None if lengths is None else (torch.arange(caption.shape[1]) < lengths[:, None]).to(dtype)
    return model(
        latents.to(dtype),
        encoder_hidden_states=caption.to(dtype),
        timestep=timestep * config.timestep_scale,
        guidance=None if guidance is None else guidance * config.guidance_embeds_scale,
        encoder_attention_mask=mask,
    ).sample


@torch.no_grad()
def ours(dit: DiT, arguments: dict) -> torch.Tensor:
    return dit(**arguments)


def fp64(config: DiTConfig, arguments: dict, monkeypatch) -> torch.Tensor:
    """diffusers in fp64. Its linear attention narrows to fp32 with `.float()`, which is kept from doing so."""
    model = diffusers_transformer(random_dit(config, seed=3).double())
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else t.to(torch.float32))
        return theirs(model, config, **arguments)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, monkeypatch):
    config = VARIANTS[name]
    dit, model = pair(config)
    arguments = inputs(config)
    actual, expected = ours(dit, arguments), theirs(model, config, **arguments)
    assert_close(actual, expected, LIMIT, name)
    truth = fp64(config, arguments, monkeypatch)
    assert relative_rms(actual, truth) <= 4 * relative_rms(expected, truth)


@pytest.mark.parametrize("name", ["0.6B", "1.6B-2K", "sprint-1.6B"])
@pytest.mark.parametrize(
    ("batch", "grid", "words"), [(1, (8, 8), 11), (3, (1, 1), 1), (1, (1, 13), 3), (2, (16, 5), 40)]
)
def test_shapes(name, batch, grid, words):
    config = VARIANTS[name]
    dit, model = pair(config)
    arguments = inputs(config, batch, grid, words)
    assert_close(ours(dit, arguments), theirs(model, config, **arguments), LIMIT)


def test_true_width():
    dit, model = pair(TRUE_WIDTH)
    arguments = inputs(TRUE_WIDTH, grid=(9, 7), words=30)
    assert_close(ours(dit, arguments), theirs(model, TRUE_WIDTH, **arguments), LIMIT)


def test_without_lengths_all_words_count():
    config = VARIANTS["1.6B"]
    dit, model = pair(config)
    arguments = inputs(config) | {"lengths": None}
    assert_close(ours(dit, arguments), theirs(model, config, **arguments), LIMIT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_is_as_near_to_the_truth_as_diffusers(dtype, monkeypatch):
    config = VARIANTS["1.5-1.6B"]
    dit = random_dit(config, seed=3, dtype=dtype)
    arguments = inputs(config)
    expected = theirs(diffusers_transformer(dit), config, **arguments)
    truth = fp64(config, arguments, monkeypatch)
    actual = ours(dit, arguments)
    assert actual.dtype == dtype
    assert relative_rms(actual, truth) <= 1.25 * relative_rms(expected, truth)


BREAKS = {
    "mask dropped": lambda a: {"lengths": None},
    "captions swapped": lambda a: {"caption": a["caption"].flip(0)},
    "lengths swapped": lambda a: {"lengths": a["lengths"].flip(0)},
    "timestep + 1": lambda a: {"timestep": a["timestep"] + 1},
    "rows and columns swapped": lambda a: {"latents": a["latents"].reshape(2, -1, 9, 7)},
}


@pytest.mark.parametrize("what", BREAKS)
def test_control_input(what):
    config = VARIANTS["1.6B"]
    dit, model = pair(config)
    arguments = inputs(config)
    expected = theirs(model, config, **arguments)
    broken = ours(dit, arguments | BREAKS[what](arguments)).reshape(expected.shape)
    with pytest.raises(AssertionError):
        assert_close(broken, expected, LIMIT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_eps", 1e-3),
        ("norm_eps", 1e-3),
        ("qk_norm_eps", 1e-3),
        ("cross_qk_norm_eps", 1e-2),
        ("pos_embed_scale", 1.0),
    ],
)
def test_control_config(field, value):
    config = VARIANTS["1.5-1.6B"]
    dit, model = pair(config)
    with torch.device("meta"):
        other = DiT(replace(config, **{field: value}))
    other.load_state_dict(dit.state_dict(), assign=True)
    arguments = inputs(config, grid=(1, 2))  # few tokens: small denominators
    with pytest.raises(AssertionError):
        assert_close(ours(other, arguments), theirs(model, config, **arguments), LIMIT)


@pytest.mark.parametrize("name", ["1.6B", "sprint-0.6B"])
def test_time_text_and_step_are_forward(name):
    config = VARIANTS[name]
    dit, _ = pair(config)
    a = inputs(config, batch=2)
    with torch.no_grad():
        time, text = dit.time(a["timestep"], a["guidance"]), dit.text(a["caption"], a["lengths"])
        assert torch.equal(dit.step(a["latents"], time, text), dit(**a))
        one_row = dit.step(a["latents"], time.step(1, 2), text)  # a schedule's row for all images of the batch
        same_time = {k: v[1:].expand(2) for k, v in a.items() if k in ("timestep", "guidance") and v is not None}
        assert_close(one_row, dit(**(a | same_time)), LIMIT)


@pytest.mark.parametrize("name", ["1.6B", "1.5-1.6B"])
def test_perturbed_rows(name):
    """The last rows skip the self-attention of the given layers, as diffusers' PAG does; the others do not notice."""
    config = VARIANTS[name]
    dit, model = pair(config)
    a = inputs(config, batch=3)
    with torch.no_grad():
        time, text = dit.time(a["timestep"]), dit.text(a["caption"], a["lengths"])
        actual = dit.step(a["latents"], time, text, perturbed=1, pag_layers=(1,))
    plain = theirs(model, config, **a)
    attention = model.transformer_blocks[1].attn1
    kept = attention.processor
    attention.set_processor(PAGIdentitySanaLinearAttnProcessor2_0())
    both_halves = {k: None if v is None else torch.cat([v, v]) for k, v in a.items()}  # (unperturbed, perturbed)
    try:
        perturbed = theirs(model, config, **both_halves)[3:]
    finally:
        attention.set_processor(kept)
    assert_close(actual[:2], plain[:2], LIMIT)
    assert_close(actual[2:], perturbed[2:], LIMIT)
    assert relative_rms(actual[2:], plain[2:]) > 100 * LIMIT


def overflowing(dtype: torch.dtype, clamp: bool) -> DiT:
    """A DiT whose first self-attention leaves fp16's range, and whose gate makes little of it."""
    dit = random_dit(replace(VARIANTS["0.6B"], clamp=clamp), seed=3, dtype=dtype)
    first = dit.blocks[0]
    first.attention.qkv.weight[2 * 288 :] *= 2**9  # v
    first.attention.out.weight *= 2**10
    dit.modulation.weight.zero_()
    dit.modulation.bias.zero_()
    first.scale_shift_table[2] = 2.0**-12
    return dit


def test_clamp():
    """fp16-trained checkpoints need the clamp that fp16 gave them in every precision."""
    arguments = inputs(VARIANTS["0.6B"], batch=1)
    dit = overflowing(torch.float32, clamp=True)
    model = diffusers_transformer(dit)
    unclamped = theirs(model, dit.config, **arguments)
    model.transformer_blocks[0].attn1.to_out[0].register_forward_hook(lambda m, i, y: y.clamp(-65504, 65504))
    expected = theirs(model, dit.config, **arguments)
    assert_close(ours(dit, arguments), expected, LIMIT)
    assert relative_rms(expected, unclamped) > 100 * LIMIT  # the clamp is at work
    assert_close(ours(overflowing(torch.float32, clamp=False), arguments), unclamped, LIMIT)

    half = overflowing(torch.float16, clamp=False)  # in fp16 there is no choice
    actual = ours(half, arguments)
    assert bool(actual.isfinite().all())
    assert relative_rms(actual, theirs(diffusers_transformer(half), half.config, **arguments)) < 5e-3
