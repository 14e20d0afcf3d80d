"""The TensorRT that is installed: `tensorrt`, or `tensorrt-rtx`, whose API is the same but for what stands here.

                   builds for                        builds without a GPU     plugins      after loading
    tensorrt       the GPU of this machine           no                       yes          ready
    tensorrt-rtx   RTX GPUs, Turing to Blackwell     yes                      none          compiled on first use

Both keep one logger for the whole process, the first that they are given, so there is one `Log` per library.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from sana_model.errors import MissingError, UserError

PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx", "tensorrt_rtx_bindings": "tensorrt-rtx"}
"""Import name → what it is called here; the second package of the two is nothing but names for the third."""
INSTALL = "pip install 'sana-kernels[tensorrt-rtx]' for RTX GPUs, or 'sana-kernels[tensorrt]' for the one that is here"


@dataclass(frozen=True)
class Library:
    """One of the two packages."""

    api: ModuleType
    name: str  # tensorrt | tensorrt-rtx

    @property
    def version(self) -> str:
        return self.api.__version__

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def targets(self) -> tuple[str, ...]:
        """What an engine can be built for: compute capabilities such as sm89, or the GPU that is here."""
        ahead = getattr(self.api, "ComputeCapability", None)
        names = [] if ahead is None else [name.lower() for name in ahead.__members__ if name.startswith("SM")]
        return (*names, "current")


def installed() -> tuple[list[Library], list[str]]:
    """The packages that can be imported, and why the others can't."""
    found, reasons = {}, []
    for module, name in PACKAGES.items():
        try:
            found.setdefault(name, Library(importlib.import_module(module), name))
        except (ImportError, OSError) as error:  # OSError: the package is there, its shared libraries are not
            reasons.append(f"{module}: {error}")
    return list(found.values()), reasons


def every() -> list[Library]:
    """The packages that are installed. Raises MissingError where there is none."""
    libraries, reasons = installed()
    if not libraries:
        raise MissingError(f"TensorRT is not installed ({'; '.join(reasons)}); install it with {INSTALL}")
    return libraries


def find(target: str = "current") -> tuple[Library, str]:
    """The library that builds for `target`, and the compute capability that this is.

    Raises UserError where those that are installed do not build for it, and MissingError for "current" without a GPU.
    """
    libraries = every()
    wanted, here = (gpu()[0], "this GPU, ") if target == "current" else (target, "")
    for library in libraries:
        if wanted in library.targets or (library.targets == ("current",) and _is_here(wanted)):
            return library, wanted
    known = "; ".join(f"{library} builds for {', '.join(library.targets)}" for library in libraries)
    raise UserError(
        f"no engine can be built for {here}{wanted}: {known}. `tensorrt` builds for the GPU that it runs on"
    )


def _is_here(capability: str) -> bool:
    try:
        return gpu()[0] == capability
    except MissingError:
        return False


def gpu(device: torch.device | None = None) -> tuple[str, str]:
    """Compute capability, such as sm89, and name of the GPU here. Raises MissingError without one."""
    if not torch.cuda.is_available():
        raise MissingError(
            "TensorRT engines run on NVIDIA GPUs, and torch sees none here; `sana export tensorrt --target sm89` (or"
            " another) builds for a GPU elsewhere, and --backend onnxruntime runs the same graphs on this CPU"
        )
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}", torch.cuda.get_device_name(device)


@cache
def log(library: Library):
    """The library's logger: remembers errors, warnings and the facts that a build ends with."""

    class Log(library.api.ILogger):
        def __init__(self):
            super().__init__()
            self.errors: list[str] = []
            self.facts: list[str] = []

        def log(self, severity, message: str) -> None:
            if severity <= library.api.ILogger.Severity.ERROR:  # INTERNAL_ERROR < ERROR < WARNING
                self.errors.append(message)
            elif message.startswith(("Layers:", "Total ")):
                self.facts.append(message)

        @contextmanager
        def collect(self) -> Iterator["Log"]:
            """Forget what was said before this block."""
            self.errors, self.facts = [], []
            yield self

    return Log()


def why(errors: list[str]) -> str:
    """The errors of a failed call in one sentence."""
    return "; ".join(dict.fromkeys(" ".join(error.split()) for error in errors)) or "without saying why"
