"""The CUDA kernels of 4-bit rows on the emulator: packing to the bit, products against fp64, planted defects."""

from unittest import mock

import pytest
import torch
from variants import DTYPES, signed

from sana_kernels.gemm import int4_cuda, int4_reference
from sana_kernels.quant import formats
from sana_kernels.quant.formats import Int4, dequantize_int4, quantize_int4
from tests import emulated

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def module():
    return emulated.cuda_module()


# ---- quantize_int4


def check_quantize(module, x, smooth=None, orders=emulated.ORDERS):
    out = emulated.run(module, int4_cuda.quantize_int4, x, smooth, orders=orders)
    for actual, expected in zip(out, formats.quantize_int4(x, smooth), strict=True):
        assert torch.equal(actual, expected)


def hard_rows(rows: int, K: int) -> torch.Tensor:
    """Outliers; every tie of rounding; groups of zeros, of almost zeros and of one sign."""
    x = signed(rows, K)
    x[0] = torch.arange(K).remainder(29) / 2 - 7  # whole and half steps of ±7
    x[1], x[2, : K // 2], x[2, K // 2 :] = 0, 2.0**-101, -x[2, K // 2 :].abs()
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [2240, 5600, 8, 100])
def test_quantize_is_exact_to_the_bit(module, K, dtype):
    smooth = 0.1 + signed(K).abs()
    check_quantize(module, hard_rows(5, K).to(dtype))
    check_quantize(module, hard_rows(5, K).to(dtype), smooth.to(dtype))
    check_quantize(module, hard_rows(6, K + 8).to(dtype)[:, :K].unflatten(0, (2, 3)), smooth)


# ---- Products


def epilogue_inputs(B, M, N, bias=None, gate=None, residual=None, silu=False):
    return (
        None if bias is None else signed(N).to(bias), silu, None if gate is None else 0.02 * signed(B, N).to(gate),
        None if residual is None else signed(B, M, N).to(residual),
    )  # fmt: skip


def assert_right(out, oracle, dtype):
    """One rounding to the result's dtype, of a value that is right to fp32."""
    assert out.dtype == dtype
    limit = torch.finfo(dtype).eps / 2 * oracle.abs() + 1e-5 * oracle.std()
    assert ((out.double() - oracle).abs() <= limit).all()


def check_w4a4(module, B, M, N, K, dtype, rank=0, low_dtype=BF16, orders=emulated.ORDERS, large=False, **epilogue):
    """Against the product of the dequantised rows in fp64; outliers make the scales of a row's groups differ by 30."""
    x, weight = quantize_int4(signed(B, M, K)), quantize_int4(signed(N, K) / 8)
    branch = (signed(B, M, rank).to(low_dtype), signed(N, rank).to(low_dtype)) if rank else (None, None)
    rest = epilogue_inputs(B, M, N, **epilogue)
    with mock.patch.object(int4_cuda, "LARGE", 0 if large else 1 << 30):
        (out,) = emulated.run(module, int4_cuda.gemm_w4a4, *x, *weight, *branch, *rest, dtype, orders=orders)
    wide = [None if t is None else t.double() if isinstance(t, torch.Tensor) else t for t in (*branch, *rest)]
    y = dequantize_int4(x) @ dequantize_int4(weight).t()
    y = y if not rank else y + wide[0] @ wide[1].t()
    assert_right(out, int4_reference.finish(y, *wide[2:], torch.float64), dtype)


ALL = {"bias": FP16, "silu": True, "gate": FP32, "residual": BF16}


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((1, 1, 2240, 1152), BF16, {"rank": 32, "residual": BF16}),  # the width of the 1.6B
        ((2, 33, 96, 5600), FP16, {"rank": 32, "low_dtype": FP16, **ALL}),  # 87.5 groups
        ((3, 5, 67, 64), FP32, {"bias": FP32}),
        ((1, 1023, 8, 128), BF16, {"rank": 8, "low_dtype": FP16}),
        ((1, 130, 136, 320), FP16, {"rank": 72, "large": True, **ALL}),  # more than a slab of ranks: a LoRA was added
        ((1, 130, 136, 320), FP32, {"large": True}),
    ],
    ids=str,
)
def test_w4a4(module, shape, dtype, options):
    check_w4a4(module, *shape, dtype, **options)


def test_sums_within_a_group_are_exact(module):
    """The extremes ±7, with scales of 1."""
    x, weight = (torch.where(torch.rand(n, 256) < 0.5, -7, 7).to(torch.int8) for n in (17, 24))
    x[0], weight[0] = 7, 7
    rows = [Int4(formats.pack_int4(t), torch.ones(t.shape[0], 4)) for t in (x[None], weight)]
    rows[0] = Int4(rows[0].values, torch.ones(1, 17, 4))
    (out,) = emulated.run(
        module, int4_cuda.gemm_w4a4, *rows[0], *rows[1], None, None, None, False, None, None, torch.float32
    )
    assert torch.equal(out[0], (x.double() @ weight.double().t()).float())
    assert out[0, 0, 0] == 256 * 49


def check_w4a16(module, B, M, N, K, dtype, out_dtype=FP32, group=64, orders=emulated.ORDERS, **epilogue):
    x, weight = signed(B, M, K).to(dtype), quantize_int4(signed(N, K) / 8, group=group)
    rest = epilogue_inputs(B, M, N, **epilogue)
    (out,) = emulated.run(module, int4_cuda.gemm_w4a16, x, *weight, *rest, out_dtype, orders=orders)
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in rest]
    y = x.double() @ dequantize_int4(weight)[:, :K].t()
    assert_right(out, int4_reference.finish(y, *wide, torch.float64), out_dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 320, 2304), {"group": 128}),  # the text encoder's width
        ((2, 33, 72, 2240), {"group": 128, "out_dtype": BF16, **ALL}),  # 17.5 groups
        ((1, 16, 67, 640), {"out_dtype": FP16, "bias": BF16}),
        ((3, 23, 64, 200), {"gate": BF16, "residual": BF16}),
    ],
    ids=str,
)
def test_w4a16(module, shape, options, dtype):
    check_w4a16(module, *shape, dtype, **options)


def test_what_the_kernels_do_not_take():
    x, weight, scale = torch.zeros(1, 1, 12).bfloat16(), torch.zeros(8, 32), torch.zeros(8, 1)
    rest = None, False, None, None, BF16
    assert "multiples of 8 input channels, not 12" in int4_cuda.accepts_w4a16(x, weight, scale, *rest)
    assert "not torch.float32" in int4_cuda.accepts_w4a16(x.float(), weight, scale, *rest)
    low = torch.zeros(1, 1, 12).bfloat16()
    assert "multiples of 8, not 12" in int4_cuda.accepts_w4a4(weight, scale, weight, scale, low, low, *rest)


# ---- Planted defects

QUANTIZE, W4A4, W4A16 = (f"csrc/gemm/{name}.cu" for name in ("quantize_int4", "gemm_w4a4", "gemm_w4a16"))
EPILOGUE_BARRIER = "__syncthreads();  // the epilogue overwrites the slabs"
SLAB_BARRIER = "__syncthreads();  // this slab is there for all warps, and the one before it has been read by all"
DEFECTS = {
    "quantize: nibbles swapped": ((QUANTIZE, "<< (4 * i)", "<< (4 * (i ^ 1))"),),
    "quantize: smoothing multiplies": ((QUANTIZE, "x[i] / smooth[i]", "x[i] * smooth[i]"),),
    "quantize: groups of 32": ((QUANTIZE, "offset = kLanes / 2", "offset = kLanes / 4"),),
    "quantize: the tail of K unmasked": ((QUANTIZE, "vectors && count == kRun, x)", "vectors, x)"),),
    "w4a4: an unscaled group": ((W4A4, "half * T::BM + row", "row"),),
    "w4a4: the scales of row and column swapped": ((W4A4, "xs[r / 2 * 8] * ws[r % 2]", "xs[r % 2 * 8] * ws[r / 2]"),),
    "w4a4: sums of all groups in one accumulator": ((W4A4, "- kMagic)", ")"),),
    "w4a4: the last group's scale is missing": ((W4A4, "&& g < groups;", "&& g + 1 < groups;"),),
    "w4a4: no barrier before the low-rank branch": ((W4A4, "__syncthreads();  // the slabs are overwritten", ""),),
    "w4a4: low-rank branch in the other type": ((W4A4, "if (low_is_half) {", "if (!low_is_half) {"),),
    "w4a4: no mask for K": (("csrc/gemm/tile.cuh", " && byte < from.bytes;", ";"),),
    "w4a16: half accumulation": (
        (W4A16, "sums[i][j][r] += group[j][r]", "sums[i][j][r] = __half2float(sums[i][j][r]) + group[j][r]"),
    ),
    "w4a16: nibbles without their sign": ((W4A16, "(pair ^ 0x00080008u)", "pair"),),
    "w4a16: steps of weight crossed": ((W4A16, "s % 2 * 2 + r)", "r * 2 + s % 2)"),),
    "w4a16: no barrier": ((W4A16, SLAB_BARRIER, ""),),
    "w4a16: no barrier before the epilogue": ((W4A16, EPILOGUE_BARRIER, ""),),
    "w4a16: every group of 64 has a scale": ((W4A16, "slab / p.slabs_per_group", "slab"),),
    "w4a16: no mask for K": ((W4A16, "&& k < p.K;", ";"),),
}  # fmt: skip
# Compiled for the small tile and bfloat16 only.
SMALLER = (
    (W4A4, "p.large ? run<Tile<4, 2, 32, 64>>(p, on) : ", ""),
    (W4A16, "p.dtype == DType::f16 ? run<Half>(p, on) : ", ""),
    (W4A16, "p.epilogue.M <= 16 ? run<Type, Tile<1, 4, 16, 16>>(p, stream) : ", ""),
)


@pytest.mark.parametrize(
    ("capability", "accepted"), [((8, 0), True), ((8, 9), True), ((9, 0), False), ((12, 0), False)]
)
def test_w4a4_is_for_gpus_that_multiply_4_bits(monkeypatch, capability, accepted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    x = torch.empty(1, 1, 32, dtype=torch.uint8, device="meta")
    reason = int4_cuda.accepts_w4a4(x, *[None] * 6, False, None, None, BF16)
    assert (reason is None) == accepted and (accepted or "run in int8" in reason)


def check_all(module, orders=(0, 1)):
    # The last slab lies where the low-rank branch or the epilogue writes first.
    check_quantize(module, hard_rows(5, 104)[:, :100], 0.1 + signed(100).abs(), orders=orders)
    check_w4a4(module, 1, 70, 72, 576, FP32, rank=40, orders=orders)
    check_w4a16(module, 1, 40, 72, 200, BF16, group=128, orders=orders)
    check_w4a16(module, 1, 40, 72, 312, BF16, orders=orders)


@pytest.fixture(scope="module")
def defective():
    return emulated.defective(DEFECTS, *SMALLER, only=(QUANTIZE, W4A4, W4A16))


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(defective, defect):
    with pytest.raises((AssertionError, RuntimeError)):
        check_all(defective[defect])


def test_the_cases_of_the_defects_pass_without_one(module):
    check_all(module)
