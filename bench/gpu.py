"""`make gpu` and `make gpu-more`: everything that an NVIDIA GPU is wanted for, in one command, with no network.

    python bench/gpu.py quick --out DIR    in 8 minutes: build, GPU tests, a picture, one shape per op, compute-sanitizer
    python bench/gpu.py more --out DIR     a list of measurements, one JSON each, those that matter most first

`more` is made to be called again and again: what is in DIR is not measured again, and no row is begun that may not be over
in time. Where a GPU is lent for commands of 10 minutes each, of which only a few files come back:

    make gpu; tar czf $OUT/gpu.tgz -C build gpu
    make gpu-more GPU_MINUTES=8.5; tar czf $OUT/gpu.tgz -C build gpu        and so on

On a fresh machine, unpack the last archive in build/ first, to go on where it ended. A row takes 20 minutes at most; what
one that is cut off has measured stays in DIR/NAME.partial.json.

This is run as a script, because it builds and installs the package that it is part of (editable, into the Python that
runs it). So only children of it import the package; each has a time limit, and none that fails or hangs stops the rest.
All they print goes to DIR/log.txt, and a table comes last.

Exit status: 0; 1 where something failed; 2 for a wrong flag; 3 without a GPU; 130 after Ctrl-C.
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable]
QUICK_SECONDS = 475.0  # and a few more, to stop a child that hangs: 8 minutes
GRACE = 5.0  # seconds between asking a child to stop and killing it
ROW_SECONDS = 20 * 60  # the most that one row of `more` may take

BUILD = ["-m", "pip", "--disable-pip-version-check", "install", "-v", "--no-build-isolation", "--no-deps", "-e", "."]
GPU = "import torch; print(torch.cuda.get_device_name())"  # fails where torch sees none
FACTS_ARE = "facts: "  # begins their line among all that libraries may print
FACTS = """
import json
from sana_bench import tune
from sana_bench.cases import cases
from sana_bench.gpu import FACTS_ARE
from sana_bench.weights import BASELINES
from sana_kernels.backend import OPS, backend_status
from sana_model.settings import PRECISIONS
kernels = {op: [p for p in PRECISIONS if any(p in case.precisions for case in cases(op))] for op in OPS}
tuned = [[op, dtype] for op in tune.OPS for dtype in tune.DTYPES]
facts = {"precisions": [*PRECISIONS], "baselines": BASELINES, "kernels": kernels, "tuned": tuned,
         "cuda": backend_status("cuda")}
print()  # whatever else may stand on this line
print(FACTS_ARE + json.dumps(facts))
"""

OURS = ("cuda", "triton", "cpu", "library")  # backends whose crash is our failure; what others wrote may crash
MODELS = ("sana-0.6b", "sana-1.6b", "sana-sprint-0.6b", "sana-sprint-1.6b")
SIZES, BATCHES = (512, 1024, 2048, 4096), (1, 4, 8)
MOST_PIXELS = 4096**2  # of a batch: one picture of the largest size
# None of 4 bits: rounded to nearest, as in a run without a folder, random weights must fail their check.
FIRST_PRECISIONS, OTHER_PRECISIONS = ("w8a8", "fp8", "bf16"), ("bf16", "fp16", "fp32")
FIRST_OPS = ("gemm", "mix_ffn", "linear_attention")
CASES = "1024,4096,text"  # of ops: the published models at their own size and at the largest
QUICK_CASES = (
    "0.6b_1024,0.6b_text_up,decoder_stage2_1024_silu,decoder_stage3_1024,decoder_stage4_1024,decoder_stage5_1024"
)
PROPOSAL = "a proposal of `sana tune`"


@dataclass(frozen=True)
class Outcome:
    """What became of a step or row. `verdict`: ok | FAIL | skipped | out of time."""

    name: str
    verdict: str
    detail: str
    seconds: float | None = None  # None: measured earlier


def execute(name: str, command: list[str], seconds: float, log: Path, **environment: str) -> tuple[Outcome, str]:
    """Run a command in the checkout for at most `seconds` → what became of it, and what it printed.

    Nothing that it started outlives this call.
    """
    start = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n$ {shlex.join(command)}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            verdict = "FAIL" if process.wait(max(0.0, seconds)) else "ok"
        except subprocess.TimeoutExpired:
            verdict = "out of time"
        finally:
            _stop(process)
    output = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip(" =") for line in output.splitlines() if line.strip(" =")]
    if verdict != "ok":
        print("\n".join(lines[-15:]), file=sys.stderr)
    return Outcome(name, verdict, lines[-1][:200] if lines else "no output", time.monotonic() - start), output


def _stop(process: subprocess.Popen) -> None:
    """End a child and whatever it started: like Ctrl-C, so that it tells how far it came, and then by force."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass(frozen=True)
class Row:
    """One measurement of `more`: arguments of `sana`, and the seconds without which it is not begun."""

    command: list[str]
    needs: float


class Runner:
    """Both lists of work, and what became of it."""

    def __init__(self, out: Path, seconds: float):
        self.out, self.log, self.partial = out, out / "log.txt", out / ".partial"
        self.start, self.seconds = time.monotonic(), seconds
        self.outcomes: list[Outcome] = []
        self.rows: dict[str, Row] = {}

    def left(self, until: float) -> float:
        """Seconds from now to `until`, which is counted from the start."""
        return self.start + until - time.monotonic()

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.verdict}: {outcome.detail}", file=sys.stderr, flush=True)

    def build(self, until: float) -> dict | None:
        """Build and install the package → what it knows (see FACTS); None where it cannot be imported afterwards."""
        self.add(execute("build", [*PYTHON, *BUILD], self.left(until), self.log)[0])
        outcome, output = execute("package", [*PYTHON, "-c", FACTS], self.left(self.seconds), self.log)
        lines = [line.removeprefix(FACTS_ARE) for line in output.splitlines() if line.startswith(FACTS_ARE)]
        if outcome.verdict != "ok" or not lines:
            self.add(replace(outcome, verdict="FAIL"))
            return None
        facts = json.loads(lines[-1])
        if facts["cuda"]:  # CUDA is off where nvcc failed; Triton can run without it
            self.add(replace(outcome, verdict="FAIL", detail=facts["cuda"]))
        return facts

    def measure(self, name: str, command: list[str], seconds: float) -> Outcome:
        """One `sana` command with its JSON: out/name.json when it is whole, and else what there is as name.partial.json."""
        self.partial.mkdir(exist_ok=True)
        partial, final = (folder / f"{name}.json" for folder in (self.partial, self.out))
        incomplete = self.out / f"{name}.partial.json"
        full = [*PYTHON, "-m", "sana_model", *command, "--json", str(partial)]
        outcome, _ = execute(name, full, seconds, self.log)
        found = None if outcome.verdict == "out of time" else stored(partial)
        # Results say themselves whether they are whole, also those of a row that failed. Proposals do not.
        if found and (outcome.verdict == "ok" or found.detail != PROPOSAL):
            os.replace(partial, final)
            incomplete.unlink(missing_ok=True)
            return replace(found, seconds=outcome.seconds)
        if partial.exists():
            os.replace(partial, incomplete)
            outcome = replace(outcome, detail=f"{outcome.detail}; what it measured is in {incomplete.name}")
        return replace(outcome, verdict="FAIL") if outcome.verdict == "ok" else outcome

    def quick(self) -> None:
        """Each step has to be over at its second; what one leaves of its time, the next ones have."""
        facts = self.build(until=150)
        if facts is None:
            return
        count = str(min(8, os.cpu_count() or 1))  # most of the time goes to compiling kernels and to oracles on the CPU
        workers = ["-n", count, "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
        tests = [*PYTHON, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors", *workers]
        self.add(execute("tests", tests, self.left(240), self.log)[0])
        image = ["bench", "image", "--model", "sana-0.6b", "--size", "1024", "--steps", "20", "--repeat", "3"]
        self.add(self.measure("image", [*image, "--runs", ",".join(headline(facts))], self.left(365)))
        # The cheapest of these cases of each op, and the convolution that is most of the decoder's work.
        kernels = ["bench", "kernels", "--quick", "--case", QUICK_CASES, "--dtypes", "bf16,w8a8"]
        self.add(self.measure("kernels", kernels, self.left(435)))
        for tool, until in (("memcheck", 455), ("racecheck", self.seconds)):
            self.add(self.sanitize(tool, until))

    def sanitize(self, tool: str, until: float) -> Outcome:
        """compute-sanitizer over every CUDA op; it is not installed everywhere, and does not work in every sandbox."""
        found = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
        if found is None:
            return Outcome(tool, "skipped", "compute-sanitizer is not installed; the CUDA toolkit has it")
        # Our kernels alone (namespace sana), and every tensor an allocation of its own, so that no overrun lands in
        # another tensor. torch asks the driver for what may be missing: such answers are no errors.
        options = ["--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=_ZN4sana"]
        options += ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [found, *options, *PYTHON, "-m", "sana_bench.gpu", "ops"]
        outcome, output = execute(tool, command, self.left(until), self.log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if outcome.verdict == "out of time" or ("SUMMARY:" in output and "Device not supported" not in output):
            checked = CHECKED.search(output)  # no error is no news where nothing was looked at
            return replace(outcome, detail=f"{outcome.detail}; {checked.group() if checked else 'not all ops ran'}")
        return replace(outcome, verdict="skipped", detail=f"compute-sanitizer does not work here: {outcome.detail}")

    def more(self) -> None:
        """What failed before comes last, so that no row can keep the others from being measured."""
        self.rescue()
        facts = self.build(until=min(self.seconds, ROW_SECONDS))
        self.rows = {} if facts is None else more_rows(facts)
        for name in sorted(self.rows, key=lambda name: self.failure(name).exists()):
            row, left = self.rows[name], self.left(self.seconds)
            if stored(self.out / f"{name}.json") or left < row.needs:
                continue
            outcome = self.measure(name, row.command, min(ROW_SECONDS, left))
            print(f"{name}: {outcome.verdict}: {outcome.detail}", file=sys.stderr, flush=True)
            self.failure(name).unlink(missing_ok=True)
            if not stored(self.out / f"{name}.json"):
                note = self.partial / "failure"
                note.write_text(json.dumps(asdict(outcome)) + "\n", encoding="utf-8")
                os.replace(note, self.failure(name))

    def rescue(self) -> None:
        """Keep what a row had measured when a call before this one was killed."""
        for file in self.partial.glob("*.json"):
            os.replace(file, self.out / f"{file.stem}.partial.json")

    def failure(self, name: str) -> Path:
        return self.out / f"{name}.failed.json"


def ours(facts: dict, precisions: tuple[str, ...], backend: str = "auto") -> list[str]:
    """Runs of ours in those of the precisions that there are."""
    return [f"{backend}:{precision}" for precision in precisions if precision in facts["precisions"]]


def headline(facts: dict) -> list[str]:
    """The runs that matter most, one of them without a CUDA graph, beside the code that others wrote."""
    return [*ours(facts, FIRST_PRECISIONS), "auto:bf16-eager", "diffusers:bf16"]


def more_rows(facts: dict) -> dict[str, Row]:
    """By name, in the order of their worth: pictures of 1024 px by the smallest model, the ops that take most of the time,
    pictures by the others, all ops, tiles, other backends and precisions, and pictures of other sizes.

    A baseline under torch.compile, which may take minutes to compile, has a row of its own.
    """
    rows: dict[str, Row] = {}
    workloads = [(size, batch) for size in SIZES for batch in BATCHES if size * size * batch <= MOST_PIXELS]
    workloads.sort(key=lambda one: (one != (1024, 1), one[0] * one[0] * one[1]))

    def picture(label: str, model: str, size: int, batch: int, runs: list[str], needs: float = 150) -> None:
        options = ["--model", model, "--size", str(size), "--batch", str(batch), "--runs", ",".join(runs)]
        rows[f"{label}_{model}_{size}_batch{batch}"] = Row(["bench", "image", *options], needs)

    def compiled(baseline: str, model: str) -> None:
        if baseline in facts["baselines"]:
            picture(baseline, model, *workloads[0], [*ours(facts, FIRST_PRECISIONS), f"{baseline}:bf16"], needs=300)

    def kernels(ops: Iterable[str], precisions: Iterable[str]) -> None:
        for op, precision in itertools.product(ops, precisions):
            if precision in facts["kernels"].get(op, ()):
                options = ["--case", CASES, "--dtypes", precision, "--repeat", "2"]
                rows.setdefault(f"kernels_{op}_{precision}", Row(["bench", "kernels", op, *options], 180))

    for model in MODELS:
        picture("image", model, *workloads[0], headline(facts))
        compiled("diffusers-compile", model)
        kernels(FIRST_OPS, ("bf16", "w8a8"))
    kernels(facts["kernels"], ("bf16", "w8a8", "fp8"))
    for op, dtype in facts["tuned"]:
        rows[f"tiles_{op}_{dtype}"] = Row(["tune", op, "--dtypes", dtype], 180)
    for model in MODELS:
        picture("triton", model, *workloads[0], ["auto:bf16", *ours(facts, FIRST_PRECISIONS, "triton")])
        picture("others", model, *workloads[0], ["reference:bf16", *ours(facts, OTHER_PRECISIONS)])
        compiled("reference-compile", model)
    kernels(facts["kernels"], facts["precisions"])
    for size, batch in workloads[1:]:
        for model in MODELS:
            picture("image", model, size, batch, [*ours(facts, FIRST_PRECISIONS), "diffusers:bf16"], needs=300)
    return rows


def failed(row: dict) -> bool:
    """Does a row of results speak against us: is it wrong, or did code of ours crash?"""
    return row["status"] == "FAIL" or (row["status"] == "error" and row["backend"] in OURS)


def stored(path: Path) -> Outcome | None:
    """What a result file says, in a line; None where there is no whole one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if "verdict" in document:
        return Outcome(**document)
    if "results" not in document:
        return Outcome(path.stem, "ok", PROPOSAL)
    if not document["run"]["complete"]:
        return None
    rows = [row for row in document["results"] if row["kind"] in ("image", "kernel")]
    failures = sum(map(failed, rows))
    pictures = []
    for row in (row for row in rows if row["kind"] == "image"):
        per_image = row["status"]
        if per_image == "ok":
            per_image = f"{row['timing']['ms']['median'] / row['workload']['batch']:.1f} ms"
        pictures.append(f"{row['backend']}:{row['precision']} {per_image}")
    detail = f"per image: {', '.join(pictures)}" if pictures else f"{len(rows)} rows, {failures} of them failed"
    return Outcome(path.stem, "FAIL" if failures else "ok", detail)


CHECKED = re.compile(r"\d+ calls of \d+ CUDA ops")


def run_ops() -> int:
    """Every CUDA op once in each dtype, on small and on awkward grids: what compute-sanitizer looks at."""
    import torch

    from sana_bench.cases import cases
    from sana_bench.kernels import objection, runner

    calls, ops, device = 0, set(), torch.device("cuda")
    for case in (case for case in cases() if "tiny" in case.name or "768x1344" in case.name):
        for precision in case.precisions:
            if objection("cuda", case, precision, case.arguments(precision, "meta"), device) is None:
                print(case, precision, flush=True)
                runner(case.op, "cuda")(*case.arguments(precision, device))
                torch.cuda.synchronize()
                calls, ops = calls + 1, ops | {case.op}
    print(f"{calls} calls of {len(ops)} CUDA ops")
    return 0 if calls else 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu.py", description="What an NVIDIA GPU is wanted for, in one command.")
    parser.add_argument("what", choices=("quick", "more", "ops"), help="ops: the calls that compute-sanitizer checks")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), metavar="DIR", help="default: build/gpu")
    parser.add_argument("--minutes", type=float, default=60, metavar="M", help="of `more` in all (default: 60)")
    args = parser.parse_args(argv)
    if args.what == "ops":
        return run_ops()
    gpu = subprocess.run([*PYTHON, "-c", GPU], capture_output=True, text=True)
    if gpu.returncode:
        print("gpu: no NVIDIA GPU can be used here: torch sees none, or is not installed", file=sys.stderr)
        return 3
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    runner = Runner(args.out.resolve(), QUICK_SECONDS if args.what == "quick" else 60 * args.minutes)
    interrupted = False
    try:
        runner.quick() if args.what == "quick" else runner.more()
    except KeyboardInterrupt:
        interrupted = True
    shutil.rmtree(runner.partial, ignore_errors=True)
    done = {name: stored(runner.out / f"{name}.json") for name in runner.rows}
    outcomes = runner.outcomes + [one for name in done if (one := done[name] or stored(runner.failure(name)))]
    print(f"\n{gpu.stdout.splitlines()[-1]}; log and results in {runner.out}")
    width = max((len(one.name) for one in outcomes), default=0)
    for one in outcomes:
        took = "" if one.seconds is None else f"{one.seconds:.0f} s"
        print(f"{one.name:<{width}}  {one.verdict:<11} {took:>6}  {one.detail}")
    if missing := sum(one is None for one in done.values()):
        print(f"{missing} of {len(done)} rows are missing; the same command goes on with them")
    return 130 if interrupted else int(any(one.verdict in ("FAIL", "out of time") for one in outcomes))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout`, too, must not leave children behind
    sys.exit(main())
