"""Matrix products with 4-bit weights, and the 4-bit rows that SVDQuant makes of activations."""

import torch
from torch import Tensor

from sana_kernels.backend import call, define, register
from sana_kernels.gemm import int4_cpu, int4_cuda, int4_reference
from sana_kernels.quant import formats
from sana_kernels.quant.formats import GROUP, Int4


def quantize_int4(x: Tensor, smooth: Tensor | None = None, *, backend: str = "auto") -> Int4:
    """Rows of x (..., K), divided by smooth (K,) where given, as int4 in groups of 64 along K.

    x is floating, finite and contiguous in its last dimension. sana_kernels/quant/formats.py states the arithmetic to the
    bit. Raises ValueError or TypeError for arguments that no backend takes, BackendUnavailable where `backend` cannot run.
    """
    if not x.is_floating_point() or (smooth is not None and not smooth.is_floating_point()):
        raise TypeError(
            f"quantize_int4 takes floating dtypes; got {x.dtype} and {None if smooth is None else smooth.dtype}"
        )
    if x.ndim < 1 or 0 in x.shape or x.stride(-1) != 1:
        raise ValueError(f"quantize_int4 takes rows of at least one value, with last stride 1; got {tuple(x.shape)}")
    if smooth is not None and (smooth.shape != x.shape[-1:] or smooth.device != x.device):
        raise ValueError(
            f"quantize_int4 takes smooth of shape ({x.shape[-1]},) on {x.device}; got {tuple(smooth.shape)} on"
            f" {smooth.device}"
        )
    return Int4(*call("quantize_int4", backend, x, smooth))


def gemm_w4a16(
    x: Tensor,
    weight: Int4,
    bias: Tensor | None = None,
    *,
    silu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """residual + gate · SiLU(x weightᵀ + bias), each part where asked for, of 4-bit weights that are dequantised exactly.

    x: (B, M, K), floating; weight: (N, K) as `formats.quantize_int4` makes it, in groups of 64 or a multiple. The rest, the
    result and errors as `gemm`; dtype is by default residual's, else x's.
    """
    if not x.is_floating_point() or x.ndim != 3 or 0 in x.shape or x.stride(-1) != 1:
        raise ValueError(f"gemm_w4a16 takes a floating x (B, M, K), last stride 1; got {x.dtype} {tuple(x.shape)}")
    group = _check_rows("gemm_w4a16", weight, x.shape[2], x.device)
    _check_matrix("gemm_w4a16", weight)
    if group % GROUP:
        raise ValueError(f"gemm_w4a16 takes groups of a multiple of {GROUP} values; got {group}")
    _check_epilogue("gemm_w4a16", x, weight.values.shape[0], bias, gate, residual)
    dtype = dtype or (x.dtype if residual is None else residual.dtype)
    return call("gemm_w4a16", backend, x, *weight, bias, silu, gate, residual, dtype)


def gemm_w4a4(
    x: Int4,
    weight: Int4,
    bias: Tensor | None = None,
    *,
    low: Tensor | None = None,
    up: Tensor | None = None,
    silu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """residual + gate · SiLU(x weightᵀ + low upᵀ + bias), each part where asked for: SVDQuant (arXiv 2411.05007).

    x: (B, M, K) and weight: (N, K) as int4 in groups of 64. low: (B, M, r), the unquantised activations times downᵀ, and
    up: (N, r), of one 16-bit dtype: both or neither. The rest, the result and errors as `gemm`; dtype is by default
    residual's, else low's, else bf16. Fast on sm_80, 86 and 89: later GPUs emulate 4-bit products, and are better served by
    `gemm` with `formats.int4_to_int8` of the weight.
    """
    K = 2 * x.values.shape[-1]
    if x.values.ndim != 3 or 0 in x.values.shape or _check_rows("gemm_w4a4", x, K, x.values.device) != GROUP:
        raise ValueError(f"gemm_w4a4 takes x (B, M, K) in groups of {GROUP}; got {[tuple(t.shape) for t in x]}")
    if _check_rows("gemm_w4a4", weight, K, x.values.device) != GROUP:
        raise ValueError(f"gemm_w4a4 takes weights in groups of {GROUP}; got {[tuple(t.shape) for t in weight]}")
    _check_matrix("gemm_w4a4", weight)
    (B, M), N = x.values.shape[:2], weight.values.shape[0]
    if (low is None) != (up is None):
        raise ValueError("gemm_w4a4 takes low and up together")
    if low is not None and (low.shape[:2] != (B, M) or up.shape != (N, low.shape[-1]) or low.dtype != up.dtype):
        raise ValueError(
            f"gemm_w4a4 takes low ({B}, {M}, r) and up ({N}, r) in one dtype; got {tuple(low.shape)} {low.dtype} and"
            f" {tuple(up.shape)} {up.dtype}"
        )
    _check_epilogue("gemm_w4a4", x.values, N, bias, gate, residual)
    if dtype is None:
        dtype = residual.dtype if residual is not None else torch.bfloat16 if low is None else low.dtype
    return call("gemm_w4a4", backend, *x, *weight, low, up, bias, silu, gate, residual, dtype)


def _check_matrix(op: str, weight: Int4) -> None:
    if weight.values.ndim != 2 or 0 in weight.values.shape:
        raise ValueError(f"{op} takes a weight (N, K), neither of them 0; got values {tuple(weight.values.shape)}")


def _check_rows(op: str, rows: Int4, K: int, device: torch.device) -> int:
    """The group size of 4-bit rows that hold K values each."""
    values, scale = rows
    if values.device != device or scale.device != device:
        raise ValueError(f"{op} takes tensors on one device; got {device}, {values.device} and {scale.device}")
    if values.ndim < 1 or scale.ndim != values.ndim:
        raise ValueError(f"{op} takes int4 rows and a scale per group of them; got {[tuple(t.shape) for t in rows]}")
    group = 2 * values.shape[-1] // max(scale.shape[-1], 1)
    padded = -(-K // group) * group if group else 0
    if values.dtype != torch.uint8 or scale.dtype != torch.float32:
        raise TypeError(f"{op} takes int4 rows as uint8 with float32 scales; got {values.dtype} and {scale.dtype}")
    if values.shape[:-1] != scale.shape[:-1] or 2 * values.shape[-1] != padded or scale.shape[-1] * group != padded:
        raise ValueError(
            f"{op} takes rows of {K} 4-bit values, padded to whole groups; got values {tuple(values.shape)} and scale"
            f" {tuple(scale.shape)}"
        )
    return group


def _check_epilogue(
    op: str, x: Tensor, N: int, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None
) -> None:
    B, M = x.shape[:2]
    if gate is not None and residual is None:
        raise ValueError(f"{op} takes a gate only beside a residual")
    for name, tensor, shape in (("bias", bias, (N,)), ("gate", gate, (B, N)), ("residual", residual, (B, M, N))):
        if tensor is None:
            continue
        if (
            tensor.shape != shape
            or tensor.device != x.device
            or not tensor.is_floating_point()
            or tensor.stride(-1) != 1
        ):
            raise ValueError(
                f"{op} takes {name} of shape {shape} on {x.device}, floating, last stride 1; got {tensor.dtype}"
                f" {tuple(tensor.shape)} on {tensor.device}"
            )


def _fake_quantize(x, smooth, backend):
    groups = -(-x.shape[-1] // GROUP)
    values = x.new_empty((*x.shape[:-1], groups * GROUP // 2), dtype=torch.uint8)
    return values, x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


def _fake_gemm(x, *args):
    weight, dtype = next(t for t in args if t is not None and t.ndim == 2), args[-2]
    return x.new_empty((*x.shape[:2], weight.shape[0]), dtype=dtype)


register("quantize_int4", "reference", formats.quantize_int4)
register("quantize_int4", "cuda", int4_cuda.quantize_int4, device="cuda", accepts=int4_cuda.accepts_quantize)
define("quantize_int4", "Tensor x, Tensor? smooth", _fake_quantize, returns="(Tensor, Tensor)")

register("gemm_w4a16", "reference", int4_reference.gemm_w4a16)
register("gemm_w4a16", "cpu", int4_cpu.gemm_w4a16, device="cpu", accepts=int4_cpu.accepts_w4a16)
register("gemm_w4a16", "cuda", int4_cuda.gemm_w4a16, device="cuda", accepts=int4_cuda.accepts_w4a16)
define(
    "gemm_w4a16",
    "Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, bool silu, Tensor? gate, Tensor? residual,"
    " ScalarType dtype",
    _fake_gemm,
)

register("gemm_w4a4", "reference", int4_reference.gemm_w4a4)
register("gemm_w4a4", "cuda", int4_cuda.gemm_w4a4, device="cuda", accepts=int4_cuda.accepts_w4a4)
define(
    "gemm_w4a4",
    "Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? low, Tensor? up, Tensor? bias, bool silu,"
    " Tensor? gate, Tensor? residual, ScalarType dtype",
    _fake_gemm,
)
