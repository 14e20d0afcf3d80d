"""SVDQuant (arXiv 2411.05007): weights and activations of 4 bits, beside a low-rank branch in 16.

    W' = W · s,  x' = x / s                 s_k = max |x_k|^α / max |W_k|^β moves outliers from activations to weights
    W' = up · down' + R                     the largest directions, in 16 bits, leave a residual that is easier to round
    y  ≈ Q(x') · Q(R)ᵀ + (x · downᵀ) · upᵀ  with down = down' / s, which reads x as it is

α and β are searched on a grid, {(0, 0), (i/g, 0), (i/g, 1 - i/g)}, for the least error of the layer's output with everything
on: low-rank branch, rounded residual, rounded activations. Then branch and residual are refined in turn, down' and up from
the SVD of W' - Q(R), until the error grows; at last the residual may be rounded by GPTQ. The branch is rounded to 16 bits
before the residual is taken, so its rounding is made up for.

The SVD is randomised (arXiv 0909.4061, two power iterations, seeded): the 32 directions of a 5760 × 1152 weight take 60 ms
on a core, where all of them would take 3 s. Layers that share their input and lie in one matrix (q, k and v) share `down`
and s. The error is that of the layer's own output; the published code scores q, k and v by the output of the attention.

The same grid without low-rank branch is SmoothQuant's (arXiv 2211.10438) and, with activations in 16 bits, AWQ's
(arXiv 2306.00978, with the largest instead of the mean |x_k|).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sana_kernels.quant import formats
from sana_kernels.quant.calibration import LayerInputs
from sana_kernels.quant.formats import GROUP
from sana_kernels.quant.gptq import gptq
from sana_kernels.quant.layer import QuantizedLayer, round_to_nearest

SEARCH_ROWS = 256  # inputs that the search and the refinement look at
OVERSAMPLING, POWER_ITERATIONS = 16, 2


@dataclass(frozen=True)
class Recipe:
    """How one layer is quantised."""

    format: str = "int4"
    activations: str = "int4"
    group: int = GROUP  # of int4 weights
    scale_dtype: torch.dtype = torch.bfloat16  # of their scales
    smooth: bool = False
    rank: int = 0
    gptq: bool = False
    grid: int = 20  # g above: 2g - 1 candidates
    refinements: int = 8  # at most

    @property
    def needs_inputs(self) -> bool:
        return self.smooth or self.gptq or self.rank > 0

    @property
    def method(self) -> str:
        """Its name in a checkpoint's header."""
        base = "svdquant" if self.rank else "smooth" if self.smooth else "rtn"
        return base if not self.gptq else "gptq" if base == "rtn" else f"{base}+gptq"


@torch.no_grad()
def quantize_layer(weight: Tensor, recipe: Recipe, inputs: LayerInputs | None = None) -> QuantizedLayer:
    """weight (N, K), floating and finite → the layer of a checkpoint.

    `inputs`: what the layer reads; needed for everything but plain rounding. Deterministic on one machine with one number
    of threads. Raises ValueError for a recipe that cannot be.
    """
    if not recipe.needs_inputs:
        return round_to_nearest(weight, recipe.format, recipe.activations, recipe.group, recipe.scale_dtype)
    if inputs is None:
        raise ValueError(f"{recipe.method} needs the layer's inputs: calibrate first")
    if recipe.format != "int4" and (recipe.gptq or recipe.rank):
        raise ValueError("GPTQ and a low-rank branch are for int4 weights")
    weight = weight.float()
    rank = min(recipe.rank, *weight.shape)
    rows = inputs.rows.to(weight.device, torch.float32)
    few = rows[:: max(1, len(rows) // SEARCH_ROWS)]
    expected = few @ weight.t()

    def error(layer: "_Split") -> float:
        return (layer.output(few, recipe) - expected).square().sum().item()

    least, split = float("inf"), None
    for smooth in _candidates(weight, inputs.absmax.to(weight.device), recipe):
        candidate = _Split.of(weight, smooth, rank, recipe)
        found = error(candidate)
        if split is None or found < least:
            least, split = found, candidate
    for _ in range(recipe.refinements if rank else 0):
        refined = split.refined(rank, recipe)
        found = error(refined)
        if found >= least:
            break
        least, split = found, refined
    return split.layer(rows, recipe)


def smooth_scale(x_absmax: Tensor, weight_absmax: Tensor, alpha: float, beta: float) -> Tensor:
    """s (K,) fp32, its geometric mean 1. Channels that are zero on either side are left as they are."""
    x, w = x_absmax.float(), weight_absmax.float()
    scale = x.clamp_min(1e-20).pow(alpha) / w.clamp_min(1e-20).pow(beta)
    live = (x > 1e-20) & (w > 1e-20)
    if not bool(live.any()):
        return torch.ones_like(scale)
    return torch.where(live, scale / scale[live].log().mean().exp(), 1).clamp(1e-4, 1e4)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best up (N, r), down (r, K), nearly: randomised, by a fixed seed. down has orthonormal rows."""
    N, K = matrix.shape
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLING, N, K), niter=POWER_ITERATIONS)
    return u[:, :rank] * s[:rank], v[:, :rank].t()


def _candidates(weight: Tensor, x_absmax: Tensor, recipe: Recipe) -> list[Tensor | None]:
    """None, and the scales of the grid."""
    if not recipe.smooth:
        return [None]
    g, weight_absmax = recipe.grid, weight.abs().amax(0)
    pairs = [(i / g, beta) for i in range(1, g) for beta in (0.0, 1 - i / g)]
    return [None, *(smooth_scale(x_absmax, weight_absmax, *pair) for pair in pairs)]


@dataclass(frozen=True)
class _Split:
    """A smoothed weight (N, K) as rounded residual and low-rank branch, all of it fp32 values."""

    weight: Tensor
    smooth: Tensor | None
    up: Tensor | None  # (N, r) and
    down: Tensor | None  # (r, K): as they will be stored, but `down` reads smoothed inputs
    rounded: Tensor  # (N, K): what the rounded residual stands for

    @classmethod
    def of(cls, weight: Tensor, smooth: Tensor | None, rank: int, recipe: Recipe) -> "_Split":
        weight = weight if smooth is None else weight * smooth
        return cls._around(weight, smooth, weight, rank, recipe)

    @classmethod
    def _around(cls, weight: Tensor, smooth: Tensor | None, target: Tensor, rank: int, recipe: Recipe) -> "_Split":
        """With the low-rank branch that is nearest to `target`."""
        up = down = None
        if rank:
            up, down = low_rank(target, rank)
            stored = (down if smooth is None else down / smooth).to(torch.bfloat16)
            up, down = up.to(torch.bfloat16).float(), stored.float() if smooth is None else stored.float() * smooth
        split = cls(weight, smooth, up, down, weight)
        residual = split.residual()
        return replace(split, rounded=_round_weight(residual, recipe))

    def refined(self, rank: int, recipe: Recipe) -> "_Split":
        return self._around(self.weight, self.smooth, self.weight - self.rounded, rank, recipe)

    def residual(self) -> Tensor:
        return self.weight if self.up is None else self.weight - self.up @ self.down

    def output(self, x: Tensor, recipe: Recipe) -> Tensor:
        """(T, K) → (T, N)."""
        x = x if self.smooth is None else x / self.smooth
        y = formats.fake_quantize(x, recipe.activations) @ self.rounded.t()
        return y if self.up is None else y + (x @ self.down.t()) @ self.up.t()

    def layer(self, rows: Tensor, recipe: Recipe) -> QuantizedLayer:
        """As a checkpoint has it; `rows` (T, K): the layer's inputs."""
        residual, group, dtype = self.residual(), recipe.group, recipe.scale_dtype
        plain = round_to_nearest(residual, recipe.format, recipe.activations, group, dtype)
        if recipe.gptq:
            smoothed = rows if self.smooth is None else rows / self.smooth
            values, scale = gptq(residual, formats.fake_quantize(smoothed, recipe.activations), group, dtype)
            plain = replace(plain, values=values, scale=scale.to(dtype))
        down = self.down if self.smooth is None or self.down is None else self.down / self.smooth
        branch = {} if down is None else {"up": self.up.to(torch.bfloat16), "down": down.to(torch.bfloat16)}
        return replace(plain, smooth=self.smooth, **branch)


def _round_weight(weight: Tensor, recipe: Recipe) -> Tensor:
    """The fp32 rows (N, K) that plain rounding makes of it: as `round_to_nearest`, without packing."""
    if recipe.format != "int4":
        return round_to_nearest(weight, recipe.format, recipe.activations).dequantized().float()
    steps, scale = formats.int4_steps(weight, recipe.group, recipe.scale_dtype)
    return (steps * scale[..., None]).flatten(-2)[:, : weight.shape[1]]


def sqnr_db(layer: QuantizedLayer, weight: Tensor, rows: Tensor) -> float:
    """Signal to noise, in dB, of the layer's output on inputs `rows` (T, K) beside that of the weight (N, K)."""
    rows = rows.to(weight.device, torch.float32)
    expected = rows @ weight.float().t()
    noise = (layer(rows) - expected).double().square().sum().clamp_min(1e-300)
    return (10 * torch.log10(expected.double().square().sum() / noise)).item()
