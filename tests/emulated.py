"""Runs the CUDA sources on the host: compiles them against csrc/emulator and lends tests a "device" to call them on.

    with emulated.device(emulated.cuda_module(), seed=1):
        q = emulated.guarded(q)
        out = sana_kernels.linear_attention.cuda.linear_attention(q, ...)

In the `with`, `sana_kernels._cuda` is a module whose kernels are the .cu files, compiled by the C++ compiler. Buffers made
there (torch.empty, guarded) end at a page that nobody may touch, so that an access beyond them fails, and hold NaN until
written. The seed is the order in which blocks, warps and lanes run (csrc/emulator/machine.h): a kernel is right only if
every order gives the same result.

Libraries are kept in build/emulator under a hash of everything that they are compiled from.
"""

import contextlib
import ctypes
import hashlib
import importlib.machinery
import importlib.util
import mmap
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import types
from collections.abc import Callable
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
# Type punning is common in CUDA sources; uninitialised locals hold a pattern; every library keeps its variables to itself;
# what the checks find is reported by csrc/emulator/machine.h, not by the compiler's own library.
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-DSANA_EMULATED", "-include", "emulator/device.h"),
    *("-fno-strict-aliasing", "-ftrivial-auto-var-init=pattern", "-fno-gnu-unique", "-U_FORTIFY_SOURCE"),
    *("-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero", "-fno-sanitize-recover"),
    *("-Wall", "-Wextra", "-Werror=attributes", "-Wno-unknown-pragmas"),
)
ORDERS = (0, 1, 2)  # forward, backward, shuffled

Edit = tuple[str, str, str]  # (file in the repository, what stands there once, what to put in its place)


@cache
def cuda_include() -> Path:
    """The folder of CUDA's own headers. Skips the test without them."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if not (folder / "cuda_bf16.h").exists():
        pytest.skip("the emulator needs CUDA's headers: install the CUDA toolkit, and set CUDA_HOME if it is elsewhere")
    return folder


@cache
def _toolchain() -> bytes:
    """What every object file depends on, besides its source and that one's headers."""
    version = subprocess.run([*CXX, "--version"], capture_output=True, check=True).stdout
    return f"{version} {sys.version} {cuda_include()}".encode()


@cache
def _headers(source: Path) -> dict[str, str]:
    """The headers of csrc that a source includes, itself or through others: name in the repository → text."""
    found, texts = {CSRC / "emulator" / "device.h", source}, {}  # the compiler's -include adds the first
    while found:
        path = found.pop()
        texts[str(path.relative_to(ROOT))] = text = path.read_text()
        found |= {CSRC / name for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE)}
        found -= {ROOT / name for name in texts}
    del texts[str(source.relative_to(ROOT))]
    return texts


def _run(*command: object) -> None:
    result = subprocess.run([*CXX, *map(str, command)], capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise RuntimeError(f"{' '.join(result.args)}\n{result.stderr}")


def _cached(name: str, key: object, make) -> Path:
    """build/emulator/<name with a hash of key for {}>; where it is missing, `make(file, scratch folder)` writes the file."""
    path = BUILD / name.format(hashlib.sha256(_toolchain() + repr(key).encode()).hexdigest()[:20])
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            make(Path(folder) / "result", Path(folder))
            os.replace(Path(folder) / "result", path)  # another process may be making the same one
    return path


def _edited(edits: tuple[Edit, ...]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name, old, new in edits:
        text = texts.get(name) or (ROOT / name).read_text()
        count = text.count(old)
        assert count == 1, f"{name} has {count} places that read {old!r}; an edit needs exactly one"
        texts[name] = text.replace(old, new)
    return texts


def _object(source: Path, edits: tuple[Edit, ...], flags: tuple[str, ...] = ()) -> Path:
    """`source` compiled for the emulator, as if it and the headers had been edited."""
    name = str(source.relative_to(ROOT))
    headers = _headers(source)
    texts = _edited(tuple(edit for edit in edits if edit[0] == name or edit[0] in headers))

    def make(result: Path, folder: Path) -> None:
        for edited, text in texts.items():
            (folder / edited).parent.mkdir(parents=True, exist_ok=True)
            (folder / edited).write_text(text)
        include = [f"-I{folder / 'csrc'}", f"-I{CSRC}", "-isystem", cuda_include()]
        _run(*FLAGS, *flags, *include, "-xc++", "-c", (folder if name in texts else ROOT) / name, "-o", result)

    return _cached("{}.o", (source.read_text(), sorted(headers.items()), texts, FLAGS, flags), make)


def _library(compile_one: Callable[[Path], Path], sources: list[Path]) -> Path:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    # Its name is in the key: libraries of one name would be taken for the same one when a module loads them.
    return _cached("lib{}.so", objects, lambda result, _: _run("-shared", "-Wl,-Bsymbolic", *objects, "-o", result))


def load(source: str, *edits: Edit, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """One .cu source of the repository, for calls of its extern "C" functions."""
    return ctypes.CDLL(str(_library(lambda path: _object(path, edits, flags), [ROOT / source])))


def _make_binding(result: Path, folder: Path) -> None:
    """bind_cuda.cpp and what setup.py would have written, in one object file."""
    import pybind11

    source = folder / "binding.cpp"
    source.write_text('#include "bind_cuda.cpp"\nconst char* sana_build_info() { return "{}"; }\n')
    include = [f"-I{CSRC}", "-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    _run("-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", *include, "-c", source, "-o", result)


def cuda_module(*edits: Edit, only: tuple[str, ...] = ("",)) -> types.ModuleType:
    """The module sana_kernels._cuda with every kernel of csrc on the emulator, as if the sources had been edited.

    only: beginnings of the names of the sources that the edits concern; the others need not be compiled for the sake of a
    header. The kernels are a library of their own, because their machine poisons all thread_local variables of its library.
    """

    def concerned(source: Path) -> bool:
        return str(source.relative_to(ROOT)).startswith(only)

    def compile_one(source: Path) -> Path:
        return _object(source, edits if concerned(source) else ())

    # Of an inline function that several objects have, the linker keeps the first: that of an edited one.
    sources = sorted(CSRC.rglob("*.cu"), key=lambda source: (not concerned(source), source))
    kernels = _library(compile_one, sources)
    source = CSRC / "bind_cuda.cpp"
    binding = _cached("binding_{}.o", (source.read_text(), sorted(_headers(source).items())), _make_binding)
    link = ("-shared", "-fPIC", binding, kernels, "-Wl,-rpath,$ORIGIN")
    path = _cached("_cuda_{}.so", link, lambda result, _: _run(*link, "-o", result))
    name = f"{path.stem}._cuda"  # pybind11 would take modules of one name for the same one
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


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
    """A copy with the same strides that faults when it is overrun; to be called within `memory` or `device`."""
    if tensor is None:
        return None
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _buffers.empty(extent, tensor.dtype).as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@contextlib.contextmanager
def memory(seed: int):
    """Within, kernels run in the order `seed`; afterwards the surroundings of all buffers made here are checked."""
    global _buffers
    _buffers = _Buffers()
    with mock.patch.dict(os.environ, {"SANA_EMULATOR_SEED": str(seed)}):
        yield
    _buffers.check()


@contextlib.contextmanager
def device(module: types.ModuleType, seed: int):
    """As `memory`; and the CUDA functions of sana_kernels take CPU tensors and run them on `module`, see cuda_module."""
    stream = types.SimpleNamespace(cuda_stream=0)
    with (
        memory(seed),
        mock.patch.dict(sys.modules, {"sana_kernels._cuda": module}),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: stream),
        mock.patch.object(
            torch.cuda, "get_device_properties", lambda *_: types.SimpleNamespace(multi_processor_count=1)
        ),
        mock.patch.object(torch, "empty", _buffers.empty),
    ):
        backend.extension.cache_clear()
        try:
            yield
        finally:
            backend.extension.cache_clear()


def run(module: types.ModuleType, function, *args, orders: tuple[int, ...] = ORDERS) -> tuple[torch.Tensor, ...]:
    """The tensors that function(*args) returns on `module`, which have to be of the same bytes in every order."""
    results = []
    for seed in orders:
        with device(module, seed):
            out = function(*(guarded(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))
            results.append([t.clone() for t in ((out,) if isinstance(out, torch.Tensor) else out)])
    for other in results[1:]:
        same = [torch.equal(_bytes(a), _bytes(b)) for a, b in zip(results[0], other, strict=True)]
        assert all(same), f"{function.__name__}: the result depends on the order in which threads run"
    return tuple(results[0])


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def defective(
    defects: dict[str, tuple[Edit, ...]], *smaller: Edit, only: tuple[str, ...] = ("",)
) -> dict[str, types.ModuleType]:
    """For every planted defect the module that has it; `smaller`: edits of all that leave less to compile."""

    def build(edits: tuple[Edit, ...]) -> types.ModuleType:
        return cuda_module(*edits, *smaller, only=only)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(defects, pool.map(build, defects.values()), strict=True))
