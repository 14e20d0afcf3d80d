"""Hands tensors to the CUDA kernels in csrc/gemm."""

from functools import cache

import torch
from torch import Tensor

from sana_kernels.backend import DTYPE_CODES, extension
from sana_kernels.gemm.reference import STEP

MAX_ROW = 10 * 1024  # kMaxRow of csrc/common/rows_cuda.h

# Rows and columns of a block's tile, and how fast tensor cores run in it beside the largest: a smaller tile reads more
# shared memory per product. The order is that of `tile` in csrc/gemm/gemm_w8a8.cu.
TILES = ((128, 160, 1.0), (128, 128, 0.95), (128, 96, 0.9), (64, 64, 0.65))


def tile(M: int, N: int, multiprocessors: int) -> int:
    """Index into TILES: the one in which the busiest multiprocessor is done first. A function of shape and GPU alone."""

    def work_of_the_busiest(index: int) -> float:
        rows, columns, speed = TILES[index]
        blocks = -(-M // rows) * -(-N // columns)
        return -(-blocks // multiprocessors) * rows * columns / speed

    return min(range(len(TILES)), key=work_of_the_busiest)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def accepts(x, x_scale, weight, weight_scale, bias, silu, gate, residual, dtype) -> str | None:
    if x.dtype != torch.int8:
        return f"it multiplies int8; {x.dtype} is left to PyTorch's library and to triton"
    if weight.ndim != 2:
        return "it takes weights as rows (N, K), not packed"
    if x.shape[2] % STEP:
        return f"it supports multiples of {STEP} input channels, not {x.shape[2]}"
    given = [dtype, *(t.dtype for t in (bias, gate, residual) if t is not None)]
    if any(t not in DTYPE_CODES for t in given):
        return f"its bias, gate, residual and result are float32, bfloat16 or float16; these are {given}"
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
    (B, M, K), N = x.shape, weight.shape[0]
    x, weight = at_16_bytes(x), at_16_bytes(weight)
    scales = [t.float().contiguous() for t in (x_scale, weight_scale)]
    out = torch.empty((B, M, N), dtype=dtype, device=x.device)
    with torch.cuda.device(x.device):
        extension("_cuda")[0].gemm_w8a8(
            x.data_ptr(), weight.data_ptr(), K, (B * M, N, M), epilogue(out, scales, bias, silu, gate, residual),
            tile(B * M, N, multiprocessors(x.device)), torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return out


def epilogue(
    out: Tensor,
    scales: list[Tensor] | None,
    bias: Tensor | None,
    silu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
) -> tuple:
    """The work after a product as C++ sees it (EpilogueArgs of csrc/bind_cuda.cpp). `scales`: of x and of weight."""
    # Where all rows begin at 16 bytes and consist of whole runs of eight, outputs are computed eight at a time.
    rows = [t for t in (out, bias, gate, residual, *(scales or ())[1:]) if t is not None]
    vectors = out.shape[-1] % 8 == 0 and all(
        t.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in t.stride()[:-1]) for t in rows
    )
    addresses = [t.data_ptr() for t in scales] if scales else (0, 0)
    gate_stride = 0 if gate is None else gate.stride(0)
    residual_strides = (0, 0) if residual is None else residual.stride()[:2]
    return (*addresses, typed(bias), typed(gate), gate_stride, typed(residual), residual_strides, typed(out), silu,
            vectors)  # fmt: skip


def typed(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else (tensor.data_ptr(), DTYPE_CODES[tensor.dtype])


def at_16_bytes(rows: Tensor) -> Tensor:
    """Contiguous, at an address that copies of 16 bytes can begin at."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def accepts_quantize(x: Tensor, dtype: torch.dtype) -> str | None:
    if x.dtype not in DTYPE_CODES:
        return f"it quantises float32, bfloat16 and float16, not {x.dtype}"
    if x.shape[-1] > MAX_ROW:
        return f"it supports rows of up to {MAX_ROW} values, not {x.shape[-1]}"
    return None


def quantize(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """As the reference; arguments as `quantize` of this package and `accepts_quantize` let them through."""
    out = empty_quantized(x, dtype)
    K = x.shape[-1]
    rows = x.reshape(-1, K)  # a view, but where rows are at no single stride
    with torch.cuda.device(x.device):
        extension("_cuda")[0].quantize(
            rows.data_ptr(), (rows.shape[0], K, rows.stride(0)), DTYPE_CODES[x.dtype], quantized_rows(out),
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return out


def empty_quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for the 8-bit rows of x: values (..., K rounded up to a multiple of 64) and scale (...,)."""
    width = -(-x.shape[-1] // STEP) * STEP
    values = torch.empty((*x.shape[:-1], width), dtype=dtype, device=x.device)
    return values, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def quantized_rows(rows: tuple[Tensor, Tensor]) -> tuple[int, int, int, bool]:
    """8-bit rows as C++ sees them: addresses of values and scale, values in a row, fp8."""
    values, scale = rows
    return values.data_ptr(), scale.data_ptr(), values.shape[-1], values.dtype == torch.float8_e4m3fn
