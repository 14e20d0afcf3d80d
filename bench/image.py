"""`sana bench image`: whole pictures, stage by stage, by several runs that share weights, prompts and noise.

Each run prepares and paints a first picture (a row of its own kind); then all of them are checked against fp32 on the
same inputs; then they paint in turn, a new prompt each round; then ours denoise the first picture again, of which every
bit must be the same. A run that fails a check gets no speed-up.
"""

import statistics
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from sana_bench import check, work
from sana_bench.harness import Clock, PeakMemory, Peaks, Results, free_memory, interleave, statistics_ms
from sana_bench.outcome import Outcome, add_speedups
from sana_bench.prompts import Prompts, with_gemmas_lengths
from sana_bench.runs import PipelineRun, make, plain_velocity
from sana_bench.schema import STAGES
from sana_bench.weights import BASELINES, PARTS, Moment, RunName, Weights
from sana_model import memory, scheduler
from sana_model.pipeline import Pipeline
from sana_model.plan import dtype_name, resolve
from sana_model.prompt import CaptionStates
from sana_model.settings import Settings, is_guided
from sana_model.weights.loaded import LoadedModel


@dataclass(frozen=True)
class Workload:
    """What every run paints."""

    height: int
    width: int
    steps: int
    guidance: float
    batch: int = 1
    text_tokens: int = 60

    def as_json(self) -> dict:
        keys = ("batch", "height", "width", "steps", "guidance", "text_tokens")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class Expected:
    """What parity is measured against, computed in fp32: see `ImageBench.gate`."""

    captions: check.Captions
    moment: Moment
    velocity: Tensor  # the DiT's raw output at that moment
    latents: Tensor
    images: Tensor  # decoded from those latents
    denoised: Tensor  # latents after `ImageBench.few` steps


@dataclass
class Measured(Outcome):
    """What is known of one run."""

    run: object
    first: dict[str, float] = field(default_factory=dict)  # stages of the first picture in ms, with prepare
    latents: Tensor | None = None  # of the first picture
    memory: PeakMemory | None = None  # of the first picture
    checks: list[check.Check] = field(default_factory=list)  # the second is that of the decoder
    repeats: bool = True  # unless the first picture, denoised again, has other latents
    samples: list[dict[str, float]] = field(default_factory=list)  # stages of each repetition in ms, with total


class ImageBench:
    """One comparison. `run()` measures; the rows are in `results.document`."""

    def __init__(
        self, loaded: LoadedModel, names: list[RunName], workload: Workload, device: torch.device, peaks: Peaks,
        results: Results, *, seed: int = 0, say=print,
    ):  # fmt: skip
        loaded = with_gemmas_lengths(loaded)
        self.weights, self.config, self.device = Weights(loaded, device), loaded.config, device
        self.workload, self.peaks, self.results, self.seed, self.say = workload, peaks, results, seed, say
        self.measured = {str(name): Measured(make(name, self.weights)) for name in names}
        self.prompts = Prompts(loaded.tokenizer, loaded.config, workload.text_tokens, seed)
        stored = self.weights.stored
        plan = resolve(loaded.config, "reference", device, {part: dtype_name(dtype) for part, dtype in stored.items()})
        self.oracle = Pipeline(self.weights.model(stored), plan, device, stored, low_memory=False)
        settings = self.settings(-1)  # a wrong size or guidance is refused before anything is timed
        exact = memory.estimate(self.config, settings, dict.fromkeys(PARTS, "fp32"), device)
        self.weights.kept_free = max(exact["denoise"], exact["decode"])  # for `gate`

    @property
    def alive(self) -> dict[str, Measured]:
        return {name: m for name, m in self.measured.items() if m.status == "ok"}

    def run(self, repeat: int) -> dict:
        """Measure, and return the document. What was measured before Ctrl-C is written, too."""
        with torch.inference_mode():
            try:
                for name, measured in self.measured.items():
                    self.say(f"{name}: first picture")
                    self.attempt(measured, self.first_picture, measured)
                if self.alive:
                    self.gate()
                    self.repeat(repeat)
                    self.again()
            finally:
                self.results.replace(self.rows())
        return self.results.document

    def attempt(self, measured: Measured, action, *args):
        """action(*args), or None where it can't be (`Outcome.attempt`)."""
        run = measured.run
        result = measured.attempt(run.name, run.close, self.say, action, *args, missing=run.missing)
        if measured.status != "ok":
            measured.latents = None
        return result

    def settings(self, i: int) -> Settings:
        """Those of repetition i; -1 is the first picture."""
        prompts = [self.prompts(i * self.workload.batch + k) for k in range(self.workload.batch)]
        w = self.workload
        return self.oracle.settings(prompts, width=w.width, height=w.height, steps=w.steps, guidance=w.guidance)

    def noise(self, i: int) -> Tensor:
        w, scale = self.workload, self.config.autoencoder.spatial_compression
        shape = (w.batch, self.config.dit.in_channels, w.height // scale, w.width // scale)
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + 1000 + i)).to(self.device)

    def paint(self, run, i: int) -> tuple[dict[str, float], Tensor]:
        """Picture i: (ms of each stage and in total, latents). The picture itself, in 8 bits, is made and dropped."""
        settings, noise, clock = self.settings(i), self.noise(i), Clock(self.device)
        captions = run.text_encode(settings)
        clock.lap("text_encode")
        latents = run.denoise(settings, captions, noise)
        clock.lap("denoise")
        images = run.decode(latents, settings)
        clock.lap("decode")
        ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        clock.lap("other")
        totals = {"total": sum(clock.ms.values()), "per_step": clock.ms["denoise"] / settings.steps}
        return clock.ms | totals, latents

    def first_picture(self, measured: Measured) -> None:
        clock, shared = Clock(self.device), self.weights.shared_bytes
        with PeakMemory(self.device) as measured.memory:
            measured.run.prepare(self.settings(-1))
            clock.lap("prepare")
            stages, latents = self.paint(measured.run, -1)
        measured.memory.added -= self.weights.shared_bytes - shared  # whoever came first
        measured.first, measured.latents = stages | clock.ms, latents

    def gate(self) -> None:
        """Check every run against fp32, in the parts of what is timed: the DiT's raw output in the middle of the schedule,
        a decoded picture, the latents of a few steps by the run's own sampler and, of ours, the captions.

        The steps are those of `few`: in fp32 a whole schedule would take about seven times as long. Their limit:
        `check.LATENTS_LOSS`.
        """
        self.say("parity with fp32")
        oracle = Outcome()
        expected = oracle.attempt("parity with fp32", lambda: None, self.say, self.expected)
        if expected is None:
            for measured in self.alive.values():
                measured.status, measured.reason = oracle.status, f"parity with fp32: {oracle.reason}"
            return
        self.weights.kept_free = 0  # its room is there for `plain_velocity`
        settings, few, noise = self.settings(-1), self.few(), self.noise(-1)

        def compare(measured: Measured) -> None:
            run = measured.run
            judged, plain = run.judged, partial(plain_velocity, run, settings, expected.moment)
            checks = [
                check.dit_check(run.velocity(expected.moment), expected.velocity, judged["dit"], plain),
                check.image_check(run.decode(expected.latents, settings), expected.images, judged["autoencoder"]),
            ]
            own = run.text_encode(settings)
            checks.append(check.latents_check(run.denoise(few, own, noise), expected.denoised, judged["dit"]))
            if isinstance(run, PipelineRun):
                random = self.weights.loaded.random
                checks += check.caption_checks(own, expected.captions, judged["text_encoder"], random=random)
            measured.checks = checks

        for measured in self.alive.values():
            self.attempt(measured, compare, measured)

    def expected(self) -> Expected:
        """What is compared, in fp32. Raises MemoryError where it does not fit beside the runs."""
        free_memory()  # of the last picture
        self.weights.check_free(self.weights.kept_free)
        names = sorted(self.alive, key=lambda name: name.split(":")[0] not in BASELINES)
        latents = next(
            (m.latents for m in map(self.alive.get, names) if bool(m.latents.isfinite().all())), self.noise(-1)
        )
        settings, few, noise = self.settings(-1), self.few(), self.noise(-1)
        with check.ComputeInFp32():
            captions = self.oracle.encode(settings)
        moment = self.moment(latents, captions)
        with check.ComputeInFp32():
            velocity = self.oracle.dit(moment.latents, moment.timestep, moment.states, moment.lengths, moment.guidance)
            images = torch.cat([self.oracle.decode(latent, settings) for latent in latents.split(1)])
            # Decoding, which takes most, has just fitted: a refusal here would take every row along.
            denoised = self.oracle.denoise(few, captions, noise=noise, weighed=True)
        return Expected(captions, moment, velocity, latents, images, denoised)

    def few(self) -> Settings:
        """Three steps of the first picture, the second of which is of second order and looks back on the first; of a sampler
        that draws noise between its steps, which nobody else would draw alike, one."""
        settings = self.settings(-1)
        return replace(settings, steps=min(settings.steps, 1 if settings.sampler == "scm" else 3))

    def moment(self, latents: Tensor, captions: tuple[CaptionStates | None, CaptionStates]) -> Moment:
        """The middle of the schedule, on the straight way from the noise to `latents` that the DiT is trained on."""
        settings = self.settings(-1)
        schedule = scheduler.timesteps(self.config.scheduler, settings.steps)
        time = float(schedule.model_times[settings.steps // 2])
        sigma = time if self.config.scheduler.kind == "scm" else time / 1000
        x = (1 - sigma) * latents + sigma * self.noise(-1)
        groups = [group for group in captions if group is not None]  # negative, positive
        rows = CaptionStates.stack(
            [group.states[i, :length] for group in groups for i, length in enumerate(group.lengths.tolist())]
        )
        x = torch.cat([x] * len(groups))
        guidance = (
            torch.full((len(x),), settings.guidance, device=self.device) if self.config.dit.guidance_embeds else None
        )
        times = torch.full((len(x),), time, device=self.device)
        return Moment(x, times, rows.states.to(self.weights.stored["text_encoder"]), rows.lengths, guidance)

    def repeat(self, repeat: int) -> None:
        def task(measured: Measured):
            def paint(i: int) -> dict[str, float] | None:
                if measured.status != "ok":
                    return None
                painted = self.attempt(measured, self.paint, measured.run, i)
                return painted and painted[0]

            return paint

        names = [m.run.name for m in self.alive.values()]
        kinds = {self.peaks.kind(precision) for name in names for precision in name.precisions.values()}
        tasks = {name: task(measured) for name, measured in self.alive.items()}
        for name, stages, verdict in interleave(tasks, repeat, lambda: self.peaks.probe(kinds)):
            measured = self.measured[name]
            self.say(f"{name}: {stages['total']:.0f} ms, {verdict}")
            if measured.count(verdict):
                measured.samples.append(stages)
                self.results.replace(self.rows())

    def again(self) -> None:
        """Do our runs, with all that they have cached or captured by now, denoise the first picture to the same bits?"""

        def compare(measured: Measured) -> None:
            settings, run = self.settings(-1), measured.run
            latents = run.denoise(settings, run.text_encode(settings), self.noise(-1))
            measured.repeats = torch.equal(latents, measured.latents)

        for name, measured in self.alive.items():
            if measured.run.name.backend not in BASELINES:
                self.say(f"{name}: the first picture again")
                self.attempt(measured, compare, measured)

    # ------------------------------------------------------------------------------------------ rows

    def rows(self) -> list[dict]:
        """Everything that is known by now."""
        rows = [row for measured in self.measured.values() for row in self.rows_of(measured)]
        add_speedups(rows)
        return rows

    def rows_of(self, measured: Measured) -> list[dict]:
        name = measured.run.name
        common = {
            "name": f"{self.config.name}_{self.workload.width}x{self.workload.height}", "backend": name.backend,
            "precision": name.label, "weights": self.weights.loaded.source,
            "workload": self.workload.as_json() | {"instruction_tokens": self.prompts.instruction_tokens},
        }  # fmt: skip
        if measured.status != "ok":
            return [{"kind": "image", **common, "status": measured.status, "reason": measured.reason}]
        if not measured.checks:  # interrupted before anything could be trusted
            return []
        checks, image = measured.checks, measured.checks[1]
        common["plan"] = measured.run.plan()
        memory = {
            "weights": self.weights.bytes(name.precisions), "rss": measured.memory.bytes, "added": measured.memory.added,
        }  # fmt: skip
        common["memory_mib"] = {key: round(size / 2**20) for key, size in memory.items()}
        first = dict(measured.first)
        first["other"] += first["prepare"]
        first["total"] += first["prepare"]
        rows = [self.row("first_image", common, name, [first], checks, warmup=0)]
        rows[0]["prepare_ms"] = first["prepare"]
        if measured.samples:
            failures = self.failures(median_repetition(measured.samples), name, common["plan"])
            failures += [] if measured.repeats else ["the first picture, denoised again, has other latents"]
            timing = {"warmup": 1, "rejected": measured.rejected, "unsteady": measured.unsteady}
            rows.append(self.row("image", common, name, measured.samples, checks, failures, **timing))
            decodes = [{"decode": sample["decode"], "total": sample["decode"]} for sample in measured.samples]
            failures = [failure for failure in failures if failure.startswith("decode")]
            rows.append(self.row("decode", common, name, decodes, [image], failures, **timing))
        return rows

    def row(
        self, kind: str, common: dict, name: RunName, samples: list[dict], checks: list, failures=(), **timing
    ) -> dict:
        """One row; `samples` hold the stages (of a decode row, only that one) and the total of each repetition."""
        totals = [sample["total"] for sample in samples]
        checked, median = check.summary(checks, list(failures)), median_repetition(samples)
        method = {"method": "wall clock, synchronised", "n": len(totals)}
        row = {"kind": kind, **common, "status": "ok" if checked["passed"] else "FAIL"}
        row["timing"] = method | timing | {"ms": statistics_ms(totals), "raw_ms": totals}
        if kind != "decode":
            row["stages_ms"] = {stage: median[stage] for stage in (*STAGES, "per_step")}
        return row | {"work": self.work(median, name, common["plan"]), "check": checked}

    def macs(self, transformed: bool) -> dict[str, int]:
        """Multiply-adds of each stage that can't be avoided, for the whole batch. `transformed`: as `work.decoder_macs`."""
        w, config = self.workload, self.config
        scale = config.autoencoder.spatial_compression
        tokens = (w.height // scale) * (w.width // scale)
        guided = is_guided(w.guidance, config.dit)
        lengths = (1, w.text_tokens) if guided else (w.text_tokens,)  # the empty negative prompt is one token
        return {
            "denoise": w.batch * work.denoise_macs(config.dit, tokens, w.steps, lengths),
            "decode": w.batch * work.decoder_macs(config.autoencoder, w.height, w.width, transformed=transformed),
        }

    def work(self, stages: dict[str, float], name: RunName, plan: dict) -> dict:
        """GMAC of the stages, and what share of the measured peak that is."""
        macs, precisions = (
            self.macs(bool(plan.get("transformed"))),
            {"denoise": name.precision, "decode": name.precisions["autoencoder"]},
        )
        percent = {
            stage: self.peaks.percent(2 * macs, stages[stage] / 1e3, precisions[stage])
            for stage, macs in macs.items()
            if stage in stages
        }
        return {
            "gmac": {stage: macs / 1e9 for stage, macs in macs.items() if stage in stages},
            "peak": {stage: self.peaks.kind(precisions[stage]) for stage in percent},
            "pct_of_peak": percent,
        }

    def failures(self, stages: dict[str, float], name: RunName, plan: dict) -> list[str]:
        """What, besides parity, speaks against a measurement."""
        return [
            f"{stage} runs at {percent:.0f} % of the measured peak"
            for stage, percent in self.work(stages, name, plan)["pct_of_peak"].items()
            if percent is not None and percent > 100
        ]


def median_repetition(samples: list[dict[str, float]]) -> dict[str, float]:
    """The stages of the repetition with the median total; of an even number, the mean of the two in the middle."""
    ordered = sorted(samples, key=lambda sample: sample["total"])
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    return {stage: statistics.fmean(sample[stage] for sample in middle) for stage in middle[0]}
