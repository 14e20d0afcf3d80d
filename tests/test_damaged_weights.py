"""One sentence, with the file and the key in it, for everything that can be wrong with a checkpoint."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_model.errors import UserError
from sana_model.weights import models as weights
from sana_model.weights.models import load_model
from sana_model.weights.saving import save_original


def edit(folder: Path, file: str, **fields) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


KEY = "transformer_blocks.1.attn2.to_q.weight"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def truncate(folder: Path) -> None:
    path = folder / TRANSFORMER
    path.write_bytes(path.read_bytes()[:-1000])


def shard(folder: Path) -> None:
    path = folder / TRANSFORMER
    path.rename(path.with_name("diffusion_pytorch_model-00001-of-00003.safetensors"))


DAMAGE = {
    "truncated": (truncate, r"diffusion_pytorch_model.safetensors is damaged"),
    "not safetensors": (lambda f: (f / TRANSFORMER).write_text("<html>404</html>"), "is damaged"),
    "empty file": (lambda f: (f / TRANSFORMER).write_bytes(b""), "is damaged"),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda s: s.update({KEY: s[KEY][:, 1:].contiguous()})),
        rf"{KEY} has shape \(256, 255\), expected \(256, 256\)",
    ),
    "missing key": (lambda f: edit_tensors(f, lambda s: s.pop(KEY)), f"safetensors: {KEY} is missing"),
    "surplus key": (
        lambda f: edit_tensors(f, lambda s: s.update(extra=torch.zeros(2))),
        "extra is not part of this model",
    ),
    "quantised": (
        lambda f: edit_tensors(f, lambda s: s.update({k: v.to(torch.int8) for k, v in s.items()})),
        "stored in torch.int8; supported are",
    ),
    "missing shard": (shard, "transformer: shard 2 of 3 is missing"),
    "no weights": (lambda f: (f / TRANSFORMER).unlink(), "transformer holds no weights"),
    "no part": (lambda f: shutil.rmtree(f / "vae"), "vae/config.json is missing"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer has no tokenizer.json"),
    "bad json": (lambda f: (f / "vae/config.json").write_text("{"), "vae/config.json is not valid JSON"),
    "deep json": (lambda f: (f / "vae/config.json").write_text("[" * 100_000), "vae/config.json is not valid JSON"),
    "a text for a number": (
        lambda f: edit(f, "transformer/config.json", num_layers="a"),
        'config.json: num_layers is "a"; it must be a positive whole number',
    ),
    "half a block": (lambda f: edit(f, "transformer/config.json", num_layers=3.5), "num_layers is 3.5; it must be"),
    "fewer than no blocks": (
        lambda f: edit(f, "transformer/config.json", num_layers=-1),
        "num_layers is -1; it must be",
    ),
    "no heads": (lambda f: edit(f, "transformer/config.json", num_attention_heads=0), "num_attention_heads is 0; it"),
    "no channels": (lambda f: edit(f, "text_encoder/config.json", hidden_size=0), "hidden_size is 0; it must be"),
    "a number for a flag": (
        lambda f: edit(f, "transformer/config.json", guidance_embeds=1),
        "guidance_embeds is 1; it must be true or false",
    ),
    "another model": (
        lambda f: edit(f, "model_index.json", _class_name="FluxPipeline"),
        "is a FluxPipeline; supported are SanaPipeline",
    ),
    "patch size": (lambda f: edit(f, "transformer/config.json", patch_size=2), "patch_size is 2; supported is 1"),
    "unknown field": (
        lambda f: edit(f, "transformer/config.json", rope=True),
        "rope is true; this setting is not known",
    ),
    "another autoencoder": (
        lambda f: edit(f, "vae/config.json", upsample_block_type="bilinear"),
        "upsample_block_type is",
    ),
    "another text encoder": (
        lambda f: edit(f, "text_encoder/config.json", model_type="t5"),
        'model_type is "t5"; supported is "gemma2"',
    ),
    "another scheduler": (
        lambda f: edit(f, "scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
        "DDIMScheduler",
    ),
    "noise prediction": (
        lambda f: edit(f, "scheduler/scheduler_config.json", prediction_type="epsilon"),
        "prediction_type is",
    ),
    "parts of two families": (lambda f: edit(f, "transformer/config.json", caption_channels=384), "captions 384 wide"),
    "sprint with a flow sampler": (
        lambda f: edit(f, "transformer/config.json", guidance_embeds=True),
        "guidance_embeds is True",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folder(folder, what):
    damage, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_nothing_is_read_when_something_is_wrong(folder, monkeypatch):
    """All parts are checked before the first value is read."""
    read = []
    monkeypatch.setattr(weights, "fill", lambda *a: read.append(a))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError):
        load_model(folder)
    assert read == []


def test_no_permission(saved, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("sana_model.weights.checkpoint.safe_open", refuse)
    with pytest.raises(UserError, match=r"cannot read .*safetensors: Permission denied"):
        load_model(saved)


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_unsafe_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"x": torch.zeros(1)}, "hook": Evil()}, "evil.pth")
    Path("old.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    for file in ("evil.pth", "old.pth"):
        with pytest.raises(UserError, match="could run code"):
            load_model(file)
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage", "damaged"),
        (b"", "damaged"),
        ({"state_dict": {"x": torch.zeros(1)}}, "is no SANA DiT.*its keys are x"),
        ({"state_dict": {"x": 1}}, "dictionary of tensors"),
        ([1, 2], "dictionary of tensors"),
        ({}, "holds no tensors"),
        ({"x_embedder.proj.weight": torch.zeros(1)}, "not a complete SANA DiT"),
    ],
)
def test_damaged_pth(tmp_path, content, message):
    file = tmp_path / "x.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=message) as error:
        load_model(file)
    assert str(file) in str(error.value)


def test_truncated_pth(model, tmp_path):
    file = tmp_path / "x.pth"
    save_original(file, model)
    file.write_bytes(file.read_bytes()[:-100_000])
    with pytest.raises(UserError, match="damaged"):
        load_model(file)


def test_unknown_names(tmp_path, saved):
    with pytest.raises(UserError, match=r"did you mean sana-0\.6b"):
        load_model("sana-06b")
    with pytest.raises(UserError, match="the built-in names are sana-tiny, "):
        load_model("zzzzzz")
    with pytest.raises(UserError, match=r"no model_index\.json"):
        load_model(tmp_path)
    with pytest.raises(UserError, match=f"pass the whole folder, {saved}"):
        load_model(saved / "transformer")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "Sana.pth").touch()
    with pytest.raises(UserError, match=r"pass the file, .*Sana\.pth"):
        load_model(tmp_path)
