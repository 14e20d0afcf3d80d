"""depthwise_glu and mix_ffn in Triton against fp64, and the mistakes that this comparison catches."""

from dataclasses import dataclass

import pytest
import torch
from compare import assert_kernel, relative_rms
from interpreted import DEVICE, chain_of, defective, on_gpu, on_guarded
from variants import DTYPES, double, signed

from sana_kernels.gemm.reference import MOST, dequantize, quantize
from sana_kernels.mix_ffn import reference, taps_first, triton


@dataclass(frozen=True)
class Case:
    B: int
    height: int
    width: int
    F: int
    taps_first: bool = False

    def make(self, dtype: torch.dtype) -> tuple:
        h = signed(self.B, self.height * self.width, 2 * self.F, dtype=dtype)
        weight, bias = torch.randn(2 * self.F, 1, 3, 3) / 3, torch.randn(2 * self.F)
        weight = weight.to(DEVICE, dtype)
        return (
            h.to(DEVICE), self.height, self.width, taps_first(weight) if self.taps_first else weight,
            bias.to(DEVICE, dtype),
        )  # fmt: skip


CASES = [
    Case(2, 7, 5, 70),
    Case(1, 3, 23, 64, taps_first=True),
    Case(3, 26, 1, 40),
]


def check(module, case, dtype):
    args = case.make(dtype)
    u = on_guarded(module.depthwise_glu, *args)
    assert u.is_contiguous()
    assert_kernel(u, reference.depthwise_glu(*args), reference.depthwise_glu(*double(*args)), str(case))


def check_quantized(module, case, dtype, eight_bits):
    """Scales within a few ulp; values equal, but for those so near a rounding boundary that the order of sums counts."""
    args = case.make(dtype)
    values, scale = on_guarded(module.depthwise_glu_quantized, *args, eight_bits)
    expected, expected_scale = reference.depthwise_glu_quantized(*args, eight_bits)
    assert values.shape == expected.shape and values.dtype == eight_bits
    torch.testing.assert_close(scale, expected_scale, rtol=3e-6, atol=0)
    error = (values.float() - expected.float()).abs()
    step = 1 if eight_bits == torch.int8 else torch.finfo(eight_bits).eps * expected.float().abs().clamp_min(2**-6)
    assert bool((error <= step).all()), "a value is more than one step off"
    assert (error > 0).float().mean() <= 2e-3
    assert not values[..., case.F :].float().any(), "padding must be zero"


@on_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise_glu_against_fp64(dtype, case):
    check(triton, case, dtype)


@on_gpu
def test_widths_of_the_models():
    check(triton, Case(1, 1, 2, 2880, taps_first=True), torch.bfloat16)
    check_quantized(triton, Case(1, 1, 2, 5600, taps_first=True), torch.bfloat16, torch.int8)


@on_gpu
@pytest.mark.parametrize(("dtype", "eight_bits"), zip((torch.float32, torch.bfloat16), MOST, strict=True), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantized_rows(eight_bits, dtype, case):
    check_quantized(triton, case, dtype, eight_bits)


@on_gpu
def test_taps_first_is_another_layout_of_the_same_weight():
    weight = torch.randn(20, 1, 3, 3)
    stored = taps_first(weight)
    assert torch.equal(stored, weight) and stored.stride(0) == 1


def ffn_arguments(B, height, width, C, F, dtype, eight_bits=None, gated=False):
    x = signed(B, height * width, C, dtype=dtype).to(DEVICE)
    expand, project = torch.randn(2 * F, C) * C**-0.5, torch.randn(C, F) * F**-0.5
    bias, depthwise, depthwise_bias = torch.randn(2 * F), torch.randn(2 * F, 1, 3, 3) / 3, torch.randn(2 * F)
    frame = (torch.randn(B, C).to(DEVICE, dtype), signed(B, height * width, C, dtype=dtype).to(DEVICE))
    bias, depthwise, depthwise_bias = (t.to(DEVICE, dtype) for t in (bias, depthwise, depthwise_bias))
    matrices = [
        (m.to(DEVICE, dtype), None) if eight_bits is None else quantize(m.to(DEVICE), eight_bits)
        for m in (expand, project)
    ]
    x = (x, None) if eight_bits is None else quantize(x, eight_bits)
    return (
        *x,
        height,
        width,
        *matrices[0],
        bias,
        depthwise,
        depthwise_bias,
        *matrices[1],
        *(frame if gated else (None,) * 2),
    )


@on_gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mix_ffn_against_fp64(dtype, gated):
    args = ffn_arguments(2, 5, 3, 70, 96, dtype, gated=gated)
    y = on_guarded(triton.mix_ffn, *args)
    chain = chain_of(70 + 96, dtype)  # both products
    assert_kernel(y, reference.mix_ffn(*args), reference.mix_ffn(*double(*args)), chain=chain)


@on_gpu
@pytest.mark.parametrize("eight_bits", MOST, ids=str)
def test_mix_ffn_of_eight_bits(eight_bits):
    """u is quantised in between: from an oracle of higher precision the reference differs by a step here and there, too."""
    args = ffn_arguments(2, 5, 3, 70, 96, torch.bfloat16, eight_bits, gated=True)
    y, expected = on_guarded(triton.mix_ffn, *args), reference.mix_ffn(*args)
    x, x_scale, height, width, expand, expand_scale, *middle, project, project_scale, gate, residual = args
    wide = (dequantize(x, x_scale)[..., :70], None, height, width, dequantize(expand, expand_scale)[:, :70], None,
            *double(*middle), dequantize(project, project_scale)[:, :96], None, *double(gate, residual))  # fmt: skip
    oracle = reference.mix_ffn(*wide)
    assert y.dtype == expected.dtype
    assert relative_rms(y, oracle) <= 1.25 * relative_rms(expected, oracle)


DEFECTS = {
    "halo: a row too many": ("(row + down < height)", "(row + down <= height)"),
    "halo: the left edge is not masked": ("(column + right >= 0) & ", ""),
    "halo: rows as wide as they are high": ("row, column = t // width, t % width", "row, column = t // height, t % height"),
    "halo: the wrong neighbour": ("(t + down * width + right)", "(t + down * width - right)"),
    "taps transposed": ("3 * (down + 1) + right + 1", "3 * (right + 1) + down + 1"),
    "one tap left out": ("static_range(-1, 2)", "static_range(-1, 1)"),
    "value and gate swapped": ("a * silu(g)", "g * silu(a)"),
    "the gate's bias is the value's": ("bias_ptr + F + f", "bias_ptr + f"),
    "the gate's weight is the value's": ("weight_at + F * weight_channel", "weight_at"),
    "channels beyond F": ("mask = inside[:, None] & (f < F)", "mask = inside[:, None] & (f < 2 * F)"),
    "tokens beyond the last": ("mask=(t < N)[:, None] & (f < pitch)", "mask=(t <= N)[:, None] & (f < pitch)"),
    "the scale of another token": ("out_scale_ptr + image * N + t", "out_scale_ptr + t"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(tmp_path, defect):
    module = defective(triton, tmp_path, DEFECTS[defect])
    with pytest.raises(AssertionError):
        check(module, Case(2, 7, 5, 70), torch.float32)
        check_quantized(module, Case(2, 7, 5, 70), torch.float32, torch.int8)


def test_the_case_of_the_defects_passes_without_one():
    check(triton, Case(2, 7, 5, 70), torch.float32)
    check_quantized(triton, Case(2, 7, 5, 70), torch.float32, torch.int8)
