"""What every CUDA kernel needs on every target: registers, shared memory, and no local memory. Needs nvcc, no GPU.

    python -m sana_bench.resources      from the checkout: compiles csrc/**/*.cu and writes bench/notes/cuda_resources.md

Fails when a kernel has local memory: registers that were spilled, or an array that could not be kept in registers. Beside
them stands what each op has to move and to compute for SANA's shapes, and the time that this should take.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count, environ
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT / "bench" / "notes" / "cuda_resources.md"
TARGETS = ("80", "86", "89", "90a", "100f", "120f")  # the cubins of ALL_ARCHS in setup.py
COMMAND = "python -m sana_bench.resources"


@dataclass(frozen=True)
class Usage:
    """One kernel on one target, as ptxas reports it."""

    source: str  # path in the repository
    kernel: str  # apply_kernel<__half, 64>
    target: str  # 90a
    registers: int  # per thread
    shared: int  # bytes per block whose size the source fixes; what a launch asks for comes on top
    local: int  # bytes per thread in local memory: spills and stack


def find_nvcc() -> str | None:
    """The compiler that setup.py would take."""
    home = environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = [environ["NVCC"]] if "NVCC" in environ else ["nvcc", f"{home}/bin/nvcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


def sources() -> list[Path]:
    return sorted((ROOT / "csrc").rglob("*.cu"))


def compile_log(nvcc: str, source: Path, target: str) -> str:
    """What ptxas -v says of one source on one target. Raises RuntimeError with the compiler's output."""
    arch = f"-gencode=arch=compute_{target},code=sm_{target}"
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-fatbin", arch, "-o", "/dev/null"]
    result = subprocess.run([nvcc, *flags, str(source)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{target}:\n{result.stderr}")
    return result.stderr


def parse(log: str, source: str, target: str) -> list[Usage]:
    """The kernels in a log of ptxas -v."""
    usages = []
    for part in re.split(r"ptxas info\s*: Compiling entry function ", log)[1:]:
        name = re.match(r"'(\S+)'", part)[1]
        numbers = {
            what: sum(map(int, re.findall(pattern, part)))
            for what, pattern in {
                "registers": r"Used (\d+) registers",
                "shared": r"(\d+) bytes smem",
                "stack": r"(\d+) bytes stack frame",
                "spills": r"(\d+) bytes spill stores",
            }.items()
        }
        local = max(numbers["stack"], numbers["spills"])  # spilled registers lie in the stack frame, too
        usages.append(Usage(source, name, target, numbers["registers"], numbers["shared"], local))
    return usages


def readable(names: Iterable[str]) -> dict[str, str]:
    """Mangled kernel name → apply_kernel<__half, 64>; as it is where c++filt is missing."""
    names = sorted(set(names))
    if shutil.which("c++filt") is None:
        return {name: name for name in names}
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"\((?!anonymous).*", "", line) for line in plain.splitlines()]  # without the parameters
    short = [re.sub(r"\(anonymous namespace\)::|\bsana::|^void ", "", line) for line in short]
    return dict(zip(names, short, strict=True))


def measure(nvcc: str, paths: Iterable[Path], targets: Iterable[str] = TARGETS) -> list[Usage]:
    """Compile every source for every target."""
    jobs = [(path, target) for path in paths for target in targets]
    with ThreadPoolExecutor(cpu_count()) as pool:
        logs = list(pool.map(lambda job: compile_log(nvcc, *job), jobs))
    usages = []
    for (path, target), log in zip(jobs, logs, strict=True):
        usages += parse(log, str(path.relative_to(ROOT)), target)
    # A name contains a hash of how the file was compiled, other for every target, until it is made readable.
    names = readable(usage.kernel for usage in usages)
    return [Usage(u.source, names[u.kernel], u.target, u.registers, u.shared, u.local) for u in usages]


def table(usages: list[Usage]) -> str:
    """Markdown: a row per kernel, a column per target."""
    targets = [target for target in TARGETS if any(u.target == target for u in usages)]
    cells = {(u.source, u.kernel, u.target): u for u in usages}
    lines = [
        "| source | kernel | static shared, bytes | " + " | ".join(f"sm_{target}" for target in targets) + " |",
        "|" + "---|" * 3 + "---:|" * len(targets),
    ]
    for source, kernel in sorted({(u.source, u.kernel) for u in usages}):
        row = [cells[source, kernel, target] for target in targets]
        registers = [f"{u.registers}" + (f" + {u.local} B local" if u.local else "") for u in row]
        shared = " … ".join(map(str, sorted({u.shared for u in row})))
        lines.append(f"| {source} | `{kernel}` | {shared} | " + " | ".join(registers) + " |")
    return "\n".join(lines)


# An H200, per second. Bytes and bf16 operations as others measured them; int8 is twice bf16. mma.sync, which our products
# use, reaches about 60 % of wgmma's rate; of instructions, 132 multiprocessors start 4 per cycle, for 32 lanes each.
COPY, BF16, INT8, INSTRUCTIONS = 4.3e12, 790e12, 1580e12, 132 * 128 * 1.755e9
MMA_SYNC = 0.6


@dataclass(frozen=True)
class Work:
    """One op at one shape: what it cannot avoid."""

    op: str
    shape: str
    moved: float  # bytes
    operations: float  # multiplications and additions; of depthwise_glu instructions
    rate: float  # operations per second

    @property
    def seconds(self) -> float:
        return max(self.moved / COPY, self.operations / self.rate)

    @property
    def bound(self) -> str:
        return "memory" if self.moved / COPY >= self.operations / self.rate else "arithmetic"


def works() -> list[Work]:
    """SANA's ops in bf16 and int8: 1024 px with guidance (2 images) and 4096 px, a prompt, and the decoder at 1024 px."""
    found = []
    for model, C, F, B, N in (
        ("0.6B", 1152, 2880, 2, 1024),
        ("1.6B", 2240, 5600, 2, 1024),
        ("1.6B", 2240, 5600, 2, 16384),
    ):
        M, at = B * N, f"{model}, {B} x {N} tokens"
        flops = INSTRUCTIONS * 2
        found += [
            Work("linear_attention", at, 4 * M * C * 2, 4 * M * C * 33 * 2, BF16 * MMA_SYNC),
            Work("modulate", at, 2 * M * C * 2, 8 * M * C, flops),
            Work("modulate, int8", at, M * C * 3, 11 * M * C, flops),
            Work("gate_residual", at, 3 * M * C * 2, 2 * M * C, flops),
            Work("depthwise_glu", at, 3 * M * F * 2, 50 * M * F, INSTRUCTIONS),
            Work("quantize (after depthwise_glu)", at, M * F * 3, 3 * M * F, flops),
        ]
        for name, n, k, extra in (
            ("qkv", 3 * C, C, 0), ("out", C, C, 2), ("expand", 2 * F, C, 0), ("project", C, F, 2)
        ):  # fmt: skip
            moved = M * k + n * k + M * n * (2 + extra)
            found.append(Work(f"gemm W8A8, {name}", f"{at}: {M} x {n} x {k}", moved, 2 * M * n * k, INT8 * MMA_SYNC))
    for M in (16, 64, 300):
        N, K = 9216, 2304
        moved = N * K * (0.5 + 4 / 128) + 2 * M * (K + N)
        found.append(Work("gemm W4A16, up", f"Gemma-2-2B: {M} x {N} x {K}", moved, 2 * M * N * K, BF16 * MMA_SYNC))
    for side, C in ((1024, 128), (512, 256), (256, 512)):
        values, at = side * side * C, f"{side} x {side} x {C}"
        found += [
            Work("rms_norm + residual", f"decoder, {at}", 3 * values * 2, 9 * values, INSTRUCTIONS * 2),
            Work("conv2d, bias + SiLU", f"decoder, {at}", 2 * values * 2, 5 * values, INSTRUCTIONS * 2),
            Work("upsample, the end", f"decoder, to {at}", 2.5 * values * 2, 2 * values, INSTRUCTIONS * 2),
        ]
    return found


def expectations() -> str:
    """Markdown: a row per op and shape."""
    lines = ["| op | shape | MB | 10^9 operations | bound | expected, µs |", "|---|---|---:|---:|---|---:|"]
    for work in works():
        numbers = f"{work.moved / 1e6:.1f} | {work.operations / 1e9:.2f} | {work.bound} | {work.seconds * 1e6:.1f}"
        lines.append(f"| {work.op} | {work.shape} | {numbers} |")
    return "\n".join(lines)


def notes(release: str, measured: str) -> str:
    """The file that goes into bench/notes: what CUDA `release` reports, and what to expect."""
    return f"""# Registers per thread and shared memory of every CUDA kernel

As `ptxas -v` of CUDA {release} reports them; written by `{COMMAND}`. No kernel may have local memory
(registers spilled to DRAM): that fails. Dynamic shared memory comes on top; the sources give its size.

{measured}

## Bytes, operations and expected time on an H200

Written down before any of it was measured: what an op has to move between memory and chip in 16 bits (or in int8, where
it says so) and to compute, and the longer of the two times at 4.3 TB/s of copying, 790e12 bf16 operations per second,
twice that in int8, 60 % of either through mma.sync, and 4 instructions per cycle and multiprocessor (depthwise_glu: 50
per output). A launch takes 2 to 3 µs more (linear_attention has 3, with qk-norm 4); what lies in the L2 cache, 50 MB,
takes less. SVDQuant's W4A4 is for sm_80, 86 and 89.

{expectations()}
"""


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc was found; install the CUDA toolkit or set NVCC", file=sys.stderr)
        return 3
    usages = measure(nvcc, sources())
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    NOTES.write_text(notes(re.search(r"release [\d.]+, V([\d.]+)", version)[1], table(usages)))
    print(table(usages))
    offenders = [u for u in usages if u.local]
    for u in offenders:
        print(f"FAIL {u.source}: {u.kernel} keeps {u.local} bytes per thread in local memory on sm_{u.target}")
    return 1 if offenders else 0


if __name__ == "__main__":
    sys.exit(main())
