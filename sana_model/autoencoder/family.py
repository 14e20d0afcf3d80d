"""The family of DC-AE: what is published, and how any member of it is found.

    dc-ae-f32c32-sana-1.0, -1.1     SANA's
    dc-ae-lite-f32c32-sana-1.1      the same latents, a decoder of convolutions alone: `--decoder lite`
    dc-ae-f32c32, f64c128, f128c512 …-in-1.0 and …-mix-1.0, trained on ImageNet and on a mixture (arXiv 2410.10733)
    dc-ae-1.5-f32c128, -f64c128     (arXiv 2508.00413)

fNcM is one latent pixel of M channels for N × N pixels. A name stands for a configuration, with seeded random weights; files
may be in diffusers' names or in those of efficientvit, the original.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from sana_model.autoencoder import original as original_autoencoder
from sana_model.autoencoder.dc_ae import Autoencoder
from sana_model.config import BUILT_IN, AutoencoderConfig, ModelConfig
from sana_model.errors import UserError
from sana_model.weights import checkpoint_config as configs
from sana_model.weights import hub
from sana_model.weights.checkpoint import Checkpoint, choose_weights, open_pth, open_safetensors
from sana_model.weights.models import FOLDERS, Open, Source, find, reader
from sana_model.weights.random_weights import random_autoencoder

LITE_REPOSITORY = "mit-han-lab/dc-ae-lite-f32c32-sana-1.1-diffusers"
OF_THE_LATENTS = (
    "latent_channels", "spatial_compression", "widths", "encoder_layers", "encoder_block_types", "downsample",
    "encoder_out_shortcut",
)  # fmt: skip
"""What autoencoders of the same latents share: their encoder. Decoders differ, and scaling factors are not always stated."""


def lite(config: AutoencoderConfig) -> AutoencoderConfig:
    """The same encoder and latents with the decoder of DC-AE-Lite, its widths and depths in proportion."""
    stages = len(config.widths)
    return replace(
        config,
        decoder_layers=(0, 3, 5, 4, 4, 4),
        decoder_block_types=("ResBlock",) * stages,
        decoder_qkv_multiscales=((),) * stages,
        upsample="pixel_shuffle",
        out_activation="silu",
    )


def _first(attention: int, latent_channels: int, scaling_factor: float) -> AutoencoderConfig:
    """The models of the first paper, with so many stages of attention."""
    stages = 3 + attention
    types, multiscales = ("ResBlock",) * 3 + ("EfficientViTBlock",) * attention, ((),) * stages
    return AutoencoderConfig(
        latent_channels=latent_channels,
        widths=(128, 256, 512, 512, 1024, 1024, 2048, 2048)[:stages],
        encoder_layers=(0, 4, 8) + (2,) * attention,
        decoder_layers=(0, 5, 10) + (2,) * attention,
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_qkv_multiscales=multiscales,
        decoder_qkv_multiscales=multiscales,
        decoder_norms=("batch_norm",) * 3 + ("rms_norm",) * attention,
        decoder_activations=("relu",) * 3 + ("silu",) * attention,
        downsample="pixel_unshuffle",
        upsample="pixel_shuffle",
        scaling_factor=scaling_factor,
    )


def _second(widths: tuple[int, ...]) -> AutoencoderConfig:
    """The models of DC-AE 1.5: convolutions alone, and no shortcuts around the latent."""
    stages = len(widths)
    layers = (0, 5, 10) + (4,) * (stages - 3)
    return AutoencoderConfig(
        latent_channels=128,
        widths=widths,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_block_types=("ResBlock",) * stages,
        decoder_block_types=("ResBlock",) * stages,
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        decoder_norms=("rms_norm",) * stages,
        decoder_activations=("silu",) * stages,
        downsample="pixel_unshuffle",
        upsample="pixel_shuffle",
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        out_activation="silu",
        scaling_factor=1.0,
    )


_SANA = AutoencoderConfig()
_WIDTHS = _SANA.widths
FAMILY: dict[str, AutoencoderConfig] = {
    "dc-ae-f32c32-sana-1.0": _SANA,
    "dc-ae-f32c32-sana-1.1": _SANA,
    "dc-ae-lite-f32c32-sana-1.1": lite(_SANA),
    "dc-ae-f32c32-in-1.0": _first(3, 32, 0.3189),
    "dc-ae-f32c32-mix-1.0": _first(3, 32, 0.4552),
    "dc-ae-f64c128-in-1.0": _first(4, 128, 0.2889),
    "dc-ae-f64c128-mix-1.0": _first(4, 128, 0.4538),
    "dc-ae-f128c512-in-1.0": _first(5, 512, 0.4883),
    "dc-ae-f128c512-mix-1.0": _first(5, 512, 0.3620),
    "dc-ae-1.5-f32c128": _second(_WIDTHS),
    "dc-ae-1.5-f64c128": _second((*_WIDTHS, 1024)),
}
"""By published name."""


def find_autoencoder(name: str | Path) -> Source:
    """Where an autoencoder is, as a `Source` of that part alone; reads its configuration and no weights.

    name: one of FAMILY or of the built-in models; a folder in diffusers' format, of an autoencoder or of a whole model; a
    file in diffusers' or efficientvit's names, whose configuration is the member of FAMILY with those tensors; or a hub id.
    """
    if str(name) in FAMILY:
        return _random(FAMILY[str(name)], str(name))
    path = Path(name)
    if path.is_file():
        return _file(path)
    if (path / "config.json").is_file():
        return _folder(path)
    named = hub.parse(str(name))
    if str(name) not in BUILT_IN and not path.exists() and named and named[1] is None:
        inside = FOLDERS["autoencoder"]  # of a whole model
        folder = hub.fetch_folder(named[0], partial(_needed, named[0]), ("config.json", f"{inside}/config.json"))
        return _folder(folder if (folder / "config.json").is_file() else folder / inside)
    return find(name)


def with_decoder(source: Source, decoder: str) -> Source:
    """The model of `source` with another autoencoder: "lite", for SANA's own latents, or any that `find_autoencoder` takes.

    Raises UserError where the latents are not the DiT's.
    """
    ours = source.config.autoencoder
    if decoder == "lite" and source.random:
        other = _random(lite(ours), decoder)
    elif decoder == "lite" and _difference(ours, FAMILY["dc-ae-lite-f32c32-sana-1.1"]) is not None:
        raise UserError(f"the lite decoder knows SANA's latents, and {source.name} has an autoencoder of its own")
    else:
        other = find_autoencoder(LITE_REPOSITORY if decoder == "lite" else decoder)
    theirs = other.config.autoencoder
    if (what := _difference(ours, theirs)) is not None:
        raise UserError(
            f"--decoder {decoder} reads other latents than those of {source.name}: its autoencoder has"
            f" {what.replace('_', ' ')} {getattr(theirs, what)}, and that one {getattr(ours, what)}; leave --decoder out,"
            " or name a decoder that was trained for these latents"
        )
    config = replace(theirs, scaling_factor=ours.scaling_factor)  # of the latents, which the DiT makes
    return replace(
        source,
        config=replace(source.config, autoencoder=config),
        open=source.open | {"autoencoder": other.open["autoencoder"]},
        random=source.random or other.random,
    )


def _difference(ours: AutoencoderConfig, theirs: AutoencoderConfig) -> str | None:
    """The first sign that two autoencoders have different latents; None where there is none."""
    return next((what for what in OF_THE_LATENTS if getattr(ours, what) != getattr(theirs, what)), None)


def _source(config: AutoencoderConfig, name: str, random: bool, open_part: Open) -> Source:
    def open_nothing(_config, _dtype):
        raise UserError(f"{name} is an autoencoder; it has no other part of a model")

    model = replace(BUILT_IN["sana-0.6b"], autoencoder=config, name=Path(name).name)
    return Source(model, name, random, {"dit": open_nothing, "text": open_nothing, "autoencoder": open_part}, None)


def _random(config: AutoencoderConfig, name: str) -> Source:
    def open_part(_config: ModelConfig, dtype: torch.dtype | None) -> Callable[..., Autoencoder]:
        return lambda _prepare=None: random_autoencoder(config, dtype=dtype or torch.float32)

    return _source(config, f"{name} (random weights)", True, open_part)


def _folder(folder: Path) -> Source:
    """The folder of an autoencoder, in diffusers' format."""
    file = folder / "config.json"
    config = configs.read_autoencoder(configs.read_json(file), file)
    names = [entry.name for entry in folder.iterdir()]

    def open_part(model: ModelConfig, dtype: torch.dtype | None) -> Callable[..., Autoencoder]:
        checkpoint = open_safetensors([folder / name for name in choose_weights(names, dtype, str(folder))])
        return reader("autoencoder", model, checkpoint, dtype)

    return _source(config, str(folder), False, open_part)


def _file(file: Path) -> Source:
    checkpoint = open_pth(file) if file.suffix in (".pth", ".pt", ".ckpt", ".bin") else open_safetensors([file])
    if original_autoencoder.is_original(checkpoint.shapes):
        checkpoint = original_autoencoder.as_diffusers(checkpoint)
    config = recognise(checkpoint, file.stem)
    return _source(config, str(file), False, lambda model, dtype: reader("autoencoder", model, checkpoint, dtype))


def recognise(checkpoint: Checkpoint, hint: str) -> AutoencoderConfig:
    """The member of FAMILY that has these tensors; of several, which differ in their scaling factors, the one in `hint`."""
    found = {name: config for name, config in FAMILY.items() if _shapes(config) == dict(checkpoint.shapes)}
    if not found:
        raise UserError(
            f"{checkpoint.where} is no DC-AE of a published shape ({', '.join(FAMILY)}); pass its folder, which holds"
            " its configuration"
        )
    return next((config for name, config in found.items() if name in hint), next(iter(found.values())))


def _shapes(config: AutoencoderConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Autoencoder(config).state_dict().items()}


def _needed(repo: str, names: list[str]) -> list[str]:
    """Of the files of a repository, those of an autoencoder: at its top, or in the folder of a whole model."""
    inside = "" if "config.json" in names else f"{FOLDERS['autoencoder']}/"
    own = [name.removeprefix(inside) for name in names if name.startswith(inside) and "/" not in name[len(inside) :]]
    if "config.json" not in own:
        raise UserError(f"{repo} holds no autoencoder in diffusers' format")
    return [inside + name for name in ("config.json", *choose_weights(own, None, repo))]
