"""Hands 4-bit weights to the C++ kernels in csrc/gemm, as they are stored."""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension
from sana_kernels.gemm.cpu import address, as_float, rows


def accepts_w4a16(x, weight, weight_scale, bias, silu, gate, residual, dtype) -> str | None:
    if x.dtype not in DTYPE_CODES:
        return f"it multiplies float32, bfloat16 and float16, not {x.dtype}"
    if dtype not in DTYPE_CODES or (residual is not None and dtype not in (residual.dtype, torch.float32)):
        return f"its result is float32, or bfloat16 or float16 like the residual; not {dtype}"
    return None


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
    (B, M, K), N, groups = x.shape, weight.shape[0], weight_scale.shape[1]
    x, stride = rows(x)
    weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
    out = torch.empty(B, M, N, dtype=dtype, device=x.device)
    residual = None if residual is None else residual.to(dtype).contiguous()
    floats = [as_float(t) for t in (bias, gate)]
    extension("_cpu")[0].gemm_w4a16(
        x.data_ptr(), stride, DTYPE_CODES[x.dtype], (weight.data_ptr(), weight_scale.data_ptr()),
        (groups, 2 * weight.shape[1] // groups), out.data_ptr(), (B * M, N, K, M), [address(t) for t in floats],
        address(residual), DTYPE_CODES[dtype], silu, torch.get_num_threads(),
    )  # fmt: skip
    return out
