"""Adaptive layer norm and gated residual in Triton, the norm also with 8-bit rows as its result.

Algorithm: one program per token. Its row is read once and stays in registers: the mean is taken off, twice, then comes the
mean square, then the modulation, and for 8-bit rows their largest element and the rounding. All in fp32; one rounding at
the end.

Layout: x (B, N, C) by the strides of B and N, channels contiguous; results contiguous, 8-bit rows padded with zeros to a
multiple of 64. Tile: 1 × C rounded up to a power of two; its lanes beyond C load nothing.

Bytes per element, bf16: modulate 2 + 2, quantised 2 + 1, gate_residual 2 + 2 + 2; the (B, C) tables come from the cache.
About 10 FLOP per element. Bound: memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_kernels.tiles import row_tile
from sana_kernels.triton_common import empty_quantized, launch, quantize_rows


@triton.jit
def modulate_kernel(
    x_ptr, shift_ptr, scale_ptr, out_ptr, out_scale_ptr,
    N, C, pitch, x_image, x_token, shift_image, scale_image, eps,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    image, token = row // N, row % N
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = c < C
    x = tl.load(x_ptr + image * x_image + token * x_token + c, mask=inside, other=0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 1)[:, None] / C, 0.0)
    centred = tl.where(inside, centred - tl.sum(centred, 1)[:, None] / C, 0.0)  # what rounding left of a large mean
    variance = tl.sum(centred * centred, 1)[:, None] / C
    deviation = tl.sqrt_rn(variance + eps)
    norm = centred * tl.div_rn(tl.full(deviation.shape, 1.0, tl.float32), deviation)
    shift = tl.load(shift_ptr + image * shift_image + c, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + image * scale_image + c, mask=inside, other=0).to(tl.float32)
    y = norm * (1 + scale) + shift
    if out_scale_ptr is not None:
        y, out_scale = quantize_rows(y, out_ptr.dtype.element_ty)
        tl.store(out_scale_ptr + row + tl.arange(0, 1), out_scale)
    tl.store(out_ptr + row * pitch + c, y.to(out_ptr.dtype.element_ty), mask=c < pitch)


@triton.jit
def gate_residual_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr, N, C, x_image, x_token, y_image, y_token, gate_image, BLOCK_C: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    image, token = row // N, row % N
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    x = tl.load(x_ptr + image * x_image + token * x_token + c, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + image * y_image + token * y_token + c, mask=inside).to(tl.float32)
    gate = tl.load(gate_ptr + image * gate_image + c, mask=inside).to(tl.float32)
    tl.store(out_ptr + row * C + c, (x + gate * y).to(out_ptr.dtype.element_ty), mask=inside)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """As the reference; arguments as `_check` and `accepts_rows` let them through."""
    return _modulate(x, shift, scale, eps, torch.empty(x.shape, dtype=x.dtype, device=x.device), None)


def modulate_quantized(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As the reference; arguments as `_check` and `accepts_rows` let them through."""
    values, scales = empty_quantized(x.shape, dtype, x.device)
    return _modulate(x, shift, scale, eps, values, scales), scales


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out: Tensor, out_scale: Tensor | None) -> Tensor:
    B, N, C = x.shape
    block, warps = row_tile(C)
    launch(
        modulate_kernel, (B * N,), x, shift, scale, out, out_scale, N, C, out.shape[2], *x.stride()[:2],
        shift.stride(0), scale.stride(0), eps, BLOCK_C=block, num_warps=warps,
    )  # fmt: skip
    return out


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """As the reference; arguments as `_check` and `accepts_rows` let them through."""
    B, N, C = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, warps = row_tile(C)
    launch(
        gate_residual_kernel, (B * N,), x, y, gate, out, N, C, *x.stride()[:2], *y.stride()[:2], gate.stride(0),
        BLOCK_C=block, num_warps=warps,
    )  # fmt: skip
    return out
