"""conv2d by Winograd's products: what they are, and their extremes. (test_conv2d.py has them beside the direct ones.)"""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_kernel, relative_rms
from convolutions import CPU, compute
from variants import signed

import sana_kernels
from sana_kernels.conv2d import ConvWeight, reference
from sana_kernels.conv2d.weights import quantize_conv2d

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


def test_winograd_weights_are_for_conv2d_with_a_stride_of_one():
    x, kernel = torch.randn(1, 4, 4, 8), quantize_conv2d(torch.randn(16, 8, 3, 3), winograd=True)
    with pytest.raises(ValueError, match="of Winograd weights; got 2"):
        sana_kernels.conv2d(x, kernel, stride=2)
    with pytest.raises(ValueError, match="upsample takes"):
        sana_kernels.upsample(x, kernel, torch.randn(4))
    with pytest.raises(ValueError, match="conv2d takes a weight"):  # floats of that shape
        sana_kernels.conv2d(x, torch.randn(16, 8, 4, 4))
