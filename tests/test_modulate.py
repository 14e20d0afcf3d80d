"""modulate and gate_residual on every backend and instruction set against fp64, and their references against diffusers."""

from dataclasses import dataclass

import pytest
import torch
from compare import assert_kernel, assert_quantized, relative_rms
from variants import DTYPES, device_of, double, isas, run, signed, variants

import sana_kernels
from sana_kernels.backend import BackendUnavailable
from sana_kernels.gemm.reference import quantize
from sana_kernels.modulate import reference


@dataclass(frozen=True)
class Case:
    B: int
    N: int
    C: int
    table: str = "same"  # the modulation's dtype: x's, or "float"
    padded: bool = False  # x and y are the first C of C + 24 channels

    def make(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        """x, y (B, N, C) and a modulation table (B, 6, C), of which the ops get slices."""
        x, y = (signed(self.B, self.N, self.C + 24 * self.padded).to(device, dtype)[..., : self.C] for _ in range(2))
        table = 0.5 * signed(self.B, 6, self.C)
        return x, y, table.to(device, dtype if self.table == "same" else torch.float32)


CASES = [
    Case(1, 1, 2240),
    Case(2, 1008, 1152),
    Case(3, 45, 2240, "float"),
    Case(2, 33, 1152, padded=True),
    Case(2, 17, 250, "float", padded=True),
    Case(1, 1023, 8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", variants("modulate"))
def test_modulate_against_fp64(variant, dtype, case):
    x, _, table = case.make(dtype, device_of(variant))
    args = x, table[:, 3], table[:, 1]
    y = run(variant, "modulate", *args, eps=1e-6)
    assert y.is_contiguous()
    assert_kernel(y, reference.modulate(*args), reference.modulate(*double(*args)), f"{variant} {case}")


SLACK = 1e-3  # of a step: what errors of a few fp32 ulp amount to


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", variants("modulate_quantized"))
def test_quantized_rows_against_fp64(variant, dtype, case):
    x, _, table = case.make(dtype, device_of(variant))
    args = x, table[:, 3], table[:, 1]
    values, scale = run(variant, "modulate", *args, quantize=torch.int8)
    assert values.shape == (case.B, case.N, -(-case.C // 64) * 64) and values.is_contiguous()
    assert_quantized(values, scale, reference.modulate(*double(*args)), SLACK, f"{variant} {case}")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", variants("gate_residual"))
def test_gate_residual_against_fp64(variant, dtype, case):
    x, y, table = case.make(dtype, device_of(variant))
    args = x, y, table[:, 5]
    out = run(variant, "gate_residual", *args)
    assert out.is_contiguous()
    assert_kernel(out, reference.gate_residual(*args), reference.gate_residual(*double(*args)), f"{variant} {case}")


@pytest.mark.parametrize("variant", ["reference", *(f"cpu:{isa}" for isa in isas())])
def test_rows_that_a_careless_variance_loses(variant):
    """A mean of 1000 with a spread of 1, and rows without any spread, whose result is the shift."""
    x = torch.randn(1, 3, 1152) + 1000
    x[0, 1] = 7.0
    shift, scale = torch.randn(1, 1152), torch.randn(1, 1152)
    y = run(variant, "modulate", x, shift, scale)
    assert_kernel(y, reference.modulate(x, shift, scale), reference.modulate(*double(x, shift, scale)))
    assert torch.equal(y[0, 1], shift[0])


MISTAKES = {
    "shift and scale swapped": lambda x, shift, scale: reference.modulate(x, scale, shift),
    "no 1 +": lambda x, shift, scale: reference.modulate(x, shift, scale - 1),
    "unbiased variance": lambda x, shift, scale: reference.modulate(x, shift, (1 + scale) * (1 - 1 / 32) ** 0.5 - 1),
    "RMS norm": lambda x, shift, scale: (
        torch.nn.functional.rms_norm(x, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]
    ),
    "another image's row": lambda x, shift, scale: reference.modulate(x, shift.flip(0), scale),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_comparison_notices(dtype, mistake):
    x, y, table = Case(2, 40, 32).make(dtype)
    args = x, table[:, 0], table[:, 1]
    with pytest.raises(AssertionError):
        assert_kernel(MISTAKES[mistake](*args), reference.modulate(*args), reference.modulate(*double(*args)))
    with pytest.raises(AssertionError):
        rows = quantize(MISTAKES[mistake](*(a.float() for a in args)))
        assert_quantized(*rows, reference.modulate(*double(*args)), SLACK)
    with pytest.raises(AssertionError):
        gated = reference.gate_residual(y, x, table[:, 2])
        args = x, y, table[:, 2]
        assert_kernel(gated, reference.gate_residual(*args), reference.gate_residual(*double(*args)))


def test_the_comparison_notices_a_rounding_before_quantisation():
    x, _, table = Case(2, 40, 250).make(torch.bfloat16)
    args = x, table[:, 0], table[:, 1]
    with pytest.raises(AssertionError):
        assert_quantized(*quantize(reference.modulate(*args)), reference.modulate(*double(*args)), SLACK)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0.0), (torch.bfloat16, 1e-3)], ids=str)
def test_against_the_head_of_diffusers(dtype, limit):
    transformer = pytest.importorskip("diffusers.models.transformers.sana_transformer")
    x, _, table = Case(2, 40, 1152).make(dtype)
    temb, rows = table[:, 0], table[0, 1:3]
    theirs = transformer.SanaModulatedNorm(1152)(x, temb, rows)
    shift, scale = (rows + temb[:, None]).unbind(1)
    assert relative_rms(reference.modulate(x, shift, scale), theirs) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", isas())
def test_same_bytes_on_any_number_of_threads(isa, dtype):
    x, y, table = Case(2, 300, 1152).make(dtype)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        rows = table[:, :2].unbind(1)
        gated = run(f"cpu:{isa}", "gate_residual", run(f"cpu:{isa}", "modulate", x, *rows), y, table[:, 2])
        results.append((gated, *run(f"cpu:{isa}", "modulate", x, *rows, quantize=torch.int8)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


ROW, TOKENS = (2, 8), (2, 3, 8)
DOUBLE = dict.fromkeys(range(3), torch.Tensor.double)


@pytest.mark.parametrize(
    ("op", "shapes", "changes", "error", "message"),
    [
        ("modulate", [TOKENS, ROW, (2, 9)], {}, ValueError, r"\(2, 8\) on cpu; got \(2, 9\)"),
        ("modulate", [TOKENS, (1, 8), ROW], {}, ValueError, r"\(2, 8\) on cpu; got \(1, 8\)"),
        ("modulate", [(3, 8), ROW, ROW], {}, ValueError, r"x of shape \(B, N, C\)"),
        ("modulate", [(2, 0, 8), ROW, ROW], {}, ValueError, "none of them 0"),
        ("gate_residual", [TOKENS, (2, 4, 8), ROW], {}, ValueError, r"\(2, 3, 8\) on cpu; got \(2, 4, 8\)"),
        ("modulate", [TOKENS, ROW, ROW], {0: torch.Tensor.int}, TypeError, "floating dtypes; got torch.int32"),
        ("modulate", [TOKENS, ROW, ROW], {1: torch.Tensor.half}, TypeError, "in it or in float32; got .*16"),
        ("gate_residual", [TOKENS, TOKENS, ROW], {1: torch.Tensor.half}, TypeError, "tokens of one dtype"),
        ("modulate", [TOKENS, ROW, ROW], {0: lambda x: x.mT.contiguous().mT}, ValueError, r"call \.contiguous\(\)"),
        ("modulate", [TOKENS, ROW, ROW], {2: lambda x: x.to("meta")}, ValueError, "one device.*on meta"),
        ("modulate", [TOKENS, ROW, ROW], DOUBLE, BackendUnavailable, "not torch.float64"),
    ],
)
def test_wrong_arguments_get_one_sentence(op, shapes, changes, error, message):
    args = [changes.get(i, lambda x: x)(torch.randn(shape)) for i, shape in enumerate(shapes)]
    with pytest.raises(error, match=message) as raised:
        getattr(sana_kernels, op)(*args, backend="cpu")
    assert "\n" not in str(raised.value)
