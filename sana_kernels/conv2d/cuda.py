"""Hands tensors to the CUDA kernels in csrc/conv2d."""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension
from sana_kernels.conv2d.reference import ACTIVATIONS, convolve_phases

ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def accepts_rms_norm(x, weight, bias, residual, activation, eps) -> str | None:
    return None if x.dtype in DTYPE_CODES else f"it computes in float32, bfloat16 and float16, not {x.dtype}"


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str, eps: float) -> Tensor:
    """As the reference; arguments as `rms_norm` of this package and `accepts_rms_norm` let them through."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        extension("_cuda")[0].rms_norm(
            [0 if t is None else t.data_ptr() for t in (x, weight, bias, residual, out)],
            (x.numel() // x.shape[-1], x.shape[-1]), DTYPE_CODES[x.dtype], ACTIVATION_CODES[activation], eps,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return out


def accepts_upsample(x, weight, weight_scale, weight_shape, bias, band) -> str | None:
    if x.dtype not in DTYPE_CODES or weight_scale is not None:
        return f"it computes in float32, bfloat16 and float16, not {weight.dtype}"
    if weight.ndim != 4 or weight.shape[2] != 2 or list(band) != [0, 0, x.shape[1], x.shape[1]]:
        return "it takes folded weights (4 · out, in, 2, 2), not packed, and whole images"
    if weight.shape[0] % 32 or weight.shape[0] // x.shape[3] not in (2, 4):
        return (
            "it supports multiples of 8 output channels, as many as there are input channels or half of them, not"
            f" {weight.shape[0] // 4} of {x.shape[3]}"
        )
    return None


def upsample(x: Tensor, weight: Tensor, _scale: None, _shape: list[int], bias: Tensor, _band: list[int]) -> Tensor:
    """As the reference: the library convolves, the kernel adds bias and shortcut on the way to the pixels' places."""
    B, H, W, channels = x.shape
    C = weight.shape[0] // 4
    phases = convolve_phases(x, weight).contiguous()
    out = torch.empty((B, 2 * H, 2 * W, C), dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        extension("_cuda")[0].upsample_shuffle(
            [t.data_ptr() for t in (phases, x, bias, out)], (B, H, W, C, 4 * C // channels), DTYPE_CODES[x.dtype],
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return out
