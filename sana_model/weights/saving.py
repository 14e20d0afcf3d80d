"""Writing models: a diffusers folder, whole or not at all, and the original's `.pth`."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_kernels.quant.checkpoint import save_tensors
from sana_model.errors import UserError
from sana_model.files import atomic, check_parent, check_replaceable, check_writable
from sana_model.settings import DTYPES
from sana_model.weights import checkpoint_config as configs
from sana_model.weights import defaults, keys
from sana_model.weights.loaded import LoadedModel


def save_diffusers(
    folder: str | Path,
    loaded: LoadedModel,
    *,
    variant: str | None = None,
    shard_size: int = 5 * 10**9,
    force: bool = False,
) -> None:
    """Write a complete diffusers folder, which SanaPipeline (or SanaSprintPipeline) loads, and `load_model` too.

    `variant` ("fp16") goes into the names of the weight files; a part larger than `shard_size` bytes becomes several
    files. The folder is written beside its place and then moved there. Raises UserError if `folder` is in use: one
    that we wrote is replaced, another model's only with `force`, anything else never.
    """
    folder, config = Path(folder), loaded.config
    refuse_to_destroy(folder, force)
    dit_state = keys.to_diffusers(loaded.dit.state_dict(), config.dit)
    precision = next(name for name, dtype in DTYPES.items() if dtype == stored_dtype(loaded.dit))
    with replacing(folder) as place:
        write_configs(place, loaded, str(stored_dtype(loaded.text_encoder)).removeprefix("torch."), precision)
        write_weights(place / "transformer", "diffusion_pytorch_model", dit_state, variant, shard_size)
        vae_state = loaded.autoencoder.state_dict()
        write_weights(place / "vae", "diffusion_pytorch_model", vae_state, variant, shard_size)
        write_weights(place / "text_encoder", "model", loaded.text_encoder.state_dict(), variant, shard_size)


def write_configs(place: Path, loaded: LoadedModel, text_dtype: str, precision: str) -> None:
    """All of a diffusers folder but its weights. `text_dtype`: that of the text encoder, for transformers;
    `precision`: that of the DiT, for sana.json.
    """
    config = loaded.config
    write_json(place / "model_index.json", {
        "_class_name": "SanaSprintPipeline" if config.dit.guidance_embeds else "SanaPipeline",
        "_diffusers_version": "0.32.0",  # the first with SANA
        "scheduler": ["diffusers", configs.write_scheduler(config.scheduler)["_class_name"]],
        "text_encoder": ["transformers", configs.text_encoder_class(config.text)],
        "tokenizer": ["transformers", _tokenizer_class(loaded)],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    })  # fmt: skip
    write_json(place / "sana.json", defaults.write_sana_json(config, loaded.random, precision))
    write_json(place / "scheduler" / "scheduler_config.json", configs.write_scheduler(config.scheduler))
    write_json(place / "transformer" / "config.json", configs.write_dit(config.dit))
    write_json(place / "vae" / "config.json", configs.write_autoencoder(config.autoencoder))
    write_json(place / "text_encoder" / "config.json", configs.write_text_encoder(config.text, text_dtype))
    if loaded.tokenizer_folder is None:
        loaded.tokenizer.save(place / "tokenizer")
    else:
        shutil.copytree(loaded.tokenizer_folder, place / "tokenizer")


def save_original(file: str | Path, loaded: LoadedModel) -> None:
    """Write the DiT as the `.pth` of the original repository: {"state_dict": …}."""
    file = Path(file)
    refuse_original(file)
    state = keys.to_original(loaded.dit.state_dict(), loaded.config.dit)
    with atomic(file) as temporary:
        _save_pickle(temporary, {"state_dict": state})


def refuse_original(file: Path, force: bool = True) -> None:
    """Raise UserError unless the original's `.pth` can be written as `file`; with `force`, also over another."""
    if file.suffix != ".pth":
        raise UserError(f"the original's checkpoints are .pth files, so the name must end so; {file} does not")
    check_writable(file)
    if file.exists() and not force:
        raise UserError(f"{file} is there already; --force replaces it")


def _save_pickle(file: Path, content: dict) -> None:
    """torch.save, which answers the system's refusal to write by an error of its own: raise the system's."""
    try:
        with file.open("wb") as out:
            torch.save(content, out)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def write_weights(folder: Path, stem: str, state: dict[str, Tensor], variant: str | None, shard_size: int) -> None:
    """The safetensors files of one part, and the index where there are several, under Hugging Face's names."""
    folder.mkdir(exist_ok=True)
    dot = f".{variant}" if variant else ""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_size
    for name, tensor in state.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_size
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        save_tensors(folder / f"{stem}{dot}.safetensors", shards[0], {"format": "pt"})
        return
    where = {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}{dot}-{i:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / file, shard, {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / f"{stem}.safetensors.index{dot}.json", index)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Gives a new folder beside `folder` that takes its place when the block ends well, and vanishes when not."""
    place = retired = None
    try:
        with atomic(folder) as place:
            place.mkdir()
            yield place
            if folder.exists():
                retired = place.with_suffix(".old")
                folder.rename(retired)
    except BaseException:
        if retired is not None and retired.exists() and not folder.exists():
            retired.rename(folder)
        raise
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        if retired is not None and folder.exists():
            shutil.rmtree(retired, ignore_errors=True)


def refuse_to_destroy(folder: Path, force: bool) -> None:
    """Raise UserError unless `folder` is free, empty, ours, or (with `force`) another model; and nobody works in it."""
    check_replaceable(folder)
    check_parent(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; a diffusers model is a folder")
    if not any(folder.iterdir()):
        return
    if (folder / "export.json").is_file():
        raise UserError(
            f"{folder} holds exported graphs or engines, which a model does not replace; name another folder"
        )
    marker = folder / "sana.json"
    if marker.is_file() and configs.read_json(marker).get("written_by") == defaults.WRITTEN_BY:
        return
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is in use and holds no model; name another folder")
    if not force:
        raise UserError(f"{folder} holds a model that was not written by this program; --force replaces it")


def stored_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the largest parameter: in a mixture, that of the matrices."""
    return max(module.parameters(), key=Tensor.numel).dtype


def _tokenizer_class(loaded: LoadedModel) -> str:
    if loaded.tokenizer_folder is None:
        return "PreTrainedTokenizerFast"
    return configs.read_json(loaded.tokenizer_folder / "tokenizer_config.json").get(
        "tokenizer_class", "GemmaTokenizerFast"
    )


def write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
