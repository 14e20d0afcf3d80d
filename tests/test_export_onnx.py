"""ONNX graphs against PyTorch: parity, dynamic shapes, traps of the exporter, and what is said when something is wrong."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

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

import sana_model  # noqa: E402
from sana_export import calibration, exporter, graphs, layout, ops, twin  # noqa: E402
from sana_export.check import check, relative_error  # noqa: E402
from sana_model import onnxruntime  # noqa: E402
from sana_model.cli import main  # noqa: E402
from sana_model.errors import MissingError, UserError  # noqa: E402
from sana_model.weights import find  # noqa: E402

CPU = torch.device("cpu")
REQUESTS = {
    "fp32": {"precision": "fp32", "profile": "128"},
    "bf16": {"precision": "bf16", "profile": "128"},
    "w8a8": {"precision": "w8a8", "text_precision": "w4a16", "profile": "128", "only": layout.GRAPHS[:2]},
}


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
    report = check(exported.graphs(tmp_path_factory, model, **REQUESTS[precision]), steps=2)
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


def test_fp16_is_refused_where_activations_leave_its_range(tmp_path_factory, tmp_path):
    """The largest |value| of a bf16 run decides, wherever in a block it arises."""
    source = exported.model(tmp_path_factory, "small")
    pipe = sana_model.load(source, backend="reference", precision="bf16")
    calibration.check_range(pipe, 1, 1)
    with torch.no_grad():
        pipe.dit.blocks[1].mix_ffn.expand.bias[3] = 50000.0
    with pytest.raises(UserError, match=r"reach .* \(block 1, .*fp16 ends at 65504.*--precision bf16"):
        calibration.check_range(pipe, 1, 1)


def test_fresh_memory_is_no_activation(monkeypatch):
    """Of `empty` tensors only what is written into them counts, whatever they hold before."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # fills them with NaN
    try:
        with calibration.Largest(SimpleNamespace(blocks=[])) as largest:
            made = torch.empty(3, dtype=torch.bfloat16)
            made = made, torch.empty_like(made), made.new_empty(3), torch.empty_strided((3,), (1,), dtype=made.dtype)
            assert largest.value == 0
            assert all(tensor.float().isnan().all() for tensor in made)
            made[0].fill_(-7)
            assert largest.value == 7
            made[1] + 1
        assert largest.value == math.inf
    finally:
        torch.use_deterministic_algorithms(False)


def test_fp16_is_refused_by_the_command_line(monkeypatch, tmp_path_factory, tmp_path, capsys):
    monkeypatch.setattr(calibration, "HEADROOM", 1e6)
    source = exported.model(tmp_path_factory, "small")
    flags = ["--precision", "fp16", "--only", "transformer", "--samples", "1", "--steps", "1"]
    assert main(["export", "onnx", source, *flags, "-o", str(tmp_path / "fp16")]) == 2
    assert "--precision bf16" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_fp16_holds_where_activations_stay_in_its_range(tmp_path_factory):
    """As its twin within twice PyTorch's own error in fp16, and in ONNX Runtime's own fp16, which is no fp32."""
    folder = exported.graphs(tmp_path_factory, "small", precision="fp16", only=("transformer",))
    report = check(folder)
    assert report.passed and len(report.rows) == 5, str(report)
    latents, caption = signed(2, 32, 3, 5), signed(2, 9, exported.MODELS["small"].dit.caption_channels)
    inputs = {"latents": latents, "timestep": torch.tensor([900.0, 20.0]), "caption": caption}
    inputs["lengths"] = torch.tensor([9, 4])
    network = sana_model.load(exported.model(tmp_path_factory, "small"), backend="reference", precision="fp32").dit
    with torch.inference_mode():
        error = relative_error(onnxruntime.Runner(folder, CPU)("transformer", **inputs), network(**inputs))
    assert 1e-5 < error <= 5e-3


# ------------------------------------------------------------------------------------------------ forms


def test_w8a8_covers_every_product_over_image_tokens(tmp_path_factory):
    """int8 weights with a scale per output channel and one static scale per input; keys and values stay in bf16."""
    folder = exported.graphs(tmp_path_factory, "shrunk-0.6b", **REQUESTS["w8a8"])
    model = onnx_ir.load(layout.graph_file(folder, "transformer"))
    weights = {name: value for name, value in model.graph.initializers.items() if value.dtype == onnx_ir.DataType.INT8}
    names = (
        "attention.qkv",
        "attention.out",
        "cross_attention.q",
        "cross_attention.out",
        "mix_ffn.expand",
        "mix_ffn.project",
    )
    expected = {f"dit.blocks.{i}.{name}.values" for i in range(2) for name in names}
    assert {name for name in weights if name.endswith(".values")} == expected
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0].name in expected:
            assert tuple(node.inputs[1].shape) == (node.inputs[0].shape[1],) and node.attributes.get_int("axis") == 1
            (product,) = (user for user, _ in node.outputs[0].uses())
            assert product.op_type == "MatMul" and product.inputs[0].producer().op_type == "DequantizeLinear"
            assert product.inputs[0].producer().inputs[0].producer().op_type == "QuantizeLinear"
    manifest = layout.read(folder)
    assert {f"dit.{name}.values" for name in manifest.graphs["transformer"].activation_scales} == expected
    text = onnx_ir.load(layout.graph_file(folder, "text_encoder"))
    blocks = [n for n in text.graph if n.op_type == "DequantizeLinear"]
    assert len(blocks) == 2 * 7  # q, k, v, o, gate, up and down of each layer
    assert all(n.inputs[0].dtype == onnx_ir.DataType.INT4 and n.attributes.get_int("block_size") == 64 for n in blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_layers_are_near_their_originals(dtype):
    """At least 38 dB for 8 bits and 17 for 4, in fp32 and with scales in bf16."""
    layer = nn.Linear(256, 80).to(dtype)
    x = torch.randn(50, 256).to(dtype)
    exact = x.double() @ layer.weight.double().t() + layer.bias.double()
    for made, decibels in (
        (graphs.GraphLinear.of(layer), 40),
        (graphs.GraphLinear.int8(layer, x.abs().max().item() / 127), 32),
        (graphs.GraphLinear.int4(layer), 17),
    ):
        assert relative_error(made(x), exact) <= 10 ** (-decibels / 20)
    scale = torch.rand(1000) * 10 ** torch.linspace(-6, 3, 1000)
    rounded = graphs.rounded_up(scale, dtype).float()
    assert bool((rounded >= scale).all()) and bool((rounded <= scale * 1.01).all())


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


def test_a_twin_rounds_after_every_operator(tmp_path):
    """bf16(bf16(x + 1) - 1) in ONNX Runtime is what PyTorch computes in bf16, and not what fp32 gives."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])
    one = onnx.helper.make_tensor("one", onnx.TensorProto.BFLOAT16, [], [1.0])
    node = onnx.helper.make_node
    nodes = [
        node("Cast", ["x"], ["a"], to=onnx.TensorProto.BFLOAT16), node("Add", ["a", "one"], ["b"]),
        node("Sub", ["b", "one"], ["c"]), node("Cast", ["c"], ["y"], to=onnx.TensorProto.FLOAT),
    ]  # fmt: skip
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], [one])
    opset = onnx.helper.make_opsetid("", exporter.OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "bf16.onnx")
    twin.write_twin(tmp_path / "bf16.onnx", tmp_path / "twin.onnx")
    values = signed(1000) / 10
    found = onnxruntime.run(onnxruntime.session(tmp_path / "twin.onnx", optimize=False), {"x": values})
    assert torch.equal(found, ((values.bfloat16() + 1) - 1).float())
    assert not torch.equal(found, values.bfloat16().float())


# ------------------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_told_in_a_sentence(small, copy, tmp_path, capsys, tmp_path_factory):
    """Wrong folder or model, missing graph, unfinished, newer, damaged, other weights, another precision or feature."""
    source, other = exported.model(tmp_path_factory, "small"), str(tmp_path)
    graphs, paint = str(copy), ["generate", "a fox", "--backend", "onnxruntime"]
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
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
        (["generate", "a fox", "--model", graphs], ["exported graphs", "--backend onnxruntime"]),
        (["export", "onnx", source, "--precision", "int3", "-o", str(tmp_path / "new")], ["int3", "w8a8"]),
        (["export", "onnx", source, "--only", "vae", "-o", str(tmp_path / "new")], ["vae", "decoder"]),
        (["export", "onnx", source, "--profile", "bins", "-o", str(tmp_path / "new")], ["512, 1024"]),
        (["export", "onnx", source, "-o", str(tmp_path / "used")], ["in use"]),
        (["export", "onnx", quantized, "-o", str(tmp_path / "new")], ["stored in w8a8", "exporting needs unquantised"]),
        (["export", "onnx", graphs, "-o", str(tmp_path / "new")], ["holds exported graphs, not weights"]),
    ):
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and all(word in said for word in words), said
    assert not (tmp_path / "new").exists() and (tmp_path / "used" / "thesis.txt").exists()

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


def test_a_missing_package_is_named(small, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(onnxruntime, "import_module", absent)
    with pytest.raises(MissingError, match=r"pip install 'sana-kernels\[onnx\]'"):
        sana_model.load(str(small), backend="onnxruntime")


def test_16_bit_graphs_are_not_for_this_provider(tmp_path_factory):
    folder = exported.graphs(tmp_path_factory, "shrunk-0.6b", **REQUESTS["bf16"])
    with pytest.raises(UserError, match=r"is in bf16, .*--precision fp32"):
        sana_model.load(str(folder), backend="onnxruntime")


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

    from sana_model.random_weights import random_dit

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
