"""What the registry knows of the Triton kernels: what each accepts. Imports no Triton.

`import sana_kernels` must be quick, and work without Triton: a kernel is imported at its first call.
"""

import importlib
from collections.abc import Callable

import torch

from sana_kernels import backend
from sana_kernels.backend import DTYPE_CODES

MAX_ROW = 16384  # channels of a row that one program keeps in registers
MAX_ELEMENTS = 2**31  # of an image or a weight: offsets within them have 32 bits
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


def register(op: str, package: str, accepts: Callable[..., str | None]) -> None:
    """Enter the function `op` of sana_kernels.<package>.triton, which is imported when it is first called."""

    def run(*args):
        return getattr(importlib.import_module(f"sana_kernels.{package}.triton"), op)(*args)

    backend.register(op, "triton", run, "cuda", accepts)


def accepts_rows(x, *args) -> str | None:
    """modulate, gate_residual; quantize and modulate_quantized end with the dtype of their result."""
    return _dtype(x.dtype) or _row(x.shape[-1]) or (_fp8(args[-1], x) if isinstance(args[-1], torch.dtype) else None)


def accepts_gemm(x, x_scale, weight, weight_scale, bias, silu, gate, residual, dtype) -> str | None:
    others = (dtype, *(t.dtype for t in (bias, gate, residual) if t is not None))
    tokens = () if residual is None else (residual,)
    return _operands(x, weight) or _offsets(*tokens) or next(filter(None, map(_dtype, others)), None)


def accepts_heads(q, k, v, q_norm, k_norm, norm_eps, eps) -> str | None:
    most = 64 if q.dtype == torch.float32 else 128
    if q.shape[3] % 8 or q.shape[3] > most:
        return f"it supports head dims that are multiples of 8 up to {most} in {q.dtype}, not {q.shape[3]}"
    for weight in (q_norm, k_norm):
        if weight is not None and (weight.dtype not in (q.dtype, torch.float32) or weight.stride(0) != 1):
            return f"it takes contiguous q_norm and k_norm in {q.dtype} or float32, not {weight.dtype}"
    return (
        _dtype(q.dtype)
        or _offsets(q, k, v)
        or (None if q_norm is None and k_norm is None else _row(q.shape[2] * q.shape[3]))
    )


def accepts_from(x, x_scale, weight, weight_scale, head_dim, eps) -> str | None:
    if head_dim not in (16, 32, 64):
        return f"it supports head dims of 16, 32 and 64, not {head_dim}"
    return _operands(x, weight)


def accepts_glu(h, height, width, weight, bias, dtype=None) -> str | None:
    if dtype is None:
        return _dtype(h.dtype) or _offsets(h)
    if h.dtype == torch.float32:
        return "it quantises the convolution of bfloat16 and float16, not of float32"
    return _dtype(h.dtype) or _offsets(h) or _row(h.shape[2] // 2) or _fp8(dtype, h)


def accepts_ffn(
    x, x_scale, height, width, expand_weight, expand_scale, expand_bias, depthwise_weight, *rest
) -> str | None:
    project_weight, F = rest[1], depthwise_weight.shape[0] // 2
    return _operands(x, expand_weight) or _operands(x, project_weight) or _row(F)


def _operands(x, weight) -> str | None:
    if x.dtype not in EIGHT_BITS and x.dtype not in DTYPE_CODES:
        return f"it multiplies int8, fp8 (e4m3), float32, bfloat16 and float16, not {x.dtype}"
    if weight.ndim != 2 or weight.stride(1) != 1:
        return "it takes weights as contiguous rows (N, K), not packed"
    if max(x.shape[1], weight.stride(0)) * weight.shape[0] >= MAX_ELEMENTS:
        return "it supports weights, and results of an image, of fewer than 2³¹ elements"
    return _offsets(x) or _fp8(x.dtype, x)


def _offsets(*tokens: torch.Tensor) -> str | None:
    """(B, N, ...) tensors, of which an image is addressed with 32 bits."""
    if any(t.shape[1] * t.stride(1) >= MAX_ELEMENTS for t in tokens):
        return "it supports images that span fewer than 2³¹ elements"
    return None


def _dtype(dtype: torch.dtype) -> str | None:
    return None if dtype in DTYPE_CODES else f"it computes in float32, bfloat16 and float16, not {dtype}"


def _row(channels: int) -> str | None:
    return None if channels <= MAX_ROW else f"it supports rows of up to {MAX_ROW} channels, not {channels}"


def _fp8(dtype: torch.dtype, x: torch.Tensor) -> str | None:
    if dtype != torch.float8_e4m3fn or not torch.cuda.is_available():
        return None
    if torch.cuda.get_device_capability(x.device if x.is_cuda else None) < (8, 9):  # of "meta", the current one
        return "fp8 needs a GPU of compute capability 8.9 or higher; int8 runs here"
    return None
