"""Quantising a model: which layer becomes what, and the job that does it layer by layer.

    job = Job("sana-1.6b", precision="w4a4", prompts=(...), samples=16, steps=20)
    plan = quantize(job, Path("sana-1.6b-w4a4"))

    1. the text encoder reads the prompts, and is let go
    2. the DiT paints them; what its layers read goes to files            sana_kernels/quant/calibration.py
    3. each block is read from the source, its layers quantised, and let go     sana_kernels/quant/svdquant.py
    4. the checkpoint is put together and moved to its place              sana_kernels/quant/checkpoint.py

Beyond the network in 16 bits, which step 2 needs, memory holds one block and what is not quantised. Finished layers lie in
OUT.partial: the same job, started again after a kill, goes on from there and writes the same bytes.
"""

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sana_kernels.quant import calibration, checkpoint
from sana_kernels.quant.calibration import Collector, LayerInputs, observed_linear
from sana_kernels.quant.checkpoint import CheckpointError, Header, LayerInfo
from sana_kernels.quant.layer import round_to_nearest
from sana_kernels.quant.svdquant import Recipe, quantize_layer, sqnr_db
from sana_model import memory
from sana_model.config import BUILT_IN, ModelConfig
from sana_model.errors import UserError
from sana_model.files import atomic, writing
from sana_model.pipeline import Pipeline
from sana_model.plan import resolve
from sana_model.prompt import CaptionStates, PromptEncoder
from sana_model.quantize import awq
from sana_model.quantize.job import Job, Planned
from sana_model.settings import dtypes_of, is_guided, precisions_for
from sana_model.tokenizer import ByteTokenizer
from sana_model.weights.loaded import LoadedModel
from sana_model.weights.models import FOLDERS, Source, find, load_model
from sana_model.weights.saving import refuse_to_destroy, replacing, write_configs, write_json, write_weights

TEXT_ROWS = 512  # tokens kept of each layer of the text encoder


@dataclass
class Progress:
    """Told of everything; by default it says nothing."""

    begin: Callable[[str], None] = lambda text: None
    step: Callable[[int, int], None] = lambda done, of: None  # of the calibration
    layer: Callable[[Planned, bool, float], None] = lambda planned, new, done: None
    """`new`: it was not there already; `done`: which fraction of the part's weights is."""


@dataclass
class _Part:
    """A part that is finished, on disk but for what is not quantised."""

    folder: Path
    layers: dict[str, LayerInfo] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)


def quantize(
    job: Job, out: Path, *, device: torch.device | None = None, force: bool = False, progress: Progress | None = None
) -> list[Planned]:
    """Carry a job out, or on, and write the folder `out`: sana_kernels/quant/checkpoint.py says what is in it.

    `device`: where it is computed, by default the CPU. `force`: replace another program's model. Raises UserError for what
    cannot be quantised or written, before anything is computed where that can be known.
    """
    device, progress = device or torch.device("cpu"), progress or Progress()
    source = find(job.model, job.base)
    source.refuse_quantized("quantising")
    job = replace(job, steps=job.steps or source.config.steps)
    refuse_to_destroy(out, force)
    if source.folder is not None and out.exists() and out.samefile(source.folder):
        raise UserError(f"{out} is the model that is to be quantised; name another folder")
    progress.begin(f"fingerprint of {source.name}")
    sources = {part: fingerprint(source, part, _is_drawn(job, source)) for part in job.parts}
    work = out.with_name(out.name + ".partial")
    with writing(work):
        _claim(work, asdict(job) | {"sources": sources})
        rows = _carry_out(job, source, sources, work, out, device, progress)
        shutil.rmtree(work)
    return rows


def _carry_out(
    job: Job, source: Source, sources: dict[str, str], work: Path, out: Path, device: torch.device, progress: Progress
) -> list[Planned]:
    """Calibrate and quantise in the folder `work`, and write `out`."""
    inputs = _calibrated(job, source, work, device, progress) if job.samples else {part: {} for part in job.parts}
    rows: list[Planned] = []
    finished = {}
    for part in job.parts:
        progress.begin(f"quantising the {_called(part)} to {job.precision_of(part)} by {job.method(part)}")
        kernels = _Kernels(source.config, device, part, job.precision_of(part))

        def tell(name: str, info: LayerInfo, size: int, new: bool, done: float, part=part, kernels=kernels) -> None:
            weights, kernel = info.shape[0] * info.shape[1], kernels.of(name, info)
            found = info.sqnr_db
            rows.append(Planned(part, name, info.format, info.activations, info.rank, weights, size, found, kernel))
            progress.layer(rows[-1], new, done)

        finished[part] = _quantize_part(job, part, source, inputs[part], work / part, device, tell)
    progress.begin(f"writing {out}")
    try:
        _write(job, source, sources, finished, rows, out)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    return rows


def _is_drawn(job: Job, source: Source) -> bool:
    """Random weights of a built-in name: whoever needs them draws them again, and no file holds them."""
    return source.folder is None and job.model in BUILT_IN


def fingerprint(source: Source, part: str, drawn: bool = False) -> str:
    """sha256 of the names and values of a part, as stored; of one that is drawn, of its configuration."""
    digest = hashlib.sha256()
    if drawn:
        digest.update(f"random weights, seed 0: {source.config.dit} {source.config.text}".encode())
        return digest.hexdigest()

    def update(module: nn.Module) -> None:
        for name, tensor in module.state_dict().items():
            if not tensor.is_meta:
                digest.update(name.encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def prepare(block: nn.Module) -> None:
        update(block)
        block.to("meta")

    update(source.open[part](source.config, None)(prepare))
    return digest.hexdigest()


def _called(part: str) -> str:
    return "DiT" if part == "dit" else "text encoder"


def _claim(work: Path, job: dict) -> None:
    """Make the folder of unfinished work, which belongs to one job. Raises UserError where it is another's."""
    marker, text = work / "job.json", json.dumps(job, indent=1, default=list)
    if work.exists() and any(work.iterdir()):
        if not marker.is_file():
            raise UserError(f"{work} is in use and is no unfinished work of `sana quantize`; name another output")
        if marker.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{work} holds the unfinished work of another job (other flags or other weights); remove it, or name"
                " another output"
            )
        return
    work.mkdir(exist_ok=True)
    with atomic(marker) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------ calibration


def _calibrated(
    job: Job, source: Source, work: Path, device: torch.device, progress: Progress
) -> dict[str, dict[str, LayerInputs]]:
    """What the layers of each part read: painted now, or found finished."""
    folders = {part: work / f"{part}.inputs" for part in job.parts}
    found = {part: calibration.read(folder) for part, folder in folders.items()}
    if any(inputs is None for inputs in found.values()):
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        progress.begin(f"calibration: the text encoder reads {job.samples} prompts")
        captions, texts = _captions(job, source, folders.get("text"), device)
        progress.begin(f"calibration: {job.samples} pictures of {job.steps} steps")
        pipeline = _painter(source, device)
        found["dit"] = calibration.calibrate(
            pipeline, list(job.prompts), job.samples, job.steps, captions=captions, folder=folders["dit"],
            seed=job.seed, progress=progress.step,
        )  # fmt: skip
        found["text"] = texts
    return found


def _captions(
    job: Job, source: Source, folder: Path | None, device: torch.device
) -> tuple[tuple[CaptionStates | None, CaptionStates], dict[str, LayerInputs] | None]:
    """The captions of all samples, in bf16; what the layers of the text encoder read, where `folder` is to keep it."""
    memory.check_part(source.config, "text_encoder", "bf16", device)
    loaded = load_model(source, parts=("text",), text_precision=torch.bfloat16)
    encoder = PromptEncoder(loaded.text_encoder.to(device), loaded.tokenizer, loaded.config)
    prompts = [job.prompts[i % len(job.prompts)] for i in range(job.samples)]
    collector = None if folder is None else Collector(-(-TEXT_ROWS // job.samples), folder, job.seed)
    watched = nullcontext() if folder is None else observed_linear(loaded.text_encoder, collector.observe)
    guided = is_guided(loaded.config.guidance, loaded.config.dit)
    with torch.inference_mode(), watched:
        captions = encoder.encode_pair(prompts, [""] * len(prompts)) if guided else (None, encoder.encode(prompts))
    return captions, collector and collector.finish()


def _painter(source: Source, device: torch.device) -> Pipeline:
    """A pipeline that can denoise, and nothing else."""
    precisions = precisions_for("bf16")
    plan = resolve(source.config, "auto", device, precisions)
    memory.check_part(source.config, "dit", plan.executed["dit"], device)
    loaded = load_model(source, precision=torch.bfloat16, parts=("dit",), prepare={"dit": partial(plan.prepare, "dit")})
    loaded.dit.to(device)
    return Pipeline(loaded, plan, device, dtypes_of(precisions), low_memory=False)


# ------------------------------------------------------------------------------------------------ layers


def _quantize_part(
    job: Job,
    part: str,
    source: Source,
    inputs: dict[str, LayerInputs],
    folder: Path,
    device: torch.device,
    tell: Callable[[str, LayerInfo, int, bool, float], None],
) -> _Part:
    """Read a part block by block, and quantise the layers of each that are not in `folder` yet.

    `tell`: told of each layer its name, what it is, its bytes, whether it is new, and which fraction of all is done.
    """
    folder.mkdir(exist_ok=True)
    finished, numbers = _Part(folder), itertools.count()
    total = getattr(source.config, part).layers

    def prepare(block: nn.Module) -> None:
        number, before = next(numbers), 0
        if scaled := job.method(part) == "awq":
            read = {name: inputs[f"layers.{number}.{name}"].rows for name in awq.READ}
            awq.scale_block(block, read, lambda weight: round_to_nearest(weight, "int4", "16bit").dequantized().float())
        chosen = list(_layers(job, part, block))
        size = sum(layer.weight.numel() for _, layer, _ in chosen)
        for name, layer, recipe in chosen:
            name = f"{'blocks' if part == 'dit' else 'layers'}.{number}.{name}"
            new = not (folder / f"{name}.safetensors").is_file()
            seen = None if scaled else inputs.get(name)  # AWQ changes what its layers read
            info, count = _layer(source, folder, name, layer.weight.detach(), recipe, seen, device)
            finished.layers[name] = info
            before += layer.weight.numel()
            layer.weight = None
            tell(name, info, count, new, (number + before / size) / total)

    # Random weights are drawn in what `sana generate` draws them in; others are read as they are stored.
    dtype = torch.bfloat16 if _is_drawn(job, source) else None
    network = source.open[part](source.config, dtype)(prepare)
    wide = awq.NORMS if job.method(part) == "awq" else ()
    finished.plain = {
        name: tensor.to(torch.bfloat16) if tensor.dtype == torch.float32 and not name.endswith(wide) else tensor
        for name, tensor in network.state_dict().items()
    }
    return finished


def _layers(job: Job, part: str, block: nn.Module) -> Iterator[tuple[str, nn.Linear, Recipe]]:
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear) and (recipe := job.recipe(part, name)) is not None:
            yield name, layer, recipe


def _layer(
    source: Source,
    folder: Path,
    name: str,
    weight: Tensor,
    recipe: Recipe,
    inputs: LayerInputs | None,
    device: torch.device,
) -> tuple[LayerInfo, int]:
    """What is known of a layer and its bytes; quantised and put into `folder` unless it is there."""
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        if not bool(weight.isfinite().all()):
            raise UserError(f"{source.name}: {name} holds NaN or infinite values; the model cannot be quantised")
        weight = weight.to(device)
        fitted, held_out = (None, None) if inputs is None else inputs.split()
        layer = quantize_layer(weight, recipe, fitted)
        found = None if inputs is None else sqnr_db(layer, weight, held_out)
        if found is not None:  # an output of zeros has no signal, and JSON no infinity
            found = round(found, 2) if math.isfinite(found) else None
        with atomic(file) as temporary:
            info = {"info": json.dumps(asdict(LayerInfo.of(layer, found)))}
            checkpoint.save_tensors(temporary, layer.tensors(), info)
    with safe_open(file, framework="pt") as handle:
        values = json.loads(handle.metadata()["info"])
        count = sum(handle.get_tensor(key).nbytes for key in handle.keys())  # noqa: SIM118 (a handle is no dict)
    return LayerInfo(**values | {"shape": tuple(values["shape"])}), count


class _Kernels:
    """What runs the layers of one part on this machine, by the plan that `sana generate` would make."""

    def __init__(self, config: ModelConfig, device: torch.device, part: str, precision: str):
        self.part = "dit" if part == "dit" else "text_encoder"
        precisions = precisions_for("bf16") | {self.part: precision}
        self.rows = [row for row in resolve(config, "auto", device, precisions).rows if row.part == self.part]

    def of(self, name: str, info: LayerInfo) -> str:
        """backend:op in the precision that is executed."""
        wide = info.activations == "16bit" and info.format == "int8"
        fused = "mix_ffn" in name and not (info.rank or info.smooth)
        ops = ("mix_ffn", "gemm") if fused else ("gemm",)
        native = {"int4": "gemm_w4a4", "16bit": "gemm_w4a16"}.get(info.activations) if info.format == "int4" else None
        for op in filter(None, (native, *ops)):
            for row in self.rows:
                if row.op == op and (not wide or row.precision in ("bf16", "fp16", "fp32")):
                    return f"{row.backend}:{row.op} {row.precision}"
        return "library:gemm bf16"


# ------------------------------------------------------------------------------------------------ writing


def _write(
    job: Job, source: Source, sources: dict[str, str], finished: dict[str, _Part], rows: list[Planned], out: Path
) -> None:
    """Put the folder together beside its place, and move it there."""
    tokenizer = None if source.tokenizer_folder else ByteTokenizer()
    loaded = LoadedModel(
        source.config, None, None, tokenizer, None, source.name, source.random, source.tokenizer_folder
    )
    with replacing(out) as place:
        write_configs(place, loaded, "bfloat16", "bf16")
        for part, folder in FOLDERS.items():
            (place / folder).mkdir(exist_ok=True)
            if part in finished:
                name = "text_encoder" if part == "text" else part
                header = Header(
                    name, source.name, job.precision_of(part), job.method(part), sources[part], job.calibration(),
                    finished[part].layers,
                )  # fmt: skip
                checkpoint.save(place / folder / checkpoint.FILE, header, *_tensors(finished[part]))
            elif not _is_drawn(job, source):
                stem = "model" if part == "text" else "diffusion_pytorch_model"
                state = source.open[part](source.config, None)(None).state_dict()
                write_weights(place / folder, stem, state, None, 5 * 10**9)
        write_json(place / "quantization.json", {"plan": [asdict(row) for row in rows]})
        for pattern in ("LICENSE*", "NOTICE*", "README.md"):
            for file in source.folder.glob(pattern) if source.folder else ():
                shutil.copy(file, place / file.name)


def _tensors(part: _Part) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], Callable[[str], Tensor]]:
    """dtypes and shapes of all tensors of a part, and the function that reads one."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in part.plain.items()}
    for layer in part.layers:
        with safe_open(part.folder / f"{layer}.safetensors", framework="pt") as handle:
            for field_ in handle.keys():  # noqa: SIM118 (a handle is no dict)
                piece = handle.get_slice(field_)
                shapes[f"{layer}.{field_}"] = checkpoint.DTYPES[piece.get_dtype()], tuple(piece.get_shape())

    def read(name: str) -> Tensor:
        if name in part.plain:
            return part.plain[name]
        layer, _, field_ = name.rpartition(".")
        with safe_open(part.folder / f"{layer}.safetensors", framework="pt") as handle:
            return handle.get_tensor(field_)

    return shapes, read
