"""Runs the CUDA sources on the host: compiles them against csrc/emulator and lends tests a "device" to call them on.

    with emulated.device(seed=1):
        q = emulated.guarded(q)
        out = sana_kernels.linear_attention.cuda.linear_attention(q, ...)

In the `with`, `sana_kernels._cuda` is a module whose kernels are the .cu files, compiled by the C++ compiler. Buffers made
there end at a page that nobody may touch, so an access beyond them fails, and hold NaN until written. The seed is the order
in which blocks, warps and lanes run (csrc/emulator/machine.h); a kernel is right only if every order gives the same result.

Libraries are kept in build/emulator under a hash of everything that they are compiled from.
"""

import contextlib
import ctypes
import hashlib
import importlib.machinery
import importlib.util
import mmap
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import types
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch

from sana_kernels import backend

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulator"
CXX = os.environ.get("CXX", "c++").split()
# Type punning is common in CUDA sources; uninitialised locals hold a pattern; every library keeps its variables to itself.
FLAGS = (
    "-std=c++17 -O1 -fPIC -fno-strict-aliasing -ftrivial-auto-var-init=pattern -fno-gnu-unique"
    " -Wall -Wextra -Werror=attributes -Wno-unknown-pragmas -DSANA_EMULATED -include emulator/device.h"
).split()
ORDERS = (0, 1, 2)  # forward, backward, shuffled

Edit = tuple[str, str, str]  # (file under csrc or tests, what stands there once, what to put in its place)


@cache
def cuda_include() -> Path:
    """The folder of CUDA's own headers: those of a toolkit, or the copy in Triton's wheel. Skips the test without either."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    if (triton := importlib.util.find_spec("triton")) is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/include")
    for folder in folders:
        if (folder / "cuda_bf16.h").exists() and (folder / "crt/host_defines.h").exists():
            return folder
    pytest.skip("the emulator needs CUDA's headers: install the CUDA toolkit (and set CUDA_HOME) or the package triton")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


@cache
def _inputs() -> bytes:
    """What every library depends on, besides its own sources: headers, bindings, compiler."""
    headers = sorted([*CSRC.rglob("*.cuh"), *CSRC.rglob("*.h"), CSRC / "bind_cuda.cpp"])
    version = subprocess.run([*CXX, "--version"], capture_output=True, check=True).stdout
    return version + repr(FLAGS).encode() + b"".join(path.read_bytes() for path in headers)


def _edited(edits: tuple[Edit, ...]) -> dict[Path, str]:
    texts: dict[Path, str] = {}
    for name, old, new in edits:
        path = ROOT / name
        text = texts.get(path) or path.read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} places that read {old!r}; the edit needs exactly one"
        texts[path] = text.replace(old, new)
    return texts


def compile_kernels(sources: list[Path], edits: tuple[Edit, ...] = (), flags: tuple[str, ...] = ()) -> Path:
    """A shared library of .cu sources on the emulator, with `edits` applied to copies of the sources and headers."""
    texts = _edited(edits)
    contents = b"".join(texts[path].encode() if path in texts else path.read_bytes() for path in sources)
    digest = hashlib.sha256(_inputs() + contents + repr((edits, flags)).encode()).hexdigest()[:20]
    library = BUILD / f"lib{digest}.so"
    if library.exists():
        return library
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        for path, text in texts.items():
            copy = Path(folder) / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
        include = [f"-I{folder}/csrc", f"-I{CSRC}", "-isystem", str(cuda_include())]
        objects = [f"{folder}/{i}.o" for i in range(len(sources))]
        commands = []
        for path, output in zip(sources, objects, strict=True):
            source = Path(folder) / path.relative_to(ROOT) if path in texts else path
            commands.append([*CXX, *FLAGS, *flags, *include, "-xc++", "-c", str(source), "-o", output])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        _run([*CXX, "-shared", "-Wl,-Bsymbolic", *objects, "-o", f"{folder}/library"])
        os.replace(f"{folder}/library", library)  # another process may be building the same one
    return library


def load(source: str, *edits: Edit, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """One .cu source of the repository, for calls of its extern "C" functions."""
    return ctypes.CDLL(str(compile_kernels([ROOT / source], edits, flags)))


@cache
def _binding() -> Path:
    """csrc/bind_cuda.cpp as an object file."""
    import pybind11

    source = CSRC / "bind_cuda.cpp"
    digest = hashlib.sha256(_inputs() + sys.version.encode()).hexdigest()[:20]
    output = BUILD / f"{digest}.o"
    if not output.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        python = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            flags = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", f"-I{CSRC}"]
            _run([*CXX, *flags, *python, "-c", str(source), "-o", f"{folder}/o"])
            os.replace(f"{folder}/o", output)
    return output


def cuda_module(*edits: Edit) -> types.ModuleType:
    """The module sana_kernels._cuda with every kernel of csrc on the emulator.

    The kernels are a library of their own, because their machine poisons all thread_local variables of its library.
    """
    kernels = compile_kernels(sorted(CSRC.rglob("*.cu")), edits)
    module = BUILD / f"_cuda_{kernels.stem}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if not module.exists():
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            info = Path(folder) / "build_info.cpp"
            info.write_text('extern "C" const char* sana_build_info() { return "{}"; }\n')
            link = [*CXX, "-shared", "-fPIC", str(info), str(_binding()), str(kernels), "-Wl,-rpath,$ORIGIN"]
            _run([*link, "-o", f"{folder}/module"])
            os.replace(f"{folder}/module", module)
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(module))
    loaded = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda", loader))
    loader.exec_module(loaded)
    return loaded


_libc = ctypes.CDLL(None, use_errno=True)
_PAGE = mmap.PAGESIZE
_CANARY = 0xFF  # NaN in every floating dtype


class _Buffers:
    """Memory whose end, rounded up to 16 bytes, is the beginning of a page that may not be touched."""

    def __init__(self):
        self.live: list[tuple[mmap.mmap, int, int]] = []

    def empty(self, size, dtype: torch.dtype, device=None) -> torch.Tensor:
        shape = torch.Size([size] if isinstance(size, int) else size)
        used = shape.numel() * dtype.itemsize
        pages = max(1, -(-used // _PAGE)) * _PAGE
        memory = mmap.mmap(-1, pages + _PAGE)
        memory.write(bytes([_CANARY]) * pages)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if _libc.mprotect(ctypes.c_void_p(address + pages), ctypes.c_size_t(_PAGE), 0) != 0:  # PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect failed")
        start = pages - -(-used // 16) * 16
        self.live.append((memory, start, start + used))
        return torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=start).view(shape)

    def check(self) -> None:
        for memory, start, end in self.live:
            pages = len(memory) - _PAGE
            touched = [i for i in (*range(start), *range(end, pages)) if memory[i] != _CANARY]
            where = [i - start if i < start else i - end for i in touched]
            assert not touched, f"{len(touched)} bytes outside of a buffer were written, the first at {where[0]:+d}"


_buffers = _Buffers()


def guarded(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A contiguous copy that faults when it is overrun; to be called within `device`."""
    if tensor is None:
        return None
    return _buffers.empty(tensor.shape, tensor.dtype).copy_(tensor)


@contextlib.contextmanager
def device(module: types.ModuleType | None = None, seed: int = 0):
    """Within, CUDA modules of sana_kernels run on the emulator and take CPU tensors; afterwards the buffers are checked."""
    global _buffers
    module = module or cuda_module()
    _buffers = _Buffers()
    stream = types.SimpleNamespace(cuda_stream=0)
    with (
        mock.patch.dict(sys.modules, {"sana_kernels._cuda": module}),
        mock.patch.dict(os.environ, {"SANA_EMULATOR_SEED": str(seed)}),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: stream),
        mock.patch.object(torch, "empty", _buffers.empty),
    ):
        backend.extension.cache_clear()
        try:
            yield
            _buffers.check()
        finally:
            backend.extension.cache_clear()


@cache
def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return next(filter(None, map(shutil.which, [os.environ.get("NVCC", "nvcc"), f"{home}/bin/nvcc"])), None)
