"""`sana export tensorrt`: ONNX graphs to TensorRT engines, for a GPU that is here or, with TensorRT-RTX, one that isn't.

    parse       the ONNX file, whose tensors have their types: TensorRT takes precision from nothing else
    profiles    ranges of shapes, each compiled by itself (`partition`)
    build       fusion, and on `tensorrt` the choice of kernels by timing them; RTX compiles kernels where it runs
    record      what the engine is, and which layers it became (sana_export.engines)

Nothing is left half-written: Ctrl-C ends a build at its next step, and files appear whole.

Refitting (replacing weights without a build) has to be asked for: it keeps TensorRT from folding weights into constants.
The RTX builder of 1.7 makes refittable and stripped engines only where there is a GPU (bench/notes/tensorrt.md).
"""

import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from sana_export import engines, layout, plugin
from sana_export.engines import Engine, Ranges
from sana_export.layout import Manifest, Profile
from sana_model.config import ModelConfig
from sana_model.errors import MissingError, UserError
from sana_model.exported import tensorrt_library
from sana_model.exported.tensorrt_library import Library
from sana_model.files import atomic
from sana_model.weights.models import find

PROFILES = 5  # at most; each costs a build of its own and 10 to 15 MiB, and saves device memory
REPORT_EVERY = 5.0  # seconds, within a phase

Say = Callable[[str], None]


def build_engines(
    graphs: Path, folder: Path, target: str, *, only: tuple[str, ...] = engines.GRAPHS, refit: bool = False, say: Say = print
) -> list[Engine]:  # fmt: skip
    """Build the engines of an export for `target` (sm89, ..., or "current"), those that are there already excepted.

    Raises UserError for a folder that is no export, and MissingError where TensorRT or, for this target, a GPU is missing.
    """
    if unknown := set(only) - set(engines.GRAPHS):
        raise UserError(f"no engine is made of {', '.join(sorted(unknown))}, but of {', '.join(engines.GRAPHS)}")
    manifest = layout.read(graphs, only)
    library, target = tensorrt_library.find(target)
    attention = plugin.name(library) if manifest.attention == "plugin" else manifest.attention
    config = find(str(graphs)).config
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made a folder: {error.strerror}") from error
    engines.copy_model(graphs, manifest, folder)
    # Of what is built now, the files as they are: somebody may have worked on them after the export.
    found = {graph: replace(manifest.graphs[graph], file_sha256=layout.file_sha256(graphs, graph)) for graph in only}
    manifest = replace(manifest, graphs=manifest.graphs | found)
    return [
        _engine(_Job(graphs, folder, manifest, config, library, target, attention, refit, say), graph) for graph in only
    ]


@dataclass(frozen=True)
class _Job:
    graphs: Path
    folder: Path
    manifest: Manifest
    config: ModelConfig
    library: Library
    target: str
    attention: str
    refit: bool
    say: Say


def _engine(job: _Job, graph: str) -> Engine:
    made = job.manifest.graphs[graph]
    engine = Engine(
        graph=graph, precision=made.precision, attention=job.attention,
        graph_sha256=made.file_sha256, weights_sha256=made.sha256,
        library=str(job.library), target=job.target, refittable=job.refit,
        profiles=profiles(job.manifest.profile, graph, job.config),
    )  # fmt: skip
    there = next((other for other in engines.built(job.folder, graph) if other.stem == engine.stem), None)
    if there is not None:
        job.say(f"{engines.engine_file(job.folder, there)}: already there")
        engines.finished(job.folder, graph, made)
        return there
    job.say(f"{graph} ({made.precision}) for {job.target} with {job.library}")
    engine, content = build(engine, layout.graph_file(job.graphs, graph), job.library, _timing_cache(job), job.say)
    path = engines.write(job.folder, engine, content)
    engines.finished(job.folder, graph, made)
    job.say(f"{engine.summary()}\n{path}")
    return engine


def profiles(profile: Profile, graph: str, config: ModelConfig) -> tuple[Ranges, ...]:
    """The optimisation profiles of a graph: one per group of sizes, or one where its shapes know no size."""
    signature, made = layout.signature(graph, config), []
    for sizes in partition(profile.sizes):
        least, typical, most = replace(profile, sizes=sizes).dims(graph, config)
        shapes = [signature.input_shapes(**dims) for dims in (least, typical, most)]
        ranges = {name: tuple(shape[name] for shape in shapes) for name in signature.inputs}
        if ranges not in made:
            made.append(ranges)
    return tuple(made)


def partition(sizes: tuple[tuple[int, int], ...], most: int = PROFILES) -> list[tuple[tuple[int, int], ...]]:
    """Sizes (height, width) in at most `most` groups of neighbouring ratios, so that the largest group's box is smallest.

    A profile covers every height and width within its ranges and takes the memory of the largest of both: one over all
    33 bins of a 1024 px model that of 2048 × 2048.
    """
    ordered = sorted(sizes, key=lambda size: size[0] / size[1])

    @cache
    def best(last: int, groups: int) -> tuple[int, int, tuple[int, ...]]:
        """Of the first `last` sizes: (largest box, sum of the boxes, where the groups start)."""
        found = []
        for first in range(last if groups > 1 else 1):
            largest, total, starts = best(first, groups - 1) if first else (0, 0, ())
            heights, widths = zip(*ordered[first:last], strict=True)
            box = max(heights) * max(widths)
            found.append((max(largest, box), total + box, (*starts, first)))
        return min(found)

    starts = best(len(ordered), most)[2]
    ends = (*starts[1:], len(ordered))
    return [tuple(ordered[start:end]) for start, end in zip(starts, ends, strict=True)]


def build(engine: Engine, file: Path, library: Library, timing_cache: Path | None, say: Say) -> tuple[Engine, object]:
    """(what is known of the engine now, its bytes). Raises UserError where TensorRT refuses the graph."""
    api, log = library.api, tensorrt_library.log(library)
    with log.collect(), _interruptible() as interrupted:
        start = time.perf_counter()
        builder = api.Builder(log)
        plugins = engine.attention != "plain"
        flags = plugin.network_flags(api) if plugins else 0
        network = builder.create_network(flags | 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = api.OnnxParser(network, log)
        if plugins:
            plugin.register(library)
            parsed = parser.parse(plugin.split_file(file), str(file))
        else:
            parsed = parser.parse_from_file(str(file))
        if not parsed:
            reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise UserError(f"{library} cannot read {file}: {tensorrt_library.why(reasons or log.errors)}")
        seconds = {"parse": time.perf_counter() - start}

        config = builder.create_builder_config()
        # Whatever is chosen here and does not follow from the graph belongs in `Engine.stem`.
        for ranges in engine.profiles:
            config.add_optimization_profile(_profile(builder, network, ranges, file))
        if engine.refittable:
            config.set_flag(api.BuilderFlag.REFIT)
        config.profiling_verbosity = api.ProfilingVerbosity.DETAILED  # names of layers, for the summary
        if hasattr(config, "num_compute_capabilities"):
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(api.ComputeCapability, engine.target.upper()), 0)
        cache = _attach(config, timing_cache)
        config.progress_monitor = _monitor(api, say, interrupted)

        content = builder.build_serialized_network(network, config)
        if interrupted.is_set():
            raise KeyboardInterrupt
        if content is None:
            raise _failed(engine, library, log.errors)
        seconds["build"] = time.perf_counter() - start - seconds["parse"]
        if cache is not None:
            with atomic(timing_cache) as temporary:
                temporary.write_bytes(cache.serialize())
        facts = [*log.facts, *([] if any("LayerType" in fact for fact in log.facts) else _inspect(library, content))]
    return replace(
        engine, bytes=content.nbytes, network_layers=network.num_layers, layers=layer_types(facts), seconds=seconds,
        weight_bytes=max(_sizes(facts, "Weights"), default=0), activation_bytes=tuple(_sizes(facts, "Activation")),
    ), content  # fmt: skip


def layer_types(facts: list[str]) -> dict[str, int]:
    """Layers by type, from the inspector's listing: a line `Name: ..., LayerType: gemm, ...` for each."""
    return dict(Counter(kind for fact in facts for kind in re.findall(r"LayerType: (\w+)", fact)))


def _sizes(facts: list[str], what: str) -> list[int]:
    """The numbers of "Total Activation Memory: 77620736 bytes", one per profile."""
    return [int(match[1]) for fact in facts if (match := re.match(rf"Total {what} Memory: (\d+) bytes", fact))]


def _inspect(library: Library, content) -> list[str]:
    """The inspector's listing, where the builder logged none. It needs the engine loaded, and so the GPU it is for."""
    runtime = library.api.Runtime(tensorrt_library.log(library))  # which the engine needs as long as it lives
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        return []
    return [engine.create_engine_inspector().get_engine_information(library.api.LayerInformationFormat.ONELINE)]


def _profile(builder, network, ranges: Ranges, file: Path):
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    if sorted(names) != sorted(ranges):
        raise UserError(
            f"{file} takes {', '.join(names)}, and its export.json says {', '.join(ranges)}; export it again"
        )
    profile = builder.create_optimization_profile()
    for name, shapes in ranges.items():
        profile.set_shape(name, *shapes)
    return profile


def _failed(engine: Engine, library: Library, errors: list[str]) -> UserError:
    why = tensorrt_library.why(errors)
    if engine.refittable and not torch.cuda.is_available():
        return MissingError(
            f"{library} makes engines that can be refitted only on a machine with a GPU; leave out --refit ({why})"
        )
    return UserError(f"{library} cannot build the {engine.graph} engine for {engine.target}: {why}")


def _timing_cache(job: _Job) -> Path | None:
    """Where `tensorrt` keeps how long its kernels took on this GPU. RTX times nothing while it builds."""
    return (
        None if job.library.name == "tensorrt-rtx" else job.folder / f"timing-{job.target}-{job.library.version}.cache"
    )


def _attach(config, timing_cache: Path | None):
    if timing_cache is None:
        return None
    cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
    config.set_timing_cache(cache, False)
    return cache


def _monitor(api, say: Say, interrupted: threading.Event):
    """Tells of every phase that begins, of slow steps within it, and ends the build once `interrupted` is set."""

    class Monitor(api.IProgressMonitor):
        def __init__(self):
            super().__init__()
            self.start = self.last = time.perf_counter()
            self.steps: dict[str, int] = {}

        def phase_start(self, name, parent, steps):
            self.steps[name] = steps
            if parent is None or len(self.steps) <= 3:  # its parts and theirs
                self.report(name)

        def phase_finish(self, name):
            self.steps.pop(name, None)

        def step_complete(self, name, step):
            if time.perf_counter() - self.last > REPORT_EVERY:
                self.report(f"{name} {step + 1}/{self.steps.get(name, '?')}")
            return not interrupted.is_set()

        def report(self, what: str):
            self.last = time.perf_counter()
            say(f"{self.last - self.start:7.1f} s  {what}")

    return Monitor()


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets. An exception must not pass through TensorRT's C++, which would end the process."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
