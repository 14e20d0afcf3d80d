"""The CUDA linear attention on the emulator: the plain kernels, and those on tensor cores for bfloat16 with D = 32."""

import pytest
import torch
from compare import assert_kernel, relative_rms

from sana_kernels.linear_attention import cuda, reference
from tests import emulated

LAUNCHES, KERNELS = (f"csrc/linear_attention/linear_attention.{suffix}" for suffix in ("cu", "cuh"))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def module():
    return emulated.cuda_module()


def edit(old, new):
    """An edit of the one of the two sources that holds the text."""
    return (LAUNCHES if old in (emulated.ROOT / LAUNCHES).read_text() else KERNELS), old, new


def attention_inputs(B, N, H, D, *, normed=False, heads_first=False, dtype=torch.float32):
    """q, k, v as one packed tensor with outliers and a token whose q is all negative; the weights of the qk-norm."""
    qkv = torch.randn(B, N, H, 3, D) if heads_first else torch.randn(B, N, 3, H, D)
    qkv[..., 0] *= 30
    q = qkv.select(3 if heads_first else 2, 0)
    q[:, N // 2] = -q[:, N // 2].abs()
    norms = [(1 + 0.3 * torch.randn(H * D)).to(dtype) if normed else None for _ in range(2)]
    return qkv.to(dtype), 3 if heads_first else 2, norms


def check_attention(module, inputs, orders=emulated.ORDERS):
    """Within the tolerances of tests/compare.py, in every order the same bytes, nothing touched beyond a buffer."""
    qkv, split, norms = inputs

    def attend(qkv, *norms):
        return cuda.linear_attention(*qkv.unbind(split), *norms, 1e-5, 1e-15)

    (out,) = emulated.run(module, attend, qkv, *norms, orders=orders)
    same_dtype = reference.linear_attention(*qkv.unbind(split), *norms)
    wide = [None if norm is None else norm.double() for norm in norms]
    assert_kernel(out, same_dtype, reference.linear_attention(*qkv.double().unbind(split), *wide))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {"B": 1, "N": 1, "H": 1, "D": 8},
        {"B": 1, "N": 1, "H": 2, "D": 32, "normed": True},
        {"B": 2, "N": 1008, "H": 2, "D": 32},
        {"B": 1, "N": 1023, "H": 3, "D": 32, "normed": True},
        {"B": 2, "N": 33, "H": 70, "D": 32, "normed": True},  # the width of the 1.6B
        {"B": 3, "N": 140, "H": 2, "D": 72, "heads_first": True},
        {"B": 1, "N": 65, "H": 2, "D": 112, "normed": True, "heads_first": True},
        {"B": 1, "N": 257, "H": 1, "D": 128},
        {"B": 1, "N": 2100, "H": 1, "D": 16},  # chunks of more than the least length
    ],
    ids=lambda shape: "-".join(f"{name}{value}" for name, value in shape.items()),
)
def test_linear_attention(module, shape, dtype):
    check_attention(module, attention_inputs(**shape, dtype=DTYPES[dtype]))


def test_linear_attention_takes_float_norms_with_half_inputs(module):
    qkv, split, norms = attention_inputs(2, 50, 3, 32, normed=True, dtype=torch.bfloat16)
    with emulated.device(module, seed=0):
        q, k, v = emulated.guarded(qkv).unbind(split)
        out = cuda.linear_attention(q, k, v, *(emulated.guarded(norm.float()) for norm in norms), 1e-5, 1e-15)
    oracle = reference.linear_attention(*qkv.double().unbind(split), *(norm.double() for norm in norms))
    assert relative_rms(out, oracle) < 3e-3  # bfloat16 rounds to 1.7e-3


def test_errors_of_a_launch_reach_python():
    """N = 3,000,000 would need more tiles of 32 tokens than a grid has along y."""
    broken = emulated.cuda_module(
        edit("dim3(heads, tiles), block, shared", "dim3(heads, tiles * 70000), block, shared")
    )
    with pytest.raises(RuntimeError, match=r"CUDA: .*apply_kernel.*a grid has .* at most 65535 along y"):
        check_attention(broken, attention_inputs(1, 8, 1, 8))


DEFECTS = {
    "state: no barrier before reading": (
        "return to_float(value_at[n * p.v.token + d]); });\n    __syncthreads();",
        "return to_float(value_at[n * p.v.token + d]); });",
    ),
    "state: no barrier before overwriting": (
        "acc[r][c] += tile_acc[r][c];\n    }\n    __syncthreads();",
        "acc[r][c] += tile_acc[r][c];\n    }",
    ),
    "apply: no barrier before reading": ("h * p.D});\n  __syncthreads();", "h * p.D});"),
    "apply: only the warp waits": ("h * p.D});\n  __syncthreads();", "h * p.D});\n  __syncwarp();"),
    "tile: no mask for the tail": ("first + t < last && d < D", "d < D"),
    "tile: mask off by one": ("first + t < last && d < D", "first + t <= last && d < D"),
    "apply: no mask for the tail": ("if (n >= p.N) continue;\n    T* out", "T* out"),
    "apply: too little shared memory": ("(p.D + kTokens) * (W + 1)", "(p.D + kTokens) * W"),
    "sum: the last chunk is forgotten": ("chunk < chunks; ++chunk) total", "chunk + 1 < chunks; ++chunk) total"),
    "apply: no epsilon": ("(denominator[s] + p.eps)", "denominator[s]"),
    "state: k in place of v": ("const T* value_at = p.v.at(b, h)", "const T* value_at = p.k.at(b, h)"),
    "state: fp16 accumulation": (
        "acc[r][c] += tile_acc[r][c];",
        "acc[r][c] = __half2float(__float2half_rn(acc[r][c] + tile_acc[r][c]));",
    ),
    "relu: missing": ("value < 0 ? 0 : value", "value"),
    "norm: q's scale for k": ("p.k_weight, p.inverse_rms + (p.B + b) * p.N", "p.k_weight, p.inverse_rms + b * p.N"),
    "norm: the first head's weights for all": ("p.inverse_rms + b * p.N, h * p.D}", "p.inverse_rms + b * p.N, 0}"),
    "norm: packed rows read as contiguous": ("row % p.N * view.token", "row % p.N * p.H * p.D"),
}
DEFECTS_BF16 = {
    "state: no wait": ("cp_async_wait<1>();\n    __syncwarp();", "__syncwarp();"),
    "state: no barrier of the warp before reading": ("__syncwarp();  // the tile is there for all lanes", ""),
    "state: no barrier before the sum": ("__syncthreads();  // the states of all warps are there", ""),
    "state: copies land on the sums": ("__syncwarp();  // the last copies of all lanes", "//"),
    "state: no mask for the tail": ("i % 4 * 8 : k, n < end ? 16 : 0", "i % 4 * 8 : k, 16"),
    "state: pieces of k crossed": ("2 * i + lane / 8 % 2", "2 * i + 1 - lane / 8 % 2"),
    "state: k and v swapped": ("cp_async<16>(to + kTile, n < end ? v", "cp_async<16>(to + kTile, n < end ? k"),
    "state: one warp's sum is missing": ("w < kWarps; ++w", "w + 1 < kWarps; ++w"),
    "split: no low part": ("first - __low2float(rounded)", "0"),
    "apply: columns not permuted": ("g / 2 * 8 + 2 * d + g % 2 : kHead", "8 * d + g : kHead"),
    "apply: the state's low part is dropped": ("mma_m16n8k16_bf16(out[d], fq[s], low[s][d]);", ""),
    "apply: no mask for the tail": ("if (n >= p.N) continue;\n      const float denominator", "const float denominator"),
    "relu: none": ("return x < 0 ? 0 : x;", "return x;"),
    "norm: k's weight for another channel": ("16 * i + 8 * r + g]", "16 * i + g]"),
}  # fmt: skip
# Compiled for one type only, in a third of the time.
SWITCH = """  if (args.dtype == DType::f32) return cuda_status(run<float>(args, scratch, on));
  if (args.dtype == DType::f16) return cuda_status(run<__half>(args, scratch, on));
  return cuda_status(run<__nv_bfloat16>(args, scratch, on));"""
WIDTHS = """  if (p.D <= 16) return launch<T, 16>(p, stream);
  if (p.D <= 32) return launch<T, 32>(p, stream);
  if (p.D <= 64) return launch<T, 64>(p, stream);
  return launch<T, 128>(p, stream);"""
ONLY_FLOAT = edit(SWITCH, "  return cuda_status(run<float>(args, scratch, on));")
ONLY_BF16 = edit(SWITCH, "  return cuda_status(run<__nv_bfloat16>(args, scratch, on));")
ONLY_NARROW = edit(WIDTHS, "  return launch<T, 32>(p, stream);")
ONLY_TENSOR_CORES = edit(WIDTHS, "  return cudaErrorInvalidValue;")
CASES_OF_DEFECTS = [{"B": 2, "N": 300, "H": 2, "D": 32, "normed": True}, {"B": 1, "N": 1, "H": 1, "D": 8}]
CASES_OF_DEFECTS_BF16 = [
    {"B": 2, "N": 300, "H": 2, "D": 32, "normed": normed, "dtype": torch.bfloat16} for normed in (True, False)
]


@pytest.fixture(scope="module")
def defective():
    plain = {name: (edit(*defect),) for name, defect in DEFECTS.items()}
    bf16 = {f"bf16 {name}": (edit(*defect),) for name, defect in DEFECTS_BF16.items()}
    return {
        **emulated.defective(plain, ONLY_FLOAT, ONLY_NARROW),
        **emulated.defective(bf16, ONLY_BF16, ONLY_TENSOR_CORES),
    }


@pytest.mark.parametrize(
    ("defect", "cases"),
    [(name, CASES_OF_DEFECTS) for name in DEFECTS] + [(f"bf16 {name}", CASES_OF_DEFECTS_BF16) for name in DEFECTS_BF16],
)
def test_a_planted_defect_is_caught(defective, defect, cases):
    with pytest.raises((AssertionError, RuntimeError)):
        for case in cases:
            check_attention(defective[defect], attention_inputs(**case), orders=(0, 1))


def test_the_cases_of_the_defects_pass_without_one(module):
    for case in CASES_OF_DEFECTS + CASES_OF_DEFECTS_BF16:
        check_attention(module, attention_inputs(**case))
