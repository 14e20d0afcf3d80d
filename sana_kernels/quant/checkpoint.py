"""Files of quantised networks: the specification, `save` and `load`.

A quantised model is a diffusers folder in which the weights of `transformer/`, and of `text_encoder/` where that is
quantised too, are one file, `quantized.safetensors`, in place of diffusers' own. Everything else is as ever; a folder of
random weights (`"random": true` in sana.json) has no weights for its other parts, which are drawn again.

Tensors have the names of this library's networks (`sana_model.dit.DiT`, `sana_model.text_encoder.TextEncoder`): q, k
and v are one layer. A parameter of the network is there either under its own name, in 16 or 32 bits, or, where it is the
weight of a quantised layer, in parts (sana_kernels/quant/layer.py has their shapes, formats.py their bits):

    <layer>.values  <layer>.scale  [<layer>.tensor_scale]  [<layer>.smooth]  [<layer>.down  <layer>.up]

in place of <layer>.weight. <layer>.bias keeps its name. Matrices are row-major and padded along K only, as formats.py says;
N is never padded: rows of zeros that a backend wants, in each half of a GLU say, are its own business.

The metadata of the file has "format": "pt" and, under "sana_quantization", this object as JSON:

    version       1
    part          "dit" | "text_encoder"
    model         the name of the model it was made from, for people
    precision     what was asked for: "w8a8" | "w4a8" | "w4a4" | "w4a16"
    method        "rtn" | "gptq" | "smooth" | "smooth+gptq" | "svdquant" | "svdquant+gptq" | "awq" (of which readers
                  need to know that norms which absorbed a scale are fp32, and stay so)
    source        sha256 of the weights it was made from (`sana_model.quantize.model.fingerprint`)
    calibration   null, or {"prompts": sha256 of the list, "samples": int, "steps": int, "seed": int}
    layers        {<layer>: {"format", "activations", "shape": [N, K], "padded": Kp, "group": int, "rank": int,
                             "smooth": bool, "sqnr_db": float | null}}
                  group is 0 where a row has one scale; sqnr_db: of the layer's output on the calibration's inputs

A checkpoint names *storage*; what a machine executes is its plan's business. `load` checks the header, and every name, dtype
and shape against the network before a value is read; values are checked for NaN and infinity when they are read.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sana_kernels.quant.formats import ACTIVATIONS, EIGHT_BITS, NVFP4_GROUP, WEIGHTS
from sana_kernels.quant.layer import QuantizedLayer

FILE = "quantized.safetensors"
KEY = "sana_quantization"
VERSION = 1
PRECISIONS = ("w8a8", "w4a8", "w4a4", "w4a16")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class CheckpointError(ValueError):
    """A file that is no intact quantised checkpoint of the network; one sentence that names file and tensor."""


@dataclass(frozen=True)
class LayerInfo:
    """What the header says of one layer."""

    format: str
    activations: str
    shape: tuple[int, int]  # (N, K)
    padded: int  # Kp
    group: int
    rank: int
    smooth: bool
    sqnr_db: float | None

    @classmethod
    def of(cls, layer: QuantizedLayer, sqnr_db: float | None = None) -> "LayerInfo":
        shape, smooth = (layer.outputs, layer.inputs), layer.smooth is not None
        return cls(layer.format, layer.activations, shape, layer.padded, layer.group, layer.rank, smooth, sqnr_db)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """By field, the shape and the possible dtypes of each tensor of such a layer."""
        (N, K), Kp = self.shape, self.padded
        one = (torch.float32,)
        if self.format in EIGHT_BITS:
            found = {"values": ((N, Kp), (EIGHT_BITS[self.format],)), "scale": ((N,), one)}
        else:
            scales = (torch.bfloat16, torch.float32) if self.format == "int4" else (torch.float8_e4m3fn,)
            found = {"values": ((N, Kp // 2), (torch.uint8,)), "scale": ((N, Kp // self.group), scales)}
        if self.format == "nvfp4":
            found["tensor_scale"] = (), one
        if self.smooth:
            found["smooth"] = (K,), one
        if self.rank:
            found |= {"down": ((self.rank, K), FLOATS[:2]), "up": ((N, self.rank), FLOATS[:2])}
        return found


@dataclass(frozen=True)
class Header:
    """The JSON header; see the top of this file."""

    part: str
    model: str
    precision: str
    method: str
    source: str
    calibration: dict | None
    layers: dict[str, LayerInfo]
    version: int = VERSION


# ------------------------------------------------------------------------------------------------ writing


def save(
    file: Path,
    header: Header,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
) -> None:
    """Write a checkpoint, one tensor in memory at a time: `read(name)` gives each of `shapes`, {name: (dtype, shape)}.

    `shapes` has the parts of quantised layers and the other parameters, under the names above. The same arguments make the
    same bytes. Writes to `file` itself: a temporary path, which the caller renames. Raises ValueError where `read` gives
    something else than `shapes` says, and CheckpointError for NaN.
    """

    def checked(name: str) -> Tensor:
        return _finite(read(name), f"{name} of the model to be written")

    _write(file, {"format": "pt", KEY: json.dumps(asdict(header))}, shapes, checked)


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write any tensors, of the dtypes in `NAMES`, as a safetensors file. Raises OSError where the system refuses to.

    (safetensors' own writer raises an error of its own then, which does not tell a full disk from a damaged file.)
    """
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    _write(file, metadata, shapes, tensors.__getitem__)


def _write(
    file: Path,
    metadata: Mapping[str, str],
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
) -> None:
    """A safetensors file, one tensor in memory at a time. (safetensors' own writer holds all of them at once.)"""
    # Wide elements first, as safetensors has it, so that every tensor is aligned.
    names = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        dtype, shape = shapes[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = read(name).detach().cpu().contiguous()
            if (tensor.dtype, tuple(tensor.shape)) != (shapes[name][0], tuple(shapes[name][1])):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {shapes[name]}")
            out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def parts(name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
    """The tensors of a layer under the names that they have in a file."""
    return {f"{name}.{field}": tensor for field, tensor in layer.tensors().items()}


# ------------------------------------------------------------------------------------------------ reading


class Checkpoint:
    """An opened file whose header, names, dtypes and shapes are right; values are read one at a time."""

    def __init__(self, file: Path, header: Header, names: list[str]):
        self.file, self.header = file, header
        self.plain = [name for name in names if _field(name, header.layers) is None]  # parameters that are as ever

    def tensor(self, name: str) -> Tensor:
        """A parameter that is not quantised, as stored. Raises CheckpointError for NaN and infinity."""
        return self._read(name)

    def layer(self, name: str) -> QuantizedLayer:
        """A quantised layer. Raises CheckpointError for NaN, infinity, and scales and smoothing that are negative."""
        info = self.header.layers[name]
        fields = {field: self._read(f"{name}.{field}") for field in info.tensors()}
        if info.smooth and not bool((fields["smooth"] > 0).all()):
            raise CheckpointError(f"{self.file}: {name}.smooth is not positive; the file is damaged")
        if bool((fields["scale"].float() < 0).any()):
            raise CheckpointError(f"{self.file}: {name}.scale is negative; the file is damaged")
        return QuantizedLayer(info.format, info.activations, info.shape[1], **fields)

    def __iter__(self) -> Iterator[tuple[str, Tensor | QuantizedLayer]]:
        """All parameters in the order of the file's header: layers by their names, then the others."""
        for name in self.header.layers:
            yield name, self.layer(name)
        for name in self.plain:
            yield name, self.tensor(name)

    def _read(self, name: str) -> Tensor:
        try:
            with safe_open(self.file, framework="pt") as handle:
                return _finite(handle.get_tensor(name), f"{self.file}: {name}")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file}: cannot read {name} ({error})") from error


def load(file: Path, part: str, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """Open a checkpoint of a network with these parameters, {name: shape} as its state_dict has them, and check all of it.

    `part`: "dit" or "text_encoder". Raises CheckpointError for a damaged header, another network's file, and a tensor that
    is missing, surplus, or of the wrong dtype or shape; nothing but the header is read.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            found = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (a handle is no dict)
            found = {name: (DTYPES.get(s.get_dtype()), tuple(s.get_shape())) for name, s in found.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file ({error}); make it again") from error
    header = read_header(file, metadata)
    if header.part != part:
        raise CheckpointError(f"{file} holds a quantised {header.part}, where a {part} is expected")
    expected = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]()
    for name, info in header.layers.items():
        wanted = shapes.get(f"{name}.weight")
        if wanted is None or tuple(wanted) != info.shape:
            had = f"has {tuple(wanted)} there" if wanted else "has no such layer"
            raise CheckpointError(f"{file} is of another model: its {name} is {info.shape}, and this one {had}")
        expected |= {f"{name}.{field}": spec for field, spec in info.tensors().items()}
    plain = {name: shape for name, shape in shapes.items() if name.removesuffix(".weight") not in header.layers}
    expected |= {name: (tuple(shape), FLOATS) for name, shape in plain.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of this model" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name][0]} {found[name][1]}, expected {' or '.join(map(str, dtypes))} {shape}"
        for name, (shape, dtypes) in expected.items()
        if name in found and (found[name][0] not in dtypes or found[name][1] != shape)
    ]
    if problems:
        more = f" (and {len(problems) - 1} more such tensors)" if len(problems) > 1 else ""
        raise CheckpointError(f"{file}: {problems[0]}{more}; the file is damaged or of another model")
    return Checkpoint(file, header, list(found))


def read_header(file: Path, metadata: Mapping[str, str]) -> Header:
    """The header in a file's metadata, checked by itself. Raises CheckpointError."""
    if KEY not in metadata:
        raise CheckpointError(f"{file} is no quantised checkpoint: its metadata has no {KEY}")
    try:
        values = json.loads(metadata[KEY])
        if values["version"] != VERSION:
            raise CheckpointError(
                f"{file} is a quantised checkpoint of version {values['version']}, supported is {VERSION}; make it again"
            )
        layers = {}
        for name, info in values.pop("layers").items():
            layers[name] = LayerInfo(**info | {"shape": tuple(info["shape"])})
            _check_info(layers[name])
        header = Header(layers=layers, **values)
        if header.part not in ("dit", "text_encoder") or header.precision not in PRECISIONS:
            raise ValueError(f"part {header.part!r}, precision {header.precision!r}")
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{file} has a damaged header ({type(error).__name__}: {error}); make it again"
        ) from error
    return header


def _check_info(info: LayerInfo) -> None:
    """Raise ValueError for what no layer can be."""
    if info.format not in WEIGHTS or info.activations not in ACTIVATIONS:
        raise ValueError(f"format {info.format!r}, activations {info.activations!r}")
    group = {"int8": 0, "fp8": 0, "nvfp4": NVFP4_GROUP}.get(info.format, info.group)
    step = max(64, group)
    if info.group != group or (info.format == "int4" and (group <= 0 or group % 64)):
        raise ValueError(f"{info.format} in groups of {info.group}")
    N, K = info.shape
    if N < 1 or K < 1 or info.padded != -(-K // step) * step or info.rank < 0 or type(info.smooth) is not bool:
        raise ValueError(f"shape {info.shape}, padded {info.padded}, rank {info.rank}, smooth {info.smooth}")


def _field(name: str, layers: Mapping[str, LayerInfo]) -> str | None:
    """Which part of a quantised layer a tensor is, if any."""
    layer, _, field = name.rpartition(".")
    return field if layer in layers and field in layers[layer].tensors() else None


def _finite(tensor: Tensor, what: str) -> Tensor:
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise CheckpointError(f"{what} holds NaN or infinite values")
    return tensor
