"""Hands 4-bit rows to the CUDA kernels in csrc/gemm."""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension
from sana_kernels.gemm.cuda import at_16_bytes, epilogue, typed

HALVES = (torch.float16, torch.bfloat16)
LARGE = 512  # tokens from which W4A4 takes its large tile, which needs this many to fill a GPU


def accepts_quantize(x: Tensor, smooth: Tensor | None) -> str | None:
    if any(t is not None and t.dtype not in DTYPE_CODES for t in (x, smooth)):
        return f"it quantises float32, bfloat16 and float16, not {x.dtype}"
    return None


def quantize_int4(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As the reference; arguments as `quantize_int4` and `accepts_quantize` let them through."""
    K = x.shape[-1]
    groups = -(-K // 64)
    values = torch.empty((*x.shape[:-1], 32 * groups), dtype=torch.uint8, device=x.device)
    scale = torch.empty((*x.shape[:-1], groups), dtype=torch.float32, device=x.device)
    rows, smooth = x.reshape(-1, K), None if smooth is None else smooth.contiguous()
    with torch.cuda.device(x.device):
        extension("_cuda")[0].quantize_int4(
            rows.data_ptr(), typed(smooth), (rows.shape[0], K, rows.stride(0)), DTYPE_CODES[x.dtype],
            values.data_ptr(), scale.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return values, scale


def accepts_w4a16(x, weight, weight_scale, bias, silu, gate, residual, dtype) -> str | None:
    if x.dtype not in HALVES:
        return f"it multiplies float16 and bfloat16, not {x.dtype}"
    if x.shape[2] % 8:
        return f"it supports multiples of 8 input channels, not {x.shape[2]}"
    return _accepts_epilogue(bias, gate, residual, dtype)


def gemm_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    silu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As the reference; arguments as `gemm_w4a16` and `accepts_w4a16` let them through."""
    (B, M, K), N = x.shape, weight.shape[0]
    x, weight, weight_scale = at_16_bytes(x), at_16_bytes(weight), weight_scale.contiguous()
    out = torch.empty((B, M, N), dtype=dtype, device=x.device)
    group = 2 * weight.shape[1] // weight_scale.shape[1]
    with torch.cuda.device(x.device):
        extension("_cuda")[0].gemm_w4a16(
            x.data_ptr(), DTYPE_CODES[x.dtype], K, group, _int4(weight, weight_scale), (B * M, N, M),
            epilogue(out, None, bias, silu, gate, residual), torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return out


def accepts_w4a4(x, x_scale, weight, weight_scale, low, up, bias, silu, gate, residual, dtype) -> str | None:
    device = x.device if x.is_cuda else None  # on "meta", the current one
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (9, 0):
        return (
            "GPUs of compute capability 9.0 and higher emulate 4-bit products; there 4-bit weights run in int8"
            " (formats.int4_to_int8, and `gemm`)"
        )
    if low is not None and low.dtype not in HALVES:
        return f"its low-rank branch is float16 or bfloat16, not {low.dtype}"
    if low is not None and low.shape[2] % 8:
        return f"it supports ranks that are multiples of 8, not {low.shape[2]}"
    return _accepts_epilogue(bias, gate, residual, dtype)


def gemm_w4a4(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As the reference; arguments as `gemm_w4a4` and `accepts_w4a4` let them through."""
    (B, M), N = x.shape[:2], weight.shape[0]
    x, weight = at_16_bytes(x), at_16_bytes(weight)
    x_scale, weight_scale = x_scale.contiguous(), weight_scale.contiguous()
    branch = None
    if low is not None:
        low, up = at_16_bytes(low), at_16_bytes(up)
        branch = low.data_ptr(), up.data_ptr(), low.shape[2], DTYPE_CODES[low.dtype]
    out = torch.empty((B, M, N), dtype=dtype, device=x.device)
    with torch.cuda.device(x.device):
        extension("_cuda")[0].gemm_w4a4(
            _int4(x, x_scale), _int4(weight, weight_scale), branch, (B * M, N, M),
            epilogue(out, None, bias, silu, gate, residual), B * M >= LARGE, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return out


def _accepts_epilogue(
    bias: Tensor | None, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> str | None:
    given = [dtype, *(t.dtype for t in (bias, gate, residual) if t is not None)]
    if any(t not in DTYPE_CODES for t in given):
        return f"its bias, gate, residual and result are float32, bfloat16 or float16; these are {given}"
    return None


def _int4(values: Tensor, scale: Tensor) -> tuple[int, int, int]:
    """4-bit rows as C++ sees them: addresses of values and scale, groups of a row."""
    return values.data_ptr(), scale.data_ptr(), scale.shape[-1]
