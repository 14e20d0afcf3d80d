"""Files of quantised networks: what is saved is loaded, and every kind of damage is one sentence."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from variants import signed

from sana_kernels.quant import checkpoint
from sana_kernels.quant.checkpoint import CheckpointError, Header, LayerInfo, load, parts, save
from sana_kernels.quant.layer import QuantizedLayer, round_to_nearest

N, K = 48, 200
FORMATS = {"a": ("int8", "int8"), "b": ("fp8", "fp8"), "c": ("int4", "int4"), "d": ("nvfp4", "16bit")}
SHAPES = {f"blocks.0.{name}.weight": (N, K) for name in FORMATS} | {"blocks.0.a.bias": (N,), "norm": (K,)}


def network() -> tuple[dict[str, QuantizedLayer], dict[str, torch.Tensor]]:
    """Layers of every format, one with everything, and the tensors of the whole file."""
    layers = {f"blocks.0.{name}": round_to_nearest(signed(N, K), *pair) for name, pair in FORMATS.items()}
    branch = {"down": signed(8, K).bfloat16(), "up": signed(N, 8).bfloat16()}
    layers["blocks.0.c"] = replace(layers["blocks.0.c"], smooth=0.5 + torch.rand(K), **branch)
    tensors = {"blocks.0.a.bias": signed(N).bfloat16(), "norm": signed(K).bfloat16()}
    for name, layer in layers.items():
        tensors |= parts(name, layer)
    return layers, tensors


def write(file, layers, tensors, **header):
    values = {
        "part": "dit",
        "model": "m",
        "precision": "w4a4",
        "method": "svdquant",
        "source": "0",
        "calibration": None,
    }
    infos = {name: LayerInfo.of(layer, 20.5) for name, layer in layers.items()}
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    save(file, Header(**values | {"layers": infos} | header), shapes, tensors.__getitem__)


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "q.safetensors", *network())
    return tmp_path / "q.safetensors"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


def test_what_is_saved_is_loaded(tmp_path):
    layers, tensors = network()
    write(tmp_path / "q.safetensors", layers, tensors)
    found = load(tmp_path / "q.safetensors", "dit", SHAPES)
    assert found.header.method == "svdquant" and found.header.layers["blocks.0.c"].sqnr_db == 20.5
    assert sorted(found.plain) == ["blocks.0.a.bias", "norm"]
    for name, value in found:
        expected = tensors if isinstance(value, torch.Tensor) else layers[name].tensors()
        for field, tensor in ({name: value} if isinstance(value, torch.Tensor) else value.tensors()).items():
            assert same(tensor, expected[field])
    x = signed(5, K)
    assert torch.equal(found.layer("blocks.0.c")(x), layers["blocks.0.c"](x))


def test_others_read_the_file(file):
    """safetensors itself, which also checks that no byte is left over and none read twice; tensors are aligned."""
    assert len(load_file(file)) == len(network()[1])
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and json.loads(header["__metadata__"][checkpoint.KEY])["version"] == 1
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % checkpoint.DTYPES[entry["dtype"]].itemsize == 0


def test_the_same_bytes_every_time(tmp_path):
    layers, tensors = network()
    write(tmp_path / "a", layers, tensors)
    write(tmp_path / "b", layers, dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def rewritten(file, change):
    """The file with another JSON object in its metadata, and else the same bytes."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    ours = json.loads(header["__metadata__"][checkpoint.KEY])
    header["__metadata__"][checkpoint.KEY] = change(ours)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def changed(key, value, layer=None):
    def change(header):
        (header["layers"][layer] if layer else header)[key] = value
        return json.dumps(header)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: "{", "damaged header"),
        (lambda header: "[]", "damaged header"),
        (lambda header: json.dumps(header | {"extra": 1}), "damaged header"),
        (changed("version", 2), "version 2, supported is 1"),
        (changed("precision", "w2a2"), "damaged header"),
        (changed("part", "text_encoder"), "where a dit is expected"),
        (changed("layers", None), "damaged header"),
        (changed("format", "int3", "blocks.0.a"), "damaged header.*int3"),
        (changed("group", 7, "blocks.0.c"), "damaged header.*groups of 7"),
        (changed("padded", K, "blocks.0.a"), "damaged header.*padded 200"),
        (changed("shape", [N, K + 8], "blocks.0.a"), "another model"),
        (changed("rank", 16, "blocks.0.c"), "blocks.0.c.down is .*expected"),
        (changed("smooth", False, "blocks.0.c"), "blocks.0.c.smooth is not part"),
        (changed("format", "fp8", "blocks.0.a"), "blocks.0.a.values is torch.int8"),
    ],
)
def test_wrong_headers(file, change, message):
    rewritten(file, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load(file, "dit", SHAPES)
    assert str(file) in str(error.value)


def test_files_of_another_kind(file, tmp_path):
    with safe_open(file, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no quantised checkpoint"):
        load(tmp_path / "plain", "dit", SHAPES)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        load(file, "dit", SHAPES)
    with pytest.raises(CheckpointError, match="damaged or no safetensors"):
        load(tmp_path / "nowhere", "dit", SHAPES)


@pytest.mark.parametrize("lost", ["blocks.0.a.scale", "blocks.0.c.up", "norm", "blocks.0.a.bias"])
def test_missing_tensors(tmp_path, lost):
    layers, tensors = network()
    del tensors[lost]
    write(tmp_path / "q", layers, tensors)
    with pytest.raises(CheckpointError, match=f"{lost} is missing"):
        load(tmp_path / "q", "dit", SHAPES)


def test_another_networks_file(file):
    for shapes, message in (
        (SHAPES | {"blocks.0.a.weight": (N, K + 64)}, "another model: its blocks.0.a"),
        ({name: shape for name, shape in SHAPES.items() if name != "blocks.0.d.weight"}, "has no such layer"),
        (SHAPES | {"head": (3,)}, "head is missing"),
        ({name: shape for name, shape in SHAPES.items() if name != "norm"}, "norm is not part of this model"),
        (SHAPES | {"norm": (K + 1,)}, r"norm is torch.bfloat16 \(200,\), expected .*\(201,\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(file, "dit", shapes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks.0.a.scale", float("nan"), "holds NaN"),
        ("blocks.0.c.down", float("inf"), "holds NaN or infinite"),
        ("blocks.0.c.smooth", -1.0, "not positive"),
        ("blocks.0.a.scale", -1.0, "negative"),
    ],
)
def test_wrong_values(tmp_path, monkeypatch, name, value, message):
    layers, tensors = network()
    tensors[name].view(-1)[3] = value
    with monkeypatch.context() as patch:  # a good writer refuses NaN
        patch.setattr(checkpoint, "_finite", lambda tensor, what: tensor)
        write(tmp_path / "q", layers, tensors)
    found = load(tmp_path / "q", "dit", SHAPES)
    with pytest.raises(CheckpointError, match=message):
        found.layer(name.rpartition(".")[0])


def test_nothing_wrong_is_written(tmp_path):
    layers, tensors = network()
    tensors["norm"][0] = float("nan")
    with pytest.raises(CheckpointError, match="norm of the model to be written holds NaN"):
        write(tmp_path / "q", layers, tensors)
    shapes = {"norm": (torch.bfloat16, (K + 1,))}
    with pytest.raises(ValueError, match="announced as"):
        save(tmp_path / "q", Header("dit", "m", "w8a8", "rtn", "0", None, {}), shapes, lambda name: torch.ones(K))
