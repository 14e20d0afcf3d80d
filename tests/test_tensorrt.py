"""Running engines: profiles, bindings, shared memory, recorded graphs and errors, with a TensorRT that ONNX Runtime computes
(fake_tensorrt.py). What it cannot show, speed and the real library's own behaviour, needs a GPU."""

import dataclasses
import gc
import json
import os
import shutil
import weakref

import exported
import fake_tensorrt as fake
import numpy as np
import pytest
import torch
from compare import psnr

import sana_model
from sana_export import build, engines, layout
from sana_model.cli import main
from sana_model.errors import MissingError, UserError
from sana_model.exported import tensorrt_library
from sana_model.exported.pipeline import pipeline
from sana_model.exported.tensorrt import Cuda, Runner
from sana_model.exported.tensorrt_library import Library

pytest.importorskip("onnxruntime")
LIBRARY = Library(fake, "tensorrt")
CPU = torch.device("cpu")
SIZE = {"width": 256, "height": 192, "steps": 2}  # within the profile below


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    return exported.graphs(tmp_path_factory, "small", precision="fp32")


@pytest.fixture
def installed(monkeypatch):
    """The fake library is the one that is installed, and its GPU the one that engines are built for."""
    monkeypatch.setattr(tensorrt_library, "installed", lambda: ([LIBRARY], []))
    monkeypatch.setattr(tensorrt_library, "gpu", lambda device=None: ("sm89", "an RTX 4090"))


@pytest.fixture
def built(graphs, tmp_path, installed):
    """Engines for two groups of sizes: landscape and portrait."""
    source = shutil.copytree(graphs, tmp_path / "graphs", copy_function=os.symlink)
    manifest = layout.read(graphs)
    profile = dataclasses.replace(manifest.profile, name="two", sizes=((192, 256), (256, 192)))
    layout.write(source, dataclasses.replace(manifest, profile=profile))
    build.build_engines(source, tmp_path / "engines", "current", say=lambda text: None)
    return tmp_path / "engines"


def paint(folder, cuda, **settings):
    pipe = pipeline(folder, Runner(folder, CPU, cuda), "tensorrt")
    return torch.from_numpy(np.stack([np.asarray(i) for i in pipe("a red fox", seed=3, **SIZE | settings).images]))


def test_pictures_are_those_of_pytorch(built, tmp_path_factory):
    """Guided and not, one picture and two, landscape and portrait; another prompt is another picture."""
    pipe = sana_model.load(exported.model(tmp_path_factory, "small"), backend="reference", precision="fp32")
    cuda = fake.FakeCuda()
    runner = pipeline(built, Runner(built, CPU, cuda), "tensorrt")
    previous = None
    for settings in (
        {"prompt": "a red fox"},
        {"prompt": "a blue owl, seen from above", "guidance": 1.0},
        {"prompt": "a red fox", "num_images": 2, "negative_prompt": "blur"},
        {"prompt": "a red fox", "width": 192, "height": 256},
    ):
        ours, theirs = (
            torch.from_numpy(np.stack([np.asarray(image) for image in p(seed=3, **SIZE | settings).images]))
            for p in (runner, pipe)
        )
        assert psnr(ours, theirs) >= 45
        assert previous is None or previous.shape != ours.shape or psnr(ours, previous) < 40  # 45 dB says something
        previous = ours
    assert runner.plan.as_json()["backend"] == "tensorrt"


def test_the_second_picture_of_a_shape_replays_graphs(built):
    cuda = fake.FakeCuda()
    runner = Runner(built, CPU, cuda)
    pipe = pipeline(built, runner, "tensorrt")
    first = [np.asarray(pipe(prompt, seed=3, **SIZE).images[0]) for prompt in ("a red fox", "a red hen")]
    recorded = cuda.graphs
    again = [np.asarray(pipe(prompt, seed=3, **SIZE).images[0]) for prompt in ("a red fox", "a red hen")]
    assert recorded == cuda.graphs
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(first[0], first[1])  # buffers are filled anew before each replay


def test_contexts_share_memory_and_let_go_of_it_when_it_moves(built):
    runner = Runner(built, CPU, fake.FakeCuda())
    small, large = torch.randn(1, 32, 6, 8), torch.randn(4, 32, 6, 8)
    before = runner("decoder", latents=small)
    (run,) = runner._loaded["decoder"].runs.values()
    old = weakref.ref(run.memory)
    del run
    runner("decoder", latents=large)  # needs more
    gc.collect()
    assert old() is None
    assert torch.equal(before, runner("decoder", latents=small))
    contexts = list(runner._loaded["decoder"].runs.values())
    assert len(contexts) == 2
    assert len({run.context.memory for run in contexts}) == 1
    assert len(runner.memory) == 256 * large.numel()  # of the most demanding, not of all together


def test_the_least_recently_used_run_goes(built, monkeypatch):
    monkeypatch.setattr("sana_model.exported.tensorrt.MOST_RUNS", 2)
    runner = Runner(built, CPU, fake.FakeCuda())
    for batch in (4, 1, 4, 2):
        runner("decoder", latents=torch.randn(batch, 32, 6, 8))
    assert [key[0][0] for key in runner._loaded["decoder"].runs] == [4, 2]


def test_a_size_takes_the_profile_that_covers_it(built):
    runner = Runner(built, CPU, fake.FakeCuda())
    for shape in ((1, 32, 6, 8), (1, 32, 8, 6)):
        runner("decoder", latents=torch.randn(shape))
    landscape, portrait = runner._loaded["decoder"].runs.values()
    assert landscape.context.profile["latents"][2][2:] == [6, 8]
    assert portrait.context.profile["latents"][2][2:] == [8, 6]


def test_a_size_beyond_the_profile_is_refused_with_both_sides(built):
    with pytest.raises(
        UserError, match=r"decoder engine cannot take latents 1×32×8×8: it was built for .*1×32×6×8 to 4×32×6×8"
    ):
        Runner(built, CPU, fake.FakeCuda())("decoder", latents=torch.randn(1, 32, 8, 8))
    with pytest.raises(UserError, match=r"cannot take .*latents 10×32×6×8"):  # 5 pictures with guidance
        paint(built, fake.FakeCuda(), num_images=5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: None, "are for sm89, and this GPU \\(an RTX 5090\\) is sm120; build them with.*--target sm120"),
        (lambda folder: [p.unlink() for p in folder.glob("decoder-*")], "has no decoder engine; build"),
        (lambda folder: [p.unlink() for p in folder.glob("decoder-*.engine")], "has no decoder engine; build"),
        (
            lambda folder: _edit(folder, "decoder-", weights_sha256="0123456789abcdef"),
            "decoder engine in .* was built from other weights \\(0123456789ab\\) than .*'s \\([0-9a-f]{12}\\)",
        ),
        (
            lambda folder: _edit(folder, "decoder-", library="tensorrt-rtx 1.2"),
            "built by tensorrt-rtx 1.2, which alone can load it, and installed is tensorrt 99.1",
        ),
        (lambda folder: _edit(folder, "decoder-", profiles=7), "decoder-.*json cannot be read"),
        (lambda folder: [p.write_bytes(b"{") for p in folder.glob("decoder-*.engine")], "magic tag does not match"),
        (lambda folder: (folder / layout.MANIFEST).unlink(), "has no export.json"),
    ],
    ids=["other GPU", "no engine", "unfinished", "other weights", "other version", "damaged record", "damaged", "no folder"],
)  # fmt: skip
def test_what_cannot_run_is_told(built, damage, message):
    damage(built)
    cuda = fake.FakeCuda("sm120", "an RTX 5090") if "sm120" in message else fake.FakeCuda()
    with pytest.raises(UserError, match=message):
        Runner(built, CPU, cuda)("decoder", latents=torch.randn(1, 32, 6, 8))


def _edit(folder, start, **values):
    for path in folder.glob(f"{start}*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_failing_launch_is_told(built, monkeypatch):
    monkeypatch.setattr(fake.Context, "update_device_memory_size_for_shapes", lambda self: 0)
    runner = Runner(built, CPU, fake.FakeCuda())
    monkeypatch.undo()
    monkeypatch.setattr(fake.Context, "set_device_memory", lambda self, address, size: None)
    with pytest.raises(UserError, match="cannot run its decoder engine: too little device memory"):
        runner("decoder", latents=torch.randn(1, 32, 6, 8))


def test_rtx_keeps_what_it_compiled(built, monkeypatch):
    """Built by tensorrt-rtx, contexts come from a runtime configuration, whose cache lies beside the engines."""
    rtx = Library(fake, "tensorrt-rtx")
    monkeypatch.setattr(tensorrt_library, "installed", lambda: ([rtx], []))
    for graph in engines.GRAPHS:
        _edit(built, f"{graph}-", library=str(rtx))
        for record in built.glob(f"{graph}-*.json"):  # a name is the hash of what is recorded, the library among it
            stem = engines.read(record).stem
            record.with_suffix(".engine").rename(built / f"{stem}.engine")
            record.rename(built / f"{stem}.json")
    latents = torch.randn(1, 32, 6, 8)
    first = Runner(built, CPU, fake.FakeCuda())("decoder", latents=latents)
    (cache,) = built.glob("runtime-sm89-99.1.cache")
    assert cache.read_bytes() == b"compiled;"
    again = Runner(built, CPU, fake.FakeCuda())("decoder", latents=latents)
    assert torch.equal(first, again)
    assert cache.read_bytes() == b"compiled;compiled;"  # went on from what it found
    cache.write_bytes(b"of another version")
    with pytest.warns(UserWarning, match="of no use to tensorrt-rtx 99.1"):
        Runner(built, CPU, fake.FakeCuda())("decoder", latents=latents)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_and_exits_with_3(built, monkeypatch, capsys, tmp_path):
    monkeypatch.undo()  # the real torch.cuda
    with pytest.raises(MissingError, match="torch sees none"):
        Cuda(CPU)
    status = main(
        ["generate", "a fox", "--backend", "tensorrt", "--model", str(built), "-o", str(tmp_path / "fox.png")]
    )
    assert status == 3
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "fox.png").exists()
