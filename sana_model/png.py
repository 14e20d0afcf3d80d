"""PNG files that know how they were painted, so that any picture can be made again.

Two text chunks: `parameters`, the line format of the AUTOMATIC1111 web UI that picture browsers show, and `sana`, a
JSON object with everything that determines the pixels, which is what `read_metadata` reads.
"""

import json
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sana_model.errors import UserError
from sana_model.files import atomic
from sana_model.pipeline import Pipeline
from sana_model.settings import Settings, setting

SOFTWARE = f"sana_kernels {version('sana-kernels')}"


@dataclass(frozen=True)
class Metadata:
    """What determines one picture: picture `index` of those that `settings` make with a model loaded like this.

    The whole call is kept, not only its one picture: rounding depends on the batch that a picture was painted in.
    """

    settings: Settings
    index: int
    model: str  # as it was asked for: a built-in name, a path, a hub id
    backend: str  # the resolved one, never "auto"
    precision: str
    text_precision: str
    decoder_precision: str
    dialect: str = "diffusers"
    base: str | None = None
    decoder: str | None = None
    exact: bool = False
    lora: tuple[str, ...] = ()  # FILE:strength
    random: bool = False  # random weights: a picture of nothing
    software: str = SOFTWARE

    @classmethod
    def of(
        cls,
        pipe: Pipeline,
        settings: Settings,
        index: int,
        *,
        model: str,
        base: str | None = None,
        decoder: str | None = None,
    ) -> "Metadata":
        """Of picture `index` that `pipe` makes of `settings`; `model`, `base` and `decoder` are what `load` was given."""
        precisions = (pipe.plan.precisions[part] for part in ("dit", "text_encoder", "autoencoder"))
        options = pipe.config.dialect, base, decoder, pipe.plan.exact, pipe.loras.described()
        return cls(settings, index, model, pipe.plan.backend, *precisions, *options, pipe.model.random)

    @property
    def prompt(self) -> str:
        return self.settings.prompts[self.index // self.settings.num_images]

    @property
    def seed(self) -> int:
        return self.settings.seed + self.index

    @property
    def load_options(self) -> dict:
        """Arguments of `sana_model.load` that give the model again."""
        names = ("model", "backend", "precision", "text_precision", "decoder_precision", "dialect", "base", "decoder",
                 "exact", "lora")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def parameters(self) -> str:
        """The text of the `parameters` chunk."""
        settings = self.settings
        values = {
            "Steps": settings.steps, "Sampler": settings.sampler, "CFG scale": f"{settings.guidance:g}",
            "Seed": self.seed, "Size": f"{settings.width}x{settings.height}",
            "Model": _quoted(self.model), "Version": _quoted(self.software),
        }  # fmt: skip
        lines = [self.prompt]
        if settings.negative_prompt:
            lines.append(f"Negative prompt: {settings.negative_prompt}")
        return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in values.items())])

    def as_json(self) -> dict:
        return asdict(self)


def write_png(path: str | Path, image: Image.Image, metadata: Metadata) -> None:
    """Write the picture, or nothing: never half a file. Raises UserError or MissingError where it cannot be written."""
    chunks = PngInfo()
    # Latin-1 text becomes a tEXt chunk and any other an iTXt chunk in UTF-8; neither may hold a NUL.
    chunks.add_text("parameters", metadata.parameters().replace("\0", ""))
    chunks.add_text("sana", json.dumps(metadata.as_json()))
    with atomic(Path(path)) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def read_metadata(path: str | Path) -> Metadata:
    """What `write_png` stored. Raises UserError for a file that cannot be read, or was not painted by `sana`."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {})
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as a PNG picture: {why}") from error
    if "sana" not in text:
        raise UserError(f"{path} holds no settings: it was not painted by sana, or a program on its way removed them")
    try:
        values = json.loads(text["sana"])
        settings = Settings(**{name: setting(name, value) for name, value in values.pop("settings").items()})
        known = {name: values[name] for name in (f.name for f in fields(Metadata)) if name in values}
        metadata = Metadata(settings=settings, **known | {"lora": tuple(known.get("lora", ()))})
        options = metadata.load_options
        exact, lora = options.pop("exact"), options.pop("lora")
        if not all(isinstance(value, str) or value is None for value in (*options.values(), *lora, metadata.software)):
            raise UserError("a name is not a text")
        if type(exact) is not bool:
            raise UserError("exact is neither true nor false")
        if not 0 <= metadata.index < settings.count:
            raise UserError(f"there is no picture {metadata.index} among {settings.count}")
    except (ValueError, RecursionError, UserError) as error:
        raise UserError(f"the settings stored in {path} cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the settings stored in {path} cannot be read: some are missing, or of another form"
        ) from error
    return metadata


def _quoted(text: str) -> str:
    """Readers of the `parameters` line split it at commas and colons, unless a value is a JSON string."""
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text
