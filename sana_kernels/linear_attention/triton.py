"""ReLU linear attention in Triton: of given q, k, v, or of a projection whose q, k and v never reach memory.

Algorithm, with the notation of reference.py. Three launches:
  state   S = Σ φ(k) vᵀ and z = Σ φ(k) of a chunk of tokens, at most 8 chunks per image (tiles.state_chunk);
  sum     the chunks' S and z, added in their order, so the same input gives the same bytes;
  apply   o = Sᵀ φ(q) / (z · φ(q) + eps), a tile of tokens at a time.
`linear_attention` loads q, k and v by their strides, one head per program. `linear_attention_from` computes them from x in
the programs that need them, as matrix products whose epilogue is the attention: k and v in the state pass, q in the apply
pass. There a program has several heads, and S is the diagonal of a larger product, whose rest is dropped.

qk-RMSNorm takes one more launch per tensor, for 1 / RMS of each token. That is positive, so it leaves the ReLU:
φ(q w / RMS) = |w| φ(± q) / RMS with the sign of w. |w| multiplies rows of S and of z; 1 / RMS of k its v, and of q the
result.

Precision: φ(k) and v as they are in 16 bits have exact products on tensor cores; sums are fp32. Where one factor is fp32
(S, or v / RMS), it is split into two TF32 values, 22 bits, and the other one, of 16 bits, is exact in TF32. fp32 inputs
are multiplied in fp32. Projected q, k and v are rounded to 16 bits, as the reference rounds them.

Layout: results (B, N, H, D) contiguous; S and z (chunks, B, H, D + 1, D) fp32, z last. Tiles: tiles.head_tile and
tiles.attention_tile. Bytes, 16 bits: 8 per element of q, k, v, o in the two-pass form; x twice, the weight and o once in
the other. FLOPs per token: 4 C D, and 6 C² of the projection. Bound: memory; with the projection, the tensor cores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_kernels.gemm.triton import product
from sana_kernels.tiles import arch, attention_tile, head_tile, row_tile, state_chunk
from sana_kernels.triton_common import launch, promote, relu

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def split_dot(a, b, total):
    """total + a b with a of 16-bit values and b of any, both fp32: b is split into two values of 11 bits."""
    high = (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    total = tl.dot(a, high, total, input_precision="tf32")
    return tl.dot(a, b - high, total, input_precision="tf32")


@triton.jit
def wide_dot(a, b, total, dtype: tl.constexpr):
    """total + a b, both fp32, with a of values of this dtype and b of any."""
    if dtype == tl.float32:
        return tl.dot(a, b, total, input_precision="ieee")
    return split_dot(a, b, total)


@triton.jit
def inverse_rms_kernel(x_ptr, out_ptr, N, C, D, x_image, x_token, x_head, eps, BLOCK_C: tl.constexpr):
    """1 / RMS of each token over all its heads."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    at = x_ptr + (row // N) * x_image + (row % N) * x_token + (c // D) * x_head + c % D
    x = tl.load(at, mask=c < C, other=0.0).to(tl.float32)
    rms = tl.sqrt_rn(tl.sum(x * x, 0) / C + eps)
    tl.store(out_ptr + row, 1 / rms)


@triton.jit
def state_kernel(
    k_ptr, v_ptr, norm_ptr, inverse_ptr, out_ptr,
    B, H, N, D, chunk, k_image, k_token, k_head, v_image, v_token, v_head,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * chunk
    image, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    d = tl.arange(0, BLOCK_D)
    k_ptr += image * k_image + head * k_head
    v_ptr += image * v_image + head * v_head
    if norm_ptr is not None:
        negative = tl.load(norm_ptr + head * D + d, mask=d < D, other=0.0).to(tl.float32) < 0
    state = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    normaliser = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, min(first + chunk, N), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < N)[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + (t[:, None] * k_token + d[None, :]), mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + (t[:, None] * v_token + d[None, :]), mask=inside, other=0.0)
        if norm_ptr is None:
            k = relu(k)
            normaliser += tl.sum(k, 0)
            state = tl.dot(tl.trans(k.to(k_ptr.dtype.element_ty)), v, state, input_precision="ieee")
        else:
            inverse = tl.load(inverse_ptr + image * N + t, mask=t < N, other=0.0)[:, None]
            k = relu(tl.where(negative[None, :], -k, k))
            normaliser += tl.sum(k * inverse, 0)
            state = wide_dot(tl.trans(k), v.to(tl.float32) * inverse, state, k_ptr.dtype.element_ty)
    out_ptr += ((tl.program_id(0) * B + image) * H + head) * (D + 1) * D
    tl.store(out_ptr + d[:, None] * D + d[None, :], state, mask=(d < D)[:, None] & (d < D)[None, :])
    tl.store(out_ptr + D * D + d, normaliser, mask=d < D)


@triton.jit
def sum_kernel(parts_ptr, out_ptr, parts, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + part * size + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, total, mask=i < size)


@triton.jit
def apply_kernel(
    q_ptr, state_ptr, q_norm_ptr, k_norm_ptr, inverse_ptr, out_ptr, H, N, D, q_image, q_token, q_head, eps,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    image, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    d = tl.arange(0, BLOCK_D)
    state_ptr += (image * H + head) * (D + 1) * D
    square = (d < D)[:, None] & (d < D)[None, :]
    state = tl.load(state_ptr + d[:, None] * D + d[None, :], mask=square, other=0.0)
    normaliser = tl.load(state_ptr + D * D + d, mask=d < D, other=0.0)
    if k_norm_ptr is not None:
        weight = tl.abs(tl.load(k_norm_ptr + head * D + d, mask=d < D, other=0.0).to(tl.float32))
        state *= weight[:, None]
        normaliser *= weight
    stored = (t < N)[:, None] & (d < D)[None, :]
    q_at = q_ptr + image * q_image + head * q_head + (t[:, None] * q_token + d[None, :])
    q = tl.load(q_at, mask=stored, other=0.0).to(tl.float32)
    if q_norm_ptr is not None:
        weight = tl.load(q_norm_ptr + head * D + d, mask=d < D, other=0.0).to(tl.float32)
        q = tl.where(weight[None, :] < 0, -q, q)
        state *= tl.abs(weight)[:, None]
        normaliser *= tl.abs(weight)
    q = relu(q)
    above = wide_dot(q, state, tl.zeros((BLOCK_T, BLOCK_D), tl.float32), q_ptr.dtype.element_ty)
    below = tl.sum(q * normaliser[None, :], 1)
    if q_norm_ptr is not None:
        inverse = tl.load(inverse_ptr + image * N + t, mask=t < N, other=0.0)
        above *= inverse[:, None]
        below *= inverse
    o = above / (below + eps)[:, None]
    out_at = out_ptr + image * N * H * D + ((t[:, None] * H + head) * D + d[None, :])
    tl.store(out_at, o.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def projected_state_kernel(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, out_ptr, B, N, K, C, chunk, x_image, x_token, weight_row,
    DTYPE: tl.constexpr, D: tl.constexpr, EVEN_K: tl.constexpr, PROMOTE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * chunk
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    # k and v of a channel come from neighbouring columns of one product, and so lie in one thread's registers.
    column = tl.program_id(0) * 2 * BLOCK_C + tl.arange(0, 2 * BLOCK_C)
    weight_at = tl.where(column < 2 * C, (1 + column % 2) * C + column // 2, 0)
    x_ptr += image * x_image
    state = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    normaliser = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, min(first + chunk, N), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        t_read = tl.where(t < N, t, 0)
        kv = product(x_ptr, weight_ptr, t_read, weight_at, K, x_token, weight_row, EVEN_K, PROMOTE, BLOCK_K)
        if x_scale_ptr is not None:
            x_scale = tl.load(x_scale_ptr + image * N + t_read)
            kv = kv.to(tl.float32) * (x_scale[:, None] * tl.load(weight_scale_ptr + weight_at)[None, :])
        k, v = tl.split(tl.reshape(kv, (BLOCK_T, BLOCK_C, 2)))
        k = tl.where((t < N)[:, None], relu(k), 0.0).to(DTYPE)
        normaliser += tl.sum(k.to(tl.float32), 0)
        state = tl.dot(tl.trans(k), v.to(DTYPE), state, input_precision="ieee")
    out_ptr += (tl.program_id(1) * B + image) * (C // D) * (D + 1) * D
    same_head = (c // D)[:, None] == (c // D)[None, :]  # the diagonal of the product is wanted, D × D a head
    at = out_ptr + ((c // D) * (D + 1) + c % D)[:, None] * D + (c % D)[None, :]
    tl.store(at, state, mask=(c < C)[:, None] & same_head)
    tl.store(out_ptr + ((c // D) * (D + 1) + D) * D + c % D, normaliser, mask=c < C)


@triton.jit
def projected_apply_kernel(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, state_ptr, out_ptr, N, K, C, x_image, x_token, weight_row, eps,
    DTYPE: tl.constexpr, D: tl.constexpr, EVEN_K: tl.constexpr, PROMOTE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_read = tl.where(t < N, t, 0)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_read = tl.where(c < C, c, 0)
    q = product(x_ptr + image * x_image, weight_ptr, t_read, c_read, K, x_token, weight_row, EVEN_K, PROMOTE, BLOCK_K)
    if x_scale_ptr is not None:
        x_scale = tl.load(x_scale_ptr + image * N + t_read)
        q = q.to(tl.float32) * (x_scale[:, None] * tl.load(weight_scale_ptr + c_read)[None, :])
    q = relu(q).to(DTYPE).to(tl.float32)
    # The heads' states on the diagonal, zeros elsewhere.
    state_ptr += image * (C // D) * (D + 1) * D
    same_head = (c // D)[:, None] == (c // D)[None, :]
    at = state_ptr + ((c // D) * (D + 1) + c % D)[:, None] * D + (c % D)[None, :]
    state = tl.load(at, mask=(c < C)[:, None] & same_head, other=0.0)
    normaliser = tl.load(state_ptr + ((c // D) * (D + 1) + D) * D + c % D, mask=c < C, other=0.0)
    above = wide_dot(q, state, tl.zeros((BLOCK_T, BLOCK_C), tl.float32), DTYPE)
    below = tl.sum(tl.reshape(q * normaliser[None, :], (BLOCK_T, BLOCK_C // D, D)), 2) + eps
    o = tl.reshape(above, (BLOCK_T, BLOCK_C // D, D)) / below[:, :, None]
    out_at = out_ptr + image * N * C + (t[:, None] * C + c[None, :])
    stored = (t < N)[:, None] & (c < C)[None, :]
    tl.store(out_at, tl.reshape(o, (BLOCK_T, BLOCK_C)).to(out_ptr.dtype.element_ty), mask=stored)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, norm_eps: float, eps: float
) -> Tensor:
    """As the reference; arguments as `_check` and `accepts_heads` let them through."""
    B, N, H, D = q.shape
    tokens, lanes, warps = head_tile(D, q.dtype, arch(q.device))
    chunk = state_chunk(N)
    parts = _empty_state(triton.cdiv(N, chunk), B, H, D, q.device)
    launch(
        state_kernel, (len(parts), B * H), k, v, k_norm, None if k_norm is None else inverse_rms(k, norm_eps), parts,
        B, H, N, D, chunk, *k.stride()[:3], *v.stride()[:3], BLOCK_T=tokens, BLOCK_D=lanes, num_warps=warps,
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(
        apply_kernel, (triton.cdiv(N, tokens), B * H), q, _sum(parts), q_norm, k_norm,
        None if q_norm is None else inverse_rms(q, norm_eps), out, H, N, D, *q.stride()[:3], eps,
        BLOCK_T=tokens, BLOCK_D=lanes, num_warps=warps,
    )  # fmt: skip
    return out


def linear_attention_from(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor | None, head_dim: int, eps: float
) -> Tensor:
    """As the reference; arguments as `_check_from` and `accepts_from` let them through."""
    (B, N, K), C, D = x.shape, weight.shape[0] // 3, head_dim
    dtype = x.dtype if x_scale is None else torch.bfloat16
    tile, chunk = attention_tile(x.dtype, arch(x.device)), state_chunk(N)
    groups = triton.cdiv(C, tile.n)
    scales = (None, None) if x_scale is None else (x_scale.contiguous(), weight_scale.contiguous())
    operands = x, scales[0], weight, scales[1]
    strides = *x.stride()[:2], weight.stride(0)
    constants = {
        "DTYPE": TRITON_TYPES[dtype], "D": D, "EVEN_K": K % tile.k == 0, "PROMOTE": promote(x.dtype, tile.k),
        "BLOCK_T": tile.m, "BLOCK_C": tile.n, "BLOCK_K": tile.k, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    parts = _empty_state(triton.cdiv(N, chunk), B, C // D, D, x.device)
    launch(projected_state_kernel, (groups, len(parts), B), *operands, parts, B, N, K, C, chunk, *strides, **constants)
    out = torch.empty((B, N, C // D, D), dtype=dtype, device=x.device)
    launch(
        projected_apply_kernel, (groups, triton.cdiv(N, tile.m), B), *operands, _sum(parts), out, N, K, C, *strides, eps,
        **constants,
    )  # fmt: skip
    return out


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """(B, N, H, D) → (B, N) fp32."""
    B, N, H, D = x.shape
    out = torch.empty((B, N), dtype=torch.float32, device=x.device)
    block, warps = row_tile(H * D)
    launch(inverse_rms_kernel, (B * N,), x, out, N, H * D, D, *x.stride()[:3], eps, BLOCK_C=block, num_warps=warps)
    return out


def _empty_state(chunks: int, B: int, H: int, D: int, device: torch.device) -> Tensor:
    return torch.empty((chunks, B, H, D + 1, D), dtype=torch.float32, device=device)


def _sum(parts: Tensor) -> Tensor:
    """(chunks, B, H, D + 1, D) → (1, B, H, D + 1, D)"""
    if len(parts) == 1:
        return parts
    out = torch.empty((1, *parts.shape[1:]), dtype=torch.float32, device=parts.device)
    launch(sum_kernel, (triton.cdiv(out.numel(), 1024),), parts, out, len(parts), out.numel(), BLOCK=1024, num_warps=4)
    return out
