"""What every CUDA kernel needs on every target: registers, shared memory, and no local memory. Needs nvcc, no GPU.

    python -m sana_bench.resources      from the checkout: compiles csrc/**/*.cu and writes bench/notes/cuda_resources.md

Fails when a kernel has local memory: registers that were spilled, or an array that could not be kept in registers.
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


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc was found; install the CUDA toolkit or set NVCC", file=sys.stderr)
        return 3
    usages = measure(nvcc, sources())
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release [\d.]+, V([\d.]+)", version)[1]
    NOTES.write_text(
        "# Registers per thread and shared memory of every CUDA kernel\n\n"
        f"As `ptxas -v` of CUDA {release} reports them; written by `{COMMAND}`. No kernel may have local memory\n"
        "(registers spilled to DRAM): that fails. Dynamic shared memory comes on top; the sources give its size.\n\n"
        f"{table(usages)}\n"
    )
    print(table(usages))
    offenders = [u for u in usages if u.local]
    for u in offenders:
        print(f"FAIL {u.source}: {u.kernel} keeps {u.local} bytes per thread in local memory on sm_{u.target}")
    return 1 if offenders else 0


if __name__ == "__main__":
    sys.exit(main())
