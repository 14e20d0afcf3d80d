"""Runs of exported graphs: `onnxruntime:fp32`, `tensorrt:bf16` and so on (sana_model/exported).

The weights that all runs share are written to a temporary folder, exported from there and, for TensorRT, built into engines
for the GPU that is here and for just the shapes that are measured; that is part of the first picture's time.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from sana_model.errors import UserError
from sana_model.settings import Settings

PRECISIONS = {"onnxruntime": ("fp32",), "tensorrt": ("fp32", "bf16", "fp16", "w8a8")}
"""Of the transformer, beside what `RunName.precisions` says of the others. ONNX Runtime computes none of them in 16 bits."""


def refuse(backend: str, device: torch.device) -> None:
    """Raise UserError or MissingError where the backend cannot run, before anything is exported."""
    from sana_model.exported import onnxruntime, tensorrt, tensorrt_library

    if backend == "onnxruntime":
        onnxruntime.package()
        return
    tensorrt_library.find("current")
    if device.type != "cuda":
        raise UserError("tensorrt runs on the GPU; leave out --device cpu")
    tensorrt.Cuda(device)


def prepare(backend: str, precisions: dict[str, str], loaded, settings: Settings, device: torch.device):
    """(the pipeline, the temporary folder that it lives in) of a loaded model in these precisions, by part."""
    from sana_export import build, exporter, layout
    from sana_export.engines import GRAPHS
    from sana_model.exported import onnxruntime, tensorrt
    from sana_model.exported import pipeline as exported
    from sana_model.weights.saving import save_diffusers

    refuse(backend, device)
    place = tempfile.TemporaryDirectory(prefix="sana-bench-")
    folder = Path(place.name)
    save_diffusers(folder / "model", loaded)
    request = exporter.Request(
        str(folder / "model"), precisions["dit"], precisions["text_encoder"], precisions["autoencoder"],
        only=GRAPHS, dialect=loaded.config.dialect,
    )  # fmt: skip
    manifest = exporter.export(request, folder / "graphs", _silent)
    profile = replace(manifest.profile, sizes=((settings.height, settings.width),), images=settings.count)
    layout.write(folder / "graphs", replace(manifest, profile=profile))
    if backend == "onnxruntime":
        runner = onnxruntime.Runner(folder / "graphs", device)
    else:
        build.build_engines(folder / "graphs", folder / "engines", "current", say=_silent)
        runner = tensorrt.Runner(folder / "engines", device)
    return exported.pipeline(runner.folder, runner, backend), place


def _silent(text: str) -> None:
    pass
