"""The ops of the networks as a graph holds them: standard operators on whole images, with the arithmetic of the references.

Where a reference is already that, it is used as it is. The others are here, and the two operators of quantised graphs,
which PyTorch has no ONNX form of that takes bf16 scales.
"""

from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_kernels.conv2d import reference as conv
from sana_kernels.linear_attention import reference as attention
from sana_kernels.mix_ffn.reference import depthwise_glu
from sana_model.ops import REFERENCE_OPS, Ops

INT8_MOST = 127


class Product(Protocol):
    """A weight that knows how to be multiplied: `sana_export.graphs.GraphLinear`."""

    def product(self, x: Tensor) -> Tensor: ...


def graph_ops(form: str) -> Ops:
    """`form`: how linear attention is written, as plain operators or as one node for a plugin."""
    ops = replace(
        REFERENCE_OPS,
        gemm=gemm,
        mix_ffn=mix_ffn,
        cross_attention=cross_attention,
        conv2d=conv2d,
        multi_scale=multi_scale,
    )
    return replace(ops, linear_attention=linear_attention_node) if form == "plugin" else ops


def gemm(
    x: Tensor,
    weight: Tensor | Product,
    bias: Tensor | None = None,
    *,
    silu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As `sana_kernels.gemm`."""
    y = x @ weight.t() if isinstance(weight, Tensor) else weight.product(x)
    y = y if bias is None else y + bias
    y = F.silu(y) if silu else y
    if residual is not None:
        y = residual + (y if gate is None else gate[:, None] * y)
    return y if dtype is None else y.to(dtype)


def mix_ffn(
    x: Tensor, height: int, width: int, expand: Tensor | Product, expand_bias: Tensor,
    depthwise: Tensor, depthwise_bias: Tensor, project: Tensor | Product,
    *, gate: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `sana_kernels.mix_ffn`."""
    h = gemm(x, expand, expand_bias, silu=True)
    u = depthwise_glu(h, height, width, depthwise, depthwise_bias)
    return gemm(u, project, gate=gate, residual=residual)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, *, quantize: None = None) -> Tensor:
    """As `sana_kernels.cross_attention`; lengths (B,) are tensors in a graph, and never None."""
    scores = attention_scores(q, k)
    columns = torch.arange(k.shape[1], device=q.device)
    # Half of the most negative number: a score that is added to it cannot make a row of nothing but -inf.
    hidden = torch.finfo(q.dtype).min / 2
    mask = torch.where(columns < lengths[:, None], 0.0, hidden).to(q.dtype)[:, None, None]
    return ((scores + mask).softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


def attention_scores(q: Tensor, k: Tensor) -> Tensor:
    """(B, N, H, D), (B, L, H, D) → (B, H, N, L)."""
    return q.transpose(1, 2) * q.shape[-1] ** -0.5 @ k.transpose(1, 2).transpose(2, 3)


def linear_attention_node(
    q: Tensor, k: Tensor, v: Tensor, *, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
    norm_eps: float = 1e-5, eps: float = 1e-15, quantize: None = None,
) -> Tensor:  # fmt: skip
    """As `sana_kernels.linear_attention`, but a node that only an engine with our plugin can compute."""
    if q_norm is not None:
        q = attention.rms_norm(q.flatten(2), q_norm, norm_eps).view(q.shape)
    if k_norm is not None:
        k = attention.rms_norm(k.flatten(2), k_norm, norm_eps).view(k.shape)
    attributes = {"eps": eps, "plugin_namespace": "sana", "plugin_version": "1", "aot": 1}
    return torch.onnx.ops.symbolic(
        "sana::linear_attention", (q, k, v), attributes, dtype=q.dtype, shape=q.shape, version=1
    )


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, activation: str = "none",
    norm: tuple[Tensor, Tensor] | None = None, residual: Tensor | None = None,
    input_norm: tuple[Tensor, Tensor] | None = None, input_activation: str = "none", eps: float = 1e-5, band=None,
) -> Tensor:  # fmt: skip
    """As `sana_kernels.conv2d` of a whole image, the only band that a graph is given."""
    if input_norm is not None:
        x = conv.rms_norm(x, *input_norm, None, input_activation, eps)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding=1).permute(0, 2, 3, 1)
    y = conv.ACTIVATIONS[activation](y)
    if norm is not None:
        return conv.rms_norm(y, *norm, residual, "none", eps)
    return y if residual is None else y + residual


def multi_scale(x: Tensor, depthwise: Tensor, grouped: Tensor, *, band=None) -> Tensor:
    """As `sana_kernels.multi_scale` of a whole image."""
    channels = x.shape[3]
    y = F.conv2d(x.permute(0, 3, 1, 2), depthwise, padding=depthwise.shape[2] // 2, groups=channels)
    return F.conv2d(y, grouped, groups=channels // grouped.shape[1]).permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------------ Q and DQ


@torch.library.custom_op("sana_export::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor) -> Tensor:
    """ONNX's QuantizeLinear with one scale () and no zero point: x / scale to the nearest int8, ties to even."""
    return (x.float() / scale.float()).round().clamp(-INT8_MOST - 1, INT8_MOST).to(torch.int8)


@torch.library.custom_op("sana_export::dequantize_linear", mutates_args=())
def dequantize_linear(values: Tensor, scale: Tensor) -> Tensor:
    """ONNX's DequantizeLinear of int8 values, in the dtype of the scale.

    scale (): one for all; (N,): one for each column of values (K, N); (K / b, N): one for each b values of a column.
    """
    wide, factor = values.float(), scale.float()
    if scale.ndim == 2:
        return (wide.unflatten(0, (scale.shape[0], -1)) * factor[:, None]).flatten(0, 1).to(scale.dtype)
    return (wide * factor).to(scale.dtype)


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


@dequantize_linear.register_fake
def _(values: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(values, dtype=scale.dtype)


def translations() -> dict:
    """How the exporter writes the two: a `custom_translation_table` for torch.onnx.export."""
    import onnx
    from onnxscript import opset21 as op

    def quantize(x, scale):
        zero = op.Constant(value=onnx.helper.make_tensor("zero", onnx.TensorProto.INT8, [], [0]))
        return op.QuantizeLinear(x, scale, zero)

    def dequantize(values, scale):
        if len(scale.shape) == 2:
            return op.DequantizeLinear(values, scale, axis=0, block_size=values.shape[0] // scale.shape[0])
        return op.DequantizeLinear(values, scale, axis=1)

    ops = torch.ops.sana_export
    return {ops.quantize_linear.default: quantize, ops.dequantize_linear.default: dequantize}
