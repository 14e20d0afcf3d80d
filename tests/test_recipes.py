"""The recipe of `sana-tiny` on a handful of pictures for a few steps: what is held out, captions, training, resuming."""

import hashlib
import io
import json
import multiprocessing
import os
import random
import socket
import tarfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import relative_rms
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from recipes import captions, data, muon, perceptual, publish, train_autoencoder, train_dit, training
from recipes.images import Images, Placement
from recipes.vocabulary import train_tokenizer
from sana_model.config import BUILT_IN
from sana_model.errors import UserError

NAMES = ["fox", "owl", "glasses", "bus", "chess pawn", "red apple", "house", "tent", "pear", "ox", "ring", "key"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Coloured ellipses with soft edges in place of pictures: no network, no packages."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [(name, style) for name in NAMES for style in ("3d", "flat")]
    rows = [data.Row(name, name, ("tag", "thing"), f"{i:x}", "objects", style) for i, (name, style) in enumerate(pairs)]
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    random_numbers = np.random.default_rng(0)
    renders = np.zeros((len(rows), 256, 256, 4), np.uint8)
    for picture in renders:
        width, height = random_numbers.uniform(0.3, 0.9, 2)
        picture[..., :3] = random_numbers.integers(0, 256, 3)
        picture[..., 3] = np.clip(255 * 8 * (1 - np.hypot(x / width, y / height)), 0, 255)
    np.save(folder / "renders.npy", renders)
    (folder / "index.json").write_text(json.dumps([vars(row) for row in rows]))
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------ captions


def test_captions_can_be_read_back():
    rng = random.Random(0)
    forms = set()
    for i in range(2000):
        tags = tuple(rng.sample(["animal", "orange", "sharp", "old"], rng.randint(0, 3)))
        style, colour = rng.choice(list(captions.STYLES)), rng.choice(list(captions.COLOURS))
        factors = captions.Factors(NAMES[i % len(NAMES)], style, colour, tags)
        text = captions.sample(rng, factors)
        read = captions.parse(text)
        assert (read.concept, read.style, read.colour) == (factors.concept, style, colour), text
        assert set(read.tags) <= set(tags)
        forms.add(text.replace(factors.concept, "…"))
    assert len(forms) > 200
    with pytest.raises(ValueError, match="names no style"):
        captions.parse("a fox on a teal background")


def test_the_canonical_caption():
    assert captions.canonical("fox", "3d", "teal") == "a 3d render of a fox on a teal background"
    assert captions.canonical("owl", "outline", "orange") == "an outline drawing of an owl on an orange background"
    assert captions.canonical("glasses", "flat") == "a flat icon of glasses"
    assert captions.with_article("bus") == "a bus" and captions.with_article("unicorn") == "a unicorn"
    assert captions.parse("a flat icon of glasses").colour == "white"


def test_background_colours_can_be_told_apart():
    colours = np.array(list(captions.COLOURS.values()), dtype=int)
    apart = np.abs(colours[:, None] - colours[None]).max(-1) + 255 * np.eye(len(colours), dtype=int)
    assert len(colours) >= 12 and apart.min() >= 50


# ------------------------------------------------------------------------------------------------ data


def archive(folder: Path, name: str, files: dict[str, bytes]) -> data.Package:
    """A package as npm packs it."""
    package = data.Package(name, "1.0.0", "")
    with tarfile.open(folder / package.archive, "w:gz") as tar:
        for path, content in files.items():
            entry = tarfile.TarInfo(f"package/{path}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return data.Package(name, "1.0.0", hashlib.sha256((folder / package.archive).read_bytes()).hexdigest())


def webp(shade: int, size: tuple[int, int] = (256, 256)) -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", size, (shade, 200, 255 - shade, 255)).save(out, "WEBP", lossless=True)
    return out.getvalue()


def test_the_builder_on_a_small_package(tmp_path):
    pytest.importorskip("resvg_py")
    entries = [  # label, code point, group, shade in 3d
        ("fox", "1F98A", 3, 0),
        ("copy of a fox", "1F98B", 3, 0),  # looks like a fox in both styles
        ("owl", "1F989-FE0F", 3, 255),
        ("person running", "1F3C3", 1, 120),
        ("man running", "1F3C3-200D-2642-FE0F", 1, 60),  # the same person
        ("no picture", "1F000", 3, None),
        ("keycap: 1", "0031-FE0F-20E3", 8, 90),  # lettering
    ]
    labels = [{"label": n, "hexcode": c, "group": g, "tags": ["animal", n]} for n, c, g, _ in entries]
    groups = {"1": "people-body", "3": "animals-nature", "8": "symbols"}
    pictures = {f"assets/{c.lower()}.webp": webp(s, (256, 264)) for _, c, _, s in entries if s is not None}
    square = '<rect width="32" height="32" fill="#{:02x}8040"/>'
    icons = {
        "width": 32, "height": 32,
        "icons": {n: {"body": square.format(s)} for n, _, _, s in entries if s is not None},
    }  # fmt: skip
    chars = {data.plain(c): n for n, c, _, _ in entries}
    packages = (
        archive(tmp_path, "@x/renders", pictures),
        archive(tmp_path, "icons", {"icons.json": json.dumps(icons).encode(), "chars.json": json.dumps(chars).encode()}),
        archive(tmp_path, "labels", {
            "en/data.json": json.dumps(labels).encode(), "meta/groups.json": json.dumps({"groups": groups}).encode(),
        }),
    )  # fmt: skip
    data.build(tmp_path / "set", tmp_path, packages=packages)
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    renders = np.load(tmp_path / "set" / "renders.npy")
    pairs = [(row["name"], row["style"]) for row in index]
    assert pairs == [(name, style) for name in ("fox", "owl", "person running") for style in ("3d", "flat")]
    assert index[0]["tags"] == ["animal"] and index[2]["codepoint"] == "1f989"
    assert renders.shape == (6, 256, 256, 4) and renders.dtype == np.uint8
    assert renders[0, 128, 128].tolist() == [0, 200, 255, 255] and renders[0, 128, 0, 3] == 0  # fitted, not cropped
    assert renders[3, 128, 128].tolist() == [255, 0x80, 0x40, 255]

    damaged = data.Package("labels", "1.0.0", "0" * 64)
    with pytest.raises(UserError, match="SHA-256"):
        data.fetch(damaged, tmp_path)


def test_held_out_pairs_are_never_trained(dataset):
    names = [f"thing {i}" for i in range(2000)]
    held = [data.heldout_style(name) for name in names]
    assert 0.17 < sum(style is not None for style in held) / len(held) < 0.23
    assert 0.4 < held.count("3d") / (held.count("3d") + held.count("flat")) < 0.6
    assert data.heldout_style("fox") is None  # the picture of the main README is a trained pair
    images = Images(dataset, 128)
    trained = {(images.rows[i].name, images.rows[i].style) for i in images.train}
    assert images.held_out and not set(images.train) & set(images.held_out)
    for i in images.held_out:
        row = images.rows[i]
        assert data.heldout_style(row.name) == row.style
        assert (row.name, {"3d": "flat", "flat": "3d"}[row.style]) in trained  # the concept itself is known


def test_compositing_is_what_pillow_does(dataset):
    images, colours, rows = Images(dataset, 256), ("red", "teal"), (0, 5)
    whole = Placement(Placement.centred(colours).colours, torch.ones(2), torch.zeros(2, 2))
    renders = np.load(dataset / "renders.npy")
    for row, colour, image in zip(rows, colours, images.compose(rows, whole), strict=True):
        expected = Image.new("RGBA", (256, 256), (*captions.COLOURS[colour], 255))
        expected.alpha_composite(Image.fromarray(renders[row]))
        error = np.asarray(training.to_pil(image), dtype=int) - np.asarray(expected.convert("RGB"), dtype=int)
        assert np.abs(error).max() <= 2


def test_placement_moves_the_picture_and_nothing_else(dataset):
    images = Images(dataset, 128)
    base = Placement.centred(["teal"])
    moved = Placement(base.colours, base.scales, torch.tensor([[0.05, -0.03125]]))  # 6.4 px right, 4 px up
    first, second = (images.compose([0], p)[0].sub(plain_colour("teal")).abs().sum(0) for p in (base, moved))
    grid = torch.stack(torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij"))
    centres = [(grid * weight).sum((1, 2)) / weight.sum() for weight in (first, second)]
    torch.testing.assert_close(centres[1] - centres[0], torch.tensor([-4.0, 6.4]), atol=0.1, rtol=0)
    corner = images.compose(range(4), Placement.centred(["teal"] * 4))[:, :, 0, 0]
    torch.testing.assert_close(corner, plain_colour("teal")[:, 0, 0].expand(4, 3))


def plain_colour(name: str) -> torch.Tensor:
    return (torch.tensor(captions.COLOURS[name]) / 127.5 - 1)[:, None, None]


# ------------------------------------------------------------------------------------------------ perceptual loss


def lite0_like() -> nn.Module:
    """The first blocks of EfficientNet-Lite0 made of PyTorch's layers, with its names and random weights."""

    def same(kernel: int, stride: int, size: int) -> nn.Module:
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        return nn.ZeroPad2d((total // 2, total - total // 2, total // 2, total - total // 2))

    class Block(nn.Module):
        def __init__(self, i, o, expand, kernel, stride, size):
            super().__init__()
            middle = i * expand
            layers = OrderedDict()
            if expand > 1:
                layers["_expand_conv"] = nn.Conv2d(i, middle, 1, bias=False)
                layers |= {"_bn0": nn.BatchNorm2d(middle, 1e-3), "a": nn.ReLU6()}
            layers["pad"] = same(kernel, stride, size)
            layers["_depthwise_conv"] = nn.Conv2d(middle, middle, kernel, stride, groups=middle, bias=False)
            layers |= {"_bn1": nn.BatchNorm2d(middle, 1e-3), "b": nn.ReLU6()}
            layers |= {"_project_conv": nn.Conv2d(middle, o, 1, bias=False), "_bn2": nn.BatchNorm2d(o, 1e-3)}
            for name, layer in layers.items():
                self.add_module(name, layer)
            self.skip = stride == 1 and i == o

        def forward(self, x):
            y = x
            for layer in self.children():
                y = layer(y)
            return x + y if self.skip else y

    network = nn.Module()
    network._conv_stem, network._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, 1e-3)
    network.pad = same(3, 2, 64)
    stages = [(1, 16, 1, 3, 1), (2, 24, 6, 3, 2), (2, 40, 6, 5, 2), (3, 80, 6, 3, 2), (3, 112, 6, 5, 1)]
    network._blocks = nn.ModuleList()
    channels, size = 32, 32
    for repeats, out, expand, kernel, stride in stages:
        for i in range(repeats):
            network._blocks.append(Block(channels, out, expand, kernel, stride if i == 0 else 1, size))
            channels, size = out, size // stride if i == 0 else size
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2), module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2), nn.init.normal_(module.bias, 0, 0.3)
    return network.eval()


def test_perceptual_features_match_pytorch_layers():
    network = lite0_like()
    images = torch.randn(2, 3, 64, 64)
    features = perceptual.Features(network.state_dict())
    with torch.no_grad():
        x = nn.functional.relu6(network._bn0(network._conv_stem(network.pad(images))))
        expected = []
        for i, block in enumerate(network._blocks):
            x = block(x)
            if i in perceptual.TAPS:
                expected.append(x)
        for ours, theirs in zip(features(images), expected, strict=True):
            assert relative_rms(ours, theirs) < 1e-5
        network._blocks[0]._bn1.running_mean += 1  # control: the folding matters
        shifted = next(perceptual.Features(network.state_dict())(images))
        assert relative_rms(shifted, expected[0]) > 1e-2
    same, near, far = (features.distance(images + e * torch.randn_like(images), images).item() for e in (0, 0.1, 0.5))
    assert same == 0 < near < far


# ------------------------------------------------------------------------------------------------ training


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


def test_the_tokenizer_reads_any_text(dataset, tmp_path):
    from sana_model.tokenizer import load_tokenizer

    rows = Images(dataset, 128).rows
    for folder in ("a", "b"):
        train_tokenizer(rows, tmp_path / folder)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.encode("") == [2] and tokenizer.pad_id == 0
    ids = tokenizer.encode("a 3d render of a fox on a teal background")
    assert ids[0] == 2 and len(ids) == 12 and 2 not in ids[1:]  # a token for each word, and two for "3d"
    for text in ("a fox", "zażółć 狐 🦊", "piñata, O'Neill"):
        assert tokenizer.decode(tokenizer.encode(text)).strip() == text.lower()
