"""linear_attention on every backend and instruction set against fp64, and its reference against diffusers' modules."""

from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from compare import assert_kernel, relative_rms
from variants import DTYPES, device_of, double, on_cpu, run, signed, variants

import sana_kernels
from sana_kernels.backend import BackendUnavailable
from sana_kernels.gemm.reference import quantize
from sana_kernels.linear_attention.reference import linear_attention as reference


@dataclass(frozen=True)
class Case:
    B: int
    N: int
    H: int
    D: int
    layout: str = "dit"  # packed (B, N, 3, H, D); "dcae": packed (B, N, H, 3, D); "plain": three tensors
    norm: str = ""  # "same": weights in q's dtype; "float": in fp32; "mixed": q's in fp32

    def make(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        """Arguments in the op's order. relu leaves nothing of one token's q, and of one head's k: both divide by eps alone.

        The norms' weights have either sign: positive ones alone could be swapped between q and k without a trace.
        """
        q, k, v = (signed(self.B, self.N, self.H * self.D).unflatten(2, (self.H, self.D)) for _ in range(3))
        weights = [signed(self.H * self.D) for _ in range(2)] if self.norm else [torch.ones(self.H * self.D)] * 2
        q_sign, k_sign = (w.view(self.H, self.D).sign() for w in weights)
        q[:, self.N // 2] = -q[:, self.N // 2].abs() * q_sign
        k[:, :, -1] = -k[:, :, -1].abs() * k_sign[-1]
        if self.layout == "plain":
            q, k, v = (x.to(device, dtype) for x in (q, k, v))
        else:
            dim = 2 if self.layout == "dit" else 3
            q, k, v = torch.stack((q, k, v), dim).to(device, dtype).unbind(dim)
        dtypes = {"same": (dtype, dtype), "mixed": (torch.float32, dtype)}.get(self.norm, (torch.float32,) * 2)
        weights = [w.to(device, kind) if self.norm else None for w, kind in zip(weights, dtypes, strict=True)]
        return q, k, v, *weights, 1e-5, 1e-15


CASES = [
    Case(1, 1, 70, 32),
    Case(2, 1008, 36, 32),
    Case(1, 1023, 8, 32, "dcae"),
    Case(1, 300, 70, 32, norm="same"),
    Case(2, 129, 9, 32, "plain", norm="float"),
    Case(3, 131, 15, 8, norm="same"),
    Case(2, 67, 3, 72, "dcae"),
    Case(1, 33, 20, 112, norm="same"),
    Case(1, 40, 7, 128, "plain"),
    Case(1, 65, 31, 24),
    Case(1, 90, 6, 88),
    Case(64, 161, 2, 32),  # one chunk of tokens, longer than a product of tiles
    Case(1, 70, 5, 32, norm="mixed"),
]


@lru_cache(maxsize=1)  # the variants of one case follow each other
def expected(case: Case, dtype: torch.dtype, device: str) -> tuple[tuple, torch.Tensor, torch.Tensor]:
    """Arguments, what PyTorch makes of them in this dtype, and the truth."""
    args = case.make(dtype, device)
    return args, reference(*args), reference(*double(*args))


def call(variant: str, q, k, v, q_norm, k_norm, norm_eps, eps, **kwargs) -> torch.Tensor | sana_kernels.Quantized:
    return run(variant, "linear_attention", q, k, v, q_norm=q_norm, k_norm=k_norm, norm_eps=norm_eps, eps=eps, **kwargs)


@pytest.mark.parametrize("variant", variants("linear_attention", tiles=True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_against_fp64(variant, dtype, case):
    args, same_dtype, oracle = expected(case, dtype, device_of(variant))
    before = [a.clone() for a in args[:3]]
    y = call(variant, *args)
    assert y.is_contiguous()
    assert_kernel(y, same_dtype, oracle, f"{variant} {case}")
    assert not y[:, case.N // 2].any(), "a token with no positive q must give 0"
    assert not y[:, :, -1].any(), "a head with no positive k must give 0"
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=False)), "inputs must not change"


@pytest.mark.parametrize("variant", variants("linear_attention_quantized", tiles=True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantized_rows_are_those_of_the_result(variant, dtype, case):
    args = case.make(dtype, device_of(variant))
    values, scale = call(variant, *args, quantize=torch.int8)
    assert values.shape == (case.B, case.N, -(-case.H * case.D // 64) * 64) and values.is_contiguous()
    expected = quantize(call(variant, *args).flatten(2))
    assert torch.equal(values, expected[0]) and torch.equal(scale, expected[1]), f"{variant} {case}"


MISTAKES = {
    "k and v swapped": lambda q, k, v, *rest: (q, v, k, *rest),
    "the last token lost": lambda q, k, v, *rest: (q, torch.cat([k[:, :-1], -k[:, -1:].abs()], 1), v, *rest),
    "heads out of step": lambda q, k, v, *rest: (q.roll(1, 2), k, v, *rest),
    "no norm": lambda q, k, v, q_norm, k_norm, *rest: (q, k, v, None, None, *rest),
    "the norms swapped": lambda q, k, v, q_norm, k_norm, *rest: (q, k, v, k_norm, q_norm, *rest),
    "a norm eps of 1": lambda q, k, v, q_norm, k_norm, norm_eps, eps: (q, k, v, q_norm, k_norm, 1.0, eps),
    "no eps": lambda q, k, v, q_norm, k_norm, norm_eps, eps: (q, k, v, q_norm, k_norm, norm_eps, 0.0),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_comparison_notices(dtype, mistake):
    args = Case(2, 67, 5, 32, norm="same").make(dtype)
    with pytest.raises(AssertionError):
        assert_kernel(reference(*MISTAKES[mistake](*args)), reference(*args), reference(*double(*args)))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)], ids=str)
def test_against_the_dit_of_diffusers(dtype, limit, normed):
    attention = pytest.importorskip("diffusers.models.attention_processor")
    normalization = pytest.importorskip("diffusers.models.normalization")
    q, k, v, q_norm, k_norm, norm_eps, eps = Case(2, 77, 3, 32, norm="same").make(dtype)
    norms = [normalization.RMSNorm(96, norm_eps).to(dtype) for _ in range(2)]
    for norm, weight in zip(norms, (q_norm, k_norm), strict=True):
        norm.weight.data.copy_(weight)
    if not normed:
        norms, q_norm, k_norm = (None, None), None, None
    # What its processor asks of an Attention module, with projections whose results are given.
    attn = SimpleNamespace(
        to_q=lambda _: q.flatten(2), to_k=lambda _: k.flatten(2), to_v=lambda _: v.flatten(2),
        norm_q=norms[0], norm_k=norms[1], heads=3, to_out=[lambda x: x, lambda x: x],
    )  # fmt: skip
    theirs = attention.SanaLinearAttnProcessor2_0()(attn, torch.empty(0, dtype=dtype)).unflatten(2, (3, 32))
    ours = reference(q, k, v, q_norm, k_norm, norm_eps, eps)
    assert relative_rms(ours, theirs) <= limit
    assert_kernel(ours, theirs, reference(*double(q, k, v, q_norm, k_norm, norm_eps, eps)))


def test_against_the_autoencoder_of_diffusers():
    attention = pytest.importorskip("diffusers.models.attention_processor")
    q, k, v, *_ = Case(2, 45, 4, 32, "dcae").make(torch.float32)
    module = attention.SanaMultiscaleLinearAttention(64, 64, attention_head_dim=32, norm_type="rms_norm")
    theirs = module.apply_linear_attention(*(x.permute(0, 2, 3, 1) for x in (q.relu(), k.relu(), v)))
    ours = reference(q, k, v)
    assert relative_rms(ours, theirs.permute(0, 3, 1, 2)) <= 1e-6
    assert_kernel(ours, theirs.permute(0, 3, 1, 2), reference(*double(q, k, v)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", on_cpu(tiles=True))
def test_same_bytes_on_any_number_of_threads(variant, dtype):
    args = Case(2, 700, 9, 32, norm="same").make(dtype)
    results = []
    for threads in (1, 2, 2, 5):
        torch.set_num_threads(threads)
        results.append((call(variant, *args), *call(variant, *args, quantize=torch.int8)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_nan_and_infinity_are_not_hidden():
    """Only the image that has them; a NaN in v spoils its channel, one in k everything of its head."""
    for variant in ("reference", *on_cpu(tiles=True)):
        for dtype in DTYPES:
            q, k, v = (x.contiguous() for x in Case(2, 50, 3, 32).make(dtype)[:3])
            v[1, 7, 0, 5], k[1, 7, 1, 3] = float("nan"), -float("nan")
            y = run(variant, "linear_attention", q, k, v)
            assert not y[0].isnan().any(), variant
            assert y[1, :, 0, 5].isnan().all() and y[1, 0, 1].isnan().all(), variant
            assert not y[1, :, 0, :5].isnan().any(), variant
            q, k, v = torch.ones(3, 1, 1, 1, 32, dtype=dtype)
            v[..., 3] = float("inf")
            y = run(variant, "linear_attention", q, k, v)
            assert y[..., 3].isposinf().all() and y[..., 4:].isfinite().all(), variant


def _invalid(change):
    q, k, v, *_ = Case(2, 5, 3, 32, "plain").make(torch.float32)
    arguments = {"q": q, "k": k, "v": v}
    return arguments | change(arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: {"k": a["k"][:, :3]}, ValueError, r"one shape \(B, N, H, D\); got .*\(2, 3, 3, 32\)"),
        (lambda a: {"q": a["q"].flatten(2)}, ValueError, r"one shape \(B, N, H, D\)"),
        (lambda a: {n: x[:, :0] for n, x in a.items()}, ValueError, r"at least one .*token.*\(2, 0, 3, 32\)"),
        (lambda a: {"v": a["v"].bfloat16()}, TypeError, "one floating dtype; got torch.float32, .*bfloat16"),
        (lambda a: {n: x.int() for n, x in a.items()}, TypeError, "floating dtype"),
        (lambda a: {"k": a["k"].transpose(2, 3).contiguous().transpose(2, 3)}, ValueError, r"call \.contiguous\(\)"),
        (lambda a: {"v": a["v"].to("meta")}, ValueError, "on one device; got cpu, cpu and meta"),
        (lambda a: {"q_norm": torch.ones(32)}, ValueError, r"q_norm of shape \(96,\) on cpu; got \(32,\)"),
        (lambda a: {n: x[..., :12] for n, x in a.items()}, BackendUnavailable, "multiples of 8 up to 128, not 12"),
        (lambda a: {n: x.double() for n, x in a.items()}, BackendUnavailable, "not torch.float64"),
        (lambda a: {"k_norm": torch.ones(96).half()}, BackendUnavailable, "k_norm in torch.float32.*not torch.float16"),
        (
            lambda a: {"quantize": torch.int16},
            TypeError,
            "quantises to torch.int8 or torch.float8_e4m3fn, not torch.int16",
        ),
        (
            lambda a: {"quantize": torch.float8_e4m3fn},
            BackendUnavailable,
            "it quantises to int8, not torch.float8_e4m3fn",
        ),
        (lambda a: {"backend": "fastest"}, ValueError, "choose one of auto, cuda, triton, cpu, library, reference"),
    ],
)
def test_wrong_arguments_get_one_sentence(change, error, message):
    with pytest.raises(error, match=message) as raised:
        sana_kernels.linear_attention(**({"backend": "cpu"} | _invalid(change)))
    assert "\n" not in str(raised.value)
