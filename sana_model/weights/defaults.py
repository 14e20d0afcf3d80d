"""A whole model's configuration from those of its parts: published defaults, and what `sana.json` overrides.

Some facts about published checkpoints stand in none of their files; they are here.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sana_model.config import BUILT_IN, AutoencoderConfig, DiTConfig, ModelConfig, SchedulerConfig, TextEncoderConfig
from sana_model.errors import UserError
from sana_model.weights import checkpoint_config as configs

WRITTEN_BY = "sana-kernels"
_FP16_TRAINED = re.compile(r"Sana_(600|1600)M_(512|1024)px(_MultiLing)?(_diffusers|\.pth)?", re.IGNORECASE)


def trained_in_fp16(checkpoint: str) -> bool:
    """Was a checkpoint trained in fp16, by its name? A path or a hub id tells it too, also from inside the hub's cache."""
    return any(_FP16_TRAINED.fullmatch(part) for part in re.split(r"[/\\]|--", checkpoint))


def clamps(checkpoint: str) -> bool:
    """Does the DiT of a checkpoint need its clamp? By the `sana.json` of the folder, or else by the name, as in `load`.

    `checkpoint`: a model's folder or that of its transformer, or a hub id. Raises UserError for a `clamp` that is no bool.
    """
    folder = Path(checkpoint)
    file = (folder.parent if folder.name == "transformer" else folder) / "sana.json"
    values = configs.read_json(file) if checkpoint and folder.is_dir() and file.is_file() else {}
    _check_types(values, file)
    return values.get("clamp", trained_in_fp16(checkpoint))


def assemble(
    name: str, dit: DiTConfig, text: TextEncoderConfig, autoencoder: AutoencoderConfig, scheduler: SchedulerConfig
) -> ModelConfig:
    """A ModelConfig with the published defaults of its kind, and what no file of a published checkpoint states.

    `name` is the last part of a hub id or path. The checkpoints trained in fp16 (they are told from the others by their
    names only) never saw a self-attention output beyond ±65504, and need that clamp in every precision.
    """
    twin = next((m for m in BUILT_IN.values() if (m.dit.hidden, m.dit.layers) == (dit.hidden, dit.layers)), None)
    if dit.guidance_embeds != (scheduler.kind == "scm"):
        raise UserError(
            f"{name}: guidance_embeds is {dit.guidance_embeds} but the scheduler is {scheduler.kind}; Sprint models "
            "have guidance_embeds and the SCMScheduler, others neither"
        )
    if dit.caption_channels != text.hidden:
        raise UserError(
            f"{name}: the DiT reads captions {dit.caption_channels} wide; the text encoder's are {text.hidden}"
        )
    if dit.in_channels != autoencoder.latent_channels:
        raise UserError(
            f"{name}: the DiT has {dit.in_channels} latent channels, the autoencoder {autoencoder.latent_channels}"
        )
    return ModelConfig(
        name=name,
        dit=replace(dit, clamp=dit.clamp or trained_in_fp16(name)),
        text=text,
        autoencoder=autoencoder,
        scheduler=scheduler,
        steps=2 if scheduler.kind == "scm" else 20,
        pag_layers=twin.pag_layers if twin else (dit.layers // 2,),
    )


def with_dit(base: ModelConfig | None, file: str, dit: DiTConfig) -> ModelConfig:
    """`base` with another DiT, that of a lone `file`. Without a base, the published model that is most like it."""
    name = file.rsplit(".", 1)[0]
    if base is None:
        base = next(m for m in BUILT_IN.values() if m.dit.hidden == dit.hidden)
        if dit.guidance_embeds:
            base = replace(base, scheduler=SchedulerConfig("scm"), steps=2)
        elif dit.sample_size == 128:
            base = replace(base, scheduler=SchedulerConfig(flow_shift=6.0))
    whole = assemble(name, dit, base.text, base.autoencoder, base.scheduler)
    pag_layers = base.pag_layers if dit.layers == base.dit.layers else whole.pag_layers
    return replace(base, name=name, dit=whole.dit, pag_layers=pag_layers)


_number = (int, float)
SANA_JSON = {
    "steps": int,
    "guidance": _number,
    "size": int,
    "precision": str,
    "instruction": str,
    "flow_shift": _number,
    "clamp": bool,
    "pag_layers": list,
    "max_text_tokens": int,
    "random": bool,
    "written_by": str,
}
"""The fields of `sana.json` and their types. All are optional; they override what the rest of the folder implies."""


def _check_types(values: Mapping, file: str | Path) -> None:
    for key, value in values.items():
        if key not in SANA_JSON:
            raise UserError(f"{file}: {key} is no known field; known are {', '.join(SANA_JSON)}")
        kind = SANA_JSON[key]
        infinite = isinstance(value, float) and not math.isfinite(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or infinite:
            expected = "a number" if kind is _number else f"of type {kind.__name__}"
            raise UserError(f"{file}: {key} is {json.dumps(value)}; it must be {expected}")


def read_sana_json(values: Mapping, file: str | Path, config: ModelConfig) -> ModelConfig:
    """`config` with the overrides of a `sana.json`; the caller sees to `precision` and `random`."""
    _check_types(values, file)
    for key in ("steps", "size", "flow_shift", "max_text_tokens"):
        if values.get(key, 1) <= 0:
            raise UserError(f"{file}: {key} is {values[key]}; it must be positive")
    if values.get("precision", "fp32") not in ("fp32", "bf16", "fp16"):
        raise UserError(f"{file}: precision is {values['precision']!r}; supported are fp32, bf16 and fp16")
    pag_layers = tuple(values.get("pag_layers", config.pag_layers))
    if not all(isinstance(i, int) and 0 <= i < config.dit.layers for i in pag_layers):
        raise UserError(
            f"{file}: pag_layers is {list(pag_layers)}; the blocks are numbered 0 to {config.dit.layers - 1}"
        )
    size = values.get("size", config.size)
    unit = config.autoencoder.spatial_compression
    if size % unit:
        raise UserError(f"{file}: size is {size}; it must be a multiple of {unit}")
    if size != config.size and config.dit.pos_embed_scale is not None:
        raise UserError(f"{file}: size is {size}; this model's position embedding is tied to {config.size}")
    return replace(
        config,
        dit=replace(config.dit, clamp=values.get("clamp", config.dit.clamp), sample_size=size // unit),
        scheduler=replace(config.scheduler, flow_shift=float(values.get("flow_shift", config.scheduler.flow_shift))),
        pag_layers=pag_layers,
        **{key: values[key] for key in ("steps", "guidance", "instruction", "max_text_tokens") if key in values},
    )


def write_sana_json(config: ModelConfig, random: bool, precision: str) -> dict:
    """The `sana.json` that keeps what diffusers' files have no place for."""
    return {
        "written_by": WRITTEN_BY,
        "random": random,
        "precision": precision,
        "steps": config.steps,
        "guidance": config.guidance,
        "instruction": config.instruction,
        "clamp": config.dit.clamp,
        "pag_layers": list(config.pag_layers),
        "max_text_tokens": config.max_text_tokens,
    }
