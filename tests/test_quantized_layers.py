"""Layers of quantised checkpoints: what is stored, to the letter, and how near what is executed comes to it."""

from dataclasses import replace

import pytest
import torch
from compare import relative_rms
from torch import nn
from variants import signed

import sana_kernels
from sana_bench.check import sqnr
from sana_kernels.gemm import Quantized
from sana_kernels.quant.formats import Int4, dequantize_int4, fake_quantize
from sana_kernels.quant.layer import QuantizedLayer, round_to_nearest
from sana_model.ops import ops_on
from sana_model.packed import (
    SPREAD,
    PackedLinear,
    dequantized,
    eight_bit_rows,
    is_plain,
    linear,
    pack_quantized_layers,
    rows_for,
    spread,
)
from sana_model.quantize.layers import SCHEMES, LowRank, QuantizedLinear, quantize_linear_layers

CPU = ops_on("cpu")
K, N, RANK = 1152 - 32, 160, 18  # K is no multiple of 64, and the rank none of 16


def heavy_tailed(*shape: int) -> torch.Tensor:
    """Student's t with 4 degrees of freedom, as the activations of trained models."""
    return torch.distributions.StudentT(4.0).sample(shape)


def stored(precision: str = "w4a4", smooth: bool = False, rank: int = 0, seed: int = 0) -> QuantizedLinear:
    """A layer as SVDQuant leaves it: the weight is a residual; smoothing and a branch of 16-bit factors are optional."""
    torch.manual_seed(seed)
    layer = round_to_nearest(torch.randn(N, K) * K**-0.5, *SCHEMES[precision])
    tensors = layer.tensors()
    if smooth:
        tensors["smooth"] = torch.rand(K) + 0.5
    if rank:
        tensors["down"] = (torch.randn(rank, K) * K**-0.5).bfloat16()
        tensors["up"] = torch.randn(N, rank).bfloat16()
    return QuantizedLinear(QuantizedLayer(layer.format, layer.activations, K, **tensors), torch.randn(N).bfloat16())


@pytest.mark.parametrize("precision", SCHEMES)
@pytest.mark.parametrize(("smooth", "rank"), [(False, 0), (True, RANK)])
def test_a_quantised_layer_computes_what_the_specification_says(precision, smooth, rank):
    layer, x = stored(precision, smooth, rank), signed(2, 5, K, dtype=torch.bfloat16)
    branch = layer.branch
    whole = replace(layer.stored, down=branch.down, up=branch.up) if branch else layer.stored
    assert relative_rms(layer.exact(x.float()), whole(x) + layer.bias.float()) < 1e-6
    gate, residual = torch.randn(2, N), torch.randn(2, 5, N)
    y = residual + gate[:, None] * nn.functional.silu(whole(x) + layer.bias.float())
    assert relative_rms(layer.exact(x.float(), True, gate, residual), y) < 1e-6
    assert relative_rms(stored(precision, smooth, rank, seed=1).exact(x.float()), whole(x)) > 0.5  # control


@pytest.mark.parametrize(
    ("precision", "width", "draw"),
    [
        ("w4a8", 2240, torch.randn), ("w4a8", 2240, heavy_tailed), ("w4a8", 5600, heavy_tailed),
        ("w4a4", 2240, torch.randn), ("w4a4", 5600, torch.randn), ("w4a4", 2240, heavy_tailed),
        # Rows of 5600 heavy-tailed activations lose 33 dB in int8 by themselves, whatever they meet.
    ],
)  # fmt: skip
def test_executed_products_are_within_33_db_of_exact_ones(precision, width, draw):
    """On the same operands, which for W4A4 are the dequantised ones: int8 rows of them, beside int8 rows of the weight."""
    layer, x = (
        QuantizedLinear(round_to_nearest(torch.randn(256, width), *SCHEMES[precision]), None),
        draw(1, 128, width),
    )
    exact = layer.exact(x)
    if precision == "w4a4":
        x = fake_quantize(x, "int4")
    assert sqnr(PackedLinear.executing(layer, "w8a8", "cpu", "cpu")(x), exact) >= 33
    scale = layer.stored.scale
    one = scale.mean(1, keepdim=True).expand_as(scale).contiguous()  # control: one scale for all groups of a row
    other = QuantizedLinear(replace(layer.stored, scale=one), None)
    assert sqnr(PackedLinear.executing(other, "w8a8", "cpu", "cpu")(x), exact) < 33


def uneven(bad: list[int], factor: float) -> QuantizedLinear:
    """Rows whose third group has weights so much larger than the others; they meet small activations (`faint`)."""
    weight = torch.randn(N, K)
    weight[bad, 128:192] *= factor
    return QuantizedLinear(round_to_nearest(weight, *SCHEMES["w4a8"]), None)


def faint(x: torch.Tensor, factor: float) -> torch.Tensor:
    x[..., 128:192] /= factor
    return x


def test_rows_of_uneven_groups_get_a_second_row():
    bad, factor = [3, 77, 78, 159], 40.0
    layer, x = uneven(bad, factor), faint(torch.randn(1, 64, K), factor)
    assert (spread(layer.stored) > SPREAD).nonzero().flatten().tolist() == bad
    first, (indices, rest) = eight_bit_rows(layer.stored)
    assert indices.tolist() == bad and rest.values.shape == (16, first.values.shape[1])
    rows = first.values[bad].double() * first.scale[bad, None].double()
    exact = layer.stored.dequantized()[bad]
    assert sqnr(rows[:, :K], exact) < 45 < 75 < sqnr(rows[:, :K] + (rest.values * rest.scale[:, None])[:4, :K], exact)

    executed = PackedLinear.executing(layer, "w8a8", "cpu", "cpu")
    wanted, gate, residual = layer.exact(x), torch.randn(1, N), torch.randn(1, 64, N)
    assert sqnr(executed(x)[..., bad], wanted[..., bad]) >= 33 and sqnr(executed(x), wanted) >= 33
    y = linear(CPU, x, executed, gate=gate, residual=residual)
    assert sqnr((y - residual)[..., bad], (gate * wanted)[..., bad]) >= 33
    y = linear(CPU, x, executed, silu=True)
    assert sqnr(y[..., bad], nn.functional.silu(wanted)[..., bad]) >= 30
    plain = PackedLinear(first, None, K, "cpu")
    assert sqnr(plain(x)[..., bad], wanted[..., bad]) < 25  # control: one row of int8 is not enough for these


def test_padding_rows_and_groups_of_zeros_have_no_spread():
    weight = torch.randn(16, 256)
    weight[3], weight[5, 64:] = 0, 0
    assert spread(round_to_nearest(weight, "int4", "int8"))[[3, 5]].tolist() == [1, 1]
    assert spread(round_to_nearest(weight, "int8", "int8")).tolist() == [1.0] * 16
    nvfp4 = round_to_nearest(weight, "nvfp4", "16bit")
    first, _ = eight_bit_rows(nvfp4)
    assert sqnr(first.values[6] * first.scale[6], nvfp4.dequantized()[6]) > 35


@pytest.mark.parametrize("epilogue", ["none", "residual", "gate", "silu", "gate and silu"])
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_smoothing_and_branch_beside_the_product(backend, smooth, epilogue):
    """Against the layer as it is stored, whose weights and activations are W8A8, so that nothing but rounding differs."""
    layer = stored("w8a8", smooth, RANK)
    x, given = signed(2, 33, K, dtype=torch.bfloat16), {}
    if epilogue in ("residual", "gate", "gate and silu"):
        given["residual"] = torch.randn(2, 33, N).bfloat16()
    if "gate" in epilogue:
        given["gate"] = torch.randn(2, N)
    given["silu"] = "silu" in epilogue
    executed = PackedLinear.executing(layer, "w8a8", backend, backend)
    found = linear(ops_on(backend), x, executed, **given)
    wanted = layer.exact(x.float(), **given | {"residual": given.get("residual", torch.zeros(())).float()})
    assert found.dtype == torch.bfloat16 and relative_rms(found, wanted) < 1e-2
    executed.branch = None
    assert relative_rms(linear(ops_on(backend), x, executed, **given), wanted) > 0.1  # control


@pytest.mark.parametrize("branch", [True, False])
def test_int4_kernels_are_given_what_is_stored(branch):
    """Through the ops that multiply 4-bit values, in the reference's arithmetic."""
    x = signed(1, 9, K, dtype=torch.bfloat16)
    for precision in ("w4a4", "w4a16"):
        layer = stored(precision, precision == "w4a4", RANK * branch)
        executed = PackedLinear.executing(layer, precision, "reference", "reference")
        assert isinstance(executed.weight, Int4) and not is_plain(executed) and rows_for(executed) is None
        assert torch.equal(dequantize_int4(executed.weight)[:, :K], layer.stored.dequantized())
        assert relative_rms(executed(x), layer.exact(x.float())) < 1e-2
        y = linear(ops_on("reference"), x, executed, silu=True)  # after the branch is added
        assert relative_rms(y, layer.exact(x.float(), silu=True)) < 1e-2


def test_sixteen_bit_execution_of_weights_that_no_kernel_multiplies():
    layer, x = stored("w4a16", smooth=True, rank=RANK), signed(1, 9, K, dtype=torch.bfloat16)
    made = dequantized(layer)
    assert made.weight.dtype == torch.bfloat16
    assert relative_rms(linear(ops_on("reference"), x, made), layer.exact(x.float())) < 1e-2


def test_which_layers_are_plain():
    """Fused ops take those only, and quantise for those only."""
    plain = PackedLinear.executing(stored("w4a8"), "w8a8", "cpu", "cpu")
    assert is_plain(plain) and rows_for(plain) == torch.int8
    x = signed(1, 4, K, dtype=torch.bfloat16)
    quantised = linear(CPU, sana_kernels.quantize(x, backend="cpu"), plain)
    assert torch.equal(quantised, linear(CPU, x, plain))
    for layer in (stored(), PackedLinear.executing(stored(rank=2), "w8a8", "cpu", "cpu")):
        assert not is_plain(layer) and rows_for(layer) is None
    assert is_plain(nn.Linear(4, 4)) and rows_for(nn.Linear(4, 4)) is None


@pytest.mark.parametrize("rank", [1, 32, 70])
def test_a_branch_packed_for_the_cpu_is_the_same_branch(rank):
    branch = LowRank(torch.randn(rank, K).bfloat16(), torch.randn(N, rank).bfloat16())
    packed, x = branch.packed("cpu"), signed(1, 7, K, dtype=torch.bfloat16)
    assert packed.down.ndim == 3 and packed.up.ndim == 3
    y = CPU.gemm(CPU.gemm(x, packed.down), packed.up)
    assert relative_rms(y, branch(x)) < 1e-2


def test_a_module_is_quantised_and_then_executed():
    module = nn.ModuleDict({"q": nn.Linear(K, N), "kv": nn.Linear(K, N), "norm": nn.LayerNorm(K)}).bfloat16()
    quantize_linear_layers(module, "w4a4")
    assert isinstance(module["q"], QuantizedLinear) and isinstance(module["kv"], nn.Linear)
    assert module["q"].stored.activations == "int4" and module["q"].stored.group == 64
    module.to(torch.float16)
    assert module["q"].bias.dtype == torch.bfloat16 and module["q"].stored.scale.dtype == torch.bfloat16
    pack_quantized_layers(module, lambda layer: ("w8a8", "cpu"), "cpu")
    assert isinstance(module["q"].weight, Quantized) and module["q"].bias.dtype == torch.float32
