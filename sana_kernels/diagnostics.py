"""What this machine can run, and why the rest is off: `python -m sana_kernels`.

`describe()` gathers it as one JSON-able dict, which every benchmark result carries; `render` makes it readable.
"""

import importlib.metadata
import os
import platform
import subprocess

import psutil
import torch

from sana_kernels import backend

BUILD = "pip install --force-reinstall --no-deps ."
HELP = {
    "cpu": f"{BUILD}    (in the checkout; needs a C++17 compiler)",
    "cuda": f"SANA_CUDA=1 {BUILD}    (in the checkout; needs nvcc)",
    "triton": "pip install triton",
    "gpu": "pip install --force-reinstall torch    (a build with CUDA, on a machine where nvidia-smi lists a GPU)",
}
"""What is missing → the command that adds it."""

PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers", "onnxruntime", "tensorrt")


def describe() -> dict:
    """The machine, the versions, both builds and the op × backend matrix, as plain dicts, lists, strings and numbers.

    `build[module]` is what was compiled in, or {"missing": reason}. `matrix[op][backend]` is "runs", "off" (there is a
    kernel, this machine cannot run it; `backends[backend]` says why, and `help[backend]` what to do) or "none".
    """
    status = {name: backend.backend_status(name) for name in backend.BACKENDS}
    return {
        "machine": _machine(),
        "gpus": _gpus(),
        "versions": {"sana-kernels": _version("sana-kernels"), "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "build": {name: _build_info(name) for name in ("_cpu", "_cuda")},
        "backends": status,
        "help": {name: HELP[_missing(name)] for name, reason in status.items() if reason},
        "matrix": {op: {name: _cell(op, name, status[name]) for name in backend.BACKENDS} for op in backend.OPS},
    }


def render(found: dict) -> str:
    """The dict of `describe` as text for a terminal."""
    machine, build = found["machine"], found["build"]
    lines = ["machine"]
    lines += _rows(
        {
            "CPU": f"{machine['cpu']}, {machine['cores']} cores",
            "instructions": f"{machine['isa']} in use; found: {', '.join(machine['isa_found'])}",
            "memory": f"{machine['memory_gib']} GiB",
            "system": machine["system"],
        }
        | {f"GPU {i}": _gpu_line(gpu) for i, gpu in enumerate(found["gpus"])}
        | ({} if found["gpus"] else {"GPU": f"none in use: {machine['gpu_off']}"})
    )
    lines += ["", "versions", *_rows({name: version or "not installed" for name, version in found["versions"].items()})]
    for module, info in build.items():
        lines += ["", f"build of sana_kernels.{module}"]
        lines += _rows({key: _flat(value) for key, value in info.items() if value is not None})
    width = max(map(len, found["matrix"])) + 2
    lines += ["", " " * (width + 2) + "".join(f"{name:<11}" for name in found["backends"])]
    for op, cells in found["matrix"].items():
        lines.append(f"  {op:<{width}}" + "".join(f"{_MARKS[cell]:<11}" for cell in cells.values()).rstrip())
    off = {name: reason for name, reason in found["backends"].items() if reason}
    for name, reason in off.items():
        lines += ["", f"{name} is off: {reason}", f"  to turn it on: {found['help'][name]}"]
    return "\n".join(lines)


_MARKS = {"runs": "yes", "off": "off", "none": "-"}


def _machine() -> dict:
    module, _ = backend.extension("_cpu")
    kinds = module.peak_kinds() if module else []  # named after the instruction sets: fp32_avx2, int8_amx, copy
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": module.isa() if module else None,
        "isa_found": list(dict.fromkeys(kind.partition("_")[2] for kind in kinds if "_" in kind)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpu_off": _gpu_off(),
    }


def _cpu_name() -> str:
    """As the processor calls itself; platform.processor() is empty on most Linux systems."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            names = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _gpu_off() -> str | None:
    """Why torch drives no GPU here, or None."""
    if torch.cuda.is_available():
        return None
    driver = "an NVIDIA driver answers" if _nvidia_smi("name") else "no NVIDIA driver answers (nvidia-smi)"
    return f"{driver}, and torch {torch.__version__} is a build {'with' if torch.version.cuda else 'without'} CUDA"


def _gpus() -> list[dict]:
    driver = _nvidia_smi("driver_version")
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "driver": driver[0] if driver else None,
                "cuda": torch.version.cuda,
            }
        )
    return gpus


def _gpu_line(gpu: dict) -> str:
    return "{name}, compute capability {capability}, {memory_gib} GiB, driver {driver}, torch's CUDA {cuda}".format(
        **gpu
    )


def _nvidia_smi(field: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[:-1]
    except (OSError, subprocess.SubprocessError):
        return []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build_info(name: str) -> dict:
    module, error = backend.extension(name)
    if module:
        return module.build_info()
    cpu, _ = backend.extension("_cpu")
    why = cpu.build_info()["cuda_off"] if cpu and name == "_cuda" else None
    return {"missing": why or error}


def _missing(name: str) -> str:
    """Which entry of HELP turns a backend on that is off."""
    if name in ("triton", "library"):
        return "triton" if name == "triton" and not _version("triton") else "gpu"
    return name if backend.extension(f"_{name}")[0] is None else "gpu"


def _cell(op: str, name: str, status: str | None) -> str:
    if name not in {kernel.backend for kernel in backend.kernels(op)}:
        return "none"
    return "off" if status else "runs"


def _rows(values: dict[str, str]) -> list[str]:
    return [f"  {key:<13} {value}" for key, value in values.items()]


def _flat(value: object) -> str:
    """A list's items or a dict's keys in one line; the flags of every instruction set are for the JSON only."""
    return ", ".join(map(str, value)) if isinstance(value, list | dict) else str(value)
