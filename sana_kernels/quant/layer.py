"""A linear layer as quantised checkpoints have it, and what it computes.

    y = Q(x / smooth) · Wᵀ + (x · downᵀ) · upᵀ          W: dequantised; Q: rows quantised as `activations` says

`smooth` and the low-rank branch are optional and belong to SVDQuant. The bias is not part of it: it stays in 16 bits, a
tensor of its own.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sana_kernels.gemm.reference import STEP, dequantize, quantize
from sana_kernels.quant import formats
from sana_kernels.quant.formats import EIGHT_BITS, GROUP, Int4, Nvfp4


@dataclass(frozen=True)
class QuantizedLayer:
    """The weight (N, K) of one layer. Kp: K rounded up to a multiple of 64, or of `group` where that is larger."""

    format: str  # of `formats.WEIGHTS`: int8 | fp8 | int4 | nvfp4
    activations: str  # what it is multiplied with, of `formats.ACTIVATIONS`: int8 | fp8 | int4 | 16bit
    inputs: int  # K
    values: Tensor  # int8: (N, Kp) int8; fp8: (N, Kp) float8_e4m3fn; int4, nvfp4: (N, Kp / 2) uint8
    scale: Tensor  # int8, fp8: (N,) fp32; int4: (N, Kp / group) bf16 or fp32; nvfp4: (N, Kp / 16) float8_e4m3fn
    tensor_scale: Tensor | None = None  # nvfp4: () fp32
    smooth: Tensor | None = None  # (K,) fp32, positive
    down: Tensor | None = None  # (r, K) bf16 or fp16, divided by smooth: it meets x as it is
    up: Tensor | None = None  # (N, r), likewise

    @property
    def outputs(self) -> int:
        return self.values.shape[0]

    @property
    def group(self) -> int:
        """Neighbours along K that share a scale; 0 where the whole row does."""
        return 0 if self.scale.ndim == 1 else self.padded // self.scale.shape[1]

    @property
    def padded(self) -> int:
        """Kp."""
        return self.values.shape[1] * (1 if self.format in EIGHT_BITS else 2)

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """By field, those that there are."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits(self) -> float:
        """Stored bits per weight: values, scales, smoothing and low-rank factors."""
        return 8 * self.bytes / (self.outputs * self.inputs)

    def int4(self) -> Int4:
        """The rows as kernels take them, with fp32 scales. For the format int4."""
        return Int4(self.values, self.scale.float())

    def dequantized(self, padded: bool = False) -> Tensor:
        """The fp64 rows (N, K), or (N, Kp), that values and scales stand for: without smoothing and low-rank branch."""
        if self.format == "int4":
            rows = formats.dequantize_int4(self.int4())
        elif self.format == "nvfp4":
            rows = formats.dequantize_nvfp4(Nvfp4(self.values, self.scale, self.tensor_scale))
        else:
            rows = dequantize(self.values, self.scale)
        return rows if padded else rows[:, : self.inputs]

    def effective(self) -> Tensor:
        """The fp32 weight (N, K) of the linear layer that this is, were activations not rounded."""
        weight = self.dequantized().float()
        if self.smooth is not None:
            weight = weight / self.smooth.float()
        return weight if self.down is None else weight + self.up.float() @ self.down.float()

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) → (..., N) in fp32, without bias: activations rounded as the format says, sums in fp32."""
        x = x.float()
        rows = x if self.smooth is None else x / self.smooth.float()
        y = formats.fake_quantize(rows, self.activations) @ self.dequantized().float().t()
        if self.down is not None:
            low = (x @ self.down.float().t()).to(self.down.dtype)
            y = y + low.float() @ self.up.float().t()
        return y


def round_to_nearest(
    weight: Tensor, format: str, activations: str, group: int = GROUP, scale_dtype: torch.dtype = torch.bfloat16
) -> QuantizedLayer:
    """A weight (N, K), floating and finite, quantised as it is. `group` and `scale_dtype`: of int4's scales."""
    K = weight.shape[1]
    if format == "int4":
        if group % STEP:
            raise ValueError(f"groups of int4 weights are a multiple of {STEP} values, not {group}")
        rows = formats.quantize_int4(weight, group=group, scale_dtype=scale_dtype)
        return QuantizedLayer(format, activations, K, rows.values, rows.scale.to(scale_dtype))
    if format == "nvfp4":
        return QuantizedLayer(format, activations, K, *formats.quantize_nvfp4(weight))
    return QuantizedLayer(format, activations, K, *quantize(weight, EIGHT_BITS[format]))
