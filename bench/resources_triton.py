"""What every Triton kernel needs on every target, and how long it should take. Needs Triton, but no GPU and no driver.

    python -m sana_bench.resources_triton     from the checkout: compiles every kernel ahead of time in every tile of
                                              sana_kernels/tiles.json, and writes bench/notes/triton_resources.md
    ... --check                               writes nothing: does another version of Triton take them?

The functions of sana_kernels/*/triton.py are called with meta tensors of SANA's shapes, and what they would launch is
compiled instead: the same tiles, constants and alignments. Fails when a kernel has local memory (registers that were
spilled), or when a kernel of fp32 operands computes in TF32.
"""

import argparse
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import torch

from sana_bench.resources import ROOT, parse
from sana_kernels import tiles

NOTES = ROOT / "bench" / "notes" / "triton_resources.md"
TARGETS = (80, 89, 90, 100, 120)
COMMAND = "python -m sana_bench.resources_triton"
MODULES = ("modulate", "gemm", "linear_attention", "mix_ffn")
BF16, FP32, INT8, FP8 = torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn
NAMES = {BF16: "bf16", FP32: "fp32", torch.float16: "fp16", INT8: "int8", FP8: "fp8"}
TYPES = NAMES | {INT8: "i8", FP8: "fp8e4nv"}  # as Triton names them
FP8_SINCE = 89  # Ampere has no instruction for it
# An H200-class GPU, the first two as measured; its tensor cores do 8 bits at twice that rate.
COPY, BF16_RATE, PROCESSORS = 4.3e12, 790e12, 132  # bytes/s, FLOP/s
SCALAR_RATE = PROCESSORS * 128 * 1.7e9  # instructions/s of one lane each


@dataclass(frozen=True)
class Launch:
    """A kernel as it is compiled for a launch."""

    kernel: object  # triton.JITFunction
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[int, ...]  # arguments that are multiples of 16
    options: dict[str, object]
    bytes: int  # of all its tensors

    @property
    def tile(self) -> str:
        blocks = [str(value) for name, value in self.constants.items() if name.startswith("BLOCK")]
        return "×".join(blocks) + f" w{self.options['num_warps']}"


@dataclass(frozen=True)
class Case:
    """One call of one function on SANA-1.6B's shapes (2 images of 1024 px, C = 2240, F = 5600)."""

    name: str
    call: Callable[[], object]
    dtype: torch.dtype
    flops: float = 0  # on tensor cores
    instructions: float = 0  # of one lane, where they may be the bound


@dataclass(frozen=True)
class Row:
    """One kernel of a case on one target."""

    case: str
    kernel: str
    tile: str
    target: int
    registers: int
    shared: int
    local: int
    tf32: bool


def specialise(kernel, grid: tuple[int, ...], *args, **constants) -> Launch:
    """What Triton makes of the arguments of a launch: 1 and None become constants, and multiples of 16 are noted."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    aligned, size = [], 0
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            aligned.append(i)
            size += value.numel() * value.element_size()
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned += [i] if value % 16 == 0 else []
    return Launch(kernel, grid, signature, constants, tuple(aligned), options | {"enable_fp_fusion": True}, size)


def launches(call: Callable, target: int, tile: tiles.Tile | None = None) -> list[Launch]:
    """What call() launches on a GPU of this target, its matrix products in a given tile or in the table's."""
    found = []
    with ExitStack() as stack:
        for name in MODULES:
            module = importlib.import_module(f"sana_kernels.{name}.triton")
            stack.enter_context(mock.patch.object(module, "launch", lambda *a, **c: found.append(specialise(*a, **c))))
            if hasattr(module, "arch"):
                stack.enter_context(mock.patch.object(module, "arch", lambda device: target))
            if tile is not None and hasattr(module, "gemm_tile"):
                stack.enter_context(mock.patch.object(module, "gemm_tile", lambda *shape: tile))
        call()
    return found


def compile_launch(launch: Launch, target: int) -> tuple[int, int, int, bool]:
    """(registers, bytes of shared memory, bytes of local memory, whether TF32 occurs) of a launch on a target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    aligned = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch.options)
    ptx = compiled.asm["ptx"]
    # Of the target, but for Triton 3.4 and 3.5; a tool with a path, before 3.4 a pair.
    tool = get_ptxas(target) if inspect.signature(get_ptxas).parameters else get_ptxas()
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        arch = re.search(r"\.target (\w+)", ptx)[1]
        command = [getattr(tool, "path", None) or tool[0], "-v", f"--gpu-name={arch}", file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True)
    (usage,) = parse((log.stderr + log.stdout).replace("ptxas-blackwell", "ptxas"), launch.kernel.__name__, arch)
    return usage.registers, compiled.metadata.shared, usage.local, "tf32" in ptx


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scales(dtype: torch.dtype, *shape: int) -> torch.Tensor | None:
    return meta(*shape, dtype=FP32) if dtype in (INT8, FP8) else None


B, H, W, C, F, D = 2, 32, 32, 2240, 5600, 32
N = H * W


def cases() -> list[Case]:
    """Every kernel in every form that SANA calls it in."""
    modulate, gemm, attention, ffn = (importlib.import_module(f"sana_kernels.{name}.triton") for name in MODULES)
    x, row = meta(B, N, C), meta(B, 6, C)[:, 1]
    found = [
        Case("modulate bf16", lambda: modulate.modulate(x, row, row, 1e-6), BF16),
        Case("gate_residual bf16", lambda: modulate.gate_residual(x, x, row), BF16),
    ]
    for dtype in (INT8, FP8):
        name = NAMES[dtype]
        found += [
            Case(
                f"modulate → {name}", lambda dtype=dtype: modulate.modulate_quantized(x, row, row, 1e-6, dtype), dtype
            ),
            Case(f"quantize → {name}", lambda dtype=dtype: gemm.quantize(x, dtype), dtype),
        ]
    for dtype in (BF16, INT8, FP8, FP32):
        found += _gemm_cases(gemm, dtype)
    for dtype in (BF16, FP32):
        q, k, v = meta(B, N, 3, C // D, D, dtype=dtype).unbind(2)
        norm, most = meta(C, dtype=dtype), 64 if dtype == FP32 else 128
        wide = meta(B, N, 17, most, dtype=dtype)
        found += [
            Case(f"linear_attention {NAMES[dtype]}{name}", lambda a=args: attention.linear_attention(*a, 1e-5, 1e-15), dtype)
            for name, args in {
                "": (q, k, v, None, None), ", qk-norm": (q, k, v, norm, norm), f", D = {most}": (*[wide] * 3, None, None),
            }.items()
        ]  # fmt: skip
    for dtype in (BF16, INT8, FP8, FP32):
        args = meta(B, N, C, dtype=dtype), scales(dtype, B, N), meta(3 * C, C, dtype=dtype), scales(dtype, 3 * C)
        found.append(
            Case(
                f"linear_attention_from {NAMES[dtype]}",
                lambda a=args: attention.linear_attention_from(*a, D, 1e-15), dtype, flops=2 * B * N * C * 3 * C,
            )
        )  # fmt: skip
    instructions = B * N * F * (2 * 9 * 2.25 + 15)  # a tap: widen, multiply-add, an eighth of two loads; then the gate
    for dtype in (BF16, FP32):
        h, bias = meta(B, N, 2 * F, dtype=dtype), meta(2 * F, dtype=dtype)
        for name, weight in {
            "": meta(2 * F, 1, 3, 3, dtype=dtype), ", taps first": meta(9, 2 * F, dtype=dtype).t().view(2 * F, 1, 3, 3),
        }.items():  # fmt: skip
            args = h, H, W, weight, bias
            found.append(
                Case(
                    f"depthwise_glu {NAMES[dtype]}{name}", lambda a=args: ffn.depthwise_glu(*a), dtype,
                    instructions=instructions,
                )
            )  # fmt: skip
        if dtype == BF16:
            found += [
                Case(
                    f"depthwise_glu → {NAMES[eight]}", lambda a=args, e=eight: ffn.depthwise_glu_quantized(*a, e), eight,
                    instructions=instructions * 8192 / F,
                )
                for eight in (INT8, FP8)
            ]  # fmt: skip
    return found


def _gemm_cases(gemm, dtype: torch.dtype) -> list[Case]:
    out = FP32 if dtype == FP32 else BF16
    found = []
    for name, columns, inner, gated in (
        ("expand", 2 * F, C, False),
        ("attention out", C, C, True),
        ("project", C, F, True),
    ):
        inner = -(-inner // 64) * 64
        bias = None if name == "project" else meta(columns, dtype=out)
        frame = (meta(B, 6, C, dtype=out)[:, 2], meta(B, N, C, dtype=out)) if gated else (None, None)
        args = (
            meta(B, N, inner, dtype=dtype), scales(dtype, B, N), meta(columns, inner, dtype=dtype), scales(dtype, columns),
            bias, not gated, *frame, out,
        )  # fmt: skip
        found.append(
            Case(f"gemm {NAMES[dtype]}, {name}", lambda a=args: gemm.gemm(*a), dtype, 2 * B * N * columns * inner)
        )
    return found


def variants(case: Case, target: int) -> list[Launch]:
    """What a case launches, a matrix product in every tile of the table: another shape may take another."""
    if not case.name.startswith("gemm"):
        return launches(case.call, target)
    candidates = tiles.candidates(case.dtype, "expand" not in case.name, target)
    return [launch for tile, _ in candidates for launch in launches(case.call, target, tile)]


def measure(wanted: Iterable[Case], targets: Iterable[int] = TARGETS, say: Callable = print) -> list[Row]:
    """Compile every kernel for every target, the same one only once."""
    rows, known = [], {}
    for target in targets:
        for case in wanted:
            if case.dtype == FP8 and target < FP8_SINCE:
                continue
            for launch in variants(case, target):
                name = launch.kernel.__name__
                key = (target, name, str((launch.signature, launch.constants, launch.aligned, launch.options)))
                if key not in known:
                    known[key] = compile_launch(launch, target)
                    say(f"sm_{target} {case.name}: {name} {launch.tile}: {known[key]}")
                registers, shared, local, tf32 = known[key]
                rows.append(Row(case.name, name, launch.tile, target, registers, shared, local, tf32))
    return list(dict.fromkeys(rows))


def problems(rows: Iterable[Row]) -> list[str]:
    """Sentences on what must not be."""
    found = []
    for row in rows:
        where = f"{row.kernel} of {row.case} in {row.tile} on sm_{row.target}"
        if row.local:
            found.append(f"{where} keeps {row.local} bytes per thread in local memory")
        if row.tf32 and "fp32" in row.case:
            found.append(f"{where} computes in TF32")
    return found


def table(rows: list[Row]) -> str:
    """Markdown: a row per case, kernel and tile; registers and KiB of shared memory per target."""
    targets = sorted({row.target for row in rows})
    lines = [
        "| case | kernel | tile | " + " | ".join(f"sm_{t}" for t in targets) + " |",
        "|---" * 3 + "|---:" * len(targets) + "|",
    ]
    cells: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        cells.setdefault((row.case, row.kernel, row.tile), {})[row.target] = row
    for (case, kernel, tile), by_target in cells.items():
        texts = []
        for target in targets:
            row = by_target.get(target)
            local = f" + {row.local} B local" if row and row.local else ""
            texts.append(f"{row.registers}{local}, {row.shared / 1024:.0f} K" if row else "")
        lines.append(f"| {case} | `{kernel}` | {tile} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def expectations(wanted: Iterable[Case]) -> str:
    """Markdown: bytes, FLOPs and the expected time of every case on an H200-class GPU (sm_90)."""
    lines = ["| case | MB | GFLOP | expected µs | bound |", "|---|---:|---:|---:|---|"]
    for case in wanted:
        found = launches(case.call, 90)
        size = sum(launch.bytes for launch in found)
        rate = BF16_RATE * {1: 2, 2: 1, 4: 1 / 12}[case.dtype.itemsize]  # fp32 is multiplied by CUDA cores
        bounds = {
            "memory": size / COPY,
            "tensor cores" if case.dtype != FP32 else "CUDA cores": tensor_seconds(case, found, rate),
            "instructions": case.instructions / SCALAR_RATE,
        }
        bound = max(bounds, key=bounds.get)
        lines.append(
            f"| {case.name} | {size / 1e6:.1f} | {case.flops / 1e9:.1f} | {bounds[bound] * 1e6:.1f} | {bound} |"
        )
    return "\n".join(lines)


def tensor_seconds(case: Case, found: list[Launch], rate: float) -> float:
    """The model of tiles.gemm_tile in seconds: rounds of tiles, each at its speed; of other cases 70 % of the rate."""
    if not case.name.startswith("gemm"):
        return case.flops / rate / 0.7
    (launch,) = found
    m, n = launch.constants["BLOCK_M"], launch.constants["BLOCK_N"]
    (speed,) = (s for t, s in tiles.candidates(case.dtype, "expand" not in case.name, 90) if (t.m, t.n) == (m, n))
    rounds = -(-launch.grid[0] * launch.grid[1] // PROCESSORS)
    columns = 2 * F if "expand" in case.name else C
    return rounds * PROCESSORS * m * n / (B * N * columns) * case.flops / (rate * speed)


def main() -> int:
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed; `pip install triton` adds it", file=sys.stderr)
        return 3
    import triton

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compile, and write nothing")
    check = parser.parse_args().check
    wanted = cases()
    rows = measure(wanted)
    if not check:
        write_notes(wanted, rows, triton.__version__)
    found = problems(rows)
    for problem in found:
        print(f"FAIL {problem}")
    return 1 if found else 0


def write_notes(wanted: list[Case], rows: list[Row], version: str) -> None:
    NOTES.write_text(
        "# Registers, shared memory and expected time of every Triton kernel\n\n"
        f"Compiled ahead of time by Triton {version}, measured by its `ptxas -v`; written by `{COMMAND}`.\n"
        "fp16 compiles to the code of bf16 with another type. A tile is its BLOCK sizes and w warps; a cell is registers\n"
        "per thread and shared memory. Matrix products appear in every tile that sana_kernels/tiles.json offers. Spilled\n"
        "registers fail.\n\n"
        f"{table(rows)}\n\n"
        "## Expected time\n\n"
        "Written down before any of it ran on a GPU. SANA-1.6B, 2 images of 1024 px: C = 2240, F = 5600, N = 1024. An\n"
        "H200-class GPU as others measured it: copies at 4.3 TB/s, bf16 products at 790 TFLOP/s, 8 bits at twice that.\n"
        "Bytes are every tensor of every launch once; a product takes rounds of tiles, each at the speed that the table\n"
        "assumes, 1 being the peak; the projection of `linear_attention_from` at 70 % of it. Launches come on top, about\n"
        "2 µs each outside of CUDA graphs.\n\n"
        f"{expectations(wanted)}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
