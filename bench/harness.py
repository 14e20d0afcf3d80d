"""How to measure on a machine whose speed changes: peaks, interleaving, statistics, and the file that results land in.

Variants are interleaved (A B C, B C A, …), so a slow minute hits all of them. Before and after each repetition the
machine's speed is probed; a repetition whose two probes differ by more than 10 % is repeated, up to a bound, and the
file says how often. Percentages are of the highest peak seen in the same run, on all the threads that the benchmark
uses. A probe counts all its time; a peak leaves out what others took of the processor meanwhile, as the median of short
calls does.
"""

import datetime
import gc
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import torch

from sana_bench import schema
from sana_kernels import diagnostics
from sana_kernels.backend import extension
from sana_model import files, heap
from sana_model.errors import MissingError

WINDOWS, WINDOW_SECONDS = 5, 0.1  # of a probe; nobody else takes time of a GPU, so one is enough there
MAX_DRIFT = 0.10

ARITHMETIC = {
    "fp32": ("fp32",), "bf16": ("bf16", "int16", "fp32"), "fp16": ("bf16", "fp32"), "fp8": ("fp8", "bf16", "fp32"),
    "w4a16": ("bf16", "fp32"),
    **dict.fromkeys(("w8a8", "w4a8", "w4a4"), ("int8", "int16", "bf16", "fp32")),
}  # fmt: skip
"""What a row of a precision may compute with, first its own: its peak is the fastest of these that the machine has."""
EIGHT_BITS = ("int8", "fp8")  # products that the library does not have on every chip


class Peaks:
    """The machine's peaks: operations per second by kind of arithmetic, bytes per second for "copy".

    `measure(kind, seconds)` is one window: the rate over all its time, and undisturbed. A probe is the best of `windows`.
    `best` collects the highest undisturbed rates of the whole run.
    """

    def __init__(
        self,
        kinds: list[str],
        measure: Callable[[str, float], tuple[float, float]],
        window: float = WINDOW_SECONDS,
        windows: int = WINDOWS,
    ):
        """`kinds`: names such as fp32_avx512 or int8 (the arithmetic, then what it runs on), and copy."""
        self.measure, self.window, self.windows = measure, window, windows
        self.best: dict[str, float] = {}
        for kind in kinds:
            try:
                _, self.best[kind] = measure(kind, window)
            except RuntimeError:
                if kind.split("_")[0] not in EIGHT_BITS:
                    raise
        glance = dict(self.best)
        self._kinds = {
            arithmetic: max((kind for kind in glance if kind.split("_")[0] == arithmetic), key=glance.__getitem__)
            for arithmetic in {kind.split("_")[0] for kind in glance}
        }
        self._unknown = {kind.split("_")[0] for kind in kinds} - self._kinds.keys()

    def kind(self, precision: str) -> str:
        """The fastest kind that a row of this precision ("copy": the memory) may use; its own unless one is 5 % faster."""
        allowed = ("copy",) if precision == "copy" else ARITHMETIC[precision]
        kinds = [self._kinds[a] for a in allowed if a in self._kinds]
        fastest = max(kinds, key=self.best.__getitem__)
        return kinds[0] if self.best[kinds[0]] > 0.95 * self.best[fastest] else fastest

    def probe(self, kinds: set[str], windows: int | None = None) -> dict[str, float]:
        """The rates now, over all the time; `windows` in place of the usual number."""
        now, windows = {}, windows or self.windows
        for kind in sorted(kinds):
            over_all, undisturbed = zip(*(self.measure(kind, self.window) for _ in range(windows)), strict=True)
            now[kind], self.best[kind] = max(over_all), max(self.best[kind], *undisturbed)
        return now

    def percent(self, amount: float, seconds: float, precision: str) -> float | None:
        """Share of the highest peak that `amount` operations (bytes, for "copy") in `seconds` come to, in per cent.

        None where the peak of the precision's own arithmetic could not be measured: another one would be wrong.
        """
        if precision != "copy" and ARITHMETIC[precision][0] in self._unknown:
            return None
        return 100 * amount / seconds / self.best[self.kind(precision)]


def peaks(device: torch.device, **options) -> Peaks:
    """The peaks of the device that the benchmark runs on. Raises MissingError without the extension module."""
    if device.type == "cuda":
        fp8 = torch.cuda.get_device_capability(device) >= (8, 9)
        kinds = [*(kind for kind in _GPU_OPERANDS if kind != "fp8" or fp8), "copy"]
        return Peaks(kinds, _gpu_rate, windows=1, **options)
    module, reason = extension("_cpu")
    if module is None:
        raise MissingError(f"the peaks of this machine cannot be measured: {reason}; build with `pip install .`")
    threads = torch.get_num_threads()
    return Peaks(module.peak_kinds(capped=True), lambda kind, seconds: module.peak(kind, threads, seconds), **options)


_GPU_OPERANDS = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn,
}  # fmt: skip


def _gpu_rate(kind: str, seconds: float) -> tuple[float, float]:
    """The library's 8192³ product on normal data, or a copy of 1 GiB, for at least `seconds`: nobody disturbs it."""
    if kind == "copy":
        source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return _events_rate(lambda: target.copy_(source), 2 * source.numel(), seconds)
    normal = torch.randn(2, 8192, 8192, device="cuda")
    x, weight = (normal * 30 if kind == "int8" else normal).to(_GPU_OPERANDS[kind])
    return _events_rate(lambda: product(x, weight), 2 * 8192**3, seconds)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The library's x weightᵀ of rows (M, K) and (N, K): in 8 bits, it has no other layout on some chips."""
    if x.dtype == torch.int8:
        return torch._int_mm(x, weight.t())
    if x.dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=x.device)
        return torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return torch.mm(x, weight.t())


def _events_rate(run: Callable[[], object], amount: float, seconds: float) -> tuple[float, float]:
    run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    calls = 1
    while True:
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end) / 1e3
        if elapsed >= seconds:
            rate = amount * calls / elapsed
            return rate, rate
        calls = max(2 * calls, int(1.2 * calls * seconds / max(elapsed, 1e-6)))


def gpu_times(calls: Iterable[Callable[[], object]], block: int = 20) -> Iterator[list[float]]:
    """Milliseconds of single calls on the GPU, a block of them at a time.

    The GPU sleeps while Python queues a block: otherwise a call that is shorter than its launch would seem as long as that.
    A first call is for whatever is compiled then, and a block after it, not yielded, tells how long queueing takes.
    """
    calls = iter(calls)
    next(calls)()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in itertools.islice(calls, block):
        call()
    cycles = int(2 * (time.perf_counter() - start + 1e-3) * _sleep_rate())  # a busy host may take longer the next time
    while True:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(block)]
        torch.cuda._sleep(cycles)
        for (start, end), call in zip(events, calls, strict=False):
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        yield [start.elapsed_time(end) for start, end in events]


def _sleep_rate(cycles: int = 10**6) -> float:
    """How many cycles torch.cuda._sleep counts per second now."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1)  # a kernel is loaded when it is first launched
    torch.cuda.synchronize()
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / (start.elapsed_time(end) / 1e3)


def drift(before: dict[str, float], after: dict[str, float]) -> float:
    """By what fraction the machine's speed changed between two probes, for the kind that changed most."""
    return max((abs(before[kind] - after[kind]) / max(before[kind], after[kind]) for kind in before), default=0.0)


def interleave(
    tasks: dict[str, Callable[[int], object]],
    repeat: int,
    probe: Callable[[], dict[str, float]],
    max_rejected: int | None = None,
) -> Iterator[tuple[str, object, str]]:
    """Run every task `repeat` times in turn, starting with another one each round; yields (name, result, verdict).

    tasks[name](i) is one repetition; i is the same for all tasks of a round and never comes twice to one task. The
    verdict is "steady"; or "rejected" where the machine drifted by more than 10 % between the probes before and after,
    and the task is run again; or, after `max_rejected` rejections of that task (default: `repeat`), "unsteady". A task
    that can't go on returns None, and is skipped.
    """
    max_rejected = repeat if max_rejected is None else max_rejected
    rejected: Counter = Counter()
    names = list(tasks)
    before = probe()
    for i in range(repeat if names else 0):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            for attempt in itertools.count():
                result = tasks[name](i + attempt * repeat)
                after = probe()
                steady, before = drift(before, after) <= MAX_DRIFT, after
                if result is None:
                    break
                verdict = "steady" if steady else "rejected" if rejected[name] < max_rejected else "unsteady"
                yield name, result, verdict
                if verdict != "rejected":
                    break
                rejected[name] += 1


def statistics_ms(samples: list[float]) -> dict[str, float]:
    """Median, p10 and p90 (linear between samples), minimum and mean."""
    if len(samples) == 1:
        p10 = p90 = samples[0]
    else:
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        p10, p90 = tenths[0], tenths[-1]
    return {
        "median": statistics.median(samples), "p10": p10, "p90": p90, "min": min(samples),
        "mean": statistics.fmean(samples),
    }  # fmt: skip


class PeakMemory:
    """Highest resident memory of this process within a `with` block, sampled every 10 ms.

    `.bytes` afterwards, and `.added`, how much of it was not there before the block: on a GPU of the GPU's memory.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"

    def __enter__(self):
        free_memory()
        self._process, self._over = psutil.Process(), threading.Event()
        self.bytes = self._before = self._process.memory_info().rss
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def __exit__(self, *exception) -> None:
        self._over.set()
        self._thread.join()
        self.added = (torch.cuda.max_memory_allocated() if self._cuda else self.bytes) - self._before


class Clock:
    """Wall time of stages in ms; each begins where the one before ended, so none is lost between them.

    On a GPU, a stage is over when its work is.
    """

    def __init__(self, device: torch.device):
        self._synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._synchronize()
        self._last = time.perf_counter()
        self.ms: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """The stage of that name is over."""
        self._synchronize()
        now = time.perf_counter()
        self.ms[stage], self._last = (now - self._last) * 1e3, now


def out_of_memory(error: BaseException) -> bool:
    """Is this what Python and PyTorch raise when memory runs out? The CPU allocator has no exception of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )


class Results:
    """The document of one run, and its file: written anew, atomically, whenever there are other rows. See `schema`."""

    def __init__(self, path: Path | None, seed: int, device: str = "cpu"):
        """`device`: cpu | cuda, what is measured, on a machine that may have both."""
        if path is not None:
            files.check_writable(path)
        self.path = path
        self._cpu_times, self._gpu_before = psutil.cpu_times(), gpu_state()
        found = diagnostics.describe()
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        sha, dirty = _git()
        where = "gpu" if device == "cuda" else "cpu"
        self.document = {
            "schema": schema.VERSION,
            "run": {
                "id": f"{now}-{where}-{sha or 'unknown'}", "git_sha": sha, "dirty": dirty, "seed": seed,
                "device": device, "command": _command(), "complete": False,
            },
            "machine": _machine(found),
            "software": {"versions": found["versions"], "build": found["build"], "system": platform.platform()},
            "results": [],
        }  # fmt: skip

    def replace(self, rows: list[dict]) -> None:
        """These are all the rows now."""
        self.document["results"] = rows
        self.save()

    def save(self, measured: Peaks | None = None, complete: bool = False) -> None:
        """Write the file; at the end with the peaks and what the machine went through."""
        machine = self.document["machine"]
        machine["load"]["after"] = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
        machine["steal_pct"] = _steal_percent(self._cpu_times)
        # At both ends alone: nvidia-smi takes a good part of a second, and files are written after each row.
        machine["gpu_state"] = {"before": self._gpu_before, "after": gpu_state() if complete else None}
        if measured is not None:
            machine["measured_peak"] = dict(measured.best)
        self.document["run"]["complete"] = complete
        if self.path is not None:
            files.write_text(self.path, json.dumps(self.document, indent=1, allow_nan=False) + "\n")


def gpu_state() -> list[str]:
    """Clocks, power, temperature and reasons to throttle of each GPU, as nvidia-smi prints them."""
    if not torch.cuda.is_available():
        return []
    fields = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "clocks_event_reasons.active")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)},ecc.mode.current,mig.mode.current", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _machine(found: dict) -> dict:
    return found["machine"] | {
        "gpus": found["gpus"],
        "threads_used": torch.get_num_threads(),
        "load": {"before": list(os.getloadavg()) if hasattr(os, "getloadavg") else None},
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
    }


def _steal_percent(before) -> float | None:
    """Share of the time since `before` that a virtual machine was denied; None where the system doesn't tell."""
    now = psutil.cpu_times()
    if not hasattr(now, "steal"):
        return None
    total = sum(now) - sum(before)
    return 100 * (now.steal - before.steal) / total if total > 0 else 0.0


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _git() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this package is in, and whether it was changed; (None, None) once installed."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", "harness.py"
        )  # a checkout of something else, around an installed package, does not count
        return git("rev-parse", "--short", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _command() -> str:
    """How to run this again, wherever the results go."""
    arguments = iter(sys.argv[1:])
    kept = [a for a in arguments if not a.startswith("--json=") and not (a == "--json" and next(arguments, True))]
    script = Path(sys.argv[0])  # of `python -m sana_bench.text`, the file of the module
    ours = script.resolve().parent == Path(__file__).resolve().parent
    return shlex.join([*(["python", "-m", f"sana_bench.{script.stem}"] if ours else ["sana"]), *kept])


def free_memory() -> None:
    """Return what is no longer used, so that the next run finds it, and its memory can be told from that of the last."""
    gc.collect()
    heap.give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
