"""conv2d and upsample by transformed kernels: what they are, and their extremes. (test_conv2d.py and test_upsample.py have
them beside the direct ones.)"""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_kernel, relative_rms
from convolutions import CPU
from variants import run, signed

import sana_kernels
from sana_kernels.conv2d import ConvWeight, reference
from sana_kernels.conv2d.transforms import TRANSFORMS, transform_weight
from sana_kernels.conv2d.weights import pack_conv2d, quantize_conv2d, winograd_conv2d, winograd_upsample

INT8, INT16 = torch.int8, torch.int16


def matrices(k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(matrix.double() for matrix in TRANSFORMS[k][:3])


@pytest.mark.parametrize("k", TRANSFORMS)
def test_a_transform_is_the_convolution_where_nothing_is_rounded(k):
    B_T, G, A_T = matrices(k)
    x, weight = torch.randn(3, k, k).double(), torch.randn(5, 3, 3, 3).double()
    y = A_T @ ((G @ weight @ G.t()) * (B_T @ x @ B_T.t())).sum(1) @ A_T.t()
    doubled = F.interpolate(x[None], scale_factor=2)[0, :, 1:5, 1:5]  # what the pixel in the middle, doubled, sees
    assert_close(y, F.conv2d(doubled if k == 3 else x, weight), of_rms=1e-6)  # of G, in fp32
    assert_close(transform_weight(weight, k).permute(2, 3, 0, 1), G @ weight @ G.t(), of_rms=1e-6)


def test_f4_is_winograds_of_its_points():
    """By its definition: products of polynomials, evaluated at the points and interpolated."""
    B_T, G, A_T = matrices(6)
    points = torch.tensor([0, 0.75, -0.75, 1.5, -1.5]).double()
    powers = points[:, None] ** torch.arange(6)
    scale = torch.stack([(p - points[points != p]).prod() for p in points])
    assert_close(G[:5] * scale[:, None], powers[:, :3], of_rms=1e-6)
    assert_close(A_T.t()[:5], powers[:, :4], of_rms=1e-12)
    for i, row in enumerate(B_T):  # zero at all other points
        assert (powers[torch.arange(5) != i] @ row).abs().max() < 1e-12


@pytest.mark.parametrize("k", [6, 3])
@pytest.mark.parametrize("integers", [INT8, INT16], ids=str)
def test_patch_by_patch(integers, k):
    """The specification in plain words: a position of a patch has a scale for each chunk of channels."""
    B_T, G, A_T = matrices(k)
    step, made = (4, 4) if k == 6 else (1, 2)
    chunk, most = (128, 127) if integers == INT8 else (64, 32767)
    C = chunk + 8
    x, weight = signed(1, 7, 10, C), torch.randn(C // 2, C, 3, 3)
    kernel = (winograd_conv2d if k == 6 else winograd_upsample)(weight, integers)
    weight_scale = kernel.scale.double().permute(2, 0, 1)
    steps = kernel.values.double() - G @ weight.double() @ G.t() / weight_scale[:, None]
    assert kernel.values.dtype == integers and steps.abs().max() < 0.52
    if integers == INT8:
        assert (kernel.values.abs().amax(1) == 127).all()
    else:
        norms = torch.stack([some.double().square().sum(1).sqrt() for some in kernel.values.split(64, dim=1)])
        assert (norms.amax(0) > 65495).float().mean() > 0.9  # as fine as 64 products in 32 bits allow
    values_of_weights, padded = kernel.values.double(), F.pad(x[0].permute(2, 0, 1), (1, 4, 1, 4))
    expected = torch.zeros(C // 2, 100, 100, dtype=torch.float64)
    for top in range(0, 7, step):
        for left in range(0, 10, step):
            m = torch.zeros(C // 2, k, k, dtype=torch.float64)
            for some in (slice(0, chunk), slice(chunk, C)):
                values = (B_T.float() @ padded[some, top : top + k, left : left + k] @ B_T.t().float()).double()
                size = values.abs().amax(0) if integers == INT8 else values.square().sum(0).sqrt()
                rounded = (values / size * most).round()
                m += torch.einsum("cij,ocij->oij", rounded, values_of_weights[:, some]) * size / most
            i, j = top * made // step, left * made // step
            expected[:, i : i + made, j : j + made] = A_T @ (m * weight_scale) @ A_T.t()
    op, around = ("conv2d", ()) if k == 6 else ("upsample", (torch.zeros(C // 2),))
    y = getattr(sana_kernels, op)(x, kernel, *around, backend="reference")
    exact_weight = weight.double() if k == 6 else reference.fold_upsample(weight.double())
    exact = getattr(sana_kernels, op)(x.double(), exact_weight, *(t.double() for t in around))
    direct = getattr(sana_kernels, op)(x, quantize_conv2d(exact_weight.float()), *around, backend="reference")
    if k == 3:
        shortcut = sana_kernels.upsample(x, torch.zeros(2 * C, C, 2, 2), *around, backend="reference")
        y, exact, direct = y - shortcut, exact - shortcut, direct - shortcut
    # In single places a value between two steps may go either way.
    expected = expected.permute(1, 2, 0)[None, : y.shape[1], : y.shape[2]]
    assert relative_rms(y, expected) < (1e-3 if integers == INT8 else 1e-5)
    if integers == INT8:  # closer to the convolution than the direct one in 8 bits, or by F(4 × 4) not much farther
        assert 0.3 < relative_rms(y, exact) / relative_rms(direct, exact) < (3 if k == 6 else 1)
    else:  # close, but not that close
        assert 3e-5 < relative_rms(y, exact) < 1e-3


INPUTS = {
    "a large row of one channel": lambda x, w: (
        x + 400 * (torch.arange(x.shape[1]) == 3)[:, None, None] * (torch.arange(x.shape[3]) == 7),
        w,
    ),
    "a large channel": lambda x, w: (x * (1 + 99 * (torch.arange(x.shape[3]) == 5)), w),
    "heavy tails": lambda x, w: (x.sign() * x.abs() ** 3, w * w.abs() ** 1.5),
    "almost constant": lambda x, w: (0.1 * x + 3 * torch.randn(x.shape[3]), w),
    "one tap": lambda x, w: (x, w * (torch.arange(9).view(3, 3) == 4)),
    "a tap in the corner": lambda x, w: (x, w * (torch.arange(9).view(3, 3) == 8)),
    "one channel": lambda x, w: (torch.randn(x.shape), w * (torch.arange(x.shape[3]) == 5)[:, None, None]),
    "1e30": lambda x, w: (x * 1e30, w * 1e-30),
    "1e-20": lambda x, w: (x * 1e-20, w * 1e20),
    "1e30 and 1e-20": lambda x, w: (x * torch.where(torch.arange(x.shape[2]) < 8, 1e30, 1e-20)[:, None], w),
    "zeros": lambda x, w: (x * 0, w * 0),
}


@pytest.mark.parametrize("inputs", [*INPUTS, "signed"])
@pytest.mark.parametrize("variant", CPU)
def test_int16_is_as_close_to_the_convolution_as_pytorch(variant, inputs):
    """Under the rule for kernels in bfloat16, against the convolution itself: not what the integers stand for."""
    for H, W, C, N in ((13, 37, 128, 24), (4, 33, 40, 16), (9, 70, 320, 17)):
        x, weight = signed(1, H, W, C), torch.randn(N, C, 3, 3) * C**-0.5 / 3
        if inputs in INPUTS:
            x, weight = INPUTS[inputs](x, weight)
        x, weight = x.bfloat16(), weight.bfloat16()
        same = sana_kernels.conv2d(x, weight, backend="reference")
        oracle = sana_kernels.conv2d(x.double(), weight.double(), backend="reference")
        y = run(variant, "conv2d", x, winograd_conv2d(weight, INT16))
        assert_kernel(y, same, oracle, f"{variant} {H} {W} {C}")
        if inputs == "signed":
            with pytest.raises(AssertionError):  # where int8 is not
                assert_kernel(run(variant, "conv2d", x, winograd_conv2d(weight, INT8)), same, oracle, "int8")


@pytest.mark.parametrize("integers", [INT8, INT16], ids=str)
@pytest.mark.parametrize("variant", CPU)
def test_beside_one_large_value(variant, integers):
    """What does not see it has coarser steps, where it lies in the same patch; elsewhere there is no difference."""
    x, weight = torch.randn(1, 12, 36, 64), torch.randn(24, 64, 3, 3) / 24
    steps, large = (127, 40) if integers == INT8 else (32767, 4000)

    def error(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the kernel and, of bfloat16, the rounding."""
        oracle = sana_kernels.conv2d(x.double(), weight.double(), backend="reference")
        y = run(variant, "conv2d", x, winograd_conv2d(weight, integers)).double()
        return tuple((z.double() - oracle)[0].square().mean(-1).sqrt() for z in (y, oracle.bfloat16()))

    x, weight = x.bfloat16(), weight.bfloat16()
    without, _ = error(x)
    x[0, 5, 21, 7] = large
    found, rounding = error(x)
    sees, same_patch = torch.zeros(12, 36, dtype=torch.bool), torch.zeros(12, 36, dtype=torch.bool)
    sees[4:7, 20:23], same_patch[4:8, 20:24] = True, True
    beside, step = same_patch & ~sees, large / steps
    # Times weights of a convolution that keeps the scale of x.
    assert 0.05 * step < found[beside].max() < (2 if integers == INT8 else 1) * step
    assert torch.equal(found[~same_patch], without[~same_patch])
    if integers == INT16:
        assert found[~same_patch].square().mean().sqrt() < 1.25 * rounding[~same_patch].square().mean().sqrt()
        assert found[sees].square().mean().sqrt() < 1.25 * rounding[sees].square().mean().sqrt()


@pytest.mark.parametrize("variant", ["reference", *CPU])
@pytest.mark.parametrize("integers", [INT8, INT16], ids=str)
@pytest.mark.parametrize("large", [1e30, 1e33, 1e36, 1e38, torch.inf, -torch.inf])
def test_beyond_what_sums_can_hold(variant, integers, large):
    """Not a number, or infinite; never a number that is wrong. In other patches nothing is lost."""
    x, weight = torch.randn(1, 8, 16, 40).bfloat16(), torch.randn(16, 40, 3, 3).bfloat16()
    x[0, 1, 5, 2] = large
    y = run(variant, "conv2d", x, winograd_conv2d(weight, integers))[0].double()
    exact = sana_kernels.conv2d(x.double(), weight.double(), backend="reference")[0]
    sees, same_patch = torch.zeros(8, 16, dtype=torch.bool), torch.zeros(8, 16, dtype=torch.bool)
    sees[:3, 4:7], same_patch[0:4, 4:8] = True, True
    close = 0.08 if integers == INT8 else 3e-3
    assert y[~same_patch].isfinite().all() and relative_rms(y[~same_patch], exact[~same_patch]) < close
    if y[sees].isfinite().all():
        assert relative_rms(y[sees], exact[sees]) < close
    else:
        assert large != 1e30
        kept = y[sees].isfinite()  # int8's sums are smaller
        assert integers == INT8 or not y[same_patch].isfinite().any()
        assert not kept.any() or relative_rms(y[sees][kept], exact[sees][kept]) < close


@pytest.mark.parametrize("variant", CPU)
def test_int8_at_the_extremes(variant):
    """Every pair of signs; full chunks whose sums are ±127² · 128, and a second one."""
    x = torch.full((1, 9, 68, 132), 3.0)
    x[..., 3::7] *= -1
    for k, op, around in ((6, "conv2d", ()), (3, "upsample", (torch.zeros(33),))):
        values = torch.full((33, 132, k, k), 127, dtype=torch.int8)
        values[::2, ::3] = -127
        values[1::4] = -127
        values[4] = 127 * x[0, 0, 0].sign().char()[:, None, None]
        values[5] = -values[4]
        kernel = ConvWeight(values, torch.ones(k, k, 33), tuple(values.shape))
        exact = kernel._replace(scale=kernel.scale.double())
        same = getattr(sana_kernels, op)(x, kernel, *around, backend="reference")
        oracle = getattr(sana_kernels, op)(x.double(), exact, *(t.double() for t in around), backend="reference")
        assert_kernel(run(variant, op, x, kernel, *around), same, oracle)


def test_what_sums_of_int8_start_with():
    """Before each chunk of 128 channels, as packed: the int32 −128 Σ w."""
    values = torch.randint(-127, 128, (20, 200, 6, 6), dtype=torch.int8)
    packed = pack_conv2d(ConvWeight(values, torch.ones(6, 6, 20), tuple(values.shape))).values
    words = packed.flatten().view(torch.int32).view(36, 2, -1, 16)  # one group of panels: positions, panels, words, 16
    assert words.shape[2] == 1 + 32 + 1 + 32
    for first, chunk in ((0, values[:, :128]), (33, values[:, 128:])):
        sums = chunk.long().sum(1).permute(1, 2, 0).flatten(0, 1)
        assert torch.equal(words[:, :, first].flatten(1)[:, :20], (-128 * sums).int())


@pytest.mark.parametrize("size", [3.0, -3.0, 3e30, 3e-20])
@pytest.mark.parametrize("variant", CPU)
def test_int16_at_the_extremes(variant, size):
    """Sums of 64 products that nearly fill 32 bits, of both signs; norms whose squares floats do not hold."""
    x = torch.full((1, 12, 68, 128), size).bfloat16()
    for k, N in ((6, 16), (3, 32)):
        values = torch.full((N, 128, k, k), 8188, dtype=torch.int16)
        kernel = ConvWeight(values, torch.full((k, k, N), 1e-3 / abs(size)), tuple(values.shape))
        assert 0.999 * 2**31 < 64 * 4096 * 8188 < 2**31  # 64 values that are the same are 32767 / 8 each
        exact = kernel._replace(scale=kernel.scale.double())
        op, bias = ("conv2d", ()) if k == 6 else ("upsample", (torch.zeros(N),))
        same = getattr(sana_kernels, op)(x, kernel, *(t.bfloat16() for t in bias), backend="reference")
        oracle = getattr(sana_kernels, op)(x.double(), exact, *(t.double() for t in bias), backend="reference")
        assert_kernel(run(variant, op, x, kernel, *(t.bfloat16() for t in bias)), same, oracle)


def test_int16_sums_fit_into_32_bits():
    """Of the worst values that there are: in proportion to the weights."""
    for weight in (
        signed(9, 200, 3, 3),
        torch.full((2, 64, 3, 3), -1.5),
        torch.randn(2, 1, 3, 3),
        torch.zeros(2, 70, 3, 3),
    ):
        for kernel in (winograd_conv2d(weight, INT16), winograd_upsample(weight, INT16)):
            values, scale, _ = kernel
            assert scale.isfinite().all() and values.long().abs().max() <= 32767
            for w in values.split(64, dim=1):
                w = w.double()
                x = (w / w.square().sum(1, keepdim=True).sqrt().clamp_min(1) * 32767).round()
                assert (w * x).sum(1).max() < 2**31


def test_transformed_weights_are_for_their_op_and_a_stride_of_one():
    x, weight = torch.randn(1, 4, 4, 8), torch.randn(16, 8, 3, 3)
    for kernel in (winograd_conv2d(weight, INT8), winograd_conv2d(weight, INT16)):
        with pytest.raises(ValueError, match="of Winograd weights; got 2"):
            sana_kernels.conv2d(x, kernel, stride=2)
        with pytest.raises(ValueError, match="of winograd_upsample, not those of winograd_conv2d"):
            sana_kernels.upsample(x, kernel, torch.randn(16))
    kernel, bias = winograd_upsample(weight, INT8), torch.randn(16)
    with pytest.raises(ValueError, match="of winograd_conv2d, not those of winograd_upsample"):
        sana_kernels.conv2d(x, kernel)
    with pytest.raises(ValueError, match=r"bias of \(out,\).*: \(16,\); got \(4,\)"):
        sana_kernels.upsample(x, kernel, bias[:4])
    with pytest.raises(ValueError, match=r"one scale per output channel \(3, 3, 16\); got \(1, 1, 1\)"):
        sana_kernels.upsample(x, kernel._replace(scale=torch.ones(1, 1, 1)), bias)
    with pytest.raises(TypeError, match=r"or from winograd_upsample; got .* torch\.int32"):
        sana_kernels.upsample(x, kernel._replace(values=kernel.values.int()), bias)
    direct = ConvWeight(winograd_upsample(weight, INT16).values, torch.ones(16), (16, 8, 3, 3))
    with pytest.raises(TypeError, match=r"or from quantize_conv2d; got .* torch\.int16"):
        sana_kernels.conv2d(x, direct)
    with pytest.raises(ValueError, match="conv2d takes a weight"):  # floats of that shape
        sana_kernels.conv2d(x, torch.randn(16, 8, 4, 4))


def test_what_cannot_be_transformed():
    with pytest.raises(ValueError, match=r"floating \(out, in, 3, 3\); got torch.float32 \(32, 8, 2, 2\)"):
        winograd_upsample(torch.randn(32, 8, 2, 2), INT16)
    with pytest.raises(TypeError, match=r"torch.int8 or torch.int16; got torch.float32"):
        winograd_conv2d(torch.randn(8, 8, 3, 3), torch.float32)
