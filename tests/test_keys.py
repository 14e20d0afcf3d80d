"""Names, shapes and configurations of every published variant against diffusers', and round trips without a copy."""

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from models import SMALL

from sana_model.autoencoder.dc_ae import Autoencoder
from sana_model.config import BUILT_IN, SchedulerConfig
from sana_model.dit import DiT
from sana_model.errors import UserError
from sana_model.weights import checkpoint_config as configs
from sana_model.weights import defaults, keys
from sana_model.weights.random_weights import random_dit

PUBLISHED = {name: config.dit for name, config in BUILT_IN.items() if not name.startswith("sana-tiny")}
VARIANTS = PUBLISHED | {
    "2K": replace(PUBLISHED["sana-1.6b"], sample_size=64, pos_embed_scale=1.0),
    "4K": replace(PUBLISHED["sana-1.6b"], sample_size=128, pos_embed_scale=2.0),
}


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(config)


def shapes(state) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("sana-0.6b", 591_747_872),
        ("sana-1.6b", 1_604_462_752),
        ("sana-1.5-1.6b", 1_604_641_952),
        ("sana-1.5-4.8b", 4_721_825_952),
        ("sana-sprint-0.6b", 593_501_216),
        ("sana-sprint-1.6b", 1_610_237_472),
    ],
)
def test_published_parameter_counts(name, count):
    assert sum(p.numel() for p in on_meta(DiT, PUBLISHED[name]).parameters()) == count


def test_published_autoencoder_parameter_counts():
    autoencoder = on_meta(Autoencoder, BUILT_IN["sana-1.6b"].autoencoder)
    count = [sum(p.numel() for p in half.parameters()) for half in (autoencoder.encoder, autoencoder.decoder)]
    assert count == [153_027_104, 159_223_171]


@pytest.mark.parametrize("name", VARIANTS)
def test_names_and_shapes_are_those_of_diffusers(name):
    """At the true size, from our config.json."""
    config = VARIANTS[name]
    fields = configs.write_dit(config)
    with torch.device("meta"):
        theirs = SanaTransformer2DModel.from_config(fields)
    ours = keys.to_diffusers(on_meta(DiT, config).state_dict(), config)
    assert shapes(ours) == shapes(theirs.state_dict())
    assert configs.read_dit(json.loads(json.dumps(fields)), "config.json") == config
    assert configs.read_dit(dict(theirs.config), "config.json") == config


def test_autoencoder_names_and_shapes_are_those_of_diffusers():
    config = BUILT_IN["sana-1.6b"].autoencoder
    fields = configs.write_autoencoder(config)
    with torch.device("meta"):
        theirs = AutoencoderDC.from_config(fields)
    assert shapes(on_meta(Autoencoder, config).state_dict()) == shapes(theirs.state_dict())
    assert configs.read_autoencoder(json.loads(json.dumps(fields)), "config.json") == config


# Written out here a second time, from the published checkpoints, for a 1.6B Sprint model: C = 2240, F = 5600.
ORIGINAL = {
    "x_embedder.proj.weight": (2240, 32, 1, 1),
    "t_embedder.mlp.0.weight": (2240, 256),
    "t_embedder.mlp.2.bias": (2240,),
    "cfg_embedder.mlp.2.weight": (2240, 2240),
    "t_block.1.weight": (6 * 2240, 2240),
    "y_embedder.y_proj.fc1.weight": (2240, 2304),
    "y_embedder.y_proj.fc2.bias": (2240,),
    "attention_y_norm.weight": (2240,),
    "blocks.19.scale_shift_table": (6, 2240),
    "blocks.19.attn.qkv.weight": (3 * 2240, 2240),
    "blocks.19.attn.k_norm.weight": (2240,),
    "blocks.19.attn.proj.bias": (2240,),
    "blocks.19.cross_attn.q_linear.weight": (2240, 2240),
    "blocks.19.cross_attn.kv_linear.bias": (2 * 2240,),
    "blocks.19.cross_attn.q_norm.weight": (2240,),
    "blocks.19.cross_attn.proj.weight": (2240, 2240),
    "blocks.19.mlp.inverted_conv.conv.weight": (2 * 5600, 2240, 1, 1),
    "blocks.19.mlp.depth_conv.conv.weight": (2 * 5600, 1, 3, 3),
    "blocks.19.mlp.point_conv.conv.weight": (2240, 5600, 1, 1),
    "final_layer.linear.bias": (32,),
    "final_layer.scale_shift_table": (2, 2240),
}


def test_original_names_and_shapes():
    config = PUBLISHED["sana-sprint-1.6b"]
    found = shapes(keys.to_original(on_meta(DiT, config).state_dict(), config))
    assert {name: found.get(name) for name in ORIGINAL} == ORIGINAL
    assert "blocks.0.attn.qkv.bias" not in found
    assert "blocks.0.mlp.point_conv.conv.bias" not in found


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dialect", ["diffusers", "original"])
def test_state_dicts_round_trip(name, dialect):
    config = replace(VARIANTS[name], hidden=64, head_dim=32, cross_heads=2, layers=3, caption_channels=48)
    state = random_dit(config).state_dict()
    theirs = {"diffusers": keys.to_diffusers, "original": keys.to_original}[dialect](state, config)
    assert keys.recognise(theirs) == dialect
    assert {t.untyped_storage().data_ptr() for t in theirs.values()} == {
        t.untyped_storage().data_ptr() for t in state.values()
    }, "a conversion copied"
    rules = keys.rules(config)
    assert sorted(rule.ours for rule in rules) == sorted(state)
    for rule in rules:
        again = keys.join([theirs[name] for name in rule.theirs(dialect)], rule)
        assert torch.equal(again, state[rule.ours]), rule


def test_order_of_the_fused_matrices():
    """q, k, v from top to bottom in the original; k, v in its cross-attention."""
    config = SMALL.dit
    state = random_dit(config).state_dict()
    original, diffusers = keys.to_original(state, config), keys.to_diffusers(state, config)
    for ours, theirs in (
        ("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        ("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v")),
    ):
        parts = [diffusers[f"transformer_blocks.1.{name}.weight"] for name in theirs]
        assert torch.equal(original[f"blocks.1.{ours}.weight"], torch.cat(parts))


def test_configs_round_trip():
    for config in BUILT_IN.values():
        text = configs.write_text_encoder(config.text, "float32")
        assert configs.read_text_encoder(json.loads(json.dumps(text)), "config.json") == config.text
    for scheduler in (SchedulerConfig(), SchedulerConfig("flow_euler", 6.0), SchedulerConfig("scm", sigma_data=0.4)):
        assert configs.read_scheduler(configs.write_scheduler(scheduler), "f") == replace(
            scheduler, flow_shift=scheduler.flow_shift
        )


SCHEDULERS = {
    "DPMSolverMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "SCMScheduler": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_diffusers_writes_of_a_scheduler_is_read(name, tmp_path):
    """All defaults spelled out; and the published configurations of SANA are those of the first."""
    getattr(diffusers, name)(**SCHEDULERS[name]).save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    assert configs.read_scheduler(configs.read_json(file), file) == SchedulerConfig(configs._KINDS[name])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, True) for field in configs._OFF if field != "shift_terminal"),
        ("shift_terminal", 0.02), ("num_train_timesteps", 500),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["flow_dpm", "flow_euler"])
def test_schedulers_that_take_other_steps_are_refused(kind, field, value):
    written = configs.write_scheduler(SchedulerConfig(kind)) | {field: value}
    with pytest.raises(UserError, match=f"scheduler_config.json: {field} is {json.dumps(value)}; supported is"):
        configs.read_scheduler(written, "scheduler_config.json")


@pytest.mark.parametrize(
    ("name", "clamp"),
    [
        ("Sana_600M_512px_diffusers", True),
        ("Sana_1600M_1024px_MultiLing_diffusers", True),
        ("Sana_1600M_1024px.pth", True),
        ("Sana_1600M_1024px_BF16_diffusers", False),
        ("Sana_1600M_2Kpx_BF16_diffusers", False),
        ("SANA1.5_1.6B_1024px_diffusers", False),
        ("Sana_Sprint_0.6B_1024px_diffusers", False),
        ("my-model", False),
    ],
)
def test_checkpoints_trained_in_fp16_are_known_by_name(name, clamp):
    config = BUILT_IN["sana-1.6b"]
    found = defaults.assemble(name, config.dit, config.text, config.autoencoder, config.scheduler)
    assert found.dit.clamp is clamp


@pytest.mark.parametrize(
    ("tokens", "file", "expected"),
    [
        (1024, "a.pth", (32, None, 3.0)),
        (4096, "a.pth", (64, 1.0, 3.0)),
        (16384, "a.pth", (128, 2.0, 6.0)),
        (None, "Sana_600M_512px.pth", (16, None, 3.0)),
    ],
)
def test_published_sizes_of_a_lone_file(tokens, file, expected):
    state = keys.to_original(on_meta(DiT, PUBLISHED["sana-0.6b"]).state_dict(), PUBLISHED["sana-0.6b"])
    found = shapes(state) | ({"pos_embed": (1, tokens, 1152)} if tokens else {})
    config = defaults.with_dit(None, file, configs.infer_dit(found, "original", Path(file), None))
    assert (config.dit.sample_size, config.dit.pos_embed_scale, config.scheduler.flow_shift) == expected
    assert (config.dit.layers, config.dit.cross_heads) == (28, 16)
