"""`sana generate`: load a model, paint, write the pictures with their metadata, and say what it took."""

import argparse
import json
import platform
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from sana_kernels.backend import backend_status
from sana_model import batch
from sana_model.config import BUILT_IN
from sana_model.errors import MissingError, UserError
from sana_model.files import check_writable, write_text
from sana_model.pipeline import Pipeline, Result, load
from sana_model.plan import PIPELINES
from sana_model.png import SOFTWARE, Metadata, read_metadata, write_png
from sana_model.settings import setting
from sana_model.threads import use_threads
from sana_model.weights import hub

NAMED = ("model", "base", "decoder")
MODEL_FLAGS = (
    *NAMED,
    "backend",
    "precision",
    "text_precision",
    "decoder_precision",
    "dialect",
    "device",
    "exact",
    "lora",
)
PICTURE_FLAGS = (
    "prompt", "steps", "guidance", "seed", "negative_prompt", "num_images", "sampler", "pag_scale", "guidance_interval",
    "binning", "tiled",
)  # fmt: skip
STAGES = {
    "text_encode": "text encoder", "denoise": "denoising", "decode": "decoder", "other": "other", "total": "total",
}  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Carry out the parsed command line; raises UserError and MissingError."""
    use_threads(args.threads)
    picture, options = _picture_flags(args), _given(args, MODEL_FLAGS)
    if args.prompts is not None:
        return _paint_file(args, picture, options)
    keep = None  # the one picture of the batch that is wanted, if not all are
    if args.picture is not None:
        metadata = read_metadata(args.picture)
        picture, keep = _again(metadata, picture)
        options = _with_recorded(metadata, options, args.picture)
    if "prompt" not in picture:
        raise UserError("there is nothing to paint: give a PROMPT, --prompts FILE or --from PICTURE.png")

    # Everything that can be refused is refused before the model is loaded.
    output = args.output or Path("again.png" if args.picture else "out.png")
    if output.suffix.lower() != ".png":
        raise UserError(f"pictures are written as PNG, so the name must end in .png; {output} does not")
    files = batch.numbered(output, 1 if keep is not None else picture.get("num_images", 1))
    if args.json in files:
        raise UserError(f"--json {args.json} is one of the pictures; name another file")
    check_writable(*files, *([args.json] if args.json else []))

    pipe, load_ms = _load(args, options, picture)
    with closing(Bars()) as bars:
        result = pipe(**picture, progress=bars)
    wanted = range(result.settings.count) if keep is None else [keep]
    named = {name: options.get(name) for name in NAMED}
    pictures = [Metadata.of(pipe, result.settings, i, **named) for i in wanted]
    for file, metadata in zip(files, pictures, strict=True):
        write_png(file, result.images[metadata.index], metadata)
    print(_table(result))
    for file, metadata in zip(files, pictures, strict=True):
        print(f"{file}   seed {metadata.seed}")
    if args.json is not None:
        write_text(args.json, json.dumps(_stats(pipe, result, load_ms, files, pictures), indent=2) + "\n")
    return 0


class Bars:
    """A progress bar for each stage, on a terminal only."""

    def __init__(self):
        self._stage, self._bar = None, None

    def __call__(self, stage: str, done: int, of: int) -> None:
        """As `sana_model.pipeline.Progress`."""
        if stage != self._stage:
            self._open(stage)
        self._bar.total = of
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the terminal as it is."""
        if self._bar is not None:
            self._bar.close()

    def _open(self, stage: str) -> None:
        self.close()
        self._stage = stage
        unit = "step" if stage == "denoise" else "picture"
        self._bar = tqdm(desc=STAGES[stage], unit=unit, leave=stage == "denoise", disable=None)


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> dict:
    """The flags that were given, by name."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _picture_flags(args: argparse.Namespace) -> dict:
    """The fields of `Settings` that were given."""
    values = _given(args, PICTURE_FLAGS)
    if args.size is not None:
        values["width"], values["height"] = args.size
    if args.instruction in ("default", "none"):
        values["instruction"] = args.instruction
    elif args.instruction is not None:
        try:
            values["instruction"] = Path(args.instruction).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--instruction is default, none or a text file; {args.instruction}: {error}") from error
    return {name: setting(name, value) for name, value in values.items()}


def _again(metadata: Metadata, flags: dict) -> tuple[dict, int | None]:
    """The settings that paint a recorded picture again, and which picture of their batch it is (None: all are wanted).

    Without other flags the whole batch is painted again and one picture kept: rounding depends on the batch.
    """
    if not flags:
        return asdict(metadata.settings), metadata.index
    alone = replace(metadata.settings, prompt=metadata.prompt, seed=metadata.seed, num_images=1)
    return asdict(alone) | flags, None


def _with_recorded(metadata: Metadata, options: dict, file: Path) -> dict:
    """The recorded options of `load`, under those that were given."""
    recorded = metadata.load_options
    backend, model = recorded["backend"], recorded["model"]
    if "model" not in options and model not in BUILT_IN and not Path(model).exists() and not hub.parse(model):
        raise UserError(
            f"{file} was painted with the model {model}, which is not here; say where it is with --model PATH"
        )
    if "backend" not in options and backend in PIPELINES and (why := backend_status(backend)):
        raise MissingError(
            f"{file} was painted with backend {backend}, which cannot run here: {why}; add --backend auto to paint it "
            "with what can, equal but for rounding"
        )
    return recorded | options


def _load(args: argparse.Namespace, options: dict, picture: dict | None = None) -> tuple[Pipeline, float]:
    """The pipeline, introduced on the terminal, and how many ms it took to load."""
    options.setdefault("model", "sana-tiny")
    start = time.perf_counter()
    pipe = load(**options, low_memory=args.low_memory, cuda_graph=args.cuda_graph, picture=picture)
    load_ms = (time.perf_counter() - start) * 1e3
    label = " (random weights: timing only)" if pipe.model.random else ""
    dit, text, decoder = map(pipe.plan.described, ("dit", "text_encoder", "autoencoder"))
    print(f"{pipe.config.name}{label}, loaded in {load_ms:.0f} ms")
    print(f"backend {pipe.plan.backend} on {pipe.device}; {dit}, text encoder {text}, decoder {decoder}")
    if args.plan:
        print(pipe.plan)
    return pipe, load_ms


def _paint_file(args: argparse.Namespace, defaults: dict, options: dict) -> int:
    if args.prompt is not None or args.picture is not None or args.json is not None:
        raise UserError(f"--prompts goes without PROMPT, --from and --json (the folder gets a {batch.RESULTS})")
    entries, folder = batch.read(args.prompts), args.output or Path("out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made a folder: {error.strerror}") from error
    check_writable(folder / batch.RESULTS)
    pipe, _ = _load(args, options)
    named = {name: options.get(name) for name in NAMED}
    there = 0
    with closing(Bars()) as bars:
        for number, painted in enumerate(batch.paint(pipe, entries, defaults, folder, **named, progress=bars), 1):
            there += painted.timings is None
            took = "already there" if painted.timings is None else f"{painted.timings['total']:.0f} ms"
            tqdm.write(f"{number}/{len(entries)}  {', '.join(map(str, painted.files))}  {took}")
    print(f"{len(entries) - there} painted, {there} already there; {folder / batch.RESULTS}")
    return 0


def _table(result: Result) -> str:
    """ms per stage."""
    lines = [f"{name:<14}{result.timings[stage]:>10.1f} ms" for stage, name in STAGES.items()]
    lines[1] += f"   {result.settings.steps} × {result.timings['per_step']:.1f} ms"
    return "\n".join(lines)


def _stats(pipe: Pipeline, result: Result, load_ms: float, files: list[Path], pictures: list[Metadata]) -> dict:
    """What --json writes."""
    return {
        "model": pictures[0].load_options | {"source": pipe.model.source, "random": pipe.model.random},
        "settings": result.settings.as_json(),
        "seeds": [metadata.seed for metadata in pictures],
        "files": [str(file) for file in files],
        "timings_ms": result.timings | {"load": load_ms},
        "plan": result.plan,
        "device": str(pipe.device),
        "threads": torch.get_num_threads(),
        "versions": {"software": SOFTWARE, "torch": torch.__version__, "python": platform.python_version()},
    }
