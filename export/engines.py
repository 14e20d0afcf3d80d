"""The folder of `sana export tensorrt`: engines, and the model without its weights.

    ENGINES/export.json                     of the graphs that the engines were built from (sana_export.layout)
    ENGINES/transformer-<hash>.engine       also text_encoder-, decoder-; the hash is of all that the engine depends on
    ENGINES/transformer-<hash>.json         `Engine`; written last, so that an engine without it is unfinished
    ENGINES/model_index.json, tokenizer/    and the rest of the model's folder

So ENGINES is a model: `--model ENGINES --backend tensorrt` paints from it alone. One folder holds the engines of one
export, for as many GPUs as wanted.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sana_export import layout
from sana_export.layout import Manifest
from sana_model.errors import UserError
from sana_model.files import atomic, write_text

GRAPHS = ("text_encoder", "transformer", "decoder")
"""Of the graphs, those that painting takes."""

Ranges = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""An optimisation profile: input → its least, typical and largest shape."""


@dataclass(frozen=True)
class Engine:
    """What is known of one engine: the content of its .json."""

    graph: str
    precision: str
    attention: str  # plain, or plugin and the hash of its kernels
    graph_sha256: str  # of the .onnx file and its data
    weights_sha256: str  # of the parameters, as in export.json
    library: str  # that built it, and the only one that loads it: tensorrt-rtx 1.7.1.116
    target: str  # compute capability of the GPU that it is for: sm89
    profiles: tuple[Ranges, ...]
    refittable: bool
    bytes: int = 0
    weight_bytes: int = 0  # on the GPU
    activation_bytes: tuple[int, ...] = ()  # device memory that a run takes, by profile
    network_layers: int = 0  # as parsed
    layers: dict[str, int] | None = None  # after fusion, by type, of all profiles
    seconds: dict[str, float] | None = None  # parse, build

    @property
    def stem(self) -> str:
        """The name of its files: the hash is of what it depends on, and of nothing that came out of the build."""
        depends = (self.graph_sha256, self.attention, self.library, self.target, self.profiles, self.refittable)
        return f"{self.graph}-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}"

    def summary(self) -> str:
        """One line for a person."""
        counts = sorted((self.layers or {}).items(), key=lambda item: -item[1])
        layers = ", ".join(f"{count} {kind}" for kind, count in counts)
        activations = max(self.activation_bytes, default=0)
        return (
            f"{self.graph} ({self.precision}, {self.target}): {self.bytes / 2**20:.1f} MiB, weights"
            f" {self.weight_bytes / 2**20:.1f} MiB, activations at most {activations / 2**20:.0f} MiB;"
            f" {self.network_layers} layers → {sum((self.layers or {}).values())} in {len(self.profiles)} profiles: {layers}"
        )


def engine_file(folder: Path, engine: Engine) -> Path:
    return folder / f"{engine.stem}.engine"


def write(folder: Path, engine: Engine, content) -> Path:
    """Write an engine (anything with the buffer protocol), then its .json; both are whole or not there."""
    path = engine_file(folder, engine)
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(content)
    write_text(path.with_suffix(".json"), json.dumps(asdict(engine), indent=2) + "\n")
    return path


def read(path: Path) -> Engine:
    """The record beside an engine. Raises UserError where it is damaged or not of its engine."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        profiles = tuple({name: tuple(map(tuple, shapes)) for name, shapes in p.items()} for p in values["profiles"])
        return Engine(**values | {"profiles": profiles, "activation_bytes": tuple(values["activation_bytes"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}; delete it and its engine, and build again") from error


def built(folder: Path, graph: str) -> list[Engine]:
    """Every finished engine of a graph in a folder, the latest first."""
    records = sorted(folder.glob(f"{graph}-*.json"), key=lambda path: -path.stat().st_mtime)
    return [read(path) for path in records if path.with_suffix(".engine").is_file()]


def choose(folder: Path, manifest: Manifest, graph: str, library: str, target: str, gpu: str) -> Engine:
    """The engine of `graph` that this library runs on this GPU. Raises UserError that says what there is instead."""
    again = f"build them with: sana export tensorrt GRAPHS -o {folder} --target {target}"
    engines = built(folder, graph)
    if not engines:
        raise UserError(f"{folder} has no {graph} engine; {again}")
    made = manifest.graphs[graph]
    weights = made.sha256
    if not (related := [engine for engine in engines if engine.weights_sha256 == weights]):
        raise UserError(
            f"the {graph} engine in {folder} was built from other weights ({engines[0].weights_sha256[:12]}) than"
            f" {manifest.model}'s ({weights[:12]}); {again}"
        )
    if not (same := [engine for engine in related if engine.graph_sha256 == made.file_sha256]):
        raise UserError(
            f"the {graph} engine in {folder} was built from another graph of these weights, such as one of another"
            f" calibration, than its {layout.MANIFEST} tells of; {again}"
        )
    if not (fitting := [engine for engine in same if engine.target == target]):
        targets = ", ".join(dict.fromkeys(engine.target for engine in same))
        raise UserError(f"the {graph} engines in {folder} are for {targets}, and this GPU ({gpu}) is {target}; {again}")
    if not (loadable := [engine for engine in fitting if engine.library == library]):
        raise UserError(
            f"the {graph} engine in {folder} was built by {fitting[0].library}, which alone can load it, and installed is"
            f" {library}; {again}"
        )
    return loadable[0]


def copy_model(graphs: Path, manifest: Manifest, engines: Path) -> None:
    """Make `engines` a model: everything of `graphs` but the graphs themselves. Raises UserError where another one is.

    Engines that are there still belong to the graphs that its manifest tells of, until others are `finished`.
    """
    if engines.resolve() == graphs.resolve():
        return
    if layout.is_export(engines):
        there = layout.read(engines)
        if _identity(there) != _identity(manifest):
            raise UserError(
                f"{engines} holds engines of another export ({_name(there)}) than {graphs} ({_name(manifest)}); choose"
                " another folder with -o"
            )
        manifest = there
    for source in sorted(path for path in graphs.rglob("*") if path.is_file() and ".onnx" not in path.suffixes):
        if source.name == layout.MANIFEST or source.suffix == ".engine":
            continue
        target = engines / source.relative_to(graphs)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target) as temporary:
            shutil.copyfile(source, temporary)
    layout.write(engines, manifest)


def finished(folder: Path, name: str, graph: layout.Graph) -> None:
    """Note in the manifest of a folder that its engine is there of this graph."""
    manifest = layout.read(folder)
    layout.write(folder, replace(manifest, graphs=manifest.graphs | {name: graph}))


def _identity(manifest: Manifest) -> tuple:
    graphs = {name: (graph.precision, graph.sha256) for name, graph in manifest.graphs.items()}
    return manifest.model, manifest.attention, manifest.profile, graphs


def _name(manifest: Manifest) -> str:
    precision = manifest.precisions.get("dit", "")
    return f"{manifest.model}, {precision}, attention {manifest.attention}, profile {manifest.profile.name}"
