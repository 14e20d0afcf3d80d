"""Packed and quantised linear layers: what they compute, which there are, and that loading makes them block by block."""

import pytest
import torch
from compare import relative_rms
from torch import nn
from variants import signed

import sana_model
from sana_kernels.gemm import Quantized, pack, unpack
from sana_model.errors import UserError
from sana_model.packed import PackedLinear, pack_linear_layers, unpack_linear_layers
from sana_model.pipeline import Pipeline


def linear(inputs: int = 96, outputs: int = 80, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias).bfloat16().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_packing_is_undone_to_the_bit(dtype):
    weight = torch.randn(48, 128).mul(20).to(dtype)
    packed = pack(weight)
    n = 4 // dtype.itemsize
    assert packed.shape == (3, 128 // n, 16 * n)
    assert packed[1, 2, 3 * n + 1] == weight[16 + 3, 2 * n + 1]
    assert torch.equal(unpack(packed), weight)
    odd = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape)  # as in a buffer of several tensors
    for same in (odd, weight.t().contiguous().t()):
        assert torch.equal(pack(same), packed)


@pytest.mark.parametrize(("quantized", "limit"), [(None, 5e-3), (torch.int8, 2e-2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_computes_what_the_layer_computes(quantized, limit, bias):
    layer, x = linear(bias=bias), signed(2, 3, 5, 96, dtype=torch.bfloat16)
    packed = PackedLinear.of(layer, quantized, "cpu")
    exact = nn.functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    y = packed(x)
    assert y.shape == exact.shape and y.dtype == torch.bfloat16
    assert relative_rms(y, exact) < limit
    other = PackedLinear.of(linear(bias=bias), quantized, "cpu")
    assert relative_rms(other(x), exact) > 0.5


def test_which_layers_are_packed():
    block = nn.ModuleDict({"q": linear(), "kv": linear(), "odd": linear(96, 24), "narrow": linear(40, 32)})
    block["inner"] = nn.Sequential(linear(64, 32), nn.LayerNorm(32))
    pack_linear_layers(block, torch.int8, lambda name: "cpu")
    kinds = {name: layer.weight for name, layer in block.named_modules() if isinstance(layer, nn.Linear | PackedLinear)}
    eight_bit = {name for name, weight in kinds.items() if isinstance(weight, Quantized)}
    assert eight_bit == {"q", "narrow", "inner.0"}  # keys and values stay in 16 bits, and 24 columns are no panel
    assert isinstance(block["odd"], nn.Linear) and isinstance(block["kv"], PackedLinear)

    block = nn.ModuleDict({"q": linear(), "narrow": linear(40, 32)})
    weight = block["q"].weight
    pack_linear_layers(block, torch.bfloat16, lambda name: "cpu")
    assert isinstance(block["q"], PackedLinear) and isinstance(block["narrow"], nn.Linear)  # rows of 80 bytes
    unpack_linear_layers(block)
    assert torch.equal(block["q"].weight, weight)


def weights(pipe: Pipeline) -> dict[str, torch.Tensor]:
    return dict(pipe.dit.named_buffers()) | dict(pipe.dit.named_parameters())


def test_loading_quantises_block_by_block(saved):
    """The same bytes as quantising a model that was loaded whole; a file and the model it was saved from agree."""
    loaded = weights(sana_model.load(str(saved), precision="w8a8", backend="cpu"))
    whole = sana_model.load(str(saved), precision="bf16", backend="reference")
    for block in whole.dit.blocks:
        pack_linear_layers(block, torch.int8, lambda name: "cpu")
    expected = weights(whole)
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(loaded[name], value), name
    assert "blocks.1.mix_ffn.expand.scale" in loaded and loaded["blocks.1.mix_ffn.expand.values"].dtype == torch.int8
    assert loaded["blocks.1.cross_attention.kv.values"].dtype == torch.bfloat16 == loaded["head.weight"].dtype


def test_a_picture_in_w8a8(saved):
    """On our kernels and in plain PyTorch, which rounds elsewhere; the error is that of 8 bits, larger than that of bf16."""
    arguments = {"prompt": "a fox", "steps": 2, "width": 96, "height": 64}
    latents = {}
    for name, precision, backend in (
        ("fp32", "fp32", "reference"), ("bf16", "bf16", "cpu"), ("w8a8", "w8a8", "cpu"), ("plain", "w8a8", "reference"),
    ):  # fmt: skip
        pipe = sana_model.load(str(saved), precision=precision, backend=backend, text_precision="fp32")
        latents[name] = pipe(**arguments).latents
    assert relative_rms(latents["bf16"], latents["fp32"]) < relative_rms(latents["w8a8"], latents["fp32"]) < 0.2
    assert 0 < relative_rms(latents["w8a8"], latents["plain"]) < 0.05


def test_the_text_encoder_in_w8a8(saved):
    states = {}
    for precision in ("fp32", "w8a8"):
        pipe = sana_model.load(str(saved), precision="fp32", text_precision=precision, backend="cpu")
        states[precision] = pipe.encode(pipe.settings("a fox in the snow"))[1].states
        assert f"text_encoder  gemm              {'cpu' if precision == 'w8a8' else 'library'}" in str(pipe.plan)
    assert 0 < relative_rms(states["w8a8"], states["fp32"]) < 0.1


def test_same_bytes_on_one_and_two_threads(saved):
    pipe = sana_model.load(str(saved), precision="w8a8", backend="cpu")
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(pipe("a fox", steps=2, width=64, height=96).latents)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


def test_the_decoder_has_no_four_bit_form():
    with pytest.raises(UserError, match="'w4a4' is not known for the autoencoder; choose one of fp32, bf16, fp16"):
        sana_model.load("sana-tiny-random", decoder_precision="w4a4")
