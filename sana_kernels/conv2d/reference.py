"""The convolutions of the DC-AE with what stands around them, the specification. Activations are NHWC.

    conv2d        RMSNorm(act(conv3×3(act(RMSNorm(x))) + bias)) + residual      each part where asked for
    upsample      conv3×3(nearest ×2 of x) + bias + shortcut                    (arXiv 2410.10733, section 3.2)
    multi_scale   grouped 1×1 (depthwise k×k (x))                               (arXiv 2205.14756, section 3.1)
    rms_norm      act(x / RMS(x) · weight + bias) + residual                    over a pixel's channels (arXiv 1910.07467)

Zero padding of one pixel; stride 1, or 2 for the encoder. The input norm comes before the padding: what lies beyond the
image stays zero.

Upsampling is folded. Each output pixel (2h + dy, 2w + dx) sees only 2 × 2 different pixels of x, so for every phase
(dy, dx) the 3 × 3 kernel is a 2 × 2 one whose taps are sums of its taps: per dimension, phase 0 has [k₀, k₁ + k₂] at rows
h − 1, h and phase 1 [k₀ + k₁, k₂] at rows h, h + 1. One convolution makes all four phases, at 4/9 of the multiply-adds, and
the enlarged image never exists. Zero padding stays exact: what lies beyond the image is zero in either view.

The shortcut repeats each channel of x and moves them into pixels: out[2h + dy, 2w + dx, c] gets
x[h, w, ⌊(4c + 2dy + dx) / repeats⌋], with repeats = 4 · out channels / in channels.

Bands: `Band` says which rows of an image x holds and which rows of the result are wanted. The rows may come in two pieces:
those that the last band left, `above`, and new ones. A row of a band has the bytes of the same row of the whole image, in
every kernel. (PyTorch's own convolution may sum floats in another order for another number of rows.)

W8A8: weights are int8 with one scale per output channel (`quantize_weight`, rows as in sana_kernels/gemm/reference.py).
Activations are quantised as they are read: the result is cut into tiles of TILE = 8 rows × 32 pixels, counted from the
image's upper left corner (of `upsample`, the tiles are of x), and all pixels of the image that a tile sees, its halo
included, share one scale:

    scale = max |x| / 127        values = x · (127 / max |x|), rounded to nearest, ties to even

with the special cases of gemm's rows. Products are summed as int32, exactly, and y = sum · (tile's scale · weight's scale).
The tile is a function of the place in the image, so a band of whole tiles sees what the whole image sees.

Kernels may also be transformed, for a stride of 1, so that fewer multiplications do, in int8 or, for what is as exact as
bfloat16, in int16: transforms.py.

Precision: sums are fp32. PyTorch rounds to x's dtype after every operation, also the sum of folded taps; of W8A8 all that
follows the integers is fp32, rounded once. A kernel may leave out any rounding but the last.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_kernels.conv2d.transforms import convolve_transformed
from sana_kernels.gemm.reference import quantize

ACTIVATIONS = {"none": lambda y: y, "silu": F.silu, "relu": F.relu}  # in the order of enum Activation in csrc/conv2d
PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))  # (dy, dx) of the pixels 2h + dy, 2w + dx that come of one
TILE = (8, 32)  # rows and pixels that share the scale of their inputs


class Band(NamedTuple):
    """Rows of an image: those that x holds, and those of the result that are wanted.

    x holds rows start, start + 1, ... of an image of `height` rows, and of them all that the result sees. The result has
    rows first ... last − 1; of `upsample`, twice as many, those that come of rows first ... last − 1 of the image.
    """

    start: int
    first: int
    last: int
    height: int


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, *, padding: int = 0, groups: int = 1
) -> Tensor:
    """F.conv2d, of NCHW; on a GPU by an algorithm that always gives the same bytes, and in fp32 without TF32."""
    if not x.is_cuda or torch.compiler.is_compiling():  # what is compiled goes by the caller's settings
        return F.conv2d(x, weight, bias, stride, padding, groups=groups)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        return F.conv2d(x, weight, bias, stride, padding, groups=groups)


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str, eps: float) -> Tensor:
    """(B, H, W, C), (C,), (C,), (B, H, W, C) or None → (B, H, W, C), in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()  # with no wide copy of x
    scale = torch.rsqrt(square / x.shape[-1] + eps).to(x.dtype)
    y = ACTIVATIONS[activation](torch.addcmul(bias, x * scale, weight))
    return y if residual is None else y + residual


def fold_upsample(weight: Tensor) -> Tensor:
    """A 3 × 3 kernel after nearest ×2, (out, in, 3, 3), → the same as four phases, (4 · out, in, 2, 2), in its dtype.

    The output channels of phase (dy, dx) are those from (2dy + dx) · out on.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    phases = []
    for rows in ((wide[:, :, :1], wide[:, :, 1:]), (wide[:, :, :2], wide[:, :, 2:])):
        kernel = torch.cat([taps.sum(2, keepdim=True) for taps in rows], dim=2)
        for columns in ((kernel[..., :1], kernel[..., 1:]), (kernel[..., :2], kernel[..., 2:])):
            phases.append(torch.cat([taps.sum(3, keepdim=True) for taps in columns], dim=3))
    return torch.cat(phases).to(weight.dtype)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in, k, k) floating → int8 values of that shape and scale (out,) fp32."""
    values, scale = quantize(weight.flatten(1))
    return values[:, : weight[0].numel()].reshape(weight.shape), scale


def conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_shape: list[int],
    bias: Tensor | None,
    stride: int,
    activation: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    input_weight: Tensor | None,
    input_bias: Tensor | None,
    input_activation: str,
    eps: float,
    band: list[int],
    above: Tensor | None,
    residual_above: Tensor | None,
) -> Tensor:
    """x (B, rows, W, in), weight (out, in, 3, 3) → (B, last − first, ⌈W / stride⌉, out), in x's dtype.

    weight in x's dtype, or int8 with weight_scale (out,), or transformed: (out, in, k, k) with weight_scale (k, k, out);
    bias, norm_weight, norm_bias (out,); residual like the result; input_weight, input_bias (in,). band: as `Band`. above,
    residual_above: the rows that come before those of x and of the residual. weight_shape is that of weight, which kernels
    take packed.
    """
    band, x, residual = Band(*band), _in_one_piece(above, x), _in_one_piece(residual_above, residual)
    if input_weight is not None:
        x = rms_norm(x, input_weight, input_bias, None, input_activation, eps)
    window = _window(x, band, stride)
    if weight_scale is None:
        y = convolve(window, weight, None if bias is None else bias.to(x.dtype), stride)
    else:
        if weight_scale.ndim == 3:
            y = convolve_transformed(window, weight, weight_scale)
        else:
            tiles = _tiles(window, stride)
            y = _untile(_sums(tiles, weight, weight_scale, stride), tiles, window.shape, stride)
        y = y if bias is None else y + bias.float()[:, None, None]
    y = ACTIVATIONS[activation](y.permute(0, 2, 3, 1).contiguous())
    if norm_weight is not None:
        norm = (t.to(y.dtype) for t in (norm_weight, norm_bias))
        return rms_norm(y, *norm, residual, "none", eps).to(x.dtype)
    return (y if residual is None else y + residual).to(x.dtype)


def upsample(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_shape: list[int],
    bias: Tensor,
    band: list[int],
    above: Tensor | None,
) -> Tensor:
    """x (B, rows, W, in), weight (4 · out, in, k, k) → (B, 2 (last − first), 2W, out), in x's dtype.

    The four phases stand one after the other in weight and weight_scale (4 · out,), of k = 2 (folded) or 3 (each phase a
    whole kernel, which makes a convolution before a pixel shuffle); bias (out,), or (4 · out,). Or transformed: (out, in, 3,
    3) with weight_scale (3, 3, out). band, above: as `conv2d`.
    """
    band, x = Band(*band), _in_one_piece(above, x)
    window = _window(x, band, 1)
    if weight_scale is None:
        phases = split_phases(convolve(window, weight), weight.shape[2])
    elif weight_scale.ndim == 3:
        y, bias = convolve_transformed(window, weight, weight_scale), bias.float()
        phases = [y[:, :, dy::2, dx::2] for dy, dx in PHASES]
    else:
        tiles = _tiles(window, 1)
        sums = split_phases(_sums(tiles, weight, weight_scale), weight.shape[2])
        phases, bias = [_untile(y, tiles, window.shape) for y in sums], bias.float()
    return shuffle(phases, x[:, band.first - band.start : band.last - band.start], bias)


def shuffle(phases: list[Tensor], x: Tensor, bias: Tensor) -> Tensor:
    """Four phases (B, out, H, W) + bias + the shortcut of x (B, H, W, in) → (B, 2H, 2W, out), in x's dtype."""
    B, H, W, channels = x.shape
    C = phases[0].shape[1]
    shortcut = x.unsqueeze(-1).expand(B, H, W, channels, 4 * C // channels).reshape(B, H, W, C, 4)
    out = x.new_empty(B, H, 2, W, 2, C)
    for phase, (dy, dx) in enumerate(PHASES):
        y = phases[phase].permute(0, 2, 3, 1) + (bias if len(bias) == C else bias[phase * C : (phase + 1) * C])
        out[:, :, dy, :, dx] = y + shortcut[..., phase]
    return out.view(B, 2 * H, 2 * W, C)


def convolve_phases(x: Tensor, weight: Tensor) -> Tensor:
    """(B, H, W, in), folded (4 · out, in, 2, 2) → (B, H + 1, W + 1, 4 · out): phase (dy, dx) of h, w at h + dy, w + dx."""
    return convolve(x.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1)


def split_phases(y: Tensor, kernel: int) -> list[Tensor]:
    """(B, 4 · out, H, W), of folded kernels (B, 4 · out, H + 1, W + 1), → four of (B, out, H, W)."""
    if kernel == 3:
        return list(y.chunk(4, dim=1))
    H, W = (size - 1 for size in y.shape[2:])
    return [y[:, :, dy : dy + H, dx : dx + W] for y, (dy, dx) in zip(y.chunk(4, dim=1), PHASES, strict=True)]


def multi_scale(x: Tensor, depthwise: Tensor, grouped: Tensor, band: list[int]) -> Tensor:
    """x (B, rows, W, C), depthwise (C, 1, k, k), grouped (C, D, 1, 1) → (B, last − first, W, C), in x's dtype."""
    band = Band(*band)
    reach = depthwise.shape[2] // 2
    y = convolve(_window(x, band, 1, reach), depthwise, groups=x.shape[3])
    return convolve(y, grouped, groups=x.shape[3] // grouped.shape[1]).permute(0, 2, 3, 1)


def _in_one_piece(above: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return rows if above is None else torch.cat([above, rows], dim=1)


def _window(x: Tensor, band: Band, stride: int, reach: int = 1) -> Tensor:
    """What the rows of a band see, zeros beyond the image included: (B, rows, W, C) → (B, C, rows + 2, W + 2)."""
    top, bottom = stride * band.first - reach, stride * (band.last - 1) + reach + 1
    inside = x[:, max(top, 0) - band.start : min(bottom, band.height) - band.start]
    return F.pad(inside.permute(0, 3, 1, 2), (reach, reach, max(-top, 0), max(bottom - band.height, 0)))


class _Tiles(NamedTuple):
    values: Tensor  # (B · rows · columns of tiles, C, height seen, width seen), whole numbers in fp64
    scale: Tensor  # one of each
    counts: tuple[int, int]


def _tiles(window: Tensor, stride: int) -> _Tiles:
    """A window (B, C, H, W), cut into what the tiles of a 3 × 3 convolution's result see, each with its scale."""
    outputs = [(size - 3) // stride + 1 for size in window.shape[2:]]
    counts = [-(-size // tile) for size, tile in zip(outputs, TILE, strict=True)]
    steps, seen = [stride * tile for tile in TILE], [stride * (tile - 1) + 3 for tile in TILE]
    ends = [step * (count - 1) + span for step, count, span in zip(steps, counts, seen, strict=True)]
    below, right = (max(0, end - size) for end, size in zip(ends, window.shape[2:], strict=True))
    window = F.pad(window, (0, right, 0, below)).unfold(2, seen[0], steps[0]).unfold(3, seen[1], steps[1])
    tiles = window.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    values, scale = quantize(tiles.flatten(1))
    return _Tiles(values[:, : tiles[0].numel()].reshape(tiles.shape).double(), scale, tuple(counts))


def _sums(tiles: _Tiles, weight: Tensor, weight_scale: Tensor, stride: int = 1) -> Tensor:
    sums = F.conv2d(tiles.values, weight.double(), stride=stride)  # fp64 holds every sum exactly
    wide = weight_scale.dtype  # fp32, or fp64 for an oracle
    return sums.to(wide) * (tiles.scale.to(wide)[:, None] * weight_scale)[..., None, None]


def _untile(y: Tensor, tiles: _Tiles, shape: torch.Size, stride: int = 1) -> Tensor:
    """Results of tiles (B · rows · columns, out, 8, 32) → (B, out, H, W) of a window of `shape`."""
    y = y[..., : TILE[0], : TILE[1]].unflatten(0, (shape[0], *tiles.counts)).permute(0, 3, 1, 4, 2, 5)
    H, W = ((size - 3) // stride + 1 for size in shape[2:])
    return y.flatten(4, 5).flatten(2, 3)[..., :H, :W]
