"""The CUDA kernels that are bound by memory, on the emulator: modulate, gate_residual, quantize and depthwise_glu."""

import pytest
import torch
from compare import assert_close, assert_kernel, relative_rms
from variants import DTYPES, double, signed

from sana_kernels.gemm import cuda as gemm_cuda
from sana_kernels.gemm import reference as gemm_reference
from sana_kernels.mix_ffn import cuda as mix_ffn_cuda
from sana_kernels.mix_ffn import reference as mix_ffn_reference
from sana_kernels.mix_ffn import taps_first
from sana_kernels.modulate import cuda as modulate_cuda
from sana_kernels.modulate import reference as modulate_reference
from tests import emulated

EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)


@pytest.fixture(scope="module")
def module():
    return emulated.cuda_module()


# ---- modulate, gate_residual


def tokens(B, N, C, dtype, *, padded=False, table=None):
    """x, y (B, N, C), tokens of x all negative, constant, far from 0; the rows of a modulation table."""
    x, y = (signed(B, N, C + 24 * padded)[..., :C] for _ in range(2))
    x[:, N // 2] = -x[:, N // 2].abs()
    x[0, -1] = 7.0
    if N > 2:
        x[0, 0] += 1000
    rows = 0.5 * signed(B, 6, C)
    # The table's rows keep the strides that they have there; tokens, those of the padded tensors.
    cast = [t.to(dtype) for t in (x, y)]
    if padded:
        cast = [torch.nn.functional.pad(t, (0, 24))[..., :C] for t in cast]
    return *cast, *rows.to(table or dtype).unbind(1)[:3]


def check_modulate(module, *args, orders=emulated.ORDERS, **options):
    x, y, shift, scale, gate = tokens(*args, **options)
    (out,) = emulated.run(module, modulate_cuda.modulate, x, shift, scale, 1e-6, orders=orders)
    assert_kernel(
        out, modulate_reference.modulate(x, shift, scale), modulate_reference.modulate(*double(x, shift, scale))
    )
    (out,) = emulated.run(module, modulate_cuda.gate_residual, x, y, gate, orders=orders)
    assert_kernel(
        out, modulate_reference.gate_residual(x, y, gate), modulate_reference.gate_residual(*double(x, y, gate))
    )


TOKENS = {
    "1.6b": {"args": (1, 1, 2240)},
    "0.6b": {"args": (2, 5, 1152)},
    "float table": {"args": (3, 3, 2240), "table": torch.float32},
    "padded rows": {"args": (2, 3, 1152), "padded": True},
    "no vectors": {"args": (2, 3, 250), "padded": True, "table": torch.float32},
    "one warp": {"args": (1, 9, 8)},
    "widest": {"args": (1, 1, gemm_cuda.MAX_ROW)},
}


@pytest.mark.parametrize("case", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modulate_and_gate_residual(module, dtype, case):
    args, options = TOKENS[case]["args"], {k: v for k, v in TOKENS[case].items() if k != "args"}
    check_modulate(module, *args, dtype, **options)


def check_modulate_quantized(module, B, N, C, dtype, eight_bit, orders=emulated.ORDERS):
    """Rows of the fp32 result: a few values fall on the other side of a rounding, none is further off."""
    x, _, shift, scale, _ = tokens(B, N, C, dtype)
    x[0, 0] = x[0, 1]  # far from 0, even fp32 loses more than a step
    run = emulated.run(module, modulate_cuda.modulate_quantized, x, shift, scale, 1e-6, eight_bit, orders=orders)
    expected = modulate_reference.modulate_quantized(x, shift, scale, 1e-6, eight_bit)
    assert torch.allclose(run[1], expected[1], rtol=1e-6, atol=0)
    step = (run[0].view(torch.int8).int() - expected[0].view(torch.int8).int()).abs()
    assert step.max() <= 1 and (step > 0).sum() <= 1e-3 * step.numel()
    assert run[0].dtype == eight_bit and not run[0].float()[..., C:].any()


@pytest.mark.parametrize("eight_bit", EIGHT_BIT, ids=str)
@pytest.mark.parametrize(("shape", "dtype"), [((2, 5, 2240), torch.bfloat16), ((1, 3, 250), torch.float32)])
def test_modulate_quantized(module, shape, dtype, eight_bit):
    check_modulate_quantized(module, *shape, dtype, eight_bit)


# ---- quantize


def check_quantize(module, x, eight_bit, orders=emulated.ORDERS):
    out = emulated.run(module, gemm_cuda.quantize, x, eight_bit, orders=orders)
    for actual, expected in zip(out, gemm_reference.quantize(x, eight_bit), strict=True):
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def hard_rows(rows: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    """Outliers; ties of rounding; rows of zeros, of almost zeros and of the largest numbers."""
    x = signed(rows, K)
    x[1] = torch.arange(K).remainder(255) / 2 - 63.5
    x[1, 0] = 127
    x[2], x[3], x[4] = 0, 2.0**-101, x[4].sign() * torch.finfo(dtype).max
    return x.to(dtype)


@pytest.mark.parametrize("eight_bit", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [2240, 5600, 1, 100, 1023])
def test_quantize_is_exact_to_the_bit(module, K, dtype, eight_bit):
    check_quantize(module, hard_rows(7, K, dtype), eight_bit)
    check_quantize(module, hard_rows(6, K + 8, dtype)[:, :K].unflatten(0, (2, 3)), eight_bit)


# ---- depthwise_glu


def check_depthwise_glu(
    module, B, height, width, F, dtype, weights=None, orders=emulated.ORDERS, of_rms=None, taps=False
):
    h = signed(B, height * width, 2 * F).to(dtype)
    weight, bias = (t.to(weights or dtype) for t in (torch.randn(2 * F, 1, 3, 3) / 3, torch.randn(2 * F)))
    weight = taps_first(weight) if taps else weight
    (out,) = emulated.run(module, mix_ffn_cuda.depthwise_glu, h, height, width, weight, bias, orders=orders)
    same_dtype = mix_ffn_reference.depthwise_glu(h, height, width, weight.to(dtype), bias.to(dtype))
    oracle = mix_ffn_reference.depthwise_glu(*double(h, height, width, weight, bias))
    if of_rms:
        assert_close(out, oracle, of_rms)
    else:
        assert_kernel(out, same_dtype, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "weights"),
    [
        ((1, 1, 1, 5600), None),
        ((2, 9, 5, 2880), None),
        ((3, 16, 17, 360), torch.float32),  # whole tiles and a column more
        ((2, 9, 11, 1511), None),  # no vectors, an odd channel
    ],
    ids=str,
)
def test_depthwise_glu(module, shape, weights, dtype):
    check_depthwise_glu(module, *shape, dtype, weights)


@pytest.mark.parametrize("weights", [torch.float32, None], ids=str)
def test_depthwise_glu_reads_its_weight_in_either_layout(module, weights):
    check_depthwise_glu(module, 2, 3, 7, 75, torch.bfloat16, weights, taps=True)


@pytest.mark.parametrize("eight_bit", EIGHT_BIT, ids=str)
def test_depthwise_glu_quantized(module, eight_bit):
    """The 8-bit rows of the kernel's own result."""
    h, weight, bias = signed(2, 15, 300).bfloat16(), torch.randn(300, 1, 3, 3) / 3, torch.randn(300)
    args = h, 3, 5, weight, bias
    (u,) = emulated.run(module, mix_ffn_cuda.depthwise_glu, *args)
    out = emulated.run(module, mix_ffn_cuda.depthwise_glu_quantized, *args, eight_bit)
    for actual, expected in zip(out, gemm_reference.quantize(u, eight_bit), strict=True):
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


# ---- mix_ffn, made of these and of the matrix products


@pytest.mark.parametrize("eight_bit", [True, False])
def test_mix_ffn(module, eight_bit):
    """Beside the reference, of which u is not rounded to bf16 before it is quantised."""
    C, F = 72, 104
    x = signed(2, 15, C).bfloat16()
    matrices = signed(2 * F, C) * C**-0.5, signed(C, F) * F**-0.5
    if eight_bit:
        x, *(expand, project) = (gemm_reference.quantize(t) for t in (x, *matrices))
    else:
        expand, project = ((t.bfloat16(), None) for t in matrices)
        x = x, None
    others = [t.bfloat16() for t in (torch.randn(2 * F), torch.randn(2 * F, 1, 3, 3) / 3, torch.randn(2 * F))]
    gate, residual = signed(2, C).bfloat16(), signed(2, 15, C).bfloat16()
    args = *x, 3, 5, *expand, *others, *project, gate, residual
    assert mix_ffn_cuda.accepts_mix_ffn(*args) is None
    (out,) = emulated.run(module, mix_ffn_cuda.mix_ffn, *args)
    assert relative_rms(out, mix_ffn_reference.mix_ffn(*args)) < 0.01
    swapped = *x, 5, 3, *args[4:]
    assert relative_rms(out, mix_ffn_reference.mix_ffn(*swapped)) > 0.1


# ---- Planted defects

ROWS, MODULATE = "csrc/common/rows.cuh", "csrc/modulate/modulate.cu"
GLU = "csrc/mix_ffn/depthwise_glu.cu"
WARPS = "warp < static_cast<int>(blockDim.x / 32)"
DEFECTS = {  # name: edits, each of a file, what stands there, what to put in its place
    "reduce: no barrier before reading": ((ROWS, "__syncthreads();  // all warps have written", ""),),
    "reduce: no barrier before overwriting": (
        (ROWS, "__syncthreads();  // a reduction before this one has been read", ""),
    ),
    "reduce: the last warp is forgotten": ((ROWS, WARPS, f"1 + {WARPS}"),),
    "row: mask off by one": ((ROWS, "if (channel(pack) < C) {", "if (channel(pack) <= C) {"),),
    "variance: mean of squares minus square of mean": (
        (MODULATE, "return (x - mean) * (x - mean);", "return x * x - mean * mean;"),
    ),
    "modulate: the first image's row for all": ((MODULATE, "p.scale.read(b, ", "p.scale.read(0, "),),
    "modulate: padded rows read as contiguous": ((MODULATE, "token % p.N * p.token", "token % p.N * p.C"),),
    "quantize: rounding towards zero": ((ROWS, "__float2int_rn(value)", "static_cast<int>(value)"),),
    "quantize: no padding": ((ROWS, "if (channel(pack) >= out.width)", "if (channel(pack) >= C)"),),
    "quantize: sign not dropped": ((ROWS, "max(largest, fabsf(values[i]))", "max(largest, values[i])"),),
    "glu: no barrier": ((GLU, "cp_async_wait<0>();\n  __syncthreads();", "cp_async_wait<0>();"),),
    "glu: no wait": ((GLU, "cp_async_wait<0>();\n", ""),),
    "glu: halo off by one": ((GLU, "left - 1 + pixel % kTileColumns", "left + pixel % kTileColumns"),),
    "glu: the border is not zero": ((GLU, "x >= 0 && x < p.width &&", "x >= 0 && x <= p.width &&"),),
    "glu: no mask for rows": ((GLU, "if (row >= 2 && y < p.height) {", "if (row >= 2) {"),),
    "glu: a weight read as checkpoints have it": ((GLU, "k * p.weight_tap", "k"),),
    "glu: value and gate swapped": ((GLU, "{bottom[0] * silu(bottom[1])", "{bottom[1] * silu(bottom[0])"),),
}
# Compiled for float only.
SMALLER = tuple(
    (path, f"  if (p.dtype == DType::f16) return cuda_status(run<__half>({args}));\n"
     f"  return cuda_status(run<__nv_bfloat16>({args}));\n}}\n\n{after}", f"  return Status::bad_dtype;\n}}\n\n{after}")
    for path, args, after in (
        (MODULATE, "p, quantized, on", "Status gate"), (MODULATE, "p, on", "}  // namespace sana"),
        (GLU, "p, on", "}  // namespace sana"), ("csrc/gemm/quantize.cu", "p, out, on", "}  // namespace sana"),
    )
)  # fmt: skip


def check_all(module, orders=(0, 1)):
    float32, int8 = torch.float32, torch.int8
    check_modulate(module, 2, 3, 700, float32, padded=True, orders=orders)
    check_quantize(module, hard_rows(6, 200, float32), int8, orders=orders)
    check_quantize(module, -signed(2, 97).abs(), int8, orders=orders)
    check_depthwise_glu(module, 1, 9, 3, 72, float32, orders=orders, of_rms=1e-5, taps=True)


@pytest.fixture(scope="module")
def defective():
    return emulated.defective(DEFECTS, *SMALLER)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(defective, defect):
    with pytest.raises((AssertionError, RuntimeError)):
        check_all(defective[defect])


def test_the_cases_of_the_defects_pass_without_one(module):
    check_all(module)
