"""rms_norm on every backend and instruction set against fp64, its reference against diffusers."""

import pytest
import torch
from compare import assert_close, assert_kernel
from convolutions import ACTIVATIONS, of_diffusers
from variants import DTYPES, device_of, double, run, signed, variants

import sana_kernels
from sana_kernels.conv2d import reference


def norm_inputs(shape: tuple, dtype: torch.dtype, residual: bool, device: str = "cpu") -> tuple:
    x, weight, bias = signed(*shape), signed(shape[-1]), torch.randn(shape[-1])
    x[:, 0, 0] = 0
    x[:, -1, -1] = -x[:, -1, -1].abs()
    tensors = x, weight, bias, torch.randn(shape) if residual else None
    return tuple(None if t is None else t.to(device, dtype) for t in tensors)


# Enough pixels that chance, one rounding shared by all channels of a pixel, does not decide about fp32's RMSE.
NORM_SHAPES = [(1, 1, 33, 1024), (2, 25, 13, 128), (1, 19, 17, 256), (3, 11, 15, 50), (1, 3, 13, 2240)]


@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", variants("rms_norm"))
def test_rms_norm_against_fp64(variant, dtype, shape):
    for activation in ACTIVATIONS:
        x, weight, bias, residual = norm_inputs(shape, dtype, activation == "none", device_of(variant))
        y = run(variant, "rms_norm", x, weight, bias, residual=residual, activation=activation)
        args = x, weight, bias, residual, activation, 1e-5
        assert_kernel(y, reference.rms_norm(*args), reference.rms_norm(*double(*args)), f"{variant} {activation}")


def test_rms_norm_is_that_of_diffusers():
    x, weight, bias, _ = norm_inputs((2, 5, 3, 128), torch.float32, False)
    theirs = of_diffusers("normalization", "RMSNorm")(128, eps=1e-5, elementwise_affine=True, bias=True)
    theirs.load_state_dict({"weight": weight, "bias": bias})
    assert_close(sana_kernels.rms_norm(x, weight, bias, backend="reference"), theirs(x), of_rms=1e-5)
