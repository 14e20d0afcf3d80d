"""Models and their exported graphs, for the tests that need some: made once per run of the tests, by whichever worker comes
first, and not to be changed.

    folder = exported.graphs(tmp_path_factory, "sana-tiny", precision="bf16")
"""

import fcntl
import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from models import SMALL, TINY

from sana_export import layout
from sana_export.exporter import Request, export
from sana_model.config import BUILT_IN
from sana_model.weights.random_weights import random_model
from sana_model.weights.saving import save_diffusers

ONE_BLOCK = {"decoder_layers": (1,) * 6, "encoder_layers": (1,) * 6}  # per stage of the autoencoder
LARGE = BUILT_IN["sana-0.6b"]
MODELS = {
    "small": replace(SMALL, name="small", autoencoder=replace(SMALL.autoencoder, **ONE_BLOCK)),
    # The widths of the real one; two blocks of its transformer and text encoder, and the byte tokenizer's vocabulary.
    "shrunk-0.6b": replace(
        LARGE,
        name="shrunk-0.6b",
        dit=replace(LARGE.dit, layers=2),
        text=replace(LARGE.text, layers=2, vocab=TINY.text.vocab),
        autoencoder=replace(LARGE.autoencoder, **ONE_BLOCK),
        pag_layers=(1,),
    ),
}
QUICK = {"samples": 1, "steps": 1}  # of a calibration
REQUESTS = {
    "fp32": {"precision": "fp32", "profile": "128"},
    "bf16": {"precision": "bf16", "profile": "128"},
    "w8a8": {"precision": "w8a8", "text_precision": "w4a16", "profile": "128", "only": layout.GRAPHS[:2]},
}


def model(tmp_path_factory, name: str) -> str:
    """What `sana_model.load` takes: a folder of one of MODELS, with random weights in bf16, or a built-in name."""
    if name not in MODELS:
        return name

    def make(folder: Path) -> None:
        save_diffusers(folder, random_model(MODELS[name], seed=2, dtype=torch.bfloat16))

    return str(_once(tmp_path_factory, name, make))


def graphs(tmp_path_factory, name: str, **request) -> Path:
    """The folder of `sana export onnx`. `request`: fields of `sana_export.exporter.Request`."""
    source = model(tmp_path_factory, name)
    label = "-".join(["graphs", name, *(f"{key}={request[key]}" for key in sorted(request))])

    def make(folder: Path) -> None:
        export(Request(source, **QUICK | request), folder, lambda text: None)

    return _once(tmp_path_factory, "".join(c if c.isalnum() or c in "-=." else "_" for c in label), make)


def _once(tmp_path_factory, name: str, make) -> Path:
    """The folder `name` that all workers share, made by `make` where it is missing."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / f"shared-{name}"
    with _lock(shared / f"{folder.name}.lock"):
        if not folder.exists():
            make(folder)
    return folder


@contextmanager
def _lock(path: Path):
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
