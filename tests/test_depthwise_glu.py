"""depthwise_glu, the middle of mix_ffn, against PyTorch's convolution in fp64, floating and quantised."""

import pytest
import torch
from compare import assert_close, assert_kernel, assert_quantized
from variants import DTYPES, device_of, double, isas, run, signed, variants

from sana_kernels.gemm.reference import quantize
from sana_kernels.mix_ffn.reference import depthwise_glu as reference


def arguments(B: int, height: int, width: int, F: int, dtype: torch.dtype, weights: torch.dtype, device: str = "cpu"):
    h = signed(B, height * width, 2 * F, dtype=dtype)
    weight, bias = torch.randn(2 * F, 1, 3, 3) / 3, torch.randn(2 * F)
    return h.to(device), height, width, weight.to(device, weights), bias.to(device, weights)


GRIDS = [(2, 9, 5, 136), (1, 1, 1, 250), (2, 1, 23, 72), (1, 2, 37, 320), (3, 17, 1, 64), (1, 3, 3, 2880)]  # B, H, W, F
SLACK = 0.03  # of a step: SiLU in 16 bits is off by 1.3e-4, and a step is 1 / 127 of the largest


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", variants("depthwise_glu", tiles=True))
def test_error_against_fp64(variant, dtype, grid):
    for weights in {dtype, torch.float32}:
        args = arguments(*grid, dtype, weights, device_of(variant))
        before = args[0].clone()
        y = run(variant, "depthwise_glu", *args)
        assert y.is_contiguous() and torch.equal(args[0], before)
        same_dtype = reference(*(a.to(dtype) if isinstance(a, torch.Tensor) else a for a in args))
        assert_kernel(y, same_dtype, reference(*double(*args)), f"{variant} {grid} {weights}")


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", variants("depthwise_glu_quantized", tiles=True))
def test_quantized_rows_against_fp64(variant, dtype, grid):
    rounded = 127 * torch.finfo(dtype).eps / 2 if variant == "cuda" else 0  # of u to h's dtype, as the reference allows
    for weights in {dtype, torch.float32}:
        args = arguments(*grid, dtype, weights, device_of(variant))
        values, scale = run(variant, "depthwise_glu", *args, quantize=torch.int8)
        assert values.shape == (grid[0], grid[1] * grid[2], -(-grid[3] // 64) * 64)
        assert_quantized(values, scale, reference(*double(*args)), SLACK + rounded, f"{variant} {grid} {weights}")


@pytest.mark.gpu
def test_the_reference_computes_fp32_without_tf32(monkeypatch):
    """Which PyTorch allows convolutions by default, and which keeps 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    args = arguments(1, 8, 8, 64, torch.float32, torch.float32, "cuda")
    assert_close(reference(*args), reference(*double(*args)), of_rms=1e-5)


MISTAKES = {
    "height and width swapped": lambda h, H, W, weight, bias: (h, W, H, weight, bias),
    "value and gate swapped": lambda h, H, W, *rest: (h, H, W, *(t.roll(t.shape[0] // 2, 0) for t in rest)),
    "a kernel upside down": lambda h, H, W, weight, bias: (h, H, W, weight.flip(2), bias),
    "a kernel mirrored": lambda h, H, W, weight, bias: (h, H, W, weight.flip(3), bias),
    "no bias": lambda h, H, W, weight, bias: (h, H, W, weight, 0 * bias),
    "rows that run into each other": lambda h, H, W, weight, bias: (h, 1, H * W, weight, bias),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(mistake):
    args = arguments(2, 3, 5, 64, torch.float32, torch.float32)
    wrong, oracle = reference(*MISTAKES[mistake](*args)), reference(*double(*args))
    with pytest.raises(AssertionError):
        assert_kernel(wrong, reference(*args), oracle)
    with pytest.raises(AssertionError):
        assert_quantized(*quantize(wrong), oracle, SLACK)


@pytest.mark.parametrize("isa", isas())
def test_silu_over_its_whole_range(isa):
    """Relative error of SiLU in float, and of what 16-bit results use; beyond that, no NaN and no infinity."""
    gate = torch.cat([torch.linspace(-86, 86, 4001), torch.linspace(-1, 1, 999), torch.tensor([-1e4, -200, 0, 200])])
    F = len(gate)
    weight = torch.zeros(2 * F, 1, 3, 3)
    weight[:, 0, 1, 1] = 1
    for dtype, limit in ((torch.float32, 4.5e-7), (torch.bfloat16, 2**-8 + 1.4e-4)):
        h = torch.cat([torch.ones(F), gate])[None, None].to(dtype)
        y = run(f"cpu:{isa}", "depthwise_glu", h, 1, 1, weight, torch.zeros(2 * F))[0, 0].double()
        x = h[0, 0, F:].double()
        inside, error, expected = x.abs() <= 86, (y - x * x.sigmoid()).abs(), x * x.sigmoid()
        assert (error <= limit * expected.abs())[inside].all()
        assert error[~inside].max() <= 1e-30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", isas())
def test_same_bytes_on_any_number_of_threads(isa, dtype):
    args = arguments(2, 13, 19, 192, dtype, dtype)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        quantized = run(f"cpu:{isa}", "depthwise_glu", *args, quantize=torch.int8)
        results.append((run(f"cpu:{isa}", "depthwise_glu", *args), *quantized))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", isas())
def test_a_nan_reaches_its_neighbours_and_no_further(isa, dtype):
    h, *rest = arguments(1, 5, 5, 64, dtype, dtype)
    h[0, 12, 7] = float("nan")
    y = run(f"cpu:{isa}", "depthwise_glu", h, *rest)
    assert torch.equal(y.isnan(), reference(h, *rest).isnan()) and y.isnan().sum() == 9
    _, scale = run(f"cpu:{isa}", "depthwise_glu", h, *rest, quantize=torch.int8)
    assert scale.isnan().sum() == 9
