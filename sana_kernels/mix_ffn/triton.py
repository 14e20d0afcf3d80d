"""SANA's Mix-FFN in Triton: two matrix products (gemm/triton.py) and between them the depthwise convolution with its gate.

    h = SiLU(x W₁ᵀ + b₁)                gemm, bias and SiLU in its epilogue
    u = a · SiLU(g), [a, g] = 3×3(h)    depthwise_glu, for 8-bit operands with u quantised by the same program
    y = residual + gate · (u W₂ᵀ)       gemm, gate and residual in its epilogue

so that h and u cross memory once each way, and nothing else does.

depthwise_glu. Algorithm: a program makes BLOCK_T tokens × BLOCK_F channels of u: for each of the nine taps it loads the
neighbours of both halves of h and the weights, and sums in fp32. Tokens are counted along the image's rows, so a tile may
end one row and begin the next; a neighbour outside of the image is a masked load. To quantise, a program has whole rows
(BLOCK_F is F rounded up to a power of two) and finds the scale before it rounds, in registers.

Layout: h (B, H · W, 2F) and u contiguous, NHWC; the weight by its strides of channels and of taps. Tap by tap, as
`taps_first` stores it, it is read in 16-byte accesses; channel by channel, as checkpoints store it, in single ones.

Per token: 4 F bytes of h and 2 F of u (F + 4 quantised) in 16 bits, 36 F FLOPs of the convolution and about 10 F of the
gate. The nine loads come from the L1 and L2 caches, each element of h once from memory. Bound: memory, closely followed
by instructions: in Triton registers cannot slide along the image, so every tap is loaded and widened again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_kernels.gemm.triton import gemm
from sana_kernels.tiles import glu_tile
from sana_kernels.triton_common import empty_quantized, launch, quantize_rows, silu


@triton.jit
def depthwise_glu_kernel(
    h_ptr, weight_ptr, bias_ptr, out_ptr, out_scale_ptr, height, width, F, pitch, weight_channel, weight_tap,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    N = height * width
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    image = tl.program_id(2).to(tl.int64)
    row, column = t // width, t % width
    h_ptr += image * N * 2 * F
    a = tl.zeros((BLOCK_T, BLOCK_F), tl.float32) + tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    g = (
        tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        + tl.load(bias_ptr + F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    )
    for down in range(-1, 2):  # unrolled, all 36 loads would be under way at once, in more registers than there are
        for right in tl.static_range(-1, 2):
            inside = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
            mask = inside[:, None] & (f < F)[None, :]
            at = h_ptr + ((t + down * width + right)[:, None] * (2 * F) + f[None, :])
            weight_at = weight_ptr + (3 * (down + 1) + right + 1) * weight_tap + f * weight_channel
            weight_a = tl.load(weight_at, mask=f < F, other=0.0).to(tl.float32)
            weight_g = tl.load(weight_at + F * weight_channel, mask=f < F, other=0.0).to(tl.float32)
            a += tl.load(at, mask=mask, other=0.0).to(tl.float32) * weight_a[None, :]
            g += tl.load(at + F, mask=mask, other=0.0).to(tl.float32) * weight_g[None, :]
    u = a * silu(g)
    if out_scale_ptr is not None:
        u, scale = quantize_rows(u, out_ptr.dtype.element_ty)
        tl.store(out_scale_ptr + image * N + t, scale, mask=t < N)
    out_at = out_ptr + image * N * pitch + (t[:, None] * pitch + f[None, :])
    tl.store(out_at, u.to(out_ptr.dtype.element_ty), mask=(t < N)[:, None] & (f < pitch)[None, :])


def depthwise_glu(h: Tensor, height: int, width: int, weight: Tensor, bias: Tensor) -> Tensor:
    """As the reference; arguments as the public function and `accepts_glu` let them through."""
    out = torch.empty((*h.shape[:2], h.shape[2] // 2), dtype=h.dtype, device=h.device)
    return _depthwise_glu(h, height, width, weight, bias, out, None)


def depthwise_glu_quantized(
    h: Tensor, height: int, width: int, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As the reference; arguments as the public function and `accepts_glu` let them through."""
    values, scales = empty_quantized((*h.shape[:2], h.shape[2] // 2), dtype, h.device)
    return _depthwise_glu(h, height, width, weight, bias, values, scales), scales


def _depthwise_glu(
    h: Tensor, height: int, width: int, weight: Tensor, bias: Tensor, out: Tensor, out_scale: Tensor | None
) -> Tensor:
    B, N, F = *h.shape[:2], h.shape[2] // 2
    taps = weight.reshape(2 * F, 9)
    tokens, channels, warps = glu_tile(F, whole_rows=out_scale is not None)
    launch(
        depthwise_glu_kernel, (triton.cdiv(N, tokens), triton.cdiv(F, channels), B), h, taps, bias.contiguous(), out,
        out_scale, height, width, F, out.shape[2], *taps.stride(), BLOCK_T=tokens, BLOCK_F=channels, num_warps=warps,
    )  # fmt: skip
    return out


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
    """As the reference; arguments as `_check` and `accepts_ffn` let them through."""
    middle = x.dtype if x_scale is None else torch.bfloat16
    h = gemm(x, x_scale, expand_weight, expand_scale, expand_bias, True, None, None, middle)
    if x_scale is None:
        u, u_scale = depthwise_glu(h, height, width, depthwise_weight, depthwise_bias), None
    else:
        u, u_scale = depthwise_glu_quantized(h, height, width, depthwise_weight, depthwise_bias, x.dtype)
    dtype = middle if residual is None else residual.dtype
    return gemm(u, u_scale, project_weight, project_scale, None, False, gate, residual, dtype)
