"""conv2d on every backend and instruction set, AMX on emulated tiles included, against fp64, and its reference against
diffusers' ResBlock; bands, rows in two pieces, and what the ops of csrc/conv2d refuse."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_kernel, relative_rms
from convolutions import (
    CPU,
    GPU,
    INTEGERS,
    PRECISIONS,
    Case,
    banded,
    in_double,
    of_diffusers,
    quantized,
    quantized_upsample,
    upsample_inputs,
)
from variants import device_of, run, signed

import sana_kernels
from sana_kernels.conv2d import Band, ConvWeight, reference
from sana_kernels.conv2d.weights import pack_conv2d, quantize_conv2d

CASES = [
    Case(50, 1, 1, 32, 16),  # so many that chance does not decide about fp32's RMSE
    Case(2, 7, 33, 3, 32, activation="silu", around="bias"),  # an image's channels; a tile of one pixel
    Case(1, 33, 7, 128, 128, activation="silu", around="bias"),
    Case(1, 9, 34, 132, 64, around="norm residual"),  # 4 channels beyond a vector
    Case(2, 26, 130, 36, 20, around="bias"),  # tiles inside the image, of two images
    Case(2, 10, 5, 64, 272, around="norm residual"),  # 17 panels of columns
    Case(1, 33, 70, 16, 50, stride=2, around="bias residual"),
    Case(1, 8, 64, 256, 96, stride=2, activation="relu"),
    Case(1, 9, 11, 512, 512, activation="silu", around="bias"),  # groups of four rows
    Case(1, 17, 33, 128, 3, around="bias input"),  # the decoder's last
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", [*CPU, *GPU])
def test_conv2d_against_fp64(variant, precision, case):
    """Of integers, against the fp64 sums of what they stand for."""
    if variant == "cuda" and precision in INTEGERS:
        pytest.skip("there is no kernel of integers on GPUs")
    if "winograd" in precision and case.stride == 2:
        pytest.skip("Winograd's products are for a stride of 1")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    (x, weight), around = case.make(dtype, device_of(variant))
    weight = quantized(weight, precision)
    y = run(variant, "conv2d", x, weight, **around)
    assert y.is_contiguous() and y.dtype == dtype
    if "winograd" in precision and "input" in case.around:  # which is rounded before it is transformed
        norm, activation = around.pop("input_norm"), around.pop("input_activation")
        x = sana_kernels.rms_norm(x.float(), *(t.float() for t in norm), activation=activation).bfloat16()
    same = sana_kernels.conv2d(x, weight, **around, backend="reference")
    exact, wide = in_double(weight, around)
    oracle = sana_kernels.conv2d(x.double(), exact, **wide, backend="reference")
    if precision == "w8a8" and "input" in case.around:  # values between two steps may go either way
        assert relative_rms(y, oracle) < 1e-2
    else:
        assert_kernel(y, same, oracle, f"{variant} {case}")


@pytest.mark.parametrize("case", [*CASES[:6], CASES[8]], ids=str)
@pytest.mark.parametrize("precision", INTEGERS)
@pytest.mark.parametrize("variant", CPU)
def test_integers_between_floats(variant, precision, case):
    (x, weight), around = case.make(torch.float32)
    weight = quantized(weight, precision)
    same = sana_kernels.conv2d(x, weight, **around, backend="reference")
    exact, wide = in_double(weight, around)
    oracle = sana_kernels.conv2d(x.double(), exact, **wide, backend="reference")
    y = run(variant, "conv2d", x, weight, **around)
    if "winograd" in precision:  # values between two steps may go either way
        assert relative_rms(y, oracle) < (5e-5 if precision == "winograd int16" else 2e-3)
    else:
        assert_kernel(y, same, oracle, f"{variant} {case}")


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


@pytest.mark.parametrize("variant", CPU)
def test_int32_sums_are_exact_at_the_extremes(variant):
    """Every pair of signs, sums up to 127² · 9 · 112, which fp32 still holds exactly; and larger ones, rounded once."""
    x = torch.full((1, 9, 33, 112), 127.0)
    x[:, ::2, 1::2] *= -1
    x[..., 3::7] *= -1
    weight = torch.full((20, 112, 3, 3), 127, dtype=torch.int8)
    weight[::2, ::3] = -127
    weight[1::4] = -127
    y = run(variant, "conv2d", x, ConvWeight(weight, torch.ones(20), tuple(weight.shape)))
    exact = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), padding=1).permute(0, 2, 3, 1)
    assert torch.equal(y.double(), exact)

    x = torch.full((1, 3, 3, 600), 127.0)  # rows of taps that are odd numbers beyond 2²⁴
    weight = torch.full((16, 600, 3, 3), 127, dtype=torch.int8)
    weight[:, 0, :, 0] = torch.tensor([3, 5, 7])
    y = run(variant, "conv2d", x, ConvWeight(weight, torch.ones(16), tuple(weight.shape)))
    exact = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), padding=1).permute(0, 2, 3, 1)
    assert exact.max() > 2**26 and torch.equal(y, exact.float())


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
    width = 200 if "winograd" in precision else 37  # with a tile inside the image, whose pixels are read from x itself
    for stride in (1,) if "winograd" in precision else (1, 2):
        (x, weight), around = Case(1, 35 * stride - stride + 1, width, 36, 40, stride, "silu", "norm residual").make(
            dtype
        )
        weight = quantized(weight, precision)
        residual = around.pop("residual")
        whole = run(variant, "conv2d", x, weight, **around, residual=residual)

        def part(rows, band, first, last, weight=weight, around=around, residual=residual):
            here = residual[:, first:last].contiguous()
            return run(variant, "conv2d", rows, weight, **around, residual=here, band=band)

        same_rows(banded(x, ends, stride, 1, part), whole)
    x, weight, bias = upsample_inputs(2, 35, 100, 32, 16, dtype)
    folded = quantized_upsample(weight, precision)
    whole = run(variant, "upsample", x, folded, bias)
    parts = banded(
        x, ends, 1, 1,
        lambda rows, band, *_: run(variant, "upsample", rows, folded, bias, band=band),
    )  # fmt: skip
    same_rows(parts, whole)
    off_by_one = Band(6, 8, 16, 35)  # the same rows, said to lie one higher
    wrong = run(variant, "upsample", x[:, 7:18].contiguous(), folded, bias, band=off_by_one)
    assert not torch.equal(wrong, whole[:, 16:32])


def pieces(rows: torch.Tensor, cut: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rows[:, :cut].clone(), rows[:, cut:].clone()


@pytest.mark.parametrize("variant", ["reference", *CPU])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_in_two_pieces_are_the_same_image(variant, precision):
    """Cut anywhere: between tiles, in a tile, in the halo; of an image, and of some rows of one."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    bands = [Band(0, 0, 41, 41), Band(0, 16, 41, 41), Band(7, 8, 32, 49)]
    for stride, around in ((1, "norm residual"), (1, "input bias"), (2, "bias residual")):
        if "winograd" in precision and stride == 2:
            continue
        (x, weight), around = Case(1, 41, 200, 36, 40, stride, around=around).make(dtype)
        weight, residual = quantized(weight, precision), around.pop("residual", None)
        for band in bands if stride == 1 else [Band(0, 0, 21, 41), Band(15, 8, 16, 64)]:
            here = {} if residual is None else {"residual": residual[:, : band.last - band.first].clone()}
            whole = run(variant, "conv2d", x, weight, **around, **here, band=band)
            for cut in (1, 9, 16, 17, 40):
                in_two = {name: pieces(rows, min(cut, rows.shape[1] - 1)) for name, rows in here.items()}
                y = run(variant, "conv2d", pieces(x, cut), weight, **around, **in_two, band=band)
                assert torch.equal(y, whole), f"{around}, {band}, {cut}"

    bias = torch.randn(36, dtype=dtype)
    phases = torch.randn(4 * 36, 36, 3, 3, dtype=dtype)
    kernels = [(quantized_upsample(torch.randn(36, 36, 3, 3, dtype=dtype), precision), bias)]
    kernels += [(quantize_conv2d(phases) if precision in INTEGERS else phases, bias.repeat(4))]
    for kernel, biases in kernels:
        for band in bands:
            whole = run(variant, "upsample", x, kernel, biases, band=band)
            for cut in (1, 9, 40):
                assert torch.equal(run(variant, "upsample", pieces(x, cut), kernel, biases, band=band), whole)


def test_a_compiler_sees_both_pieces():
    (x, weight), around = Case(1, 20, 33, 16, 24, around="residual").make(torch.float32)
    folded, bias = reference.fold_upsample(torch.randn(16, 16, 3, 3)), torch.randn(16)

    def both(x, residual):
        return sana_kernels.conv2d(x, weight, residual=residual), sana_kernels.upsample(x, folded, bias)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        whole, in_two = both(x, around["residual"]), compiled(pieces(x, 7), pieces(around["residual"], 12))
    for a, b in zip(whole, in_two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", CPU)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_weights_and_threads_change_nothing(variant, precision):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    (x, weight), around = Case(2, 17, 65, 36, 48, around="norm residual").make(dtype)
    bias = torch.randn(18, dtype=dtype)
    weight = quantized(weight, precision)
    folded = quantized_upsample(torch.randn(18, 36, 3, 3, dtype=dtype), precision)
    before, kept = torch.get_num_threads(), x.clone()
    results = []
    for threads, w, f in ((1, weight, folded), (2, pack_conv2d(weight), pack_conv2d(folded, 4)), (5, weight, folded)):
        torch.set_num_threads(threads)
        try:
            results.append((run(variant, "conv2d", x, w, **around), run(variant, "upsample", x, f, bias)))
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
    y = run(variant, "conv2d", x, weight)
    nan, touched = y[0].isnan().any(-1), torch.zeros(20, 70, dtype=torch.bool)
    touched[9:12, 39:42] = True
    if "winograd" in precision:
        patches = torch.zeros(20, 70, dtype=torch.bool)
        patches[8:12, 36:44] = True  # whose scales it is
        assert nan[touched].all() and not nan[~patches].any()
        return
    if precision in INTEGERS:
        touched[8:16, 32:64] = True  # the tile whose scale it is
    assert torch.equal(nan, touched)


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
        ("conv2d", [(3, 4, 8), KERNEL], {}, r"takes x \(B, H, W, C\)"),
        ("conv2d", [IMAGE, (8, 9, 3, 3)], {}, r"a weight \(out, 8, 3, 3\)"),
        ("conv2d", [IMAGE, KERNEL, (9,)], {}, r"bias as floating \(8,\); got torch.float32 \(9,\)"),
        ("conv2d", [IMAGE, KERNEL], {"stride": 3}, "stride of 1 or 2; got 3"),
        ("conv2d", [IMAGE, KERNEL], {"activation": "gelu"}, "got 'gelu'"),
        ("conv2d", [IMAGE, KERNEL], {"input_activation": "relu"}, "only beside an input norm"),
        ("conv2d", [IMAGE, KERNEL], {"residual": torch.zeros(2, 3, 4, 9)}, r"residual \(2, 3, 4, 8\)"),
        ("conv2d", [IMAGE, KERNEL], {"band": Band(2, 0, 3, 9)}, "needs rows 0 to 3 of the image"),
        ("conv2d", [IMAGE, KERNEL], {"weight": W8A8, "band": Band(0, 0, 2, 9)}, "whole tiles of 8 rows"),
        ("conv2d", [IMAGE, KERNEL], {"x": (torch.zeros(IMAGE),) * 2}, "takes x in one piece .* or in two"),
        ("conv2d", [IMAGE, KERNEL], {"x": (PIECE, None)}, r"got \(1, 3, 4, 8\) and None"),
        ("conv2d", [IMAGE, KERNEL], {"x": [PIECE] * 3}, r"in two of one image"),
        ("conv2d", [IMAGE, KERNEL], {"residual": torch.zeros(3, 4, 8)}, r"takes residual \(B, H, W, C\)"),
        ("conv2d", [IMAGE, KERNEL], {"x": (PIECE, PIECE[:, :, 1:])}, r"got \(1, 3, 4, 8\) and \(1, 3, 3, 8\)"),
        ("conv2d", [IMAGE, KERNEL], {"x": (PIECE.half(), PIECE)}, "one floating dtype and device"),
        ("conv2d", [IMAGE, KERNEL], {"x": (PIECE, PIECE), "residual": PIECE}, r"residual \(1, 6, 4, 8\)"),
        ("upsample", [IMAGE, FOLDED, C], {"x": (PIECE[:, :0], PIECE)}, "none of them 0"),
        ("conv2d", [IMAGE, KERNEL], {"weight": torch.zeros(KERNEL).half()}, "a weight in x's dtype"),
        ("conv2d", [IMAGE, KERNEL], {"weight": W8A8._replace(scale=torch.ones(9))}, r"\(8,\); got \(9,\)"),
        ("conv2d", [IMAGE, KERNEL], {"weight": W8A8._replace(scale=torch.ones(8, device="meta"))}, "a scale on meta"),
        ("conv2d", [IMAGE, KERNEL], {"norm": (torch.ones(8),)}, "norm as a tuple of its weight and bias"),
        ("conv2d", [IMAGE, KERNEL], {"input_norm": torch.ones(8)}, "input_norm as a tuple"),
        ("multi_scale", [IMAGE, (8, 1, 4, 4), (8, 4, 1, 1)], {}, "k odd"),
        ("multi_scale", [IMAGE, (8, 1, 5, 5), (8, 3, 1, 1)], {}, "D a divisor"),
        ("multi_scale", [IMAGE, (8, 1, 5, 5), (8, 0, 1, 1)], {}, "D a divisor"),
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
    with pytest.raises(TypeError, match=r"float32, bfloat16, int8 and int16; got torch\.float16"):
        pack_conv2d(torch.zeros(KERNEL).half())
    with pytest.raises(sana_kernels.backend.BackendUnavailable, match=r"float32 and bfloat16, not torch\.float16"):
        sana_kernels.conv2d(x.half(), torch.zeros(KERNEL).half(), backend="cpu")
