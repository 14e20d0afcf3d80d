"""`sana export check`: does every graph compute what its network computes, and does the picture come out?

Each graph runs in ONNX Runtime, its network in PyTorch, on the same inputs: three shapes, of which none is the one that was
traced, zeros, and values with outliers. What counts is the error against the network in fp32, with the weights as they
were exported:

    fp32             RMS of the error ≤ 1e-4 × RMS of the output
    16 bits, W8A8    at most twice the error that PyTorch makes in that precision; the graph runs as its twin

In W8A8 that is the network with the same quantised layers, which says nothing of how well they were quantised; so its three
shapes are also compared with the network before, and must keep `UNQUANTISED` dB. NaN fails. Then the graphs alone paint a
picture, which is compared with that of PyTorch in fp32.
"""

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sana_bench.check import DIT_LIMITS, ComputeInFp32, dit_check
from sana_bench.metrics import psnr
from sana_export import graphs, layout
from sana_export.exporter import network_for, sha256
from sana_export.layout import GRAPHS, Manifest
from sana_export.twin import write_twin
from sana_model.config import ModelConfig
from sana_model.errors import UserError
from sana_model.exported import onnxruntime
from sana_model.exported.pipeline import pipeline
from sana_model.pipeline import load
from sana_model.settings import DTYPES
from sana_model.weights.models import Source, find
from sana_model.weights.verify import Report, Row

FP32_ERROR, TIMES_EAGER = 1e-4, 2.0
UNQUANTISED = DIT_LIMITS["w8a8"] - 4
"""dB that a W8A8 transformer must keep beside the network that was quantised: 4 less than on a sampler's way, for its static
scales were made there, and these inputs are noise. It was set on two models, only the small one of them trained: sana-tiny
keeps 30, random weights of 0.6B's widths after a calibration of a single step 20; with scales a tenth as large neither keeps
more than 6 at any shape."""
PSNR = {"fp32": 45.0, "bf16": 20.0, "fp16": 20.0, "w8a8": 15.0, "w4a16": 15.0}
"""Smallest peak signal-to-noise ratio of the pictures in dB, by the weakest precision of the graphs that paint them;
sana-tiny keeps 32 in W8A8. Two pictures that have nothing in common are about 10 apart."""
PROMPT = "a 3d render of a fox on a teal background"


@dataclass(frozen=True)
class Case:
    """One set of inputs."""

    name: str
    sizes: dict[str, int]  # of the named dimensions
    factor: float = 1.0  # of normal values
    outliers: bool = False

    @property
    def usual(self) -> bool:
        """Values of about the size that a network meets while it paints."""
        return self.factor == 1 and not self.outliers


def cases(config: ModelConfig) -> tuple[Case, ...]:
    """Three shapes (a single latent pixel; a wide one; a tall one with the longest caption), zeros, and outliers.

    Small ones: the arithmetic does not depend on the size, and full-size decoders take minutes.
    """
    step = config.autoencoder.spatial_compression

    def sizes(batch: int, height: int, width: int, tokens: int) -> dict[str, int]:
        latents = {"latent_height": height, "latent_width": width}
        return latents | {"batch": batch, "tokens": tokens, "height": height * step, "width": width * step}

    wide = sizes(2, 2, 3, 5)
    return (
        Case("1 × 1", sizes(1, 1, 1, 1)),
        Case("2 × 3, batch 2", wide),
        Case("3 × 2, batch 3", sizes(3, 3, 2, config.max_text_tokens)),
        Case("zeros", wide, factor=0.0),
        Case("outliers", wide, outliers=True),
    )


def check(folder: str | Path, model: str | None = None, steps: int = 4) -> Report:
    """Compare the graphs of `folder` with `model`, by default the one that they were made of; `steps` of the picture.

    Raises UserError for a folder without graphs, another model, or graphs that only TensorRT can run, and MissingError
    without onnxruntime.
    """
    onnxruntime.package()
    folder = Path(folder)
    manifest = layout.read(folder)
    manifest = layout.read(folder, manifest.graphs)
    if manifest.attention != "plain":
        raise UserError(
            f"{folder} holds plugins, which only TensorRT engines have; what can be checked is --attention plain"
        )
    source = find(model or manifest.model, manifest.base)
    config = source.config.with_dialect(manifest.dialect)
    rows = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".twins-") as twins:
        sessions = {
            name: _session(folder, Path(twins), name, graph.precision) for name, graph in manifest.graphs.items()
        }
        with torch.inference_mode():
            for graph in manifest.graphs:
                rows += _graph(source, config, manifest, graph, sessions[graph])
                gc.collect()
            if set(GRAPHS[:3]) <= set(manifest.graphs):
                rows.append(_picture(folder, manifest, model or manifest.model, sessions, steps))
    versions = f"ONNX Runtime {onnxruntime.package().__version__}", f"PyTorch {torch.__version__}"
    return Report(f"{folder} in {versions[0]}, against {source.name} in {versions[1]}", tuple(rows), "PyTorch")


def _session(folder: Path, twins: Path, graph: str, precision: str):
    """A graph that ONNX Runtime can run, or the twin of one that it cannot."""
    file = layout.graph_file(folder, graph)
    if precision == "fp32":
        return onnxruntime.session(file)
    write_twin(file, layout.graph_file(twins, graph))
    return onnxruntime.session(layout.graph_file(twins, graph), optimize=False)


def _graph(source: Source, config: ModelConfig, manifest: Manifest, graph: str, session) -> Iterator[Row]:
    """The rows of one graph."""
    precision = manifest.graphs[graph].precision
    network = network_for(source, graph, precision, manifest.dialect)
    if sha256(network) != manifest.graphs[graph].sha256:
        raise UserError(
            f"{graph}.onnx was made of other weights than those of {source.name}; name its model with --model"
        )
    inputs = {case.name: example(graph, config, case) for case in cases(config)}
    module, before = graphs.MODULES[graph](network), {}
    if precision == "w8a8":
        with ComputeInFp32():
            before = {case.name: module(**inputs[case.name]) for case in cases(config) if case.usual}
    if precision not in DTYPES:
        module = graphs.for_export(graph, network, "plain", manifest.graphs[graph].activation_scales)
    eager = {} if precision == "fp32" else {name: module(**values) for name, values in inputs.items()}
    module = module.float()
    for name, values in inputs.items():
        found, exact = onnxruntime.run(session, values), module(**values)
        error = relative_error(found, exact)
        limit = FP32_ERROR if precision == "fp32" else TIMES_EAGER * relative_error(eager[name], exact)
        yield Row(f"{graph} ({precision}): {name}", f"{error:.2e}", f"{limit:.2e}", error <= limit)
        if name in before:
            kept = dit_check(found, before[name], precision).value
            label = f"{graph} ({precision}): {name}, beside the unquantised one"
            yield Row(label, f"{kept:.1f} dB", f"{UNQUANTISED} dB", kept >= UNQUANTISED)


def example(graph: str, config: ModelConfig, case: Case) -> dict[str, Tensor]:
    """Inputs of a graph: normal values, of which outliers are 30 times as large; ids that cover the vocabulary."""
    generator = torch.Generator().manual_seed(1)
    batch, tokens = case.sizes["batch"], case.sizes["tokens"]
    values = {}
    for name, (_, shape) in layout.signature(graph, config).inputs.items():
        shape = tuple(case.sizes.get(size, size) for size in shape)
        if name == "ids":
            values[name] = torch.randint(0, config.text.vocab, shape, generator=generator) * int(case.factor)
        elif name == "lengths":
            values[name] = torch.arange(batch) % tokens + 1
        elif name == "timestep":
            values[name] = torch.linspace(999, 100, batch) * case.factor
        else:
            value = torch.randn(shape, generator=generator) * case.factor
            if case.outliers:
                value[..., ::2] *= 30
            values[name] = value
    return values


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """RMS of the error over RMS of what is exact; NaN where anything is."""
    actual, exact = actual.double(), exact.double()
    return ((actual - exact).square().mean() / exact.square().mean().clamp_min(1e-60)).sqrt().item()


class _Sessions:
    """Sessions as a `sana_model.exported.pipeline.Runner`."""

    device = torch.device("cpu")

    def __init__(self, manifest: Manifest, sessions: dict):
        self.manifest, self._sessions = manifest, sessions

    def __call__(self, graph: str, **inputs: Tensor) -> Tensor:
        return onnxruntime.run(self._sessions[graph], inputs)


def _picture(folder: Path, manifest: Manifest, model: str, sessions: dict, steps: int) -> Row:
    """The same picture by the graphs and by PyTorch."""
    height, width = manifest.profile.sizes[0]
    settings = {"seed": 1, "steps": steps, "height": height, "width": width}
    ours = pipeline(folder, _Sessions(manifest, sessions), "onnxruntime")(PROMPT, **settings)
    torch_pipeline = load(
        model, backend="reference", device="cpu", precision="fp32", base=manifest.base, dialect=manifest.dialect
    )
    theirs = torch_pipeline(PROMPT, **settings)
    found = psnr(*(torch.from_numpy(np.array(result.images)) for result in (ours, theirs))).item()
    limit = picture_limit(manifest)
    return Row(f"picture {width}x{height}, {steps} steps", f"{found:.1f} dB", f"{limit:.0f} dB", found >= limit)


def picture_limit(manifest: Manifest) -> float:
    """dB that a picture must keep: by the weakest of the three graphs that paint it."""
    return min(PSNR[manifest.graphs[name].precision] for name in GRAPHS[:3])
