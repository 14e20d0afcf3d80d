"""Matrix products with fused epilogues in Triton (bf16, fp16, fp32, int8, fp8), and the rows of 8 bits that they take.

gemm. Algorithm: one program per tile of the result; it walks along K through shared memory (num_stages loads ahead of the
tensor cores) and keeps the sums in registers, int32 for int8 operands and fp32 for all others. What follows the product
(scales, bias, SiLU, gate and residual) happens there too, in fp32, with one rounding at the end. K is never split, so no
sum depends on the order in which programs run.

Layout: x (B, M, K) by the strides of B and M, weight (N, K) by the stride of N, K contiguous in both. A tile lies within
one image, so that it has one row of gates. Rows of x and of weight beyond the last are read as row 0 and their results
dropped: loads along K are the only ones with a mask, and where BLOCK_K divides K none have. Programs run in groups of
GROUP_M rows of tiles, whose tiles of x stay in the L2 cache while the weight streams by.

Tiles: sana_kernels/tiles.py, from the shape and the architecture. They are powers of two and SANA's N are not: 2240 is
35 · 64 but 17.5 · 128. The last tile is then half empty, which costs less than another round of smaller tiles would.

fp8: tensor cores of Hopper, and by reports of Ada, sum it with fewer bits than fp32, so after BLOCK_K values, on Hopper at
most 128, the sum is added to one in fp32 registers. fp32 operands are multiplied in fp32, never in TF32.

FLOPs: 2 B M N K. Bytes: (B M + N) K elements and B M N results. Bound: the tensor cores, from about 300 rows on.

quantize. One program per row, which stays in registers between its largest element and the rounding. The program that
computes a tile of `gemm` cannot quantise it: the scale needs the whole row. SANA would ask for it nowhere but after
attention; `modulate` and `depthwise_glu` quantise their own rows. Bound: memory, 2 + 1 bytes per element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_kernels.tiles import arch, gemm_tile, row_tile
from sana_kernels.triton_common import empty_quantized, launch, promote, quantize_rows, silu

GROUP_M = 8


@triton.jit
def product(
    x_ptr, weight_ptr, m, n, K, x_row, weight_row,
    EVEN_K: tl.constexpr, PROMOTE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows m of x times rows n of the weight: (m, n) in int32 for int8 operands, else in fp32."""
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (m[:, None] * x_row + k[None, :])
    weight_at = weight_ptr + (n[None, :] * weight_row + k[:, None])
    total = tl.zeros((m.shape[0], n.shape[0]), tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x, weight = tl.load(x_at), tl.load(weight_at)
        else:
            x = tl.load(x_at, mask=k[None, :] < K - start, other=0.0)
            weight = tl.load(weight_at, mask=k[:, None] < K - start, other=0.0)
        if PROMOTE is None:
            total = tl.dot(x, weight, total, input_precision="ieee", out_dtype=total.dtype)  # before 3.9 it was fp32
        else:
            total += tl.dot(x, weight, max_num_imprecise_acc=PROMOTE)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    return total


@triton.jit
def gemm_kernel(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, gate_ptr, residual_ptr, out_ptr,
    M, N, K, x_image, x_token, weight_row, gate_image, residual_image, residual_token,
    SILU: tl.constexpr, EVEN_K: tl.constexpr, PROMOTE: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Which tile of the image: down GROUP_M rows of tiles, then one column on.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    inside = tl.program_id(0) % (GROUP_M * tiles_n)
    m = (group * GROUP_M + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (inside // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_read = tl.where(m < M, m, 0)
    n_read = tl.where(n < N, n, 0)
    image = tl.program_id(1).to(tl.int64)  # within an image, 32 bits count elements

    total = product(
        x_ptr + image * x_image, weight_ptr, m_read, n_read, K, x_token, weight_row, EVEN_K, PROMOTE, BLOCK_K
    )
    y = total.to(tl.float32)
    if x_scale_ptr is not None:
        x_scale = tl.load(x_scale_ptr + image * M + m_read)
        y *= x_scale[:, None] * tl.load(weight_scale_ptr + n_read)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n_read).to(tl.float32)[None, :]
    if SILU:
        y = silu(y)
    stored = (m < M)[:, None] & (n < N)[None, :]
    if residual_ptr is not None:
        if gate_ptr is not None:
            y *= tl.load(gate_ptr + image * gate_image + n_read).to(tl.float32)[None, :]
        residual_at = residual_ptr + image * residual_image + (m[:, None] * residual_token + n[None, :])
        y += tl.load(residual_at, mask=stored, other=0.0).to(tl.float32)
    out_at = out_ptr + image * M * N + (m[:, None] * N + n[None, :])
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def quantize_kernel(x_ptr, out_ptr, out_scale_ptr, M, K, pitch, x_image, x_token, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)[None, :]
    x = tl.load(x_ptr + (row // M) * x_image + (row % M) * x_token + k, mask=k < K, other=0).to(tl.float32)
    values, scale = quantize_rows(x, out_ptr.dtype.element_ty)
    tl.store(out_scale_ptr + row + tl.arange(0, 1), scale)
    tl.store(out_ptr + row * pitch + k, values, mask=k < pitch)


def gemm(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As the reference; arguments as `_check` and `accepts_gemm` let them through."""
    (B, M, K), N = x.shape, weight.shape[0]
    out = torch.empty((B, M, N), dtype=dtype, device=x.device)
    tile = gemm_tile(x.dtype, residual is not None, B, M, N, arch(x.device))
    gate_image = 0 if gate is None else gate.stride(0)
    residual_image, residual_token = (0, 0) if residual is None else residual.stride()[:2]
    launch(
        gemm_kernel, (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n), B),
        x, _contiguous(x_scale), weight, _contiguous(weight_scale), bias, gate, residual, out,
        M, N, K, *x.stride()[:2], weight.stride(0), gate_image, residual_image, residual_token,
        SILU=silu, EVEN_K=K % tile.k == 0, PROMOTE=promote(x.dtype, tile.k), GROUP_M=GROUP_M,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _contiguous(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.contiguous()


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As the reference; arguments as the public function and `accepts_rows` let them through."""
    values, scales = empty_quantized(x.shape, dtype, x.device)
    rows = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    block, warps = row_tile(x.shape[-1])
    launch(
        quantize_kernel, (scales.numel(),), rows, values, scales, rows.shape[1], x.shape[-1], values.shape[-1],
        *rows.stride()[:2], BLOCK_K=block, num_warps=warps,
    )  # fmt: skip
    return values, scales
