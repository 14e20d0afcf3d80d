"""The CUDA kernels without a GPU: their sources on the emulator, in several orders, and through nvcc for every target."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sana_bench import resources
from sana_kernels.linear_attention import cuda, reference
from tests import emulated
from tests.compare import assert_kernel, relative_rms

LINEAR_ATTENTION = "csrc/linear_attention/linear_attention.cu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def module():
    return emulated.cuda_module()


# ---- linear_attention


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
    results = []
    for seed in orders:
        with emulated.device(module, seed):
            q, k, v = emulated.guarded(qkv).unbind(split)
            out = cuda.linear_attention(q, k, v, *map(emulated.guarded, norms), 1e-5, 1e-15)
        results.append(out.clone())
    same_dtype = reference.linear_attention(*qkv.unbind(split), *norms)
    wide = [None if norm is None else norm.double() for norm in norms]
    assert_kernel(results[0], same_dtype, reference.linear_attention(*qkv.double().unbind(split), *wide))
    for out in results[1:]:
        assert torch.equal(out, results[0]), "the result depends on the order in which threads run"


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
    broken = emulated.cuda_module((LINEAR_ATTENTION, "dim3(heads, tiles)", "dim3(heads, tiles * 70000)"))
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
    "apply: no mask for the tail": ("if (n >= p.N) continue;", ""),
    "apply: too little shared memory": ("(p.D + kTokens) * (W + 1)", "(p.D + kTokens) * W"),
    "apply: the last chunk is forgotten": ("chunk < p.chunks; ++chunk) total", "chunk + 1 < p.chunks; ++chunk) total"),
    "apply: no epsilon": ("(denominator[s] + p.eps)", "denominator[s]"),
    "state: k in place of v": ("const T* value_at = p.v.at(b, h)", "const T* value_at = p.k.at(b, h)"),
    "state: fp16 accumulation": (
        "acc[r][c] += tile_acc[r][c];",
        "acc[r][c] = __half2float(__float2half_rn(acc[r][c] + tile_acc[r][c]));",
    ),
    "relu: missing": ("value < 0 ? 0 : value", "value"),
    "norm: q's scale for k": ("p.inverse_rms + (p.B + b) * p.N", "p.inverse_rms + b * p.N"),
    "norm: the first head's weights for all": ("p.inverse_rms + b * p.N, h * p.D}", "p.inverse_rms + b * p.N, 0}"),
    "norm: packed rows read as contiguous": ("row % p.N * view.token", "row % p.N * p.H * p.D"),
}
# They are compiled for float only, in a third of the time.
ONLY_FLOAT = (
    LINEAR_ATTENTION,
    "if (args.dtype == DType::f16) return cuda_status(run<__half>(args, scratch, on));\n"
    "  return cuda_status(run<__nv_bfloat16>(args, scratch, on));",
    "return Status::bad_dtype;",
)
CASES_OF_DEFECTS = [{"B": 2, "N": 300, "H": 2, "D": 32, "normed": True}, {"B": 1, "N": 1, "H": 1, "D": 8}]


@pytest.fixture(scope="module")
def defective():
    """Name of a defect → the module that has it; all compiled at once."""

    def build(name):
        return emulated.cuda_module((LINEAR_ATTENTION, *DEFECTS[name]), ONLY_FLOAT)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(DEFECTS, pool.map(build, DEFECTS), strict=True))


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(defective, defect):
    with pytest.raises((AssertionError, RuntimeError)):
        for case in CASES_OF_DEFECTS:
            check_attention(defective[defect], attention_inputs(**case))


def test_the_cases_of_the_defects_pass_without_one(module):
    for case in CASES_OF_DEFECTS:
        check_attention(module, attention_inputs(**case))


# ---- nvcc


@pytest.fixture(scope="module")
def nvcc():
    found = resources.find_nvcc()
    if found is None:
        pytest.skip("needs nvcc: install the CUDA toolkit or set NVCC")
    return found


@pytest.mark.slow
def test_no_kernel_spills_on_any_target(nvcc):
    usages = resources.measure(nvcc, resources.sources())
    assert {usage.target for usage in usages} == set(resources.TARGETS)
    assert [usage for usage in usages if usage.local] == []
    notes = resources.NOTES.read_text()
    missing = {usage.kernel for usage in usages if f"`{usage.kernel}`" not in notes}
    assert not missing, f"{resources.NOTES.name} lacks {sorted(missing)}; write it again: {resources.COMMAND}"


@pytest.mark.slow
def test_every_ptx_instruction_assembles_for_every_target(nvcc):
    usages = resources.measure(nvcc, [emulated.ROOT / "tests" / "emulator_kernels.cu"])
    kernels = {usage.kernel for usage in usages if usage.target == "80"}
    assert all({u.kernel for u in usages if u.target == target} == kernels for target in resources.TARGETS)
    assert sum("mma_kernel" in kernel for kernel in kernels) == 4


SPILLING = """
__global__ void __launch_bounds__(1024) spilling(const float* in, float* out) {
  float x[96];
  for (int i = 0; i < 96; ++i) x[i] = in[i * 1024 + threadIdx.x];
  for (int round = 0; round < 9; ++round) {
    for (int i = 0; i < 96; ++i) x[i] = x[i] * x[(i + 1) % 96] + x[(i + 7) % 96];
  }
  for (int i = 0; i < 96; ++i) out[i * 1024 + threadIdx.x] = x[i];
}
__global__ void indexed(const int* at, int* out) {
  int x[32];
  for (int i = 0; i < 32; ++i) x[i] = i;
  for (int i = 0; i < 99; ++i) x[at[i] & 31] = i;
  out[threadIdx.x] = x[at[threadIdx.x] & 31];
}
__global__ void clean(float* out) { out[threadIdx.x] = 1; }
"""


def test_the_table_knows_spills_and_local_arrays(nvcc, tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    usages = resources.parse(resources.compile_log(nvcc, source, "80"), source.name, "80")
    names = resources.readable(usage.kernel for usage in usages)
    local = {names[usage.kernel]: usage.local for usage in usages}
    assert local["spilling"] > 0
    assert local["indexed"] == 128
    assert local["clean"] == 0
    assert "B local" in resources.table(usages)


def test_sources_that_do_not_compile_are_named(nvcc, tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void f() { missing(); }")
    with pytest.raises(RuntimeError, match=r"broken.cu does not compile for sm_80(.|\n)*missing"):
        resources.compile_log(nvcc, source, "80")


def test_targets_are_those_of_the_build():
    archs = re.search(r"ALL_ARCHS = \[(.*)\]", (emulated.ROOT / "setup.py").read_text())[1]
    assert set(re.findall(r'"(\w+)"', archs)) == {*resources.TARGETS, "compute_80"}
