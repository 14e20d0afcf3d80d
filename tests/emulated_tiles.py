"""Runs the AMX kernels on any machine with AVX-512 and BF16: the module sana_kernels._cpu, built on csrc/emulator/tiles.h.

    with emulated_tiles.cpu():
        out = sana_kernels.gemm(..., backend="cpu")

The emulator stops the process where a kernel reads a tile that was never written.
"""

import contextlib
import fcntl
import os
import subprocess
import sys
import types
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from conftest import load_extension

from sana_kernels import _cpu, backend

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "emulator" / "tiles"


@cache
def module() -> types.ModuleType:
    """The emulated sana_kernels._cpu. Skips the test where AVX-512 with BF16, which the AMX kernels also use, is missing."""
    if "bf16_avx512" not in _cpu.peak_kinds():
        pytest.skip("the AMX kernels on emulated tiles still need AVX-512 with BF16")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(BUILD)]
        environment = os.environ | {"SANA_BUILD": "tiles", "SANA_CUDA": "0"}
        built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    path = next((BUILD / "sana_kernels").glob("_cpu*.so"))
    return load_extension(str(path), "emulated._cpu")


@contextlib.contextmanager
def cpu():
    """Within, backend "cpu" runs on emulated tiles wherever an op has a kernel for AMX."""
    with mock.patch.dict(sys.modules, {"sana_kernels._cpu": module()}):
        backend.extension.cache_clear()
        try:
            assert backend.extension("_cpu")[0].isa() == "amx"
            yield
        finally:
            backend.extension.cache_clear()
