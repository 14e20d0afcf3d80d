"""cross_attention against fp64, and against diffusers' attention with its -10000 mask."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from compare import assert_close, assert_kernel
from variants import DTYPES, device_of, double, on_cpu, run, signed, variants

import sana_kernels
from sana_kernels import backend
from sana_kernels.backend import BackendUnavailable
from sana_kernels.cross_attention import library
from sana_kernels.cross_attention.reference import cross_attention as reference
from sana_kernels.gemm.reference import quantize

VARIANTS = variants("cross_attention", tiles=True)


@dataclass(frozen=True)
class Case:
    N: int
    L: int
    H: int
    D: int
    lengths: tuple[int, ...] | None
    B: int = 2

    def make(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        """q strided as in a fused projection, k and v packed."""
        q = signed(self.B, self.N, 2, self.H, self.D, dtype=dtype).to(device)[:, :, 0]
        # Outliers in the keys, too, would make every softmax a single 1, and then neither scale nor values would matter.
        kv = torch.stack((0.3 * torch.randn(self.B, self.L, self.H, self.D), signed(self.B, self.L, self.H, self.D)), 2)
        k, v = kv.to(device, dtype).unbind(2)
        return q, k, v, None if self.lengths is None else torch.tensor(self.lengths)


CASES = [
    Case(1, 1, 20, 112, (1, 1)),
    Case(1008, 60, 16, 72, (1, 60)),
    Case(63, 300, 4, 72, (300, 300)),
    Case(45, 37, 3, 112, (5, 5)),
    Case(70, 11, 5, 64, None),
    Case(133, 19, 6, 32, (19, 7, 1), B=3),
    Case(40, 33, 3, 8, (33, 17)),
    Case(35, 50, 2, 128, (50, 33)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_against_fp64(variant, dtype, case):
    q, k, v, lengths = args = case.make(dtype, device_of(variant))
    y = run(variant, "cross_attention", *args)
    assert y.is_contiguous()
    assert_kernel(y, plain(*args), plain(*double(*args)), f"{variant} {case}")
    if lengths is not None:
        k, v = k.clone(), v.clone()
        for b, length in enumerate(lengths.tolist()):
            k[b, length:], v[b, length:] = 100, -1000
        assert torch.equal(y, run(variant, "cross_attention", q, k, v, lengths)), "padding must not matter"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", variants("cross_attention_quantized", tiles=True))
def test_quantized_rows_are_those_of_the_result(variant, dtype, case):
    args = case.make(dtype, device_of(variant))
    values, scale = run(variant, "cross_attention", *args, quantize=torch.int8)
    assert values.shape == (case.B, case.N, -(-case.H * case.D // 64) * 64) and values.is_contiguous()
    expected = quantize(run(variant, "cross_attention", *args).flatten(2))
    assert torch.equal(values, expected[0]) and torch.equal(scale, expected[1]), f"{variant} {case}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_more_text_than_one_block(variant, dtype):
    """The online softmax: the largest scores come last, and earlier sums are scaled down."""
    q, k, v, lengths = Case(13, 700, 2, 64, (641, 700)).make(dtype, device_of(variant))
    k = (k * torch.linspace(0.1, 3, 700, device=k.device)[:, None, None]).to(dtype)
    args = q, k, v, lengths
    y = run(variant, "cross_attention", *args)
    assert_kernel(y, plain(*args), plain(*double(*args)), variant)


@pytest.mark.parametrize("variant", on_cpu(tiles=True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_may_hold_anything_and_nan_is_not_hidden(dtype, variant):
    q, k, v, lengths = Case(20, 40, 3, 72, (17, 33)).make(dtype)
    expected = run(variant, "cross_attention", q, k, v, lengths)
    k, v = k.clone(), v.clone()
    k[0, 17:], v[0, 17:] = float("nan"), float("inf")
    assert torch.equal(run(variant, "cross_attention", q, k, v, lengths), expected)
    k[1, 5, 1, 3], v[1, 6, 2, 4] = float("nan"), float("nan")
    y = run(variant, "cross_attention", q, k, v, lengths)
    assert y[1, :, 1].isnan().all() and y[1, :, 2, 4].isnan().all()
    assert torch.equal(y[0], expected[0]) and torch.equal(y[1, :, 0], expected[1, :, 0])
    assert not y[1, :, 2, :4].isnan().any()


@pytest.mark.parametrize("variant", on_cpu(tiles=True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bytes_on_any_number_of_threads(dtype, variant):
    args = Case(300, 33, 5, 72, (33, 20)).make(dtype)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        rows = run(variant, "cross_attention", *args, quantize=torch.int8)
        results.append((run(variant, "cross_attention", *args), *rows))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def plain(q, k, v, lengths):
    """The formula, one image at a time."""
    images = []
    for b in range(q.shape[0]):
        kept = slice(None) if lengths is None else slice(int(lengths[b]))
        scores = torch.einsum("nhd,lhd->hnl", q[b], k[b, kept]) * q.shape[-1] ** -0.5
        images.append(torch.einsum("hnl,lhd->nhd", scores.softmax(-1), v[b, kept]))
    return torch.stack(images)


MISTAKES = {
    "lengths ignored": lambda q, k, v, lengths: (q, k, v, None),
    "lengths of the other image": lambda q, k, v, lengths: (q, k, v, lengths.flip(0)),
    "one token too many": lambda q, k, v, lengths: (q, k, v, lengths + 1),
    "no scale": lambda q, k, v, lengths: (q * q.shape[-1] ** 0.5, k, v, lengths),
    "k and v swapped": lambda q, k, v, lengths: (q, v, k, lengths),
    "heads out of step": lambda q, k, v, lengths: (q.roll(1, 2), k, v, lengths),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_comparison_notices(dtype, mistake):
    args = Case(40, 37, 3, 72, (5, 21)).make(dtype)
    with pytest.raises(AssertionError):
        assert_kernel(reference(*MISTAKES[mistake](*args)), reference(*args), plain(*double(*args)))


@pytest.mark.parametrize("lengths", [(9, 21), (21, 21)])
def test_against_the_dit_of_diffusers(lengths):
    theirs = pytest.importorskip("diffusers.models.transformers.sana_transformer")
    q, k, v, lengths = Case(50, 21, 3, 72, lengths).make(torch.float32)
    mask = (torch.arange(21) >= lengths[:, None])[:, None] * -10000.0  # as SanaTransformer2DModel makes it: (B, 1, L)
    attn = SimpleNamespace(
        to_q=lambda _: q.flatten(2), to_k=lambda _: k.flatten(2), to_v=lambda _: v.flatten(2), heads=3, norm_q=None,
        norm_k=None, to_out=[lambda x: x, lambda x: x], rescale_output_factor=1.0,
        prepare_attention_mask=lambda mask, length, batch: mask.repeat_interleave(3, 0),
    )  # fmt: skip
    expected = theirs.SanaAttnProcessor2_0()(attn, q.flatten(2), k.flatten(2), mask)
    assert_close(reference(q, k, v, lengths).flatten(2), expected, of_rms=2e-6)


def flash(q, k, v, offsets_q, offsets_k, most_q, most_k, dropout, causal, debug, *, seqused_k=None):
    """What aten's _flash_attention_forward computes, as torch.nn.attention.varlen documents it, sequence by sequence."""
    assert offsets_q.dtype == offsets_k.dtype == torch.int32 and (dropout, causal) == (0.0, False)
    assert seqused_k is None or seqused_k.dtype == torch.int32
    out = torch.full_like(q, torch.nan)
    for b, (begin, end) in enumerate(zip(offsets_q[:-1].tolist(), offsets_q[1:].tolist(), strict=True)):
        first, last = offsets_k[b : b + 2].tolist()
        assert end - begin <= most_q and last - first <= most_k
        kept = slice(first, last if seqused_k is None else first + int(seqused_k[b]))
        scores = torch.einsum("nhd,lhd->hnl", q[begin:end].float(), k[kept].float()) * q.shape[-1] ** -0.5
        out[begin:end] = torch.einsum("hnl,lhd->nhd", scores.softmax(-1), v[kept].float()).to(q.dtype)
    return out, None, None, None, None


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_library_kernel_is_told(monkeypatch, case, dtype):
    """On a machine without a GPU: the call itself, with sequences as they lie in a padded batch."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    q, k, v, lengths = args = case.make(dtype)
    assert library.accepts(*args) is None
    assert_kernel(library.cross_attention(*args), plain(*args), plain(*double(*args)), str(case))
    if lengths is not None and len(set(lengths.tolist())) > 1:
        with pytest.raises(AssertionError):
            assert_kernel(library.cross_attention(q, k, v, lengths.flip(0)), plain(*args), plain(*double(*args)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v: (q.float(), k.float(), v.float()), "not torch.float32"),
        (lambda q, k, v: (q[..., :36], k[..., :36], v[..., :36]), "multiples of 8 up to 256, not 36"),
        (lambda q, k, v: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v), "contiguous channels"),
    ],
)
def test_what_the_library_kernel_does_not_take(change, reason):
    q, k, v, lengths = Case(45, 37, 3, 72, (5, 21)).make(torch.bfloat16)
    assert library.accepts(q, k, v, lengths) is None
    assert reason in library.accepts(*change(q, k, v), lengths)


def test_what_a_gpu_kernel_refuses_is_skipped_and_what_is_broken_is_not(monkeypatch):
    """By `variants.run`, which every test of an op calls."""
    for status, device, outcome in (
        (None, "meta", pytest.skip.Exception),
        (None, "cpu", BackendUnavailable),
        ("its module cannot be imported", "meta", BackendUnavailable),
    ):
        monkeypatch.setattr(backend, "backend_status", lambda name, status=status: status)
        with pytest.raises(outcome):
            run("library", "cross_attention", *Case(5, 7, 2, 32, None).make(torch.float32, device))


def test_lengths_may_lie_with_the_model():
    """On a GPU they are never looked at; the same path serves a compiler."""
    args = Case(45, 37, 3, 72, (5, 5)).make(torch.float32)
    compiled = torch.compile(sana_kernels.cross_attention, backend="eager", fullgraph=True)
    assert_close(compiled(*args), reference(*args), of_rms=2e-5)


@pytest.mark.parametrize(
    ("q", "k", "v", "lengths", "error", "message"),
    [
        ((2, 3, 4, 8), (2, 5, 4, 8), (2, 6, 4, 8), None, ValueError, r"q \(B, N, H, D\) and k, v \(B, L, H, D\)"),
        ((2, 3, 4, 8), (2, 5, 3, 8), (2, 5, 3, 8), None, ValueError, r"q \(B, N, H, D\) and k, v \(B, L, H, D\)"),
        ((2, 3, 4, 8), (2, 0, 4, 8), (2, 0, 4, 8), None, ValueError, "at least one token"),
        ((2, 3, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8), [0, 5], ValueError, r"lengths from 1 to L = 5; got \[0, 5\]"),
        ((2, 3, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8), [6, 5], ValueError, r"lengths from 1 to L = 5; got \[6, 5\]"),
        ((2, 3, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8), [5], ValueError, r"lengths as \(2,\) integers; got \(1,\)"),
        ((2, 3, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8), [1.0, 2.0], ValueError, "integers; got .* of torch.float32"),
    ],
)
def test_wrong_arguments_get_one_sentence(q, k, v, lengths, error, message):
    tensors = [torch.randn(shape) for shape in (q, k, v)]
    with pytest.raises(error, match=message) as raised:
        sana_kernels.cross_attention(*tensors, None if lengths is None else torch.tensor(lengths))
    assert "\n" not in str(raised.value)
