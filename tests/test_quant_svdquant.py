"""SVDQuant, GPTQ and smoothing: each does what it is published for, on weights and inputs with outliers."""

import pytest
import torch
from variants import signed

from sana_kernels.quant import svdquant
from sana_kernels.quant.calibration import LayerInputs
from sana_kernels.quant.formats import dequantize_int4, quantize_int4
from sana_kernels.quant.gptq import gptq
from sana_kernels.quant.svdquant import Recipe, low_rank, quantize_layer, smooth_scale, sqnr_db

N, K, T = 192, 320, 512


@pytest.fixture
def case():
    """A weight of uneven columns and inputs with correlated and with outlier channels: (weight, inputs)."""
    weight = torch.randn(N, K) * (0.2 + 2 * torch.rand(K)) / K**0.5
    rows = torch.randn(T, K // 4) @ torch.randn(K // 4, K) / 9 + signed(T, K) / 3
    return weight, LayerInputs(rows.bfloat16(), rows.abs().amax(0))


def found(case, **recipe) -> float:
    """dB on rows that the layer was not fitted to."""
    weight, inputs = case
    fitted, held_out = inputs.split()
    return sqnr_db(quantize_layer(weight, Recipe(**recipe), fitted), weight, held_out)


@pytest.mark.parametrize(("count", "held_out"), [(1, None), (7, None), (8, [0]), (20, [0, 8, 16])])
def test_every_eighth_row_is_held_out(count, held_out):
    inputs = LayerInputs(torch.arange(count)[:, None].float(), torch.tensor([99.0]))
    fitted, scored = inputs.split()
    if held_out is None:  # too few to spare any
        assert torch.equal(fitted.rows, inputs.rows) and torch.equal(scored, inputs.rows)
    else:
        assert scored[:, 0].tolist() == held_out
        assert fitted.rows[:, 0].tolist() == [i for i in range(count) if i not in held_out]
    assert torch.equal(fitted.absmax, inputs.absmax)


def test_the_order_of_methods(case):
    rtn, low = found(case), found(case, rank=16)
    smooth, svd = found(case, smooth=True, grid=10), found(case, smooth=True, rank=16, grid=10)
    best = found(case, smooth=True, rank=16, grid=10, gptq=True)
    assert rtn + 0.3 < low < svd and rtn + 2 < smooth + 0.1 < svd < best
    assert svd > rtn + 3


def test_smoothing_helps_8_bits_too(case):
    plain, smooth = (found(case, format="int8", activations="int8", smooth=s, grid=10) for s in (False, True))
    assert smooth > plain + 1


def test_weights_alone(case):
    """Activations in 16 bits: the grid is AWQ's, and rounding is all that is lost."""
    plain, scaled = (found(case, activations="16bit", smooth=smooth, grid=10) for smooth in (False, True))
    assert scaled > plain + 0.5


def test_refinement_never_hurts(case):
    once, refined = (found(case, rank=16, refinements=count) for count in (0, 8))
    assert refined > once - 0.1


def test_a_useless_search_leaves_the_layer_alone():
    """Where nothing is uneven, no candidate may be worse than plain rounding on the search's own inputs."""
    weight, rows = torch.randn(64, 128), torch.randn(svdquant.SEARCH_ROWS, 128)
    inputs = LayerInputs(rows, rows.abs().amax(0))
    plain, searched = (quantize_layer(weight, Recipe(smooth=smooth), inputs) for smooth in (False, True))
    assert sqnr_db(searched, weight, rows) >= sqnr_db(plain, weight, rows) - 1e-3


def test_what_a_checkpoint_gets(case):
    weight, inputs = case
    layer = quantize_layer(weight, Recipe(smooth=True, rank=16, grid=4), inputs)
    assert layer.rank == 16 and layer.down.shape == (16, K) and layer.up.shape == (N, 16)
    assert layer.down.dtype == layer.up.dtype == torch.bfloat16 and layer.scale.dtype == torch.bfloat16
    assert layer.smooth.dtype == torch.float32 and bool((layer.smooth > 0).all())
    # What is rounded is what the stored branch leaves: so its own rounding is made up for.
    residual = weight * layer.smooth - layer.up.float() @ (layer.down.float() * layer.smooth)
    assert torch.equal(layer.values, quantize_int4(residual, scale_dtype=torch.bfloat16).values)
    assert sqnr_db(quantize_layer(weight, Recipe(rank=10**6), inputs), weight, inputs.rows) > 40  # all of it


def test_the_same_every_time(case):
    weight, inputs = case
    recipe = Recipe(smooth=True, rank=8, grid=3, gptq=True)
    first = quantize_layer(weight, recipe, inputs)
    torch.manual_seed(1)
    second = quantize_layer(weight, recipe, inputs)
    for a, b in zip(first.tensors().values(), second.tensors().values(), strict=True):
        assert torch.equal(a, b)
    before = torch.get_rng_state()
    low_rank(weight, 4)
    assert torch.equal(torch.get_rng_state(), before)  # the seed is its own


def test_low_rank_is_nearly_the_best():
    matrix = torch.randn(200, 16) @ torch.randn(16, 300) + 0.3 * torch.randn(200, 300)
    up, down = low_rank(matrix, 16)
    u, s, v = torch.linalg.svd(matrix.double())
    best = ((u[:, :16] * s[:16]) @ v[:16] - matrix.double()).norm()
    assert (up @ down - matrix).norm() < 1.02 * best
    assert torch.allclose(down @ down.t(), torch.eye(16), atol=1e-5)


def test_smooth_scale_by_hand():
    x, w = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 2.0])
    scale = smooth_scale(x, w, 0.5, 0.5)
    assert scale.tolist() == pytest.approx([2, 0.5, 1])  # √(4/1), √(1/4): of geometric mean 1; dead channels stay
    assert smooth_scale(torch.zeros(3), w, 0.5, 0.5).tolist() == [1, 1, 1]


@pytest.mark.parametrize("shape", [(64, 64), (33, 200), (128, 320)], ids=str)
def test_gptq_beats_rounding(shape):
    """Less error at the output, though more in the weights: the scales are the same, and so is the format."""
    N, K = shape
    weight = signed(N, K)
    x = torch.randn(800, K // 2) @ torch.randn(K // 2, K) + 0.1 * signed(800, K)
    fitted, others = x.split(400)
    plain, better = quantize_int4(weight, scale_dtype=torch.bfloat16), gptq(weight, fitted)
    assert torch.equal(plain.scale, better.scale) and plain.values.shape == better.values.shape

    def error(rows):
        return ((dequantize_int4(rows)[:, :K] - weight.double()) @ others.double().t()).square().sum()

    assert error(better) < 0.8 * error(plain)
    assert (dequantize_int4(better)[:, :K] - weight).square().sum() > (
        dequantize_int4(plain)[:, :K] - weight
    ).square().sum()


def test_gptq_one_column_at_a_time():
    """As the paper writes it: after each column, the optimal update of all that are left, by solving for it anew."""
    N, K = 8, 64
    weight, x = torch.randn(N, K).double(), (torch.randn(200, 64) @ torch.randn(64, 64)).double()
    hessian = x.t() @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(K)
    scale = quantize_int4(weight, scale_dtype=torch.bfloat16).scale.double()
    left, rows, free = weight.clone(), torch.zeros(N, K).double(), hessian.diagonal().argsort(descending=True).tolist()
    while free:
        k, *free = free
        rows[:, k] = (left[:, k] / scale[:, 0]).round().clamp(-7, 7) * scale[:, 0]
        if free:
            move = torch.linalg.solve(hessian[free][:, free], hessian[free, k])
            left[:, free] += (left[:, k] - rows[:, k])[:, None] * move
    ours = dequantize_int4(gptq(weight, x))
    assert ((ours - rows).abs() > 1e-6).double().mean() < 0.02  # ties and fp32 sums flip one value in a hundred


def test_gptq_of_dead_channels_and_singular_inputs():
    weight, x = signed(16, 128), torch.zeros(4, 128)
    assert torch.equal(gptq(weight, x).values, quantize_int4(weight, scale_dtype=torch.bfloat16).values)
    x[:, :3] = torch.randn(4, 3)
    assert dequantize_int4(gptq(weight, x)).isfinite().all()
    with pytest.raises(ValueError, match="NaN"):
        gptq(weight, torch.full((4, 128), float("nan")))


def test_recipes_that_cannot_be(case):
    weight, inputs = case
    with pytest.raises(ValueError, match="calibrate first"):
        quantize_layer(weight, Recipe(rank=4))
    with pytest.raises(ValueError, match="for int4 weights"):
        quantize_layer(weight, Recipe("int8", "int8", gptq=True), inputs)
    methods = [Recipe(), Recipe(gptq=True), Recipe(smooth=True), Recipe(rank=4, smooth=True, gptq=True)]
    assert [recipe.method for recipe in methods] == ["rtn", "gptq", "smooth", "svdquant+gptq"]
