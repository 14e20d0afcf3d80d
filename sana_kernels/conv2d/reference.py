"""What stands around the convolutions of the DC-AE decoder, the specification. Activations are NHWC.

    rms_norm    activation(x / RMS(x) · weight + bias) + residual       over the channels of each pixel (arXiv 1910.07467)
    upsample    conv3×3(nearest ×2 of x) + shortcut                     (arXiv 2410.10733, section 3.2)

Upsampling is folded. Each output pixel (2h + dy, 2w + dx) sees only 2 × 2 different pixels of x, so for every phase
(dy, dx) the 3 × 3 kernel is a 2 × 2 one whose taps are sums of its taps: per dimension, phase 0 has [k₀, k₁ + k₂] at rows
h − 1, h and phase 1 [k₀ + k₁, k₂] at rows h, h + 1. One convolution makes all four phases, at 4/9 of the multiply-adds, and
the enlarged image never exists. Zero padding stays exact: what lies beyond the image is zero in either view.

The shortcut repeats each channel of x and moves them into pixels: out[2h + dy, 2w + dx, c] gets
x[h, w, ⌊(4c + 2dy + dx) / repeats⌋], with repeats = 4 · out channels / in channels.

Precision: of rms_norm, the mean square is fp32 and PyTorch rounds to x's dtype after every operation; of upsample, so does
the sum of folded taps, and every addition. A kernel may leave out any rounding but the last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": lambda y: y, "silu": F.silu, "relu": F.relu}  # in the order of enum Activation in csrc/conv2d


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str, eps: float) -> Tensor:
    """(B, H, W, C), (C,), (C,), (B, H, W, C) or None → (B, H, W, C), in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean_square = x.to(wide).square().mean(-1, keepdim=True)
    y = ACTIVATIONS[activation](torch.addcmul(bias, x * torch.rsqrt(mean_square + eps).to(x.dtype), weight))
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


def convolve_phases(x: Tensor, weight: Tensor) -> Tensor:
    """(B, H, W, in), folded (4 · out, in, 2, 2) → (B, H + 1, W + 1, 4 · out): phase (dy, dx) of h, w at h + dy, w + dx."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1)


def upsample(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, in), folded (4 · out, in, 2, 2), (out,) → (B, 2H, 2W, out), in x's dtype."""
    B, H, W, channels = x.shape
    C = weight.shape[0] // 4
    phases = convolve_phases(x, weight).unflatten(-1, (2, 2, C))
    out = x.new_empty(B, H, 2, W, 2, C)
    repeated = x.unsqueeze(-1).expand(B, H, W, channels, 4 * C // channels).reshape(B, H, W, C, 2, 2)
    for dy in (0, 1):
        for dx in (0, 1):
            phase = phases[:, dy : dy + H, dx : dx + W, dy, dx]
            out[:, :, dy, :, dx] = phase + bias + repeated[..., dy, dx]
    return out.view(B, 2 * H, 2 * W, C)
