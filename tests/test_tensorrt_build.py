"""Building engines: for real with TensorRT-RTX, which needs no GPU for it; progress, names, records, Ctrl-C and errors."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
from types import SimpleNamespace

import exported
import fake_tensorrt as fake
import onnx
import pytest
import torch

from sana_export import build, engines, layout
from sana_model.bins import bins
from sana_model.cli import main
from sana_model.config import BUILT_IN
from sana_model.errors import MissingError, UserError
from sana_model.exported import tensorrt_library
from sana_model.exported.tensorrt_library import Library

LIBRARY = Library(fake, "tensorrt")
W8A8 = {"precision": "w8a8", "text_precision": "w4a16", "profile": "128", "only": layout.GRAPHS[:2]}


def rtx():
    """The installed TensorRT-RTX; the test is skipped, visibly, without it."""
    for library in tensorrt_library.installed()[0]:
        if library.name == "tensorrt-rtx":
            return library
    pytest.skip("needs tensorrt-rtx")


# ------------------------------------------------------------------------------------------------ real builds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "request_"),
    [
        ("sana-tiny", {"precision": "fp32", "profile": "128"}),
        ("sana-tiny", W8A8),
        ("shrunk-0.6b", {"precision": "bf16", "profile": "128"}),
        ("shrunk-0.6b", W8A8),
    ],
    ids=["sana-tiny-fp32", "sana-tiny-w8a8", "shrunk-0.6b-bf16", "shrunk-0.6b-w8a8"],
)
def test_every_graph_becomes_an_engine_for_ada_and_blackwell(tmp_path_factory, tmp_path, model, request_):
    rtx()
    graphs = exported.graphs(tmp_path_factory, model, **request_)
    only = tuple(graph for graph in engines.GRAPHS if graph in layout.read(graphs).graphs)
    for target in ("sm89", "sm120"):
        made = build.build_engines(graphs, tmp_path / "engines", target, only=only, say=lambda text: None)
        assert [engine.graph for engine in made] == list(only)
        for engine in made:
            file = engines.engine_file(tmp_path / "engines", engine)
            # An engine holds its weights: no less than the graph does, and not twice as much.
            weights = (graphs / f"{engine.graph}.onnx.data").stat().st_size
            assert 0.9 * weights < engine.weight_bytes < 1.5 * weights
            assert file.stat().st_size == engine.bytes > engine.weight_bytes
            assert engine.target == target and max(engine.activation_bytes) > 0
            # Fusion: fewer layers than there are nodes; products are layers of their own, in int8 where that was asked for.
            assert engine.layers["gemm"] > 0 and sum(engine.layers.values()) < engine.network_layers / 2
            assert engines.read(file.with_suffix(".json")) == engine


@pytest.mark.slow
def test_profiles_of_bins_become_one_engine(tmp_path_factory, tmp_path):
    """33 sizes in 5 profiles: what a run takes is less than one profile over all of them would take."""
    rtx()
    graphs = shutil.copytree(exported.graphs(tmp_path_factory, "small", precision="fp32"), tmp_path / "g")
    manifest = layout.read(graphs)
    profile = dataclasses.replace(manifest.profile, name="bins", sizes=bins(512))
    layout.write(graphs, dataclasses.replace(manifest, profile=profile))
    (several,) = build.build_engines(graphs, tmp_path / "several", "sm89", only=("transformer",), say=lambda text: None)
    assert len(several.profiles) == len(several.activation_bytes) == build.PROFILES
    (one,) = engines.built(tmp_path / "several", "transformer")
    assert one == several
    highest = max(height for height, _ in bins(512)) // 32
    whole = dataclasses.replace(manifest.profile, sizes=((32 * highest, 32 * highest),))
    layout.write(graphs, dataclasses.replace(manifest, profile=whole))
    (single,) = build.build_engines(graphs, tmp_path / "single", "sm89", only=("transformer",), say=lambda text: None)
    assert max(several.activation_bytes) < 0.5 * single.activation_bytes[0]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refitting_wants_a_gpu_and_leaves_nothing_behind(tmp_path_factory, tmp_path):
    rtx()
    graphs = exported.graphs(tmp_path_factory, "small", precision="fp32")
    with pytest.raises(MissingError, match="can be refitted only on a machine with a GPU; leave out --refit"):
        build.build_engines(graphs, tmp_path, "sm89", only=("decoder",), refit=True, say=lambda text: None)
    assert not list(tmp_path.glob("decoder-*"))


def test_a_graph_that_tensorrt_cannot_read_is_told(tmp_path_factory, tmp_path):
    """Also what an interrupted copy leaves: the file is there, its end is not."""
    library = rtx()
    graphs = shutil.copytree(exported.graphs(tmp_path_factory, "small", precision="fp32"), tmp_path / "g")
    file = graphs / "decoder.onnx"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{library.name} .* cannot read .*decoder.onnx: .+"):
        build.build_engines(graphs, tmp_path / "engines", "sm89", only=("decoder",), say=lambda text: None)


@pytest.mark.slow
def test_ctrl_c_ends_a_real_build(tmp_path_factory, tmp_path):
    rtx()
    graphs = exported.graphs(tmp_path_factory, "small", precision="fp32")

    def press(line: str) -> None:
        if "Optimizing graph" in line:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build.build_engines(graphs, tmp_path, "sm89", only=("decoder",), say=press)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(("decoder-", "."))]


# ------------------------------------------------------------------------------------------------ around the build


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(tensorrt_library, "installed", lambda: ([LIBRARY], []))
    monkeypatch.setattr(tensorrt_library, "gpu", lambda device=None: ("sm90", "an H200"))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    return exported.graphs(tmp_path_factory, "small", precision="fp32")


def test_what_is_there_is_not_built_again(graphs, tmp_path, installed):
    said = []
    first = build.build_engines(graphs, tmp_path, "current", say=said.append)
    assert any("s  Building engine" in line for line in said) and not any("already there" in line for line in said)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.engine")}
    said.clear()
    assert build.build_engines(graphs, tmp_path, "current", say=said.append) == first
    assert [line.endswith("already there") for line in said] == [True] * 3
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.engine")}


CHANGES = (
    {"graph_sha256": "0"}, {"library": "tensorrt 1"}, {"target": "sm80"}, {"refittable": True}, {"profiles": ()},
    {"attention": "plugin 1"},
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_the_name_depends_on_all_that_the_engine_depends_on(graphs, tmp_path, installed, change):
    engine = build.build_engines(graphs, tmp_path, "current", only=("decoder",), say=lambda text: None)[0]
    assert dataclasses.replace(engine, **change).stem != engine.stem
    assert dataclasses.replace(engine, bytes=1, seconds=None, layers=None).stem == engine.stem


def test_tensorrt_keeps_its_timing_cache(graphs, tmp_path, installed):
    build.build_engines(graphs, tmp_path, "current", only=("decoder",), say=lambda text: None)
    (cache,) = tmp_path.glob("timing-sm90-99.1.cache")
    assert cache.read_bytes() == b"timed;"
    build.build_engines(graphs, tmp_path, "current", only=("transformer",), say=lambda text: None)
    assert cache.read_bytes() == b"timed;timed;"


def test_the_folder_of_engines_is_a_model_without_weights(graphs, tmp_path, installed):
    build.build_engines(graphs, tmp_path, "current", say=lambda text: None)
    kept = {str(path.relative_to(graphs)) for path in graphs.rglob("*") if path.is_file() and ".onnx" not in path.name}
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert kept <= there and not any(".onnx" in name for name in there)
    assert layout.read(tmp_path) == layout.read(graphs)


@pytest.mark.parametrize("step", [0, 1])
def test_ctrl_c_ends_a_build_and_leaves_nothing_half_written(graphs, tmp_path, installed, monkeypatch, step):
    monkeypatch.setattr(fake.Builder, "stop_after", step)
    monkeypatch.setattr(fake.Builder, "interrupt", lambda builder: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build.build_engines(graphs, tmp_path, "current", only=("decoder",), say=lambda text: None)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(("decoder-", "."))]


def test_a_full_disk_leaves_nothing_half_written(graphs, tmp_path, installed, monkeypatch):
    replace = os.replace

    def full(source, destination):
        if str(destination).endswith(".engine"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, destination)

    monkeypatch.setattr("sana_model.files.os.replace", full)
    with pytest.raises(MissingError, match="disk is full"):
        build.build_engines(graphs, tmp_path, "current", only=("decoder",), say=lambda text: None)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(("decoder-", "."))]


def test_engines_of_two_exports_do_not_share_a_folder(graphs, tmp_path, installed):
    engines_folder = tmp_path / "engines"
    build.build_engines(graphs, engines_folder, "current", only=("decoder",), say=lambda text: None)
    other = shutil.copytree(graphs, tmp_path / "other", copy_function=os.symlink)
    manifest = json.loads((other / layout.MANIFEST).read_text())
    manifest["graphs"]["decoder"]["sha256"] = "another"
    (other / layout.MANIFEST).unlink()
    (other / layout.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"holds engines of another export .* choose another folder"):
        build.build_engines(other, engines_folder, "current", only=("decoder",), say=lambda text: None)


def test_of_two_calibrations_the_engine_of_the_last_export_runs(graphs, tmp_path, installed, monkeypatch):
    """The same weights exported with other scales, and back again: what is there already is not the engine built last."""
    first = shutil.copytree(graphs, tmp_path / "first", copy_function=os.symlink)
    second = shutil.copytree(graphs, tmp_path / "second")
    model = onnx.load(graphs / "decoder.onnx", load_external_data=False)
    model.doc_string = "other scales"
    onnx.save(model, second / "decoder.onnx")
    engines_folder, made = tmp_path / "engines", []
    for source in (first, second, first):
        (engine,) = build.build_engines(source, engines_folder, "current", only=("decoder",), say=lambda text: None)
        chosen = engines.choose(engines_folder, layout.read(engines_folder), "decoder", str(LIBRARY), "sm90", "an H200")
        assert chosen.stem == engine.stem
        made.append(engine.stem)
    assert made[0] == made[2] != made[1]

    def fails(*args):
        raise KeyboardInterrupt

    other = (engines_folder / f"{made[1]}.engine").rename(tmp_path / "other")
    monkeypatch.setattr(build, "build", fails)
    with pytest.raises(KeyboardInterrupt):  # the engine that is there stays the one that runs
        build.build_engines(second, engines_folder, "current", only=("decoder",), say=lambda text: None)
    chosen = engines.choose(engines_folder, layout.read(engines_folder), "decoder", str(LIBRARY), "sm90", "an H200")
    assert chosen.stem == made[2]
    other.rename(engines_folder / f"{made[1]}.engine")
    engines.engine_file(engines_folder, engine).unlink()
    with pytest.raises(UserError, match="was built from another graph of these weights"):
        engines.choose(engines_folder, layout.read(engines_folder), "decoder", str(LIBRARY), "sm90", "an H200")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere", "-o", "engines"], 2, "nowhere is not a folder; graphs are made by: sana export onnx"),
        ([".", "-o", "engines"], 2, "has no export.json"),
        (["graphs", "-o", "engines", "--only", "encoder"], 2, "no engine is made of encoder"),
        (["lacking", "-o", "engines"], 2, "lacking has no transformer.onnx"),
        (
            ["graphs", "-o", "engines", "--target", "sm89"],
            2,
            "no engine can be built for sm89: tensorrt 99.1 builds for current",
        ),
        (["graphs", "-o", "taken"], 2, "taken cannot be made a folder"),
        (["graphs", "-o", "engines"], 3, "torch sees none here; .* --target sm89"),
    ],
    ids=["no folder", "no export", "encoder", "missing graph", "unknown target", "a file", "no GPU"],
)
def test_mistakes_are_told_in_one_line(graphs, tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.setattr(tensorrt_library, "installed", lambda: ([LIBRARY], []))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graphs").symlink_to(graphs)
    shutil.copytree(graphs, "lacking", copy_function=os.symlink)
    (tmp_path / "lacking" / "transformer.onnx").unlink()
    (tmp_path / "taken").touch()
    if status == 2:
        monkeypatch.setattr(tensorrt_library, "gpu", lambda device=None: ("sm90", "an H200"))
    elif torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["export", "tensorrt", *arguments]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_rtx_on_a_gpu_that_it_does_not_know_says_so(monkeypatch):
    libraries = [
        Library(
            SimpleNamespace(__version__="1.7", ComputeCapability=SimpleNamespace(__members__=["SM89"])), "tensorrt-rtx"
        )
    ]
    monkeypatch.setattr(tensorrt_library, "installed", lambda: (libraries, []))
    monkeypatch.setattr(tensorrt_library, "gpu", lambda device=None: ("sm90", "an H200"))
    with pytest.raises(
        UserError, match=r"no engine can be built for this GPU, sm90: tensorrt-rtx 1\.7 builds for sm89, current"
    ):
        tensorrt_library.find("current")
    libraries.append(LIBRARY)
    assert tensorrt_library.find("current") == tensorrt_library.find("sm90") == (LIBRARY, "sm90")
    assert tensorrt_library.find("sm89") == (libraries[0], "sm89")


def test_without_tensorrt_the_way_to_install_it_is_told(graphs, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_library, "installed", lambda: ([], ["tensorrt: No module named 'tensorrt'"]))
    with pytest.raises(MissingError, match=r"TensorRT is not installed .*pip install 'sana-kernels.tensorrt-rtx.'"):
        build.build_engines(graphs, tmp_path, "sm89")


# ------------------------------------------------------------------------------------------------ profiles


@pytest.mark.parametrize("native", [512, 1024, 2048])
def test_sizes_are_parted_into_boxes_close_to_their_own(native):
    sizes = bins(native)
    groups = build.partition(sizes)
    assert sorted(size for group in groups for size in group) == sorted(sizes) and len(groups) == build.PROFILES
    box = max(max(h for h, _ in group) * max(w for _, w in group) for group in groups)
    largest = max(h * w for h, w in sizes)
    assert largest <= box <= 1.3 * largest
    assert len(build.partition(sizes, most=1)) == 1  # of 2 native × 2 native, four times as large
    assert len(build.partition(sizes, most=99)) <= len(sizes)


def test_every_bin_fits_a_profile_of_every_graph():
    config = BUILT_IN["sana-0.6b"]
    profile = layout.profile("bins", config, prompt_tokens=400)
    counts = {}
    for graph in engines.GRAPHS:
        made, signature = build.profiles(profile, graph, config), layout.signature(graph, config)
        counts[graph] = len(made)
        for height, width in profile.sizes:
            dims = {"batch": 2, "tokens": 77, "latent_height": height // 32, "latent_width": width // 32}
            shapes = signature.input_shapes(**dims)
            assert any(
                all(
                    low <= size <= high
                    for name in shapes
                    for low, size, high in zip(ranges[name][0], shapes[name], ranges[name][2], strict=True)
                )
                for ranges in made
            )
    assert counts == {"text_encoder": 1, "transformer": build.PROFILES, "decoder": build.PROFILES}
