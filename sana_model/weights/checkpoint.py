"""Checkpoint files as named tensors on disk: shapes first, values one at a time.

Shapes are checked against the network before any value is read, so a wrong checkpoint costs no time and leaves
nothing half loaded. safetensors files are memory-mapped: a tensor that needs no cast is used where it lies, if it lies
well. Every failure is one UserError with the file and the key in it.
"""

import itertools
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sana_model.errors import UserError
from sana_model.weights.keys import Rule, join, split

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SUPPORTED = "float32, float16 and bfloat16"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors on disk by name."""

    where: str  # the file, or the folder of shards, for messages
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def stored(where: str, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> Checkpoint:
    """A Checkpoint, after a look at its largest tensor."""
    if not shapes:
        raise UserError(f"{where} holds no tensors")
    dtype = read(max(shapes, key=lambda name: torch.Size(shapes[name]).numel())).dtype
    if dtype not in FLOATS:
        raise UserError(f"{where} is stored in {dtype}; supported are {_SUPPORTED}")
    return Checkpoint(where, shapes, read)


_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<before>\w+))?(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?"
    r"(?:\.(?P<after>\w+))?\.safetensors"
)
_PREFERRED = {
    torch.float32: (None, "fp32", "bf16", "fp16"),
    torch.bfloat16: ("bf16", None, "fp32", "fp16"),
    torch.float16: ("fp16", None, "fp32", "bf16"),
    None: (None, "bf16", "fp16"),
}


def choose_weights(names: Iterable[str], dtype: torch.dtype | None, where: str) -> list[str]:
    """Of the files of one part, its weights: the variant (`*.fp16.safetensors`) that suits `dtype` best.

    A checkpoint is one file, or shards numbered -00001-of-0000N. Raises UserError if there is none or a shard is
    missing.
    """
    variants: dict[str | None, dict[str, re.Match]] = {}
    for name in sorted(names):
        if match := _WEIGHTS.fullmatch(name):
            variants.setdefault(match["before"] or match["after"], {})[name] = match
    if not variants:
        raise UserError(f"{where} holds no weights: no diffusion_pytorch_model*.safetensors or model*.safetensors")
    variant = next((v for v in _PREFERRED[dtype] if v in variants), next(iter(variants)))
    files = variants[variant]
    whole = [name for name, match in files.items() if match["number"] is None]
    if whole:
        return whole[:1]
    count = next(iter(files.values()))["count"]
    missing = set(range(1, int(count) + 1)) - {int(match["number"]) for match in files.values()}
    if missing:
        raise UserError(f"{where}: shard {min(missing)} of {int(count)} is missing; the download is incomplete")
    return list(files)


def variant_of(names: Iterable[str], dtype: torch.dtype | None, where: str) -> str | None:
    """The variant that `choose_weights` takes: "fp16" of `model.fp16.safetensors`, None of `model.safetensors`."""
    match = _WEIGHTS.fullmatch(choose_weights(names, dtype, where)[0])
    return match["before"] or match["after"]


def open_safetensors(files: list[Path]) -> Checkpoint:
    """One file, or the shards of one checkpoint."""
    source: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (a handle is no dict)
                    source[name], shapes[name] = file, tuple(handle.get_slice(name).get_shape())
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or no safetensors file ({error}); download it again") from error
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    where = str(files[0] if len(files) == 1 else files[0].parent)

    def read(name: str) -> Tensor:
        # Opened for each tensor: the pages of one that is cast or packed leave memory with it.
        with safe_open(source[name], framework="pt") as handle:
            return handle.get_tensor(name)

    return stored(where, shapes, read)


def open_pth(file: Path) -> Checkpoint:
    """The original `.pth`: a pickle of {"state_dict": {name: tensor}}, of which only tensors are ever unpickled."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is damaged, or holds more than tensors; unpickling it could run code of its author's, so it is "
            "not opened. Ask for a safetensors file"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged or no PyTorch checkpoint ({error}); download it again") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} is no checkpoint: a dictionary of tensors, or one under 'state_dict', is expected")
    return stored(str(file), {name: tuple(tensor.shape) for name, tensor in state.items()}, state.__getitem__)


def same_names(module: nn.Module, prefix: str = "") -> list[Rule]:
    """The rules of a network whose names are those of the file, but for a prefix."""
    return [Rule(name, (prefix + name,), prefix + name) for name in module.state_dict()]


def check(
    checkpoint: Checkpoint, module: nn.Module, rules: list[Rule], dialect: str, dropped: Iterable[str] = ()
) -> None:
    """Every tensor of `module` (on the meta device) is there, has the right shape, and nothing else is."""
    state = module.state_dict()
    expected = {name: tuple(t.shape) for rule in rules for name, t in split(state[rule.ours], rule, dialect).items()}
    found = {name: shape for name, shape in checkpoint.shapes.items() if name not in dropped}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of this model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more such keys)" if len(problems) > 1 else ""
        raise UserError(f"{checkpoint.where}: {problems[0]}{more}; the file does not belong to this configuration")


Prepare = Callable[[nn.Module], None]
"""Changes a block of a network, in place, as soon as it has its values."""


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    rules: list[Rule],
    dialect: str,
    dtype: torch.dtype | None,
    prepare: Prepare | None = None,
) -> nn.Module:
    """Give `module` (on the meta device) the values of a checked checkpoint, cast one tensor at a time to `dtype`.

    None leaves each as it is stored; parts of a fused matrix that differ in that become the dtype that holds all of them.
    It is done block by block, each of which is then given to `prepare`: where that packs weights, no more than one block
    is ever held twice.
    """

    counters = {name for name, tensor in module.state_dict().items() if not tensor.is_floating_point()}  # of batches

    def cast(name: str, ours: str) -> Tensor:
        tensor = checkpoint.read(name)
        if dtype is None and tensor.dtype not in FLOATS and ours not in counters:
            raise UserError(f"{checkpoint.where}: {name} is stored in {tensor.dtype}; supported are {_SUPPORTED}")
        return tensor if dtype is None else tensor.to(dtype)

    def read(rule: Rule) -> Tensor:
        names = rule.theirs(dialect)
        try:
            parts = [cast(name, rule.ours) for name in names]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"{checkpoint.where}: cannot read {' and '.join(names)} ({error})") from error
        return aligned(join(parts, rule))

    for block, members in itertools.groupby(rules, key=lambda rule: block_of(rule.ours)):
        module.load_state_dict({rule.ours: read(rule) for rule in members}, strict=False, assign=True)
        module.requires_grad_(False)
        if block and prepare is not None:
            prepare(module.get_submodule(block))
    return module.eval()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, in fp32 copied to a multiple of 64 bytes: MKL's sums depend on where it reads, and in a file a tensor
    lies anywhere. So a picture depends on the values alone."""
    return tensor.clone() if tensor.dtype == torch.float32 and tensor.data_ptr() % 64 else tensor


def block_of(name: str) -> str:
    """The block of the DiT, or layer of the text encoder, that a parameter is in; "" for those outside."""
    match = re.match(r"(?:blocks|layers)\.\d+(?=\.)", name)
    return match[0] if match else ""
