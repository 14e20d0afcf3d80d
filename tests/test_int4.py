"""4-bit rows: the format to the bit, what each product loses, and the public functions on every backend."""

import numpy as np
import pytest
import torch
from variants import device_of, isas, run, signed, variants

import sana_kernels
from sana_kernels.gemm import int4_reference
from sana_kernels.gemm import reference as gemm_reference
from sana_kernels.quant.formats import Int4, dequantize_int4, int4_to_int8, pack_int4, quantize_int4, unpack_int4

BF16, FP32 = torch.bfloat16, torch.float32
CPU = [f"cpu:{isa}" for isa in isas()]


def test_the_format_by_hand():
    x = torch.zeros(1, 66)
    x[0, :6] = torch.tensor([7.0, -7.0, 2.5, 3.5, -0.5, -1.4])  # scale 1: ties go to even
    x[0, 64:] = torch.tensor([0.5, -14.0])  # the second group: scale 2
    values, scale = quantize_int4(x)
    assert scale.tolist() == [[1.0, 2.0]] and values.shape == (1, 64) and values.dtype == torch.uint8
    assert values[0, :3].tolist() == [0x97, 0x42, 0xF0]  # 7 and -7, 2 and 4, 0 and -1
    assert values[0, 32] == 0x90 and not values[0, 33:].any()
    assert torch.equal(unpack_int4(values)[0, :6], torch.tensor([7, -7, 2, 4, 0, -1], dtype=torch.int8))


@pytest.mark.parametrize("group", [64, 128])
def test_quantize_as_numpy_does_it(group):
    x, smooth = signed(5, 320), 0.1 + signed(320).abs()
    x[1], x[2] = 0, 2.0**-101
    values, scale = quantize_int4(x, smooth, group)
    groups = np.zeros((5, -(-320 // group) * group), np.float32)
    groups[:, :320] = x.numpy() / smooth.numpy()
    groups = groups.reshape(5, -1, group)
    largest = np.abs(groups).max(-1)
    expected = np.where(largest < 2.0**-100, np.float32(0), largest / np.float32(7))
    with np.errstate(divide="ignore"):
        inverse = np.where(expected == 0, np.float32(0), np.float32(1) / expected)
    integers = np.rint(groups * inverse[..., None]).clip(-7, 7).astype(np.int8).reshape(5, -1)
    assert np.array_equal(scale.numpy(), expected)
    assert np.array_equal(unpack_int4(values).numpy(), integers)


def test_scales_of_a_checkpoint_fit_in_bfloat16():
    _, scale = quantize_int4(signed(3, 128), scale_dtype=BF16)
    assert scale.dtype == FP32 and torch.equal(scale, scale.bfloat16().float())


def test_packing_is_reversible():
    values = torch.randint(-8, 8, (3, 5, 64), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(values)), values)


def sqnr(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return (10 * torch.log10(exact.square().mean() / (actual.double() - exact).square().mean())).item()


@pytest.mark.parametrize(
    ("product", "gaussian", "heavy"), [("w4a16", 18.4, 18.4), ("w4a8", 18.3, 18.2), ("w4a4", 15.3, 13.3)]
)
def test_what_a_product_loses(product, gaussian, heavy):
    """In dB beside fp64: a decibel below what these formats give on 512 × 2240 × 512 random values, so not less."""
    for x, floor in ((torch.randn(1, 512, 2240), gaussian), (student(1, 512, 2240), heavy)):
        weight = torch.randn(512, 2240)
        exact = x.double() @ weight.double().t()
        rows = quantize_int4(weight)
        y = {
            "w4a16": lambda x=x, rows=rows: sana_kernels.gemm_w4a16(x, rows, backend="reference"),
            "w4a8": lambda x=x, rows=rows: sana_kernels.gemm(
                sana_kernels.quantize(x), sana_kernels.Quantized(*int4_to_int8(rows)), dtype=FP32, backend="reference"
            ),
            "w4a4": lambda x=x, rows=rows: sana_kernels.gemm_w4a4(
                quantize_int4(x), rows, dtype=FP32, backend="reference"
            ),
        }[product]()
        assert sqnr(y, exact) > floor


def student(*shape: int) -> torch.Tensor:
    """Student's t with 4 degrees of freedom: heavy tails."""
    return torch.randn(shape) / (torch.randn(4, *shape).square().mean(0)).sqrt()


def test_requantising_costs_little():
    """int4 in groups to int8 per channel: 23 dB below what the 4 bits have lost already."""
    rows = quantize_int4(torch.randn(512, 2240))
    values, scale = int4_to_int8(rows)
    assert sqnr(gemm_reference.dequantize(values, scale), dequantize_int4(rows)) > 40


def inputs(B, M, N, K, rank=16, device="cpu"):
    x, weight = signed(B, M, K).to(device), quantize_int4(signed(N, K).to(device) / 8)
    low, up = signed(B, M, rank).to(device, BF16), signed(N, rank).to(device, BF16)
    rest = {"bias": signed(N), "gate": 0.1 * signed(B, N), "residual": signed(B, M, N)}
    return x, weight, low, up, {name: t.to(device, BF16) for name, t in rest.items()}


def assert_right(out, oracle, dtype):
    limit = torch.finfo(dtype).eps / 2 * oracle.abs() + 1e-5 * oracle.std()
    assert ((out.double() - oracle).abs() <= limit).all()


@pytest.mark.parametrize("shape", [(1, 1, 64, 128), (2, 33, 67, 320), (1, 17, 2240, 1152)], ids=str)
@pytest.mark.parametrize("variant", variants("gemm_w4a16"))
def test_w4a16(variant, shape):
    x, weight, _, _, rest = inputs(*shape, device=device_of(variant))
    x = x.bfloat16()
    y = run(variant, "gemm_w4a16", x, weight, **rest, silu=True, dtype=FP32)
    product = x.double() @ dequantize_int4(weight)[:, : shape[3]].t()
    wide = [t.double() for t in rest.values()]
    assert_right(y, int4_reference.finish(product, wide[0], True, *wide[1:], torch.float64), FP32)


def test_w4a16_takes_every_dtype_group_and_width():
    """Rows that end within a group, groups of 128, strided rows, and each activation and result dtype."""
    for variant in CPU:
        for x_dtype, dtype, group in ((FP32, FP32, 64), (BF16, BF16, 128), (torch.float16, torch.float16, 64)):
            wide, rows = signed(2, 3, 150).to(x_dtype), quantize_int4(signed(5, 100) / 8, group=group)
            x = wide[..., 20:120]
            y = run(variant, "gemm_w4a16", x, rows)
            assert y.dtype == dtype
            assert_right(y, x.double() @ dequantize_int4(rows)[:, :100].t(), dtype)


def test_w4a16_has_the_same_bytes_however_the_work_is_split():
    x, weight, _, _, rest = inputs(1, 71, 130, 2304)
    for variant in CPU:
        for some in (x, x.bfloat16()):
            torch.set_num_threads(1)
            whole = run(variant, "gemm_w4a16", some, weight, **rest, silu=True, dtype=FP32)
            torch.set_num_threads(3)
            assert torch.equal(run(variant, "gemm_w4a16", some, weight, **rest, silu=True, dtype=FP32), whole)
            rest_of_row = rest | {"residual": rest["residual"][:, 70:]}
            row = run(variant, "gemm_w4a16", some[:, 70:], weight, **rest_of_row, silu=True, dtype=FP32)
            assert torch.equal(row, whole[:, 70:])  # one row meets the nibbles, 71 an unpacked panel


@pytest.mark.parametrize("shape", [(1, 1, 64, 128), (2, 33, 67, 320), (1, 17, 2240, 1152)], ids=str)
@pytest.mark.parametrize("variant", variants("gemm_w4a4"))
def test_w4a4(variant, shape):
    x, weight, low, up, rest = inputs(*shape, device=device_of(variant))
    rows = quantize_int4(x)
    y = run(variant, "gemm_w4a4", rows, weight, low=low, up=up, **rest, dtype=BF16)
    product = dequantize_int4(rows) @ dequantize_int4(weight).t() + low.double() @ up.double().t()
    wide = [t.double() for t in rest.values()]
    assert_right(y, int4_reference.finish(product, wide[0], False, *wide[1:], torch.float64), BF16)


@pytest.mark.parametrize("variant", variants("quantize_int4"))
def test_quantize_on_every_backend(variant):
    x, smooth = signed(2, 5, 1152), 0.1 + signed(1152).abs()
    device = device_of(variant)
    out = run(variant, "quantize_int4", x.to(device), smooth.to(device))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(out, quantize_int4(x, smooth), strict=True))


MISTAKES = {
    "nibbles swapped": lambda rows: Int4(rows.values << 4 | rows.values >> 4, rows.scale),
    "scales of the next group": lambda rows: Int4(rows.values, rows.scale.roll(1, -1)),
    "the first group's scale for all": lambda rows: Int4(rows.values, rows.scale[:, :1].expand_as(rows.scale)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(mistake):
    x, weight, *_ = inputs(2, 7, 64, 320)
    y = sana_kernels.gemm_w4a16(x, MISTAKES[mistake](weight), backend="reference")
    with pytest.raises(AssertionError):
        assert_right(y, x.double() @ dequantize_int4(weight).t(), FP32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, w, low, up, rest: (x, Int4(w.values[:, :-1], w.scale), rest), ValueError, "padded to whole groups"),
        (lambda x, w, low, up, rest: (x, Int4(w.values.int(), w.scale), rest), TypeError, "uint8 with float32 scales"),
        (lambda x, w, low, up, rest: (x, quantize_int4(torch.randn(8, 192), group=96), {}), ValueError, "got 96"),
        (lambda x, w, low, up, rest: (x, w, {"gate": rest["gate"]}), ValueError, "only beside a residual"),
        (lambda x, w, low, up, rest: (x, w, {"bias": rest["bias"][:-1]}), ValueError, r"bias of shape \(8,\)"),
        (lambda x, w, low, up, rest: (x[0], w, {}), ValueError, r"x \(B, M, K\)"),
    ],
)
def test_wrong_arguments_get_one_sentence(change, error, message):
    x, weight, options = change(*inputs(1, 3, 8, 192))
    with pytest.raises(error, match=message) as raised:
        sana_kernels.gemm_w4a16(x, weight, **options)
    assert "\n" not in str(raised.value)


def test_wrong_branches_get_one_sentence():
    x, weight, low, up, _ = inputs(1, 3, 8, 192)
    rows = quantize_int4(x)
    for options, message in (
        ({"low": low}, "low and up together"),
        ({"low": low, "up": up[:, :8]}, r"up \(8, r\) in one dtype; got \(1, 3, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sana_kernels.gemm_w4a4(rows, weight, **options)
    with pytest.raises(ValueError, match="groups of 64"):
        sana_kernels.gemm_w4a4(rows, quantize_int4(torch.randn(8, 256), group=128))
    elsewhere = Int4(weight.values, weight.scale.to("meta"))
    for call, given in ((sana_kernels.gemm_w4a16, x), (sana_kernels.gemm_w4a4, rows)):
        with pytest.raises(ValueError, match="tensors on one device; got cpu, cpu and meta"):
            call(given, elsewhere)
        with pytest.raises(ValueError, match=r"a weight \(N, K\), neither of them 0"):
            call(given, Int4(*(t[None] for t in weight)))
    with pytest.raises(ValueError, match=r"smooth of shape \(192,\)"):
        sana_kernels.quantize_int4(x, torch.ones(191))
