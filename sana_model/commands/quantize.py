"""`sana quantize`: turn a model into 8 or 4 bits, say what became of every layer, and how long the rest will take."""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from sana_model import batch
from sana_model.errors import MissingError, UserError
from sana_model.quantize.job import Job, Planned
from sana_model.quantize.model import Progress, quantize
from sana_model.threads import use_threads

PROMPTS = Path(__file__).parent.parent / "calibration_prompts.txt"


def run(args: argparse.Namespace) -> int:
    """Carry out the parsed command line; raises UserError and MissingError."""
    use_threads(args.threads)
    if args.seed < 0:
        raise UserError(f"the seed must be 0 or more, not {args.seed}")
    job = Job(
        args.model, args.precision, tuple(read_prompts(args.calibration or PROMPTS)), args.samples, args.steps,
        args.text_precision, args.rank, args.smooth, args.gptq, args.base, args.seed,
    )  # fmt: skip
    if args.device == "cuda" and not torch.cuda.is_available():
        raise MissingError("no NVIDIA GPU can be used here (torch sees none); leave out --device cuda")
    report = Report()
    plan = quantize(job, args.output, device=torch.device(args.device), force=args.force, progress=report.progress)
    print(summary(plan))
    print(f"{args.output}   sana generate --model {args.output} PROMPT")
    return 0


def read_prompts(file: Path) -> list[str]:
    """The prompts of a calibration file, in the formats of `sana generate --prompts`; other settings are not for it."""
    entries = batch.read(file)
    for entry in entries:
        if set(entry.values) != {"prompt"}:
            raise UserError(f"{entry.place}: calibration takes prompts only")
    return [entry.values["prompt"] for entry in entries]


class Report:
    """Lines on the terminal: a line per layer with the time left, a bar while the calibration paints."""

    def __init__(self):
        self.progress = Progress(self._begin, self._step, self._layer)
        self._bar: tqdm | None = None

    def _begin(self, text: str) -> None:
        self._close()
        self._start, self._first = time.perf_counter(), None
        print(text, flush=True)

    def _step(self, done: int, of: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=of, unit="step", disable=None)
        self._bar.update(done - self._bar.n)

    def _layer(self, planned: Planned, new: bool, done: float) -> None:
        """`done`: the fraction of the weights. What an earlier run had finished says nothing about the time left."""
        if not new:
            self._start, self._first = time.perf_counter(), done
        first = self._first or 0.0
        spent = time.perf_counter() - self._start
        left = spent * (1 - done) / (done - first) if done > first else 0.0
        print(f"{100 * done:5.1f} %  {planned}   " + (f"{_minutes(left)} left" if new else "already there"), flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def summary(plan: list[Planned]) -> str:
    """The plan by kind of layer: how many, as what, SQNR from the worst to the best, size, and what runs them."""
    kinds = defaultdict(list)
    for row in plan:
        kinds[row.part, row.kind, row.format, row.activations, row.rank, row.kernel].append(row)
    head = ("part", "layer", "", "weights", "inputs", "rank", "SQNR dB", "MB", "bits", "kernel on this machine")
    lines = [head]
    for (part, kind, format, activations, rank, kernel), rows in kinds.items():
        values = [row.sqnr_db for row in rows if row.sqnr_db is not None]
        sqnr = f"{min(values):.1f}-{max(values):.1f}" if values else "-"
        size, bits = sum(row.bytes for row in rows) / 1e6, _bits(rows)
        lines.append(
            (part, kind, f"×{len(rows)}", format, activations, str(rank or "-"), sqnr, f"{size:.1f}", bits, kernel)
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    total = f"quantised layers: {sum(row.bytes for row in plan) / 1e6:.1f} MB, {_bits(plan)} bits per weight"
    return "\n".join([*table, total])


def _bits(rows: list[Planned]) -> str:
    return f"{8 * sum(row.bytes for row in rows) / sum(row.weights for row in rows):.2f}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
