"""ONNX graphs against PyTorch: parity, dynamic shapes, traps of the exporter, and what is said when something is wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import exported
import numpy as np
import pytest
import torch
from compare import psnr
from quantized_folders import quantized_folder
from torch import nn
from variants import signed

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx_ir  # noqa: E402

import sana_kernels  # noqa: E402
import sana_model  # noqa: E402
from sana_export import exporter, graphs, layout, ops  # noqa: E402
from sana_export.check import check, picture_limit, relative_error  # noqa: E402
from sana_model.cli import main  # noqa: E402
from sana_model.errors import MissingError, UserError  # noqa: E402
from sana_model.exported import onnxruntime  # noqa: E402
from sana_model.weights.models import find  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ("shrunk-0.6b", "fp32"), ("shrunk-0.6b", "bf16"), ("shrunk-0.6b", "w8a8"),
        pytest.param("sana-tiny", "fp32", marks=pytest.mark.slow),
        pytest.param("sana-tiny", "bf16", marks=pytest.mark.slow),
        pytest.param("sana-tiny", "w8a8", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_graphs_compute_what_their_networks_compute(tmp_path_factory, model, precision):
    """`sana export check` at three shapes, zeros and outliers, and a whole picture by the graphs alone."""
    report = check(exported.graphs(tmp_path_factory, model, **exported.REQUESTS[precision]), steps=2)
    print(report)
    assert report.passed, str(report)
    expected = set(layout.GRAPHS[:2]) if precision == "w8a8" else {*layout.GRAPHS, "picture"}
    assert {row.stage.split(" ")[0] for row in report.rows} == expected


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model in fp32, exported."""
    return exported.graphs(tmp_path_factory, "small", precision="fp32")


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copytree(small, tmp_path / "graphs")


def model_of(folder):
    return onnx.load(layout.graph_file(folder, "transformer"), load_external_data=False)


def test_the_check_sees_a_wrong_weight(copy, capsys):
    """The control of the checks above: one weight of the last layer, and of a layer deep inside."""
    file = layout.graph_file(copy, "transformer")
    model = onnx_ir.load(file)
    bias = next(
        value for name, value in model.graph.initializers.items() if name.endswith("blocks.1.attention.out.bias")
    )
    wrong = bias.const_value.numpy().copy()
    wrong[7] += 0.1
    bias.const_value = onnx_ir.tensor(wrong, name=bias.name)
    onnx_ir.save(model, file.with_name("other.onnx"), external_data="other.onnx.data")
    file.write_bytes(file.with_name("other.onnx").read_bytes())
    assert main(["export", "check", str(copy), "--steps", "1"]) == 1
    said = capsys.readouterr().out
    failed = [line.split(":")[0] for line in said.splitlines() if line.endswith("FAIL")]
    assert failed and {name.split(" ")[0] for name in failed} <= {"transformer", "picture"}


def test_the_check_sees_wrong_scales(tmp_path_factory, tmp_path):
    """Activation scales a tenth as large clip nearly everything, in the graph as in PyTorch's form of it."""
    folder = exported.graphs(tmp_path_factory, "shrunk-0.6b", **exported.REQUESTS["w8a8"])
    folder = shutil.copytree(folder, tmp_path / "graphs")
    manifest = json.loads((folder / layout.MANIFEST).read_text())
    del manifest["graphs"]["text_encoder"]
    scales = manifest["graphs"]["transformer"]["activation_scales"]
    manifest["graphs"]["transformer"]["activation_scales"] = {name: scale / 10 for name, scale in scales.items()}
    (folder / layout.MANIFEST).write_text(json.dumps(manifest))
    model, changed = model_of(folder), 0
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".x_scale"):
            layer = tensor.name.removeprefix("dit.").removesuffix(".x_scale")
            smaller = graphs.rounded_up(torch.tensor(scales[layer] / 10), torch.bfloat16)
            tensor.raw_data = smaller.view(torch.int16).numpy().tobytes()
            changed += 1
    assert changed == len(scales)
    onnx.save(model, layout.graph_file(folder, "transformer"))
    failed = [row.stage for row in check(folder).rows if not row.passed]
    assert len(failed) == 3 and all(stage.endswith("beside the unquantised one") for stage in failed)


def test_a_picture_is_judged_by_the_weakest_of_its_graphs(small):
    manifest = layout.read(small)
    assert picture_limit(manifest) == 45
    for graph, precision, limit in (
        ("decoder", "bf16", 20),
        ("text_encoder", "w4a16", 15),
        ("transformer", "w8a8", 15),
    ):
        weaker = dataclasses.replace(manifest.graphs[graph], precision=precision)
        assert picture_limit(dataclasses.replace(manifest, graphs=manifest.graphs | {graph: weaker})) == limit


@pytest.mark.parametrize(("height", "width", "batch"), [(512, 512, 1), (768, 1344, 2), (512, 512, 4)])
def test_one_graph_serves_every_size(small, tmp_path_factory, height, width, batch):
    """The files of one export at the sizes of two bins and at three batches, texts of three lengths."""
    runner = onnxruntime.Runner(small, CPU)
    pipe = sana_model.load(exported.model(tmp_path_factory, "small"), backend="reference", precision="fp32")
    config, h, w = pipe.config, height // 32, width // 32
    latents, timestep = signed(batch, 32, h, w), torch.linspace(900, 20, batch)
    caption, lengths = signed(batch, 9 * batch, config.dit.caption_channels), torch.arange(batch) * 9 + 1
    ids = torch.randint(0, config.text.vocab, (batch, 20 * batch))
    with torch.inference_mode():
        for found, expected in (
            (
                runner("transformer", latents=latents, timestep=timestep, caption=caption, lengths=lengths),
                pipe.dit(latents, timestep, caption, lengths),
            ),
            (runner("text_encoder", ids=ids, lengths=lengths), pipe.model.text_encoder(ids, lengths)),
            (runner("decoder", latents=latents[:1]), pipe.autoencoder.decode(latents[:1])),
        ):
            assert found.shape == expected.shape
            assert relative_error(found, expected) <= 1e-4
            assert relative_error(found.flip(-1), expected) > 0.1  # the bound says something


def test_a_picture_by_onnx_runtime_alone(small, tmp_path, tmp_path_factory, capsys):
    """Through the command line; ≥ 45 dB to PyTorch, prompts and seeds make a difference, and --from paints it again."""
    settings = {"width": 128, "height": 64, "steps": 3}
    flags = ["--size", "128x64", "--steps", "3", "--seed", "5", "-o", str(tmp_path / "a.png")]
    assert main(["generate", "a red fox", "--model", str(small), "--backend", "onnxruntime", "--plan", *flags]) == 0
    assert "plan for backend 'onnxruntime': exported graphs" in capsys.readouterr().out
    picture = pixels(tmp_path / "a.png")
    pipe = sana_model.load(exported.model(tmp_path_factory, "small"), backend="reference", precision="fp32")
    assert psnr(picture, pixels(pipe("a red fox", seed=5, **settings).images[0])) >= 45
    assert psnr(picture, pixels(pipe("a red fox", seed=6, **settings).images[0])) < 40
    assert main(["generate", "--from", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 0
    assert (pixels(tmp_path / "b.png") == picture).all()


def pixels(image) -> torch.Tensor:
    from PIL import Image

    return torch.from_numpy(np.array(image if isinstance(image, Image.Image) else Image.open(image)))


def test_there_is_nothing_of_ours_to_optimize(small):
    with pytest.raises(UserError, match="runs exported graphs"):
        sana_kernels.optimize(sana_model.load(str(small), backend="onnxruntime"))


# ------------------------------------------------------------------------------------------------ traps


class Attention(nn.Module):
    """Linear attention of its input, as graphs hold it."""

    def forward(self, latents):
        rows = latents.flatten(2).transpose(1, 2).contiguous().unflatten(-1, (-1, 32))
        return ops.graph_ops("plain").linear_attention(rows, rows, rows).flatten(2).transpose(1, 2)


def exported_attention(folder, tmp_path):
    config = find(str(folder)).config
    inputs = {"latents": layout.signature("decoder", config).inputs["latents"]}
    signature = layout.Signature(inputs, {"rows": ("float32", ("batch", 32, "pixels"))})
    exporter.convert(Attention(), signature, config, tmp_path / "attention.onnx", {})
    return onnxruntime.session(tmp_path / "attention.onnx")


def test_a_token_without_attention_is_zero_and_not_nan(small, tmp_path):
    """The exporter's own rewriting deletes `+ eps` below 1e-8, and 0 / 0 is NaN: ours keeps it."""
    session = exported_attention(small, tmp_path)
    latents = signed(2, 32, 5, 3)
    latents[0, :, 2] = -latents[0, :, 2].abs()  # a row of tokens whose queries, after ReLU, are zero
    latents[1] = 0
    found, expected = onnxruntime.run(session, {"latents": latents}), Attention()(latents)
    assert bool(found.isfinite().all()) and not found[1].any()
    assert relative_error(found, expected) <= 1e-4
    inputs = {"latents": latents}
    rewritten = torch.onnx.export(Attention(), (), kwargs=inputs, dynamo=True, optimize=True, verbose=False)
    rewritten.save(tmp_path / "rewritten.onnx")
    theirs = onnxruntime.run(onnxruntime.session(tmp_path / "rewritten.onnx"), inputs)
    assert bool(theirs.isnan().any()), "torch's rewriting keeps eps now: it may be used"


@pytest.mark.parametrize("pixels", [(1, 1), (2, 3), (4, 8), (5, 9)])
def test_attention_has_no_branch_on_the_number_of_pixels(small, tmp_path_factory, pixels):
    """Others turn to quadratic attention at N ≤ 32 pixels, in Python, which a graph cannot: ours are linear at any N."""
    runner = onnxruntime.Runner(small, CPU)
    autoencoder = sana_model.load(exported.model(tmp_path_factory, "small"), precision="fp32").autoencoder
    latents = signed(2, 32, *pixels)
    with torch.inference_mode():
        assert relative_error(runner("decoder", latents=latents), autoencoder.decode(latents)) <= 1e-4


# ------------------------------------------------------------------------------------------------ forms


def test_a_plugin_graph_has_one_node_for_linear_attention(tmp_path_factory, tmp_path):
    """With q, k, v and eps; it is not for ONNX Runtime, and says so."""
    folder = exported.graphs(tmp_path_factory, "small", precision="fp32", attention="plugin", only=("transformer",))
    nodes = [node for node in model_of(folder).graph.node if node.domain == "sana"]
    assert [node.op_type for node in nodes] == ["linear_attention"] * 2 and all(len(node.input) == 3 for node in nodes)
    assert {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}["eps"] == pytest.approx(1e-15)
    for action in (lambda: check(folder), lambda: onnxruntime.Runner(folder, CPU)):
        with pytest.raises(UserError, match="--attention plain"):
            action()


def test_files_say_what_they_are(small, tmp_path_factory):
    """Names, dimensions, metadata; standard operators only; weights outside of the .onnx file."""
    config = find(str(small)).config
    for graph in layout.GRAPHS:
        model = onnx.load(layout.graph_file(small, graph), load_external_data=False)
        onnx.checker.check_model(str(layout.graph_file(small, graph)))
        signature = layout.signature(graph, config)
        for values, described in ((model.graph.input, signature.inputs), (model.graph.output, signature.outputs)):
            found = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
            assert found == {name: shape for name, (_, shape) in described.items()}
        assert {node.domain for node in model.graph.node} == {""} and not model.functions
        properties = {p.key: p.value for p in model.metadata_props}
        assert (
            properties["precision"] == "fp32"
            and properties["weights_sha256"] == layout.read(small).graphs[graph].sha256
        )
        assert properties["model"] == layout.read(small).model and properties["written_by"].startswith("sana-kernels ")
        assert not any(node.op_type.startswith("Sequence") or node.op_type == "IsNaN" for node in model.graph.node)
        sizes = [np.prod(t.dims) for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert max(sizes, default=0) < 1000
    assert list(layout.read(small).graphs) == list(layout.GRAPHS)


def test_profiles():
    """The native square, another one, or all bins; the longest text is the instruction and the longest prompt."""
    config = sana_model.BUILT_IN["sana-0.6b"]
    tokens = exporter.prompt_tokens(config, exporter.without_weights(find("sana-0.6b"), config).tokenizer)
    assert (
        tokens == len(sana_model.prompt.DEFAULT_INSTRUCTION.encode()) + 300
    )  # a byte is a token; BOS, and one kept less
    assert layout.profile(None, config, tokens).sizes == ((1024, 1024),)
    least, typical, most = layout.profile("bins", config, tokens).dims("transformer", config)
    assert least == {"batch": 1, "latent_height": 16, "latent_width": 16, "tokens": 1}
    assert typical == {"batch": 2, "latent_height": 32, "latent_width": 32, "tokens": 300}
    assert most == {"batch": 8, "latent_height": 64, "latent_width": 64, "tokens": 300}
    assert len(layout.profile("bins", config, tokens).sizes) == 33
    assert layout.profile("512", config, tokens).dims("text_encoder", config)[2] == {"batch": 4, "tokens": tokens}
    for wrong in ("large", "0", "100", "-32"):
        with pytest.raises(UserError, match="profile"):
            layout.profile(wrong, config, tokens)


# ------------------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_told_in_a_sentence(small, copy, tmp_path, capsys, tmp_path_factory, monkeypatch):
    """Wrong folder or model, missing graph, unfinished, newer, damaged, other weights, another precision or feature."""
    source, other = exported.model(tmp_path_factory, "small"), str(tmp_path)
    graphs, paint = str(copy), ["generate", "a fox", "--backend", "onnxruntime"]
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    (tmp_path / "engines").mkdir()
    for name in (layout.MANIFEST, "decoder-0123456789abcdef.engine"):
        (tmp_path / "engines" / name).touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    quantized = str(quantized_folder(Path(source), tmp_path / "quantised", "w8a8"))
    for arguments, words in (
        (["export", "check", other], ["no folder of graphs", "sana export onnx"]),
        (["export", "check", str(tmp_path / "none")], ["is not a folder"]),
        (["export", "check", graphs, "--model", "sana-tiny"], ["other weights", "sana-tiny", "--model"]),
        ([*paint, "--model", source], ["no folder of graphs", "sana export onnx"]),
        ([*paint, "--model", "sana-tiny"], ["sana export onnx sana-tiny"]),
        ([*paint, "--model", graphs, "--precision", "bf16"], ["in fp32, not in bf16"]),
        ([*paint, "--model", graphs, "--pag", "2", "--size", "64", "--steps", "1"], ["--pag"]),
        ([*paint, "--model", graphs, "--low-memory"], ["--low-memory"]),
        ([*paint, "--model", graphs, "--tiled"], ["--tiled"]),
        ([*paint, "--model", graphs, "--dialect", "original"], ["'diffusers'", "--dialect original"]),
        ([*paint, "--model", graphs, "--steps", "1001"], ["at most 1000"]),
        (["generate", "a fox", "--model", graphs], ["exported graphs", "--backend onnxruntime"]),
        (["export", "onnx", source, "--precision", "int3", "-o", str(tmp_path / "new")], ["int3", "w8a8"]),
        (["export", "onnx", source, "--only", "vae", "-o", str(tmp_path / "new")], ["vae", "decoder"]),
        (["export", "onnx", source, "--profile", "bins", "-o", str(tmp_path / "new")], ["512, 1024"]),
        (["export", "onnx", source, "-o", str(tmp_path / "used")], ["in use"]),
        (["export", "onnx", source, "-o", str(tmp_path / "engines")], ["holds TensorRT engines"]),
        (["export", "onnx", source, "-o", "."], ["you are in it"]),
        (["export", "onnx", quantized, "-o", str(tmp_path / "new")], ["stored in w8a8", "exporting needs unquantised"]),
        (["export", "onnx", graphs, "-o", str(tmp_path / "new")], ["holds exported graphs, not weights"]),
    ):
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and all(word in said for word in words), said
    assert not (tmp_path / "new").exists() and (tmp_path / "used" / "thesis.txt").exists()
    assert len(list((tmp_path / "engines").iterdir())) == 2

    manifest = copy / layout.MANIFEST
    values = json.loads(manifest.read_text())
    (copy / "transformer.onnx").unlink()
    for action, words in (
        (lambda: None, ["has no transformer.onnx"]),
        (lambda: manifest.write_text(json.dumps(values | {"format": 99})), ["format 99"]),
        (lambda: manifest.write_text("{"), ["cannot be read"]),
        (manifest.unlink, ["unfinished"]),
    ):
        action()
        assert main(["export", "check", graphs]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in [*words, "sana export onnx"]), said


@pytest.mark.parametrize("mistake", [{"tiled": True}, {"pag_scale": 2.0}, {"steps": 2000}])
def test_mistakes_are_told_before_graphs_are_loaded(small, mistake, monkeypatch):
    monkeypatch.delattr("sana_model.exported.pipeline.pipeline")
    with pytest.raises(UserError):
        sana_model.load(str(small), backend="onnxruntime", picture={"prompt": "a fox"} | mistake)
    monkeypatch.undo()
    with pytest.raises(UserError):  # and to one that is loaded, before its first step
        sana_model.load(str(small), backend="onnxruntime").settings("a fox", **mistake)


def test_a_missing_package_is_named(small, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(onnxruntime, "import_module", absent)
    with pytest.raises(MissingError, match=r"pip install 'sana-kernels\[onnx\]'"):
        sana_model.load(str(small), backend="onnxruntime")


def test_an_export_that_fails_leaves_the_earlier_one(small, copy, tmp_path_factory, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    before = {path.name: path.stat().st_size for path in copy.iterdir() if path.is_file()}
    monkeypatch.setattr(exporter, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exporter.export(exporter.Request(exported.model(tmp_path_factory, "small")), copy, lambda text: None)
    assert before == {path.name: path.stat().st_size for path in copy.iterdir() if path.is_file()}
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_models_with_more_inputs(tmp_path_factory, tmp_path):
    """Sprint's guidance as an input and qk-norm; the position embedding of the 2K models."""
    from models import SPRINT

    from sana_model.weights.random_weights import random_dit

    for dit in (
        SPRINT.dit,
        dataclasses.replace(SPRINT.dit, qk_norm=False, guidance_embeds=False, pos_embed_scale=1.0, sample_size=16),
    ):
        config = dataclasses.replace(SPRINT, dit=dataclasses.replace(dit, layers=1))
        network = random_dit(config.dit, dtype=torch.float32)
        batch = {"batch": 3, "latent_height": 4, "latent_width": 7, "tokens": 5}
        signature = layout.signature("transformer", config)
        inputs = {name: signed(*shape) for name, shape in signature.input_shapes(**batch).items()}
        inputs |= {"timestep": torch.tensor([0.2, 0.9, 1.5]), "lengths": torch.tensor([5, 1, 3])}
        with torch.inference_mode():
            expected = network(**inputs)
        module = graphs.for_export("transformer", network, "plain")
        exporter.convert(module, signature, config, tmp_path / "dit.onnx", {})
        found = onnxruntime.run(onnxruntime.session(tmp_path / "dit.onnx"), inputs)
        assert relative_error(found, expected) <= 1e-4, config.dit
