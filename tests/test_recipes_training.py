"""The trainings of the recipe on a handful of pictures for a few steps: learning, resuming, processes, what is shipped."""

import multiprocessing
import os
import socket
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import relative_rms
from PIL import Image
from recipe_data import NAMES, write_pictures
from safetensors.torch import load_file
from torch import nn

from recipes import data, muon, publish, train_autoencoder, train_dit, training
from sana_model.config import BUILT_IN
from sana_model.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def small(monkeypatch) -> None:
    """Networks small enough for a test."""
    monkeypatch.setitem(train_autoencoder.PRESETS, "embedded", autoencoder_config())
    monkeypatch.setattr(train_autoencoder, "MEASURED", 8)
    dit = train_dit.replace(train_dit.EMBEDDED, hidden=64, layers=2, cross_heads=2)
    monkeypatch.setitem(train_dit.PRESETS, "embedded", dit)
    text = {
        "hidden": 64,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 32,
        "ffn": 128,
        "query_pre_attn_scalar": 32.0,
    }
    monkeypatch.setattr(train_dit, "TEXT", train_dit.replace(train_dit.TEXT, **text))


def autoencoder_config():
    widths = (8, 16, 32, 32, 32, 32)
    layers = (1,) * 6
    return train_autoencoder.replace(
        BUILT_IN["sana-tiny"].autoencoder, widths=widths, encoder_layers=layers, decoder_layers=layers
    )


def state(folder: Path) -> dict:
    return torch.load(folder / "state.pt", weights_only=True)


def assert_same(first: dict, second: dict) -> None:
    """Two saved runs are at the same point, bit for bit."""
    assert first["history"] == second["history"] and first["step"] == second["step"]
    for part in ("parameters", "average"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
    for one, other in zip(first["optimizers"], second["optimizers"], strict=True):
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)


@pytest.fixture(scope="module")
def vae(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    autoencoder = train_autoencoder.new_autoencoder(autoencoder_config(), 0)
    train_autoencoder.save_autoencoder(folder, autoencoder, autoencoder.config)
    return folder


@pytest.fixture(params=["autoencoder", "dit"])
def run(request, dataset, vae, monkeypatch):
    """A function that runs one of the scripts with extra flags; `steps` in all, recorded every 4."""
    small(monkeypatch)
    common = ["--data", str(dataset), "--size", "128", "--every", "4", "--warmup", "2", "--device", "cpu"]
    common += ["--precision", "fp32", "--lr", "3e-3", "--ema", "0.9"]
    if request.param == "autoencoder":
        return lambda out, *flags: train_autoencoder.main(
            [*common, "--out", str(out), "--batch", "4", "--perceptual", "0", *flags]
        )
    monkeypatch.setattr(train_dit, "paint", lambda *_: None)
    return lambda out, *flags: train_dit.main(
        [*common, "--out", str(out), "--batch", "16", "--vae", str(vae), "--variants", "2", *flags]
    )


def test_the_loss_falls_and_resuming_is_exact(run, tmp_path, monkeypatch):
    run(tmp_path / "whole", "--steps", "16")
    whole = state(tmp_path / "whole")
    losses = [row["loss"] for row in whole["history"]]
    assert len(losses) == 4 and losses[-1] < 0.95 * losses[0], losses

    real = training.Training.numbers

    def interrupted(self, minutes):
        for step in real(self, minutes):
            if step == 8:
                return
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "numbers", interrupted)
        run(tmp_path / "halves", "--steps", "16")
    assert state(tmp_path / "halves")["step"] == 8
    run(tmp_path / "halves", "--steps", "16")
    assert_same(state(tmp_path / "halves"), whole)
    assert Image.open(tmp_path / "whole" / "loss.png").width == 720

    run(tmp_path / "other", "--steps", "16", "--seed", "1")
    with pytest.raises(AssertionError, match="not equal"):  # control: the comparison can fail
        assert_same(state(tmp_path / "other") | {"history": whole["history"]}, whole)
    with pytest.raises(UserError, match="holds a run with seed 1"):
        run(tmp_path / "other", "--steps", "16")


def test_muon_is_that_of_pytorch():
    shapes = (48, 160), (160, 48), (32, 32)
    start, gradients = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    results = []
    for kind, flags in ((muon.Muon, {}), (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"})):
        parameters = [nn.Parameter(p.clone()) for p in start]
        optimizer = kind(parameters, lr=0.01, weight_decay=0.01, **flags)
        for step in range(3):
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient + step * gradient.roll(1)
            optimizer.step()
        results.append([p.detach() - before for p, before in zip(parameters, start, strict=True)])
    for ours, theirs, gradient in zip(*results, gradients, strict=True):
        assert relative_rms(ours, theirs) < 0.05  # bf16 inside
        assert relative_rms(ours, -gradient * (theirs.norm() / gradient.norm())) > 0.2  # control
    assert muon.is_matrix(torch.empty(64, 16, 3, 3)) and not muon.is_matrix(torch.empty(64, 1, 3, 3))


def test_the_learning_rate_rises_stays_and_falls():
    shares = [training.schedule(step, 100, 10) for step in range(100)]
    assert shares[0] == 0.1 and shares[9:65] == [1.0] * 56 and 0 < shares[99] < 0.03
    assert shares[65:] == sorted(set(shares[65:]), reverse=True)
    assert training.schedule(60, 1000, 10) == 1.0  # more steps: the run goes on where it is


def _train_a_layer(rank: int, processes: int, folder: Path) -> None:
    """Some steps on one linear layer, by one of several processes."""
    torch.set_num_threads(1)
    if processes > 1:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {name: str(value) for name, value in values.items()}
    args = Namespace(steps=5, lr=0.01, warmup=1, ema=0.9, precision="fp32")
    torch.manual_seed(0)
    run = training.Training(nn.Linear(24, 16), folder, args, {})
    for step in run.numbers(None):
        x, y = (torch.randn(6, n, generator=training.generator(n, step)) for n in (24, 16))
        run.update((run(x[run.share]) - y[run.share]).square().mean())
    assert training.anywhere(rank == 1) == (processes > 1)  # one is told to stop: all of them stop
    if run.rank == 0:
        run.save()


def test_processes_that_share_a_batch_learn_what_one_learns(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    context = multiprocessing.get_context("spawn")
    folders = [tmp_path / name for name in ("one", "two", "half")]
    for folder in folders:
        folder.mkdir()
    workers = [context.Process(target=_train_a_layer, args=(rank, 2, folders[1])) for rank in range(2)]
    for worker in workers:
        worker.start()
    _train_a_layer(0, 1, folders[0])
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    with monkeypatch.context() as patch:  # control: a process that sees half of every batch, and nobody else
        patch.setattr(training.Training, "share", slice(0, None, 2))
        _train_a_layer(0, 1, folders[2])
    one, two, half = (state(folder)["parameters"]["weight"] for folder in folders)
    assert relative_rms(two, one) < 1e-5 < relative_rms(half, one)


def test_refining_leaves_the_latents_as_they_are(dataset, vae, tmp_path, monkeypatch):
    small(monkeypatch)
    flags = ["--data", str(dataset), "--size", "128", "--batch", "4", "--every", "2", "--steps", "2", "--warmup", "1"]
    flags += ["--device", "cpu", "--perceptual", "0", "--refine"]
    train_autoencoder.main([*flags, str(vae), "--out", str(tmp_path / "a")])
    before, after = (train_autoencoder.load_autoencoder(folder) for folder in (vae, tmp_path / "a" / "vae"))
    assert after.config == before.config
    torch.testing.assert_close(after.encoder.state_dict(), before.encoder.state_dict(), rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(after.decoder.state_dict(), before.decoder.state_dict(), rtol=0, atol=0)
    assert train_autoencoder.encoder_hash(after) == train_autoencoder.encoder_hash(before)
    train_autoencoder.save_autoencoder(
        tmp_path / "b", train_autoencoder.new_autoencoder(autoencoder_config(), 1), before.config
    )
    with pytest.raises(UserError, match="holds a run with refine"):
        train_autoencoder.main([*flags, str(tmp_path / "b"), "--out", str(tmp_path / "a")])


def test_the_time_budget_stops_cleanly(run, tmp_path):
    run(tmp_path, "--steps", "1000000", "--minutes", "0.02")
    assert 0 < state(tmp_path)["step"] < 1000


def test_equalised_latents_have_one_spread_and_the_same_images(tmp_path):
    autoencoder = train_autoencoder.new_autoencoder(autoencoder_config(), 0).double()
    images = torch.randn(4, 3, 128, 128, dtype=torch.double)
    with torch.no_grad():
        latents = autoencoder.encode(images)
        before = autoencoder.decode(latents)
        spread = latents.std(dim=(0, 2, 3))
        assert spread.max() / spread.min() > 1.5
        train_autoencoder.equalise(autoencoder, spread)
        equal = autoencoder.encode(images)
        assert relative_rms(equal.std(dim=(0, 2, 3)), torch.ones(32)) < 1e-12
        assert relative_rms(autoencoder.decode(equal), before) < 1e-12


def test_the_folders_are_those_of_diffusers(dataset, vae, tmp_path, monkeypatch):
    """A model that was trained for a step paints with our pipeline, and diffusers computes the same with each part."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    small(monkeypatch)
    flags = ["--data", str(dataset), "--vae", str(vae), "--out", str(tmp_path), "--size", "128", "--variants", "1"]
    train_dit.main([*flags, "--steps", "2", "--batch", "4", "--every", "2", "--device", "cpu"])
    assert Image.open(tmp_path / "samples.png").size == (4 * 128, 2 * (128 + 14))
    import sana_model

    pipe = sana_model.load(str(tmp_path / "model"), precision="fp32", device="cpu", backend="reference")
    prompt = "a 3d render of a fox on a teal background"
    ours = pipe(prompt, steps=3, seed=5, guidance=3.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model" / "tokenizer")
    assert tokenizer(prompt)["input_ids"] == pipe.model.tokenizer.encode(prompt)
    theirs = diffusers.SanaPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    noise = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(5))
    image = theirs(
        prompt, num_inference_steps=3, guidance_scale=3.0, height=128, width=128, latents=noise, output_type="np",
        complex_human_instruction=None, use_resolution_binning=False, max_sequence_length=64,
    ).images[0]  # fmt: skip
    error = np.abs(np.asarray(ours.images[0], dtype=float) - 255 * image)
    assert error.max() < 2
    other = pipe(prompt, steps=3, seed=6, guidance=3.0)  # control
    assert np.abs(np.asarray(other.images[0], dtype=float) - 255 * image).max() > 2


def test_the_shipped_model_can_be_made_from_runs(dataset, vae, tmp_path, monkeypatch):
    small(monkeypatch)
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(publish, "SEEN", (("fox", "3d", "teal"),))
    held_out = next(name for name in NAMES if data.heldout_style(name) == "flat")
    monkeypatch.setattr(publish, "HELD_OUT", ((held_out, "flat", "red"),))
    monkeypatch.setattr(publish.sana_model, "load", lambda name: Painter())
    for folder in ("docs", "recipes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "recipes" / "NOTICE").write_text("MIT")
    (tmp_path / "LICENSE").write_text("Apache")
    common = [
        "--data",
        str(dataset),
        "--size",
        "128",
        "--batch",
        "4",
        "--every",
        "2",
        "--steps",
        "2",
        "--device",
        "cpu",
    ]
    quick = ["--perceptual", "0", "--refine", str(vae)]
    train_autoencoder.main([*common, *quick, "--out", str(tmp_path / "decoder")])
    monkeypatch.setattr(train_dit, "paint", lambda *_: None)
    train_dit.main([*common, "--vae", str(vae), "--variants", "1", "--out", str(tmp_path / "dit")])
    flags = ["--data", str(dataset), "--autoencoder", str(tmp_path / "decoder"), "--dit", str(tmp_path / "dit")]
    flags += ["--decoder", str(tmp_path / "decoder"), "--trained-on", "cpu", "--hardware", "a toaster", "--hours", "1"]
    publish.main(flags)
    folder = tmp_path / "checkpoints" / "sana-tiny"
    card = (folder / "README.md").read_text()
    assert "\ntrained_on: cpu\n" in card and "a toaster" in card and "| transformer, text encoder | 2 | 4 | 8 |" in card
    assert Image.open(tmp_path / "docs" / "sana-tiny.png").width == 8 * 32
    stored = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    refined = load_file(tmp_path / "decoder" / "vae" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(stored, {name: tensor.bfloat16() for name, tensor in refined.items()}, rtol=0, atol=0)

    monkeypatch.setattr(publish, "HELD_OUT", (("fox", "flat", "red"),))
    with pytest.raises(UserError, match="no such pairs where they should be: fox, flat"):
        publish.main(flags)


class Painter:
    """A pipeline that paints gray."""

    def __call__(self, texts):
        return Namespace(images=[Image.new("RGB", (32, 32), "gray") for _ in texts])
