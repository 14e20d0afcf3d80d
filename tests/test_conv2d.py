"""conv2d, upsample, multi_scale and rms_norm on every backend and instruction set, AMX on emulated tiles included, against
fp64; their references against diffusers' AutoencoderDC; and bands against whole images."""

import importlib.util
from dataclasses import dataclass
from itertools import pairwise

import emulated_tiles
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_kernel, relative_rms
from torch.utils._pytree import tree_map
from variants import DTYPES, device_of, double, isas, run, signed, variants

import sana_kernels
from sana_kernels.conv2d import Band, ConvWeight, reference
from sana_kernels.conv2d.weights import pack_conv2d, quantize_conv2d

ACTIVATIONS = tuple(reference.ACTIVATIONS)
EMULATED = "cpu:amx (emulated)"
VARIANTS = [*variants("conv2d"), *([] if "amx" in isas() else [EMULATED])]
CPU = [v for v in VARIANTS if isinstance(v, str) and v.startswith("cpu")]
GPU = [v for v in VARIANTS if not isinstance(v, str)]
FLOATS = (torch.float32, torch.bfloat16)
PRECISIONS = ("fp32", "bf16", "w8a8", "winograd")  # of the products; W8A8, and Winograd's, between activations of bf16
INTEGERS = ("w8a8", "winograd")


def of_diffusers(module: str, name: str) -> type:
    """A class of diffusers' models. Skips the test where diffusers is not installed."""
    return getattr(pytest.importorskip(f"diffusers.models.{module}"), name)


def compute(variant: str, op: str, *args, **kwargs) -> torch.Tensor:
    if variant == EMULATED:
        with emulated_tiles.cpu():
            return getattr(sana_kernels, op)(*args, **kwargs, backend="cpu")
    return run(variant, op, *args, **kwargs)


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


def upsample_inputs(B: int, H: int, W: int, channels: int, C: int, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """x, the 3 × 3 kernel, bias."""
    tensors = signed(B, H, W, channels), torch.randn(C, channels, 3, 3) * channels**-0.5, torch.randn(C)
    return tuple(t.to(device, dtype) for t in tensors)


def diffusers_upsample(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    cls = of_diffusers("autoencoders.autoencoder_dc", "DCUpBlock2d")
    block = cls(x.shape[3], weight.shape[0], interpolate=True, shortcut=True).to(x.dtype)
    block.load_state_dict({"conv.weight": weight, "conv.bias": bias})
    return block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach()


UPSAMPLE_SHAPES = [(1, 1, 1, 64, 32), (2, 3, 5, 32, 32), (1, 7, 2, 128, 64), (1, 9, 33, 16, 12)]


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
    y = compute(variant, "upsample", x, folded, bias)
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
    y = compute(variant, "upsample", x, integers, bias)
    same = sana_kernels.upsample(x, integers, bias, backend="reference")
    exact = ConvWeight(integers.values, integers.scale.double(), integers.shape)
    assert_kernel(y, same, sana_kernels.upsample(x.double(), exact, bias.double(), backend="reference"))

    C, channels = weight.shape[0], weight.shape[1]
    phases, biases = torch.randn(4 * C, channels, 3, 3) * channels**-0.5 / 3, torch.randn(4 * C)
    phases, biases = phases.to(dtype), biases.to(dtype)
    y = compute(variant, "upsample", x, phases, biases)
    same = sana_kernels.upsample(x, phases, biases, backend="reference")
    cls = of_diffusers("autoencoders.autoencoder_dc", "DCUpBlock2d")
    block = cls(channels, C, interpolate=False, shortcut=True).double()
    order = torch.arange(4 * C).view(4, C).t().flatten()  # PyTorch's pixel shuffle has the phases innermost
    block.load_state_dict({"conv.weight": phases[order].double(), "conv.bias": biases[order].double()})
    assert_kernel(y, same, block(x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach())


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


@dataclass(frozen=True)
class Case:
    B: int
    H: int
    W: int
    C: int
    N: int
    stride: int = 1
    activation: str = "none"
    around: str = ""  # of "bias", "norm", "residual", "input"

    def make(self, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple, dict]:
        """x and the kernel, and what stands around the convolution."""
        weight = torch.randn(self.N, self.C, 3, 3) * self.C**-0.5 / 3
        out = self.B, -(-self.H // self.stride), -(-self.W // self.stride), self.N
        made = {
            "bias": torch.randn(self.N).to(dtype),
            "norm": (signed(self.N, dtype=dtype), torch.randn(self.N).to(dtype)),
            "residual": signed(*out, dtype=dtype),
            "input": (torch.rand(self.C).to(dtype) + 0.5, torch.randn(self.C).to(dtype)),
        }
        around = {"input_norm" if name == "input" else name: made[name] for name in self.around.split()}
        around = tree_map(lambda t: t.to(device), around)
        if "input" in self.around:
            around["input_activation"] = "relu"
        x = signed(self.B, self.H, self.W, self.C, dtype=dtype).to(device)
        return (x, weight.to(device, dtype)), {"stride": self.stride, "activation": self.activation} | around


def in_double(weight: torch.Tensor | ConvWeight, around: dict) -> tuple:
    """For the oracle."""
    exact = weight._replace(scale=weight.scale.double()) if isinstance(weight, ConvWeight) else weight.double()
    wide = {k: tuple(double(*v)) if isinstance(v, tuple) else double(v)[0] for k, v in around.items()}
    return exact, wide


CASES = [
    Case(50, 1, 1, 32, 16),  # so many that chance does not decide about fp32's RMSE
    Case(2, 7, 33, 3, 32, activation="silu", around="bias"),  # an image's channels; a tile of one pixel
    Case(1, 33, 7, 128, 128, activation="silu", around="bias"),
    Case(1, 9, 34, 132, 64, around="norm residual"),  # 4 channels beyond a vector
    Case(2, 26, 98, 36, 20, around="bias"),  # a tile inside the image, of two images
    Case(2, 10, 5, 64, 272, around="norm residual"),  # 17 panels of columns
    Case(1, 33, 70, 16, 50, stride=2, around="bias residual"),
    Case(1, 8, 64, 256, 96, stride=2, activation="relu"),
    Case(1, 9, 11, 512, 512, activation="silu", around="bias"),  # groups of four rows
    Case(1, 17, 33, 128, 3, around="bias input"),  # the decoder's last
]


def quantized(weight: torch.Tensor, precision: str) -> torch.Tensor | ConvWeight:
    return quantize_conv2d(weight, winograd=precision == "winograd") if precision in INTEGERS else weight


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", [*CPU, *GPU])
def test_conv2d_against_fp64(variant, precision, case):
    """In W8A8, against the fp64 sums of what the integers stand for."""
    if variant == "cuda" and precision in INTEGERS:
        pytest.skip("there is no kernel for W8A8 on GPUs")
    if precision == "winograd" and case.stride == 2:
        pytest.skip("Winograd's products are for a stride of 1")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    (x, weight), around = case.make(dtype, device_of(variant))
    weight = quantized(weight, precision)
    y = compute(variant, "conv2d", x, weight, **around)
    assert y.is_contiguous() and y.dtype == dtype
    same = sana_kernels.conv2d(x, weight, **around, backend="reference")
    exact, wide = in_double(weight, around)
    oracle = sana_kernels.conv2d(x.double(), exact, **wide, backend="reference")
    if precision in INTEGERS and "input" in case.around:  # values between two steps may go either way
        assert relative_rms(y, oracle) < (1.5e-2 if precision == "winograd" else 1e-2)
    else:
        assert_kernel(y, same, oracle, f"{variant} {case}")


@pytest.mark.parametrize("case", CASES[:5], ids=str)
@pytest.mark.parametrize("precision", INTEGERS)
@pytest.mark.parametrize("variant", CPU)
def test_w8a8_between_floats(variant, precision, case):
    (x, weight), around = case.make(torch.float32)
    weight = quantized(weight, precision)
    same = sana_kernels.conv2d(x, weight, **around, backend="reference")
    exact, wide = in_double(weight, around)
    oracle = sana_kernels.conv2d(x.double(), exact, **wide, backend="reference")
    assert_kernel(compute(variant, "conv2d", x, weight, **around), same, oracle, f"{variant} {case}")


def test_a_resblock_is_that_of_diffusers():
    block = of_diffusers("autoencoders.autoencoder_dc", "ResBlock")
    theirs = block(32, 32, norm_type="rms_norm", act_fn="silu")
    x, weight, bias = signed(2, 9, 5, 32), signed(32), torch.randn(32)
    theirs.norm.load_state_dict({"weight": weight, "bias": bias})
    y = sana_kernels.conv2d(x, theirs.conv1.weight, theirs.conv1.bias, activation="silu", backend="reference")
    y = sana_kernels.conv2d(y, theirs.conv2.weight, norm=(weight, bias), residual=x, backend="reference")
    assert_close(y, theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), of_rms=1e-5)


def test_the_scales_are_those_of_tiles():
    """The specification, tile by tile in plain words."""
    x, weight = signed(1, 19, 70, 8), torch.randn(5, 8, 3, 3)
    x[0, 7, 31] = 400  # seen by four tiles
    for stride in (1, 2):
        expected = torch.zeros(1, -(-19 // stride), -(-70 // stride), 5, dtype=torch.float64)
        integers = quantize_conv2d(weight)
        for row in range(0, expected.shape[1], 8):
            for pixel in range(0, expected.shape[2], 32):
                last_row, last = min(row + 8, expected.shape[1]), min(pixel + 32, expected.shape[2])
                top, left = max(0, stride * row - 1), max(0, stride * pixel - 1)
                seen = x[:, top : stride * (last_row - 1) + 2, left : stride * (last - 1) + 2]
                scale = seen.abs().max() / 127
                steps = torch.zeros_like(x)
                steps[:, top : top + seen.shape[1], left : left + seen.shape[2]] = (seen / scale).round()
                kernel = integers.values.double() * integers.scale.double()[:, None, None, None]
                y = F.conv2d(steps.double().permute(0, 3, 1, 2), kernel, stride=stride, padding=1).permute(0, 2, 3, 1)
                expected[:, row:last_row, pixel:last] = scale.double() * y[:, row:last_row, pixel:last]
        y = sana_kernels.conv2d(x, integers, stride=stride, backend="reference")
        assert_close(y, expected, of_rms=1e-5)
        with pytest.raises(AssertionError):  # one scale for all
            assert_close(y, sana_kernels.conv2d(x.double(), weight.double(), stride=stride), of_rms=1e-5)


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


@pytest.mark.parametrize("variant", CPU)
def test_int32_sums_are_exact_at_the_extremes(variant):
    """Every pair of signs, sums up to 127² · 9 · 112, which fp32 still holds exactly."""
    x = torch.full((1, 9, 33, 112), 127.0)
    x[:, ::2, 1::2] *= -1
    x[..., 3::7] *= -1
    weight = torch.full((20, 112, 3, 3), 127, dtype=torch.int8)
    weight[::2, ::3] = -127
    weight[1::4] = -127
    y = compute(variant, "conv2d", x, ConvWeight(weight, torch.ones(20), tuple(weight.shape)))
    exact = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), padding=1).permute(0, 2, 3, 1)
    assert torch.equal(y.double(), exact)


MISTAKES = {
    "rows of taps reversed": lambda x, w, kw: sana_kernels.conv2d(x, w.flip(2), **kw),
    "taps transposed": lambda x, w, kw: sana_kernels.conv2d(x, w.mT.contiguous(), **kw),
    "a tile does not see its neighbour": lambda x, w, kw: sana_kernels.conv2d(
        x.index_fill(2, torch.tensor([32]), 0), w, **kw
    ),
    "the border repeats instead of zeros": lambda x, w, kw: sana_kernels.conv2d(
        F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1), "replicate").permute(0, 2, 3, 1).contiguous(),
        w, **kw | {"residual": F.pad(kw["residual"], (0, 0, 1, 1, 1, 1))},
    )[:, 1:-1, 1:-1],
    "residual before the norm": lambda x, w, kw: sana_kernels.rms_norm(
        sana_kernels.conv2d(x, w, residual=kw["residual"]), *kw["norm"]
    ),
    "the last channel left out": lambda x, w, kw: sana_kernels.conv2d(x.index_fill(3, torch.tensor([35]), 0), w, **kw),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_of_conv2d_notices(mistake):
    (x, weight), around = Case(1, 9, 34, 36, 16, around="norm residual").make(torch.bfloat16)
    same = sana_kernels.conv2d(x, weight, **around, backend="reference")
    exact, wide = in_double(weight, around)
    oracle = sana_kernels.conv2d(x.double(), exact, **wide, backend="reference")
    assert_kernel(same, same, oracle)
    with pytest.raises(AssertionError):
        assert_kernel(MISTAKES[mistake](x, weight, around), same, oracle)


def banded(x: torch.Tensor, ends: list[int], stride: int, reach: int, call) -> torch.Tensor:
    """The rows between consecutive `ends`, each computed from the rows of x that it needs."""
    H, parts = x.shape[1], []
    for first, last in pairwise(ends):
        start, end = max(0, stride * first - reach), min(H, stride * (last - 1) + reach + 1)
        parts.append(call(x[:, start:end].contiguous(), Band(start, first, last, H), first, last))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", ["reference", *CPU])
def test_bands_are_the_whole_bit_for_bit(variant, precision):
    """35 rows: bands of whole tiles, or of any number of rows where nothing is quantised."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16

    def same_rows(parts: torch.Tensor, whole: torch.Tensor) -> None:
        if variant == "reference" and precision == "fp32":  # PyTorch's order of sums depends on the shape
            assert_close(parts, whole, of_rms=1e-5)
        else:
            assert torch.equal(parts, whole)

    ends = [0, 8, 24, 32, 35] if precision in INTEGERS else [0, 1, 2, 15, 34, 35]
    width = 100 if precision == "winograd" else 37  # with a tile inside the image, whose pixels are read from x itself
    for stride in (1,) if precision == "winograd" else (1, 2):
        (x, weight), around = Case(1, 35 * stride - stride + 1, width, 36, 40, stride, "silu", "norm residual").make(
            dtype
        )
        weight = quantized(weight, precision)
        residual = around.pop("residual")
        whole = compute(variant, "conv2d", x, weight, **around, residual=residual)

        def part(rows, band, first, last, weight=weight, around=around, residual=residual):
            here = residual[:, first:last].contiguous()
            return compute(variant, "conv2d", rows, weight, **around, residual=here, band=band)

        same_rows(banded(x, ends, stride, 1, part), whole)
    x, weight, bias = upsample_inputs(2, 35, 37, 32, 16, dtype)
    folded = reference.fold_upsample(weight)
    folded = quantize_conv2d(folded) if precision in INTEGERS else folded
    whole = compute(variant, "upsample", x, folded, bias)
    parts = banded(
        x, ends, 1, 1,
        lambda rows, band, *_: compute(variant, "upsample", rows, folded, bias, band=band),
    )  # fmt: skip
    same_rows(parts, whole)
    off_by_one = Band(6, 8, 16, 35)  # the same rows, said to lie one higher
    wrong = compute(variant, "upsample", x[:, 7:18].contiguous(), folded, bias, band=off_by_one)
    assert not torch.equal(wrong, whole[:, 16:32])


@pytest.mark.parametrize("variant", ["reference", *CPU])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_in_two_pieces_are_the_same_image(variant, precision):
    """Cut anywhere: between tiles, in a tile, in the halo; a band of the second piece alone, and the whole image."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    (x, weight), around = Case(1, 41, 100, 36, 40, around="norm residual").make(dtype)
    weight, residual = quantized(weight, precision), around.pop("residual")
    folded, bias = reference.fold_upsample(torch.randn(36, 36, 3, 3, dtype=dtype)), torch.randn(36, dtype=dtype)
    folded = quantize_conv2d(folded) if precision in INTEGERS else folded

    def pieces(rows: torch.Tensor, cut: int) -> tuple[torch.Tensor, torch.Tensor]:
        return rows[:, :cut].clone(), rows[:, cut:].clone()

    for band in (Band(0, 0, 41, 41), Band(0, 16, 41, 41)):
        here = residual[:, band.first :]
        whole = compute(variant, "conv2d", x, weight, **around, residual=here, band=band)
        larger = compute(variant, "upsample", x, folded, bias, band=band)
        for cut in (1, 7, 16, 17, 40):
            in_two = {"residual": pieces(here, min(cut, 24)), "band": band}
            assert torch.equal(compute(variant, "conv2d", pieces(x, cut), weight, **around, **in_two), whole)
            assert torch.equal(compute(variant, "upsample", pieces(x, cut), folded, bias, band=band), larger)
    rest = x[:, 16:].clone()
    swapped = compute(variant, "conv2d", (rest[:, :16].clone(), rest), weight, **around, residual=residual)
    assert not torch.equal(swapped, compute(variant, "conv2d", x, weight, **around, residual=residual))


@pytest.mark.parametrize("variant", CPU)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_weights_and_threads_change_nothing(variant, precision):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    (x, weight), around = Case(2, 17, 65, 36, 48, around="norm residual").make(dtype)
    folded, bias = torch.randn(4 * 18, 36, 2, 2, dtype=dtype), torch.randn(18, dtype=dtype)
    if precision in INTEGERS:
        weight, folded = quantized(weight, precision), quantize_conv2d(folded)
    before, kept = torch.get_num_threads(), x.clone()
    results = []
    for threads, w, f in ((1, weight, folded), (2, pack_conv2d(weight), pack_conv2d(folded, 4)), (5, weight, folded)):
        torch.set_num_threads(threads)
        try:
            results.append((compute(variant, "conv2d", x, w, **around), compute(variant, "upsample", x, f, bias)))
        finally:
            torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("variant", CPU)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("channels", [3, 32, 40])
def test_a_nan_reaches_whatever_sees_it(variant, precision, channels):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    (x, weight), _ = Case(1, 20, 70, channels, 16).make(dtype)
    x[0, 10, 40, 2] = torch.nan
    weight = quantized(weight, precision)
    y = compute(variant, "conv2d", x, weight)
    touched = torch.zeros(20, 70, dtype=torch.bool)
    if precision in INTEGERS:
        touched[8:16, 32:64] = True  # the tile whose scale it is
    else:
        touched[9:12, 39:42] = True
    assert torch.equal(y[0].isnan().any(-1), touched)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("variant", CPU)
def test_multi_scale_against_fp64_and_diffusers(variant, dtype):
    projection = of_diffusers("attention_processor", "SanaMultiscaleAttentionProjection")
    for B, H, W, C, kernel in ((1, 1, 1, 32, 5), (2, 7, 33, 96, 5), (1, 33, 7, 64, 3)):
        theirs = projection(C // 3, C // 96, kernel) if C % 96 == 0 else None
        x, taps = signed(B, H, W, C, dtype=dtype), torch.randn(C, 1, kernel + 2, kernel + 2).to(dtype) / kernel
        depthwise = taps[:, :, 1:-1, 1:-1]  # in no order that a view could flatten
        grouped = torch.randn(C, 32, 1, 1).to(dtype) / 6
        y = compute(variant, "multi_scale", x, depthwise, grouped)
        same = sana_kernels.multi_scale(x, depthwise, grouped, backend="reference")
        oracle = sana_kernels.multi_scale(*double(x, depthwise, grouped), backend="reference")
        assert_kernel(y, same, oracle, f"{variant} {C}")
        if theirs is not None:
            theirs = theirs.double()
            theirs.load_state_dict({"proj_in.weight": depthwise.double(), "proj_out.weight": grouped.double()})
            assert_close(oracle, theirs(x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1), of_rms=1e-12)
        with pytest.raises(AssertionError):  # the groups' matrices transposed
            wrong = grouped.view(-1, 32, 32).mT.reshape(C, 32, 1, 1)
            assert_kernel(compute(variant, "multi_scale", x, depthwise, wrong), same, oracle)
        parts = banded(
            x, sorted({0, 1, H // 2, H}), 1, kernel // 2,
            lambda rows, band, *_, w=(depthwise, grouped): compute(variant, "multi_scale", rows, *w, band=band),
        )  # fmt: skip
        assert torch.equal(parts, y)


IMAGE, C, FOLDED, KERNEL = (2, 3, 4, 8), (8,), (32, 8, 2, 2), (8, 8, 3, 3)
PIECE = torch.zeros(1, 3, 4, 8)
W8A8 = ConvWeight(torch.zeros(KERNEL).char(), torch.ones(8), KERNEL)


@pytest.mark.parametrize(
    ("op", "shapes", "options", "message"),
    [
        ("rms_norm", [IMAGE, (9,), C], {}, r"weight and bias \(C,\); got .*\(9,\)"),
        ("rms_norm", [IMAGE, C, C], {"residual": torch.zeros(2, 3, 5, 8)}, r"x's shape .*got \(2, 3, 5, 8\)"),
        ("rms_norm", [IMAGE, C, C], {"activation": "gelu"}, "none, silu, relu; got 'gelu'"),
        ("rms_norm", [IMAGE, C, C], {"residual": torch.zeros(IMAGE).half()}, "one floating dtype and device"),
        ("upsample", [IMAGE, (32, 8, 4, 4), C], {}, r"a folded weight .*got .*\(32, 8, 4, 4\)"),
        ("upsample", [IMAGE, FOLDED, (9,)], {}, r"bias of \(out,\).*got \(9,\)"),
        ("upsample", [IMAGE, FOLDED, C], {"band": Band(0, 0, 4, 3)}, "band inside its image"),
        ("conv2d", [(3, 4, 8), KERNEL], {}, r"takes x \(B, H, W, in\)"),
        ("conv2d", [IMAGE, (8, 9, 3, 3)], {}, r"a weight \(out, 8, 3, 3\)"),
        ("conv2d", [IMAGE, KERNEL, (9,)], {}, r"bias as floating \(8,\); got torch.float32 \(9,\)"),
        ("conv2d", [IMAGE, KERNEL], {"stride": 3}, "stride of 1 or 2; got 3"),
        ("conv2d", [IMAGE, KERNEL], {"activation": "gelu"}, "got 'gelu'"),
        ("conv2d", [IMAGE, KERNEL], {"input_activation": "relu"}, "only beside an input norm"),
        ("conv2d", [IMAGE, KERNEL], {"residual": torch.zeros(2, 3, 4, 9)}, r"residual \(2, 3, 4, 8\)"),
        ("conv2d", [IMAGE, KERNEL], {"band": Band(2, 0, 3, 9)}, "needs rows 0 to 3 of the image"),
        ("conv2d", [IMAGE, KERNEL], {"weight": W8A8, "band": Band(0, 0, 2, 9)}, "whole tiles of 8 rows"),
        ("conv2d", [IMAGE, KERNEL], {"x": (torch.zeros(IMAGE), torch.zeros(IMAGE))}, "two pieces of one image"),
        (
            "conv2d",
            [IMAGE, KERNEL],
            {"x": (PIECE, torch.zeros(1, 3, 5, 8))},
            r"pieces .* got \(1, 3, 4, 8\) and \(1, 3, 5, 8\)",
        ),
        ("conv2d", [IMAGE, KERNEL], {"x": (PIECE.half(), PIECE)}, "one floating dtype and device"),
        (
            "conv2d",
            [IMAGE, KERNEL],
            {"x": (PIECE, PIECE), "residual": (PIECE, PIECE[:, 1:])},
            r"residual \(1, 6, 4, 8\)",
        ),
        ("upsample", [IMAGE, FOLDED, C], {"x": (PIECE[:, :0], PIECE)}, "none of them 0"),
        ("conv2d", [IMAGE, KERNEL], {"weight": torch.zeros(KERNEL).half()}, "a weight in x's dtype"),
        ("conv2d", [IMAGE, KERNEL], {"weight": W8A8._replace(scale=torch.ones(9))}, r"\(8,\); got \(9,\)"),
        ("multi_scale", [IMAGE, (8, 1, 4, 4), (8, 4, 1, 1)], {}, "k odd"),
        ("multi_scale", [IMAGE, (8, 1, 5, 5), (8, 3, 1, 1)], {}, "D a divisor"),
    ],
)
def test_wrong_arguments_get_one_sentence(op, shapes, options, message):
    names = {"rms_norm": ("x", "weight", "bias"), "multi_scale": ("x", "depthwise", "grouped")}
    given = dict(zip(names.get(op, ("x", "weight", "bias")), map(torch.zeros, shapes), strict=False))
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        getattr(sana_kernels, op)(**given | options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("out", [8, 16, 24])
def test_a_weight_packed_for_another_op_is_refused(out):
    x, folded = torch.zeros(1, 2, 3, 8), torch.zeros(4 * out, 8, 2, 2)
    assert sana_kernels.upsample(x, pack_conv2d(folded, phases=4), torch.zeros(out)).shape == (1, 4, 6, out)
    with pytest.raises(ValueError, match=r"pack_conv2d\(weight, phases=4\) makes of it"):
        sana_kernels.upsample(x, pack_conv2d(folded), torch.zeros(out))
    with pytest.raises(ValueError, match=r"phases=1\) makes of it"):
        sana_kernels.conv2d(x, ConvWeight(torch.zeros(1, 1, 1, 1, 1), None, (8, 8, 3, 3)))


def test_packed_weights_are_for_the_cpu_kernels():
    x, packed = torch.zeros(IMAGE), pack_conv2d(torch.zeros(KERNEL))
    assert sana_kernels.conv2d(x, packed).shape == IMAGE
    with pytest.raises(sana_kernels.backend.BackendUnavailable, match="weights as they are, not packed"):
        sana_kernels.conv2d(x, packed, backend="reference")
    with pytest.raises(TypeError, match=r"float32, bfloat16 and int8; got torch\.float16"):
        pack_conv2d(torch.zeros(KERNEL).half())
    with pytest.raises(sana_kernels.backend.BackendUnavailable, match=r"float32 and bfloat16, not torch\.float16"):
        sana_kernels.conv2d(x.half(), torch.zeros(KERNEL).half(), backend="cpu")
