"""The CUDA kernels of the decoder, rms_norm and upsample, on the emulator."""

import pytest
import torch
from compare import assert_kernel
from test_conv2d import ACTIVATIONS, NORM_SHAPES, norm_inputs, upsample_inputs
from variants import DTYPES, double

from sana_kernels.conv2d import cuda, reference
from tests import emulated


@pytest.fixture(scope="module")
def module():
    return emulated.cuda_module()


def check_rms_norm(module, shape, dtype, activation, orders=emulated.ORDERS):
    args = *norm_inputs(shape, dtype, residual=activation != "relu"), activation, 1e-5
    (out,) = emulated.run(module, cuda.rms_norm, *args, orders=orders)
    assert_kernel(out, reference.rms_norm(*args), reference.rms_norm(*double(*args)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_rms_norm(module, shape, dtype, activation):
    check_rms_norm(module, shape, dtype, activation)


def check_upsample(module, shape, dtype, orders=emulated.ORDERS):
    """Against the library's phases and fp64 additions."""
    x, weight, bias = upsample_inputs(*shape, dtype)
    folded = reference.fold_upsample(weight)
    args = x, folded, None, list(folded.shape), bias, [0, 0, x.shape[1], x.shape[1]]
    assert cuda.accepts_upsample(*args) is None
    (out,) = emulated.run(module, cuda.upsample, *args, orders=orders)
    phases = reference.split_phases(reference.convolve_phases(x, folded).permute(0, 3, 1, 2).double(), 2)
    assert_kernel(out, reference.upsample(*args), reference.shuffle(phases, *double(x, bias)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 64, 32), (2, 3, 5, 32, 32), (1, 7, 2, 128, 64), (2, 4, 3, 48, 24)], ids=str
)
def test_upsample(module, shape, dtype):
    check_upsample(module, shape, dtype)


def test_what_upsample_does_not_take():
    weight = torch.zeros(4 * 12, 12, 2, 2)
    x, whole = torch.zeros(1, 2, 2, 12), [0, 0, 2, 2]
    assert "multiples of 8 output channels" in cuda.accepts_upsample(x, weight, None, [48, 12, 2, 2], None, whole)
    assert "whole images" in cuda.accepts_upsample(x, weight, None, [48, 12, 2, 2], None, [0, 0, 1, 2])
    assert "not torch.int8" in cuda.accepts_upsample(x, weight.char(), torch.ones(48), [48, 12, 2, 2], None, whole)


NORM, UPSAMPLE = "csrc/conv2d/rms_norm.cu", "csrc/conv2d/upsample_shuffle.cu"
DEFECTS = {
    "norm: a row's neighbour joins in": ((NORM, "offset = lanes / 2; offset > 0", "offset = lanes; offset > 0"),),
    "norm: the sum of one lane": ((NORM, "sum += __shfl_xor_sync(0xffffffffu, sum, offset)", "sum += 0"),),
    "norm: no mask for rows": ((NORM, "bool inside = row < p.rows;", "bool inside = true;"),),
    "norm: no activation": ((NORM, "bias[i], p.activation)", "bias[i], Activation::none)"),),
    "upsample: phase row off by one": ((UPSAMPLE, "(p.H + 1) + h + dy)", "(p.H + 1) + h + 1 - dy)"),),
    "upsample: phases crossed": ((UPSAMPLE, "dy = phase / 2, dx = phase % 2", "dy = phase % 2, dx = phase / 2"),),
    "upsample: shortcut of the first phase for all": ((UPSAMPLE, "(4 * i + phase) / Repeats", "4 * i / Repeats"),),
    "upsample: no mask": ((UPSAMPLE, "if (index >= p.threads) return;", ""),),
}  # fmt: skip
SMALLER = tuple(
    (path, "  if (p.dtype == DType::f16) return cuda_status(run<__half>(p, on));\n"
     "  return cuda_status(run<__nv_bfloat16>(p, on));", "  return Status::bad_dtype;")
    for path in (NORM, UPSAMPLE)
)  # fmt: skip


def check_all(module, orders=(0, 1)):
    check_rms_norm(module, (2, 25, 13, 128), torch.float32, "silu", orders=orders)
    check_rms_norm(module, (3, 11, 15, 50), torch.float32, "relu", orders=orders)
    check_upsample(module, (2, 3, 5, 32, 16), torch.float32, orders=orders)


@pytest.fixture(scope="module")
def defective():
    return emulated.defective(DEFECTS, *SMALLER)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(defective, defect):
    with pytest.raises((AssertionError, RuntimeError)):
        check_all(defective[defect])


def test_the_cases_of_the_defects_pass_without_one(module):
    check_all(module)
