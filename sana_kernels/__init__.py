"""The ops of SANA, each with a readable reference and faster kernels for CPUs and NVIDIA GPUs.

>>> import sana_kernels
>>> y = sana_kernels.linear_attention(q, k, v)                     # the fastest kernel that can run
>>> y = sana_kernels.linear_attention(q, k, v, backend="cpu")      # this one, or an error that says why not

`python -m sana_kernels` prints what this machine can run and why the rest is off.
"""

# The functions take the names of their packages; import what lies inside a package as
# `from sana_kernels.linear_attention import reference`.
from sana_kernels.conv2d import (
    Band,
    conv2d,
    fold_upsample,
    multi_scale,
    pack_conv2d,
    quantize_conv2d,
    rms_norm,
    upsample,
    winograd_conv2d,
    winograd_upsample,
)  # fmt: skip
from sana_kernels.cross_attention import cross_attention
from sana_kernels.gemm import Quantized, gemm, quantize
from sana_kernels.gemm.int4 import gemm_w4a4, gemm_w4a16, quantize_int4
from sana_kernels.linear_attention import linear_attention, linear_attention_from
from sana_kernels.mix_ffn import depthwise_glu, mix_ffn
from sana_kernels.modulate import gate_residual, modulate


def optimize(pipe, precision: str | None = None, backend: str = "auto"):
    """Turn a loaded SANA pipeline, of diffusers or of ours, over to these kernels; see `sana_model.optimize`."""
    from sana_model import optimize as models

    return models.optimize(pipe, precision, backend)


def restore(pipe) -> None:
    """Undo `optimize`."""
    from sana_model import optimize as models

    models.restore(pipe)


__all__ = [
    "Band",
    "Quantized",
    "conv2d",
    "cross_attention",
    "depthwise_glu",
    "fold_upsample",
    "gate_residual",
    "gemm",
    "gemm_w4a4",
    "gemm_w4a16",
    "linear_attention",
    "linear_attention_from",
    "mix_ffn",
    "modulate",
    "multi_scale",
    "optimize",
    "pack_conv2d",
    "quantize",
    "quantize_conv2d",
    "quantize_int4",
    "restore",
    "rms_norm",
    "upsample",
    "winograd_conv2d",
    "winograd_upsample",
]  # fmt: skip
