"""Is a result right? The numbers behind `check` in every row, and the oracle they are measured against.

Whole models are compared with the same weights computed in fp32, as a signal-to-quantisation-noise ratio; kernels with
fp64, by FlashAttention's rule. A row whose check fails gets no speed-up.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sana_model.prompt import CaptionStates

Captions = tuple[CaptionStates | None, CaptionStates]  # negative, positive

SQNR_CAP = 300.0  # dB, for equal tensors: JSON has no infinity

DIT_LIMITS = {"fp32": 80, "fp16": 35, "bf16": 30, "w8a8": 22, "fp8": 22, "w4a16": 15, "w4a8": 15, "w4a4": 12}
"""dB that the DiT's raw output must keep, by the precision that `RunName.judged` gives: w4a4's limit is for activations that
do have 4 bits, and where w4a4 is executed in W8A8, w4a8's holds. 4-bit weights rounded to the nearest keep 14.6 dB on random
models, with their outliers, and fail; SVDQuant's keep 18.9."""

EIGHT_BITS, PLAIN_LOSS, LIMIT_LOSS = ("w8a8", "fp8"), 2, 4
"""What 8 bits cost depends on the weights, too: random ones of the 1.6B keep 19.5 dB in W8A8, in plain PyTorch as well. So
where plain PyTorch misses the limit in the same precision, by up to `LIMIT_LOSS`, a run may keep `PLAIN_LOSS` less than it
does: 1.25 times its RMSE, as for a kernel. Trained weights are held to the limit."""

LATENTS_LOSS, LATENTS_LEAST = 13, 3
"""The latents of three steps may keep so many dB less than the DiT's output, but not fewer than the second number. Guidance
amplifies the error of both halves of the batch: with 4.5, sana-tiny's latents keep up to 12.9 dB less (three seeds, 128 and
256 px; bf16, W8A8, W4A8, W4A4), and those of random weights up to 3 dB less.

What is wrong keeps, in fp32 and on the same seeds: -6 dB or less with the two captions swapped, which fails in every
precision; 5 to 9 with guidance 5.5, which is sure to fail in 16 bits (17), mostly fails in W8A8 (9), and passes with 4-bit
weights (3); 13 to 18 with a second step of first order, and 27 to 30 of random weights, which is sure to fail in fp32 (67)
only."""

IMAGE_LIMITS = {"fp32": 80, "fp16": 30, "bf16": 30, "w8a8": 22, "fp8": 22}
"""dB that the decoded image must keep, by the decoder's precision."""

TEXT_LIMITS = {"fp32": 80, "fp16": 30, "bf16": 30, "w8a8": 15, "fp8": 15, "w4a16": 3, "w4a8": 3, "w4a4": 3}
"""dB that the states of a caption must keep, by the text encoder's precision. Gemma-3-270M keeps 36.8 in bf16, 18.5 in W8A8
and 6.3 with 4-bit weights rounded to nearest (bench/notes/text_encoder.md), at least 3 dB more than their limit; sana-tiny's
trained one keeps 44, 35 and 18, and 28 in fp8. States of another caption are at -3."""

RANDOM_TEXT_LIMITS = TEXT_LIMITS | {"fp16": 25, "bf16": 25, "w8a8": 9, "fp8": 9}
"""The same of random weights, 26 layers of which amplify whatever is rounded: Gemma-2-2B's shape keeps 31 dB in bf16 and 12
in W8A8."""

KERNEL_LIMIT = 2.0
"""How many times further from fp64 than PyTorch in the same dtype a kernel may be."""


@dataclass(frozen=True)
class Check:
    """One comparison; `asdict` is the row's `check`."""

    against: str
    metric: str
    value: float
    limit: float
    passed: bool


def sqnr(actual: Tensor, expected: Tensor) -> float:
    """Signal-to-quantisation-noise ratio in dB; 300 for equal tensors, -300 for NaN, infinities and other shapes."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return -SQNR_CAP
    signal, noise = expected.square().mean().item(), (actual - expected).square().mean().item()
    if noise == 0:
        return SQNR_CAP
    return max(-SQNR_CAP, min(SQNR_CAP, 10 * math.log10(signal / noise))) if signal > 0 else -SQNR_CAP


def _worst_sqnr(actual: Tensor, expected: Tensor) -> float:
    return min(sqnr(a, e) for a, e in zip(actual, expected, strict=True))


def dit_check(
    actual: Tensor, expected: Tensor, precision: str, plain: Callable[[], Tensor | None] | None = None
) -> Check:
    """The DiT's raw output (rows, 32, H, W). The worst row counts: neither half of the guided batch hides the other.

    `plain()` is that of plain PyTorch in the same precision, or None: then the limit stays. It is asked for in 8 bits only,
    where the limit is missed by at most `LIMIT_LOSS`; below that nothing passes.
    """
    against, value, limit = "fp32", _worst_sqnr(actual, expected), DIT_LIMITS[precision]
    least = limit - LIMIT_LOSS
    if plain is not None and precision in EIGHT_BITS and least <= value < limit and (theirs := plain()) is not None:
        keeps = _worst_sqnr(theirs, expected)
        if least <= keeps < limit:
            against, limit = f"fp32, of which plain PyTorch keeps {keeps:.1f} dB", max(keeps - PLAIN_LOSS, least)
    return Check(against, "dit_sqnr_db", value, limit, value >= limit)


def image_check(actual: Tensor, expected: Tensor, precision: str) -> Check:
    """The decoded images (B, 3, H, W): the worst counts."""
    value, limit = _worst_sqnr(actual, expected), IMAGE_LIMITS[precision]
    return Check("fp32", "image_sqnr_db", value, limit, value >= limit)


def latents_check(actual: Tensor, expected: Tensor, precision: str) -> Check:
    """Latents (B, 32, h, w) after a few steps from the same noise; `precision` is the DiT's. The worst picture counts."""
    value = _worst_sqnr(actual, expected)
    limit = max(DIT_LIMITS[precision] - LATENTS_LOSS, LATENTS_LEAST)
    return Check("fp32", "latents_sqnr_db", value, limit, value >= limit)


def text_check(actual: Tensor, expected: Tensor, lengths: Tensor, precision: str, *, random: bool) -> Check:
    """The states of captions (B, L, C), each up to its length: the worst counts. `random`: so are the weights."""
    value = min(sqnr(actual[i, :length], expected[i, :length]) for i, length in enumerate(lengths.tolist()))
    limit = (RANDOM_TEXT_LIMITS if random else TEXT_LIMITS)[precision]
    return Check("fp32", "text_sqnr_db", value, limit, value >= limit)


def caption_checks(actual: Captions, expected: Captions, precision: str, *, random: bool) -> list[Check]:
    """`text_check` of the negative captions, where there are any, and of the positive ones."""
    return [
        text_check(ours.states, theirs.states, theirs.lengths, precision, random=random)
        for ours, theirs in zip(actual, expected, strict=True)
        if theirs is not None
    ]


def summary(checks: list[Check], failures: list[str]) -> dict:
    """A row's `check`: the comparison with the least margin, all of them in `parts`, other reasons in `failures`."""
    worst = min(checks, key=lambda check: check.value - check.limit)
    passed = all(check.passed for check in checks) and not failures
    return asdict(worst) | {"passed": passed, "parts": [asdict(c) for c in checks], "failures": failures}


def error_vs_torch(actual: Tensor, same_dtype: Tensor, oracle: Tensor) -> float:
    """Largest error of `actual` over that of PyTorch in the same dtype, which counts as at least an ulp; against fp64.

    An ulp is that of the oracle's largest value. So `error_vs_torch ≤ 2` is max error ≤ max(2 × PyTorch's, 2 ulp). inf
    where `actual` is not finite or has another shape or dtype.
    """
    if actual.shape != oracle.shape or actual.dtype != same_dtype.dtype or not bool(actual.isfinite().all()):
        return math.inf
    error = _largest_error(actual, oracle)
    return error / max(_largest_error(same_dtype, oracle), _ulp(oracle, actual.dtype)) if error else 0.0


def _largest_error(actual: Tensor, oracle: Tensor) -> float:
    return (actual.detach().double().cpu() - oracle.detach().double().cpu()).abs().max().item()


def _ulp(oracle: Tensor, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps * oracle.detach().abs().max().item()


def kernel_check(actual: Tensor, same_dtype: Tensor, oracle: Tensor, chain: int = 0) -> dict:
    """A kernel row's `check`. `chain`: how many values the kernel adds one by one where PyTorch adds them in parts; their
    roundings walk at random, and √chain ulp are right, too.
    """
    ratio, limit = min(error_vs_torch(actual, same_dtype, oracle), 1e9), KERNEL_LIMIT
    if chain:
        ulp = _ulp(oracle, actual.dtype)
        limit = max(limit, chain**0.5 * ulp / max(_largest_error(same_dtype, oracle), ulp))
    return asdict(Check("reference_fp64", "error_vs_torch", ratio, limit, ratio <= limit)) | {"failures": []}


class ComputeInFp32(TorchFunctionMode):
    """Inside this context a model with 16-bit weights computes in fp32: each op sees its 16-bit arguments widened.

    The oracle of whole models: one weight at a time exists in fp32, so it needs no second copy of the model. Exact,
    because every bf16 and fp16 number is an fp32 number; dtypes that the code names or asks for (`x.to(weight.dtype)`)
    become fp32, too.
    """

    NARROW = (torch.bfloat16, torch.float16)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "__get__":  # an attribute: only dtype is not what it seems
            value = func(*args)
            return torch.float32 if isinstance(value, torch.dtype) and value in self.NARROW else value
        if func is torch.nn.functional.embedding:  # it takes rows: the largest weight of all need not be widened
            return func(*args, **(kwargs or {})).float()
        return func(*self._widen(args), **self._widen(kwargs or {}))

    def _widen(self, value):
        if isinstance(value, Tensor):
            return value.float() if value.dtype in self.NARROW else value
        if isinstance(value, torch.dtype):
            return torch.float32 if value in self.NARROW else value
        if isinstance(value, dict):
            return {key: self._widen(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._widen(item) for item in value)
        return value
