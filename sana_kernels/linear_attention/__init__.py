"""ReLU linear attention, the self-attention of SANA's DiT and of the DC-AE autoencoder."""

import torch
from torch import Tensor

from sana_kernels import triton_ops
from sana_kernels.backend import DTYPE_CODES, call, define, register
from sana_kernels.gemm import Quantized, call_for_rows, fake_quantize, inputs, outputs, parts
from sana_kernels.gemm.cpu import only_int8
from sana_kernels.linear_attention import cpu, cuda, reference


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-5,
    eps: float = 1e-15,
    quantize: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | Quantized:
    """o = relu(q) (relu(k)ᵀ v) / (relu(q) · Σ relu(k) + eps) per image and head (arXiv 2410.10629, section 2.2).

    q, k, v: (B, N, H, D) of one floating dtype and device, with any strides but the last, which is 1: pass a packed
    projection as views, `qkv.view(B, N, 3, H, D).unbind(2)` in the DiT, `qkv.view(B, N, H, 3, D).unbind(3)` in the DC-AE.
    q_norm, k_norm: (H·D,) weights of an RMSNorm of each token over all heads, before the ReLU, or None.
    Returns (B, N, H, D), contiguous, in q's dtype; sums are fp32. With `quantize` (torch.int8 or torch.float8_e4m3fn) the
    rows of that, (B, N, H·D), `Quantized` for the next matrix product. `reference.py` states the arithmetic.
    Raises ValueError or TypeError for arguments that no backend takes, BackendUnavailable where `backend` cannot run.
    """
    _check(q, k, v, q_norm, k_norm)
    return call_for_rows("linear_attention", backend, (q, k, v, q_norm, k_norm, norm_eps, eps), quantize)


def linear_attention_from(
    x: Tensor | Quantized,
    weight: Tensor | Quantized,
    *,
    head_dim: int = 32,
    eps: float = 1e-15,
    backend: str = "auto",
) -> Tensor:
    """`linear_attention` of q, k, v = x weightᵀ, which a kernel need not write to memory; without qk-norm.

    x: (B, N, K), last stride 1; weight: (3 · H · head_dim, K), the rows of q, then of k, then of v. Both of one floating
    dtype and device, or both `Quantized` in one dtype. Returns (B, N, H, head_dim), contiguous, in x's dtype or bf16.
    Raises ValueError or TypeError for arguments that no backend takes, BackendUnavailable where `backend` cannot run.
    """
    (x, x_scale), (weight, weight_scale) = parts(x), parts(weight)
    _check_from(x, x_scale, weight, weight_scale, head_dim)
    return call("linear_attention_from", backend, x, x_scale, weight, weight_scale, head_dim, eps)


def _check_from(x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor | None, head_dim: int) -> None:
    if x.ndim != 3 or 0 in x.shape or x.stride(2) != 1 or weight.ndim != 2 or x.shape[2] != inputs(weight):
        raise ValueError(
            "linear_attention_from takes x (B, N, K), none of them 0 and last stride 1, and weight (3 · H · head_dim, K);"
            f" got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if head_dim < 1 or outputs(weight) % (3 * head_dim):
        raise ValueError(
            f"linear_attention_from takes a weight of 3 · H · {head_dim} rows, for q, k and v; got {outputs(weight)}"
        )
    if x.dtype != weight.dtype or (x_scale is None) != (weight_scale is None):
        raise TypeError(
            "linear_attention_from takes x and weight in one dtype, both quantised or neither;"
            f" got {x.dtype} and {weight.dtype}"
        )
    if x_scale is None and not x.is_floating_point():
        raise TypeError(f"linear_attention_from takes floating or quantised operands; got {x.dtype} without scales")
    for name, scale, shape in (("x", x_scale, x.shape[:2]), ("weight", weight_scale, (outputs(weight),))):
        if scale is not None and (scale.shape != shape or not scale.is_floating_point()):
            raise ValueError(
                f"linear_attention_from takes {name}'s scale as {tuple(shape)}, floating; got {tuple(scale.shape)} of"
                f" {scale.dtype}"
            )
    if any(t is not None and t.device != x.device for t in (x_scale, weight, weight_scale)):
        raise ValueError("linear_attention_from takes tensors on one device")


def _check(q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> None:
    shape = q.shape
    if len(shape) != 4 or k.shape != shape or v.shape != shape:
        raise ValueError(
            "linear_attention takes q, k and v of one shape (B, N, H, D);"
            f" got {tuple(shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if 0 in shape:
        raise ValueError(f"linear_attention needs at least one image, token, head and channel; got {tuple(shape)}")
    if not (q.is_floating_point() and q.dtype == k.dtype == v.dtype):
        raise TypeError(f"linear_attention takes q, k and v of one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"linear_attention takes tensors on one device; got {q.device}, {k.device} and {v.device}")
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        raise ValueError(
            "linear_attention takes q, k and v with contiguous channels (last stride 1); call .contiguous()"
        )
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is None:
            continue
        if weight.shape != (shape[2] * shape[3],) or weight.device != q.device:
            raise ValueError(
                f"linear_attention takes {name} of shape ({shape[2] * shape[3]},) on {q.device};"
                f" got {tuple(weight.shape)} on {weight.device}"
            )


def _accepts(q, k, v, q_norm, k_norm, norm_eps, eps) -> str | None:
    """What the C++ kernels, CPU and CUDA, can do."""
    if q.dtype not in DTYPE_CODES:
        return f"it computes in float32, bfloat16 and float16, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"it supports head dims that are multiples of 8 up to 128, not {q.shape[3]}"
    for weight in (q_norm, k_norm):
        if weight is not None and (weight.dtype not in (q.dtype, torch.float32) or weight.stride(0) != 1):
            return f"it takes contiguous q_norm and k_norm in {q.dtype} or float32, not {weight.dtype}"
    return None


def _accepts_quantized(*args) -> str | None:
    return _accepts(*args[:-1]) or only_int8(args[-1])


def _fake(q, k, v, q_norm, k_norm, norm_eps, eps, backend):
    return q.new_empty(q.shape)


register("linear_attention", "reference", reference.linear_attention)
triton_ops.register("linear_attention", "linear_attention", triton_ops.accepts_heads)
register("linear_attention", "cuda", cuda.linear_attention, device="cuda", accepts=_accepts)
register("linear_attention", "cpu", cpu.linear_attention, device="cpu", accepts=_accepts)
define(
    "linear_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, float norm_eps, float eps",
    _fake,
)

register("linear_attention_quantized", "reference", reference.linear_attention_quantized)
register("linear_attention_quantized", "cpu", cpu.linear_attention_quantized, device="cpu", accepts=_accepts_quantized)
define(
    "linear_attention_quantized",
    "Tensor q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, float norm_eps, float eps, ScalarType dtype",
    lambda q, k, v, q_norm, k_norm, norm_eps, eps, dtype, backend: fake_quantize(q.flatten(2), dtype, backend),
    returns="(Tensor, Tensor)",
)


def _fake_from(x, x_scale, weight, weight_scale, head_dim, eps, backend):
    shape = (*x.shape[:2], outputs(weight) // 3 // head_dim, head_dim)
    return x.new_empty(shape, dtype=x.dtype if x_scale is None else torch.bfloat16)


register("linear_attention_from", "reference", reference.linear_attention_from)
triton_ops.register("linear_attention_from", "linear_attention", triton_ops.accepts_from)
define(
    "linear_attention_from",
    "Tensor x, Tensor? x_scale, Tensor weight, Tensor? weight_scale, int head_dim, float eps",
    _fake_from,
)
