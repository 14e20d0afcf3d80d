"""Models on disk and in memory: finding, checking, loading, converting.

A model is named by a built-in name, a diffusers folder, a single checkpoint file of the DiT, or a hub id;
`load_model` takes them all. Each becomes a `Source`: a configuration, and for each part a function that opens and
checks its file and returns another that reads the values. All parts are opened before any is read.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sana_kernels.quant.checkpoint import FILE as QUANTIZED_FILE
from sana_kernels.quant.checkpoint import Header
from sana_model.autoencoder.dc_ae import Autoencoder
from sana_model.config import BUILT_IN, DIALECTS, ModelConfig
from sana_model.dit import DiT
from sana_model.errors import UserError
from sana_model.text_encoder import TextEncoder
from sana_model.tokenizer import ByteTokenizer, load_tokenizer
from sana_model.weights import checkpoint_config as configs
from sana_model.weights import defaults, hub, keys
from sana_model.weights.checkpoint import (
    Checkpoint,
    Prepare,
    check,
    choose_weights,
    fill,
    open_pth,
    open_safetensors,
    same_names,
)
from sana_model.weights.loaded import LoadedModel
from sana_model.weights.quantized_checkpoint import header_in, open_quantized
from sana_model.weights.random_weights import random_autoencoder, random_dit, random_text_encoder
from sana_model.weights.saving import refuse_original, refuse_to_destroy, save_diffusers, save_original

CHECKPOINTS = (
    Path(__file__).parents[1] / "checkpoints"
)  # diffusers folders that come with the package, by built-in name
PARTS = ("dit", "text", "autoencoder")
FOLDERS = {"dit": "transformer", "text": "text_encoder", "autoencoder": "vae"}

Open = Callable[[ModelConfig, torch.dtype | None], Callable[[Prepare | None], nn.Module]]
"""Opens and checks one part for a configuration and a dtype (None: as stored); what it returns reads the values."""


@dataclass(frozen=True)
class Source:
    """A model that was found, and not yet loaded."""

    config: ModelConfig
    name: str
    random: bool
    open: dict[str, Open]  # by part
    tokenizer_folder: Path | None
    folder: Path | None = None  # the diffusers folder, where all parts are in one
    precision: str | None = None  # fp32, bf16 or fp16, where the folder's sana.json asks for one
    quantized: dict[str, Header] = field(default_factory=dict)  # "dit", "text_encoder": those that are

    def precision_of(self, part: str, asked: str | None) -> str | None:
        """What a part is quantised in, else what is asked for. UserError where these are two things."""
        header = self.quantized.get(part)
        if header is None:
            return asked
        if asked not in (None, header.precision):
            raise UserError(
                f"{self.name}: its {part.replace('_', ' ')} is stored in {header.precision}, from which {asked} cannot be"
                f" made; leave the precision out, or name the weights that it was made from ({header.model})"
            )
        return header.precision

    def refuse_quantized(self, purpose: str) -> None:
        """Raise UserError for a quantised model, where 16-bit weights are needed."""
        for part, header in self.quantized.items():
            raise UserError(
                f"{self.name} is quantised (its {part.replace('_', ' ')} is stored in {header.precision}), and {purpose}"
                f" needs unquantised weights: those that it was made from ({header.model})"
            )


def load_model(
    model: str | Path | ModelConfig | Source,
    *,
    precision: torch.dtype | None = None,
    text_precision: torch.dtype | None = None,
    decoder_precision: torch.dtype | None = None,
    dialect: str = "diffusers",
    parts: tuple[str, ...] = PARTS,
    base: str | Path | None = None,
    prepare: dict[str, Prepare] | None = None,
) -> LoadedModel:
    """Load `parts` ("dit", "text", "autoencoder") of a model onto the CPU.

    `model` is a built-in name or a ModelConfig (seeded random weights), a diffusers folder, a `.safetensors` or
    `.pth` file of a DiT in either dialect (the other parts then come from `base`, which is anything but such a file),
    a hub id `org/name`, `hf://org/name/file` for one file on the hub, or a Source that `find` returned. Precisions
    are dtypes; None leaves every tensor as it is stored (fp32 for random weights). `dialect` chooses between the two
    public implementations where they differ (docs/dialects.md). `prepare`, for "dit" and "text", is called with each block
    of theirs that has been read, to change it in place.

    Raises UserError for a model that cannot be read, naming file and key, before anything is loaded.
    """
    if dialect not in DIALECTS:
        raise UserError(f"dialect {dialect!r} is not known; choose one of {', '.join(DIALECTS)}")
    source = model if isinstance(model, Source) else find(model, base)
    config = source.config.with_dialect(dialect)
    dtypes = {"dit": precision, "text": text_precision, "autoencoder": decoder_precision}
    opened = {part: source.open[part](config, dtypes[part]) for part in parts}
    tokenizer = None
    if "text" in parts:
        tokenizer = load_tokenizer(source.tokenizer_folder) if source.tokenizer_folder else ByteTokenizer()
    open_text = source.open["text"]  # not `source`, which may hold a whole .pth
    prepare = prepare or {}
    loaded = {part: read(prepare.get(part)) for part, read in opened.items()}
    return LoadedModel(
        config=config,
        dit=loaded.get("dit"),
        text_encoder=loaded.get("text"),
        tokenizer=tokenizer,
        autoencoder=loaded.get("autoencoder"),
        source=source.name,
        random=source.random,
        tokenizer_folder=source.tokenizer_folder,
        load_text_encoder=lambda: open_text(config, text_precision)(prepare.get("text")),
    )


# ---------------------------------------------------------------------------------------------- finding


def find(model: str | Path | ModelConfig, base: str | Path | None = None) -> Source:
    """What `model` is and where its parts are. Reads configurations, no weights; may download from the hub."""
    if isinstance(model, ModelConfig):
        return _random(model)
    path = Path(model)
    if base is not None and (str(model) in BUILT_IN or path.is_dir()):
        raise UserError(f"{model} has all its parts: a base (--base {base}) is for the single file of a DiT")
    if str(model) in BUILT_IN:  # ./sana-tiny is a path
        embedded = CHECKPOINTS / str(model)
        if embedded.is_dir():
            return _folder(embedded, str(model), str(model))
        return _random(BUILT_IN[str(model)])
    if path.is_dir():
        return _folder(path, path.resolve().name, str(model))
    if path.is_file():
        return _file(path, base)
    if (named := hub.parse(str(model))) and not path.is_absolute():
        repo, file = named
        if file:
            return _file(hub.fetch_file(repo, file), base)
        return _folder(hub.fetch_folder(repo, partial(_needed, repo)), repo.split("/")[1], repo)
    close = difflib.get_close_matches(str(model), BUILT_IN, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the built-in names are {', '.join(BUILT_IN)}"
    raise UserError(f"{model} is no file, no folder, no hub id (org/name) and no built-in name; {hint}")


def _random(config: ModelConfig) -> Source:
    float32 = torch.float32
    parts = {
        "dit": lambda c, dtype: lambda prepare: random_dit(c.dit, dtype=dtype or float32, prepare=prepare),
        "text": lambda c, dtype: lambda prepare: random_text_encoder(c.text, dtype=dtype or float32, prepare=prepare),
        "autoencoder": lambda c, dtype: lambda prepare: random_autoencoder(c.autoencoder, dtype=dtype or float32),
    }
    return Source(config, f"{config.name} (random weights)", True, parts, None)


def _folder(folder: Path, name: str, label: str) -> Source:
    """A diffusers folder."""
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise UserError(_what_is(folder))
    kind = configs.read_json(index_file).get("_class_name")
    if kind not in configs.PIPELINES:
        raise UserError(f"{label} is a {kind}; supported are {', '.join(configs.PIPELINES)}")

    def read(reader: Callable, part: str, file: str = "config.json"):
        path = folder / part / file
        return reader(configs.read_json(path), path)

    config = defaults.assemble(
        name,
        read(configs.read_dit, "transformer"),
        read(configs.read_text_encoder, "text_encoder"),
        read(configs.read_autoencoder, "vae"),
        read(configs.read_scheduler, "scheduler", "scheduler_config.json"),
    )
    ours_file = folder / "sana.json"
    ours = configs.read_json(ours_file) if ours_file.exists() else {}
    config = defaults.read_sana_json(ours, ours_file, config)
    headers = [header for part in ("dit", "text") if (header := header_in(folder / FOLDERS[part])) is not None]

    def opener(part: str) -> Open:
        def open_part(config: ModelConfig, dtype: torch.dtype | None) -> Callable[[], nn.Module]:
            place = folder / FOLDERS[part]
            try:
                names = [file.name for file in place.iterdir()]
            except OSError as error:
                raise UserError(f"cannot read {place}: {error.strerror}") from error
            if QUANTIZED_FILE in names:
                name = "text_encoder" if part == "text" else part
                return open_quantized(place, name, partial(_empty, part, config), dtype)
            if headers and ours.get("random") and not any(name.endswith(".safetensors") for name in names):
                # A quantised random model: what was not quantised is as well drawn again as stored.
                return _random(config).open[part](config, dtype)
            checkpoint = open_safetensors([place / name for name in choose_weights(names, dtype, str(place))])
            return reader(part, config, checkpoint, dtype)

        return open_part

    openers = {part: opener(part) for part in PARTS}
    return Source(
        config, label, ours.get("random", False), openers, folder / "tokenizer", folder, ours.get("precision"),
        {header.part: header for header in headers},
    )  # fmt: skip


def _what_is(folder: Path) -> str:
    """Why `folder` is not a diffusers folder, and what to pass instead."""
    if (folder / "config.json").is_file() and (folder.parent / "model_index.json").is_file():
        return f"{folder} is one part of a model; pass the whole folder, {folder.parent}"
    originals = sorted(folder.glob("**/*.pth"))
    if originals:
        return (
            f"{folder} is not a diffusers folder but holds an original checkpoint; pass the file, {originals[0]}, and "
            "--base FOLDER for the text encoder and the autoencoder"
        )
    return f"{folder} is not a diffusers folder: it has no model_index.json"


def _file(file: Path, base: str | Path | None) -> Source:
    """A single file of a DiT, the other parts from `base`."""
    checkpoint = open_pth(file) if file.suffix in (".pth", ".pt", ".ckpt", ".bin") else open_safetensors([file])
    dialect = keys.recognise(checkpoint.shapes)
    if dialect is None:
        some = ", ".join(list(checkpoint.shapes)[:3])
        raise UserError(
            f"{file} is no SANA DiT, neither in diffusers' nor in the original's names; its keys are {some}, …"
        )
    source = None if base is None else find(base)
    dit = configs.infer_dit(checkpoint.shapes, dialect, file, source and source.config.dit)
    config = defaults.with_dit(source and source.config, file.name, dit)

    def open_dit(config: ModelConfig, dtype: torch.dtype | None) -> Callable[[], nn.Module]:
        return reader("dit", config, checkpoint, dtype, dialect)

    def open_nothing(_config: ModelConfig, _dtype: torch.dtype | None) -> Callable[[], nn.Module]:
        raise UserError(
            f"{file} holds only the DiT; the text encoder and the autoencoder are missing: pass --base with a "
            "diffusers folder or hub id of the same family"
        )

    if source is None:
        return Source(config, str(file), False, dict.fromkeys(PARTS, open_nothing) | {"dit": open_dit}, None)
    return Source(
        config, str(file), source.random, source.open | {"dit": open_dit}, source.tokenizer_folder,
        quantized={part: header for part, header in source.quantized.items() if part != "dit"},
    )  # fmt: skip


def _needed(repo: str, names: list[str]) -> list[str]:
    """Of the files of a repository, those of a diffusers folder; the full precision where several are offered."""
    if "model_index.json" not in names:
        raise UserError(
            f"{repo} is not in diffusers' format; name its `_diffusers` twin, or one file: hf://{repo}/PATH"
        )
    small = [name for name in names if name.endswith(".json") or name.startswith("tokenizer/")]
    weights = []
    for folder in FOLDERS.values():
        inside = [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
        weights += [f"{folder}/{name}" for name in choose_weights(inside, None, f"{repo}/{folder}")]
    return small + weights


def reader(
    part: str, config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype | None, dialect: str = "diffusers"
) -> Callable[[], nn.Module]:
    """Check an opened checkpoint against the network of `part`; what is returned builds that network and fills it."""
    module = _empty(part, config)
    if part == "dit":
        rules, dropped = keys.rules(config.dit), keys.DROPPED[dialect]
    else:
        # a Gemma-2 with its head, as it is published by itself, has the encoder under "model."
        with_head = part == "text" and "model.embed_tokens.weight" in checkpoint.shapes
        rules, dropped = same_names(module, "model." if with_head else ""), ("lm_head.weight",) if with_head else ()
    check(checkpoint, module, rules, dialect, dropped)
    return lambda prepare=None: fill(_empty(part, config), checkpoint, rules, dialect, dtype, prepare)


def _empty(part: str, config: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        if part == "dit":
            return DiT(config.dit)
        return TextEncoder(config.text) if part == "text" else Autoencoder(config.autoencoder)


# ---------------------------------------------------------------------------------------------- converting


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = "diffusers",
    *,
    base: str | Path | None = None,
    force: bool = False,
) -> None:
    """Rewrite a model as a diffusers folder (`to="diffusers"`) or its DiT as the original `.pth` (`to="original"`).

    Values and dtypes stay as they are. `base` as in `load_model`.
    """
    if to not in ("diffusers", "original"):
        raise UserError(f"a model is converted to 'diffusers' or to 'original', not to {to!r}")
    found = find(source, base)
    found.refuse_quantized("converting")
    if to == "diffusers":
        refuse_to_destroy(Path(destination), force)
        save_diffusers(destination, load_model(found), force=force)
    else:
        refuse_original(Path(destination), force)
        save_original(destination, load_model(found, parts=("dit",)))
