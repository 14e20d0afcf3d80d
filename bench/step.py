"""`sana bench step`: one evaluation of the DiT, both halves of the guided batch, by several runs that take turns.

Only the DiT has its real size: text encoder and decoder are small random ones that nothing is timed with. Our runs are given
what a sampler computes once (time embedding, keys and values of the caption); the others compute it in every step. A row of
ours also holds the milliseconds of every op, and those of the step's matrix products by themselves, one after the other with
each layer's own weights: what a step can't be faster than.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

import sana_kernels
from sana_bench import check, work
from sana_bench.harness import Peaks, Results, interleave, statistics_ms
from sana_bench.outcome import Outcome, add_speedups
from sana_bench.prompts import Prompts
from sana_bench.runs import PipelineRun, make, plain_velocity
from sana_bench.weights import Moment, RunName, Weights
from sana_kernels import Quantized
from sana_model.config import BUILT_IN
from sana_model.dit import Block, DiT
from sana_model.packed import PackedLinear, is_plain, rows_for
from sana_model.prompt import PromptEncoder
from sana_model.settings import settings_for
from sana_model.weights.loaded import LoadedModel
from sana_model.weights.models import load_model
from sana_model.weights.random_weights import random_model

SMALL = "sana-tiny-random"  # whose text encoder and decoder stand in


@dataclass
class Measured(Outcome):
    """What is known of one run."""

    run: object
    parity: check.Check | None = None
    samples: list[float] = field(default_factory=list)  # ms
    ops: list[dict[str, float]] = field(default_factory=list)  # ms of every op, of the same steps
    gemms: list[float] = field(default_factory=list)  # ms of the step's matrix products alone
    step: Callable[[], Tensor] | None = None
    products: Callable[[], None] | None = None  # None: not of our kernels, or of layers that are more than a product


def load(source, dtype: torch.dtype) -> LoadedModel:
    """The DiT of a model, between a text encoder and a decoder of toy size that fit it."""
    loaded = load_model(source, precision=dtype, parts=("dit",))
    small = BUILT_IN[SMALL]
    text = replace(small.text, hidden=loaded.config.dit.caption_channels)
    config = replace(loaded.config, text=text, autoencoder=small.autoencoder)
    parts = random_model(replace(small, text=text), dtype=dtype)
    return replace(parts, config=config, dit=loaded.dit, source=loaded.source, random=loaded.random)


class StepBench:
    """One comparison. `run(repeat)` measures; the rows are in `results.document`."""

    def __init__(
        self, loaded: LoadedModel, names: list[RunName], size: tuple[int, int], text_tokens: int, device: torch.device,
        peaks: Peaks, results: Results, *, seed: int = 0, say=print,
    ):  # fmt: skip
        self.weights, self.config, self.device = Weights(loaded, device), loaded.config, device
        self.size, self.text_tokens, self.peaks, self.results, self.say = size, text_tokens, peaks, results, say
        self.settings = settings_for(self.config, "a picture", width=size[0], height=size[1])
        with torch.inference_mode():
            self.moment = self._moment(seed)
        self.measured = {str(name): Measured(make(name, self.weights)) for name in names}

    @property
    def alive(self) -> dict[str, Measured]:
        return {name: m for name, m in self.measured.items() if m.status == "ok"}

    def run(self, repeat: int) -> dict:
        with torch.inference_mode():
            with check.ComputeInFp32():
                m, oracle = self.moment, self.weights.part("dit", self.weights.stored["dit"])
                expected = oracle(m.latents, m.timestep, m.states, m.lengths, m.guidance)
            for name, measured in self.measured.items():
                self.say(f"{name}: first step")
                self._attempt(measured, self._first, measured, expected)
            try:
                self._repeat(repeat)
            finally:
                self.results.replace(self.rows())
        return self.results.document

    def _attempt(self, measured: Measured, action, *args):
        run = measured.run
        return measured.attempt(run.name, run.close, self.say, action, *args, missing=run.missing)

    def _first(self, measured: Measured, expected: Tensor) -> None:
        run, moment = measured.run, self.moment
        run.prepare(self.settings)
        plain = partial(plain_velocity, run, self.settings, moment)
        measured.parity = check.dit_check(run.velocity(moment), expected, run.judged["dit"], plain)
        measured.step = stepper(run, moment)
        measured.products = matrix_products(run, moment)
        for warm_up in (measured.step, measured.products):
            if warm_up is not None:
                warm_up()

    def _repeat(self, repeat: int) -> None:
        def task(measured: Measured):
            return lambda _i: self._attempt(measured, self._once, measured) if measured.status == "ok" else None

        kinds = {self.peaks.kind(m.run.name.precision) for m in self.alive.values()}
        tasks = {name: task(measured) for name, measured in self.alive.items()}
        for name, (took, ops, gemms), verdict in interleave(tasks, repeat, lambda: self.peaks.probe(kinds)):
            measured = self.measured[name]
            self.say(f"{name}: {took:.0f} ms, {verdict}")
            if measured.count(verdict):
                measured.samples.append(took)
                measured.ops.append(ops)
                measured.gemms += [] if gemms is None else [gemms]

    def _once(self, measured: Measured) -> tuple[float, dict[str, float], float | None]:
        """ms of one step, of its ops by name, and of its matrix products alone."""
        clock = measured.run.pipeline.plan.clock if isinstance(measured.run, PipelineRun) else None
        if clock is not None:
            clock.reset()
        took = self._ms(measured.step)
        seconds = {} if clock is None else clock.seconds()
        ops = {op: 1e3 * s for (part, op), s in seconds.items() if part == "dit"}
        return took, ops, None if measured.products is None else self._ms(measured.products)

    def _ms(self, action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def _moment(self, seed: int) -> Moment:
        """Noise in the middle of the schedule, with a caption of `text_tokens` tokens and the empty one."""
        dit, side, loaded = self.config.dit, self.config.autoencoder.spatial_compression, self.weights.loaded
        prompt = Prompts(loaded.tokenizer, self.config, self.text_tokens, seed)(0)
        captions = PromptEncoder(loaded.text_encoder, loaded.tokenizer, self.config).encode(
            [prompt] if dit.guidance_embeds else ["", prompt]
        )
        R, draw = len(captions.lengths), torch.Generator().manual_seed(seed)
        return Moment(
            torch.randn(R, dit.in_channels, self.size[1] // side, self.size[0] // side, generator=draw).to(self.device),
            torch.full((R,), 0.8 if self.config.scheduler.kind == "scm" else 500.0, device=self.device),
            captions.states, captions.lengths,
            torch.full((R,), self.config.guidance, device=self.device) if dit.guidance_embeds else None,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ rows

    def rows(self) -> list[dict]:
        """Everything that is known by now."""
        rows = [self._row(measured) for measured in self.measured.values() if measured.samples or measured.reason]
        add_speedups(rows)
        return rows

    def _row(self, measured: Measured) -> dict:
        name, (width, height) = measured.run.name, self.size
        workload = {
            "rows": len(self.moment.lengths), "height": height, "width": width, "text_tokens": self.text_tokens,
        }  # fmt: skip
        row = {
            "kind": "step", "name": f"{self.config.name}_{width}x{height}", "backend": name.backend,
            "precision": name.label, "weights": self.weights.loaded.source, "workload": workload,
        }  # fmt: skip
        if measured.status != "ok":
            return row | {"status": measured.status, "reason": measured.reason}
        ms = statistics_ms(measured.samples)
        macs = self._macs()
        percent = self.peaks.percent(2 * macs, ms["median"] / 1e3, name.precision)
        failures = [f"it runs at {percent:.0f} % of the measured peak"] if percent is not None and percent > 100 else []
        checked = check.summary([measured.parity], failures)
        row |= {
            "status": "ok" if checked["passed"] else "FAIL",
            "timing": {
                "method": "wall clock, synchronised", "warmup": 2, "n": len(measured.samples),
                "rejected": measured.rejected, "unsteady": measured.unsteady, "ms": ms, "raw_ms": measured.samples,
            },
            "work": {"gmac": macs / 1e9, "peak": self.peaks.kind(name.precision), "pct_of_peak": percent},
            "check": checked, "plan": {"backend": name.backend},
        }  # fmt: skip
        if measured.ops[0]:
            ops = {
                op: statistics_ms([sample.get(op, 0) for sample in measured.ops])["median"] for op in measured.ops[0]
            }
            row["ops_ms"] = ops
        if measured.gemms:
            row["gemms_alone_ms"] = statistics_ms(measured.gemms)
        return row

    def _macs(self) -> int:
        side = self.config.autoencoder.spatial_compression
        tokens = (self.size[0] // side) * (self.size[1] // side)
        return sum(work.dit_step_macs(self.config.dit, tokens, length) for length in self.moment.lengths.tolist())


def stepper(run, moment: Moment) -> Callable[[], Tensor]:
    """One step of a run, without what it computes once per picture."""
    dit = run.pipeline.dit if isinstance(run, PipelineRun) else None
    if not isinstance(dit, DiT):
        return lambda: run.velocity(moment)
    timing = dit.time(moment.timestep.to(dit.dtype), moment.guidance)
    text = dit.text(moment.states, moment.lengths)
    return lambda: dit.step(moment.latents, timing, text)


def products_of(block: Block) -> tuple[nn.Module, ...]:
    attention, cross, ffn = block.attention, block.cross_attention, block.mix_ffn
    return attention.qkv, attention.out, cross.q, cross.out, ffn.expand, ffn.project


def matrix_products(run, moment: Moment) -> Callable[[], None] | None:
    """The products of a step over image tokens, of every layer with its own weights, on rows that lie ready.

    None for runs of others, and for 4-bit weights and low-rank branches, which are more than one product.
    """
    dit = run.pipeline.dit if isinstance(run, PipelineRun) else None
    if not isinstance(dit, DiT) or not all(is_plain(layer) for block in dit.blocks for layer in products_of(block)):
        return None
    R, tokens = len(moment.lengths), moment.latents[0, 0].numel()
    C, F, dtype = dit.config.hidden, dit.config.ffn, dit.dtype
    draw = torch.Generator().manual_seed(0)
    rows = {K: torch.randn(R, tokens, K, generator=draw).to(moment.latents.device, dtype) for K in (C, F)}
    gate = torch.randn(R, C, generator=draw).to(rows[C])
    eight_bits = rows_for(dit.blocks[0].attention.qkv)
    quantised = {} if eight_bits is None else {K: sana_kernels.quantize(x, eight_bits) for K, x in rows.items()}

    def product(layer: nn.Module, silu: bool = False, gate: Tensor | None = None, residual: bool = False) -> None:
        packed = isinstance(layer, PackedLinear)
        backend = layer.backend if packed else "reference"
        K = layer.in_features
        x = quantised[K] if isinstance(layer.weight, Quantized) else rows[K]
        sana_kernels.gemm(
            x, layer.weight, layer.bias, silu=silu, gate=gate, residual=rows[C] if residual else None, dtype=dtype,
            backend=backend,
        )  # fmt: skip

    def run_all() -> None:
        for block in dit.blocks:
            qkv, out, q, cross_out, expand, project = products_of(block)
            product(qkv)
            product(out, gate=gate, residual=True)
            product(q)
            product(cross_out, residual=True)
            product(expand, silu=True)
            product(project, gate=gate, residual=True)

    return run_all
