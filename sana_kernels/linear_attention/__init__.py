"""ReLU linear attention, the self-attention of SANA's DiT and of the DC-AE autoencoder."""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, call, define, register
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
    backend: str = "auto",
) -> Tensor:
    """o = relu(q) (relu(k)ᵀ v) / (relu(q) · Σ relu(k) + eps) per image and head (arXiv 2410.10629, section 2.2).

    q, k, v: (B, N, H, D) of one floating dtype and device, with any strides but the last, which is 1: pass a packed
    projection as views, `qkv.view(B, N, 3, H, D).unbind(2)` in the DiT, `qkv.view(B, N, H, 3, D).unbind(3)` in the DC-AE.
    q_norm, k_norm: (H·D,) weights of an RMSNorm of each token over all heads, before the ReLU, or None.
    Returns (B, N, H, D), contiguous, in q's dtype; sums are fp32. `reference.py` states the arithmetic.
    Raises ValueError or TypeError for arguments that no backend takes, BackendUnavailable where `backend` cannot run.
    """
    _check(q, k, v, q_norm, k_norm)
    return call("linear_attention", backend, q, k, v, q_norm, k_norm, norm_eps, eps)


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


def _fake(q, k, v, q_norm, k_norm, norm_eps, eps, backend):
    return q.new_empty(q.shape)


register("linear_attention", "reference", reference.linear_attention)
register("linear_attention", "cuda", cuda.linear_attention, device="cuda", accepts=_accepts)
register("linear_attention", "cpu", cpu.linear_attention, device="cpu", accepts=_accepts)
define(
    "linear_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, float norm_eps, float eps",
    _fake,
)
