"""Every way in which an op can be computed here: the backends of the registry, and for the CPU each instruction set."""

from contextlib import contextmanager

import emulated_tiles
import pytest
import torch
from torch.utils._pytree import tree_leaves

import sana_kernels
from sana_kernels import _cpu, backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMULATED = "cpu:amx (emulated)"


@contextmanager
def isa_cap(name: str):
    before = _cpu.isa()
    _cpu.set_isa_cap(name)
    try:
        yield
    finally:
        _cpu.set_isa_cap(before)


def isas() -> list[str]:
    """The instruction sets that this machine has, slowest first."""
    found = []
    for name in ("portable", "avx2", "avxvnni", "avx512vnni", "avx512", "amx"):
        with isa_cap(name):
            if _cpu.isa() == name:
                found.append(name)
    return found


def on_cpu(tiles: bool = False) -> list[str]:
    """Variants of the CPU; `tiles`: of an op that has a kernel for AMX, which runs everywhere, emulated if need be."""
    found = [f"cpu:{isa}" for isa in isas()]
    return [*found, EMULATED] if tiles and "cpu:amx" not in found else found


def variants(op: str, tiles: bool = False) -> list:
    """Parameters for `run`: backend, or backend:isa (see `on_cpu`). Those that need a GPU carry its mark."""
    found = []
    for kernel in backend.kernels(op):
        if kernel.backend == "cpu":
            found += on_cpu(tiles)
        else:
            found.append(
                pytest.param(kernel.backend, marks=pytest.mark.gpu) if kernel.device == "cuda" else kernel.backend
            )
    return found


@contextmanager
def on(variant: str):
    """Within, backend "cpu" is this variant of it."""
    isa = variant.partition(":")[2]
    with emulated_tiles.cpu() if variant == EMULATED else isa_cap(isa or _cpu.isa()):
        yield


def device_of(variant: str) -> str:
    return "cuda" if variant in ("cuda", "triton", "library") else "cpu"


def run(variant: str, op: str, *args, **kwargs) -> torch.Tensor:
    """The public op on one variant. Skips the test where a kernel of a backend that the GPU has refuses the arguments."""
    name = variant.partition(":")[0]
    with on(variant):
        try:
            return getattr(sana_kernels, op)(*args, **kwargs, backend=name)
        except backend.BackendUnavailable as error:
            there = tree_leaves(args)[0].device.type != "cpu"  # else it is a mistake of the test
            if device_of(name) == "cuda" and there and backend.backend_status(name) is None:
                pytest.skip(str(error))
            raise


def signed(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values of mean 0.3, the first and every 50th channel 30 times as large: what SANA's activations look like."""
    x = torch.randn(shape) + 0.3
    x[..., ::50] *= 30
    return x.to(dtype)


def double(*args) -> list:
    """The arguments of an op in fp64, for the oracle."""
    return [arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args]
