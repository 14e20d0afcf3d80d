"""modulate, modulate_quantized and gate_residual in Triton against fp64, and the mistakes that this comparison catches."""

import pytest
import torch
from compare import assert_kernel
from interpreted import DEVICE, defective, on_gpu, on_guarded
from test_modulate import Case
from variants import DTYPES, double

from sana_kernels.gemm.reference import MOST
from sana_kernels.modulate import reference, triton

CASES = [
    Case(1, 1, 2240),
    Case(2, 5, 1152),
    Case(2, 7, 250, "float", padded=True),
    Case(1, 23, 8),
]


def check_modulate(module, case, dtype):
    x, y, table = case.make(dtype, DEVICE)
    args = x, table[:, 3], table[:, 1], 1e-6
    out = on_guarded(module.modulate, *args)
    assert out.is_contiguous()
    assert_kernel(out, reference.modulate(*args), reference.modulate(*double(*args)), f"modulate {case}")
    args = x, y, table[:, 5]
    out = on_guarded(module.gate_residual, *args)
    assert out.is_contiguous()
    assert_kernel(out, reference.gate_residual(*args), reference.gate_residual(*double(*args)), f"gate {case}")


def check_quantized(module, case, dtype, eight_bits):
    """Scales within a few ulp; values equal, but for those so near a rounding boundary that the order of sums counts."""
    x, _, table = case.make(dtype, DEVICE)
    args = x, table[:, 3], table[:, 1], 1e-6, eight_bits
    values, scale = on_guarded(module.modulate_quantized, *args)
    expected, expected_scale = reference.modulate_quantized(*args)
    assert values.shape == expected.shape and values.dtype == eight_bits
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    error = (values.float() - expected.float()).abs()
    step = 1 if eight_bits == torch.int8 else torch.finfo(eight_bits).eps * expected.float().abs().clamp_min(2**-6)
    assert bool((error <= step).all()), "a value is more than one step off"
    assert (error > 0).float().mean() <= 2e-3
    assert not values[..., x.shape[2] :].float().any(), "padding must be zero"


@on_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_fp64(dtype, case):
    check_modulate(triton, case, dtype)


@on_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eight_bits", MOST, ids=str)
def test_quantized_rows(eight_bits, dtype, case):
    check_quantized(triton, case, dtype, eight_bits)


@on_gpu
def test_rows_that_a_careless_variance_loses():
    """A mean of 1000 with a spread of 1, and rows without any spread, whose result is the shift."""
    x = torch.randn(1, 3, 1152, device=DEVICE) + 1000
    x[0, 1] = 7.0
    shift, scale = torch.randn(2, 1, 1152, device=DEVICE)
    y = triton.modulate(x, shift, scale, 1e-6)
    assert_kernel(y, reference.modulate(x, shift, scale), reference.modulate(*double(x, shift, scale)))
    assert torch.equal(y[0, 1], shift[0])


@on_gpu
def test_a_row_of_zeros_and_nan():
    x = torch.randn(1, 4, 100, device=DEVICE)
    zeros = torch.zeros(1, 100, device=DEVICE)
    values, scale = triton.modulate_quantized(x, zeros, zeros - 1, 1e-6, torch.int8)
    assert not values.any() and not scale.any()
    x[0, 2, 7] = float("nan")
    y = triton.modulate(x, zeros, zeros, 1e-6)
    assert y[0, 2].isnan().all() and not y[0, [0, 1, 3]].isnan().any()


DEFECTS = {
    "a mask off by one": ("[None, :]\n    inside = c < C", "[None, :]\n    inside = c <= C"),
    "unbiased variance": ("centred * centred, 1)[:, None] / C", "centred * centred, 1)[:, None] / (C - 1)"),
    "no 1 +": ("(1 + scale)", "scale"),
    "the first image's shift": ("shift_ptr + image * shift_image", "shift_ptr"),
    "x read as contiguous": ("x_token + c, mask=inside, other=0", "C + c, mask=inside, other=0"),
    "written beyond the row": ("mask=c < pitch", "mask=c <= pitch"),
    "gate: a channel too far": ("gate_ptr + image * gate_image", "gate_ptr + image * gate_image + 1"),
    "gate: on x": ("x + gate * y", "gate * x + y"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(defect, tmp_path):
    module = defective(triton, tmp_path, DEFECTS[defect])
    with pytest.raises(AssertionError):
        check_modulate(module, Case(2, 7, 250, "float", padded=True), torch.float32)


QUANTIZED_DEFECTS = {
    "no padding": ("mask=c < pitch", "mask=c < C"),
    "another token's scale": ("out_scale_ptr + row", "out_scale_ptr + row // 2"),
}


@pytest.mark.parametrize("defect", QUANTIZED_DEFECTS)
def test_a_planted_defect_of_the_quantised_rows_is_caught(defect, tmp_path):
    module = defective(triton, tmp_path, QUANTIZED_DEFECTS[defect])
    with pytest.raises(AssertionError):
        check_quantized(module, Case(2, 7, 250, "float", padded=True), torch.float32, torch.int8)
