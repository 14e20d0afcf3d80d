"""gemm on every backend and instruction set, AMX on emulated tiles included, against the fp64 product of its operands."""

from dataclasses import dataclass

import pytest
import torch
from compare import assert_kernel, relative_rms
from variants import DTYPES, device_of, on_cpu, run, signed, variants

import sana_kernels
from sana_kernels import Quantized
from sana_kernels.backend import BackendUnavailable
from sana_kernels.gemm import pack
from sana_kernels.gemm.reference import dequantize

VARIANTS = variants("gemm", tiles=True)
CPU = on_cpu(tiles=True)


def gemm(variant: str, *args, **kwargs) -> torch.Tensor:
    return run(variant, "gemm", *args, **kwargs)


@dataclass(frozen=True)
class Case:
    B: int
    M: int
    K: int
    N: int
    silu: bool = False
    gated: str = ""  # "": no residual; "residual": without a gate; "gate"

    def make(self, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple, dict]:
        """x, weight, bias in fp32, and the epilogue's arguments with a result in `dtype`."""
        x, weight = signed(self.B, self.M, self.K), torch.randn(self.N, self.K) * self.K**-0.5
        epilogue = {"silu": self.silu, "dtype": dtype}
        if self.gated:
            epilogue["residual"] = signed(self.B, self.M, self.N, dtype=dtype).to(device)
        if self.gated == "gate":
            epilogue["gate"] = torch.randn(self.B, self.N, device=device)
        return tuple(t.to(device) for t in (x, weight, torch.randn(self.N))), epilogue


CASES = [
    Case(1, 1, 64, 1600),  # one row
    Case(2, 7, 128, 48, silu=True),
    Case(1, 33, 1152, 112, gated="gate"),  # a row, and a column, beyond a whole block
    Case(3, 5, 192, 80, gated="residual"),
    Case(1, 40, 2240, 32, silu=True, gated="gate"),  # 35 steps of 64
    Case(1, 66, 1280, 560),  # more columns than a chunk of 512, longer rows than a part of 18 steps
    Case(1, 65, 2048, 64, silu=True),  # rows a multiple of 1 KB apart
    Case(2, 150, 2240, 144, gated="gate"),  # rows that take turns at fresh weights, and some that do not
]


def oracle(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epilogue: dict) -> torch.Tensor:
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in epilogue.items()}
    return sana_kernels.gemm(
        x.double(), weight.double(), bias.double(), **wide | {"dtype": torch.float64}, backend="reference"
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("operands", ["bf16", "w8a8"])
def test_error_against_fp64(operands, variant, dtype, case):
    """Of 16-bit operands and of quantised ones, whose product is compared with that of what they stand for."""
    (x, weight, bias), epilogue = case.make(dtype, device_of(variant))
    if operands == "bf16":
        a, b = x.bfloat16(), weight.bfloat16()
    else:
        a, b = (sana_kernels.quantize(t, backend="reference") for t in (x, weight))
    y = gemm(variant, a, b, bias, **epilogue)
    assert y.is_contiguous() and y.dtype == dtype
    same_dtype = sana_kernels.gemm(a, b, bias, **epilogue, backend="reference")
    exact = [dequantize(*t)[..., : case.K] if isinstance(t, Quantized) else t for t in (a, b)]
    assert_kernel(y, same_dtype, oracle(*exact, bias, epilogue), f"{variant} {operands} {case}")


MISTAKES = {
    "scales of x and weight swapped": lambda x, w: (
        Quantized(x.values, w.scale[None]),
        Quantized(w.values, x.scale[0]),
    ),
    "a column's scale from its neighbour": lambda x, w: (x, Quantized(w.values, w.scale.roll(1))),
    "the last 4 of K left out": lambda x, w: (Quantized(x.values.index_fill(2, torch.arange(60, 64), 0), x.scale), w),
    "unsigned bytes": lambda x, w: (Quantized((x.values.int() % 256).clamp(max=127).to(torch.int8), x.scale), w),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(mistake):
    x, weight, bias = signed(1, 16, 64), torch.randn(16, 64) / 8, torch.randn(16)
    a, b = (sana_kernels.quantize(t, backend="reference") for t in (x, weight))
    same_dtype = sana_kernels.gemm(a, b, bias, dtype=torch.float32, backend="reference")
    expected = oracle(dequantize(*a), dequantize(*b), bias, {})
    assert_kernel(same_dtype, same_dtype, expected)
    wrong = sana_kernels.gemm(*MISTAKES[mistake](a, b), bias, dtype=torch.float32, backend="reference")
    with pytest.raises(AssertionError):
        assert_kernel(wrong, same_dtype, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", CPU)
def test_a_result_beyond_the_second_level_cache(variant, dtype):
    """Where AMX may store past the caches; the last panel of 16 columns is alone."""
    (x, weight, bias), epilogue = Case(2, 1901, 64, 560, silu=True, gated="gate").make(dtype)  # 4 MiB and more
    x, weight = x.bfloat16(), weight.bfloat16()
    y = gemm(variant, x, weight, bias, **epilogue)
    expected = oracle(x, weight, bias, epilogue)
    assert_kernel(
        y, sana_kernels.gemm(x, weight, bias, **epilogue, backend="reference"), expected, f"{variant} {dtype}"
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_int32_sums_are_exact_at_the_extremes(variant):
    """Every pair of signs, sums up to 127² · 1024, which fp32 still holds exactly."""
    rows, K = 4, 1024
    x = torch.full((1, rows, K), 127, dtype=torch.int8)
    x[0, 1] *= -1
    x[0, 2, ::2] *= -1
    x[0, 3] = torch.arange(K) % 255 - 127
    weight = torch.stack([*x[0], *-x[0]] * 2)
    device = device_of(variant)
    a, b = (Quantized(t.to(device), torch.ones(t.shape[:-1], device=device)) for t in (x, weight))
    y = gemm(variant, a, b, dtype=torch.float32)
    assert torch.equal(y[0].cpu().long(), x[0].long() @ weight.t().long())


@pytest.mark.parametrize("variant", CPU)
@pytest.mark.parametrize("precision", ["bf16", "w8a8"])
def test_packed_weights_strided_rows_and_threads_change_nothing(variant, precision):
    K = 1216  # longer than a part of 18 steps, so that sums of rows that take turns at weights wait
    x, weight = signed(2, 150, K), torch.randn(208, K) / 8
    if precision == "bf16":
        a, b = x.bfloat16(), weight.bfloat16()
        packed, strided = pack(b), torch.cat([a, a], dim=2)[..., :K]
        rows = a[0][:, None]  # (150, 1, K), whose second stride means nothing
        rows = rows.as_strided(rows.shape, (K, 3, 1))
        assert torch.equal(gemm(variant, rows, b), gemm(variant, rows.clone(), b))
    else:
        a, b = (sana_kernels.quantize(t) for t in (x, weight))
        packed = Quantized(pack(b.values), b.scale)
        strided = Quantized(torch.cat([a.values, a.values], dim=2)[..., :K], a.scale)
    expected = gemm(variant, a, b)
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(gemm(variant, a, packed), expected)
            assert torch.equal(gemm(variant, strided, packed), expected)
        finally:
            torch.set_num_threads(before)


@pytest.mark.skipif(len(CPU) < 2, reason="this machine has one instruction set")
def test_instruction_sets_agree():
    """Sums are exact in int8: only the order of a few fp32 operations differs."""
    x, weight = (sana_kernels.quantize(t) for t in (signed(1, 50, 1152), torch.randn(96, 1152)))
    results = [gemm(variant, x, weight, dtype=torch.float32) for variant in CPU]
    assert len(results) > 1
    for result in results:
        assert relative_rms(result, results[0]) < 1e-7
    assert (
        relative_rms(gemm(CPU[0], Quantized(x.values, x.scale * (1 + 1e-6)), weight, dtype=torch.float32), results[0])
        > 1e-7
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(1, 0, 64)}, ValueError, r"none of them 0; got \(1, 0, 64\)"),
        ({"weight": torch.zeros(0, 64)}, ValueError, r"none of them 0; got .*\(0, 64\)"),
        ({"x": torch.zeros(3, 64)}, ValueError, r"takes x \(B, M, K\)"),
        ({"x": torch.zeros(1, 3, 32)}, ValueError, r"got \(1, 3, 32\) and \(16, 64\)"),
        ({"x": torch.zeros(1, 3, 64).bfloat16()}, TypeError, "one dtype.*bfloat16, torch.float32"),
        ({"x": torch.zeros(1, 3, 64).char(), "weight": torch.zeros(16, 64).char()}, TypeError, "without scales"),
        ({"x": Quantized(torch.zeros(1, 3, 64).char(), torch.zeros(1, 3))}, TypeError, "both quantised or neither"),
        ({"bias": torch.zeros(15)}, ValueError, r"bias of shape \(16,\)"),
        ({"bias": torch.zeros(16).int()}, TypeError, "bias in a floating dtype"),
        ({"gate": torch.zeros(1, 16)}, ValueError, "a gate only beside a residual"),
        ({"residual": torch.zeros(1, 4, 16)}, ValueError, r"residual of shape \(1, 3, 16\)"),
        ({"x": torch.zeros(1, 64, 3).mT}, ValueError, "contiguous channels"),
        ({"weight": torch.zeros(16, 64, device="meta")}, ValueError, "one device"),
        ({"weight": torch.zeros(16, 64, 1, 1)}, ValueError, r"rows \(N, K\), or from pack; got \(16, 64, 1, 1\)"),
        ({"weight": torch.zeros(1, 32, 31)}, ValueError, r"or from pack; got \(1, 32, 31\)"),
    ],
)
def test_wrong_arguments_get_one_sentence(change, error, message):
    with pytest.raises(error, match=message) as raised:
        sana_kernels.gemm(**{"x": torch.zeros(1, 3, 64), "weight": torch.zeros(16, 64)} | change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(1, 3, 64), torch.zeros(16, 64), "float32 is left to PyTorch"),
        (torch.zeros(1, 3, 64).bfloat16(), torch.zeros(24, 64).bfloat16(), "multiples of 16 output channels, not 24"),
        (torch.zeros(1, 3, 40).bfloat16(), torch.zeros(16, 40).bfloat16(), "multiples of 32 input channels"),
    ],
)
def test_what_the_cpu_kernels_refuse(x, weight, message):
    with pytest.raises(BackendUnavailable, match=message):
        sana_kernels.gemm(x, weight, backend="cpu")
    assert sana_kernels.gemm(x, weight).shape == (1, 3, weight.shape[0])


def test_packed_weights_are_for_the_cpu_kernels():
    x, packed = torch.zeros(1, 3, 64).bfloat16(), pack(torch.zeros(16, 64).bfloat16())
    with pytest.raises(BackendUnavailable, match=r"takes weights as rows \(N, K\), not packed"):
        sana_kernels.gemm(x, packed, backend="reference")
    with pytest.raises(ValueError, match="pack takes bf16 or int8 rows"):
        pack(torch.zeros(24, 64).bfloat16())
