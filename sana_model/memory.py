"""Will it fit? What a model and a picture need, and a refusal, before anything is allocated, that names what would fit.

Weights are counted exactly, on networks without storage; on CPUs as the `cpu` backend has them, but the decoder's in W8A8
as in 16 bits where they are not transformed. Activations are the few large tensors that are alive at once, in units that
scale with the picture; the factors were measured (peak resident memory, fp32 and bf16, 256 to 2048 px), and
tests/test_memory.py measures again.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path

import psutil
import torch

from sana_kernels.backend import backend_status
from sana_kernels.conv2d import WINOGRAD_CHANNELS, ConvWeight, packed_shape, winograd_integers
from sana_model import heap
from sana_model.autoencoder.bands import BAND_BYTES, rows_of_a_band
from sana_model.autoencoder.blocks import ResBlock
from sana_model.autoencoder.dc_ae import Autoencoder
from sana_model.bins import nearest_bin
from sana_model.config import BUILT_IN, ModelConfig
from sana_model.dit import DiT
from sana_model.errors import MissingError
from sana_model.quantize.layers import KEPT
from sana_model.settings import DTYPES, PRECISIONS, Settings, is_guided
from sana_model.text_encoder import TextEncoder

Precisions = dict[str, str]
"""By part, "dit", "text_encoder", "autoencoder": what it is executed in, as `Plan.executed` and `precisions_for` say."""

BYTES = {"w8a8": 1.01, "fp8": 1.01, "w4a8": 1.07, "w4a4": 1.07, "w4a16": 0.57, "exact": 5.1}
"""Per weight of a quantised layer, with its scales: 4-bit weights that are multiplied as int8, or as they are (w4a16), or
are kept beside their fp32 values (exact). A low-rank branch of 32 adds up to 6 % of bf16 weights."""

GB = 1e9
SMALL = 256 * 2**20  # whatever does not grow with the picture: workspaces, tables, the allocator's slack
DIT_UNITS = 20  # × rows · N · C values: in a block 13 to 15 are alive (2F = 5C, twice, and fp32 copies), plus workspace
DECODER_UNITS = 8  # × width · height · outermost channels (128) values: 4 are alive in the last stage, plus workspace
ATTENTION_UNITS = 16  # × tokens · C values of the decoder's largest stage of attention, which stays whole
BANDS_UNITS = 4  # × a band, for every ResBlock and upsampling that runs in bands: those that are in flight
DECODER_CPU_BYTES = 22  # × the same, whatever the dtype: the CPU's convolutions keep a wide copy of what they reorder
TILE = 512  # pixels, `Autoencoder.tiled_decode`


def estimate(
    config: ModelConfig,
    settings: Settings,
    precisions: Precisions,
    device: torch.device | str = "cpu",
    in_bands: bool = False,
) -> dict[str, int]:
    """Bytes by part: the weights "dit", "text_encoder" and "autoencoder", and the passing peaks "denoise" (with the
    keys and values of the text) and "decode", of which only one is there at a time. Encoding needs less than either.
    `in_bands`: the decoder runs band by band, as `Plan.in_bands` says.
    """
    dit = config.dit
    width, height, rows = *_canvas(config, settings), _rows(config, settings)
    scale = config.autoencoder.spatial_compression
    tokens, size = width * height // scale**2, _size(precisions["dit"])

    blocks = DIT_UNITS * rows * tokens * dit.hidden * size
    keys_values = 2 * dit.layers * rows * config.max_text_tokens * dit.hidden * size
    return weights(config, precisions, device) | {
        "denoise": blocks + keys_values + SMALL,
        "decode": _decode(
            config, settings, width, height, PRECISIONS[precisions["autoencoder"]], torch.device(device), in_bands
        ),
    }


def weights(config: ModelConfig, precisions: Precisions, device: torch.device | str | None = None) -> dict[str, int]:
    """Bytes of the weights by part, as loaded; on a CPU as its kernels then have them."""
    quantized = _in_blocks(config)

    def of(part: str, count: int) -> int:
        precision = precisions[part]
        if precision in DTYPES:
            return count * _size(precision)
        return round(quantized[part] * BYTES[precision]) + (count - quantized[part]) * _size(precision)

    found = {part: of(part, count) for part, count in parameters(config).items()}
    if device is not None and torch.device(device).type == "cpu" and backend_status("cpu") is None:
        found["autoencoder"] += _grown_by_transforms(config, precisions["autoencoder"])
    return found


@lru_cache(maxsize=32)
def parameters(config: ModelConfig) -> dict[str, int]:
    """How many parameters each part has."""
    with torch.device("meta"):
        parts = DiT(config.dit), TextEncoder(config.text), Autoencoder(config.autoencoder)
    counts = (sum(p.numel() for p in part.parameters()) for part in parts)
    return dict(zip(("dit", "text_encoder", "autoencoder"), counts, strict=True))


@lru_cache(maxsize=32)
def _in_blocks(config: ModelConfig) -> dict[str, int]:
    """How many of them are weights that quantisation is for: of the linear layers in the blocks."""
    with torch.device("meta"):
        blocks = {"dit": DiT(config.dit).blocks, "text_encoder": TextEncoder(config.text).layers, "autoencoder": ()}
    return {
        part: sum(
            layer.weight.numel()
            for block in modules
            for name, layer in block.named_modules()
            if isinstance(layer, torch.nn.Linear) and name.rpartition(".")[2] not in KEPT
        )
        for part, modules in blocks.items()
    }


def _grown_by_transforms(config: ModelConfig, precision: str) -> int:
    """Bytes by which the autoencoder's 3 × 3 kernels of 16 bits grow on CPUs, to 6 × 6 of int16 or int8; without scales."""
    if precision not in ("bf16", "w8a8"):
        return 0
    grown, eight_bit = 0, {"encoder": False, "decoder": precision == "w8a8"}
    for half, kernels in _transformed_kernels(config).items():
        integers = winograd_integers(eight_bit[half])
        for N, C in kernels if integers is not None else ():
            kernel = ConvWeight(torch.empty(0, dtype=integers), torch.empty(0, 0, 0), (N, C, 6, 6))
            grown += prod(packed_shape(kernel, 1)) * integers.itemsize - 9 * N * C * torch.bfloat16.itemsize
    return grown


@lru_cache(maxsize=32)
def _transformed_kernels(config: ModelConfig) -> dict[str, list[tuple[int, int]]]:
    """Channels, out and in, of the kernels of the encoder and the decoder that are wide enough to be transformed."""
    with torch.device("meta"):
        halves = Autoencoder(config.autoencoder).named_children()
    return {
        half: [
            tuple(conv.weight.shape[:2])
            for block in network.modules()
            if isinstance(block, ResBlock)
            for conv in (block.conv1, block.conv2)
            if min(conv.weight.shape[:2]) >= WINOGRAD_CHANNELS
        ]
        for half, network in halves
    }


def _size(precision: str) -> int:
    """Bytes of what is not quantised."""
    return PRECISIONS.get(precision, torch.bfloat16).itemsize


def check_load(
    config: ModelConfig, precisions: Precisions, device: torch.device | str, low_memory: bool = False
) -> None:
    """Raise MissingError unless the weights fit into the memory of `device`, and of the CPU, which reads them first."""
    device, parts = torch.device(device), weights(config, precisions, device)
    for place in dict.fromkeys((torch.device("cpu"), device)):
        needed = sum(parts.values())
        if low_memory and place.type == "cuda":
            needed = parts["autoencoder"] + max(parts["text_encoder"], parts["dit"])
        room = _room(place, needed)
        if needed > room:
            fits = list(_lighter_loads(config, precisions, place, room))
            raise MissingError(
                f"the weights of {config.name} need {_gb(needed)} of {_name(place)} and {_gb(room)} are free; "
                + _advice(fits)
            )


def check_part(config: ModelConfig, part: str, precision: str, device: torch.device | str = "cpu") -> None:
    """`check_load` of one part in what it is executed in, for commands that load the parts one after the other."""
    device = torch.device(device)
    needed = weights(config, dict.fromkeys(("dit", "text_encoder", "autoencoder"), "bf16") | {part: precision}, device)
    for place in dict.fromkeys((torch.device("cpu"), device)):
        room = _room(place, needed[part])
        if needed[part] > room:
            raise MissingError(
                f"the {_called(part)} of {config.name} needs {_gb(needed[part])} of {_name(place)} and {_gb(room)} are"
                " free: free some memory"
            )


def check_run(
    config: ModelConfig,
    settings: Settings,
    precisions: Precisions,
    device: torch.device | str,
    *,
    loaded: bool = True,
    low_memory: bool = False,
    in_bands: bool = False,
) -> None:
    """Raise MissingError unless painting fits into what `device` has left, beside the weights, `loaded` or yet to be.

    `low_memory` has let the text encoder go by then; `in_bands` as `estimate`.
    """
    device = torch.device(device)
    needed, own = _peak(config, settings, precisions, device, in_bands), 0
    if not loaded:
        parts = weights(config, precisions, device)
        own = parts["dit"] + parts["autoencoder"] + (0 if low_memory else parts["text_encoder"])
    room = _room(device, needed + own) - own
    if needed > room:
        fits = list(_lighter_runs(config, settings, precisions, device, room, low_memory, in_bands))
        pictures = f"{settings.count} pictures" if settings.count > 1 else "a picture"
        raise MissingError(
            f"{pictures} of {settings.width}x{settings.height} need {_gb(needed)} of {_name(device)} beside the weights"
            f" and {_gb(max(room, 0))} are free; {_advice(fits)}"
        )


def available(device: torch.device) -> int:
    """Bytes that can still be allocated on a device: of a CPU, what the system and every enclosing cgroup leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([psutil.virtual_memory().available, *cgroup_rooms()])


def _room(device: torch.device, needed: int) -> int:
    """Bytes available; where that is too little, what the C library keeps is given back first."""
    if device.type == "cpu" and available(device) < needed:
        heap.give_back()
    return available(device)


def cgroup_rooms(root: Path = Path("/")) -> Iterator[int]:
    """Bytes left under each memory limit of this process's control groups, of version 2 or 1.

    A limit may sit on any ancestor, and inside a container the group's own path may not exist: all are tried. Unused
    file cache counts as free, for the kernel gives it up first.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        v2 = controllers == ""
        mount = root / "sys/fs/cgroup" / ("" if v2 else "memory")
        limit, usage = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if most != "max":
                yield max(0, int(most) - used + int(stat.get("inactive_file" if v2 else "total_inactive_file", 0)))


def _peak(config: ModelConfig, settings: Settings, precisions: Precisions, device: torch.device, in_bands: bool) -> int:
    """The larger of denoising and decoding; encoding is over when this is asked."""
    parts = estimate(config, settings, precisions, device, in_bands)
    return max(parts["denoise"], parts["decode"])


def _canvas(config: ModelConfig, settings: Settings) -> tuple[int, int]:
    """(width, height) that is painted."""
    if settings.binning:
        return nearest_bin(settings.height, settings.width, config.size)[::-1]
    return settings.width, settings.height


def _rows(config: ModelConfig, settings: Settings) -> int:
    """How many images the DiT sees at once: guidance adds an unguided and PAG a perturbed copy of each."""
    return settings.count * (1 + is_guided(settings.guidance, config.dit) + (settings.pag_scale > 0))


def _decode(
    config: ModelConfig,
    settings: Settings,
    width: int,
    height: int,
    dtype: torch.dtype,
    device: torch.device,
    in_bands: bool,
) -> int:
    """Pictures are decoded one by one; all are kept, as 8-bit RGB, until the end."""
    finished = 3 * width * height * (2 * 4 + settings.count)  # this picture in fp32, twice, and all of them in 8 bits
    at_once = (min(width, TILE), min(height, TILE)) if settings.tiled else (width, height)
    return finished + decoder_bytes(config, *at_once, dtype, device, in_bands)


def decoder_bytes(
    config: ModelConfig, width: int, height: int, dtype: torch.dtype, device: torch.device, in_bands: bool = False
) -> int:
    """What a decode of one image takes beside the weights, ours whole or `in_bands`, or one of code that others wrote."""
    ae = config.autoencoder
    per_value = DECODER_UNITS * dtype.itemsize if device.type == "cuda" else DECODER_CPU_BYTES
    whole = per_value * width * height * ae.widths[0] + SMALL
    if not in_bands:
        return whole
    attention = [i for i, kind in enumerate(ae.decoder_block_types) if kind == "EfficientViTBlock"]
    inner = max((width * height * ae.widths[i] >> 2 * i for i in attention), default=0)
    image = 3 * width * height
    row = width * ae.widths[0] * dtype.itemsize
    outer = range(min(attention, default=len(ae.decoder_layers)))
    blocks = sum(ae.decoder_layers[i] + 1 for i in outer if ae.decoder_layers[i])
    bands = BANDS_UNITS * blocks * max(BAND_BYTES, row * rows_of_a_band(row))
    return min(whole, (ATTENTION_UNITS * inner + 2 * image) * dtype.itemsize + bands + SMALL)


def _lighter_loads(config: ModelConfig, precisions: Precisions, place: torch.device, room: int) -> Iterator[str]:
    """What to ask for instead so that the weights fit, least sacrifice first."""
    half = dict.fromkeys(precisions, "bf16")
    now, lighter = (sum(weights(config, chosen, place).values()) for chosen in (precisions, half))
    if lighter < now and lighter <= room:
        yield f"--precision bf16 ({_gb(lighter)})"
    eight_bit = sum(weights(config, half | {"dit": "w8a8", "text_encoder": "w8a8"}, place).values())
    if lighter > room >= eight_bit and eight_bit < now:
        yield f"--precision w8a8 --text-precision w8a8 ({_gb(eight_bit)})"
    if place.type == "cuda" and now <= available(torch.device("cpu")):
        yield "--device cpu"
    family = {name: other for name, other in BUILT_IN.items() if other.scheduler.kind == config.scheduler.kind}
    sizes = {name: sum(weights(other, half, place).values()) for name, other in family.items()}
    fitting = [name for name, size in sizes.items() if size < lighter and size <= room]
    if fitting:
        largest = max(fitting, key=sizes.get)
        yield f"a smaller model, such as {largest} in bf16 ({_gb(sizes[largest])})"


def _lighter_runs(
    config: ModelConfig,
    settings: Settings,
    precisions: Precisions,
    device: torch.device,
    room: int,
    low_memory: bool,
    in_bands: bool,
) -> Iterator[str]:
    """What to ask for instead so that the picture fits, least sacrifice first; each by itself is enough."""

    def fits(asked: Settings, with_precisions: Precisions = precisions, freed: int = 0) -> int | None:
        needed = _peak(config, asked, with_precisions, device, in_bands)
        return needed if needed <= room + freed else None

    held = weights(config, precisions, device)
    if settings.num_images > 1 and (needed := fits(replace(settings, num_images=1))):
        yield f"--num-images 1 ({_gb(needed)})"
    in_tiles = replace(settings, tiled=True)  # as low memory does, where it is not in bands
    if not low_memory and (needed := fits(settings if in_bands else in_tiles, freed=held["text_encoder"])):
        yield f"--low-memory ({_gb(needed)}, and the text encoder's {_gb(held['text_encoder'])} are freed)"
    if in_bands and not settings.tiled and (needed := fits(in_tiles)):
        yield f"--tiled ({_gb(needed)}; not the same pixels)"
    if "fp32" in precisions.values():
        half = dict.fromkeys(precisions, "bf16")
        if needed := fits(settings, half, sum(held.values()) - sum(weights(config, half, device).values())):
            yield f"--precision bf16 ({_gb(needed)})"
    if not settings.binning:  # a bin's area does not depend on the size asked for
        step, ratio = config.autoencoder.spatial_compression, settings.height / settings.width
        for width in range(settings.width - step, 0, -step):
            smaller = replace(settings, width=width, height=max(step, round(width * ratio / step) * step))
            if needed := fits(smaller):
                yield f"--size {smaller.width}x{smaller.height} ({_gb(needed)})"
                return


def _advice(fits: list[str]) -> str:
    return f"what would fit: {', or '.join(fits)}" if fits else "nothing smaller would fit either: free some memory"


def _called(part: str) -> str:
    return "DiT" if part == "dit" else part.replace("_", " ")


def _name(device: torch.device) -> str:
    return "GPU memory" if device.type == "cuda" else "memory"


def _gb(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= 0.95 * GB else f"{count / 1e6:.0f} MB"
