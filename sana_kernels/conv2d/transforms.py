"""3 × 3 convolutions by fewer multiplications, on integers: the specification. Activations are NCHW here.

Winograd's minimal filtering (arXiv 1509.09308): a patch d of k × k pixels makes r × r results with k² products per channel,
one at each position,

    y = Aᵀ [ Σ over channels (G g Gᵀ) ⊙ (Bᵀ d B) ] A

where patches lie `step` pixels apart and the transforms go down the columns first, then along the rows. Three are known, by
k:

    k = 4   F(2 × 2, 3 × 3)   16 products for 4 results, where the convolution has 36; in int8
    k = 6   F(4 × 4, 3 × 3)   36 for 16, where it has 144, of the points 0, ±3/4, ±3/2 and ∞; in int16
    k = 3   `upsample`        9 for the 4 results that come of a pixel, where folded phases have 16; in int16

The last: of a pixel b between a and c, nearest ×2 and a kernel (g₀, g₁, g₂) make g₀a + (g₁ + g₂)b and (g₀ + g₁)b + g₂c,
which is Sb + g₀(a − b) and Sb + g₂(c − b) with S = g₀ + g₁ + g₂: three products per dimension instead of four.

Weights G g Gᵀ, in fp32, are integers with a scale for each position and output channel, and so are values Bᵀ d B:

    int8    of a tile's patches (reference.TILE; of those that make a result) the values at a position share one scale, as
            rows in sana_kernels/gemm/reference.py, and so do a position's weights of an output channel
    int16   of a patch, CHUNK = 64 channels of a position share one scale, ‖values‖ / 32767, and a position's weights of an
            output channel have the scale max(‖weights of any 64 channels‖ / 65504, max |weight| / 32767)

By Cauchy and Schwarz, a sum of 64 products of int16 cannot leave an int32: with what rounding adds, at most (32767 + 4) ·
(65504 + 4) < 2³¹. Such sums, times the values' scale, are added in fp32; times the weights' scale, and of int8 the values',
they are what Aᵀ … A takes, in fp32.

In int16 the result is as exact as bfloat16: over an image, the error is within the rule for it (design: tolerances), large
values and channels included. It follows the patch, though, and not each result: one that does not see what is large in its
patch, or whose weights for it are zero, keeps the rounding of steps of 2⁻¹⁵ of that, times what Aᵀ … A makes of them. Of
values from 10³⁰ on, sums may leave fp32: then a patch's results are infinite or not numbers. Norms below 2⁻¹⁰⁰ and weights'
scales below 2⁻¹²⁶ count as zero.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_kernels.gemm.reference import SMALLEST, quantize

CHUNK = 64  # channels of a patch that share a scale, in int16
_MOST, _MOST_NORM = 32767, 65504  # of int16 weights and of values' norms; of the norm of a chunk's weights


class Transform(NamedTuple):
    data: Tensor  # Bᵀ (k, k)
    weight: Tensor  # G (k, 3)
    result: Tensor  # Aᵀ (r, k)
    step: int


def _f4(a: float, b: float) -> Transform:
    """F(4, 3) of the points 0, a, −a, b, −b and ∞. Of many tried, 3/4 and 3/2 (exact in binary) round nearly the least."""
    A, B = a * a, b * b
    data = [
        [A * B, 0, -A - B, 0, 1, 0],
        [0, -a * B, -B, a, 1, 0],
        [0, a * B, -B, -a, 1, 0],
        [0, -A * b, -A, b, 1, 0],
        [0, A * b, -A, -b, 1, 0],
        [0, A * B, 0, -A - B, 0, 1],
    ]
    powers = torch.tensor([[1, 0, 0], [1, a, A], [1, -a, A], [1, b, B], [1, -b, B], [0, 0, 1]])
    divisors = torch.tensor([A * B, *2 * [2 * A * (A - B)], *2 * [2 * B * (B - A)], 1])
    result = [[1, 1, 1, 1, 1, 0], [0, a, -a, b, -b, 0], [0, A, A, B, B, 0], [0, a * A, -a * A, b * B, -b * B, 1]]
    return Transform(torch.tensor(data), powers / divisors[:, None], torch.tensor(result), 4)


TRANSFORMS = {
    4: Transform(
        torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
        torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
        torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]]),
        2,
    ),
    6: _f4(3 / 4, 3 / 2),
    3: Transform(
        torch.tensor([[1.0, -1, 0], [0, 1, 0], [0, -1, 1]]),
        torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 0, 1]]),
        torch.tensor([[1.0, 1, 0], [0, 1, 1]]),
        1,
    ),
}
"""By k, the positions of a patch in one dimension."""


def transform_weight(weight: Tensor, k: int) -> Tensor:
    """(out, in, 3, 3) → (k, k, out, in): G g Gᵀ in fp32."""
    G, taps = TRANSFORMS[k].weight.to(weight.device), weight.float().permute(2, 3, 0, 1).flatten(2).flatten(0, 1)
    return (torch.kron(G, G) @ taps).view(k, k, *weight.shape[:2])


def quantize_transformed(weight: Tensor, integers: torch.dtype) -> tuple[Tensor, Tensor]:
    """(k, k, out, in) fp32 → torch.int8 or int16 values of that shape, and scale (k, k, out) fp32."""
    if integers == torch.int8:
        values, scale = quantize(weight)
        values = values[..., : weight.shape[-1]]
    else:
        chunks = weight.split(CHUNK, dim=-1)
        norms = [torch.linalg.vector_norm(chunk, dim=-1, dtype=torch.float64) for chunk in chunks]
        scale = torch.maximum(torch.stack(norms).amax(0).float() / _MOST_NORM, weight.abs().amax(-1) / _MOST)
        zero = scale < torch.finfo(torch.float32).tiny
        inverse = torch.where(zero, 0, 1 / scale)[..., None]
        values, scale = (weight * inverse).round_().clamp_(-_MOST, _MOST).to(torch.int16), scale.masked_fill(zero, 0)
    return values, scale


def convolve_transformed(window: Tensor, weight: Tensor, weight_scale: Tensor, tile: tuple[int, int]) -> Tensor:
    """A window (B, in, H + 2, W + 2) and a transformed weight → (B, out, H, W), of k = 3 (B, out, 2H, 2W), in fp32.

    weight (out, in, k, k), int8 or int16; weight_scale (k, k, out), fp64 for an oracle; tile: rows and pixels.
    """
    data, _, result, step = TRANSFORMS[weight.shape[-1]]
    data, result, k = data.to(window.device), result.to(weight_scale), weight.shape[-1]
    outputs = [size - 2 for size in window.shape[2:]]
    tiles = [-(-size // side) for size, side in zip(outputs, tile, strict=True)]
    spare = [count * side - size for count, side, size in zip(tiles, tile, outputs, strict=True)]
    patches = F.pad(window.float(), (0, spare[1], 0, spare[0])).unfold(2, k, step).unfold(3, k, step)
    values = (data @ patches) @ data.t()  # (B, in, down, across, k, k)
    products = _of_int8 if weight.dtype == torch.int8 else _of_int16
    m = products(values, weight, [-(-size // step) for size in outputs], tiles, weight_scale.dtype)
    y = (result @ (m * weight_scale.permute(2, 0, 1)[:, None, None])) @ result.t()
    made = len(result) // step  # pixels of the result, one way, for one of x
    return y.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, : made * outputs[0], : made * outputs[1]]


def _of_int8(values: Tensor, weight: Tensor, used: list[int], tiles: list[int], wide: torch.dtype) -> Tensor:
    """(B, in, down, across, k, k) → sums (B, out, down, across, k, k), of which the first `used` patches make results."""
    makes = [torch.arange(values.shape[2 + i], device=values.device) < used[i] for i in (0, 1)]
    values = torch.where((makes[0][:, None] & makes[1])[:, :, None, None], values, 0)
    # B, in, rows of tiles, rows in one, columns of tiles, columns in one, k, k
    per_tile = values.unflatten(3, (tiles[1], -1)).unflatten(2, (tiles[0], -1))
    rows = per_tile.permute(0, 2, 4, 6, 7, 1, 3, 5)
    integers, scale = quantize(rows.flatten(5))
    integers = integers[..., : rows[0, 0, 0, 0, 0].numel()].reshape(rows.shape).double()
    sums = torch.einsum("bdaijcyx,ocij->bodyaxij", integers, weight.double()).to(wide)  # exact in fp64
    return (sums * scale.to(wide)[:, None, :, None, :, None]).flatten(4, 5).flatten(2, 3)


def _of_int16(values: Tensor, weight: Tensor, used: list[int], tiles: list[int], wide: torch.dtype) -> Tensor:
    m = 0
    for v, w in zip(values.split(CHUNK, dim=1), weight.split(CHUNK, dim=1), strict=True):
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True, dtype=torch.float64).float()
        divisor = torch.full_like(norm, _MOST)  # dividing by or of a number, PyTorch may round twice
        zero = norm < SMALLEST
        integers = (v * torch.where(zero, 0, divisor / norm)).round()
        sums = torch.einsum("bcyxij,ocij->boyxij", integers.double(), w.double()).to(wide)  # exact in fp64
        m = m + sums * torch.where(zero, 0, norm / divisor).to(wide)
    return m
