"""AWQ (arXiv 2306.00978): scale the input channels of 4-bit weights so that those which carry large activations lose less.

    y = (x / s) · Q(W · s)ᵀ                 s_k = (mean |x_k|)^α / √(largest · smallest of them)

α is searched on a grid for the least error of the output. Whoever produces x absorbs 1/s, so it costs nothing at run time;
layers that read the same x share s. The published method also searches a clipping range of every group; this one does not.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GRID = 20  # α = 0, 1/20, ..., 19/20; α = 0 leaves the weights as they are


@torch.no_grad()
def awq_scale(
    rows: Tensor,
    weights: Sequence[Tensor],
    rounded: Callable[[Tensor], Tensor],
    magnitude: Tensor | None = None,
    grid: int = GRID,
) -> Tensor:
    """s (K,) fp32 for layers that all read `rows` (T, K), with `weights` (N_i, K).

    rounded: a weight → the fp32 values that its quantised form stands for. magnitude (K,): in place of mean |x_k|, where
    channels have to share a scale. Deterministic; never worse than s = 1 on `rows`.
    """
    rows = rows.float()
    magnitude = (rows.abs().mean(0) if magnitude is None else magnitude.float()).clamp_min(1e-8)
    weights = [weight.float() for weight in weights]
    expected = [rows @ weight.t() for weight in weights]
    least, best = float("inf"), torch.ones_like(magnitude)
    for i in range(grid):
        scale = magnitude.pow(i / grid)
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)
        smoothed = rows / scale
        pairs = zip(weights, expected, strict=True)
        error = sum((smoothed @ rounded(weight * scale).t() - y).square().sum() for weight, y in pairs).item()
        if error < least:
            least, best = error, scale
    return best
