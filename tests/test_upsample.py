"""upsample on every backend and instruction set, AMX on emulated tiles included, against fp64 and diffusers'
DCUpBlock2d."""

import importlib.util

import pytest
import torch
from compare import assert_close, assert_kernel, relative_rms
from convolutions import CPU, FLOATS, of_diffusers, upsample_inputs
from variants import DTYPES, device_of, double, run, variants

import sana_kernels
from sana_kernels.conv2d import ConvWeight, reference
from sana_kernels.conv2d.weights import quantize_conv2d, winograd_upsample


def diffusers_upsample(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    cls = of_diffusers("autoencoders.autoencoder_dc", "DCUpBlock2d")
    block = cls(x.shape[3], weight.shape[0], interpolate=True, shortcut=True).to(x.dtype)
    block.load_state_dict({"conv.weight": weight, "conv.bias": bias})
    return block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach()


UPSAMPLE_SHAPES = [(1, 1, 1, 64, 32), (1, 1, 4, 64, 32), (2, 3, 5, 32, 32), (1, 7, 2, 128, 64), (1, 9, 33, 16, 12)]


@pytest.mark.parametrize("shape", UPSAMPLE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", [*variants("upsample"), *CPU[-1:]])
def test_upsample_against_diffusers_and_fp64(variant, dtype, shape):
    name = str(variant)
    if dtype == torch.float16 and name.startswith("cpu"):
        pytest.skip("the CPU kernels compute in float32 and bfloat16")
    if name == "cuda" and shape[-1] % 8:
        pytest.skip("the CUDA kernel takes multiples of 8 channels")
    x, weight, bias = upsample_inputs(*shape, dtype, device_of(variant))
    folded = reference.fold_upsample(weight)
    y = run(variant, "upsample", x, folded, bias)
    exact = double(x.cpu(), weight.cpu(), bias.cpu())
    if importlib.util.find_spec("diffusers") is not None:
        oracle = diffusers_upsample(*exact)
    else:  # such as on a GPU machine; that this is the same, `test_folding_is_exact` shows
        oracle = sana_kernels.upsample(exact[0], reference.fold_upsample(exact[1]), exact[2], backend="reference")
    # Folding sums taps before they are rounded to 16 bits: another rounding than that of the unfolded kernel.
    assert_close(y, oracle, of_rms={torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype])
    same = sana_kernels.upsample(x, folded, bias, backend="reference")
    assert_kernel(y, same, sana_kernels.upsample(*double(x, folded, bias), backend="reference"))


@pytest.mark.parametrize("shape", UPSAMPLE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("variant", CPU)
def test_upsample_of_integers_and_of_whole_phases(variant, dtype, shape):
    """W8A8; and 3 × 3 phases, a convolution before a pixel shuffle, which diffusers has too."""
    x, weight, bias = upsample_inputs(*shape, dtype)
    integers = quantize_conv2d(reference.fold_upsample(weight))
    y = run(variant, "upsample", x, integers, bias)
    same = sana_kernels.upsample(x, integers, bias, backend="reference")
    exact = ConvWeight(integers.values, integers.scale.double(), integers.shape)
    assert_kernel(y, same, sana_kernels.upsample(x.double(), exact, bias.double(), backend="reference"))

    C, channels = weight.shape[0], weight.shape[1]
    phases, biases = torch.randn(4 * C, channels, 3, 3) * channels**-0.5 / 3, torch.randn(4 * C)
    phases, biases = phases.to(dtype), biases.to(dtype)
    y = run(variant, "upsample", x, phases, biases)
    same = sana_kernels.upsample(x, phases, biases, backend="reference")
    cls = of_diffusers("autoencoders.autoencoder_dc", "DCUpBlock2d")
    block = cls(channels, C, interpolate=False, shortcut=True).double()
    order = torch.arange(4 * C).view(4, C).t().flatten()  # PyTorch's pixel shuffle has the phases innermost
    block.load_state_dict({"conv.weight": phases[order].double(), "conv.bias": biases[order].double()})
    assert_kernel(y, same, block(x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach())


@pytest.mark.parametrize("shape", [*UPSAMPLE_SHAPES, (1, 19, 70, 136, 68), (1, 5, 33, 136, 272)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("integers", [torch.int8, torch.int16], ids=str)
@pytest.mark.parametrize("variant", CPU)
def test_upsample_of_a_transformed_kernel(variant, integers, dtype, shape):
    """Against the fp64 sums of what the integers stand for; in int16 as close to diffusers as PyTorch in bfloat16 is, in
    int8 about as close as the direct kernel in W8A8."""
    x, weight, bias = upsample_inputs(*shape, dtype)
    kernel = winograd_upsample(weight, integers)
    y = run(variant, "upsample", x, kernel, bias)
    same = sana_kernels.upsample(x, kernel, bias, backend="reference")
    exact = kernel._replace(scale=kernel.scale.double())
    oracle = sana_kernels.upsample(x.double(), exact, bias.double(), backend="reference")
    theirs = diffusers_upsample(*double(x, weight, bias))
    folded = reference.fold_upsample(weight)
    if dtype == torch.bfloat16:
        assert_kernel(y, same, oracle)
    else:  # a value between two steps may go either way
        assert relative_rms(y, oracle) < (1e-5 if integers == torch.int16 else 1e-3)
    if integers == torch.int8:
        direct = sana_kernels.upsample(x, quantize_conv2d(folded), bias, backend="reference")
        assert 1e-3 < relative_rms(y, theirs) < 1.5 * relative_rms(direct, theirs)
    elif dtype == torch.bfloat16:
        assert_kernel(y, sana_kernels.upsample(x, folded, bias, backend="reference"), theirs)
    else:
        assert 1e-6 < relative_rms(y, theirs) < 1e-3


def test_folding_is_exact():
    x, weight, bias = double(*upsample_inputs(2, 3, 5, 32, 16, torch.float32))
    y = sana_kernels.upsample(x, reference.fold_upsample(weight), bias, backend="reference")
    assert_close(y, diffusers_upsample(x, weight, bias), of_rms=1e-14)


FOLDING_MISTAKES = {
    "phases transposed": lambda folded: folded.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(0, 2),
    "taps mirrored": lambda folded: folded.flip(2),
    "channels before phases": lambda folded: folded.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1),
}


@pytest.mark.parametrize("mistake", FOLDING_MISTAKES)
def test_the_comparison_of_upsample_notices(mistake):
    x, weight, bias = upsample_inputs(2, 3, 5, 32, 16, torch.float32)
    y = sana_kernels.upsample(x, FOLDING_MISTAKES[mistake](reference.fold_upsample(weight)), bias)
    with pytest.raises(AssertionError):
        assert_close(y, diffusers_upsample(x, weight, bias), of_rms=6e-2)
