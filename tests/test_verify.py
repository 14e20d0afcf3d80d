"""`verify` passes a sound model, and names the stage of every kind of difference."""

from dataclasses import replace

import models
import pytest
import torch
from diffusers import SanaPipeline

import sana_model.pipeline
from sana_model.weights import verify as module
from sana_model.weights.models import load_model
from sana_model.weights.random_weights import random_model
from sana_model.weights.saving import save_diffusers
from sana_model.weights.verify import verify

SMALL, SPRINT = (replace(config, instruction="default") for config in (models.SMALL, models.SPRINT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "model"
    save_diffusers(path, random_model(SMALL))
    return path


def failed(report) -> list[str]:
    return [row.stage for row in report.rows if not row.passed]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_saved_model_passes(folder, precision):
    report = verify(folder, precision)
    assert report.passed, report
    assert len(report.rows) == 8
    assert "PASS: agrees with diffusers" in str(report)


def test_sprint_with_a_clamp_passes(tmp_path):
    save_diffusers(tmp_path / "m", random_model(replace(SPRINT, dit=replace(SPRINT.dit, clamp=True))))
    report = verify(tmp_path / "m")
    assert report.passed, report


def test_gemma_3_passes(tmp_path):
    """Written as what it is, which diffusers then loads too."""
    save_diffusers(tmp_path / "m", random_model(replace(SMALL, text=models.GEMMA_3)))
    report = verify(tmp_path / "m")
    assert report.passed, report
    theirs = SanaPipeline.from_pretrained(tmp_path / "m").text_encoder
    assert type(theirs).__name__ == "Gemma3TextModel"
    assert theirs.state_dict().keys() == load_model(tmp_path / "m").text_encoder.state_dict().keys()


def test_a_built_in_model_has_no_files_to_compare():
    report = verify("sana-tiny-random")
    assert report.passed, report
    assert not any("weights" in row.stage for row in report.rows)


def break_loaded(monkeypatch, change) -> None:
    """Let `change` spoil what our side has loaded."""

    def spoiled(*args, **kwargs):
        loaded = load_model(*args, **kwargs)
        with torch.no_grad():
            change(loaded)
        return loaded

    monkeypatch.setattr(sana_model.pipeline, "load_model", spoiled)


def perturb(loaded):
    loaded.dit.blocks[1].attention.qkv.weight[300, 5] += 1e-3


def other_eps(loaded):
    for block in loaded.dit.blocks:
        block.eps = 1e-2


def other_softcap(loaded):
    for layer in loaded.text_encoder.layers:
        layer.self_attn.softcap = 1.0


def other_norm(loaded):
    loaded.autoencoder.decoder.norm_out.eps = 100.0


def other_tokens(loaded):
    encode = loaded.tokenizer.encode
    loaded.tokenizer.encode = lambda text: encode(text.replace("fox", "ox"))


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        (perturb, ["weights: transformer"]),
        (other_eps, ["velocity", "picture, 2 steps"]),
        (other_softcap, ["text states", "picture, 2 steps"]),
        (other_norm, ["decoder", "picture, 2 steps"]),
        (other_tokens, ["kept tokens", "text states", "picture, 2 steps"]),
    ],
)
def test_control_names_the_stage(folder, monkeypatch, change, stages):
    break_loaded(monkeypatch, change)
    report = verify(folder)
    assert failed(report) == stages, report
    assert f"FAIL: differs in: {', '.join(stages)}" in str(report)


def test_nan_fails():
    assert not module._row("velocity", float("nan"), "fp32").passed
