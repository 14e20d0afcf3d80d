"""The text encoder against transformers' Gemma2Model and Gemma3TextModel with the same weights."""

from dataclasses import replace

import pytest
import torch
from compare import assert_close, assert_kernel
from transformers import Gemma2Config, Gemma2Model, Gemma3TextConfig, Gemma3TextModel

import sana_model.text_encoder as text_encoder
from sana_model.config import TextEncoderConfig
from sana_model.errors import UserError
from sana_model.text_encoder import TextEncoder
from sana_model.weights.checkpoint_config import read_text_encoder, write_text_encoder
from sana_model.weights.interop import transformers_text_encoder

SMALL = TextEncoderConfig(
    vocab=97, hidden=72, layers=5, heads=6, kv_heads=2, head_dim=32, ffn=150, query_pre_attn_scalar=48.0,
    attn_softcap=4.0, sliding_window=7,
)  # fmt: skip
"""Nothing divides anything else, the window is shorter than the texts, and scores are well beyond the soft-cap."""
TRUE_WIDTH = TextEncoderConfig(vocab=97, layers=2)
THIRD = replace(SMALL, attn_softcap=None, full_every=3, rope_theta=100.0, full_rope_theta=5e4, qk_norm=True)
CLOSE = 1e-5  # of the RMS of the states


def theirs(config: TextEncoderConfig) -> Gemma2Model | Gemma3TextModel:
    """Random signed weights with outliers, large enough for every part to matter."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": config.vocab, "hidden_size": config.hidden, "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "query_pre_attn_scalar": int(config.query_pre_attn_scalar), "sliding_window": config.sliding_window,
        "rms_norm_eps": config.norm_eps, "attn_implementation": "eager",
    }  # fmt: skip
    if config.qk_norm:
        rope = {"sliding_attention": config.rope_theta, "full_attention": config.full_rope_theta}
        settings["rope_parameters"] = {k: {"rope_type": "default", "rope_theta": base} for k, base in rope.items()}
        settings["sliding_window_pattern"] = config.full_every
        model = Gemma3TextModel(Gemma3TextConfig(**settings))
    else:
        model = Gemma2Model(Gemma2Config(**settings, attn_logit_softcapping=config.attn_softcap))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3 if "norm" in name else 0.02 if "embed" in name else 2 * weight.shape[-1] ** -0.5)
        model.embed_tokens.weight[:, 5] *= 20
    return model.eval().requires_grad_(False)


def ours(config: TextEncoderConfig, model: Gemma2Model) -> TextEncoder:
    with torch.device("meta"):
        encoder = TextEncoder(config)
    encoder.load_state_dict(model.state_dict(), assign=True)  # strict: the names are theirs
    return encoder.requires_grad_(False)


@pytest.fixture(scope="module")
def small() -> Gemma2Model:
    return theirs(SMALL)


LENGTHS = torch.tensor([23, 1, 12])


def batch() -> torch.Tensor:
    """Three texts, padded on the right with 0."""
    ids = torch.randint(3, 97, (3, 23), generator=torch.Generator().manual_seed(1))
    return ids.where(torch.arange(23) < LENGTHS[:, None], 0)


def expected(model: Gemma2Model) -> torch.Tensor:
    mask = (torch.arange(23) < LENGTHS[:, None]).long()
    return model(batch(), attention_mask=mask).last_hidden_state


@pytest.mark.parametrize(
    "config",
    [SMALL, replace(SMALL, attn_softcap=None), TRUE_WIDTH, THIRD],
    ids=["small", "uncapped", "2B", "Gemma-3"],
)
def test_equals_transformers(config):
    """Including the states of the pads, which the original dialect reads."""
    model = theirs(config)
    assert_close(ours(config, model)(batch(), LENGTHS), expected(model), CLOSE)


@pytest.mark.parametrize(
    "change",
    [
        {"attn_softcap": None},
        {"sliding_window": 8},
        {"query_pre_attn_scalar": 32.0},
        {"rope_theta": 1000.0},
        {"norm_eps": 1e-4},
        {"sliding_window": 4096},
    ],
    ids=str,
)
def test_every_number_matters(change, small):
    with pytest.raises(AssertionError):
        assert_close(ours(replace(SMALL, **change), small)(batch(), LENGTHS), expected(small), CLOSE)


@pytest.mark.parametrize(
    "change",
    [{"qk_norm": False}, {"full_every": 2}, {"rope_theta": 5e4}, {"full_rope_theta": None}, {"sliding_window": 4096}],
    ids=str,
)
def test_every_number_of_gemma_3_matters(change):
    model = theirs(THIRD)
    encoder = TextEncoder(replace(THIRD, **change))
    encoder.load_state_dict(model.state_dict(), strict=change != {"qk_norm": False})
    with pytest.raises(AssertionError):
        assert_close(encoder(batch(), LENGTHS), expected(model), CLOSE)


def test_pads_are_masked(small):
    """Texts are causal, so only the states of the pads can tell."""
    states, mask = ours(SMALL, small)(batch(), torch.full((3,), 23)), torch.arange(23) < LENGTHS[:, None]
    assert_close(states[mask], expected(small)[mask], CLOSE)
    with pytest.raises(AssertionError):
        assert_close(states[~mask], expected(small)[~mask], CLOSE)


def test_bf16_is_as_close_as_transformers(small):
    model = theirs(SMALL).bfloat16()
    states, reference = ours(SMALL, model)(batch(), LENGTHS), expected(model)
    mask = torch.arange(23) < LENGTHS[:, None]
    assert_kernel(states[mask], reference[mask], expected(model.float())[mask])


@pytest.mark.parametrize("config", [SMALL, THIRD], ids=["small", "Gemma-3"])
@pytest.mark.parametrize("cached", [1, 4, 11])
def test_prefix_changes_nothing(cached, config):
    """Shorter and longer than the window; all of the cache and a part of it."""
    encoder, ids = ours(config, theirs(config)), batch()[:1]
    whole = encoder(ids, torch.tensor([23]))
    prefix = encoder.prefix(ids[0, :11])
    assert_close(prefix.states, whole[0, :11], CLOSE)
    prefix = prefix.take(cached)
    assert len(prefix) == cached
    assert_close(encoder(ids[:, cached:], torch.tensor([23 - cached]), prefix), whole[:, cached:], CLOSE)


def test_prefix_is_shared_by_a_batch(small):
    encoder, ids = ours(SMALL, small), batch()
    ids[:, :5] = ids[0, :5]
    lengths = torch.tensor([23, 9, 6])
    states = encoder(ids[:, 5:], lengths - 5, encoder.prefix(ids[0, :5]))
    mask = torch.arange(23) < lengths[:, None]
    assert_close(states[mask[:, 5:]], encoder(ids, lengths)[:, 5:][mask[:, 5:]], CLOSE)


def test_prefix_positions_matter(small, monkeypatch):
    encoder, ids = ours(SMALL, small), batch()[:1]
    whole, prefix = encoder(ids, torch.tensor([23])), encoder.prefix(ids[0, :11])
    table = text_encoder.rotary_table
    monkeypatch.setattr(text_encoder, "rotary_table", lambda positions, *rest: table(positions + 1, *rest))
    with pytest.raises(AssertionError):
        assert_close(encoder(ids[:, 11:], torch.tensor([12]), prefix), whole[:, 11:], CLOSE)


@pytest.mark.parametrize("config", [SMALL, THIRD], ids=["Gemma-2", "Gemma-3"])
def test_a_configuration_survives_transformers(config):
    """What we write, transformers reads; what it writes, in the names of today, we read."""
    make = Gemma3TextConfig if config.qk_norm else Gemma2Config
    written = make(**write_text_encoder(config, "float32")).to_dict()
    assert read_text_encoder(written, "config.json") == config
    with pytest.raises(UserError, match="model_type"):
        read_text_encoder(written | {"model_type": "gemma4"}, "config.json")
    with pytest.raises(UserError, match="layer_types"):
        read_text_encoder(written | {"layer_types": ["full_attention"] * config.layers}, "config.json")


def test_transformers_gets_the_same_network():
    model = theirs(THIRD)
    encoder = ours(THIRD, model)
    assert_close(encoder(batch(), LENGTHS), expected(transformers_text_encoder(encoder)), CLOSE)
