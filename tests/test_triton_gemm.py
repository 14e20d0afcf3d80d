"""gemm and quantize in Triton against fp64 and to the bit, and the mistakes that these comparisons catch."""

from dataclasses import dataclass, replace

import pytest
import torch
from compare import assert_kernel, relative_rms
from interpreted import DEVICE, FP8_SUMS, chain_of, defective, on_gpu, on_guarded
from triton.runtime.errors import InterpreterError
from variants import DTYPES, double, signed

from sana_kernels.gemm import reference, triton
from sana_kernels.gemm.reference import MOST
from sana_kernels.tiles import Tile

EIGHT_BITS = tuple(MOST)
SMALL = Tile(16, 32, 32, 4, 2)  # many tiles, and tails of all three kinds, in products of a few dozen rows


@dataclass(frozen=True)
class Case:
    B: int
    M: int
    N: int
    K: int
    bias: bool = False
    silu: bool = False
    gated: str = ""  # "same": gate and residual in the result's dtype; "float": gate in fp32; "residual": no gate
    small: bool = True  # tiles of SMALL, else those of the table
    padded: bool = False  # x and residual are the first channels of wider rows

    def make(self, dtype: torch.dtype, eight_bits: torch.dtype | None = None) -> tuple:
        """Arguments in the op's order; `dtype` is that of the result, and of the operands if they don't have 8 bits."""
        B, M, N, K = self.B, self.M, self.N, self.K
        x, residual = (signed(B, M, n + 16 * self.padded)[..., :n] for n in (K, N))
        weight = torch.randn(N, K) * K**-0.5
        bias = signed(N).to(DEVICE, dtype) if self.bias else None
        residual = residual.to(DEVICE, dtype) if self.gated else None
        table = signed(B, 6, N).to(DEVICE, torch.float32 if self.gated == "float" else dtype)
        gate = table[:, 2] if self.gated in ("same", "float") else None
        if eight_bits is None:
            operands = x.to(DEVICE, dtype), None, weight.to(DEVICE, dtype), None
        else:
            operands = *reference.quantize(x.to(DEVICE), eight_bits), *reference.quantize(weight.to(DEVICE), eight_bits)
        return *operands, bias, self.silu, gate, residual, dtype


CASES = [
    Case(1, 1, 2240, 70, bias=True, small=False),
    Case(2, 37, 70, 100, bias=True, silu=True, gated="same", padded=True),
    Case(3, 21, 40, 64, gated="float"),
    Case(1, 300, 5, 97, gated="residual"),
    Case(2, 3, 33, 2240, gated="same", small=False),
]


def oracle(args: tuple) -> torch.Tensor:
    """fp64, and 8-bit operands as the numbers that they stand for."""
    x, x_scale, weight, weight_scale, *rest = args
    if x_scale is not None:
        x, weight = reference.dequantize(x, x_scale), reference.dequantize(weight, weight_scale)
    x, weight, bias, silu, gate, residual = double(x, weight, *rest[:-1])
    return reference.gemm(x, None, weight, None, bias, silu, gate, residual, torch.float64)


def check(module, monkeypatch, case, dtype, eight_bits=None):
    if case.small:
        monkeypatch.setattr(module, "gemm_tile", lambda *shape: SMALL)
    args = case.make(dtype, eight_bits)
    y = on_guarded(module.gemm, *args)
    assert y.is_contiguous()
    assert_product(y, args, f"{case} {eight_bits}")


def assert_product(y: torch.Tensor, args: tuple, what: str, device: str = DEVICE) -> None:
    """The rule for kernels; of fp8 in fp32, on a GPU what its tensor cores can keep."""
    x = args[0]
    if device == "cuda" and (x.dtype, y.dtype) == (torch.float8_e4m3fn, torch.float32):
        assert relative_rms(y, oracle(args)) <= FP8_SUMS, what
    else:
        assert_kernel(y, reference.gemm(*args), oracle(args), what, chain=chain_of(x.shape[-1], x.dtype))


@on_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_fp64(monkeypatch, dtype, case):
    check(triton, monkeypatch, case, dtype)


@on_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eight_bits", EIGHT_BITS, ids=str)
def test_eight_bits_against_fp64(monkeypatch, eight_bits, dtype, case):
    check(triton, monkeypatch, case, dtype, eight_bits)


def in_parts(x: torch.Tensor, weight: torch.Tensor, size: int, keep=lambda sums: sums) -> torch.Tensor:
    """x weightᵀ in fp32, `size` values of K at a time, and what `keep` leaves of each part's sum."""
    total = torch.zeros(*x.shape[:-1], len(weight))
    for a, b in zip(x.float().split(size, -1), weight.float().split(size, -1), strict=True):
        total += keep(a @ b.t())
    return total


def truncated(sums: torch.Tensor, bits: int) -> torch.Tensor:
    step = 2.0 ** (sums.abs().clamp_min(2.0**-99).log2().floor() + 1 - bits)
    return (sums / step).trunc() * step


def test_products_of_a_gpu_may_be_as_exact_as_its_units_are():
    """K multiply-adds in a row, and sums that keep 14 bits, which the rule without them would not let pass; not TF32, and
    not sums in bf16."""
    case = Case(1, 20, 300, 2240)
    args = [a.cpu() if isinstance(a, torch.Tensor) else a for a in case.make(torch.float32)]
    exact = oracle(tuple(args))
    chain = in_parts(args[0], args[2], 1)
    with pytest.raises(AssertionError):
        assert_kernel(chain, exact.float(), exact)
    assert_kernel(chain, exact.float(), exact, chain=2240)
    tf32 = [(t.view(torch.int32) & -(1 << 13)).view(torch.float32) for t in (args[0], args[2])]
    with pytest.raises(AssertionError):
        assert_kernel(in_parts(*tf32, 1), exact.float(), exact, chain=2240)

    args = [a.cpu() if isinstance(a, torch.Tensor) else a for a in case.make(torch.float32, torch.float8_e4m3fn)]
    scales = args[1][..., None] * args[3]
    hopper, bf16 = (in_parts(args[0], args[2], 128, lambda s, n=n: truncated(s, n)) * scales for n in (14, 8))
    with pytest.raises(AssertionError):
        assert_product(hopper, tuple(args), "", "cpu")
    assert_product(hopper, tuple(args), "", "cuda")
    with pytest.raises(AssertionError):
        assert_product(bf16, tuple(args), "", "cuda")


@on_gpu
@pytest.mark.parametrize("K", [64, 1152, 5632])
def test_sums_of_int8_products_are_exact(K):
    """Extremes included: -128 never comes from `quantize`, but a sum of it must not wrap around either."""
    x, weight = (torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE) for shape in ((1, 7, K), (20, K)))
    x[0, 0], weight[0] = -128, -128
    ones = [torch.ones(n, device=DEVICE) for n in ((1, 7), 20)]
    y = triton.gemm(x, ones[0], weight, ones[1], None, False, None, None, torch.float32)
    expected = x.long().cpu() @ weight.long().cpu().t()
    assert expected.max() == 2**14 * K  # beyond 2²⁴ a float rounds the exact sum
    assert torch.equal(y.cpu(), expected.float())


@on_gpu
@pytest.mark.parametrize("eight_bits", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_to_the_bit(dtype, eight_bits):
    for shape in ((1, 1), (2, 5, 70), (3, 2, 2, 64), (2, 5600)):
        x = signed(*shape, dtype=dtype).to(DEVICE)
        x.view(-1, shape[-1])[-1] = 0
        x[..., :1] = x[..., :1].abs()  # which of two largest elements is negative does not matter, but zeros may be
        check_quantize(triton, x, eight_bits)


def check_quantize(module, x, eight_bits):
    (values, scale), (expected, expected_scale) = (
        on_guarded(module.quantize, x, eight_bits),
        reference.quantize(x, eight_bits),
    )
    assert torch.equal(scale, expected_scale)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


@on_gpu
def test_quantize_at_the_edges():
    """Ties, rows that count as zero, the smallest that do not, and the first half of wider rows."""
    most = torch.tensor([127.0, 448.0])[:, None]
    ties = torch.cat([most, torch.arange(-63, 63) + most.new_tensor([[0.5], [0.5]])], 1)
    tiny = torch.full((2, 127), 2.0**-101)
    small = signed(2, 127) * 2.0**-99
    x = torch.stack([ties, tiny, small]).to(DEVICE)
    wide = torch.cat([x, x + 1], 2)[..., :127]
    for eight_bits in EIGHT_BITS:
        check_quantize(triton, wide, eight_bits)


@on_gpu
def test_same_bytes_again_and_inputs_unchanged(monkeypatch):
    args = Case(2, 37, 70, 100, bias=True, silu=True, gated="same").make(torch.float32, torch.int8)
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    assert torch.equal(triton.gemm(*args), triton.gemm(*args))
    after = [a for a in args if isinstance(a, torch.Tensor)]
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, after, strict=True))


DEFECTS = {
    "no mask for x's tail of K": ("tl.load(x_at, mask=k[None, :] < K - start, other=0.0)", "tl.load(x_at)"),
    "K's tail taken for whole": ("EVEN_K=K % tile.k == 0", "EVEN_K=True"),
    "K's mask off by one": ("mask=k[:, None] < K - start", "mask=k[:, None] < K - start - 1"),
    "no mask for the last rows": ("stored = (m < M)", "stored = (m <= M)"),
    "no mask for the last columns": ("& (n < N)", "& (n <= N)"),
    "x walks too far": ("x_at += BLOCK_K", "x_at += BLOCK_K + 1"),
    "the wrong tile": ("inside // height", "inside // GROUP_M"),
    "x's scale of another row": ("x_scale_ptr + image * M + m_read", "x_scale_ptr + m_read"),
    "no scale of the weight": ("* tl.load(weight_scale_ptr + n_read)[None, :]", ""),
    "fp16 sums": ("total = tl.dot(", "total = total.to(tl.float16).to(total.dtype) + tl.dot("),
    "the SiLU before the bias": ("    y = total.to(tl.float32)\n", "    y = silu(total.to(tl.float32))\n"),
    "the gate of the first image": ("gate_ptr + image * gate_image", "gate_ptr"),
    "the gate added": ("            y *= tl.load(gate_ptr", "            y += tl.load(gate_ptr"),
    "the residual read as contiguous": ("m[:, None] * residual_token", "m[:, None] * N"),
}
DEFECT_CASE = Case(2, 37, 70, 100, bias=True, silu=True, gated="same", padded=True)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(monkeypatch, tmp_path, defect):
    module = defective(triton, tmp_path, DEFECTS[defect])
    with pytest.raises(AssertionError):
        check(module, monkeypatch, DEFECT_CASE, torch.float32)
        check(module, monkeypatch, replace(DEFECT_CASE, padded=False), torch.float32, torch.int8)


@pytest.mark.skipif(DEVICE == "cuda", reason="there the compiler of this Triton says it, or takes them")
def test_int8_sums_that_only_some_versions_compile_are_noticed(monkeypatch, tmp_path):
    module = defective(triton, tmp_path, (", out_dtype=total.dtype", ""))
    with pytest.raises(InterpreterError, match=r"Triton 3\.5 to 3\.7 take an accumulator of int32 for fp32"):
        check(module, monkeypatch, replace(DEFECT_CASE, padded=False), torch.float32, torch.int8)


def test_the_cases_of_the_defects_pass_without_one(monkeypatch):
    check(triton, monkeypatch, DEFECT_CASE, torch.float32)
    check(triton, monkeypatch, replace(DEFECT_CASE, padded=False), torch.float32, torch.int8)
