"""rms_norm and upsample on every backend against fp64, and their references against diffusers' AutoencoderDC."""

import pytest
import torch
from compare import assert_close, assert_kernel
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d
from diffusers.models.normalization import RMSNorm
from variants import DTYPES, device_of, double, run, signed, variants

import sana_kernels
from sana_kernels.conv2d import reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)


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
    theirs = RMSNorm(128, eps=1e-5, elementwise_affine=True, bias=True)
    theirs.load_state_dict({"weight": weight, "bias": bias})
    assert_close(sana_kernels.rms_norm(x, weight, bias, backend="reference"), theirs(x), of_rms=1e-5)


def upsample_inputs(B: int, H: int, W: int, channels: int, C: int, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """x, the 3 × 3 kernel, bias."""
    tensors = signed(B, H, W, channels), torch.randn(C, channels, 3, 3) * channels**-0.5, torch.randn(C)
    return tuple(t.to(device, dtype) for t in tensors)


def diffusers_upsample(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    block = DCUpBlock2d(x.shape[3], weight.shape[0], interpolate=True, shortcut=True).to(x.dtype)
    block.load_state_dict({"conv.weight": weight, "conv.bias": bias})
    return block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach()


UPSAMPLE_SHAPES = [(1, 1, 1, 64, 32), (2, 3, 5, 32, 32), (1, 7, 2, 128, 64)]


@pytest.mark.parametrize("shape", UPSAMPLE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", variants("upsample"))
def test_upsample_against_fp64_and_diffusers(variant, dtype, shape):
    x, weight, bias = upsample_inputs(*shape, dtype, device_of(variant))
    y = run(variant, "upsample", x, reference.fold_upsample(weight), bias)
    oracle = diffusers_upsample(*double(x.cpu(), weight.cpu(), bias.cpu()))
    # Folding sums taps before they are rounded to 16 bits: another rounding than that of the unfolded kernel.
    assert_close(y, oracle, of_rms={torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype])


def test_folding_is_exact():
    x, weight, bias = double(*upsample_inputs(2, 3, 5, 32, 16, torch.float32))
    y = sana_kernels.upsample(x, reference.fold_upsample(weight), bias, backend="reference")
    assert_close(y, diffusers_upsample(x, weight, bias), of_rms=1e-14)


MISTAKES = {
    "phases transposed": lambda folded: folded.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(0, 2),
    "taps mirrored": lambda folded: folded.flip(2),
    "channels before phases": lambda folded: folded.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(mistake):
    x, weight, bias = upsample_inputs(2, 3, 5, 32, 16, torch.float32)
    y = sana_kernels.upsample(x, MISTAKES[mistake](reference.fold_upsample(weight)), bias)
    with pytest.raises(AssertionError):
        assert_close(y, diffusers_upsample(x, weight, bias), of_rms=6e-2)


IMAGE, C, FOLDED = (2, 3, 4, 8), (8,), (32, 8, 2, 2)


@pytest.mark.parametrize(
    ("op", "shapes", "options", "message"),
    [
        ("rms_norm", [IMAGE, (9,), C], {}, r"weight and bias \(C,\); got .*\(9,\)"),
        ("rms_norm", [IMAGE, C, C], {"residual": torch.zeros(2, 3, 5, 8)}, r"x's shape .*got \(2, 3, 5, 8\)"),
        ("rms_norm", [IMAGE, C, C], {"activation": "gelu"}, "none, silu, relu; got 'gelu'"),
        ("rms_norm", [IMAGE, C, C], {"residual": torch.zeros(IMAGE).half()}, "one floating dtype and device"),
        ("upsample", [IMAGE, (32, 8, 4, 4), C], {}, r"a folded weight .*got .*\(32, 8, 4, 4\)"),
        ("upsample", [IMAGE, FOLDED, (9,)], {}, r"bias of \(out,\).*got \(9,\)"),
    ],
)
def test_wrong_arguments_get_one_sentence(op, shapes, options, message):
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        getattr(sana_kernels, op)(*map(torch.zeros, shapes), **options)
    assert "\n" not in str(raised.value)
