"""`sana bench quality`: what a precision, a kernel or a training costs in pictures. docs/quality.md explains every figure.

All runs paint the same prompts from the same noise, batch by batch, beside the same weights computed in fp32. Of each
picture its distance from the fp32 one is kept and, where the prompt says what to paint, whether a scorer finds it there.
The runs also predict single steps on the way that the fp32 run took: on a way of their own, small errors add up to
another picture, which need not be a worse one; on the fp32 run's way, they show how large the errors are.

Two rows are always there: fp32, the original, and `reference:bf16`, the noise floor: no 16-bit run should be asked for
more than what plain PyTorch loses.
"""

import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sana_bench import check, efficientnet, metrics, published, reference
from sana_bench.harness import Results
from sana_bench.outcome import Outcome
from sana_bench.runs import PipelineRun, make
from sana_bench.scorer import Scorer, Verdict, prompts_of_concepts
from sana_bench.sheet import write_sheet
from sana_bench.weights import Moment, RunName, Weights
from sana_model import batch, scheduler
from sana_model.dit import DiT
from sana_model.errors import UserError
from sana_model.pipeline import Pipeline
from sana_model.plan import dtype_name, resolve
from sana_model.prompt import CaptionStates
from sana_model.settings import Settings
from sana_model.weights.loaded import LoadedModel

ORIGINAL, NOISE_FLOOR = RunName("reference", "fp32"), RunName("reference", "bf16")
STEP_PROMPTS, STEP_TIMES = 64, 5  # single steps: of so many prompts, at so many times of the schedule
SHEET_ROWS = 32


@dataclass(frozen=True)
class Workload:
    """What every run paints."""

    height: int
    width: int
    steps: int
    guidance: float
    images: int = 512
    batch: int = 8


@dataclass
class Scores(Outcome):
    """What is known of the pictures of one run."""

    name: RunName
    run: object | None  # None: the fp32 original
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # figure → one per picture
    verdicts: list[Verdict] = field(default_factory=list)
    features: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # network → (B, D) per batch
    checks: list[check.Check] = field(default_factory=list)  # of text encoder and decoder
    shown: list[Tensor] = field(default_factory=list)  # the first pictures, for the sheet
    painted: int = 0


@dataclass(frozen=True)
class Wanted:
    """What fp32 makes of a batch, and so should every run."""

    pictures: Tensor  # (B, 3, H, W) uint8
    maps: list[Tensor]  # their feature maps
    moments: list[tuple[Moment, Tensor]]  # evaluations of the DiT on the way: what went in, its raw output in fp32
    captions: check.Captions
    latents: Tensor  # (1, 32, h, w), of the first picture
    image: Tensor  # (1, 3, H, W), what the decoder makes of them


@dataclass(frozen=True)
class Judges:
    """Who looks at the pictures. None of them is needed for SQNR, PSNR and SSIM."""

    network: efficientnet.Judge | None = None
    scorer: Scorer | None = None
    papers: published.Published = field(default_factory=published.Published)

    @classmethod
    def load(cls, device: torch.device, *, random: bool, sets: bool) -> "Judges":
        """All that are needed; `sets`: to compare whole sets of pictures. MissingError without the network's weights.

        Random weights paint nothing, so there nobody is asked what a picture shows.
        """
        network = efficientnet.load(device) if sets or not random else None
        return cls(network, None if random else Scorer(), published.find(device))

    def networks(self) -> dict[str, reference.Network]:
        """Those whose features sets of pictures are compared by."""
        found = {"efficientnet_lite1": self.network and (lambda pictures: self.network(pictures)[1])}
        found["inception"] = self.papers.inception
        return {name: network for name, network in found.items() if network}


class QualityBench:
    """One comparison. `run()` paints and scores; the rows are in `results.document`."""

    def attempt(self, scores: Scores, action, *args):
        """action(*args), or None where it can't be (`Outcome.attempt`)."""
        return scores.attempt(scores.name, scores.run.close, self.say, action, *args, missing=scores.run.missing)

    def __init__(
        self, loaded: LoadedModel, names: Sequence[RunName], workload: Workload, prompts: Sequence[str],
        device: torch.device, results: Results, *, judges: Judges, folder: dict[str, Tensor] | None = None,
        trained_on: str | None = None, seed: int = 0, say: Callable[[str], None] = print,
    ):  # fmt: skip
        """`prompts`: painted in order, again from the start when there are fewer than images. `folder`: features of
        the pictures to compare the whole set with, by network (see `sana_bench.reference`)."""
        self.weights, self.config, self.device = Weights(loaded, device), loaded.config, device
        self.workload, self.prompts, self.results, self.seed, self.say = workload, prompts, results, seed, say
        self.judges, self.folder, self.trained_on = judges, folder or {}, trained_on
        self.asked = {asked.prompt: asked for asked in prompts_of_concepts()} if judges.scorer else {}
        stored = self.weights.stored
        plan = resolve(loaded.config, "reference", device, {part: dtype_name(dtype) for part, dtype in stored.items()})
        self.oracle = Pipeline(self.weights.model(stored), plan, device, stored, low_memory=False)
        self.original = Scores(ORIGINAL, None)
        others = [name for name in dict.fromkeys((NOISE_FLOOR, *names)) if name != ORIGINAL]
        self.scores = {str(name): Scores(name, make(name, self.weights)) for name in others}
        self.settings(0, 1)  # a wrong size or guidance is refused before anything is painted

    def run(self) -> dict:
        """Paint and score everything, and return the document. What was scored before Ctrl-C is kept."""
        w = self.workload
        with torch.inference_mode():
            for name, scores in self.scores.items():
                self.say(f"{name}: preparing")
                self.attempt(scores, scores.run.prepare, self.settings(0, min(w.batch, w.images)))
            for start in range(0, w.images, w.batch):
                settings = self.settings(start, min(w.batch, w.images - start))
                wanted = self.paint_original(settings, start < STEP_PROMPTS)
                for scores in self.scores.values():
                    if scores.status == "ok":
                        self.attempt(scores, self.paint, scores, settings, wanted)
                self.results.replace(self.rows())
                self.say(f"{start + settings.count} of {w.images} pictures")
        return self.results.document

    def settings(self, start: int, count: int) -> Settings:
        """Those of pictures start, start + 1, …: picture i is drawn from seed + i."""
        w = self.workload
        prompts = [self.prompts[i % len(self.prompts)] for i in range(start, start + count)]
        return self.oracle.settings(
            prompts, width=w.width, height=w.height, steps=w.steps, guidance=w.guidance, seed=self.seed + start
        )

    # ------------------------------------------------------------------------------------------ painting

    def paint_original(self, settings: Settings, with_moments: bool) -> Wanted:
        """A batch in fp32, scored; with evaluations from the whole schedule where they are asked for."""
        last = settings.steps - 1
        wanted = {round(last * k / (STEP_TIMES - 1)) for k in range(STEP_TIMES)} if with_moments else set()
        with check.ComputeInFp32(), recorded(self.oracle.dit, wanted) as steps:
            captions = self.oracle.encode(settings)
            latents = self.oracle.denoise(settings, captions)
            images = torch.cat([self.oracle.decode(latent, settings) for latent in latents.split(1)])
        pictures = metrics.to_bytes(images)
        moments = self.moments(settings, captions, steps) if with_moments else []
        maps = self.look(self.original, settings, pictures)
        return Wanted(pictures, maps, moments, captions, latents[:1], images[:1])

    def moments(self, settings: Settings, captions, steps: list[tuple[int, Tensor, Tensor]]) -> list:
        """Recorded steps (i, input, output) as the moments that every run can be asked about."""
        states = CaptionStates.stack([
            group.states[i, :length]
            for group in captions if group is not None  # negative, positive
            for i, length in enumerate(group.lengths.tolist())
        ])  # fmt: skip
        times = scheduler.timesteps(self.config.scheduler, settings.steps).model_times

        def moment(i: int, latents: Tensor) -> Moment:
            def for_each_row(value: float) -> Tensor:
                return torch.full((len(latents),), value, device=self.device)

            guidance = for_each_row(settings.guidance) if self.config.dit.guidance_embeds else None
            return Moment(latents, for_each_row(float(times[i])), states.states, states.lengths, guidance)

        return [(moment(i, latents), velocity.float()) for i, latents, velocity in steps]

    def paint(self, scores: Scores, settings: Settings, wanted: Wanted) -> None:
        """A batch by one run, scored."""
        run, count = scores.run, settings.count
        ours = isinstance(run, PipelineRun)  # our pipeline draws the noise of the seed itself; others are given it
        captions = run.text_encode(settings)
        if not scores.checks:
            scores.checks = self.check_parts(run, settings, captions, wanted)
        latents = run.denoise(settings, captions, None if ours else self.noise(settings))
        pictures = metrics.to_bytes(run.decode(latents, settings))
        if wanted.moments:
            by_time = [_sqnr_of_prompts(run.velocity(moment), expected, count) for moment, expected in wanted.moments]
            scores.values["step_sqnr_db"] += [statistics.fmean(values) for values in zip(*by_time, strict=True)]
        scores.values["psnr_db"] += metrics.psnr(pictures, wanted.pictures).tolist()
        scores.values["ssim"] += metrics.ssim(pictures, wanted.pictures).tolist()
        maps = self.look(scores, settings, pictures)
        if maps:
            scores.values["feature_distance"] += metrics.feature_distance(maps, wanted.maps).tolist()
        if self.judges.papers.lpips:
            scores.values["lpips"] += self.judges.papers.lpips(pictures, wanted.pictures)

    def check_parts(self, run, settings: Settings, captions, wanted: Wanted) -> list[check.Check]:
        """What no step shows: the decoder, on latents of the fp32 run, and of ours the captions. Of the first batch."""
        judged = run.judged
        checks = [check.image_check(run.decode(wanted.latents, settings), wanted.image, judged["autoencoder"])]
        if isinstance(run, PipelineRun):
            random = self.weights.loaded.random
            checks += check.caption_checks(captions, wanted.captions, judged["text_encoder"], random=random)
        return checks

    def noise(self, settings: Settings) -> Tensor:
        """What our pipeline draws for these settings, (B, 32, h, w)."""
        scale = self.config.autoencoder.spatial_compression
        shape = (self.config.dit.in_channels, settings.height // scale, settings.width // scale)
        seeds = range(settings.seed, settings.seed + settings.count)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.device)

    def look(self, scores: Scores, settings: Settings, pictures: Tensor) -> list[Tensor]:
        """Note what the judges say of a batch by itself; its feature maps, where there is a network."""
        judges, maps = self.judges, []
        scores.painted += len(pictures)
        scores.shown += pictures[: SHEET_ROWS - len(scores.shown)].cpu()
        if judges.network:
            maps, pooled = judges.network(pictures)
            scores.features["efficientnet_lite1"].append(pooled.cpu())
            if judges.scorer:
                asked = [self.asked.get(prompt) for prompt in settings.prompts]
                scores.verdicts += judges.scorer.judge(asked, pictures, pooled)
        if judges.papers.inception:
            scores.features["inception"].append(judges.papers.inception(pictures).cpu())
        if judges.papers.clip:
            scores.values["clip_score"] += judges.papers.clip(pictures, settings.prompts)
        return maps

    # ------------------------------------------------------------------------------------------ rows

    def rows(self) -> list[dict]:
        """Everything that is known by now."""
        return [self.row(s) for s in (self.original, *self.scores.values()) if s.painted or s.status != "ok"]

    def row(self, scores: Scores) -> dict:
        w, name = self.workload, scores.name
        row = {
            "kind": "quality", "name": f"{self.config.name}_{w.width}x{w.height}", "backend": name.backend,
            "precision": name.label, "weights": self.weights.loaded.source, "workload": asdict(w),
        }  # fmt: skip
        if scores.status != "ok":
            return row | {"status": scores.status, "reason": scores.reason}
        figures, intervals = self.figures(scores)
        row |= {"status": "ok", "painted": scores.painted, "noise_floor": name == NOISE_FLOOR}
        row |= {"metrics": figures, "intervals": intervals}
        if scores.run is None:  # its weights are held as they are stored, and computed with in fp32
            plan = resolve(self.config, "reference", self.device, dict.fromkeys(self.weights.stored, "fp32"))
            return row | {"plan": plan.as_json()}
        value, limit = figures["step_sqnr_db"], check.DIT_LIMITS[scores.run.judged["dit"]]
        step = check.Check("fp32", "step_sqnr_db", value, limit, value >= limit)
        checked = check.summary([step, *scores.checks], [])
        return row | {"status": "ok" if checked["passed"] else "FAIL", "check": checked, "plan": scores.run.plan()}

    def figures(self, scores: Scores) -> tuple[dict, dict]:
        """(figures, their 95 % intervals)."""
        figures = {name: statistics.fmean(values) for name, values in scores.values.items()}
        intervals = {name: metrics.bootstrap_interval(torch.tensor(values)) for name, values in scores.values.items()}
        for name, found in accuracies(scores.verdicts).items():
            figures[name] = statistics.fmean(found)
            intervals[name] = metrics.wilson_interval(sum(found), len(found))
        if scores.verdicts:
            ceilings = self.judges.scorer.ceiling(min(self.workload.height, self.workload.width))
            figures |= {"ceiling": ceilings["concept"], "ceilings": ceilings}
        if scores.painted == self.workload.images:  # distances of sets take long, and mean little of a part
            for network, theirs in self.folder.items():
                figures |= reference.distances(torch.cat(scores.features[network]), theirs, network)
        if self.trained_on:
            figures["trained_on"] = self.trained_on
        return figures, intervals

    def write_sheet(self, file: Path) -> None:
        """The first pictures of every run as a PNG."""
        shown = {str(s.name): s.shown for s in (self.original, *self.scores.values()) if s.shown}
        rows = min(SHEET_ROWS, self.original.painted)
        write_sheet(file, shown, [self.prompts[i % len(self.prompts)] for i in range(rows)])


def _sqnr_of_prompts(actual: Tensor, expected: Tensor, count: int) -> list[float]:
    """dB of each of `count` prompts: over all of its rows, both halves of a guided batch."""
    return [check.sqnr(actual[i::count], expected[i::count]) for i in range(count)]


def accuracies(verdicts: Sequence[Verdict]) -> dict[str, list[bool]]:
    """Right or wrong, by figure. A held-out pair is right where concept and style are: either alone was seen."""
    found = {
        "concept_accuracy": [v.concept for v in verdicts if not v.held_out],
        "heldout_accuracy": [v.concept and v.style for v in verdicts if v.held_out],
        "style_accuracy": [v.style for v in verdicts],
        "background_accuracy": [v.background for v in verdicts],
    }
    return {name: right for name, right in found.items() if right}


@contextmanager
def recorded(dit: DiT, wanted: set[int]) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
    """Within the block, the evaluations of `dit.step` with these numbers are kept: (number, latents, output)."""
    kept, numbers, step = [], itertools.count(), dit.step

    def step_and_keep(latents: Tensor, *args, **kwargs) -> Tensor:
        velocity, number = step(latents, *args, **kwargs), next(numbers)
        if number in wanted:
            kept.append((number, latents, velocity))
        return velocity

    dit.step = step_and_keep
    try:
        yield kept
    finally:
        del dit.step  # that of the class is back


def read_prompts(file: Path | None) -> list[str]:
    """The prompts of a file, or those of the concepts. Raises UserError for a file that says more than prompts."""
    if file is None:
        return [asked.prompt for asked in prompts_of_concepts()]
    entries = batch.read(file)
    for entry in entries:
        if set(entry.values) != {"prompt"}:
            raise UserError(f"{entry.place}: every run paints all prompts with the same settings; give them as flags")
    return [entry.values["prompt"] for entry in entries]


def trained_on(folder: Path | None) -> str | None:
    """gpu or cpu, where the model card of a folder says so: `trained_on: gpu` on a line of its README.md."""
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return None
    found = re.search(r"^trained_on: *(gpu|cpu) *$", card.read_text(encoding="utf-8"), re.MULTILINE)
    return found and found[1]
