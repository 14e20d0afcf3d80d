"""SANA's Mix-FFN: a gated feed-forward network with a depthwise 3×3 convolution in the middle."""

from torch import Tensor

from sana_kernels.backend import register, resolve
from sana_kernels.mix_ffn import reference


def mix_ffn(
    x: Tensor,
    height: int,
    width: int,
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """(a · SiLU(g)) W₂ᵀ with [a, g] = depthwise3×3(SiLU(x W₁ᵀ + b₁)) (arXiv 2410.10629, section 2.2).

    x: (B, N, C), N = height · width tokens in row-major order. expand_weight (2F, C), expand_bias (2F,), depthwise_weight
    (2F, 1, 3, 3), depthwise_bias (2F,), project_weight (C, F). One floating dtype and device. Returns (B, N, C).
    Raises ValueError or TypeError for arguments that no backend takes, BackendUnavailable where `backend` cannot run.
    """
    args = (x, height, width, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight)
    _check(*args)
    return resolve("mix_ffn", backend, *args).run(*args)


def _check(x: Tensor, height: int, width: int, *weights: Tensor) -> None:
    if x.ndim != 3 or x.shape[0] == 0 or x.shape[1] != height * width or height < 1 or width < 1:
        raise ValueError(
            f"mix_ffn takes x of shape (B, height · width, C); got {tuple(x.shape)} with a grid of {height} × {width}"
        )
    C, F = x.shape[2], weights[-1].shape[-1]
    expected = ((2 * F, C), (2 * F,), (2 * F, 1, 3, 3), (2 * F,), (C, F))
    if tuple(tuple(w.shape) for w in weights) != expected:
        raise ValueError(
            "mix_ffn takes weights of shapes (2F, C), (2F,), (2F, 1, 3, 3), (2F,), (C, F), here"
            f" {', '.join(map(str, expected))}; got {', '.join(str(tuple(w.shape)) for w in weights)}"
        )
    if not x.is_floating_point() or any(w.dtype != x.dtype for w in weights):
        raise TypeError(f"mix_ffn takes one floating dtype; got {', '.join(str(t.dtype) for t in (x, *weights))}")
    if any(w.device != x.device for w in weights):
        raise ValueError(f"mix_ffn takes tensors on one device; got {', '.join(str(t.device) for t in (x, *weights))}")


register("mix_ffn", "reference", reference.mix_ffn)
