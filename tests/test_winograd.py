"""conv2d by Winograd's products: what they are, and their extremes. (test_conv2d.py has them beside the direct ones.)"""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_kernel, relative_rms
from convolutions import CPU, compute
from variants import signed

import sana_kernels
from sana_kernels.conv2d import ConvWeight, reference
from sana_kernels.conv2d.weights import quantize_conv2d, winograd_conv2d

# Winograd's matrices as the paper has them.
B_T = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1.0]], dtype=torch.float64)
G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1.0]], dtype=torch.float64)
A_T = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1.0]], dtype=torch.float64)


def test_winograd_is_the_convolution_where_nothing_is_rounded():
    x, weight = torch.randn(3, 4, 4).double(), torch.randn(5, 3, 3, 3).double()
    products = (G @ weight @ G.t()) * (B_T @ x @ B_T.t())
    assert_close(A_T @ products.sum(1) @ A_T.t(), F.conv2d(x, weight), of_rms=1e-14)
    assert_close(reference.winograd_weight(weight), G @ weight @ G.t(), of_rms=1e-6)


def test_winograd_patch_by_patch():
    """The specification in plain words: each position has a scale for the tile, of the patches that make its results."""
    x, weight = signed(1, 20, 37, 8), torch.randn(5, 8, 3, 3)
    x[0, 7, 31] = 400  # seen by four tiles
    kernel = quantize_conv2d(weight, winograd=True)
    integers, padded = kernel.values.double(), F.pad(x[0].permute(2, 0, 1).double(), (1, 4, 1, 4))
    expected = torch.zeros(22, 38, 5, dtype=torch.float64)
    for tops in (range(0, 8, 2), range(8, 16, 2), range(16, 20, 2)):
        for lefts in (range(0, 32, 2), range(32, 37, 2)):
            patches = {(i, j): B_T @ padded[:, i : i + 4, j : j + 4] @ B_T.t() for i in tops for j in lefts}
            scale = torch.stack(list(patches.values())).abs().amax((0, 1)) / 127
            for (i, j), values in patches.items():
                products = torch.einsum("cij,ocij->oij", (values / scale).round(), integers) * scale
                expected[i : i + 2, j : j + 2] = (A_T @ products @ A_T.t()).permute(1, 2, 0) * kernel.scale.double()
    y = sana_kernels.conv2d(x, kernel, backend="reference")
    assert_close(y, expected[None, :20, :37], of_rms=1e-5)
    exact = sana_kernels.conv2d(x.double(), weight.double())
    assert relative_rms(y, exact) < 0.05  # and close to the convolution, but not that close
    with pytest.raises(AssertionError):
        assert_close(y, exact, of_rms=1e-5)


@pytest.mark.parametrize("variant", CPU)
def test_winograd_at_the_extremes(variant):
    """Every pair of signs, sums up to 127² · 80."""
    x = torch.full((1, 9, 33, 112), 3.0)
    x[:, ::2, 1::2] *= -1
    x[..., 3::7] *= -1
    values = torch.full((20, 112, 4, 4), 127, dtype=torch.int8)
    values[::2, ::3] = -127
    values[1::4] = -127
    kernel = ConvWeight(values, torch.ones(20), tuple(values.shape))
    same = sana_kernels.conv2d(x, kernel, backend="reference")
    oracle = sana_kernels.conv2d(x.double(), kernel._replace(scale=kernel.scale.double()), backend="reference")
    assert_kernel(compute(variant, "conv2d", x, kernel), same, oracle)


def test_int16_patch_by_patch():
    """The specification in plain words: a patch has one scale for each 64 channels, of the largest of its pixels."""
    x, weight = signed(1, 7, 10, 72), torch.randn(5, 72, 3, 3)
    kernel = winograd_conv2d(weight)
    exact = G @ weight.double() @ G.t()
    steps = kernel.values.double() - exact / kernel.scale.double()[:, None, None, None]
    assert kernel.values.dtype == torch.int16 and steps.abs().max() < 0.51
    assert kernel.values.abs().max() > 3000  # as fine as 64 products in 32 bits allow
    integers, padded = kernel.values.double(), F.pad(x[0].permute(2, 0, 1).double(), (1, 3, 1, 3))
    expected = torch.zeros(8, 10, 5, dtype=torch.float64)
    for i in range(0, 7, 2):
        for j in range(0, 10, 2):
            m = torch.zeros(5, 4, 4, dtype=torch.float64)
            for chunk in (slice(0, 64), slice(64, 72)):
                d = padded[chunk, i : i + 4, j : j + 4]
                scale = 4 * d.abs().max() / 32767
                values = (B_T.float() @ d.float() @ B_T.t().float()) * (32767 / (4 * d.abs().max().float()))
                m += torch.einsum("cij,ocij->oij", values.double().round(), integers[:, chunk]) * scale
            expected[i : i + 2, j : j + 2] = (A_T @ m @ A_T.t()).permute(1, 2, 0) * kernel.scale.double()
    y = sana_kernels.conv2d(x, kernel, backend="reference")
    assert_close(y, expected[None, :7], of_rms=1e-5)
    with pytest.raises(AssertionError):
        assert_close(y, sana_kernels.conv2d(x.double(), weight.double()), of_rms=1e-5)


INPUTS = {
    "a large row of one channel": lambda x, w: (
        x + 400 * (torch.arange(x.shape[1]) == 3)[:, None, None] * (torch.arange(x.shape[3]) == 7),
        w,
    ),
    "a large channel": lambda x, w: (x * (1 + 99 * (torch.arange(x.shape[3]) == 5)), w),
    "heavy tails": lambda x, w: (x.sign() * x.abs() ** 3, w * w.abs() ** 1.5),
    "almost constant": lambda x, w: (0.1 * x + 3 * torch.randn(x.shape[3]), w),
    "one tap": lambda x, w: (x, w * (torch.arange(9).view(3, 3) == 4)),
    "one channel": lambda x, w: (torch.randn(x.shape), w * (torch.arange(x.shape[3]) == 5)[:, None, None]),
    "1e30": lambda x, w: (x * 1e30, w * 1e-30),
    "zeros": lambda x, w: (x * 0, w * 0),
}


@pytest.mark.parametrize("inputs", [*INPUTS, "signed"])
@pytest.mark.parametrize("variant", CPU)
def test_int16_is_as_close_to_the_convolution_as_pytorch(variant, inputs):
    """Under the rule for kernels in bfloat16, against the convolution itself: not what the integers stand for."""
    for H, W, C, N in ((13, 37, 128, 24), (4, 33, 40, 16), (9, 34, 320, 17)):
        x, weight = signed(1, H, W, C), torch.randn(N, C, 3, 3) * C**-0.5 / 3
        if inputs in INPUTS:
            x, weight = INPUTS[inputs](x, weight)
        x, weight = x.bfloat16(), weight.bfloat16()
        same = sana_kernels.conv2d(x, weight, backend="reference")
        oracle = sana_kernels.conv2d(x.double(), weight.double(), backend="reference")
        assert_kernel(compute(variant, "conv2d", x, winograd_conv2d(weight)), same, oracle, f"{variant} {H} {W} {C}")
        if inputs == "signed":
            with pytest.raises(AssertionError):  # where int8 is not
                assert_kernel(
                    compute(variant, "conv2d", x, quantize_conv2d(weight, winograd=True)), same, oracle, "int8"
                )


@pytest.mark.parametrize("variant", CPU)
def test_int16_beside_one_large_value(variant):
    """What does not see it has steps of 2⁻¹³ of it, where it lies in the same patch; elsewhere there is no difference."""
    x, weight = torch.randn(1, 12, 36, 64), torch.randn(24, 64, 3, 3) / 24
    x[0, 5, 20, 7] = 400
    x, weight = x.bfloat16(), weight.bfloat16()
    oracle = sana_kernels.conv2d(x.double(), weight.double(), backend="reference")
    error = (compute(variant, "conv2d", x, winograd_conv2d(weight)).double() - oracle)[0].square().mean(-1).sqrt()
    rounding = (oracle.bfloat16().double() - oracle)[0].square().mean(-1).sqrt()
    sees, same_patch = torch.zeros(12, 36, dtype=torch.bool), torch.zeros(12, 36, dtype=torch.bool)
    sees[4:7, 19:22], same_patch[4:8, 18:22] = True, True
    beside = same_patch & ~sees
    step = 4 * 400 / 32767
    assert 0.1 * step < error[beside].max() < step  # times weights of a convolution that keeps the scale of x
    assert error[~same_patch].square().mean().sqrt() < 1.25 * rounding[~same_patch].square().mean().sqrt()
    assert error[sees].square().mean().sqrt() < 1.25 * rounding[sees].square().mean().sqrt()


@pytest.mark.parametrize("variant", ["reference", *CPU])
@pytest.mark.parametrize("large", [2e38, torch.inf, -torch.inf])
def test_int16_beyond_what_a_transform_can_hold(variant, large):
    """Not a number, or infinite, as of an infinite input; never a number that is wrong."""
    x = torch.randn(1, 8, 12, 40).bfloat16()
    x[0, 3, 5, 2] = large
    y = compute(variant, "conv2d", x, winograd_conv2d(torch.randn(16, 40, 3, 3)))
    touched = torch.zeros(8, 12, dtype=torch.bool)
    touched[2:6, 4:8] = True
    assert not y[0, touched].isfinite().any() and y[0, ~touched].isfinite().all()


@pytest.mark.parametrize("variant", CPU)
def test_int16_at_the_extremes(variant):
    """Sums of 64 products that nearly fill 32 bits, of both signs."""
    signs = (
        torch.tensor([[1, -1, -1, -1]] * 4).mul(torch.tensor([[1, -1, -1, -1]] * 4).T).repeat(3, 9)[None, :, :, None]
    )
    for sign in (1, -1):
        x = (3 * sign * signs).expand(1, 12, 36, 128).bfloat16().contiguous()
        kernel = winograd_conv2d(torch.ones(16, 128, 3, 3) * 0.7)
        assert kernel.values.long().abs().view(16, 2, 64, 4, 4).sum(2).max() > 65000
        same = sana_kernels.conv2d(x, kernel, backend="reference")
        oracle = sana_kernels.conv2d(x.double(), kernel._replace(scale=kernel.scale.double()), backend="reference")
        assert_kernel(compute(variant, "conv2d", x, kernel), same, oracle)


def test_int16_sums_fit_into_32_bits():
    for weight in (
        signed(9, 200, 3, 3),
        torch.full((2, 64, 3, 3), -1.5),
        torch.randn(2, 1, 3, 3),
        torch.zeros(2, 70, 3, 3),
    ):
        values, scale, _ = winograd_conv2d(weight)
        most = max(chunk.long().abs().sum(1).max().item() for chunk in values.split(64, dim=1))
        assert most * 32767 < 2**31 and scale.isfinite().all() and values.long().abs().max() <= 32767


def test_winograd_weights_are_for_conv2d_with_a_stride_of_one():
    x, weight = torch.randn(1, 4, 4, 8), torch.randn(16, 8, 3, 3)
    for kernel in (quantize_conv2d(weight, winograd=True), winograd_conv2d(weight)):
        with pytest.raises(ValueError, match="of Winograd weights; got 2"):
            sana_kernels.conv2d(x, kernel, stride=2)
        with pytest.raises(ValueError, match="upsample takes"):
            sana_kernels.upsample(x, kernel, torch.randn(4))
    direct = ConvWeight(kernel.values[..., :3, :3], kernel.scale, (16, 8, 3, 3))
    with pytest.raises(TypeError, match=r"or from quantize_conv2d; got .* torch\.int16"):
        sana_kernels.conv2d(x, direct)
    with pytest.raises(ValueError, match="conv2d takes a weight"):  # floats of that shape
        sana_kernels.conv2d(x, torch.randn(16, 8, 4, 4))
