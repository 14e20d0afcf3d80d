"""mix_ffn against fp64 and against diffusers' GLUMBConv."""

import importlib.util
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from compare import assert_close, assert_kernel, relative_rms
from variants import DTYPES, EMULATED, device_of, double, on, on_cpu, run, signed, variants

import sana_kernels


@dataclass(frozen=True)
class Case:
    B: int
    height: int
    width: int
    C: int
    F: int

    def make(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        C, F = self.C, self.F
        weights = (
            torch.randn(2 * F, C) * C**-0.5, torch.randn(2 * F), torch.randn(2 * F, 1, 3, 3) / 3, torch.randn(2 * F),
            torch.randn(C, F) * F**-0.5,
        )  # fmt: skip
        x = signed(self.B, self.height * self.width, C, dtype=dtype)
        return x.to(device), self.height, self.width, *(w.to(device, dtype) for w in weights)


reference = partial(sana_kernels.mix_ffn, backend="reference")
CASES = [
    Case(2, 9, 5, 64, 160),
    Case(2, 1, 23, 128, 320),
    Case(3, 1, 1, 640, 1600),
    Case(1, 4, 3, 1152, 2880),
    Case(1, 3, 2, 2240, 5600),
]


def diffusers(x, height, width, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight):
    """GLUMBConv as SanaTransformerBlock calls it; where diffusers is not installed, the reference, which equals it."""
    if importlib.util.find_spec("diffusers") is None:
        return reference(x, height, width, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight)
    from diffusers.models.transformers.sana_transformer import GLUMBConv

    C, F = project_weight.shape
    with torch.device("meta"):
        module = GLUMBConv(C, C, F / C, norm_type=None, residual_connection=False)
    weights = {
        "conv_inverted.weight": expand_weight[:, :, None, None], "conv_inverted.bias": expand_bias,
        "conv_depth.weight": depthwise_weight, "conv_depth.bias": depthwise_bias,
        "conv_point.weight": project_weight[:, :, None, None],
    }  # fmt: skip
    module.load_state_dict(weights, assign=True)
    y = module(x.unflatten(1, (height, width)).permute(0, 3, 1, 2))
    return y.flatten(2, 3).permute(0, 2, 1).detach()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", variants("mix_ffn"))
def test_error_against_fp64_and_diffusers(variant, dtype, case):
    args = case.make(dtype, device_of(variant))
    y = run(variant, "mix_ffn", *args)
    assert y.is_contiguous()
    assert_kernel(y, diffusers(*args), diffusers(*double(*args)), f"{variant} {case}")


def test_reference_in_fp64_is_the_same_function():
    pytest.importorskip("diffusers")
    args = double(*Case(2, 5, 3, 64, 160).make(torch.float32))
    assert_close(reference(*args), diffusers(*args), of_rms=1e-13)


MISTAKES = {
    "height and width swapped": lambda x, h, w, *rest: (x, w, h, *rest),
    "value and gate swapped": lambda x, h, w, we, be, wd, bd, wp: (
        x, h, w, *(t.roll(wp.shape[1], 0) for t in (we, be, wd, bd)), wp,
    ),
    "a kernel upside down": lambda x, h, w, we, be, wd, bd, wp: (x, h, w, we, be, wd.flip(2), bd, wp),
    "a kernel transposed": lambda x, h, w, we, be, wd, bd, wp: (x, h, w, we, be, wd.mT, bd, wp),
    "no bias of the depthwise convolution": lambda x, h, w, we, be, wd, bd, wp: (x, h, w, we, be, wd, 0 * bd, wp),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_comparison_notices(dtype, mistake):
    args = Case(2, 3, 5, 64, 160).make(dtype)
    with pytest.raises(AssertionError):
        assert_kernel(reference(*MISTAKES[mistake](*args)), diffusers(*args), diffusers(*double(*args)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: [a[0], 3, 4, *a[3:]], ValueError, r"height · width.*\(1, 15, 16\) with a grid of 3 × 4"),
        (lambda a: [a[0], -3, -5, *a[3:]], ValueError, "grid of -3 × -5"),
        (lambda a: [*a[:-1], a[-1].T], ValueError, r"C = 40 and F = 40 takes x as \(1, 15, 40\)"),
        (lambda a: [*a[:5], a[5].flatten(1), *a[6:]], ValueError, r"\(80, 1, 3, 3\)"),
        (lambda a: [a[0].half(), *a[1:]], TypeError, "takes one floating dtype.*got torch.float16"),
        (lambda a: [a[0].to("meta"), *a[1:]], ValueError, "tensors on one device"),
        (lambda a: [a[0].mT.contiguous().mT, *a[1:]], ValueError, r"contiguous channels \(last stride 1\)"),
        (lambda a: [*a[:3], a[3][:, :, None, None], *a[4:]], ValueError, r"as rows \(N, K\), or from pack; got"),
    ],
)
def test_wrong_arguments_get_one_sentence(change, error, message):
    with pytest.raises(error, match=message) as raised:
        sana_kernels.mix_ffn(*change(list(Case(1, 3, 5, 16, 40).make(torch.float32))))
    assert "\n" not in str(raised.value)


def test_wrong_scales_get_a_sentence_not_what_lies_behind_them():
    x, height, width, we, be, wd, bd, wp = Case(1, 3, 5, 64, 160).make(torch.float32)
    x, we, wp = (sana_kernels.quantize(t) for t in (x, we, wp))
    for i, name in ((0, "x's scale"), (1, "expand_weight's scale"), (2, "project_weight's scale")):
        given = [x, we, wp]
        given[i] = sana_kernels.Quantized(given[i].values, given[i].scale[..., :1].clone())
        with pytest.raises(ValueError, match=f"takes {name} as"):
            sana_kernels.mix_ffn(given[0], height, width, given[1], be, wd, bd, given[2])
    elsewhere = sana_kernels.Quantized(wp.values, wp.scale.to("meta"))
    with pytest.raises(ValueError, match="tensors on one device"):
        sana_kernels.mix_ffn(x, height, width, we, be, wd, bd, elsewhere)
    weight = sana_kernels.quantize(torch.randn(96, 64))
    with pytest.raises(ValueError, match=r"weight's scale as \(96,\)"):
        sana_kernels.linear_attention_from(x, sana_kernels.Quantized(weight.values, weight.scale[:1]))


BANDS = [
    Case(2, 70, 16, 64, 160),
    Case(3, 16, 16, 64, 96),
    Case(1, 3, 600, 64, 96),
    Case(1, 1, 1100, 64, 96),
    Case(3, 2, 2, 96, 160),
]


@pytest.mark.parametrize("case", BANDS, ids=str)
@pytest.mark.parametrize("precision", ["bf16", "w8a8"])
@pytest.mark.parametrize("variant", on_cpu(tiles=True))
def test_bands_are_the_whole_bit_for_bit(variant, precision, case):
    """The op in bands of rows equals its three steps over whole images, whichever rows a band begins and ends with."""
    if variant == EMULATED and case not in BANDS[:2]:
        pytest.skip("two cases are enough for the emulator")
    torch.set_num_threads(2)
    x, height, width, we, be, wd, bd, wp = case.make(torch.float32)
    gate, residual = torch.randn(case.B, case.C), signed(case.B, height * width, case.C, dtype=torch.bfloat16)
    with on(variant):
        if precision == "w8a8":
            x, we, wp = (sana_kernels.quantize(t) for t in (x, we, wp))
        else:
            x, we, wp = x.bfloat16(), we.bfloat16(), wp.bfloat16()
        wd = wd.bfloat16()
        cpu, dtype = {"backend": "cpu"}, torch.int8 if precision == "w8a8" else None
        y = sana_kernels.mix_ffn(x, height, width, we, be, wd, bd, wp, gate=gate, residual=residual, **cpu)
        h = sana_kernels.gemm(x, we, be, silu=True, **cpu)
        u = sana_kernels.depthwise_glu(h, height, width, wd, bd, quantize=dtype, **cpu)
        assert torch.equal(y, sana_kernels.gemm(u, wp, gate=gate, residual=residual, **cpu))
    plain = sana_kernels.mix_ffn(
        x, height, width, we, be, wd, bd, wp, gate=gate, residual=residual, backend="reference"
    )
    assert relative_rms(y - residual, plain - residual) < 2e-2
