"""Comparisons that say where and by how much two tensors differ, and the tolerance rules of every parity test.

No magic constants: a kernel may be at most twice as far from the fp64 truth as PyTorch in the same dtype (FlashAttention's
rule), and a model at most a stated fraction of its output's RMS from the code that others wrote.
"""

import torch


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the error over the RMS of what was expected."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-300)).item()


def psnr(actual: torch.Tensor, expected: torch.Tensor, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB (inf for equal tensors)."""
    error = (actual.double() - expected.double()).square().mean().item()
    return float("inf") if error == 0 else 10 * torch.log10(torch.tensor(peak**2 / error)).item()


def report(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> str:
    """The worst places, readable in a test log."""
    if actual.shape != expected.shape:
        return f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs()
    bad = ~(error <= limit)  # NaN counts as bad
    lines = [
        f"{int(bad.sum())} of {error.numel()} values are further apart than {limit:.3e};"
        f" NaN {int(actual.isnan().sum())}, inf {int(actual.isinf().sum())};"
        f" worst {error.nan_to_num(float('inf')).max():.3e}, relative RMS {relative_rms(actual, expected):.3e}"
    ]
    for index in bad.nonzero()[:5].tolist():
        where = tuple(index)
        lines.append(f"  at {where}: {actual[where].item():.9g}, expected {expected[where].item():.9g}")
    return "\n".join(lines)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, of_rms: float, what: str = "") -> None:
    """Every value lies within `of_rms` × the RMS of `expected`."""
    assert actual.shape == expected.shape, f"{what}: {report(actual, expected, 0)}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    limit = of_rms * expected.double().square().mean().sqrt().item()
    error = (actual.double() - expected.double()).abs()
    assert bool((error <= limit).all()), f"{what}: {report(actual, expected, limit)}"


def assert_kernel(
    actual: torch.Tensor, same_dtype: torch.Tensor, oracle: torch.Tensor, what: str = "", chain: int = 0
) -> None:
    """The rule for kernels (design: tolerances).

    max error ≤ max(2 × that of PyTorch in the same dtype, 2 ulp of the largest value); RMSE ≤ 1.25 × PyTorch's, where
    PyTorch's error is itself at least the rounding of the oracle to the dtype. `chain`: how many values a kernel adds one
    by one where a library adds them in parts; their roundings walk at random, and √chain ulp are right, too.
    """
    assert actual.shape == oracle.shape, f"{what}: {report(actual, oracle, 0)}"
    assert actual.dtype == same_dtype.dtype, f"{what}: dtype {actual.dtype}, expected {same_dtype.dtype}"
    actual, same_dtype, oracle = (t.detach().cpu() for t in (actual, same_dtype, oracle.double()))
    ulp = torch.finfo(actual.dtype).eps * oracle.abs().max().item()
    rounded = (oracle.to(actual.dtype).double() - oracle).square().mean().sqrt()
    theirs = (same_dtype.double() - oracle).abs()
    limit = max(2 * theirs.max().item(), 2 * ulp, chain**0.5 * ulp)
    error = (actual.double() - oracle).abs()
    assert bool((error <= limit).all()), f"{what}: {report(actual, oracle, limit)}"
    rmse = error.square().mean().sqrt().item()
    walk = chain**0.5 * torch.finfo(actual.dtype).eps * oracle.square().mean().sqrt().item()
    allowed = max(1.25 * max(theirs.square().mean().sqrt().item(), rounded.item()), walk)
    assert rmse <= allowed, f"{what}: RMSE {rmse:.3e}, allowed {allowed:.3e} (1.25 × PyTorch's)"


def assert_quantized(
    values: torch.Tensor, scale: torch.Tensor, oracle: torch.Tensor, slack: float, what: str = ""
) -> None:
    """int8 rows of K values and zeros beside the fp64 rows (..., K) that they stand for.

    Every value is a nearest step, where the kernel's own error may be `slack` steps (so that a value between two steps may
    go either way), and the scale is largest / 127 up to that error.
    """
    K = oracle.shape[-1]
    values, scale, oracle = values.cpu(), scale.cpu().double(), oracle.cpu()
    assert not values[..., K:].any(), f"{what}: the padding is not zero"
    expected = oracle.abs().amax(-1) / 127
    worst = ((scale - expected).abs() / expected.clamp_min(1e-300)).max().item()
    assert worst <= slack / 127, f"{what}: scales differ by {worst:.3e}, allowed {slack / 127:.3e}"
    steps = torch.where(scale[..., None] > 0, oracle / scale[..., None].clamp_min(1e-300), 0)
    error = (values[..., :K].double() - steps).abs()
    assert bool((error <= 0.5 + slack).all()), f"{what}: {report(values[..., :K], steps, 0.5 + slack)}"
