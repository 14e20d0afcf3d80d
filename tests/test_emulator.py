"""csrc/emulator against plain loops, against a GPU where there is one, and against the mistakes that it has to catch."""

import ctypes
import subprocess

import numpy as np
import pytest
import torch

from sana_bench.resources import find_nvcc
from tests import emulated
from tests.compare import assert_close

SOURCE = "tests/emulator_kernels.cu"
INT32 = torch.int32


class Kernels:
    """The entry points of emulator_kernels.cu: a call takes tensors and integers, and returns what became of the tensors."""

    def __init__(self, library: ctypes.CDLL, gpu: bool = False):
        self.library, self.gpu = library, gpu
        self.library.error_text.restype = ctypes.c_char_p

    def _call(self, entry: str, args) -> list[torch.Tensor]:
        made = [self._place(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        raw = [ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, torch.Tensor) else arg for arg in made]
        if error := getattr(self.library, entry)(*raw):
            raise RuntimeError(self.library.error_text(error).decode())
        return [arg.cpu() for arg in made if isinstance(arg, torch.Tensor)]

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cuda() if self.gpu else emulated.guarded(tensor)

    def __call__(self, entry: str, *args) -> list[torch.Tensor]:
        if self.gpu:
            return self._call(entry, args)
        results = []
        for seed in emulated.ORDERS:
            with emulated.memory(seed):
                results.append([out.clone() for out in self._call(entry, args)])
        for other in results[1:]:
            same = [
                torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(results[0], other, strict=True)
            ]
            assert all(same), f"{entry}: the result depends on the order in which threads run"
        return results[0]


@pytest.fixture(scope="module")
def emulator():
    return Kernels(emulated.load(SOURCE))


@pytest.fixture(scope="module", params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request, tmp_path_factory):
    """The emulator; and the GPU, which says whether the emulator is right."""
    if request.param == "emulator":
        return request.getfixturevalue("emulator")
    if (nvcc := find_nvcc()) is None:
        pytest.skip("needs nvcc to compile for the GPU")
    library = tmp_path_factory.mktemp("nvcc") / "kernels.so"
    flags = ["-std=c++17", "-O3", f"-I{emulated.CSRC}", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC"]
    subprocess.run([nvcc, *flags, "-arch=native", str(emulated.ROOT / SOURCE), "-o", str(library)], check=True)
    return Kernels(ctypes.CDLL(str(library)), gpu=True)


# ---- Kernels that are right, and their planted defects


def check_reverse(run):
    x = torch.randn(3, 128)
    assert torch.equal(run("reverse", x, torch.empty(3, 128), 3)[1], x.flip(1))


def check_column_sums(run):
    x = torch.randint(-99, 99, (5, 96)).float()
    assert torch.equal(run("column_sums", x, torch.empty(96), 5, 96)[1], x.sum(0))


def check_tree_sum(run):
    x = torch.randint(-99, 99, (32,)).float()
    assert torch.equal(run("tree_sum", x, torch.empty(32))[1], x.sum().expand(32))


def check_pipeline(run):
    x = torch.randn(7, 32)
    assert torch.equal(run("pipeline", x, torch.empty(7, 32), 7)[1], x.flip(1))


def check_gemm(run):
    a, b = (torch.randint(-128, 128, (n, 96), dtype=torch.int8) for n in (16, 8))
    expected = (a.double() @ b.double().T).to(INT32)
    assert torch.equal(run("gemm", a, b, torch.empty(16, 8, dtype=INT32), 96)[2], expected)


CHECKS = {
    "reverse": check_reverse,
    "column_sums": check_column_sums,
    "tree_sum": check_tree_sum,
    "pipeline": check_pipeline,
    "gemm": check_gemm,
}
BARRIER_AND_FETCH = (
    "__syncthreads();  // all copies of this row have landed, and nobody reads the row before it any more\n"
    "    fetch(row + 2);"
)
DEFECTS = {  # kernel: what stands there, what to put in its place
    "reverse": [
        ("__syncthreads();\n  out[blockIdx.x", "out[blockIdx.x"),
        ("__syncthreads();\n  out[blockIdx.x", "__syncwarp();\n  out[blockIdx.x"),
        ("row[127 - threadIdx.x]", "row[128 - threadIdx.x]"),
    ],
    "column_sums": [
        ("__syncthreads();  // before reading", ""),
        ("__syncthreads();  // before overwriting", ""),
    ],
    "tree_sum": [
        ("value[threadIdx.x] = in[threadIdx.x];\n  __syncwarp();", "value[threadIdx.x] = in[threadIdx.x];"),
        ("__syncwarp();  // before overwriting", ""),
        ("__syncwarp();  // before reading", ""),
    ],
    "pipeline": [
        ("cp_async_wait<1>();\n    __sync", "__sync"),
        ("cp_async_wait<1>();\n    __sync", "cp_async_wait<2>();\n    __sync"),
        (BARRIER_AND_FETCH, "fetch(row + 2);"),
        (BARRIER_AND_FETCH, "fetch(row + 2);\n    __syncthreads();"),
    ],
    "gemm": [
        ("&a[threadIdx.x % 16][threadIdx.x / 16 * 16]", "&a[threadIdx.x / 2][threadIdx.x % 2 * 16]"),
        ("ldmatrix(fb,", "ldmatrix_trans(fb,"),
        ("2 * t + r % 2] = d[r]", "t + 4 * (r % 2)] = d[r]"),
        ("__syncwarp();\n    uint32_t fa[4]", "uint32_t fa[4]"),
    ],
}


@pytest.mark.parametrize("kernel", CHECKS)
def test_a_right_kernel_is_right_in_every_order(kernels, kernel):
    CHECKS[kernel](kernels)


@pytest.mark.parametrize(("kernel", "number"), [(k, i) for k, edits in DEFECTS.items() for i in range(len(edits))])
def test_a_planted_defect_is_caught(kernel, number):
    # The i-th defects of all kernels are compiled together.
    edits = [(SOURCE, *edits[number]) for edits in DEFECTS.values() if number < len(edits)]
    with pytest.raises((AssertionError, RuntimeError)):
        CHECKS[kernel](Kernels(emulated.load(SOURCE, *edits)))


def test_the_other_way_to_switch_stacks():
    run = Kernels(emulated.load(SOURCE, flags=("-DSANA_EMULATED_UCONTEXT",)))
    for check in CHECKS.values():
        check(run)


# ---- Every function against plain loops


def test_indices(kernels):
    out = kernels("indices", torch.empty(2 * 3 * 2 * 3 * 2 * 6, dtype=INT32))[0]
    blocks = [(z * 10 + y) * 10 + x for z in range(2) for y in range(3) for x in range(2)]
    threads = [z * 100 + y * 10 + x for z in range(6) for y in range(2) for x in range(3)]
    assert out.tolist() == [block + 1000 * thread for block in blocks for thread in threads]


def test_warp_operations(kernels):
    x = torch.randint(-(2**30), 2**30, (32,), dtype=INT32)
    out = kernels("warp", x, torch.empty(14, 32, dtype=INT32))[1].tolist()
    v, lanes = x.tolist(), range(32)

    def from_lane(source):
        return [v[source(lane)] for lane in lanes]

    def wrapped(n):
        return (n + 2**31) % 2**32 - 2**31

    unsigned = [n % 2**32 for n in v]
    expected = {
        "idx": from_lane(lambda lane: (lane * 7 + 3) % 32),
        "idx, width 8": from_lane(lambda lane: lane // 8 * 8 + 2),
        "xor": from_lane(lambda lane: lane ^ 5),
        "up": from_lane(lambda lane: lane - 3 if lane >= 3 else lane),
        "up, width 16": from_lane(lambda lane: lane - 3 if lane % 16 >= 3 else lane),
        "down": from_lane(lambda lane: lane + 4 if lane < 28 else lane),
        "down, width 8": from_lane(lambda lane: lane + 4 if lane % 8 < 4 else lane),
        "sum": [wrapped(sum(v))] * 32,
        "min": [min(v)] * 32,
        "max": [max(v)] * 32,
        "unsigned max": [wrapped(max(unsigned))] * 32,
        "ballot": [wrapped(sum(1 << lane for lane in lanes if v[lane] > 0))] * 32,
        "sums of two masks": [wrapped(sum(v[:12]))] * 12 + [wrapped(sum(v[12:]))] * 20,
        "double": from_lane(lambda lane: lane ^ 1),
    }
    for (name, values), actual in zip(expected.items(), out, strict=True):
        assert actual == values, name


def test_integer_atomics(kernels):
    x = torch.randint(-1000, 1000, (256,), dtype=INT32)
    out, wide = kernels(
        "atomics", x, torch.tensor([0, 0, 0, 0, -1, 0], dtype=INT32), torch.zeros(1, dtype=torch.int64)
    )[1:]
    assert out.tolist() == [256, x.sum().item(), x.min().item(), x.max().item(), 7, 9]
    assert wide.item() == x.max().item() << 32


def test_float_atomics_do_not_compile():
    edit = (SOURCE, "atomicAdd(&out[1], x);", "atomicAdd(reinterpret_cast<float*>(&out[1]), 1.0f);")
    with pytest.raises(RuntimeError, match="no atomics on floats"):
        emulated.load(SOURCE, edit)


def test_intrinsics(kernels):
    a = torch.tensor([2.5, 3.5, 0.1, 1e-6, 7.0, 30.0, 0.49999997, float("nan"), 3e9, 1.5])
    b = torch.tensor([-1.0, 4.0, float("nan"), 3.0, 7.0, -0.3, 1e3, 1.0, 2.0, -0.0])
    n = len(a)
    out = kernels("intrinsics", a, b, torch.empty(10, n), n)[2]
    i = torch.arange(n).float()
    expected = [a.fmin(b), a.fmax(b), a.rsqrt(), a.exp(), a / b]
    expected += [torch.tensor([2.0, 4, 0, 0, 7, 30, 0, 0, 2**31, 2]), -a, a.abs(), (i - 5).clamp_max(3), i.clamp_min(3)]
    for k, values in enumerate(expected):
        exact = k not in (2, 3, 4)  # the GPU approximates these three
        torch.testing.assert_close(
            out[k], values, rtol=0 if exact else 1e-5, atol=0, equal_nan=True, msg=f"operation {k}"
        )


def test_byte_perm(kernels):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, (32, 3), dtype=np.uint32).view(np.int32))
    out = kernels("byte_perm", x, torch.empty(32, dtype=INT32))[1]
    for (a, b, selector), actual in zip(x.tolist(), out.tolist(), strict=True):
        pool = (a % 2**32).to_bytes(4, "little") + (b % 2**32).to_bytes(4, "little")
        nibbles = [(selector % 2**32) >> 4 * i & 15 for i in range(4)]
        chosen = [pool[n % 8] if n < 8 else 255 * (pool[n % 8] >> 7) for n in nibbles]
        assert actual % 2**32 == int.from_bytes(bytes(chosen), "little")


# Where PTX ISA ("Matrix Fragments for mma.…") puts element i of a lane's A, B and C: (row, column), from
# groupID = lane >> 2 and threadID_in_group = lane % 4.
FRAGMENTS = {
    16: (  # m16n8k16: 8 elements of A, 4 of B
        lambda i, group, thread: (
            group if 0 <= i < 2 or 4 <= i < 6 else group + 8,
            thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8,
        ),
        lambda i, group, thread: (thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8, group),
    ),
    32: (  # m16n8k32: 16 and 8
        lambda i, group, thread: (
            group if 0 <= i < 4 or 8 <= i < 12 else group + 8,
            thread * 4 + (i & 3) if i < 8 else thread * 4 + (i & 3) + 16,
        ),
        lambda i, group, thread: (thread * 4 + (i & 3) if i < 4 else thread * 4 + (i & 3) + 16, group),
    ),
    64: (  # m16n8k64: 32 and 16
        lambda i, group, thread: (
            group if 0 <= i < 8 or 16 <= i < 24 else group + 8,
            thread * 8 + (i & 7) if i < 16 else thread * 8 + (i & 7) + 32,
        ),
        lambda i, group, thread: (thread * 8 + (i & 7) if i < 8 else thread * 8 + (i & 7) + 32, group),
    ),
}
MMA = {  # K, dtype of the elements
    "mma_f16": (16, torch.float16),
    "mma_bf16": (16, torch.bfloat16),
    "mma_s8": (32, torch.int8),
    "mma_s4": (64, torch.int8),
}


def pack(matrix: torch.Tensor, K: int, registers: int, place) -> torch.Tensor:
    """The matrix as (32 lanes, registers) of 32 bits, element 0 of a register in its lowest bits."""
    bits = {16: 16, 32: 8, 64: 4}[K]
    raw = matrix.view(torch.int16) if bits == 16 else matrix
    packed = [[0] * registers for _ in range(32)]
    for lane in range(32):
        for i in range(registers * 32 // bits):
            value = int(raw[place(i, lane >> 2, lane % 4)]) & (1 << bits) - 1
            packed[lane][i * bits // 32] |= value << i * bits % 32
    return torch.tensor(packed, dtype=torch.int64).to(INT32)


def accumulator(matrix: torch.Tensor) -> torch.Tensor:
    """(16, 8) as (32 lanes, 4)."""
    places = [
        [(lane >> 2 if i < 2 else (lane >> 2) + 8, lane % 4 * 2 + (i & 1)) for i in range(4)] for lane in range(32)
    ]
    return torch.stack([torch.stack([matrix[place] for place in lane]) for lane in places])


@pytest.mark.parametrize("entry", MMA)
def test_mma(kernels, entry):
    K, dtype = MMA[entry]
    low, high = {16: (-64, 64), 32: (-128, 128), 64: (-8, 8)}[K]  # whole numbers, so that float sums are exact, too
    a, b = torch.randint(low, high, (16, K)).to(dtype), torch.randint(low, high, (K, 8)).to(dtype)
    c = torch.randint(-1000, 1000, (16, 8))
    expected = (c.double() + a.double() @ b.double()).to(torch.float32 if K == 16 else INT32)
    place_a, place_b = FRAGMENTS[K]
    fa, fb, fc = pack(a, K, 4, place_a), pack(b, K, 2, place_b), accumulator(c).to(expected.dtype)
    assert torch.equal(kernels(entry, fa, fb, fc)[2], accumulator(expected))
    swapped = fa[:, [0, 2, 1, 3]].contiguous()  # the control: rows and halves of k mixed up
    assert not torch.equal(kernels(entry, swapped, fb, fc)[2], accumulator(expected))


@pytest.mark.parametrize("entry", ["mma_f16", "mma_bf16"])
def test_mma_rounds_like_floats(kernels, entry):
    dtype = MMA[entry][1]
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), 30 * torch.randn(16, 8)
    a[:, 3] *= 30
    place_a, place_b = FRAGMENTS[16]
    out = kernels(entry, pack(a, 16, 4, place_a), pack(b, 16, 2, place_b), accumulator(c))[2]
    assert_close(out, accumulator(c.double() + a.double() @ b.double()), 1e-6, entry)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_ldmatrix(kernels, count, transpose):
    matrices = torch.randint(-(2**15), 2**15, (count, 8, 8)).to(torch.int16)
    entry = f"ldmatrix_x{count}" + ("_trans" if transpose else "")
    out = kernels(entry, matrices, torch.empty(32, count, dtype=INT32))[1]
    halves = out.view(torch.int16).view(32, count, 2)
    for lane in range(32):
        for m in range(count):
            source = matrices[m].T if transpose else matrices[m]
            assert torch.equal(halves[lane, m], source[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]), (lane, m)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_copies_and_zeroes(kernels, size):
    data = torch.randint(1, 127, (32, size), dtype=torch.int8)
    valid = (torch.arange(32) % (size + 1)).to(INT32)
    out = kernels(f"copy_{size}", data, valid, torch.empty(32, size, dtype=torch.int8))[2]
    assert torch.equal(out, data * (torch.arange(size) < valid[:, None]))


def test_cp_async_does_not_read_what_is_not_valid(emulator):
    valid = torch.zeros(32, dtype=INT32)
    assert not emulator("copy_16", None, valid, torch.empty(32, 16, dtype=torch.int8))[1].any()


# ---- Mistakes

MISTAKES = {
    0: r"32 have returned, .* 32 wait at __syncthreads \(emulator_kernels.cu:\d+\), such as thread \(0, 0, 0\)",
    1: r"32 wait at __syncthreads .* 32 wait at __syncthreads",
    2: r"1 have returned, such as thread \(5, 0, 0\); 63 wait at __syncthreads",
    3: r"31 wait at __shfl_xor_sync .* with the mask 0xffffffff.* wait at __syncwarp",
    4: r"a shuffle reads from a lane that its mask leaves out",
    5: r"thread \(0, 0, 0\): __syncwarp at emulator_kernels.cu:\d+: the mask leaves the calling lane out",
    6: r"thread \(9, 0, 0\): touched 0x\w+, where there is no buffer",
    7: r"thread \(9, 0, 0\): touched 0x\w+, where there is no buffer",
    8: r"thread \(9, 0, 0\): unaligned access at emulator_kernels.cu:\d+",
    9: r"thread \(9, 0, 0\): touched 0x\w+, where there is no buffer",
    10: r"thread \(9, 0, 0\): integer division by zero at emulator_kernels.cu:\d+",
    11: r"thread \(9, 0, 0\): cp.async: not an address in shared memory",
    12: r"thread \(9, 0, 0\): cp.async: unaligned shared address",
    13: r"4 bytes outside of a buffer were written, the first at -4",
    14: r"thread \(9, 0, 0\): array index out of bounds at emulator_kernels.cu:\d+",
    15: r"thread \(9, 0, 0\): shift by too many bits at emulator_kernels.cu:\d+",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(emulator, mistake):
    with pytest.raises((RuntimeError, AssertionError), match=MISTAKES[mistake]) as error:
        emulator("mistake", torch.zeros(8), 8, mistake)
    if mistake != 13:
        assert "mistake_kernel: block (0, 0, 0)" in str(error.value)
    check_reverse(emulator)  # and the next launch is in order


@pytest.mark.parametrize(
    ("threads", "blocks", "shared", "message"),
    [
        (1025, 1, 0, "1 to 1024 threads"),
        (0, 1, 0, "1 to 1024 threads"),
        (32, 0, 0, "at least one block"),
        (32, 1, 99 * 1024 + 1, "99 KB of shared memory"),
    ],
)
def test_launches_that_no_gpu_takes(emulator, threads, blocks, shared, message):
    with pytest.raises(RuntimeError, match=message):
        emulator("launch_of", threads, blocks, shared)
