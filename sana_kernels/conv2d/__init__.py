"""What stands around the convolutions of the DC-AE decoder, which are the library's: norm, activation, upsampling."""

import torch
from torch import Tensor

from sana_kernels.backend import call, define, register
from sana_kernels.conv2d import cuda, reference
from sana_kernels.conv2d.reference import ACTIVATIONS, fold_upsample

__all__ = ["fold_upsample", "rms_norm", "upsample"]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """activation(x / RMS(x) · weight + bias) + residual, over the channels of each pixel (arXiv 1910.07467).

    x, residual: (B, H, W, C), contiguous; weight, bias: (C,); all of one floating dtype and device. activation: "none",
    "silu" or "relu". Returns (B, H, W, C), contiguous. `reference.py` states the arithmetic.
    Raises ValueError or TypeError for arguments that no backend takes, BackendUnavailable where `backend` cannot run.
    """
    if x.ndim != 4 or 0 in x.shape or weight.shape != x.shape[3:] or bias.shape != x.shape[3:]:
        raise ValueError(
            f"rms_norm takes x (B, H, W, C), none of them 0, weight and bias (C,); got {tuple(x.shape)},"
            f" {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm takes a residual of x's shape {tuple(x.shape)}; got {tuple(residual.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"rms_norm knows the activations {', '.join(ACTIVATIONS)}; got {activation!r}")
    _check("rms_norm", *(t for t in (x, weight, bias, residual) if t is not None))
    return call("rms_norm", backend, x, weight, bias, residual, activation, eps)


def upsample(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """conv3×3(nearest ×2 of x) + the shortcut that moves channels into pixels (arXiv 2410.10733, section 3.2).

    x: (B, H, W, in), contiguous; weight: (4 · out, in, 2, 2), what `fold_upsample` makes of a 3 × 3 kernel (out, in, 3, 3);
    bias: (out,); `in` divides 4 · out. Returns (B, 2H, 2W, out), contiguous, in x's dtype. Errors as `rms_norm`.
    """
    if x.ndim != 4 or 0 in x.shape or weight.shape[1:] != (x.shape[3], 2, 2) or weight.shape[0] % x.shape[3]:
        raise ValueError(
            "upsample takes x (B, H, W, in) and a folded weight (4 · out, in, 2, 2), 4 · out a multiple of in;"
            f" got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] % 4 or bias.shape != (weight.shape[0] // 4,):
        raise ValueError(f"upsample takes a bias of (out,); got {tuple(bias.shape)} with weight {tuple(weight.shape)}")
    _check("upsample", x, bias, like=(weight,))
    return call("upsample", backend, x, weight, bias)


def _check(op: str, x: Tensor, *rest: Tensor, like: tuple[Tensor, ...] = ()) -> None:
    """One floating dtype, one device; x and `rest` contiguous."""
    for tensor in (x, *rest, *like):
        if not tensor.is_floating_point() or tensor.dtype != x.dtype or tensor.device != x.device:
            raise TypeError(
                f"{op} takes one floating dtype and device; got {x.dtype} on {x.device} and {tensor.dtype} on"
                f" {tensor.device}"
            )
    if not all(tensor.is_contiguous() for tensor in (x, *rest)):
        raise ValueError(f"{op} takes contiguous tensors, NHWC; call .contiguous()")


def _fake_upsample(x, weight, bias, backend):
    B, H, W, _ = x.shape
    return x.new_empty(B, 2 * H, 2 * W, weight.shape[0] // 4)


register("rms_norm", "reference", reference.rms_norm)
register("rms_norm", "cuda", cuda.rms_norm, device="cuda", accepts=cuda.accepts_rms_norm)
define(
    "rms_norm",
    "Tensor x, Tensor weight, Tensor bias, Tensor? residual, str activation, float eps",
    lambda x, *args: torch.empty_like(x),
)

register("upsample", "reference", reference.upsample)
register("upsample", "cuda", cuda.upsample, device="cuda", accepts=cuda.accepts_upsample)
define("upsample", "Tensor x, Tensor weight, Tensor bias", _fake_upsample)
