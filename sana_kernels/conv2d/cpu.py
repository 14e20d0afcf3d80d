"""Hands tensors to the C++ kernels in csrc/conv2d."""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension
from sana_kernels.conv2d.reference import ACTIVATIONS
from sana_kernels.conv2d.weights import ConvWeight, pack_conv2d, upsampled_channels
from sana_kernels.gemm.cpu import address, as_float

ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
WITHOUT_HALF = (torch.float32, torch.bfloat16)
WINOGRAD_CHANNELS = 64  # in and out, that make a transformed kernel worth while: int8 rows are padded to as many


def winograd_integers(eight_bit: bool) -> torch.dtype | None:
    """The integers of transformed kernels that are faster here than direct ones of bfloat16 or, `eight_bit`, of W8A8.

    None with AMX, whose tiles multiply eight times as fast as vectors, which would have to transform for them. int8 where
    there are instructions for it, and of bfloat16 and without those int16, which is more exact. bench/notes/decoder.md.
    """
    isa = extension("_cpu")[0].isa()
    if isa == "amx":
        return None
    return torch.int8 if eight_bit and isa in ("avx512", "avx512vnni", "avxvnni") else torch.int16


def accepts(x: Tensor, *args) -> str | None:
    """For conv2d, upsample and multi_scale."""
    return None if x.dtype in WITHOUT_HALF else f"it computes in float32 and bfloat16, not {x.dtype}"


def conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_shape: list[int],
    bias: Tensor | None,
    stride: int,
    activation: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    input_weight: Tensor | None,
    input_bias: Tensor | None,
    input_activation: str,
    eps: float,
    band: list[int],
    above: Tensor | None,
    residual_above: Tensor | None,
) -> Tensor:
    """As the reference, of a weight that may be packed; arguments as this package lets them through."""
    out = torch.empty(
        x.shape[0], band[2] - band[1], -(-x.shape[2] // stride), weight_shape[0], dtype=x.dtype, device=x.device
    )
    vectors = weight_scale, bias, norm_weight, norm_bias, input_weight, input_bias
    weight = ConvWeight(weight, weight_scale, tuple(weight_shape))
    pieces, residuals = _pieces(above, x), _pieces(residual_above, residual)
    kind, activations = (stride, weight_shape[2], 1), (activation, input_activation)
    _run(x, weight, out, pieces, residuals, vectors, band, kind, activations, eps)
    return out


def upsample(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_shape: list[int],
    bias: Tensor,
    band: list[int],
    above: Tensor | None,
) -> Tensor:
    """As the reference, of a weight that may be packed."""
    weight = ConvWeight(weight, weight_scale, tuple(weight_shape))
    N = upsampled_channels(weight)
    out = torch.empty(x.shape[0], 2 * (band[2] - band[1]), 2 * x.shape[2], N, dtype=x.dtype, device=x.device)
    vectors = weight_scale, bias, None, None, None, None
    pieces, kind = _pieces(above, x), (1, weight_shape[2], 4)
    _run(x, weight, out, pieces, _pieces(None, None), vectors, band, kind, ("none", "none"), 0.0)
    return out


def _pieces(above: Tensor | None, rows: Tensor | None) -> tuple[int | None, int, int | None, int]:
    """Address and number of the rows above, of the rest."""
    count, rest = (0 if t is None else t.shape[1] for t in (above, rows))
    return address(above), count, address(rows), rest


def _run(
    x: Tensor, weight: ConvWeight, out: Tensor, pieces: tuple, residuals: tuple, vectors: tuple, band: list[int],
    kind: tuple[int, int, int], activations: tuple[str, str], eps: float,
) -> None:  # fmt: skip
    packed, floats = pack_conv2d(weight, kind[2]).values, [as_float(t) for t in vectors]
    kind, activations = (
        (*kind, weight.transformed, packed.element_size()),
        [ACTIVATION_CODES[name] for name in activations],
    )
    N = out.shape[3]
    extension("_cpu")[0].conv2d(
        pieces, residuals, [packed.data_ptr(), out.data_ptr()], [address(t) for t in floats],
        (x.shape[0], *x.shape[2:], N), band, kind, activations,
        floats[1] is not None and len(floats[1]) > N, eps, DTYPE_CODES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip


def multi_scale(x: Tensor, depthwise: Tensor, grouped: Tensor, band: list[int]) -> Tensor:
    """As the reference."""
    C, D, k = x.shape[3], grouped.shape[1], depthwise.shape[2]
    out = torch.empty(x.shape[0], band[2] - band[1], x.shape[2], C, dtype=x.dtype, device=x.device)
    weights = depthwise.reshape(C, k * k).t(), grouped.reshape(C // D, D, D).transpose(1, 2)
    weights = [as_float(t) for t in weights]
    extension("_cpu")[0].multi_scale(
        [t.data_ptr() for t in (x, *weights, out)], (*x.shape, D, k), band, DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def accepts_rms_norm(x: Tensor, *args) -> str | None:
    return None if x.dtype in DTYPE_CODES else f"it computes in float32, bfloat16 and float16, not {x.dtype}"


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str, eps: float) -> Tensor:
    """As the reference."""
    out = torch.empty_like(x)
    tensors = x, as_float(weight), as_float(bias), residual, out
    extension("_cpu")[0].rms_norm(
        [address(t) for t in tensors], x.numel() // x.shape[-1], x.shape[-1], DTYPE_CODES[x.dtype],
        ACTIVATION_CODES[activation], eps, torch.get_num_threads(),
    )  # fmt: skip
    return out
