"""ONNX graphs in fp16, bf16 and W8A8: what their numbers are, what is refused, and twins that compute as they do."""

import math
from types import SimpleNamespace

import exported
import pytest
import torch
from torch import nn
from variants import signed

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx_ir  # noqa: E402

import sana_model  # noqa: E402
from sana_export import calibration, exporter, graphs, layout, twin  # noqa: E402
from sana_export.check import check, relative_error  # noqa: E402
from sana_model.cli import main  # noqa: E402
from sana_model.errors import UserError  # noqa: E402
from sana_model.exported import onnxruntime  # noqa: E402

CPU = torch.device("cpu")


def test_fp16_is_refused_where_activations_leave_its_range(tmp_path_factory, tmp_path):
    """The largest |value| of a bf16 run decides, wherever in a block it arises."""
    source = exported.model(tmp_path_factory, "small")
    pipe = sana_model.load(source, backend="reference", precision="bf16")
    calibration.check_range(pipe, 1, 1)
    with torch.no_grad():
        pipe.dit.blocks[1].mix_ffn.expand.bias[3] = 50000.0
    with pytest.raises(UserError, match=r"reach .* \(block 1, .*fp16 ends at 65504.*--precision bf16"):
        calibration.check_range(pipe, 1, 1)


def test_fp16_is_refused_for_what_fused_ops_hide(tmp_path_factory):
    """The scores of a cross-attention, of which queries, keys and output are in range."""
    pipe = sana_model.load(exported.model(tmp_path_factory, "small"), backend="reference", precision="bf16")
    cross = pipe.dit.blocks[1].cross_attention
    with torch.no_grad():
        cross.q.weight *= 1000
        cross.kv.weight[: cross.q.out_features] *= 1000
    with pytest.raises(UserError, match=r"reach .* \(block 1, matmul.*fp16 ends at 65504"):
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


def test_w8a8_covers_every_product_over_image_tokens(tmp_path_factory):
    """int8 weights with a scale per output channel and one static scale per input; keys and values stay in bf16."""
    folder = exported.graphs(tmp_path_factory, "shrunk-0.6b", **exported.REQUESTS["w8a8"])
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


def test_16_bit_graphs_are_not_for_this_provider(tmp_path_factory):
    folder = exported.graphs(tmp_path_factory, "shrunk-0.6b", **exported.REQUESTS["bf16"])
    with pytest.raises(UserError, match=r"is in bf16, .*--precision fp32"):
        sana_model.load(str(folder), backend="onnxruntime")
