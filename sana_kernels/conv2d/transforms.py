"""3 × 3 convolutions by fewer multiplications, on integers: the specification. Activations are NCHW here.

Winograd's minimal filtering (arXiv 1509.09308): a patch d of k × k pixels makes r × r results with k² products per channel,
one at each position,

    y = Aᵀ [ Σ over channels (G g Gᵀ) ⊙ (Bᵀ d B) ] A

where patches lie `step` pixels apart and the transforms go down the columns first, then along the rows. Two are known, by
k:

    k = 6   F(4 × 4, 3 × 3)   36 products for 16 results, where the convolution has 144, of the points 0, ±3/4, ±3/2 and ∞
    k = 3   `upsample`        9 for the 4 results that come of a pixel, where folded phases have 16

The second: of a pixel b between a and c, nearest ×2 and a kernel (g₀, g₁, g₂) make g₀a + (g₁ + g₂)b and (g₀ + g₁)b + g₂c,
which is Sb + g₀(a − b) and Sb + g₂(c − b) with S = g₀ + g₁ + g₂: three products per dimension instead of four.

Weights G g Gᵀ, in fp32, are integers with a scale for each position and output channel; values Bᵀ d B are integers with one
for each patch, position and chunk of channels:

    int8    chunks of 128 channels; scales max |values| / 127 and max |weights| / 127
    int16   chunks of 64 channels; scales ‖values‖ / 32767 and max(‖weights of any 64‖ / 65504, max |weights| / 32767)

By Cauchy and Schwarz, a sum of 64 products of int16 cannot leave an int32: with what rounding adds, at most (32767 + 4) ·
(65504 + 4) < 2³¹. The sums of chunks, times the values' scale, are added in fp32; times the weights' scale, they are what
Aᵀ … A takes, in fp32.

Values have scales of their own in every patch because Aᵀ … A subtracts products that nearly cancel: coarse steps, for the
sake of a large value elsewhere, would be left over. In int8, errors of F(4 × 4) are 0.9 to 1.5 times those of the direct
convolution in W8A8 on activations of a trained decoder, but 3.6 times on independent normal values
(bench/notes/decoder.md). In int16 the result is as exact as bfloat16: over an image, the error is within the rule for it
(design: tolerances), large values and channels included. It follows the patch, though, and not each result: one that does
not see what is large in its patch, or whose weights for it are zero, keeps the rounding of steps of 2⁻¹⁵ of that (in int8
2⁻⁷), times what Aᵀ … A makes of them. Of values from 10³⁰ on, sums may leave fp32: then what sees them is infinite or not a
number, and perhaps all of the patch. Largest values and norms below 2⁻¹⁰⁰ and weights' scales below 2⁻¹²⁶ count as zero.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_kernels.gemm.reference import SMALLEST

CHUNK = {torch.int8: 128, torch.int16: 64}  # channels of a patch that share a scale: 128 bytes
_MOST = {torch.int8: 127, torch.int16: 32767}
_MOST_NORM = 65504  # of a chunk's weights, in int16


class Transform(NamedTuple):
    data: Tensor  # Bᵀ (k, k)
    weight: Tensor  # G (k, 3)
    result: Tensor  # Aᵀ (r, k)
    step: int


def _float(rows: list) -> Tensor:
    """On the CPU and in fp32, whatever torch's defaults were when this was imported."""
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


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
    powers = _float([[1, 0, 0], [1, a, A], [1, -a, A], [1, b, B], [1, -b, B], [0, 0, 1]])
    divisors = _float([A * B, *2 * [2 * A * (A - B)], *2 * [2 * B * (B - A)], 1])
    result = [[1, 1, 1, 1, 1, 0], [0, a, -a, b, -b, 0], [0, A, A, B, B, 0], [0, a * A, -a * A, b * B, -b * B, 1]]
    return Transform(_float(data), powers / divisors[:, None], _float(result), 4)


TRANSFORMS = {
    6: _f4(3 / 4, 3 / 2),
    3: Transform(
        _float([[1.0, -1, 0], [0, 1, 0], [0, -1, 1]]),
        _float([[1.0, 0, 0], [1, 1, 1], [0, 0, 1]]),
        _float([[1.0, 1, 0], [0, 1, 1]]),
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
    scale = weight.abs().amax(-1) / _MOST[integers]
    if integers == torch.int16:
        chunks = weight.split(CHUNK[integers], dim=-1)
        norms = [torch.linalg.vector_norm(chunk, dim=-1, dtype=torch.float64) for chunk in chunks]
        scale = torch.maximum(torch.stack(norms).amax(0).float() / _MOST_NORM, scale)
    zero = scale < torch.finfo(torch.float32).tiny
    inverse = torch.where(zero, 0, 1 / scale)[..., None]
    values = (weight * inverse).round_().clamp_(-_MOST[integers], _MOST[integers]).to(integers)
    return values, scale.masked_fill(zero, 0)


def convolve_transformed(window: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """A window (B, in, H + 2, W + 2) and a transformed weight → (B, out, H, W), of k = 3 (B, out, 2H, 2W), in fp32.

    weight (out, in, k, k), int8 or int16; weight_scale (k, k, out), fp64 for an oracle.
    """
    data, _, result, step = TRANSFORMS[weight.shape[-1]]
    data, result, k = data.to(window.device), result.to(weight_scale), weight.shape[-1]
    H, W = (size - 2 for size in window.shape[2:])
    patches = F.pad(window.float(), (0, -W % step, 0, -H % step)).unfold(2, k, step).unfold(3, k, step)
    m = _products((data @ patches) @ data.t(), weight, weight_scale.dtype)
    y = (result @ (m * weight_scale.permute(2, 0, 1)[:, None, None])) @ result.t()
    made = len(result) // step  # pixels of the result, one way, for one of x
    return y.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, : made * H, : made * W]


def _products(values: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
    """(B, in, down, across, k, k) → sums (B, out, down, across, k, k), without the weights' scale."""
    m, chunk = 0, CHUNK[weight.dtype]
    for v, w in zip(values.split(chunk, dim=1), weight.split(chunk, dim=1), strict=True):
        if weight.dtype == torch.int8:
            size = v.abs().amax(1, keepdim=True)
        else:
            size = torch.linalg.vector_norm(v, dim=1, keepdim=True, dtype=torch.float64).float()
        divisor = torch.full_like(size, _MOST[weight.dtype])  # dividing by or of a number, PyTorch may round twice
        zero = size < SMALLEST
        integers = (v * torch.where(zero, 0, divisor / size)).round()
        sums = torch.einsum("bcyxij,ocij->boyxij", integers.double(), w.double()).to(wide)  # exact in fp64
        m = m + sums * torch.where(zero, 0, size / divisor).to(wide)
    return m
