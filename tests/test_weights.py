"""Models on disk: what we save, we and diffusers load, with the same values; and nothing is ever half written."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compare import assert_close
from diffusers import SanaPipeline, SanaSprintPipeline, SanaTransformer2DModel
from full_disk import full_disk
from models import SMALL, SPRINT
from safetensors.torch import load_file, save_file

from sana_model.autoencoder.family import find_autoencoder
from sana_model.errors import MissingError, UserError
from sana_model.weights import keys, saving
from sana_model.weights.checkpoint import choose_weights
from sana_model.weights.interop import diffusers_autoencoder, diffusers_transformer
from sana_model.weights.models import convert, find, load_model
from sana_model.weights.random_weights import random_model
from sana_model.weights.saving import save_diffusers, save_original


def assert_same_values(a, b) -> None:
    for part in ("dit", "text_encoder", "autoencoder"):
        ours, others = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert ours.keys() == others.keys()
        assert all(torch.equal(ours[name], others[name]) for name in ours), part


@pytest.mark.parametrize(("variant", "shard_size"), [(None, 10**9), ("fp16", 10**9), (None, 10**6), ("fp16", 10**6)])
def test_save_and_load(model, tmp_path, variant, shard_size):
    """What we save, we load; and diffusers loads, with the same values."""
    folder = tmp_path / "out"
    save_diffusers(folder, model, variant=variant, shard_size=shard_size)
    loaded = load_model(folder)
    assert_same_values(loaded, model)
    for part in (loaded.dit, loaded.text_encoder, loaded.autoencoder):
        assert not any(tensor.data_ptr() % 64 for tensor in part.parameters() if tensor.dtype == torch.float32)
    assert replace(loaded.config, name=model.config.name) == model.config
    assert loaded.random
    assert loaded.tokenizer.encode("é fox") == model.tokenizer.encode("é fox")

    pipe = SanaPipeline.from_pretrained(folder, variant=variant)
    assert len(list((folder / "transformer").glob("*.safetensors"))) == 1 or shard_size < 10**9
    ours = keys.to_diffusers(model.dit.state_dict(), model.config.dit)
    for part, state in (
        (pipe.transformer, ours),
        (pipe.text_encoder, model.text_encoder.state_dict()),
        (pipe.vae, model.autoencoder.state_dict()),
    ):
        theirs = part.state_dict()
        assert theirs.keys() == state.keys()
        assert all(torch.equal(theirs[name], state[name]) for name in theirs)
    assert pipe.tokenizer("é fox").input_ids == model.tokenizer.encode("é fox")


def test_diffusers_computes_the_same_from_the_saved_folder(saved, model):
    transformer = SanaTransformer2DModel.from_pretrained(saved / "transformer")
    g = torch.Generator().manual_seed(1)
    latents, caption = torch.randn(2, 32, 5, 8, generator=g), torch.randn(2, 9, 256, generator=g) * 5
    time = torch.tensor([999, 3])
    with torch.no_grad():
        expected = transformer(latents, caption, time).sample
        assert_close(load_model(saved, parts=("dit",)).dit(latents, time, caption), expected, 1e-5)
        with pytest.raises(AssertionError):  # a control: one weight
            other = load_model(saved, parts=("dit",)).dit
            other.blocks[1].attention.out.weight[3, 7] += 0.01
            assert_close(other(latents, time, caption), expected, 1e-5)


def test_sprint_folder(tmp_path):
    model = random_model(SPRINT)
    save_diffusers(tmp_path / "m", model)
    loaded = load_model(tmp_path / "m")
    assert_same_values(loaded, model)
    assert (loaded.config.scheduler.kind, loaded.config.steps) == ("scm", 2)
    assert isinstance(
        SanaSprintPipeline.from_pretrained(tmp_path / "m").transformer.time_embed.guidance_embedder, torch.nn.Module
    )


def test_folder_written_by_diffusers(saved, tmp_path, model):
    """The other way round: their save_pretrained, without our sana.json."""
    SanaPipeline.from_pretrained(saved).save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs")
    assert_same_values(loaded, model)
    assert not loaded.random
    assert loaded.config.instruction == "default"
    assert loaded.config.dit == model.config.dit
    assert loaded.config.text == model.config.text
    assert loaded.config.autoencoder == model.config.autoencoder
    assert loaded.tokenizer.encode("é fox") == model.tokenizer.encode("é fox")


def test_precisions_parts_and_dialect(saved):
    loaded = load_model(saved, precision=torch.float16, text_precision=torch.bfloat16)
    dtypes = [next(part.parameters()).dtype for part in (loaded.dit, loaded.text_encoder, loaded.autoencoder)]
    assert dtypes == [torch.float16, torch.bfloat16, torch.float32]  # the last as stored
    assert not any(p.requires_grad or p.is_meta for p in loaded.dit.parameters())
    loaded = load_model(saved, parts=("autoencoder",))
    assert (loaded.dit, loaded.text_encoder, loaded.tokenizer) == (None, None, None)
    assert load_model(saved, parts=("dit",), dialect="original").dit.blocks[0].attention.config.attention_eps == 1e-8
    with pytest.raises(UserError, match="dialect 'orignal' is not known"):
        load_model(saved, dialect="orignal")


def test_text_encoder_with_a_head(folder, model):
    """Gemma-2 as it is published by itself, put into a model's folder."""
    file = folder / "text_encoder" / "model.safetensors"
    state = {f"model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(state | {"lm_head.weight": torch.zeros(320, 256)}, file)
    assert_same_values(load_model(folder), model)


def test_text_encoder_again(saved):
    loaded = load_model(saved, text_precision=torch.bfloat16)
    before, loaded.text_encoder = loaded.text_encoder, None
    again = loaded.load_text_encoder()
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), again.parameters(), strict=True))


def test_the_variant_that_suits_the_precision():
    names = ["model.safetensors", "model.fp16.safetensors", "config.json", "model.bf16.safetensors", "model.bin"]
    assert choose_weights(names, torch.float16, "here") == ["model.fp16.safetensors"]
    assert choose_weights(names, torch.bfloat16, "here") == ["model.bf16.safetensors"]
    assert choose_weights(names, torch.float32, "here") == ["model.safetensors"]
    assert choose_weights(names[1:3], torch.float32, "here") == ["model.fp16.safetensors"]
    old = [
        "diffusion_pytorch_model-00002-of-00002.fp16.safetensors",
        "diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
    ]
    assert choose_weights(old, None, "here") == sorted(old)


def test_sana_json(folder):
    overrides = {
        "steps": 7, "guidance": 3, "size": 512, "precision": "fp16", "instruction": "Draw: ", "flow_shift": 6,
        "clamp": True, "pag_layers": [0], "max_text_tokens": 50,
    }  # fmt: skip
    (folder / "sana.json").write_text(json.dumps(overrides))
    source = find(folder)
    c = source.config
    found = (
        c.steps,
        c.guidance,
        c.size,
        source.precision,
        c.instruction,
        c.scheduler.flow_shift,
        c.dit.clamp,
        list(c.pag_layers),
        c.max_text_tokens,
    )
    assert found == tuple(overrides.values())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stepz", 7, "stepz is no known field"),
        ("steps", "7", "steps is \"7\"; it must be of type int"),
        ("steps", True, "steps is true"),
        ("steps", 0, "steps is 0; it must be positive"),
        ("precision", "int8", "precision is 'int8'; supported are"),
        ("pag_layers", [2], "numbered 0 to 1"),
        ("size", 500, "multiple of 32"),
        ("guidance", float("nan"), "guidance is NaN; it must be a number"),
    ],
)  # fmt: skip
def test_wrong_sana_json(folder, field, value, message):
    (folder / "sana.json").write_text(json.dumps({field: value}))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        find(folder)
    assert str(folder / "sana.json") in str(error.value)


# ---------------------------------------------------------------------------------------- single files, converting


def original_file(path: Path, model) -> Path:
    """What the original repository saves, training leftovers included."""
    state = keys.to_original(model.dit.state_dict(), model.config.dit)
    extra = {
        "pos_embed": torch.zeros(1, 1024, model.config.dit.hidden),
        "y_embedder.y_embedding": torch.zeros(300, 256),
        "logvar_linear.weight": torch.zeros(1, model.config.dit.hidden),
        "logvar_linear.bias": torch.zeros(1),
    }
    torch.save({"state_dict": {**state, **extra}, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("config", [SMALL, SPRINT], ids=["plain", "sprint"])
@pytest.mark.parametrize("form", ["original", "diffusers"])
def test_single_file(tmp_path, config, form):
    model = random_model(config, seed=2)
    save_diffusers(tmp_path / "base", model)
    if form == "original":
        file = original_file(tmp_path / "a.pth", model)
    else:
        file = tmp_path / "a.safetensors"
        save_file(keys.to_diffusers(model.dit.state_dict(), config.dit), file)
    loaded = load_model(file, base=tmp_path / "base")
    assert_same_values(loaded, model)
    assert replace(loaded.config, name=model.config.name) == model.config
    alone = load_model(file, parts=("dit",))
    assert alone.config.dit.layers == 2
    assert alone.config.dit.guidance_embeds == config.dit.guidance_embeds
    with pytest.raises(UserError, match=r"holds only the DiT.*pass --base"):
        load_model(file)


def test_convert_both_ways(saved, model, tmp_path):
    convert(saved, tmp_path / "x.pth", "original")
    state = torch.load(tmp_path / "x.pth", weights_only=True)["state_dict"]
    assert state.keys() == keys.to_original(model.dit.state_dict(), model.config.dit).keys()
    convert(tmp_path / "x.pth", tmp_path / "again", base=saved)
    assert_same_values(load_model(tmp_path / "again"), model)
    with pytest.raises(UserError, match="not to 'gguf'"):
        convert(saved, tmp_path / "y", "gguf")


def mixed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices in bf16, whatever is small in fp32, as trainers store what they would not round."""
    return {name: tensor.bfloat16() if tensor.numel() > 10_000 else tensor * 1.001 for name, tensor in state.items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_convert_keeps_the_dtype_of_every_tensor(folder, tmp_path):
    for part in ("transformer", "text_encoder", "vae"):
        (file,) = (folder / part).glob("*.safetensors")
        save_file(mixed(load_file(file)), file)
    stored = load_file(folder / TRANSFORMER)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.float32}
    convert(folder, tmp_path / "again")
    for file in ("transformer/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        names = [place / f"{file}.safetensors" for place in (tmp_path / "again", folder)]
        assert_same_tensors(*map(load_file, names))
    assert json.loads((tmp_path / "again" / "sana.json").read_text())["precision"] == "bf16"
    convert(folder, tmp_path / "x.pth", "original")
    convert(tmp_path / "x.pth", tmp_path / "back", base=folder)
    assert_same_tensors(load_file(tmp_path / "back" / TRANSFORMER), stored)


def test_parts_of_a_fused_matrix_get_the_dtype_that_holds_all(folder, tmp_path):
    stored = load_file(folder / TRANSFORMER)
    q, k = (f"transformer_blocks.0.attn1.to_{name}.weight" for name in "qk")
    save_file(stored | {q: stored[q].bfloat16(), k: stored[k].half()}, folder / TRANSFORMER)
    stored = load_file(folder / TRANSFORMER)
    convert(folder, tmp_path / "again")
    assert_same_tensors(
        load_file(tmp_path / "again" / TRANSFORMER), stored | {q: stored[q].float(), k: stored[k].float()}
    )


def test_convert_refuses_what_it_cannot_keep(folder, tmp_path):
    stored = load_file(folder / TRANSFORMER)
    save_file(stored | {"proj_out.bias": stored["proj_out.bias"].double()}, folder / TRANSFORMER)
    with pytest.raises(UserError, match=r"proj_out\.bias is stored in torch\.float64; supported are float32"):
        convert(folder, tmp_path / "again")
    assert load_model(folder, precision=torch.float32, parts=("dit",)).dit.head.bias.dtype == torch.float32


def test_legacy_pth(model, tmp_path):
    state = keys.to_original(model.dit.state_dict(), model.config.dit)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    loaded = load_model(tmp_path / "old.pth", parts=("dit",))
    assert torch.equal(loaded.dit.head.weight, model.dit.head.weight)


# ---------------------------------------------------------------------------------------- writing


def test_never_destroys(model, saved, tmp_path):
    save_diffusers(tmp_path / "m", model)
    save_diffusers(tmp_path / "m", model)  # ours
    (tmp_path / "m" / "sana.json").unlink()
    with pytest.raises(UserError, match="--force replaces it"):
        save_diffusers(tmp_path / "m", model)
    save_diffusers(tmp_path / "m", model, force=True)
    (tmp_path / "home").mkdir()
    save_diffusers(tmp_path / "home", model)  # empty
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="in use and holds no model"):
        save_diffusers(tmp_path / "thesis", model, force=True)
    (tmp_path / "home" / "export.json").write_text("{}")
    with pytest.raises(UserError, match="holds exported graphs or engines"):
        save_diffusers(tmp_path / "home", model, force=True)
    with pytest.raises(UserError, match="is a file"):
        save_diffusers(tmp_path / "thesis" / "thesis.tex", model, force=True)
    with pytest.raises(UserError, match="does not exist"):
        save_diffusers(tmp_path / "no" / "m", model)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "m", "thesis"]


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.ENOSPC, "No space left on device"), MissingError, "disk is full"),
    ],
)
def test_nothing_half_written(model, saved, tmp_path, monkeypatch, failure, raised, message):
    save_diffusers(tmp_path / "old", model)
    before = (tmp_path / "old" / "model_index.json").stat().st_ino
    writes = []

    def fail(*_args, **_kwargs):
        writes.append(1)
        if len(writes) == 2:
            raise failure

    monkeypatch.setattr(saving, "save_tensors", fail)
    for name in ("new", "old"):
        writes.clear()
        with pytest.raises(raised, match=message):
            save_diffusers(tmp_path / name, model)
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(failure))
    with pytest.raises(raised, match=message):
        save_original(tmp_path / "x.pth", model)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "model_index.json").stat().st_ino == before


@pytest.mark.parametrize("most", [0, 500, 20_000])
def test_a_full_disk_is_one_sentence(model, tmp_path, most):
    """The errors of every library's writer, which are not all those of the system."""
    for write, name in ((save_diffusers, "m"), (save_original, "x.pth")):
        with full_disk(most), pytest.raises(UserError, match=rf"{name} cannot be written: File too large"):
            write(tmp_path / name, model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.EACCES, "Permission denied")])
def test_the_old_model_comes_back_when_the_new_one_cannot_take_its_place(folder, monkeypatch, failure):
    def fail(*_args):
        raise failure

    before = sorted(folder.rglob("*"))
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises((KeyboardInterrupt, UserError)), saving.replacing(folder) as place:
        (place / "new").touch()
    assert sorted(folder.rglob("*")) == before and list(folder.parent.iterdir()) == [folder]


def test_the_folder_that_one_is_in_is_not_replaced(saved, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sana_model.weights.models.load_model", lambda *_: pytest.fail("loaded"))
    for write in (lambda: convert(saved, "."), lambda: save_diffusers(".", model)):
        with pytest.raises(UserError, match=r"you are in it .*name a folder that is still to be made"):
            write()
    assert not list(tmp_path.iterdir())


def test_a_model_can_be_converted_over_itself(folder, model):
    """The old files are still mapped into memory while the new ones are written."""
    convert(folder, folder)
    assert_same_values(load_model(folder), model)


# ---------------------------------------------------------------------------------------- the hub


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def fake_cache(home: Path, folder: Path, leave_out: str = "") -> None:
    """A repository as huggingface_hub keeps it."""
    repo = home / "hub" / "models--someone--small"
    revision = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repo / "snapshots" / revision)
    if leave_out:
        (repo / "snapshots" / revision / leave_out).unlink()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)


def offline(home: Path, *models: str, autoencoder: bool = False) -> list[str]:
    """What loading the models prints, a line each, in a process of its own: the hub reads its settings at import."""
    script = f"""
        from sana_model.autoencoder.family import find_autoencoder
        from sana_model.errors import UserError
        from sana_model.weights.models import load_model
        for model in {models!r}:
            try:
                if {autoencoder}:
                    loaded = load_model(find_autoencoder(model), parts=("autoencoder",))
                else:
                    loaded = load_model(model, parts=("dit",), base="sana-tiny-random")
                print("loaded", loaded.config.name, loaded.source)
            except UserError as error:
                print(error.exit_status, error)
    """
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_hub_from_the_cache(saved, tmp_path):
    fake_cache(tmp_path, saved)
    folder, file = offline(tmp_path, "someone/small", f"hf://someone/small/{TRANSFORMER}")
    assert folder == "loaded small someone/small"
    assert file.startswith("loaded diffusion_pytorch_model ")


@pytest.mark.parametrize("leave_out", ["", "model_index.json"])
def test_the_autoencoder_of_a_whole_model_in_the_cache(saved, tmp_path, leave_out):
    """All of the model, or what diffusers fetches of a subfolder."""
    fake_cache(tmp_path, saved, leave_out)
    (line,) = offline(tmp_path, "someone/small", autoencoder=True)
    assert line.startswith("loaded vae ")


@pytest.mark.parametrize("finder", [find, find_autoencoder])
@pytest.mark.parametrize(
    "name",
    [
        "out/sana--v2", "models/été", "models/sana-", "NVlabs/Sana.git", "./sana/v2", "a/" + 97 * "b",
        "hf://out/sana--v2/a.pth", "hf://someone/small/../a.pth",
    ],
)  # fmt: skip
def test_what_cannot_be_a_hub_id_is_a_path_that_was_mistyped(finder, name):
    with pytest.raises(UserError, match=f"{re.escape(name)} is no file, no folder, no hub id"):
        finder(name)


def test_hub_without_cache_or_network(saved, tmp_path):
    fake_cache(tmp_path, saved, leave_out=TRANSFORMER)
    partial, absent, file = offline(tmp_path, "someone/small", "someone/other", "hf://someone/other/a.pth")
    assert re.match(r"3 someone/small (is no path here|cannot be fetched)", partial)
    assert absent.startswith("3 someone/other is no path here and is not in the hub's cache")
    assert "HF_HUB_OFFLINE" in absent
    assert file.startswith("3 a.pth of someone/other is no path here")


# ---------------------------------------------------------------------------------------- interop


def test_interop_shares_memory(model):
    transformer, vae = diffusers_transformer(model.dit), diffusers_autoencoder(model.autoencoder)
    qkv = model.dit.blocks[0].attention.qkv.weight
    assert transformer.transformer_blocks[0].attn1.to_v.weight.data_ptr() == qkv[512:].data_ptr()
    assert vae.decoder.conv_in.weight.data_ptr() == model.autoencoder.decoder.conv_in.weight.data_ptr()
