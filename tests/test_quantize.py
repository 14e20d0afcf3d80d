"""quantize on every backend and instruction set: to the bit what the reference says, and what the reference says."""

import pytest
import torch
from compare import assert_quantized
from variants import DTYPES, device_of, isas, run, signed, variants

import sana_kernels
from sana_kernels.backend import BackendUnavailable
from sana_kernels.gemm.reference import quantize as reference

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (2, 33, 1152), (4, 250), (17, 5600)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", variants("quantize"))
def test_equal_to_the_reference(variant, dtype, shape):
    x = signed(*shape, dtype=dtype).to(device_of(variant))
    x.view(-1, shape[-1])[-1] *= 1e-3
    values, scale = run(variant, "quantize", x)
    expected, expected_scale = reference(x)
    assert torch.equal(values, expected) and torch.equal(scale, expected_scale)
    assert_quantized(values, scale, x.double(), 1e-4)


@pytest.mark.parametrize("variant", variants("quantize"))
def test_edges(variant):
    """Rows of zeros and of less than 2^-100, ties between two steps, and rows that lie apart."""
    x = torch.zeros(6, 70)
    x[1] = 2.0**-101
    x[2] = -(2.0**-100)
    x[3, :5] = torch.tensor([127.0, 0.5, 1.5, -0.5, -2.5])
    x[4] = torch.linspace(-1.5e38, 1.5e38, 70)
    x[5, 69] = -1e-20
    wide = torch.full((6, 100), 1e9)
    wide[:, :70] = x
    for rows in (x, wide[:, :70], x.view(3, 2, 70), torch.stack([x, x], 1)[:, 0]):
        values, scale = run(variant, "quantize", rows.to(device_of(variant)))
        expected, expected_scale = reference(rows)
        assert torch.equal(values.cpu(), expected) and torch.equal(scale.cpu(), expected_scale)
    values, scale = (t.cpu() for t in run(variant, "quantize", x.to(device_of(variant))))
    assert not values[:2].any() and not scale[:2].any() and scale[2] > 0
    assert values[3, :6].tolist() == [127, 0, 2, 0, -2, 0] and values[4, 0] == -127 and values[5, 69] == -127


MISTAKES = {
    "ties away from zero": lambda x: (x.sign() * (x.abs() / x.abs().amax(-1, True) * 127 + 0.5).floor()).char(),
    "one scale for all rows": lambda x: (x / x.abs().max() * 127).round().char(),
    "cut off": lambda x: (x / x.abs().amax(-1, True) * 127).char(),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(mistake):
    x = torch.randint(-127, 128, (4, 64)) / 2
    x[:, 0] = 127  # a step is 1, and every other value a tie
    x *= torch.tensor([1.0, 2, 4, 8])[:, None]
    assert not torch.equal(MISTAKES[mistake](x), reference(x)[0])


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_marks_its_row(dtype, isa):
    x = signed(3, 100, dtype=dtype)
    x[1, 7] = float("nan")
    assert run(f"cpu:{isa}", "quantize", x).scale.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("x", "dtype", "error", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int32), torch.int8, TypeError, "floating dtypes; got torch.int32"),
        (torch.ones(2, 3), torch.uint8, TypeError, "not torch.uint8"),
        (torch.ones(2, 0), torch.int8, ValueError, r"at least one value.*\(2, 0\)"),
        (torch.ones(3, 2).T, torch.int8, ValueError, "last stride 1"),
        (torch.ones(2, 3), torch.float8_e4m3fn, BackendUnavailable, "quantises to int8, not torch.float8_e4m3fn"),
        (torch.ones(2, 3).double(), torch.int8, BackendUnavailable, "not torch.float64"),
    ],
)
def test_wrong_arguments_get_one_sentence(x, dtype, error, message):
    with pytest.raises(error, match=message) as raised:
        sana_kernels.quantize(x, dtype, backend="cpu")
    assert "\n" not in str(raised.value)
