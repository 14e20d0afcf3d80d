"""Packs weights for, and hands tensors to, the C++ kernels in csrc/gemm."""

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension
from sana_kernels.gemm.reference import STEP

PER_LANE = {torch.int8: 4, torch.bfloat16: 2}  # elements in 4 bytes


def pack(weight: Tensor) -> Tensor:
    """(N, K) rows → (N / 16, K / n, 16 · n), n elements in 4 bytes: the layout that every instruction set reads."""
    n = PER_LANE.get(weight.dtype)
    if n is None or weight.ndim != 2 or weight.shape[0] % 16 or weight.shape[1] * weight.element_size() % STEP:
        raise ValueError(
            "pack takes bf16 or int8 rows (N, K), N a multiple of 16 and K of 64 bytes;"
            f" got {tuple(weight.shape)} of {weight.dtype}"
        )
    whole = (
        weight.contiguous() if weight.storage_offset() % n == 0 else weight.clone(memory_format=torch.contiguous_format)
    )
    lanes = whole.view(torch.int32)  # which torch moves several times as fast as the parts of each
    return lanes.unflatten(0, (-1, 16)).transpose(1, 2).contiguous().view(weight.dtype)


def unpack(weight: Tensor) -> Tensor:
    """The rows that `pack` was given."""
    lanes = weight.view(torch.int32).transpose(1, 2).contiguous()
    return lanes.flatten(0, 1).view(weight.dtype)


def accepts(x, x_scale, weight, weight_scale, bias, silu, gate, residual, dtype) -> str | None:
    if x.dtype not in PER_LANE:
        return f"it multiplies bfloat16 and int8; {x.dtype} is left to PyTorch"
    if weight.ndim == 2 and weight.shape[0] % 16:
        return f"it supports multiples of 16 output channels, not {weight.shape[0]}"
    if x.shape[2] * x.element_size() % STEP:
        return f"it supports multiples of {STEP // x.element_size()} input channels in {x.dtype}, not {x.shape[2]}"
    if dtype not in DTYPE_CODES or (residual is not None and residual.dtype != dtype):
        return f"its result is float32, bfloat16 or float16, like the residual; not {dtype}"
    return None


def gemm(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As the reference; arguments as `_check` of this package and `accepts` let them through."""
    B, M, K = x.shape
    if weight.ndim == 2:
        weight = pack(weight)
    N = 16 * weight.shape[0]
    x, stride = rows(x)
    out = torch.empty(B, M, N, dtype=dtype, device=x.device)  # not on whatever torch's default is
    residual = None if residual is None else residual.contiguous()
    floats = [as_float(t) for t in (x_scale, weight_scale, bias, gate)]
    extension("_cpu")[0].gemm(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), stride, (B * M, N, K, M),
        [address(t) for t in floats], address(residual), DTYPE_CODES[dtype], silu, torch.get_num_threads(),
    )  # fmt: skip
    return out


def accepts_quantize(x: Tensor, dtype: torch.dtype, *args) -> str | None:
    if x.dtype not in DTYPE_CODES:
        return f"it takes float32, bfloat16 and float16, not {x.dtype}"
    return only_int8(dtype)


def only_int8(dtype: torch.dtype) -> str | None:
    return None if dtype == torch.int8 else f"it quantises to int8, not {dtype}"


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As the reference, to the bit."""
    *lead, K = x.shape
    rows = x.reshape(-1, K)  # copies where one stride cannot walk all rows
    values, scale = empty_rows(*lead, K)
    extension("_cpu")[0].quantize(
        rows.data_ptr(), values.data_ptr(), scale.data_ptr(), len(rows), K, rows.stride(0), DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return values, scale


def empty_rows(*shape: int) -> tuple[Tensor, Tensor]:
    """Memory for a tensor of that shape (..., K) as int8 rows: values and scales."""
    *lead, K = shape
    values = torch.empty(*lead, -(-K // STEP) * STEP, dtype=torch.int8, device="cpu")
    return values, torch.empty(lead, dtype=torch.float32, device="cpu")


def rows(x: Tensor) -> tuple[Tensor, int]:
    """The rows of x (B, M, K), copied unless one stride walks them all, and that stride in bytes."""
    rows = x.reshape(-1, x.shape[2])
    return rows, rows.stride(0) * x.element_size()


def as_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
