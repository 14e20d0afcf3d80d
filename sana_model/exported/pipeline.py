"""The pipeline over exported networks: what runs the graphs of `sana_export.layout` takes the place of the networks.

    runner(graph, **inputs) → output        onnxruntime.py, tensorrt.py
    load(folder, "onnxruntime") → Pipeline  prompt, noise, sampler and pictures are those of every other backend

A graph takes the whole text and the whole caption at each call: neither the instruction's prefix nor the keys and values of
the caption are kept between calls, which costs 4 % of a step of SANA-0.6B at 1024 px.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import Tensor

from sana_export import layout
from sana_model.errors import UserError
from sana_model.pipeline import Pipeline
from sana_model.plan import OpClock, Plan, Row
from sana_model.tokenizer import load_tokenizer
from sana_model.weights.loaded import LoadedModel
from sana_model.weights.models import find

BACKENDS = ("onnxruntime", "tensorrt")


class Runner(Protocol):
    """Runs graphs on one device; inputs and outputs are as `layout.signature` says, on that device."""

    manifest: layout.Manifest
    device: torch.device

    def __call__(self, graph: str, **inputs: Tensor) -> Tensor: ...


def load(folder: str | Path, backend: str, *, device: torch.device, precisions: dict[str, str | None]) -> Pipeline:
    """The pipeline of a folder of `sana export`. `precisions`: by part, what was asked for; None: what the graphs have.

    Raises UserError where the folder holds no such graphs or they are of another precision, and MissingError without the
    package or the GPU that the backend needs.
    """
    if backend == "onnxruntime":
        from sana_model.exported.onnxruntime import Runner as Chosen
    else:
        from sana_model.exported.tensorrt import Runner as Chosen
    if not Path(folder).is_dir():
        raise UserError(
            f"backend {backend!r} paints from a folder of exported graphs, and {folder} is none;"
            f" make one: sana export onnx {folder} -o DIR, then --model DIR"
        )
    graphs = ("text_encoder", "transformer", "decoder") if backend == "onnxruntime" else ()  # or engines in their place
    stored = layout.read(folder, graphs).precisions
    for part, asked in precisions.items():
        if asked is not None and asked != stored[part]:
            raise UserError(
                f"the {part.replace('_', ' ')} in {folder} is in {stored[part]}, not in {asked}: a graph's precision is"
                " chosen by `sana export onnx --precision`"
            )
    return pipeline(folder, Chosen(folder, device), backend)


def pipeline(folder: str | Path, runner: Runner, backend: str) -> Pipeline:
    """A pipeline whose networks `runner` runs; configuration and tokenizer are those in `folder`."""
    source = find(str(folder))
    manifest = runner.manifest
    model = LoadedModel(
        config=source.config.with_dialect(manifest.dialect), dit=ExportedTransformer(runner),
        text_encoder=ExportedTextEncoder(runner), tokenizer=load_tokenizer(source.tokenizer_folder),
        autoencoder=ExportedAutoencoder(runner), source=source.name, random=manifest.random,
        tokenizer_folder=source.tokenizer_folder,
    )  # fmt: skip
    # The pipeline meets fp32 tensors only: whatever a graph computes in stays inside.
    dtypes = dict.fromkeys(manifest.precisions, torch.float32)
    return Pipeline(model, ExportedPlan(backend, manifest, runner.device), runner.device, dtypes, low_memory=False)


class ExportedPlan(Plan):
    """Each network is one graph."""

    def __init__(self, backend: str, manifest: layout.Manifest, device: torch.device):
        rows = [
            Row(part, f"{part} graph", backend, precision, f"linear attention: {manifest.attention}")
            for part, precision in manifest.precisions.items()
        ]
        super().__init__(
            backend, manifest.precisions, rows, OpClock(device.type == "cuda"), f"{backend} runs the graphs"
        )

    def outside_share(self, denoise_seconds: float) -> float:
        """Nothing but the sampler's arithmetic is outside."""
        return 0.0

    def __str__(self) -> str:
        lines = [f"  {row.part:<13} {row.backend:<12} {row.precision:<5} ({row.reason})" for row in self.rows]
        return "\n".join([f"plan for backend {self.backend!r}: exported graphs", *lines])


@dataclass(frozen=True)
class Prefix:
    """Tokens that a text starts with, and their states; the graph computes them again with each text."""

    ids: Tensor  # (P,)
    states: Tensor  # (P, hidden)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, count: int) -> "Prefix":
        """Of the first `count` tokens only."""
        return Prefix(self.ids[:count], self.states[:count])


class ExportedTextEncoder:
    """As `sana_model.text_encoder.TextEncoder` to a `PromptEncoder`."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.norm = SimpleNamespace(weight=torch.empty(0, device=runner.device))  # tells where and in what to compute

    def __call__(self, ids: Tensor, lengths: Tensor, prefix: Prefix | None = None) -> Tensor:
        past = 0 if prefix is None else len(prefix)
        if past:
            ids = torch.cat([prefix.ids.expand(len(ids), -1), ids], dim=1)
        return self.runner("text_encoder", ids=ids, lengths=lengths + past)[:, past:]

    def prefix(self, ids: Tensor) -> Prefix:
        return Prefix(ids, self(ids[None], torch.tensor([len(ids)], device=ids.device))[0])


@dataclass(frozen=True)
class Times:
    """As `sana_model.dit.TimeEmbedding`, not yet embedded."""

    timestep: Tensor  # (T,)
    guidance: Tensor | None

    def step(self, i: int, batch: int) -> "Times":
        """Row i, for a batch of images that are all at the same time."""
        return Times(self.timestep[i].expand(batch), None if self.guidance is None else self.guidance[i].expand(batch))


@dataclass(frozen=True)
class Captions:
    """As `sana_model.dit.TextContext`, before keys and values are made of it."""

    states: Tensor  # (B, L, caption channels)
    lengths: Tensor  # (B,)

    def rows(self, index: slice | list[int]) -> "Captions":
        """Those of some of the batch, in that order."""
        return Captions(self.states[index], self.lengths[index])


class ExportedTransformer:
    """As `sana_model.dit.DiT` to a sampler."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.ops = None

    def __call__(
        self, latents: Tensor, timestep: Tensor, caption: Tensor, lengths: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        inputs = {"latents": latents, "timestep": timestep, "caption": caption, "lengths": lengths}
        return self.runner("transformer", **inputs | ({} if guidance is None else {"guidance": guidance}))

    def time(self, timestep: Tensor, guidance: Tensor | None = None) -> Times:
        return Times(timestep, guidance)

    def text(self, states: Tensor, lengths: Tensor) -> Captions:
        return Captions(states, lengths)

    def positions(self, height: int, width: int, device: torch.device) -> None:
        """They are in the graph."""

    def step(
        self, latents: Tensor, time: Times, text: Captions, perturbed: int = 0, pag_layers=(), positions: None = None
    ) -> Tensor:
        if perturbed:
            raise UserError(
                "exported graphs have no perturbed-attention guidance; leave out --pag, or use another backend"
            )
        return self(latents, time.timestep, text.states, text.lengths, time.guidance)


class ExportedAutoencoder:
    """As `sana_model.autoencoder.dc_ae.Autoencoder` to the pipeline."""

    def __init__(self, runner: Runner):
        self.runner = runner

    def use(self, ops: object) -> None:
        """The graph has its own."""

    def encode(self, images: Tensor) -> Tensor:
        return self.runner("encoder", images=images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.runner("decoder", latents=latents)

    def tiled_decode(self, latents: Tensor) -> Tensor:
        raise UserError(
            "exported graphs decode whole pictures; leave out --tiled and --low-memory, or use another backend"
        )
