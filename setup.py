"""Builds the two extension modules with ninja. Needs a C++17 compiler; wants nvcc; never sees torch.

    sana_kernels._cpu    always: csrc/**/*.cpp, one translation unit per instruction set, chosen at run time by cpuid
    sana_kernels._cuda   where nvcc is found: csrc/**/*.cu and csrc/bind_cuda.cpp

Neither includes torch, so one build serves every torch version, and `pip install .` works in an isolated environment.
Everything else about the package is in pyproject.toml. Objects, logs (with the register and spill counts of every CUDA
kernel) and build.ninja stay in build/<python ABI>/, so a second build recompiles only what changed.

Environment:
    SANA_CUDA        auto (default: a failing nvcc costs _cuda, not the installation) | 0 (no) | 1 (yes, or stop)
    SANA_CUDA_ARCHS  auto (default: this machine's GPU, else 90a;compute_80) | all | a list like "80;90a;compute_80"
                     (80 is a cubin for sm_80; compute_80 is PTX that newer GPUs compile when the module loads)
    SANA_BUILD       asan | tiles: a build for tests, in a folder of its own
    MAX_JOBS         compile jobs at once (default: one per core, and per 2 GB of memory)
    CXX, NVCC        the compilers
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

# Builds for tests, besides the plain one: with AddressSanitizer, and with AMX tiles emulated (csrc/emulator/tiles.h).
VARIANTS = {"": "", "asan": "-O1 -fsanitize=address -fno-omit-frame-pointer -g", "tiles": "-DSANA_EMULATE_TILES"}
VARIANT = os.environ.get("SANA_BUILD", "")
if VARIANT not in VARIANTS:
    sys.exit(f"SANA_BUILD={VARIANT} is not known; choose asan or tiles, or leave it out")
OUT = Path("build") / f"{sysconfig.get_config_var('SOABI')}{VARIANT and '-'}{VARIANT}"

CXX = os.environ.get("CXX", "c++")
CXX_FLAGS = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Icsrc {VARIANTS[VARIANT]}".strip()
NVCC_FLAGS = f"-std=c++17 -O3 -Icsrc -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden -ccbin {CXX.split()[-1]}"

# A file's suffix names its instruction set. Never -march=native: the module must run on any machine of the same family.
AVX2 = "-mavx2 -mfma -mf16c"
AVX512VNNI = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512"
AVX512 = f"{AVX512VNNI} -mavx512bf16"
AMX = f"{AVX512} -mamx-tile -mamx-int8 -mamx-bf16" if VARIANT != "tiles" else AVX512
ISA_FLAGS = {"avx2": AVX2, "avxvnni": f"{AVX2} -mavxvnni", "avx512vnni": AVX512VNNI, "avx512": AVX512, "amx": AMX}

ALL_ARCHS = ["80", "86", "89", "90a", "100f", "120f", "compute_80"]


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def isa_tiers() -> list[str]:
    """The instruction sets that this compiler can target; on another processor family none."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    probe = [*CXX.split(), "-E", "-xc++", "/dev/null"]
    return [isa for isa, flags in ISA_FLAGS.items() if output_of(*probe, *flags.split()) is not None]


def isas_of(source: Path) -> list[str]:
    """What a file is compiled for, by the end of its name; "" for the baseline. All of AVX-512 is, with bf16 and without."""
    isa = source.stem.rpartition("_")[2]
    return ["avx512vnni", "avx512"] if isa == "avx512" else [isa if isa in ISA_FLAGS else ""]


def sources(suffix: str) -> list[Path]:
    """All of csrc but the emulator, which only the tests compile."""
    return [path for path in sorted(Path("csrc").rglob(f"*{suffix}")) if "emulator" not in path.parts]


def find_nvcc() -> str | None:
    """nvcc is asked to link, too: what `which` finds may be a wrapper script, which does not say where CUDA lives."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = [os.environ["NVCC"]] if "NVCC" in os.environ else ["nvcc", f"{home}/bin/nvcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


def cuda_archs() -> list[str]:
    wanted = os.environ.get("SANA_CUDA_ARCHS", "auto")
    if wanted == "all":
        return ALL_ARCHS
    if wanted != "auto":
        return wanted.replace(",", ";").split(";")
    present = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or ""
    # Hopper needs "a" for its wgmma and Blackwell "f" for its family; a cubin for 10.0 then also runs on 10.3.
    special = {"9.0": "90a", "10.0": "100f", "10.3": "100f", "12.0": "120f", "12.1": "120f"}
    archs = {special.get(cap, cap.replace(".", "")) for cap in present.split()}
    return sorted(archs) or ["90a", "compute_80"]


def gencode(arch: str) -> str:
    code = arch if arch.startswith("compute_") else f"sm_{arch}"
    return f"-gencode arch=compute_{arch.removeprefix('compute_')},code={code}"


def jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(os.environ.get("MAX_JOBS") or max(1, min(cores, memory // 2**31)))


def write_if_changed(path: Path, text: str) -> None:
    """An unchanged file keeps its time, so that ninja does not rebuild what depends on it."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class CleanBuild(build):
    """`pip install .` builds inside the checkout and packs whatever lies in build/lib*, also from an earlier build."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    """Compiles both modules, CUDA first: what became of it is compiled into _cpu, for the diagnostics."""

    def build_extensions(self):
        os.chdir(ROOT)  # relative paths keep the commands, and so the modules, free of where the checkout lies
        self.tiers = isa_tiers()
        self.info = {
            "version": self.distribution.get_version(),
            "git": output_of("git", f"--git-dir={ROOT / '.git'}", "describe", "--always", "--dirty", "--exclude=*"),
        }
        modules = {extension.name.rpartition(".")[2]: extension for extension in self.extensions}
        self.cuda_off = self.build_cuda(modules["_cuda"])
        self.build_cpu(modules["_cpu"])

    def build_cpu(self, extension: Extension) -> None:
        isa = {tier: ISA_FLAGS[tier] for tier in self.tiers}
        compiler = (output_of(*CXX.split(), "--version") or CXX).splitlines()[0]
        info = {"cxx": compiler, "cxx_flags": CXX_FLAGS, "isa": isa, "cuda_off": self.cuda_off}
        files = [path for path in sources(".cpp") if path.name != "bind_cuda.cpp"]
        self.ninja(extension, files, info, link=f"{CXX} -shared -pthread {VARIANTS[VARIANT]}".strip())

    def build_cuda(self, extension: Extension) -> str | None:
        """Builds _cuda; or says why not."""
        wanted = os.environ.get("SANA_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise CompileError(f"SANA_CUDA={wanted} is not known; choose auto, 0 or 1")
        if wanted == "0":
            return "switched off by SANA_CUDA=0 at build time"
        nvcc = find_nvcc()
        if nvcc is None:
            reason = "no nvcc was found at build time; install the CUDA toolkit or set NVCC"
        else:
            archs = cuda_archs()
            version = (output_of(nvcc, "--version") or "unknown").splitlines()[-2:][0]
            info = {"nvcc": version, "nvcc_flags": NVCC_FLAGS, "cuda_archs": archs}
            compile_cu = " ".join([nvcc, NVCC_FLAGS, *map(gencode, archs)])
            files = [*sources(".cu"), Path("csrc/bind_cuda.cpp")]
            try:
                self.ninja(extension, files, info, link=f"{nvcc} -shared -cudart static", nvcc=compile_cu)
                return None
            except CompileError as error:
                reason = f"nvcc failed at build time: {error}"
        if wanted == "1":
            raise CompileError(f"SANA_CUDA=1, but {reason}")
        self.warn(f"building without CUDA: {reason}")
        return reason

    def copy_extensions_to_source(self):
        """An editable install: a _cuda of an earlier build must not outlive the build that left it out."""
        if self.cuda_off:
            (ROOT / self.get_ext_filename("sana_kernels._cuda")).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def ninja(self, extension: Extension, files: list[Path], info: dict, link: str, nvcc: str = "") -> None:
        """Writes build.ninja for one module, runs it, and puts the module where setuptools expects it."""
        import pybind11

        out = OUT / extension.name
        write_if_changed(out / "build_info.cpp", build_info_source(self.info | info))
        have = " ".join(f"-DSANA_HAVE_{tier.upper()}=1" for tier in self.tiers)
        # Only the bindings see Python: the path of an isolated build's pybind11 changes every time.
        python = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
        rules = f"""
builddir = {out}
rule cxx
  command = {CXX} {CXX_FLAGS} {have} $flags -MMD -MF $out.d -c $in -o $out
  description = c++ $in
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {nvcc} -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || {{ cat $out.log; exit 1; }}
  description = nvcc $in
  depfile = $out.d
  deps = gcc
rule link
  command = {link} $in -o $out
  description = link $out
"""
        objects = []
        for source in [*files, out / "build_info.cpp"]:
            place = source.name if source.is_relative_to(out) else source
            for isa in isas_of(source):
                if isa not in ("", *self.tiers):
                    continue
                objects.append(f"{out}/{place}{isa and '.'}{isa}.o")
                flags = ISA_FLAGS.get(isa, python if source.name.startswith("bind_") else "")
                compiler = "nvcc" if source.suffix == ".cu" else "cxx"
                rules += f"build {objects[-1]}: {compiler} {source}\n  flags = {flags}\n"
        module = out / "module.so"
        rules += f"build {module}: link {' '.join(objects)}\n"
        write_if_changed(out / "build.ninja", rules.lstrip())
        command = [sys.executable, "-m", "ninja", "-f", str(out / "build.ninja"), f"-j{jobs()}"]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(result.stdout, flush=True)
        if result.returncode:
            errors = [line for line in result.stdout.splitlines() if "error" in line or "fatal" in line]
            raise CompileError("; ".join(errors[:3]) or f"{' '.join(command)} exited with {result.returncode}")
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a running process keeps the old file instead of crashing on a changed one
        shutil.copyfile(module, target)


def build_info_source(info: dict) -> str:
    return f"""// Written by setup.py.
extern "C" const char* sana_build_info();
extern "C" const char* sana_build_info() {{
  return R"json({json.dumps(info)})json";
}}
"""


def packages() -> dict[str, str]:
    """Package name → folder; export/ and bench/ are names too common to install as they are."""
    tops = {"sana_kernels": "sana_kernels", "sana_model": "sana_model", "sana_export": "export", "sana_bench": "bench"}
    found = dict(tops)
    for name, folder in tops.items():
        found |= {f"{name}.{inner}": f"{folder}/{inner.replace('.', '/')}" for inner in find_packages(folder)}
    return found


setup(
    packages=list(packages()),
    package_dir=packages(),
    include_package_data=False,
    package_data={"": ["**/*.json", "**/*.txt", "**/*.safetensors", "checkpoints/**"]},
    exclude_package_data={"sana_bench": ["results/**", "notes/**"]},
    ext_modules=[Extension("sana_kernels._cpu", []), Extension("sana_kernels._cuda", [], optional=True)],
    cmdclass={"build": CleanBuild, "build_ext": NinjaBuild},
)
