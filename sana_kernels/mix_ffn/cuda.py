"""Hands tensors to the CUDA kernels in csrc/mix_ffn."""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension
from sana_kernels.gemm import reference
from sana_kernels.gemm.cuda import MAX_ROW, gemm, quantize


def accepts(h, *args) -> str | None:
    return None if h.dtype in DTYPE_CODES else f"it computes in float32, bfloat16 and float16, not {h.dtype}"


def accepts_quantized(h, *args) -> str | None:
    if h.shape[2] // 2 > MAX_ROW:
        return f"it supports F up to {MAX_ROW}, not {h.shape[2] // 2}"
    return accepts(h)


def depthwise_glu(h: Tensor, height: int, width: int, weight: Tensor, bias: Tensor) -> Tensor:
    """As the reference; arguments as `depthwise_glu` of this package and `accepts` let them through."""
    B, N, channels = h.shape
    out = torch.empty((B, N, channels // 2), dtype=h.dtype, device=h.device)
    taps = weight.reshape(channels, 9)
    tensors = (h, taps, bias.contiguous())
    with torch.cuda.device(h.device):
        extension("_cuda")[0].depthwise_glu(
            [t.data_ptr() for t in (*tensors, out)], (B, height, width, channels // 2), taps.stride(),
            [DTYPE_CODES[t.dtype] for t in tensors], torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return out


def depthwise_glu_quantized(
    h: Tensor, height: int, width: int, weight: Tensor, bias: Tensor, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """As the reference, of u rounded to h's dtype: the scale of a row is known only when all of the row is."""
    return quantize(depthwise_glu(h, height, width, weight, bias), dtype)


def accepts_mix_ffn(x, x_scale, height, width, expand_weight, *rest) -> str | None:
    if expand_weight.ndim != 2:
        return "it takes weights as rows (N, K), not packed"
    if x_scale is None:
        return accepts(x)
    if x.dtype != torch.int8:
        return f"its 8-bit products are of int8; {x.dtype} is left to triton"
    F = expand_weight.shape[0] // 2
    return None if F <= MAX_ROW else f"it supports F up to {MAX_ROW}, not {F}"


def mix_ffn(
    x: Tensor,
    x_scale: Tensor | None,
    height: int,
    width: int,
    expand_weight: Tensor,
    expand_scale: Tensor | None,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_scale: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """As the reference. The 8-bit products are our kernels; those of 16 bits are the library's, which uses wgmma."""
    eight_bit = x_scale is not None
    product = gemm if eight_bit else reference.gemm
    middle = torch.bfloat16 if eight_bit else x.dtype
    h = product(x, x_scale, expand_weight, expand_scale, expand_bias, True, None, None, middle)
    if eight_bit:
        u, u_scale = depthwise_glu_quantized(h, height, width, depthwise_weight, depthwise_bias, x.dtype)
    else:
        u, u_scale = depthwise_glu(h, height, width, depthwise_weight, depthwise_bias), None
    dtype = middle if residual is None else residual.dtype
    return product(u, u_scale, project_weight, project_scale, None, False, gate, residual, dtype)
