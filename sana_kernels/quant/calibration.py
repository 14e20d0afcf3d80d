"""What the linear layers of a model read while it paints: the material of smoothing, GPTQ and static scales.

    inputs = calibrate(pipeline, prompts, samples=16, steps=20)
    inputs["blocks.0.attention.qkv"].rows        (T, K): tokens drawn from all steps, both halves of a guided batch
    inputs["blocks.0.attention.qkv"].absmax      (K,) fp32: the largest |value| of each channel over *every* token

A static scale for a layer's input (ONNX's QuantizeLinear, say) is `absmax.max() / 127`. Only a few tokens of each step are
kept, so memory does not grow with samples and steps; given a folder, rows are streamed to files there and mapped from them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sana_kernels
from sana_kernels.quant.checkpoint import save_tensors

ROWS = 2048  # tokens kept of each layer, about
HELD_OUT = 8  # of so many, one


@dataclass(frozen=True)
class LayerInputs:
    """What one layer read."""

    rows: Tensor  # (T, K), in the model's dtype
    absmax: Tensor  # (K,) fp32

    def split(self) -> tuple["LayerInputs", Tensor]:
        """(what a layer is fitted to, the rows that tell how well): every eighth is held out; of fewer than 8, none is."""
        if len(self.rows) < HELD_OUT:
            return self, self.rows
        held_out = torch.arange(len(self.rows), device=self.rows.device) % HELD_OUT == 0
        return LayerInputs(self.rows[~held_out], self.absmax), self.rows[held_out]


class Collector:
    """Keeps `per_call` tokens of every tensor that it is shown, drawn by a seed, and the largest values of all."""

    def __init__(self, per_call: int, folder: Path | None = None, seed: int = 0):
        self.per_call, self.folder, self.seed = per_call, folder, seed
        self._absmax: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._rows: dict[str, list[Tensor]] = {}

    def observe(self, name: str, x: Tensor) -> None:
        """x (..., K), what layer `name` reads."""
        rows = x.detach().reshape(-1, x.shape[-1])
        largest = rows.abs().amax(0).float().cpu()
        self._absmax[name] = torch.maximum(self._absmax[name], largest) if name in self._absmax else largest
        call = self._calls[name] = self._calls.get(name, 0) + 1
        generator = torch.Generator().manual_seed((1_000_003 * self.seed + call) % 2**63)  # torch takes no more
        chosen = torch.randperm(len(rows), generator=generator)[: self.per_call]
        kept = rows[chosen.to(rows.device)].cpu()
        if self.folder is None:
            self._rows.setdefault(name, []).append(kept)
            return
        with (self.folder / f"{name}.rows").open("ab" if call > 1 else "wb") as file:
            file.write(kept.contiguous().view(torch.uint8).numpy().data)
        self._rows[name] = [kept[:0]]  # only its dtype and K

    def finish(self) -> dict[str, LayerInputs]:
        """All inputs by layer. In a folder, what `read` finds again is complete from here on."""
        if self.folder is None:
            return {name: LayerInputs(torch.cat(rows), self._absmax[name]) for name, rows in self._rows.items()}
        save_tensors(self.folder / "absmax.safetensors", self._absmax, {})
        dtypes = {name: str(rows[0].dtype).removeprefix("torch.") for name, rows in self._rows.items()}
        temporary = self.folder / "layers.json.tmp"
        temporary.write_text(json.dumps(dtypes, indent=1), encoding="utf-8")
        temporary.replace(self.folder / "layers.json")
        return read(self.folder)


def read(folder: Path) -> dict[str, LayerInputs] | None:
    """What an earlier `calibrate` left in a folder, its rows mapped from the files; None where it did not finish."""
    if not (folder / "layers.json").is_file():
        return None
    dtypes = json.loads((folder / "layers.json").read_text(encoding="utf-8"))
    found = {}
    for name, absmax in load_file(folder / "absmax.safetensors").items():
        file, dtype = folder / f"{name}.rows", getattr(torch, dtypes[name])
        flat = torch.from_file(str(file), shared=False, size=file.stat().st_size // dtype.itemsize, dtype=dtype)
        found[name] = LayerInputs(flat.view(-1, len(absmax)), absmax)
    return found


def calibrate(
    pipeline,
    prompts: list[str],
    samples: int = 16,
    steps: int = 20,
    *,
    captions: tuple | None = None,
    rows: int = ROWS,
    folder: Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, LayerInputs]:
    """Paint `samples` pictures of `prompts` (again from the first when there are fewer) in `steps` steps, and watch.

    pipeline: a `sana_model.pipeline.Pipeline` whose DiT is in 16 or 32 bits. Returns the inputs of every layer that the DiT
    computes by the ops `gemm` and `mix_ffn`, by the layer's name in the DiT: the four products over image tokens of each
    attention, both 1×1 convolutions, and the keys and values of the caption. `captions`: what `pipeline.encode` gave for
    these prompts, one row per sample, for a pipeline that has no text encoder. `folder`: an empty one, for rows that memory
    should not hold. progress(done, of) counts steps. The same arguments give the same values. Raises ValueError for no
    prompts or no samples.
    """
    if not prompts or samples < 1:
        raise ValueError("calibration takes at least one prompt and one sample")
    asked = [prompts[i % len(prompts)] for i in range(samples)]
    collector = Collector(max(1, rows // (samples * steps)), folder, seed)
    with torch.inference_mode(), launch_by_launch(pipeline.plan), observed(pipeline.dit, collector.observe):
        if captions is None:
            captions = pipeline.encode(pipeline.settings(asked, steps=steps))
        for i, prompt in enumerate(asked):
            settings = pipeline.settings(prompt, steps=steps, seed=seed + i)
            pipeline.plan.clock.reset()  # else the events of all steps pile up on a GPU
            one = tuple(None if c is None else _row(c, i) for c in captions)
            pipeline.denoise(settings, one, progress=lambda _, done, of, i=i: progress(i * of + done, samples * of))
    return collector.finish()


def _row(captions, i: int):
    """Caption i of a batch, without the pads."""
    length = int(captions.lengths[i])
    return replace(captions, states=captions.states[i : i + 1, :length], lengths=captions.lengths[i : i + 1])


@contextmanager
def launch_by_launch(plan) -> Iterator[None]:
    """Within the block, no step of a `sana_model.plan.Plan` runs in a CUDA graph: a replay calls no Python to observe it."""
    reason, plan.eager = plan.eager, "calibration watches every product"
    try:
        yield
    finally:
        plan.eager = reason


@contextmanager
def observed(dit: nn.Module, observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the block, observe(name, x) is told of the input of every layer that runs by the ops `gemm` and `mix_ffn`."""
    names: Mapping[int, str] = {
        id(layer.weight): name for name, layer in dit.named_modules() if isinstance(getattr(layer, "weight", 0), Tensor)
    }
    ops = dit.ops

    def gemm(x: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
        observe(names[id(weight)], x)
        return ops.gemm(x, weight, *args, **kwargs)

    def mix_ffn(x, height, width, expand, expand_bias, depthwise, depthwise_bias, project, **epilogue) -> Tensor:
        h = gemm(x, expand, expand_bias, silu=True)
        u = sana_kernels.depthwise_glu(h, height, width, depthwise, depthwise_bias)
        return gemm(u, project, **epilogue)

    dit.ops = replace(ops, gemm=gemm, mix_ffn=mix_ffn, linear_attention_from=None)  # each product by itself
    try:
        yield
    finally:
        dit.ops = ops


@contextmanager
def observed_linear(module: nn.Module, observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """The same for the linear layers of a network that calls them as modules, such as the text encoder."""

    def hook(name: str) -> Callable:
        return lambda _layer, args: observe(name, args[0])

    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
