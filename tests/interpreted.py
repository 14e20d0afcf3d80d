"""Triton kernels on a machine without a GPU: in Triton's interpreter, which conftest.py turns on; with a GPU, compiled.

The interpreter truncates where a GPU rounds to nearest even, in casts from fp32 to bf16 and to e4m3, and multiplies the
bits of bf16 matrices as integers: importing this file mends both. It also takes what some versions of Triton refuse.
"""

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

ROUNDED = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}


def _convert(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding, original=interpreter._convert_float):
    if source != tl.float32 or target not in ROUNDED:
        return original(values, source, target, rounding)
    dtype, bits = ROUNDED[target]
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    if target == tl.float8e4nv:
        wide = wide.clamp(-448, 448)  # a GPU saturates
    return wide.to(dtype).view(bits).numpy()


def _dot(self, a, b, sums, *options):
    """Of fp32, rounded once: what a machine's BLAS makes of it differs from the next one's by as much as a tolerance."""
    wide = np.float64 if a.dtype.scalar == b.dtype.scalar == tl.float32 else sums.data.dtype
    a, b = (
        _convert(x.data, x.dtype.scalar, tl.float32, None).view(np.float32) if x.dtype.scalar in ROUNDED else x.data
        for x in (a, b)
    )
    total = np.matmul(a, b, dtype=wide) + sums.data
    return interpreter.TensorHandle(total.astype(sums.data.dtype), sums.dtype.scalar)


interpreter._convert_float = _convert
interpreter.InterpreterBuilder.create_dot = _dot

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    from triton.language.semantic import TritonSemantic

    def _dot_as_before(self, lhs, rhs, acc, input_precision, most, out_dtype, original=TritonSemantic.dot):
        expected = out_dtype or tl.float32
        assert acc is None or acc.dtype == expected, (
            f"Triton 3.5 to 3.7 take an accumulator of {acc.dtype} for {expected}"
        )
        return original(self, lhs, rhs, acc, input_precision, most, out_dtype)

    TritonSemantic.dot = _dot_as_before

on_gpu = pytest.mark.gpu if DEVICE == "cuda" else lambda test: test
"""For every test but those of planted defects: with a GPU they are among those that need it, which `make gpu` runs."""


FP8_SUMS = 2.0**-11
"""Relative RMS that fp32 results of fp8 products may be off on a GPU: Hopper's tensor cores keep 14 bits of a sum, until
it moves to fp32 after 128 values. What is rounded to 16 bits afterwards hardly shows it."""


def chain_of(K: int, dtype: torch.dtype) -> int:
    """`chain` of `assert_kernel`: compiled, an fp32 product is K multiply-adds in a row; interpreted, it is rounded once."""
    return K if DEVICE == "cuda" and dtype == torch.float32 else 0


MARGIN = 1 << 15  # elements before and after a guarded tensor


def guarded(x: torch.Tensor) -> torch.Tensor:
    """The same values and strides, amid poison (NaN, or 77 where there is none): what is read beyond the end shows."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    buffer = torch.full((extent + 2 * MARGIN,), float("nan") if x.dtype.is_floating_point else 77, dtype=x.dtype)
    view = buffer.to(x.device).as_strided(x.shape, x.stride(), MARGIN)
    view.copy_(x)
    return view


@contextmanager
def guarded_results():
    """What kernels get from torch.empty meanwhile is poisoned, inside and around; what is written around it is an error."""
    made, empty = [], torch.empty

    def poisoned(shape, *, dtype, device):
        made.append(
            guarded(torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype, device=device))
        )
        return made[-1]

    torch.empty = poisoned
    try:
        yield
    finally:
        torch.empty = empty
    for result in made:
        buffer = torch.as_strided(result, (result.numel() + 2 * MARGIN,), (1,), 0).float()
        around = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
        assert bool((around.isnan() | (around == 77)).all()), "something was written outside of a result"


def on_guarded(function, *args):
    """function(*args) with poison around its tensors."""
    with guarded_results():
        return function(*(guarded(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))


def defective(module: ModuleType, folder: Path, *changes: tuple[str, str]) -> ModuleType:
    """The module with a mistake planted: each change is (a piece of its source that stands there once, another)."""
    source = Path(module.__file__).read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{module.__name__} has {old!r} {source.count(old)} times, not once"
        source = source.replace(old, new)
    path = folder / "defective.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("defective", path)
    built = importlib.util.module_from_spec(spec)
    sys.modules["defective"] = built
    spec.loader.exec_module(built)
    return built
