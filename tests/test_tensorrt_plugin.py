"""Linear attention as a TensorRT plugin: how a graph is rewritten, and that the kernels, launched as the plugin says,
compute the op. The kernels run on the emulator; TensorRT's side of it needs `tensorrt` and a GPU."""

import ctypes
import struct
import sys
import types
from types import SimpleNamespace

import exported
import pytest
import torch
from compare import assert_close, assert_kernel

from sana_export import engines, layout, plugin
from sana_kernels.linear_attention import reference
from sana_model.errors import MissingError, UserError
from sana_model.exported import tensorrt_library
from tests import emulated

onnx = pytest.importorskip("onnx")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAUNCHER = "tests/plugin_kernels.cu"


def cdiv(a, b):
    return -(-a // b)


def run(library, launch, inputs, output):
    """Launch a kernel with the arguments in TensorRT's order: inputs, integers, outputs."""
    grid = (*launch.grid, 1)
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*inputs, output)]
    integers = [ctypes.c_int(value) for value in launch.arguments]
    function = getattr(library, launch.kernel.replace("sana_linear_attention", "launch"))
    status = function(*grid[:2], launch.block, launch.shared, *addresses[:-1], *integers, addresses[-1])
    assert status == 0, f"{launch.kernel} failed with status {status}"
    return output


def attend(library, q, k, v, eps=1e-15, seed=0):
    """The op as the three plugins compute it."""
    (B, N, H, D), name = q.shape, next(name for name, dtype in DTYPES.items() if dtype == q.dtype)
    chunks = cdiv(N, plugin.chunk_tokens(N, cdiv, max))
    with emulated.memory(seed):
        q, k, v = map(emulated.guarded, (q, k, v))
        shapes = ((B, H, chunks, D, D + 1), torch.float32), ((B, H, D, D + 1), torch.float32), (q.shape, q.dtype)
        states, state, out = (emulated.guarded(torch.full(shape, torch.nan, dtype=dtype)) for shape, dtype in shapes)
        run(library, plugin.launch_state(name, B, N, H, cdiv, max), (k, v), states)
        run(library, plugin.launch_sum(B, H, chunks), (states,), state)
        return run(library, plugin.launch_apply(name, B, N, H, eps, cdiv), (q, state), out).clone()


@pytest.fixture(scope="module")
def kernels():
    return emulated.load(LAUNCHER)


def inputs(B, N, H, dtype):
    """q, k, v (B, N, H, 32) with outliers, and a token whose q is all negative: its denominator is eps alone."""
    q, k, v = torch.randn(3, B, N, H, 32)
    q[..., 0] *= 30
    v[..., 1] *= 30
    q[:, N // 2] = -q[:, N // 2].abs()
    return [x.to(dtype).contiguous() for x in (q, k, v)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "N", "H"), [(1, 1, 1), (2, 1008, 2), (1, 1023, 3), (1, 2100, 1)])
def test_three_launches_are_the_op(kernels, dtype, B, N, H):
    q, k, v = inputs(B, N, H, DTYPES[dtype])
    outs = [attend(kernels, q, k, v, seed=seed) for seed in (0, 2)]
    assert torch.equal(outs[0], outs[1])
    assert_kernel(
        outs[0], reference.linear_attention(q, k, v), reference.linear_attention(*(x.double() for x in (q, k, v)))
    )


def test_eps_arrives_though_only_integers_are_passed(kernels):
    q, k, v = inputs(1, 40, 1, torch.float32)
    out = attend(kernels, q, k, v, eps=3.5)
    assert_close(out, reference.linear_attention(q, k, v, eps=3.5), 1e-5)
    assert not torch.allclose(out, reference.linear_attention(q, k, v), rtol=1e-3)
    (bits,) = plugin.launch_apply("fp32", 1, 40, 1, 1e-15, cdiv).arguments[2:]
    assert struct.unpack("<f", struct.pack("<i", bits))[0] == pytest.approx(1e-15)


def test_a_wrong_launch_is_noticed(kernels, monkeypatch):
    """The control: with one chunk fewer the result is another."""
    q, k, v = inputs(1, 300, 1, torch.float32)
    right = attend(kernels, q, k, v)
    real = plugin.launch_sum
    monkeypatch.setattr(plugin, "launch_sum", lambda B, H, chunks: real(B, H, chunks - 1))
    assert not torch.allclose(attend(kernels, q, k, v), right, rtol=1e-3)


def test_tensorrt_is_told_what_the_launches_are(kernels, monkeypatch):
    """`register` against a stand-in for tensorrt.plugin; what it is given there computes the op."""
    registered, implemented = {}, {}
    fake = types.ModuleType("fake_tensorrt.plugin")
    vars(fake).update(
        register=lambda name: lambda f: registered.setdefault(name, f),
        aot_impl=lambda name: lambda f: implemented.setdefault(name, f),
        TensorDesc=SimpleNamespace, SymInt32=int, SymIntExprs=SimpleNamespace(from_tuple=tuple),
        KernelLaunchParams=SimpleNamespace, cdiv=cdiv, max=max,
        from_shape_expr=lambda shape, dtype: SimpleNamespace(shape_expr=shape, dtype=dtype),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "fake_tensorrt.plugin", fake)
    monkeypatch.setattr(plugin, "ptx", lambda: b"ptx")
    api = types.ModuleType("fake_tensorrt")
    api.float32 = "float32"
    plugin.register(tensorrt_library.Library(api, "tensorrt"))
    assert (
        list(registered)
        == list(implemented)
        == [f"sana::linear_attention_{part}" for part in ("state", "sum", "apply")]
    )

    q, k, v = inputs(2, 300, 2, torch.bfloat16)
    describe = SimpleNamespace(shape_expr=q.shape, dtype=SimpleNamespace(name="BF16"))
    describe.like = lambda: describe
    states = registered["sana::linear_attention_state"](describe, describe)
    state = registered["sana::linear_attention_sum"](states)
    assert registered["sana::linear_attention_apply"](describe, state, 1e-15) is describe
    told = [
        implemented["sana::linear_attention_state"](describe, describe, (states,), 0),
        implemented["sana::linear_attention_sum"](states, (state,), 0),
        implemented["sana::linear_attention_apply"](describe, state, 1e-15, (describe,), 0),
    ]
    launches = [
        plugin.Launch(name.decode(), (at.grid_x, at.grid_y), at.block_x, at.shared_mem, arguments)
        for name, _, at, arguments in told
    ]
    with emulated.memory(1):
        q, k, v = map(emulated.guarded, (q, k, v))
        made = [emulated.guarded(torch.full(d.shape_expr, torch.nan)) for d in (states, state)]
        out = emulated.guarded(torch.full(q.shape, torch.nan, dtype=q.dtype))
        for launch, (given, result) in zip(
            launches, (((k, v), made[0]), ((made[0],), made[1]), ((q, made[1]), out)), strict=True
        ):
            run(kernels, launch, given, result)
        out = out.clone()
    assert_kernel(
        out, reference.linear_attention(q, k, v), reference.linear_attention(*(x.double() for x in (q, k, v)))
    )


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    return exported.graphs(tmp_path_factory, "small", precision="fp32", attention="plugin", only=("transformer",))


def test_every_node_of_the_graph_becomes_three(graphs):
    model = onnx.load(layout.graph_file(graphs, "transformer"), load_external_data=False)
    before = [node for node in model.graph.node if node.domain == "sana"]
    assert {node.op_type for node in before} == {"linear_attention"} and len(before) == 2  # a node per block
    others = [node.name for node in model.graph.node if node.domain != "sana"]
    plugin.split(model)
    ours = [node for node in model.graph.node if node.domain == "sana"]
    assert [node.op_type for node in ours] == [
        "linear_attention_state",
        "linear_attention_sum",
        "linear_attention_apply",
    ] * 2
    assert [node.name for node in model.graph.node if node.domain != "sana"] == others
    state, total, apply = ours[:3]
    assert [*state.input] == [*before[0].input][1:] and [*apply.output] == [*before[0].output]
    assert total.input[0] == state.output[0] and [*apply.input] == [before[0].input[0], total.output[0]]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in apply.attribute}
    assert (
        attributes["eps"] == pytest.approx(1e-15)
        and attributes["plugin_namespace"] == b"sana"
        and attributes["aot"] == 1
    )
    produced = {name for node in model.graph.node for name in node.output} | {i.name for i in model.graph.input}
    produced |= {i.name for i in model.graph.initializer} | {""}
    assert {name for node in model.graph.node for name in node.input} <= produced


def test_ptx_has_the_kernels_that_are_launched():
    try:
        text = plugin.ptx().decode()
    except MissingError as error:
        pytest.skip(str(error))
    launches = [plugin.launch_sum(1, 1, 1)]
    for dtype in DTYPES:
        launches += [plugin.launch_state(dtype, 1, 1, 1, cdiv, max), plugin.launch_apply(dtype, 1, 1, 1, 0.0, cdiv)]
    for launch in launches:
        assert f".entry {launch.kernel}(" in text
    assert text.count(".entry ") == len(launches)


def test_rtx_says_that_it_has_no_plugins(graphs, tmp_path):
    """The measured fact behind `--attention plain`: neither the module nor a network's methods for plugins are there."""
    from sana_export.build import build_engines

    libraries = [library for library in tensorrt_library.installed()[0] if library.name == "tensorrt-rtx"]
    if not libraries:
        pytest.skip("needs tensorrt-rtx")
    assert not [name for name in dir(libraries[0].api.INetworkDefinition) if "plugin" in name]
    with pytest.raises(UserError, match=r"tensorrt-rtx .* has no plugins; .* --attention plain"):
        build_engines(graphs, tmp_path, "sm89", only=("transformer",))
    assert not engines.built(tmp_path, "transformer")
