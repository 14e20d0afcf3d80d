"""`sana bench kernels [op]`: each op of the registry by itself, on the shapes of `cases`.

Every backend takes turns with plain PyTorch (the reference) and torch.compile of it; gemm's 8 bits on a GPU with the 8-bit
product of PyTorch's library (torch-8bit) and torch.compile of that. Each result is held to fp64 by FlashAttention's rule.
Inputs are cold: each call gets other tensors, and together they are twice the size of the last
cache (of a GPU's, four times). So the bytes that must cross the memory bus are the inputs, and the output only where it is
larger than that cache: of these is `gb_s`, and its share of the measured copy bandwidth. Where even 256 copies of a small
case's inputs are not that large, they are `cached`, and that share is left out.
"""

import itertools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_bench import check
from sana_bench.cases import Case, cases
from sana_bench.harness import Peaks, Results, gpu_times, interleave, product, statistics_ms
from sana_bench.outcome import Outcome
from sana_kernels.backend import BACKENDS, OPS, kernels, why_not
from sana_kernels.conv2d import ConvWeight, pack_conv2d
from sana_kernels.gemm import PACKED, fake_quantize, pack
from sana_kernels.gemm.reference import dequantize
from sana_kernels.mix_ffn import taps_first
from sana_kernels.quant.formats import Int4, dequantize_int4
from sana_model.errors import MissingError, UserError
from sana_model.plan import ON_GPU
from sana_model.settings import PRECISIONS, QUANTIZED

COMPILED, EIGHT_BIT = "torch-compile", "torch-8bit"
BASELINES = ("reference", COMPILED, EIGHT_BIT)
CONVOLUTIONS = {"conv2d": 1, "upsample": 4}  # and their phases
DEPTHWISE = {"depthwise_glu": 3, "depthwise_glu_quantized": 3, "mix_ffn": 7}  # and where their 3 × 3 weight stands
BATCH_SECONDS, MIN_CALLS = 0.2, 5  # of one repetition
MOST_COPIES, MOST_BYTES = 256, 2**30


@dataclass(frozen=True)
class Chosen:
    """One case in one dtype, and who computes it."""

    case: Case
    precision: str
    backends: tuple[str, ...]


def select(
    op: str | None, name: str, backends: str | None, dtypes: str, device: torch.device, quick: bool = False
) -> list[Chosen]:
    """What the flags of the command line ask for.

    Raises UserError for a name that is not known, and MissingError for a backend that was asked for by name and can run
    none of it. Without names, the backends are those that can.
    """
    if op is not None and op not in OPS:
        raise UserError(f"op {op!r} is not known; choose one of {', '.join(OPS)}")
    known = tuple(dict.fromkeys((*BACKENDS, *BASELINES)))
    wanted = backends.split(",") if backends else [b for b in known if b != COMPILED or not quick]
    precisions = dtypes.split(",")
    for what, given, names in (("backend", wanted, known), ("precision", precisions, PRECISIONS)):
        if unknown := [value for value in given if value not in names]:
            raise UserError(f"{what} {unknown[0]!r} is not known; choose from {', '.join(names)}")
    found = [case for case in cases(op) if any(text in case.name for text in name.split(","))]
    if device.type == "cuda":  # whose kernels take no transformed weights
        found = [case for case in found if "_winograd_" not in case.name]
    if not found:
        raise UserError(
            f"no case of {op or 'any op'} has {name!r} in its name; there are {', '.join(map(str, cases(op)))}"
        )
    pairs = [(case, precision) for case in found for precision in precisions if precision in case.precisions]
    if quick:
        pairs = smallest(pairs)
    chosen, reasons = [], {}
    for case, precision in pairs:
        meta = case.arguments(precision, "meta")
        able = [b for b in wanted if backends or usual(b, case, precision, device)]
        why = {b: objection(b, case, precision, meta, device) for b in able}
        reasons |= {b: reason for b, reason in why.items() if reason}
        chosen.append(Chosen(case, precision, tuple(b for b, reason in why.items() if reason is None)))
    if backends and (idle := [b for b in wanted if not any(b in one.backends for one in chosen)]):
        reason = reasons.get(idle[0], "no case has a precision that was asked for")
        raise MissingError(f"backend {idle[0]!r} can run none of it: {reason}; see `sana doctor`")
    return [one for one in chosen if one.backends and (backends or not of_baselines_alone(one))]


def smallest(pairs: list[tuple[Case, str]]) -> list[tuple[Case, str]]:
    """Of every op in every precision the case with the fewest multiply-adds."""
    least: dict[tuple[str, str], Case] = {}
    for case, precision in sorted(pairs, key=lambda pair: pair[0].macs):
        least.setdefault((case.op, precision), case)
    return [(case, precision) for (_, precision), case in least.items()]


def usual(backend: str, case: Case, precision: str, device: torch.device) -> bool:
    """Is a backend measured where nobody asked for it by name? PyTorch in 8 bits where it has a fast product, on a GPU; its
    plain form of W8A8, in fp64, never."""
    if backend not in BASELINES or precision not in QUANTIZED:
        return True
    return backend != "reference" and case.op == "gemm" and device.type == "cuda"


def objection(backend: str, case: Case, precision: str, meta: tuple, device: torch.device) -> str | None:
    """Why a backend cannot run a case; None where it can, as far as is known."""
    if backend == EIGHT_BIT and not (case.op == "gemm" and precision in QUANTIZED):
        return f"PyTorch multiplies 8 bits in gemm, in {' and '.join(QUANTIZED)}"
    if backend in (COMPILED, EIGHT_BIT):
        return None
    if case.op == "gemm" and _to_quantize(*meta[:3]):
        x, _, weight, *rest = meta
        reason = why_not("quantize", backend, x, weight.dtype, device=device)
        return reason or why_not("gemm", backend, *fake_quantize(x, weight.dtype, ""), weight, *rest, device=device)
    return why_not(case.op, backend, *meta, device=device)


def of_baselines_alone(one: Chosen) -> bool:
    """In 8 bits, as fp8 on a GPU without it: then there is nothing to compare."""
    return one.precision in QUANTIZED and not set(one.backends) - {*BASELINES}


@dataclass
class Measured(Outcome):
    """What is known of one backend on one case."""

    time: Callable[[], list[float]] | None = None
    check: dict = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)  # ms


class KernelBench:
    """`run()` measures; the rows are in `results.document`, added case by case."""

    def __init__(
        self, chosen: list[Chosen], device: torch.device, peaks: Peaks, results: Results, *, seed: int = 0, say=print
    ):
        self.chosen, self.device, self.peaks, self.results, self.seed, self.say = (
            chosen,
            device,
            peaks,
            results,
            seed,
            say,
        )

    def run(self, repeat: int) -> dict:
        self.peaks.probe({"copy"})
        with torch.inference_mode():
            for one in self.chosen:
                self.say(f"{one.case} {one.precision}: {', '.join(one.backends)}")
                self.results.replace(self.results.document["results"] + self.measure(one, repeat))
        return self.results.document

    def measure(self, one: Chosen, repeat: int) -> list[dict]:
        """The rows of one case."""
        truth = Outcome()
        found = self.attempt(truth, f"{one.case} {one.precision}", self.truth, one)
        measured = {backend: Measured(status=truth.status, reason=truth.reason) for backend in one.backends}
        if found is None:
            return [self.row_without(one, backend, m) for backend, m in measured.items()]
        inputs, plain, oracle = found
        for backend, m in measured.items():
            self.attempt(m, backend, self.first, one, backend, m, inputs, plain, oracle)

        def task(backend: str, m: Measured):
            return lambda i: self.attempt(m, backend, m.time) if m.status == "ok" else None

        tasks = {backend: task(backend, m) for backend, m in measured.items()}
        self.peaks.probe({"copy"}, windows=1)  # a window of it takes most of a second: not before each repetition
        kind = self.peaks.kind(one.precision)
        for name, samples, verdict in interleave(tasks, repeat, lambda: self.peaks.probe({kind})):
            m = measured[name]
            if m.count(verdict):
                m.samples += samples
        moved, cold = bytes_moved(inputs[0], plain, last_cache_bytes(self.device)), are_cold(inputs, self.device)
        rows = [
            self.row(one, backend, m, moved, cold) if m.status == "ok" else self.row_without(one, backend, m)
            for backend, m in measured.items()
        ]
        medians = {row["backend"]: row["timing"]["ms"]["median"] for row in rows if row["status"] == "ok"}
        for row in rows:
            if row["status"] == "ok":
                row["speedup"] = {
                    baseline: medians[baseline] / medians[row["backend"]]
                    for baseline in BASELINES
                    if baseline in medians and baseline != row["backend"]
                }
        return rows

    def attempt(self, outcome: Outcome, name: str, action: Callable, *args):
        """action(*args), or None where it can't be (`Outcome.attempt`)."""
        return outcome.attempt(name, lambda: None, self.say, action, *args)

    def truth(self, one: Chosen) -> tuple[list[tuple], Tensor | tuple, Tensor]:
        """Inputs, what plain PyTorch makes of the first, and that in fp64."""
        inputs = cold_inputs(one.case, one.precision, self.device, self.seed)
        return inputs, *expected(one.case.op, inputs[0])

    def first(
        self, one: Chosen, backend: str, m: Measured, inputs: list[tuple], plain: Tensor | tuple, oracle: Tensor
    ) -> None:
        """Prepare a backend, call it and compare it."""
        op = one.case.op
        call, own = runner(op, backend), [prepared(op, backend, given) for given in inputs]
        made = (values(op, t)[..., : oracle.shape[-1]] for t in (call(*own[0]), plain))  # without padding
        one_by_one = backend == "triton" and one.precision == "fp32"  # compiled for a GPU: PyTorch's are in parts
        m.check = check.kernel_check(*made, oracle, chain=one.case.chain if one_by_one else 0)
        m.time = partial(time_calls, call, own, self.device)

    def common(self, one: Chosen, backend: str, status: str) -> dict:
        return {
            "kind": "kernel", "name": str(one.case), "backend": backend, "precision": one.precision,
            "shape": one.case.shape, "status": status,
        }  # fmt: skip

    def row_without(self, one: Chosen, backend: str, m: Measured) -> dict:
        """Of a backend that could not be measured."""
        return self.common(one, backend, m.status) | {"reason": m.reason}

    def row(self, one: Chosen, backend: str, m: Measured, moved: int, cold: bool) -> dict:
        ms = statistics_ms(m.samples)
        seconds = ms["median"] / 1e3
        percent = {
            "copy": self.peaks.percent(moved, seconds, "copy") if cold else None,
            "arithmetic": self.peaks.percent(2 * one.case.macs, seconds, one.precision),
        }
        failures = [
            f"{value:.0f} % of the measured peak ({what})"
            for what, value in percent.items()
            if value is not None and value > 100
        ]
        passed = m.check["passed"] and not failures
        return self.common(one, backend, "ok" if passed else "FAIL") | {
            "timing": {
                "method": "cuda events" if self.device.type == "cuda" else "wall clock",
                "inputs": "cold" if cold else "cached", "warmup": 1, "n": len(m.samples), "rejected": m.rejected,
                "unsteady": m.unsteady, "ms": ms, "raw_ms": thinned(m.samples),
            },
            "work": {
                "gmac": one.case.macs / 1e9, "gib": moved / 2**30, "gb_s": moved / seconds / 1e9, "pct_of_peak": percent,
                "peak": {"arithmetic": self.peaks.kind(one.precision)},
            },
            "check": m.check | {"passed": passed, "failures": failures},
        }  # fmt: skip


def thinned(samples: list[float], most: int = 200) -> list[float]:
    """Every n-th sample, so that a file of kernel rows stays small enough to be committed."""
    return samples[:: -(-len(samples) // most)]


def runner(op: str, backend: str) -> Callable:
    """What computes an op on a backend: the registered kernel itself, or its reference under torch.compile."""
    own = "reference" if backend in BASELINES else backend
    run = _kernel(op, own)
    if op == "gemm":
        run = library_gemm if backend in (COMPILED, EIGHT_BIT) else run
        run = partial(_gemm, run, _kernel("quantize", own))
    return compiled(run) if backend == COMPILED else run


def compiled(run: Callable) -> Callable:
    """Under torch.compile, as if for the first time: Dynamo counts an op's recompilations over all cases of it, and from
    the ninth on it would run them eagerly without a word. What was compiled before is forgotten."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(run, mode="max-autotune-no-cudagraphs", dynamic=False)


def library_gemm(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """gemm as PyTorch alone can do it: 8-bit rows by its library's product, and in fp32 what follows."""
    if x_scale is None:
        return _kernel("gemm", "reference")(x, x_scale, weight, weight_scale, bias, silu, gate, residual, dtype)
    y = product(x.flatten(0, 1), weight).unflatten(0, x.shape[:2]).float() * (x_scale[..., None] * weight_scale)
    y = y if bias is None else y + bias.float()
    y = F.silu(y) if silu else y
    if residual is not None:
        y = residual + (y if gate is None else gate.unsqueeze(1) * y)
    return y.to(dtype)


def _kernel(op: str, backend: str) -> Callable:
    return next(kernel.run for kernel in kernels(op) if kernel.backend == backend)


def _gemm(run: Callable, quantize: Callable, x: Tensor, x_scale: Tensor | None, weight: Tensor, *rest) -> Tensor:
    """gemm, of rows that are perhaps quantised first."""
    if _to_quantize(x, x_scale, weight):
        x, x_scale = quantize(x, weight.dtype)
    return run(x, x_scale, weight, *rest)


def _to_quantize(x: Tensor, x_scale: Tensor | None, weight: Tensor) -> bool:
    """Has only the weight 8 bits, as in the cases "+quantize"?"""
    return x_scale is None and x.dtype != weight.dtype


def prepared(op: str, backend: str, arguments: tuple) -> tuple:
    """The arguments as a model hands them to this backend: weights are packed once, when it is loaded."""
    if op in CONVOLUTIONS:
        x, weight, scale, shape, *rest = arguments
        return x, pack_conv2d(ConvWeight(weight, scale, shape), CONVOLUTIONS[op], backend).values, scale, shape, *rest
    if backend in ON_GPU and op in DEPTHWISE:
        return tuple(taps_first(a) if i == DEPTHWISE[op] else a for i, a in enumerate(arguments))
    weights = {"gemm": (2,), "mix_ffn": (4, 9)}.get(op, ()) if backend == "cpu" else ()
    return tuple(pack(a) if i in weights and a.dtype in PACKED else a for i, a in enumerate(arguments))


def expected(op: str, arguments: tuple) -> tuple[Tensor | tuple, Tensor]:
    """What plain PyTorch makes of the arguments, and the truth in fp64: the values, where that is quantised rows."""
    plain, exact = runner(op, "reference")(*arguments), tuple(wide(a) for a in arguments)
    if op.endswith("_quantized"):  # the truth is what would be quantised, as rows: PyTorch is half a step away from it
        return plain, runner(op.removesuffix("_quantized"), "reference")(*exact[:-1]).flatten(2)
    return plain, values(op, runner(op, "reference")(*exact))


def values(op: str, result: Tensor | tuple) -> Tensor:
    """A result as one tensor: of quantised rows what they stand for."""
    if isinstance(result, Tensor):
        return result
    return dequantize_int4(Int4(*result)) if op == "quantize_int4" else dequantize(*result)


def wide(value: object) -> object:
    """An argument of the fp64 oracle: what is quantised, to fp8 as well, stays so."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point and value.itemsize > 1 else value
    return value.double() if isinstance(value, Tensor) and wide(value.dtype) == torch.float64 else value


def cold_inputs(case: Case, precision: str, device: torch.device, seed: int) -> list[tuple]:
    """As many copies of the arguments as it takes to be larger than the last cache, within reason."""
    first = case.arguments(precision, device, seed)
    one = max(1, size(first))
    copies = math.ceil(cold_bytes(device) / one) + 1
    copies = max(2, min(copies, MOST_COPIES, MOST_BYTES // one))
    return [first, *(clone(first) for _ in range(copies - 1))]


def cold_bytes(device: torch.device) -> int:
    """What inputs must come to together for each to have left the cache when its turn comes again.

    Of a GPU more, whose L2 cache may be two with a copy of a line in each, and evicts not only the oldest.
    """
    return (4 if device.type == "cuda" else 2) * last_cache_bytes(device)


def are_cold(inputs: list[tuple], device: torch.device) -> bool:
    """Are they together as large as that? Those of a small case are not, however many."""
    return sum(map(size, inputs)) >= cold_bytes(device)


def clone(arguments: tuple) -> tuple:
    """The same values elsewhere, in the same strides: views of one tensor become views of one copy."""
    storages: dict[int, Tensor] = {}

    def copy(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            flat = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage)
            storages[storage.data_ptr()] = flat.clone()
        return storages[storage.data_ptr()].as_strided(value.shape, value.stride(), value.storage_offset())

    return tuple(copy(value) for value in arguments)


def last_cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 64 MiB where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    names = [
        name for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE") if name in getattr(os, "sysconf_names", ())
    ]
    return next((size for name in names if (size := os.sysconf(name)) > 0), 2**26)


def bytes_moved(arguments: tuple, result: Tensor | tuple, cache: int) -> int:
    """What crosses the memory bus in one call on cold inputs; `result` as the op returns it, quantised or not."""
    read, written = size(arguments), size(result if isinstance(result, tuple) else (result,))
    return read + (written if written > cache else 0)


def size(values: tuple) -> int:
    """Bytes of the tensors among them."""
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def time_calls(call: Callable, inputs: list[tuple], device: torch.device) -> list[float]:
    """Milliseconds of single calls, each on other inputs, for at least 0.2 s and five calls."""
    return _time_on_gpu(call, inputs) if device.type == "cuda" else _time_on_cpu(call, inputs)


def _time_on_cpu(call: Callable, inputs: list[tuple]) -> list[float]:
    call(*inputs[-1])
    samples: list[float] = []
    over = time.perf_counter() + BATCH_SECONDS
    while len(samples) < MIN_CALLS or time.perf_counter() < over:
        arguments = inputs[len(samples) % len(inputs)]
        start = time.perf_counter()
        call(*arguments)
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def _time_on_gpu(call: Callable, inputs: list[tuple]) -> list[float]:
    samples: list[float] = []
    over = time.perf_counter() + BATCH_SECONDS
    for block in gpu_times(partial(call, *arguments) for arguments in itertools.cycle(inputs)):
        samples += block
        if len(samples) >= MIN_CALLS and time.perf_counter() >= over:
            break
    return samples
