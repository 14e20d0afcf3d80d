"""What the Triton kernels share: how they are launched, and the arithmetic that several of them need bit for bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_kernels.gemm.reference import STEP


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *args, **constants) -> None:
    """Run kernel[grid] on the device of the first argument, a tensor.

    Triton launches on the current device, and its default for fused multiply-adds changes between releases, and with it
    the last bits of every result: both are said here.
    """
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants, enable_fp_fusion=True)


def empty_quantized(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for 8-bit rows of this shape (..., K): values (..., K rounded up to a multiple of 64) and scales (...,)."""
    values = torch.empty((*shape[:-1], triton.cdiv(shape[-1], STEP) * STEP), dtype=dtype, device=device)
    return values, torch.empty(shape[:-1], dtype=torch.float32, device=device)


def promote(dtype: torch.dtype, block_k: int) -> int | None:
    """After how many values of K a sum of fp8 products moves to fp32 (max_num_imprecise_acc of tl.dot)."""
    return min(block_k, 128) if dtype == torch.float8_e4m3fn else None


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)  # unlike tl.maximum it keeps a NaN


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def quantize_rows(y, dtype: tl.constexpr):
    """fp32 (T, K), with zeros beyond a row's end → values (T, K) in dtype and scales (T,): gemm/reference.py to the bit.

    The clamp comes before the rounding, where it changes nothing, so that no compiler can fuse the product with the sum that
    rounds. The cast to e4m3 rounds by itself.
    """
    MOST: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    largest = tl.max(tl.abs(y), 1)
    zero = largest < 2.0**-100
    largest = tl.where(zero, 1.0, largest)
    most = tl.full(largest.shape, MOST, tl.float32)
    scale = tl.where(zero, 0.0, tl.div_rn(largest, most))
    factor = tl.where(zero, 0.0, tl.div_rn(most, largest))
    y = tl.minimum(tl.maximum(y * factor[:, None], -MOST), MOST)
    if dtype == tl.int8:
        y = (y + 12582912.0) - 12582912.0  # 1.5 · 2²³: nothing below 1 survives the sum
    return y.to(dtype), scale
