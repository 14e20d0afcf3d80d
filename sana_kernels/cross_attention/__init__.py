"""Softmax attention of the image tokens to the caption."""

import torch
from torch import Tensor

from sana_kernels.backend import define, register
from sana_kernels.cross_attention import cpu, library, reference
from sana_kernels.gemm import Quantized, call_for_rows, fake_quantize


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    quantize: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | Quantized:
    """softmax(q kᵀ / √D) v per image and head, over the first lengths[b] of L text tokens.

    q: (B, N, H, D); k, v: (B, L, H, D); one floating dtype and device, any strides. lengths: (B,) integers from 1 to L, for
    the CPU best left there, or None for all L. Returns (B, N, H, D), contiguous, in q's dtype; with `quantize` (torch.int8
    or torch.float8_e4m3fn) the rows of that, (B, N, H·D), `Quantized` for the next matrix product.
    Raises ValueError or TypeError for arguments that no backend takes, BackendUnavailable where `backend` cannot run.
    """
    _check(q, k, v, lengths)
    return call_for_rows("cross_attention", backend, (q, k, v, lengths), quantize)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            "cross_attention takes q (B, N, H, D) and k, v (B, L, H, D);"
            f" got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(
            f"cross_attention needs at least one token on both sides; got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    if not (q.is_floating_point() and q.dtype == k.dtype == v.dtype):
        raise TypeError(f"cross_attention takes q, k and v of one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"cross_attention takes q, k and v on one device; got {q.device}, {k.device} and {v.device}")
    if lengths is None:
        return
    if lengths.shape != (q.shape[0],) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"cross_attention takes lengths as ({q.shape[0]},) integers; got {tuple(lengths.shape)} of {lengths.dtype}"
        )
    # A GPU's lengths stay unread: looking at them would stall it in every block.
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        values = lengths.tolist()
        if min(values) < 1 or max(values) > k.shape[1]:
            raise ValueError(f"cross_attention takes lengths from 1 to L = {k.shape[1]}; got {values}")


register("cross_attention", "reference", reference.cross_attention)
register("cross_attention", "library", library.cross_attention, device="cuda", accepts=library.accepts)
register("cross_attention", "cpu", cpu.cross_attention, device="cpu", accepts=cpu.accepts)
define(
    "cross_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? lengths",
    lambda q, k, v, lengths, backend: q.new_empty(q.shape),
)

register("cross_attention_quantized", "reference", reference.cross_attention_quantized)
register("cross_attention_quantized", "cpu", cpu.cross_attention_quantized, device="cpu", accepts=cpu.accepts_quantized)
define(
    "cross_attention_quantized",
    "Tensor q, Tensor k, Tensor v, Tensor? lengths, ScalarType dtype",
    lambda q, k, v, lengths, dtype, backend: fake_quantize(q.flatten(2), dtype, backend),
    returns="(Tensor, Tensor)",
)
