"""linear_attention and linear_attention_from in Triton against fp64, and the mistakes that this comparison catches."""

import pytest
import torch
from compare import assert_kernel
from interpreted import DEVICE, chain_of, defective, on_gpu, on_guarded
from test_linear_attention import Case
from variants import DTYPES, double, signed

from sana_kernels.gemm.reference import MOST, dequantize, quantize
from sana_kernels.linear_attention import reference, triton

CASES = [
    Case(1, 1, 2, 32),
    Case(2, 1023, 1, 32),
    Case(2, 40, 5, 32, norm="float"),
    Case(1, 1008, 2, 32, "dcae"),
    Case(2, 31, 3, 72, "plain", norm="same"),
    Case(1, 70, 2, 128),
    Case(3, 33, 5, 8, "dcae"),
]

WIDE = Case(1, 9, 70, 32, norm="same")


def check(module, case, dtype):
    args = case.make(dtype, DEVICE)
    y = on_guarded(module.linear_attention, *args)
    assert y.is_contiguous()
    expected, oracle = reference.linear_attention(*args), reference.linear_attention(*double(*args))
    assert_kernel(y, expected, oracle, str(case), chain=chain_of(case.N, dtype))
    assert not y[:, case.N // 2].any(), "a token with no positive q must give 0"
    assert not y[:, :, -1].any(), "a head with no positive k must give 0"


@on_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_fp64(dtype, case):
    check(triton, case, dtype)


@on_gpu
def test_width_of_the_largest_model():
    check(triton, WIDE, torch.bfloat16)


# B, N, K, H, D: tails of tokens, of the inner product and of the groups of 64 channels; one and several chunks
FROM_CASES = [(2, 1, 100, 2, 32), (1, 150, 64, 3, 32), (2, 270, 96, 5, 16), (1, 70, 33, 1, 64), (1, 3, 64, 70, 32)]


def make_from(B, N, K, H, D, dtype, eight_bits):
    """x is a slice of a wider tensor."""
    x = signed(B, N, K + 8)[..., :K].to(DEVICE)
    weight = (torch.randn(3 * H * D, K) * K**-0.5).to(DEVICE)
    if eight_bits is None:
        return x.to(dtype), None, weight.to(dtype), None, D, 1e-15
    return *quantize(x, eight_bits), *quantize(weight, eight_bits), D, 1e-15


def check_from(module, case, dtype=torch.bfloat16, eight_bits=None):
    args = make_from(*case, dtype, eight_bits)
    y = on_guarded(module.linear_attention_from, *args)
    assert y.is_contiguous()
    x, x_scale, weight, weight_scale, *rest = args
    if x_scale is not None:
        x, weight = dequantize(x, x_scale), dequantize(weight, weight_scale)
    oracle = reference.linear_attention_from(x.double(), None, weight.double(), None, *rest)
    expected, chain = reference.linear_attention_from(*args), chain_of(x.shape[-1], args[0].dtype)
    assert_kernel(y, expected, oracle, f"{case} {dtype} {eight_bits}", chain=chain)


@on_gpu
@pytest.mark.parametrize("case", FROM_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projected_against_fp64(dtype, case):
    check_from(triton, case, dtype)


@on_gpu
@pytest.mark.parametrize("case", FROM_CASES, ids=str)
@pytest.mark.parametrize("eight_bits", MOST, ids=str)
def test_projected_from_eight_bits_against_fp64(eight_bits, case):
    check_from(triton, case, eight_bits=eight_bits)


@on_gpu
def test_one_norm_without_the_other():
    q, k, v, q_norm, k_norm, *eps = Case(1, 40, 3, 32, norm="same").make(torch.float32, DEVICE)
    for norms in ((q_norm, None), (None, k_norm)):
        args = q, k, v, *norms, *eps
        y = triton.linear_attention(*args)
        assert_kernel(y, reference.linear_attention(*args), reference.linear_attention(*double(*args)))


@on_gpu
def test_nan_is_not_hidden():
    """Only the image that has it; a NaN in v spoils its channel, one in k everything of its head."""
    for dtype in DTYPES:
        q, k, v = (x.contiguous() for x in Case(2, 50, 3, 32).make(dtype, DEVICE)[:3])
        v[1, 7, 0, 5], k[1, 7, 1, 3] = float("nan"), -float("nan")
        y = triton.linear_attention(q, k, v, None, None, 1e-5, 1e-15)
        assert not y[0].isnan().any()
        assert y[1, :, 0, 5].isnan().all() and y[1, 0, 1].isnan().all()
        assert not y[1, :, 0, :5].isnan().any()


DEFECTS = {
    "k and v swapped": ("B * H), k, v, k_norm", "B * H), v, k, k_norm"),
    "state: the mask of tokens off by one": ("inside = (t < N)", "inside = (t <= N)"),
    "apply: the mask of tokens off by one": ("stored = (t < N)[:, None] & (d", "stored = (t <= N)[:, None] & (d"),
    "z of a channel too far": ("tl.load(state_ptr + D * D + d", "tl.load(state_ptr + D * D + d + 1"),
    "a chunk is left out": ("for part in range(parts)", "for part in range(parts - 1)"),
    "a chunk too long": ("first = tl.program_id(0) * chunk", "first = tl.program_id(0) * (chunk - 1)"),
    "no eps": ("(below + eps)", "below"),
    "no ReLU of q": ("    q = relu(q)\n", ""),
    "the low half of S is lost": ("return tl.dot(a, b - high, total, input_precision=\"tf32\")", "return total"),
    "the sign of the norm's weight": ("tl.where(negative[None, :], -k, k)", "k"),
    "the norm of the first head": ("q_norm_ptr + head * D", "q_norm_ptr"),
    "1 / RMS of another image": ("image * N + t, mask=t < N, other=0.0)[:,", "t, mask=t < N, other=0.0)[:,"),
    "no 1 / RMS in z": ("tl.sum(k * inverse, 0)", "tl.sum(k, 0)"),
}  # fmt: skip
DEFECT_CASES = {
    torch.float32: [Case(2, 300, 2, 24, "plain"), Case(2, 37, 3, 32, norm="same")],
    torch.float16: [Case(2, 37, 3, 24, norm="float")],
}


def check_defect_cases(module):
    for dtype, cases in DEFECT_CASES.items():
        for case in cases:
            check(module, case, dtype)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(tmp_path, defect):
    module = defective(triton, tmp_path, DEFECTS[defect])
    with pytest.raises(AssertionError):
        check_defect_cases(module)


def test_the_cases_of_the_defects_pass_without_one():
    check_defect_cases(triton)


FROM_DEFECTS = {
    "k and v swapped": ("(1 + column % 2) * C", "(2 - column % 2) * C"),
    "q in place of k": ("(1 + column % 2) * C", "2 * (column % 2) * C"),
    "tokens beyond the last count": ("tl.where((t < N)[:, None], relu(k), 0.0)", "relu(k)"),
    "the mask of tokens off by one": ("stored = (t < N)[:, None] & (c", "stored = (t <= N)[:, None] & (c"),
    "the mask of channels off by one": ("& (c < C)[None, :]", "& (c <= C)[None, :]"),
    "heads mixed": ("load(at, mask=(c < C)[:, None] & same_head", "load(at, mask=(c < C)[:, None]"),
    "chunks that overlap": ("first = tl.program_id(1) * chunk", "first = tl.program_id(1) * (chunk - 1)"),
    "no ReLU of q": ("q = relu(q).to(DTYPE)", "q = q.to(DTYPE)"),
    "the weight's scale of another channel": ("weight_scale_ptr + weight_at", "weight_scale_ptr + column"),
    "x's scale of the first image": ("+ image * N + t_read)\n            kv", "+ t_read)\n            kv"),
}  # fmt: skip


def check_from_defect_cases(module):
    check_from(module, (2, 270, 33, 3, 32), torch.float32)
    check_from(module, (2, 21, 70, 3, 32), eight_bits=torch.int8)


@pytest.mark.parametrize("defect", FROM_DEFECTS)
def test_a_planted_defect_of_the_projected_form_is_caught(tmp_path, defect):
    module = defective(triton, tmp_path, FROM_DEFECTS[defect])
    with pytest.raises(AssertionError):
        check_from_defect_cases(module)


def test_the_cases_of_the_projected_defects_pass_without_one():
    check_from_defect_cases(triton)
