"""The convolutions of the DC-AE, with norm, activation, shortcut and upsampling around them, on NHWC activations."""

import torch
from torch import Tensor

from sana_kernels.backend import call, define, register
from sana_kernels.conv2d import cpu, cuda, reference
from sana_kernels.conv2d.cpu import WINOGRAD_CHANNELS, winograd_integers
from sana_kernels.conv2d.reference import ACTIVATIONS, TILE, Band, fold_upsample
from sana_kernels.conv2d.weights import (
    ConvWeight,
    as_weight,
    pack_conv2d,
    packed_shape,
    quantize_conv2d,
    upsampled_channels,
    winograd_conv2d,
    winograd_upsample,
)

__all__ = [
    "TILE", "WINOGRAD_CHANNELS", "Band", "ConvWeight", "Rows", "conv2d", "fold_upsample", "multi_scale", "pack_conv2d",
    "quantize_conv2d", "rms_norm", "upsample", "winograd_conv2d", "winograd_integers",
    "winograd_upsample",
]  # fmt: skip


Rows = Tensor | tuple[Tensor, Tensor]
"""Rows of images (B, rows, W, C), or in two pieces those of one: (1, rows above, W, C) and (1, rows, W, C)."""


def conv2d(
    x: Rows,
    weight: Tensor | ConvWeight,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    activation: str = "none",
    norm: tuple[Tensor, Tensor] | None = None,
    residual: Rows | None = None,
    input_norm: tuple[Tensor, Tensor] | None = None,
    input_activation: str = "none",
    eps: float = 1e-5,
    band: Band | None = None,
    backend: str = "auto",
) -> Tensor:
    """RMSNorm(activation(conv3×3(x) + bias)) + residual, zero-padded by one pixel; each part where asked for.

    x: (B, H, W, in), contiguous, or two pieces (`Rows`). weight: (out, in, 3, 3) in x's dtype, or from `quantize_conv2d`
    (W8A8) or `winograd_conv2d` (for a stride of 1), each perhaps through `pack_conv2d`. bias: (out,). stride: 1 or 2.
    norm: weight and bias (out,) of an RMSNorm over channels. residual: like the result, or two pieces. input_norm: weight
    and bias (in,); x becomes input_activation(RMSNorm(x)) first.
    activation, input_activation: "none", "silu" or "relu". band: rows to compute of an image of which x holds some; of a
    quantised weight it starts and ends at multiples of TILE[0] rows of the result, or with the image.
    Returns (B, ⌈H / stride⌉ or the band's rows, ⌈W / stride⌉, out), contiguous, in x's dtype. `reference.py` states the
    arithmetic. Raises ValueError or TypeError for arguments that no backend takes, BackendUnavailable where `backend`
    cannot run.
    """
    weight, (above, x) = as_weight(weight), _pieces("conv2d", "x", x)
    residual_above, residual = (None, None) if residual is None else _pieces("conv2d", "residual", residual)
    k = 6 if weight.transformed else 3
    if weight.transformed and weight.shape[-1] != k:
        raise ValueError("conv2d takes transformed kernels of winograd_conv2d, not those of winograd_upsample")
    if len(weight.shape) != 4 or weight.shape[1:] != (x.shape[3], k, k):
        raise ValueError(f"conv2d takes a weight (out, {x.shape[3]}, 3, 3) for x {tuple(x.shape)}; got {weight.shape}")
    if stride not in (1, 2) or (weight.transformed and stride == 2):
        strides = "1, of Winograd weights" if weight.transformed else "1 or 2"
        raise ValueError(f"conv2d takes a stride of {strides}; got {stride}")
    if input_norm is None and input_activation != "none":
        raise ValueError("conv2d takes an input activation only beside an input norm")
    for name in (activation, input_activation):
        _check_activation("conv2d", name)
    C, N = x.shape[3], weight.shape[0]
    for name, pair in (("norm", norm), ("input_norm", input_norm)):
        if pair is not None and not (isinstance(pair, tuple) and len(pair) == 2):
            raise ValueError(f"conv2d takes {name} as a tuple of its weight and bias")
    vectors = {"bias": (_given(bias), N), "norm": (norm or (), N), "input_norm": (input_norm or (), C)}
    for name, (given, size) in vectors.items():
        for tensor in given:
            if tensor.shape != (size,) or not tensor.is_floating_point():
                raise ValueError(f"conv2d takes {name} as floating ({size},); got {tensor.dtype} {tuple(tensor.shape)}")
    band = _check_band("conv2d", x, above, band, stride, weight)
    shape = (x.shape[0], band.last - band.first, -(-x.shape[2] // stride), N)
    if residual is not None and _whole_shape(residual, residual_above) != shape:
        raise ValueError(
            f"conv2d takes a residual {shape}, like its result; got {_whole_shape(residual, residual_above)}"
        )
    _check_weight("conv2d", x, weight, 1)
    rest = (bias, *(norm or ()), *(input_norm or ()))
    _check("conv2d", x, *_given(above, residual, residual_above), like=_given(*rest))
    norm, input_norm = norm or (None, None), input_norm or (None, None)
    return call(
        "conv2d", backend, x, *weight[:2], list(weight.shape), bias, stride, activation, *norm, residual, *input_norm,
        input_activation, eps, list(band), above, residual_above,
    )  # fmt: skip


def upsample(
    x: Rows, weight: Tensor | ConvWeight, bias: Tensor, *, band: Band | None = None, backend: str = "auto"
) -> Tensor:
    """conv3×3(nearest ×2 of x) + bias + the shortcut that moves channels into pixels (arXiv 2410.10733, section 3.2).

    x: (B, H, W, in), contiguous, or two pieces (`Rows`); weight: (4 · out, in, 2, 2), what `fold_upsample` makes of a
    kernel, in x's dtype, or from `quantize_conv2d` (W8A8), either perhaps through `pack_conv2d(weight, phases=4)`, or from
    `winograd_upsample`, of the kernel itself; bias: (out,); `in` divides 4 · out.
    A weight (4 · out, in, 3, 3) and bias (4 · out,), phase by phase, are conv3×3 and then a pixel shuffle.
    band: as `conv2d`, in rows of x, each of which makes two of the result.
    Returns (B, 2H, 2W, out), contiguous, in x's dtype. Errors as `conv2d`.
    """
    weight, (above, x) = as_weight(weight), _pieces("upsample", "x", x)
    shape, kernels = weight.shape, [(x.shape[3], k, k) for k in ((3,) if weight.transformed else (2, 3))]
    quadrupled = shape[0] * (4 if weight.transformed else 1)
    if weight.transformed and shape[-1] != 3:
        raise ValueError("upsample takes transformed kernels of winograd_upsample, not those of winograd_conv2d")
    if len(shape) != 4 or shape[1:] not in kernels or quadrupled % 4 or quadrupled % x.shape[3]:
        raise ValueError(
            "upsample takes x (B, H, W, in) and a folded weight (4 · out, in, 2, 2) or phases (4 · out, in, 3, 3), 4 · out"
            f" a multiple of in; got {tuple(x.shape)} and {tuple(shape)}"
        )
    biases = shape[0] if shape[2] == 3 else shape[0] // 4
    if bias.shape != (biases,):
        raise ValueError(
            f"upsample takes a bias of (out,), of (4 · out,) beside 3 × 3 phases: ({biases},); got {tuple(bias.shape)}"
        )
    band = _check_band("upsample", x, above, band, 1, weight)
    _check_weight("upsample", x, weight, 4)
    _check("upsample", x, *_given(above), like=(bias,))
    return call("upsample", backend, x, *weight[:2], list(shape), bias, list(band), above)


def multi_scale(
    x: Tensor, depthwise: Tensor, grouped: Tensor, *, band: Band | None = None, backend: str = "auto"
) -> Tensor:
    """grouped 1×1 (depthwise k×k (x)), zero-padded: the multi-scale branch of the DC-AE's attention (arXiv 2205.14756).

    x: (B, H, W, C), contiguous; depthwise: (C, 1, k, k), k odd; grouped: (C, D, 1, 1) in groups of D channels; all of one
    floating dtype. band: as `conv2d`. Returns (B, H or the band's rows, W, C), contiguous. Errors as `conv2d`.
    """
    _check_image("multi_scale", x)
    C, k = x.shape[3], depthwise.shape[-1]
    if depthwise.shape != (C, 1, k, k) or k % 2 == 0:
        raise ValueError(f"multi_scale takes a depthwise kernel ({C}, 1, k, k), k odd; got {tuple(depthwise.shape)}")
    if grouped.ndim != 4 or grouped.shape != (C, D := grouped.shape[1], 1, 1) or not D or C % D:
        raise ValueError(f"multi_scale takes grouped as ({C}, D, 1, 1), D a divisor; got {tuple(grouped.shape)}")
    band = _check_band("multi_scale", x, None, band, 1, None, reach=k // 2)
    _check("multi_scale", x, like=(depthwise, grouped))
    return call("multi_scale", backend, x, depthwise, grouped, list(band))


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
    _check_activation("rms_norm", activation)
    _check("rms_norm", *_given(x, weight, bias, residual))
    return call("rms_norm", backend, x, weight, bias, residual, activation, eps)


def _check_image(op: str, x: Tensor, name: str = "x") -> None:
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"{op} takes {name} (B, H, W, C), none of them 0; got {tuple(x.shape)}")


def _pieces(op: str, name: str, rows: Rows) -> tuple[Tensor | None, Tensor]:
    """The rows above, and the others."""
    if isinstance(rows, Tensor):
        _check_image(op, rows, name)
        return None, rows
    shapes = [tuple(piece.shape) if isinstance(piece, Tensor) else piece for piece in rows]
    match shapes:
        case [(1, above, width, C), (1, rest, w, c)] if (width, C) == (w, c) and 0 not in (above, rest, width, C):
            return rows
    raise ValueError(
        f"{op} takes {name} in one piece (B, H, W, C) or in two of one image, (1, rows above, W, C) and (1, rows, W, C),"
        f" none of them 0; got {' and '.join(map(str, shapes))}"
    )


def _whole_shape(rows: Tensor, above: Tensor | None) -> tuple[int, ...]:
    B, count, *pixels = rows.shape
    return (B, count + (0 if above is None else above.shape[1]), *pixels)


def _given(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(t for t in tensors if t is not None)


def _check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op} knows the activations {', '.join(ACTIVATIONS)}; got {activation!r}")


def _check_band(
    op: str, x: Tensor, above: Tensor | None, band: Band | None, stride: int, weight: ConvWeight | None, reach: int = 1
) -> Band:
    """The band, or the whole of x: inside its image, inside of what x holds, of a quantised weight of whole tiles."""
    rows = _whole_shape(x, above)[1]
    if band is None:
        return Band(0, 0, -(-rows // stride), rows)
    start, first, last, height = band
    end = -(-height // stride)
    if not (start >= 0 and start + rows <= height and 0 <= first < last <= end):
        raise ValueError(f"{op} takes a band inside its image; got {band} with x of {rows} rows and stride {stride}")
    low, high = max(0, stride * first - reach), min(height, stride * (last - 1) + reach + 1)
    if low < start or high > start + rows:
        raise ValueError(f"{op} needs rows {low} to {high - 1} of the image for {band}; x ends at {start + rows - 1}")
    quantized = weight is not None and weight.scale is not None
    if quantized and (first % TILE[0] or (last % TILE[0] and last != end)):
        raise ValueError(f"{op} of a quantised weight takes bands of whole tiles of {TILE[0]} rows; got {band}")
    return Band(*band)


def _check_weight(op: str, x: Tensor, weight: ConvWeight, phases: int) -> None:
    values, scale, shape = weight
    expected = shape if values.ndim == 4 else packed_shape(weight, phases)
    if values.shape != expected or (values.ndim != 4 and not values.is_contiguous()):
        raise ValueError(
            f"{op} takes a weight {tuple(shape)} whose values have that shape, or what pack_conv2d(weight, phases={phases})"
            f" makes of it, {packed_shape(weight, phases)}; got {tuple(values.shape)}"
        )
    integers, makers = (torch.int8,), "quantize_conv2d"
    if weight.transformed:
        integers, makers = (torch.int8, torch.int16), f"winograd_{op}"
    if values.dtype not in ((x.dtype,) if scale is None else integers) or values.device != x.device:
        raise TypeError(
            f"{op} takes a weight in x's dtype and device, or from {makers}; got {x.dtype} on {x.device} and"
            f" {values.dtype} on {values.device}"
        )
    scales = (*shape[2:], shape[0]) if weight.transformed else shape[:1]
    if scale is not None and scale.shape != scales:
        raise ValueError(f"{op} takes one scale per output channel {tuple(scales)}; got {tuple(scale.shape)}")
    if scale is not None and scale.device != x.device:
        raise ValueError(f"{op} takes tensors on one device; got {x.device} and a scale on {scale.device}")


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


def _plain_weight(x, weight, *args) -> str | None:
    return "it takes weights as they are, not packed" if weight.ndim != 4 else None


def _fake_conv2d(x, weight, weight_scale, weight_shape, bias, stride, *rest):
    *_, (_, first, last, _), _, _, _ = rest
    return x.new_empty(x.shape[0], last - first, -(-x.shape[2] // stride), weight_shape[0])


def _fake_upsample(x, weight, weight_scale, weight_shape, bias, band, above, backend):
    N = upsampled_channels(ConvWeight(weight, weight_scale, weight_shape))
    return x.new_empty(x.shape[0], 2 * (band[2] - band[1]), 2 * x.shape[2], N)


def _fake_multi_scale(x, depthwise, grouped, band, backend):
    return x.new_empty(x.shape[0], band[2] - band[1], *x.shape[2:])


register("conv2d", "reference", reference.conv2d, accepts=_plain_weight)
register("conv2d", "cuda", cuda.conv2d, device="cuda", accepts=cuda.accepts_conv2d)
register("conv2d", "cpu", cpu.conv2d, device="cpu", accepts=cpu.accepts)
define(
    "conv2d",
    "Tensor x, Tensor weight, Tensor? weight_scale, int[] weight_shape, Tensor? bias, int stride, str activation,"
    " Tensor? norm_weight, Tensor? norm_bias, Tensor? residual, Tensor? input_weight, Tensor? input_bias,"
    " str input_activation, float eps, int[] band, Tensor? above, Tensor? residual_above",
    _fake_conv2d,
)

register("upsample", "reference", reference.upsample, accepts=_plain_weight)
register("upsample", "cuda", cuda.upsample, device="cuda", accepts=cuda.accepts_upsample)
register("upsample", "cpu", cpu.upsample, device="cpu", accepts=cpu.accepts)
define(
    "upsample",
    "Tensor x, Tensor weight, Tensor? weight_scale, int[] weight_shape, Tensor bias, int[] band, Tensor? above",
    _fake_upsample,
)

register("multi_scale", "reference", reference.multi_scale)
register("multi_scale", "cpu", cpu.multi_scale, device="cpu", accepts=cpu.accepts)
define("multi_scale", "Tensor x, Tensor depthwise, Tensor grouped, int[] band", _fake_multi_scale)

register("rms_norm", "reference", reference.rms_norm)
register("rms_norm", "cuda", cuda.rms_norm, device="cuda", accepts=cuda.accepts_rms_norm)
register("rms_norm", "cpu", cpu.rms_norm, device="cpu", accepts=cpu.accepts_rms_norm)
define(
    "rms_norm",
    "Tensor x, Tensor weight, Tensor bias, Tensor? residual, str activation, float eps",
    lambda x, *args: torch.empty_like(x),
)
