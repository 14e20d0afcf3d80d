"""The one table of kernels: which backend computes which op, on which device, and why not.

Dispatch, the pipeline's plan, the tests, the benchmarks and `python -m sana_kernels` all read it. A kernel enters it
with `register` in the `__init__.py` of its op. `resolve` picks one: a backend asked for by name runs or raises, "auto"
takes the fastest that can run, and `explain` says what speaks against the others.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

OPS = (
    "linear_attention", "linear_attention_quantized", "linear_attention_from", "modulate", "modulate_quantized",
    "gate_residual", "cross_attention", "cross_attention_quantized", "mix_ffn", "depthwise_glu", "depthwise_glu_quantized",
    "gemm", "quantize", "gemm_w4a16", "gemm_w4a4", "quantize_int4", "conv2d", "upsample", "multi_scale", "rms_norm",
)  # fmt: skip
BACKENDS = ("cuda", "triton", "cpu", "library", "reference")  # fastest first; library: a fused GPU kernel of PyTorch's
CAP = "SANA_KERNELS_ISA"  # the variable that caps the instructions of the CPU kernels
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum DType of csrc/common/dtype.h


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run this op on these arguments; the message says why and what to do."""


@dataclass(frozen=True)
class Kernel:
    """One op on one backend. Both callables take the op's arguments by position, all of them, without `backend`."""

    op: str
    backend: str
    run: Callable  # → a tensor, or a pair for quantised rows; trusts what the op's public function has checked
    device: str  # cpu | cuda | any
    accepts: Callable[..., str | None]  # None, or a sentence that says what is supported; also for meta tensors


_kernels: dict[str, dict[str, Kernel]] = {op: {} for op in OPS}


def _accepts_anything(*args) -> None:
    return None


def register(
    op: str, backend: str, run: Callable, device: str = "any", accepts: Callable[..., str | None] = _accepts_anything
) -> None:
    """Enter a kernel into the table; a second one for the same op and backend replaces the first."""
    kernels = {**_kernels[op], backend: Kernel(op, backend, run, device, accepts)}
    _kernels[op] = {name: kernels[name] for name in BACKENDS if name in kernels}


def kernels(op: str) -> tuple[Kernel, ...]:
    """The registered kernels of an op, fastest first, whether this machine can run them or not."""
    return tuple(_kernels[op].values())


@cache
def extension(name: str) -> tuple[ModuleType | None, str]:
    """(the compiled module sana_kernels.<name>, "") or (None, why it could not be imported)."""
    try:
        return importlib.import_module(f"sana_kernels.{name}"), ""
    except ImportError as error:
        return None, str(error)


@cache
def backend_status(backend: str) -> str | None:
    """None where this machine can run the backend, else the reason why not. Looked up once per process."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not known; choose one of auto, {', '.join(BACKENDS)}")
    if backend in ("cpu", "cuda") and extension(f"_{backend}")[0] is None:
        why = extension(f"_{backend}")[1]
        if CAP in why:  # the module is there, and the variable's value is not known
            return why
        return f"its C++ module cannot be imported ({why}); `pip install .` builds it"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; `pip install triton` adds it"
    if backend in ("cuda", "triton", "library") and not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU" if torch.version.cuda else "this torch is a build without CUDA"
    if backend == "cuda" and (refusal := extension("_cuda")[0].refusal()):
        return (
            f"CUDA does not load its kernels here ({refusal}); update the driver, or build for this GPU:"
            " `SANA_CUDA=1 pip install .` on this machine"
        )
    return None


def needs_grad(args: tuple) -> bool:
    """Does autograd expect to differentiate through a call with these arguments?"""
    return torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)


def _objection(kernel: Kernel, args: tuple, device: str) -> str | None:
    if kernel.device not in ("any", device):
        return f"it runs on {kernel.device} tensors, and these are on {device}"
    if kernel.backend != "reference":
        if (status := backend_status(kernel.backend)) is not None:
            return status
        if needs_grad(args):
            return "it is for inference only and an argument requires grad; call it under torch.inference_mode()"
    return kernel.accepts(*args)


def why_not(op: str, backend: str, *args, device: torch.device | str | None = None) -> str | None:
    """None where `backend` can compute op(*args), else a sentence that says why not.

    `args`: all arguments of the op by position, without `backend`; tensors on "meta" will do. `device`: where the op is
    going to run, for plans made ahead of time; by default the first argument's device.
    """
    kernel = _kernels[op].get(backend)
    if kernel is None:
        return backend_status(backend) or f"there is no {backend} kernel of {op}"
    return _objection(kernel, args, args[0].device.type if device is None else torch.device(device).type)


def resolve(op: str, backend: str, *args, device: torch.device | str | None = None) -> Kernel:
    """The kernel that computes op(*args): of the backend named, or with "auto" the fastest that can.

    Arguments as `why_not`. Raises BackendUnavailable with the reason. Every eager call of an op comes through here, so
    it only compares.
    """
    device_type = args[0].device.type if device is None else torch.device(device).type
    if backend == "auto":
        for kernel in _kernels[op].values():
            if kernel.device in ("any", device_type) and _objection(kernel, args, device_type) is None:
                return kernel
        reason = "; ".join(f"{name}: {why}" for name, why in explain(op, *args, device=device_type).items())
    else:
        reason = why_not(op, backend, *args, device=device_type)
        if reason is None:
            return _kernels[op][backend]
    raise BackendUnavailable(
        f"backend {backend!r} cannot run {op}: {reason}. `python -m sana_kernels` shows what this machine can run"
    )


def explain(op: str, *args, device: torch.device | str | None = None) -> dict[str, str | None]:
    """For every backend None (it can compute op(*args)) or the reason why not. Arguments as `why_not`."""
    return {backend: why_not(op, backend, *args, device=device) for backend in BACKENDS}


_library = torch.library.Library("sana", "DEF")


def define(op: str, schema: str, fake: Callable, returns: str = "Tensor") -> None:
    """Make torch.ops.sana.<op>, which torch.compile and torch.export see as one opaque op.

    `schema`: its arguments, those of `Kernel.run` and then `str backend`; `fake`: the same arguments → an empty result.
    define + impl, not custom_op: that costs 10 µs more per call (and eager calls take neither way).
    """

    def run(*args):
        *args, backend = args
        return resolve(op, backend, *args).run(*args)

    _library.define(f"{op}({schema}, str backend) -> {returns}")
    for key in ("CPU", "CUDA"):
        _library.impl(op, run, key)
    torch.library.register_fake(f"sana::{op}", fake, lib=_library)


def call(op: str, backend: str, *args):
    """Compute op(*args): straight through the kernel, or as torch.ops.sana.<op> where a compiler is watching.

    The compiler looks into the reference, which it may fuse and differentiate, and not into the others.
    """
    if torch.compiler.is_compiling() and backend != "reference" and not needs_grad(args):
        return getattr(torch.ops.sana, op)(*args, backend)
    return resolve(op, backend, *args).run(*args)
