"""The folder of `sana export onnx`: which files it holds, what goes into each graph and comes out, and for which shapes.

    DIR/export.json           `Manifest`: model, precisions, profile, what every graph was made of
    DIR/text_encoder.onnx     token ids → states; also transformer.onnx, decoder.onnx, encoder.onnx (`signature`)
    DIR/<graph>.onnx.data     their weights
    DIR/model_index.json, sana.json, scheduler/, tokenizer/, <part>/config.json      the model without its weights

So DIR is a diffusers folder with graphs in place of weights: `--model DIR --backend onnxruntime` paints from it alone.

Floating inputs and outputs are fp32 whatever a graph computes in: samplers work in fp32, and NumPy has no bf16. Every
dimension below that is a name is dynamic; batch is B, or in the transformer the rows of both halves of guidance. A
caption is computed by itself (batch 1) and a picture decoded by itself; larger batches run, too.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from sana_model.bins import NATIVE_SIZES, bins
from sana_model.config import ModelConfig
from sana_model.errors import UserError
from sana_model.files import write_text

MANIFEST = "export.json"
FORMAT = 2
WRITTEN_BY = f"sana-kernels {version('sana-kernels')}"
GRAPHS = ("text_encoder", "transformer", "decoder", "encoder")
PARTS = {"text_encoder": "text_encoder", "transformer": "dit", "decoder": "autoencoder", "encoder": "autoencoder"}
"""Which part of the model (as in `Plan.precisions`) each graph is."""
MAX_IMAGES = 4  # the largest batch of images in a profile; the graphs themselves take any

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a graph in order: name → (dtype as NumPy calls it, shape)."""

    inputs: dict[str, tuple[str, Shape]]
    outputs: dict[str, tuple[str, Shape]]

    def input_shapes(self, **dims: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs where the named dimensions are `dims`."""
        return {name: tuple(dims.get(d, d) for d in shape) for name, (_, shape) in self.inputs.items()}


def signature(graph: str, config: ModelConfig) -> Signature:
    """What a graph of GRAPHS takes and gives for this model.

    text_encoder    ids, padded on the right, and how many in each row are no pads → states after the final norm
    transformer     latents, model time, caption states of which the first `lengths` count (and, for Sprint, the
                    guidance scale) → velocity
    decoder         latents, already divided by the scaling factor → images, about [-1, 1]
    encoder         images → latents, to be multiplied by the scaling factor
    """
    channels, states = config.autoencoder.latent_channels, config.text.hidden
    latents = ("float32", ("batch", channels, "latent_height", "latent_width"))
    images = ("float32", ("batch", 3, "height", "width"))
    rows, lengths = ("float32", ("batch",)), ("int64", ("batch",))
    guidance = {"guidance": rows} if config.dit.guidance_embeds else {}
    caption = ("float32", ("batch", "tokens", config.dit.caption_channels))
    velocity = ("float32", ("batch", config.dit.out_channels, "latent_height", "latent_width"))
    return {
        "text_encoder": Signature(
            {"ids": ("int64", ("batch", "tokens")), "lengths": lengths},
            {"states": ("float32", ("batch", "tokens", states))},
        ),
        "transformer": Signature(
            {"latents": latents, "timestep": rows, "caption": caption, "lengths": lengths} | guidance,
            {"velocity": velocity},
        ),
        "decoder": Signature({"latents": latents}, {"images": images}),
        "encoder": Signature({"images": images}, {"latents": latents}),
    }[graph]


@dataclass(frozen=True)
class Profile:
    """The shapes that engines are built for; the graphs themselves run any. Sizes are (height, width) in pixels."""

    name: str  # "bins", or the side of a square in pixels
    sizes: tuple[tuple[int, int], ...]
    prompt_tokens: int  # the longest input of the text encoder: instruction and prompt
    caption_tokens: int  # the longest caption
    images: int = MAX_IMAGES

    def dims(self, graph: str, config: ModelConfig) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        """The named dimensions of a graph's inputs at least, typically and at most.

        Typical are one image with guidance, in the size nearest to a square, and the longest caption.
        """
        step = config.autoencoder.spatial_compression
        heights, widths = zip(*self.sizes, strict=True)
        square = min(self.sizes, key=lambda size: abs(size[0] - size[1]))
        guided = graph == "transformer" and not config.dit.guidance_embeds
        tokens = self.prompt_tokens if graph == "text_encoder" else self.caption_tokens
        least = {"batch": 1, "tokens": 1} | _sides(min(heights), min(widths), step)
        typical = {"batch": 1 + guided, "tokens": tokens} | _sides(*square, step)
        most = {"batch": self.images * (1 + guided), "tokens": tokens} | _sides(max(heights), max(widths), step)
        used = {d for _, shape in signature(graph, config).inputs.values() for d in shape if isinstance(d, str)}
        return tuple({name: size for name, size in dims.items() if name in used} for dims in (least, typical, most))


def _sides(height: int, width: int, step: int) -> dict[str, int]:
    return {"height": height, "width": width, "latent_height": height // step, "latent_width": width // step}


def profile(name: str | None, config: ModelConfig, prompt_tokens: int) -> Profile:
    """The profile called `name`: "bins" or the side of a square; None is the model's native square.

    Raises UserError for a name that is neither, and for bins of a model that has none.
    """
    side, step = config.size, config.autoencoder.spatial_compression
    if name == "bins":
        sizes: Iterable[tuple[int, int]] = bins(side)
    else:
        try:
            side = int(name or side)
        except ValueError as error:
            known = ", ".join(map(str, NATIVE_SIZES))
            raise UserError(f"profile {name!r} is not known; choose one of {known}, bins") from error
        if side < step or side % step:
            raise UserError(f"the side of a profile must be a positive multiple of {step}, not {side}")
        sizes = ((side, side),)
    return Profile(name or str(side), tuple(sizes), prompt_tokens, config.max_text_tokens)


@dataclass(frozen=True)
class Graph:
    """What is known of one graph."""

    precision: str  # fp32 | bf16 | fp16 | w8a8 | w4a16
    sha256: str  # of the parameters that it was made of
    file_sha256: str  # of the .onnx file and its data: two calibrations of the same parameters differ
    opset: int
    bytes: int  # of the .onnx file and its data
    seconds: float  # that its export took
    activation_scales: dict[str, float] = field(default_factory=dict)  # W8A8: by layer, of its input


@dataclass(frozen=True)
class Manifest:
    """The content of export.json."""

    model: str  # as `sana_model.load` takes it
    random: bool
    dialect: str
    attention: str  # plain | plugin
    profile: Profile
    graphs: dict[str, Graph]
    base: str | None = None
    written_by: str = WRITTEN_BY
    format: int = FORMAT

    @property
    def precisions(self) -> dict[str, str]:
        """By part of the model, as `Plan.precisions`."""
        return {PARTS[name]: graph.precision for name, graph in self.graphs.items()}


def graph_file(folder: Path, graph: str) -> Path:
    return folder / f"{graph}.onnx"


def file_sha256(folder: Path, graph: str) -> str:
    """Of a graph's file and of its weights beside it."""
    sha = hashlib.sha256()
    file = graph_file(folder, graph)
    for path in (file, file.with_name(file.name + ".data")):
        if path.is_file():
            with path.open("rb") as content:
                while block := content.read(2**22):
                    sha.update(block)
    return sha.hexdigest()


def is_export(folder: Path | None) -> bool:
    """Is this a folder of `sana export onnx`?"""
    return folder is not None and (folder / MANIFEST).is_file()


def write(folder: Path, manifest: Manifest) -> None:
    """Write export.json: the last file of an export, so that a folder without it is unfinished."""
    write_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


def read(folder: str | Path, graphs: Iterable[str] = ()) -> Manifest:
    """The manifest of a folder, in which the graphs named are there.

    Raises UserError where the folder is none of ours, unfinished, damaged, of a newer version, or lacks a graph.
    """
    folder = Path(folder)
    again = f"sana export onnx MODEL -o {folder}"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; graphs are made by: {again}")
    if not is_export(folder):
        found = "unfinished: it holds graphs and" if any(folder.glob("*.onnx")) else "no folder of graphs: it"
        raise UserError(f"{folder} is {found} has no {MANIFEST}; graphs are made by: {again}")
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            way = (
                "remove the folder and build it again, from a new export"
                if any(folder.glob("*.engine"))
                else f"again: {again}"
            )
            raise UserError(
                f"{folder / MANIFEST} has format {values['format']}, and this program reads {FORMAT}; {way}"
            )
        shapes = values["profile"] | {"sizes": tuple(map(tuple, values["profile"]["sizes"]))}
        parts = {name: Graph(**graph) for name, graph in values["graphs"].items()}
        manifest = Manifest(**values | {"profile": Profile(**shapes), "graphs": parts})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error}; again: {again}") from error
    for graph in graphs:
        if graph not in manifest.graphs or not graph_file(folder, graph).is_file():
            raise UserError(f"{folder} has no {graph}.onnx; again, with all graphs: {again}")
    return manifest
