"""Formats of quantised weights beside code that others wrote, what each product loses, and layers made of them."""

import numpy as np
import pytest
import torch
from test_int4 import sqnr, student
from variants import signed

from sana_kernels.gemm.reference import dequantize, quantize
from sana_kernels.quant import formats
from sana_kernels.quant.layer import QuantizedLayer, round_to_nearest

BF16, FP32 = torch.bfloat16, torch.float32


def test_nvfp4_by_hand():
    x = torch.zeros(1, 16)
    x[0, :12] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.3, -5.1, 0.2, -1.0])
    values, scale, tensor_scale = formats.quantize_nvfp4(x)
    assert tensor_scale == torch.tensor(6.0) / 2688 and scale.shape == (1, 4) and values.shape == (1, 32)
    assert scale[0].tolist() == [448.0, 0, 0, 0]  # 6 is the largest code at scale 1; the rest is padding
    ties_to_even = [6, 0, 1, 1, 2, 2, 4, 4, -0.5, -6, 0, -1]
    assert formats.dequantize_nvfp4(formats.Nvfp4(values, scale, tensor_scale))[0, :12].tolist() == pytest.approx(
        ties_to_even, rel=1e-6
    )


@pytest.mark.parametrize("shape", [(3, 64), (5, 200), (2, 1120)], ids=str)
def test_nvfp4_as_ml_dtypes_rounds_it(shape):
    """Scales rounded to e4m3 and values to e2m1 by the conversions of ml_dtypes, to the bit."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = signed(*shape)
    x[0, :16] = 0
    values, scale, tensor_scale = formats.quantize_nvfp4(x)
    groups = np.zeros((shape[0], -(-shape[1] // 64) * 64), np.float32)
    groups[:, : shape[1]] = x.numpy()
    groups = groups.reshape(shape[0], -1, 16)
    largest = np.abs(groups).max(-1)
    factor = largest.max() / np.float32(6 * 448)
    theirs = np.minimum(largest / np.float32(6) / factor, np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
    assert tensor_scale.item() == factor
    assert np.array_equal(scale.view(torch.uint8).numpy(), theirs.view(np.uint8))
    step = (theirs.astype(np.float32) * factor)[..., None]
    with np.errstate(divide="ignore"):
        codes = (groups * np.where(step == 0, np.float32(0), np.float32(1) / step)).astype(ml_dtypes.float4_e2m1fn)
    nibbles = codes.view(np.uint8).reshape(shape[0], -1, 2) & 15
    assert np.array_equal(values.numpy(), nibbles[..., 0] | nibbles[..., 1] << 4)


def test_zeros_are_zeros():
    for format in formats.WEIGHTS:
        assert not round_to_nearest(torch.zeros(3, 70), format, "16bit").dequantized().any()


FLOORS = {  # (weights, activations): dB on Gaussian and on Student's t inputs, less one
    ("int8", "int8"): (37.6, 31.5),
    ("fp8", "fp8"): (27.6, 27.6),
    ("int4", "16bit"): (18.4, 18.4),
    ("int4", "int8"): (18.3, 18.2),
    ("int4", "int4"): (15.3, 13.3),
    ("nvfp4", "16bit"): (19.4, 19.4),
}


@pytest.mark.parametrize("inputs", ["gaussian", "heavy"])
@pytest.mark.parametrize("pair", FLOORS, ids=lambda pair: "x".join(pair))
def test_what_a_layer_loses(pair, inputs):
    """512 × 2240 × 512 random values beside fp64. The ceiling is the control: a format is no better than it can be."""
    x = torch.randn(512, 2240) if inputs == "gaussian" else student(512, 2240)
    weight = torch.randn(512, 2240)
    found = sqnr(round_to_nearest(weight, *pair, scale_dtype=FP32)(x), x.double() @ weight.double().t())
    floor = FLOORS[pair][inputs == "heavy"]
    assert floor < found < floor + 4


def test_scales_in_bfloat16_cost_little():
    x, weight = torch.randn(256, 1152), torch.randn(256, 1152)
    exact = x.double() @ weight.double().t()
    fine, coarse = (sqnr(round_to_nearest(weight, "int4", "16bit", scale_dtype=d)(x), exact) for d in (FP32, BF16))
    assert fine - 0.1 < coarse < fine + 0.1


def branched(N: int, K: int, rank: int) -> tuple[QuantizedLayer, torch.Tensor, torch.Tensor, torch.Tensor]:
    smooth, down, up = 0.5 + torch.rand(K), signed(rank, K).to(BF16) / 8, signed(N, rank).to(BF16) / 8
    plain = round_to_nearest(signed(N, K) / 8, "int4", "int4")
    return QuantizedLayer("int4", "int4", K, plain.values, plain.scale, None, smooth, down, up), smooth, down, up


def test_a_layer_with_everything_in_fp64():
    layer, smooth, down, up = branched(96, 1008, 8)
    x = signed(17, 1008)
    y = layer(x)
    rows = formats.dequantize_int4(formats.quantize_int4(x, smooth))[:, :1008]
    low = (x.double() @ down.double().t()).to(BF16).double()
    oracle = rows @ layer.dequantized().t() + low @ up.double().t()
    assert sqnr(y, oracle) > 60  # low is rounded to bf16 from fp32 sums, in which a tie may fall the other way
    assert sqnr(y, rows @ layer.dequantized().t()) < 30  # the control: without its branch, another layer
    exact = (layer.dequantized() / smooth.double() + up.double() @ down.double()).float()
    assert torch.allclose(layer.effective(), exact, rtol=1e-4, atol=1e-5)


def test_what_a_layer_says_of_itself():
    layer, *_ = branched(96, 1008, 8)
    assert (layer.outputs, layer.inputs, layer.padded, layer.group, layer.rank) == (96, 1008, 1024, 64, 8)
    stored = 96 * 512 + 2 * 96 * 16 + 4 * 1008 + 2 * 8 * (1008 + 96)
    assert layer.bytes == stored and layer.bits == 8 * stored / (96 * 1008)
    assert round_to_nearest(torch.randn(8, 5600), "int4", "int4").padded == 5632
    assert round_to_nearest(torch.randn(8, 2240), "int8", "int8").padded == 2240
    assert round_to_nearest(torch.randn(8, 2240), "int4", "16bit", group=128).padded == 2304
    with pytest.raises(ValueError, match="multiple of 64"):
        round_to_nearest(torch.randn(8, 64), "int4", "int4", group=32)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_padding_changes_nothing(format):
    """5600 → 5632, in each half of a GLU: zero rows and columns neither change nor see the others."""
    weight, x = signed(64, 5600), signed(9, 5600)
    padded = torch.zeros(2, 48, 5632)
    padded[:, :32, :5600] = weight.view(2, 32, 5600)
    plain, wide = (round_to_nearest(w, format, format) for w in (weight, padded.flatten(0, 1)))
    y = wide(torch.nn.functional.pad(x, (0, 32))).unflatten(1, (2, 48))
    assert torch.equal(y[:, :, :32].flatten(1), plain(x)) and not y[:, :, 32:].any()
    assert torch.equal(wide.values.unflatten(0, (2, 48))[:, :32].flatten(0, 1), plain.values)


def test_fake_quantize_is_what_the_rows_stand_for():
    x = signed(7, 1000)
    for activations, exact in (
        ("int8", dequantize(*quantize(x))[:, :1000]),
        ("fp8", dequantize(*quantize(x, torch.float8_e4m3fn))[:, :1000]),
        ("int4", formats.dequantize_int4(formats.quantize_int4(x))[:, :1000]),
    ):
        assert torch.allclose(formats.fake_quantize(x, activations), exact.float(), rtol=1e-6)
    assert torch.equal(formats.fake_quantize(x.to(BF16), "16bit"), x.to(BF16).float())
