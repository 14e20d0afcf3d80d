"""Convolutions on NVIDIA GPUs: the library's, on channels-last tensors, and around it the CUDA kernels in csrc/conv2d.

conv2d is one library call and at most one kernel after it, which works in place: bias, activation and residual, or RMSNorm
and residual. (A convolution that had bias or activation and a norm after them would take two; SANA has none.)
"""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension
from sana_kernels.conv2d.reference import ACTIVATIONS, convolve, convolve_phases
from sana_kernels.gemm.cuda import at_16_bytes

ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def accepts_rms_norm(x, weight, bias, residual, activation, eps) -> str | None:
    return None if x.dtype in DTYPE_CODES else f"it computes in float32, bfloat16 and float16, not {x.dtype}"


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str, eps: float) -> Tensor:
    """As the reference; arguments as `rms_norm` of this package and `accepts_rms_norm` let them through."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _finish(x, weight, bias, residual, activation, eps, out)
    return out


def _finish(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str, eps: float, out: Tensor
) -> None:  # fmt: skip
    """out = activation(x / RMS(x) · weight + bias) + residual; without weight, activation(x + bias) + residual."""
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    with torch.cuda.device(x.device):
        extension("_cuda")[0].rms_norm(
            [0 if t is None else t.data_ptr() for t in (x, weight, bias, residual, out)],
            (x.numel() // x.shape[-1], x.shape[-1]), DTYPE_CODES[x.dtype], ACTIVATION_CODES[activation], eps,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip


def accepts_conv2d(x, weight, weight_scale, weight_shape, bias, stride, *rest) -> str | None:
    *_, band, above, residual_above = rest
    whole = [0, 0, -(-x.shape[1] // stride), x.shape[1]]
    return _accepts(x, weight, weight_scale, 3, whole, band, (above, residual_above))


def _accepts(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, size: int, whole: list[int], band: list[int], above: tuple
) -> str | None:
    """What conv2d and upsample have in common: kernels of size × size, and the band that is all of x, in one piece."""
    if any(rows is not None for rows in above):
        return "it takes images in one piece, not in two"
    if x.dtype not in DTYPE_CODES or weight_scale is not None:
        return f"it computes in float32, bfloat16 and float16, not {weight.dtype}"
    if weight.ndim != 4 or weight.shape[2] != size or list(band) != whole:
        return f"it takes kernels of {size} × {size}, not packed for a CPU, and whole images"
    return None


def conv2d(
    x: Tensor,
    weight: Tensor,
    _scale: None,
    _shape: list[int],
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
    _band: list[int],
    _above: None,
    _residual_above: None,
) -> Tensor:
    """As the reference; arguments as `conv2d` of this package and `accepts_conv2d` let them through."""
    if input_weight is not None:
        x = rms_norm(x, input_weight, input_bias, None, input_activation, eps)
    y = convolve(x.permute(0, 3, 1, 2), weight, stride=stride, padding=1).permute(0, 2, 3, 1).contiguous()
    has_norm = norm_weight is not None
    before_norm = None if has_norm else residual
    if bias is not None or activation != "none" or before_norm is not None:
        _finish(y, None, bias, before_norm, activation, eps, y)
    if has_norm:
        _finish(y, norm_weight, norm_bias, residual, "none", eps, y)
    return y


def accepts_upsample(x, weight, weight_scale, weight_shape, bias, band, above) -> str | None:
    if reason := _accepts(x, weight, weight_scale, 2, [0, 0, x.shape[1], x.shape[1]], band, (above,)):
        return reason
    if weight.shape[0] % 32 or weight.shape[0] // x.shape[3] not in (2, 4):
        return (
            "it supports multiples of 8 output channels, as many as there are input channels or half of them, not"
            f" {weight.shape[0] // 4} of {x.shape[3]}"
        )
    return None


def upsample(
    x: Tensor, weight: Tensor, _scale: None, _shape: list[int], bias: Tensor, _band: list[int], _above: None
) -> Tensor:
    """As the reference: the library convolves, the kernel adds bias and shortcut on the way to the pixels' places."""
    B, H, W, channels = x.shape
    C = weight.shape[0] // 4
    phases = convolve_phases(x, weight).contiguous()
    x, bias = at_16_bytes(x), at_16_bytes(bias)
    out = torch.empty((B, 2 * H, 2 * W, C), dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        extension("_cuda")[0].upsample_shuffle(
            [t.data_ptr() for t in (phases, x, bias, out)], (B, H, W, C, 4 * C // channels), DTYPE_CODES[x.dtype],
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return out
