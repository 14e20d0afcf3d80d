"""SANA's Mix-FFN: a gated feed-forward network with a depthwise 3×3 convolution in the middle."""

import torch
from torch import Tensor

from sana_kernels import triton_ops
from sana_kernels.backend import call, define, register
from sana_kernels.gemm import Quantized, call_for_rows, check_weight, fake_quantize, inputs, outputs, parts
from sana_kernels.gemm.reference import STEP
from sana_kernels.mix_ffn import cpu, cuda, reference


def mix_ffn(
    x: Tensor | Quantized,
    height: int,
    width: int,
    expand_weight: Tensor | Quantized,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor | Quantized,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """residual + gate · (a · SiLU(g)) W₂ᵀ with [a, g] = depthwise3×3(SiLU(x W₁ᵀ + b₁)) (arXiv 2410.10629, section 2.2).

    x: (B, N, C), N = height · width tokens in row-major order. expand_weight (2F, C), expand_bias (2F,), depthwise_weight
    (2F, 1, 3, 3), depthwise_bias (2F,), project_weight (C, F). x and both matrices have one floating dtype, which the rest
    share, or are `Quantized` in one dtype, and the rest is bf16; biases and depthwise_weight may be fp32 in any case. The
    matrices may be packed (`pack`). gate (B, C) and residual
    (B, N, C): both or neither. Returns (B, N, C) in residual's dtype, else x's, else bf16.
    Raises ValueError or TypeError for arguments that no backend takes, BackendUnavailable where `backend` cannot run.
    """
    (x, x_scale), (expand_weight, expand_scale) = parts(x), parts(expand_weight)
    project_weight, project_scale = parts(project_weight)
    args = (
        x, x_scale, height, width, expand_weight, expand_scale, expand_bias, depthwise_weight, depthwise_bias,
        project_weight, project_scale, gate, residual,
    )  # fmt: skip
    _check(*args)
    return call("mix_ffn", backend, *args)


def depthwise_glu(
    h: Tensor,
    height: int,
    width: int,
    weight: Tensor,
    bias: Tensor,
    *,
    quantize: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | Quantized:
    """a · SiLU(g) with [a, g] = depthwise3×3(h) + bias: what lies between the two matrix products of `mix_ffn`.

    h: (B, N = height · width, 2F), contiguous; weight (2F, 1, 3, 3) and bias (2F,) in h's dtype or fp32. Returns (B, N, F)
    in h's dtype; with `quantize` (torch.int8 or torch.float8_e4m3fn) the same rows `Quantized`. Errors as `mix_ffn`.
    """
    _check_grid("depthwise_glu", h, height, width)
    channels = h.shape[2]
    if channels % 2 or weight.shape != (channels, 1, 3, 3) or bias.shape != (channels,):
        raise ValueError(
            f"depthwise_glu takes h (B, N, 2F), weight (2F, 1, 3, 3) and bias (2F,); got {tuple(h.shape)},"
            f" {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if not h.is_floating_point() or any(w.dtype not in (h.dtype, torch.float32) for w in (weight, bias)):
        raise TypeError(
            f"depthwise_glu takes h of a floating dtype, weight and bias in it or in float32; got {h.dtype},"
            f" {weight.dtype} and {bias.dtype}"
        )
    if not (h.device == weight.device == bias.device and h.is_contiguous()):
        raise ValueError("depthwise_glu takes a contiguous h, and all tensors on one device")
    return call_for_rows("depthwise_glu", backend, (h, height, width, weight, bias), quantize)


def taps_first(weight: Tensor) -> Tensor:
    """The same (2F, 1, 3, 3) weight, in memory tap by tap: how the GPU kernels read it fastest, whole lines at a time."""
    return weight.flatten(1).t().contiguous().t().view(weight.shape)


def _check_grid(op: str, x: Tensor, height: int, width: int) -> None:
    if x.ndim != 3 or 0 in x.shape or x.shape[1] != height * width or height < 1 or width < 1:
        raise ValueError(
            f"{op} takes rows of shape (B, height · width, C); got {tuple(x.shape)} with a grid of {height} × {width}"
        )


def _check(
    x, x_scale, height, width, expand_weight, expand_scale, expand_bias, depthwise_weight, depthwise_bias,
    project_weight, project_scale, gate, residual,
) -> None:  # fmt: skip
    _check_grid("mix_ffn", x, height, width)
    for weight in (expand_weight, project_weight):
        check_weight("mix_ffn", weight)
    if any(t is not None and t.stride(-1) != 1 for t in (x, residual, gate)):
        raise ValueError("mix_ffn takes tensors with contiguous channels (last stride 1); call .contiguous()")
    B, N = x.shape[:2]
    C, F = outputs(project_weight), outputs(expand_weight) // 2
    padded = [C, F] if x_scale is None else [-(-size // STEP) * STEP for size in (C, F)]
    given = {
        "x": (x.shape, (B, N, padded[0])),
        "expand_weight": ((outputs(expand_weight), inputs(expand_weight)), (2 * F, padded[0])),
        "expand_bias": (expand_bias.shape, (2 * F,)),
        "depthwise_weight": (depthwise_weight.shape, (2 * F, 1, 3, 3)),
        "depthwise_bias": (depthwise_bias.shape, (2 * F,)),
        "project_weight": ((outputs(project_weight), inputs(project_weight)), (C, padded[1])),
        "gate": ((B, C) if gate is None else gate.shape, (B, C)),
        "residual": ((B, N, C) if residual is None else residual.shape, (B, N, C)),
        "x's scale": ((B, N) if x_scale is None else x_scale.shape, (B, N)),
        "expand_weight's scale": ((2 * F,) if expand_scale is None else expand_scale.shape, (2 * F,)),
        "project_weight's scale": ((C,) if project_scale is None else project_scale.shape, (C,)),
    }
    for name, (shape, expected) in given.items():
        if tuple(shape) != expected:
            raise ValueError(f"mix_ffn with C = {C} and F = {F} takes {name} as {expected}; got {tuple(shape)}")
    if (gate is None) != (residual is None):
        raise ValueError("mix_ffn takes gate and residual together")
    eight_bit = x_scale is not None
    if eight_bit != (expand_scale is not None) or eight_bit != (project_scale is not None):
        raise TypeError("mix_ffn takes x, expand_weight and project_weight all quantised or none of them")
    matrices, others = (x, expand_weight, project_weight), (expand_bias, depthwise_weight, depthwise_bias)
    allowed = (torch.bfloat16 if eight_bit else x.dtype, torch.float32)
    if any(t.dtype != x.dtype for t in matrices) or any(t.dtype not in allowed for t in others):
        raise TypeError(
            "mix_ffn takes one floating dtype, or one of 8 bits with bf16 for the rest, which may also be float32;"
            f" got {', '.join(str(t.dtype) for t in (*matrices, *others))}"
        )
    scales = tuple(t for t in (x_scale, expand_scale, project_scale) if t is not None)
    if not all(t.is_floating_point() for t in scales):
        raise TypeError(f"mix_ffn takes scales in a floating dtype; got {', '.join(str(t.dtype) for t in scales)}")
    if any(t is not None and t.device != x.device for t in (*matrices, *others, *scales, gate, residual)):
        raise ValueError("mix_ffn takes tensors on one device")


def _rows_only(
    x, x_scale, height, width, expand_weight, expand_scale, expand_bias, weight, bias, project_weight, *rest
):
    packed = expand_weight.ndim != 2 or project_weight.ndim != 2
    return "it takes weights as rows (N, K), not packed" if packed else None


def _fake(x, x_scale, height, width, *rest):
    *_, project_weight, _, _, residual, _ = rest
    dtype = residual.dtype if residual is not None else x.dtype if x_scale is None else torch.bfloat16
    return x.new_empty((*x.shape[:2], outputs(project_weight)), dtype=dtype)


def _fake_glu(h, *args):
    return h.new_empty((*h.shape[:2], h.shape[2] // 2))


def _fake_glu_quantized(h, height, width, weight, bias, dtype, backend):
    return fake_quantize(_fake_glu(h), dtype, backend)


register("depthwise_glu", "reference", reference.depthwise_glu)
triton_ops.register("depthwise_glu", "mix_ffn", triton_ops.accepts_glu)
register("depthwise_glu", "cuda", cuda.depthwise_glu, device="cuda", accepts=cuda.accepts)
register("depthwise_glu", "cpu", cpu.depthwise_glu, device="cpu", accepts=cpu.accepts_depthwise_glu)
define("depthwise_glu", "Tensor h, int height, int width, Tensor weight, Tensor bias", _fake_glu)

register("depthwise_glu_quantized", "reference", reference.depthwise_glu_quantized)
triton_ops.register("depthwise_glu_quantized", "mix_ffn", triton_ops.accepts_glu)
register("depthwise_glu_quantized", "cuda", cuda.depthwise_glu_quantized, device="cuda", accepts=cuda.accepts_quantized)
register(
    "depthwise_glu_quantized", "cpu", cpu.depthwise_glu_quantized, device="cpu",
    accepts=cpu.accepts_depthwise_glu_quantized,
)  # fmt: skip
define(
    "depthwise_glu_quantized",
    "Tensor h, int height, int width, Tensor weight, Tensor bias, ScalarType dtype",
    _fake_glu_quantized,
    returns="(Tensor, Tensor)",
)

register("mix_ffn", "reference", reference.mix_ffn, accepts=_rows_only)
register("mix_ffn", "cpu", cpu.mix_ffn, device="cpu", accepts=cpu.accepts_mix_ffn)
triton_ops.register("mix_ffn", "mix_ffn", triton_ops.accepts_ffn)
register("mix_ffn", "cuda", cuda.mix_ffn, device="cuda", accepts=cuda.accepts_mix_ffn)
define(
    "mix_ffn",
    "Tensor x, Tensor? x_scale, int height, int width, Tensor expand_weight, Tensor? expand_scale, Tensor expand_bias,"
    " Tensor depthwise_weight, Tensor depthwise_bias, Tensor project_weight, Tensor? project_scale, Tensor? gate,"
    " Tensor? residual",
    _fake,
)
