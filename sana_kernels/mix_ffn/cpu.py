"""Hands tensors to the C++ kernels in csrc/mix_ffn."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension
from sana_kernels.gemm import cpu as gemm
from sana_kernels.gemm import inputs, outputs
from sana_kernels.gemm.reference import gemm as library_gemm


def accepts_depthwise_glu(h: Tensor, *args) -> str | None:
    return None if h.dtype in DTYPE_CODES else f"it computes in float32, bfloat16 and float16, not {h.dtype}"


def accepts_depthwise_glu_quantized(h, height, width, weight, bias, dtype) -> str | None:
    return accepts_depthwise_glu(h) or gemm.only_int8(dtype)


def depthwise_glu(h: Tensor, height: int, width: int, weight: Tensor, bias: Tensor) -> Tensor:
    """As the reference; arguments as this package lets them through."""
    B, N, channels = h.shape
    out = torch.empty(B, N, channels // 2, dtype=h.dtype, device=h.device)
    _run(h, height, width, weight, bias, out, None)
    return out


def depthwise_glu_quantized(
    h: Tensor, height: int, width: int, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As the reference; `dtype` is int8."""
    B, N, channels = h.shape
    values, scale = gemm.empty_rows(B, N, channels // 2)
    _run(h, height, width, weight, bias, values, scale)
    return values, scale


def _run(h: Tensor, height: int, width: int, weight: Tensor, bias: Tensor, out: Tensor, scale: Tensor | None) -> None:
    weight, bias = weight.contiguous(), bias.contiguous()
    extension("_cpu")[0].depthwise_glu(
        [t.data_ptr() for t in (h, weight, bias, out)], gemm.address(scale),
        (h.shape[0], height, width, h.shape[2] // 2), [DTYPE_CODES[t.dtype] for t in (h, weight, bias)],
        torch.get_num_threads(),
    )  # fmt: skip


def accepts_mix_ffn(
    x, x_scale, height, width, expand_weight, expand_scale, expand_bias, depthwise_weight, depthwise_bias,
    project_weight, project_scale, gate, residual,
) -> str | None:  # fmt: skip
    if x.dtype in DTYPE_CODES and x.dtype != torch.bfloat16:
        return None  # the matrix products are PyTorch's, and what lies between them is ours
    dtype = torch.bfloat16 if residual is None else residual.dtype
    u = torch.empty(1, 1, inputs(project_weight), dtype=x.dtype, device="meta")
    return gemm.accepts(x, x_scale, expand_weight, expand_scale, expand_bias, True, None, None, torch.bfloat16) or (
        gemm.accepts(u, x_scale, project_weight, project_scale, None, False, gate, residual, dtype)
    )


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
    """As the reference; arguments as `_check` of this package and `accepts_mix_ffn` let them through."""
    dtype = residual.dtype if residual is not None else x.dtype if x_scale is None else torch.bfloat16
    if x.dtype not in gemm.PER_LANE:
        h = F.silu(F.linear(x, expand_weight, expand_bias.to(x.dtype)), inplace=True)
        u = depthwise_glu(h, height, width, depthwise_weight, depthwise_bias)
        return library_gemm(u, None, project_weight, None, None, False, gate, residual, dtype)
    expand_weight, project_weight = (w if w.ndim == 3 else gemm.pack(w) for w in (expand_weight, project_weight))
    rows, stride = gemm.rows(x)
    depthwise = [t.contiguous() for t in (depthwise_weight, depthwise_bias)]
    floats = [gemm.as_float(t) for t in (x_scale, expand_scale, project_scale, expand_bias, gate)]
    residual = None if residual is None else residual.contiguous()
    shape = (x.shape[0], height, width, outputs(project_weight), outputs(expand_weight) // 2)  # B, H, W, C, F
    out = torch.empty(*x.shape[:2], shape[3], dtype=dtype, device=x.device)
    extension("_cpu")[0].mix_ffn(
        rows.data_ptr(), stride, (expand_weight.data_ptr(), project_weight.data_ptr()),
        [t.data_ptr() for t in depthwise], [DTYPE_CODES[t.dtype] for t in depthwise],
        [gemm.address(t) for t in floats], gemm.address(residual), out.data_ptr(), DTYPE_CODES[dtype], shape,
        torch.get_num_threads(),
    )  # fmt: skip
    return out
