"""The CUDA matrix products on the emulator: integer sums to the bit, epilogues against fp64, planted defects."""

from unittest import mock

import pytest
import torch
from variants import signed

from sana_kernels.gemm import cuda, reference
from tests import emulated

TILES = range(len(cuda.TILES))
SMALLEST = len(cuda.TILES) - 1


@pytest.fixture(scope="module")
def module():
    return emulated.cuda_module()


def with_tile(index: int):
    return mock.patch.object(cuda, "tile", lambda *_: index)


# ---- W8A8


def int8_rows(*shape: int) -> torch.Tensor:
    """All of int8's range, and two rows whose products are the largest of either sign."""
    x = torch.randint(-127, 128, shape, dtype=torch.int8)
    x.view(-1, shape[-1])[0] = 127
    x.view(-1, shape[-1])[-1] = -127
    return x


def check_sums(module, B, M, N, K, tile, orders=emulated.ORDERS):
    x, weight = int8_rows(B, M, K), int8_rows(N, K)
    ones = torch.ones(B, M), torch.ones(N)
    with with_tile(tile):
        args = x, ones[0], weight, ones[1], None, False, None, None, torch.float32
        (out,) = emulated.run(module, cuda.gemm, *args, orders=orders)
    expected = x.double() @ weight.double().t()
    assert torch.equal(out, expected.float())  # beyond 2^24 fp32 rounds the exact sum once


@pytest.mark.parametrize("tile", TILES)
def test_sums_are_exact_in_every_tile(module, tile):
    rows, columns, _ = cuda.TILES[tile]
    check_sums(module, 1, rows + 1, columns + 8, 320, tile)


@pytest.mark.parametrize(
    "shape", [(1, 1, 16, 64), (1, 2, 2240, 1152), (2, 3, 64, 5632), (1, 1023, 24, 128), (3, 5, 67, 192)], ids=str
)
def test_sums_are_exact_in_awkward_shapes(module, shape):
    check_sums(module, *shape, SMALLEST)


def check_epilogue(module, B, M, N, dtype, *, bias=None, silu=False, gate=None, residual=None, tile=SMALLEST,
                   padded=False, orders=emulated.ORDERS):  # fmt: skip
    """Against the products of the dequantised rows in fp64; bias, gate and residual are given as their dtypes."""
    K = 128
    x, x_scale = reference.quantize(signed(B, M, K))
    weight, weight_scale = reference.quantize(signed(N, K) / 8)
    bias = None if bias is None else signed(N).to(bias)
    gate = None if gate is None else signed(B, 6, N).to(gate)[:, 5]
    if residual is not None:
        residual = signed(B, M, N + 24 * padded).to(residual)[..., :N]
    args = x, x_scale, weight, weight_scale, bias, silu, gate, residual, dtype
    with with_tile(tile):
        (out,) = emulated.run(module, cuda.gemm, *args, orders=orders)
    wide = [None if t is None else t.double() for t in (bias, gate, residual)]
    rows = reference.dequantize(x, x_scale), reference.dequantize(weight, weight_scale)
    oracle = reference.gemm(rows[0], None, rows[1], None, wide[0], silu, *wide[1:], torch.float64)
    assert out.dtype == dtype
    # One rounding to the result's dtype, of a value that is right to fp32.
    limit = torch.finfo(dtype).eps / 2 * oracle.abs() + 1e-5 * oracle.std()
    assert ((out.double() - oracle).abs() <= limit).all()


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPILOGUES = {
    "scales": {},
    "bias": {"bias": BF16},
    "bias, SiLU": {"bias": FP32, "silu": True},
    "residual": {"residual": FP32},
    "gate, residual": {"gate": BF16, "residual": BF16},
    "all": {"bias": FP16, "silu": True, "gate": FP32, "residual": FP32},
    "padded residual": {"gate": BF16, "residual": BF16, "padded": True},
}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("N", [96, 67])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues(module, epilogue, N, dtype):
    check_epilogue(module, 2, 37, N, dtype, **EPILOGUES[epilogue])


@pytest.mark.parametrize("tile", TILES)
def test_all_of_the_epilogue_in_every_tile(module, tile):
    check_epilogue(module, 2, 70, 168, BF16, tile=tile, **EPILOGUES["all"])


def test_the_tile_depends_on_shape_and_gpu_alone():
    """SANA's widths at 1024 px on 132 multiprocessors: one or two whole waves, where 128 x 128 would leave half idle."""
    chosen = {N: cuda.TILES[cuda.tile(2048, N, 132)][:2] for N in (1152, 2240, 3456, 5760, 6720, 11200)}
    assert chosen[2240] == chosen[1152] == (128, 160)
    for N, (rows, columns) in chosen.items():
        blocks = -(-2048 // rows) * -(-N // columns)
        assert 2048 * N / (-(-blocks // 132) * 132 * rows * columns) > 0.7, N
    assert cuda.TILES[cuda.tile(1, 1152, 132)][:2] == (64, 64)


# ---- Planted defects

TILE, EPILOGUE, W8A8 = "csrc/gemm/tile.cuh", "csrc/gemm/epilogue.cuh", "csrc/gemm/gemm_w8a8.cu"
BARRIER = "__syncthreads();  // this slab is there for all warps, and the one before it has been read by all"
FETCH = "load(slab + T::Stages - 1);"
DEFECTS = {
    "loop: no barrier": ((TILE, BARRIER, ""),),
    "loop: the wait comes a slab late": ((TILE, "cp_async_wait<T::Stages - 2>()", "cp_async_wait<T::Stages - 1>()"),),
    "loop: a slab is overwritten too early": ((TILE, f"{BARRIER}\n    {FETCH}", f"{FETCH}\n    __syncthreads();"),),
    "loop: no mask for rows": ((TILE, "first + row < from.rows && byte", "byte"),),
    "fragments: pieces of x and weight swapped": ((TILE, "x_piece = lane / 16", "x_piece = lane / 8 % 2"),),
    "fragments: columns of weight crossed": ((TILE, "{fw[0], fw[1]}", "{fw[0], fw[2]}"),),
    "swizzle: rows overlap": ((TILE, "(piece ^ (row / 2 % 4)) * 16", "(piece & (row / 2 % 4)) * 16"),),
    "epilogue: no barrier before overwriting": ((W8A8, "__syncthreads();  // the epilogue overwrites the slabs", ""),),
    "epilogue: no barrier of the warp": ((EPILOGUE, "    __syncwarp();\n    for (int run", "    for (int run"),),
    "epilogue: no mask for columns": ((EPILOGUE, " || n + column >= p.N", ""),),
    "epilogue: a row's scale for the next": ((EPILOGUE, "p.x_scale[m]", "p.x_scale[m / 2]"),),
    "epilogue: the first image's gate": ((EPILOGUE, "image * p.gate_stride + n", "n"),),
    "epilogue: gate added": ((EPILOGUE, "y[i] *= values[i];", "y[i] += values[i];"),),
}  # fmt: skip
# Compiled for the smallest tile only.
SMALLER = (
    (
        W8A8,
        "{run<Tile<4, 2, 32, 80>>, run<Tile<4, 2, 32, 64>>, run<Tile<4, 2, 32, 48>>,",
        "{nullptr, nullptr, nullptr,",
    ),
)


def check_all(module, orders=(0, 1)):
    check_sums(module, 1, 70, 72, 512, SMALLEST, orders=orders)
    check_epilogue(module, 2, 37, 67, FP32, **EPILOGUES["all"], orders=orders)


@pytest.fixture(scope="module")
def defective():
    return emulated.defective(DEFECTS, *SMALLER, only=(W8A8,))


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(defective, defect):
    with pytest.raises((AssertionError, RuntimeError)):
        check_all(defective[defect])


def test_the_cases_of_the_defects_pass_without_one(module):
    check_all(module)
