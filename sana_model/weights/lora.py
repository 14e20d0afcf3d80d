"""LoRA (arXiv 2106.09685) on a loaded DiT of any precision: nothing is quantised again, and taking it off leaves no trace.

    y = layer(x) + Σ strength · alpha / r · (x · downᵀ) · upᵀ

Beside a layer of the blocks runs a branch of 16-bit factors, which is the one that SVDQuant's branch runs in already: the
factors of all LoRAs are appended to its own, and the rank grows. The few layers outside of the blocks run once per picture
or step; they get a new weight W + strength · up · down. Whatever was there before is kept untouched, and is put back.

Files are safetensors, with keys as PEFT writes them (`transformer.transformer_blocks.0.attn1.to_q.lora_A.weight`),
or kohya's trainers (`lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight`, with `.alpha`). Layers may have diffusers'
names or those of the original repository.
"""

import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sana_kernels.gemm import unpack
from sana_model.config import DIALECTS, DiTConfig
from sana_model.dit import DiT
from sana_model.errors import UserError
from sana_model.quantize.layers import LowRank, QuantizedLinear
from sana_model.weights import keys
from sana_model.weights.checkpoint import open_safetensors

_DOWN, _UP = ("lora_A", "lora_down", "lora.down"), ("lora_B", "lora_up", "lora.up")
_KEY = re.compile(
    rf"(?P<layer>.+?)\.(?:(?P<down>{'|'.join(map(re.escape, _DOWN))})|(?P<up>{'|'.join(map(re.escape, _UP))}))"
    r"(?:\.default)?\.weight|(?P<scaled>.+)\.alpha"
)
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "unet.", "lora_unet_", "lora_transformer_")


@dataclass(frozen=True)
class Target:
    """A layer of a file: some of the rows of one of ours."""

    layer: str
    first: int
    rows: int
    inputs: int


@dataclass(frozen=True)
class Lora:
    """What a file holds: (target, down (r, K), up (rows, r)) in fp32, alpha / r included, at strength 1."""

    name: str
    file: Path
    factors: tuple[tuple[Target, Tensor, Tensor], ...]


def parse(text: str) -> tuple[Path, float]:
    """FILE or FILE:strength, as on the command line."""
    file, colon, strength = text.rpartition(":")
    try:
        return (Path(file), _finite(float(strength))) if colon and file else (Path(text), 1.0)
    except ValueError as error:
        if file.endswith(".safetensors"):
            raise UserError(f"{text}: the strength of a LoRA must be a number, not {strength!r}") from error
        return Path(text), 1.0  # a colon in the name of the file


def names_of(files: Sequence[Path]) -> list[str]:
    """A name for each file, none of them twice: its own; its folder's where several files are called the same, as diffusers
    and PEFT call theirs; and with -2, -3, ... where that is taken, too. Raises UserError for a file that is given twice."""
    twice = [file for i, file in enumerate(files) if file.resolve() in {other.resolve() for other in files[:i]}]
    if twice:
        raise UserError(f"{twice[0]} is given twice; a LoRA is added once, and FILE:STRENGTH makes it stronger")
    stems, names = Counter(file.stem for file in files), []
    for file in files:
        own = file.stem if stems[file.stem] == 1 else file.absolute().parent.name or file.stem
        numbered = (f"{own}-{i}" for i in itertools.count(2))
        names.append(next(name for name in itertools.chain([own], numbered) if name not in names))
    return names


def read(file: Path, config: DiTConfig, name: str | None = None) -> Lora:
    """The LoRA in a file, for a DiT of this configuration. Raises UserError naming the first key that does not fit it."""
    if file.suffix != ".safetensors":
        raise UserError(
            f"{file}: LoRA files are safetensors; convert it, for unpickling could run code of its author's"
        )
    checkpoint = open_safetensors([file])
    targets, found = _targets(config), defaultdict(dict)
    for key, shape in checkpoint.shapes.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(f"{file}: {key} is no LoRA factor; known are {', '.join((*_DOWN, *_UP))} and alpha")
        theirs = match["layer"] or match["scaled"]
        target = targets.get(_mangled(theirs))
        if target is None:
            raise UserError(f"{file}: {key} belongs to no linear layer of this DiT, and LoRA is for those only")
        kind = "down" if match["down"] else "up" if match["up"] else "alpha"
        if kind != "alpha" and (len(shape) < 2 or math.prod(shape[2:]) != 1):
            raise UserError(f"{file}: {key} has shape {shape}; a factor is a matrix, or a 1×1 convolution")
        if kind == "alpha" and math.prod(shape) != 1:
            raise UserError(f"{file}: {key} has shape {shape}; it is one number")
        found[target][kind] = key
    scales, factors = _metadata_scales(file), []
    for target, names in found.items():
        for kind in ("down", "up"):
            if kind not in names:
                raise UserError(f"{file}: the {kind} factor that belongs to {next(iter(names.values()))} is missing")
        down, up = (checkpoint.read(names[kind]).float().flatten(1) for kind in ("down", "up"))
        rank = len(down)
        if rank == 0 or down.shape != (rank, target.inputs) or up.shape != (target.rows, rank):
            raise UserError(
                f"{file}: {names['down']} {tuple(down.shape)} and {names['up']} {tuple(up.shape)} do not fit the layer's"
                f" {target.rows} × {target.inputs}; it was trained for another model"
            )
        alpha = checkpoint.read(names["alpha"]).item() if "alpha" in names else scales(names["down"], rank)
        if not (down.isfinite().all() and up.isfinite().all() and math.isfinite(alpha)):
            raise UserError(f"{file}: {names['down']} or what belongs to it holds NaN or infinite values")
        factors.append((target, down, up * (alpha / rank)))
    return Lora(name or file.stem, file, tuple(factors))


class Loras:
    """The LoRAs of one DiT, by name. `backend` computes its 16-bit matrix products."""

    def __init__(self, dit: DiT, backend: str):
        self.dit, self.backend = dit, backend
        self.strengths: dict[str, float] = {}
        self._loras: dict[str, Lora] = {}
        self._before: dict[str, object] = {}  # by layer: the branch of one in a block, the weight of another

    def add(self, lora: Lora, strength: float = 1.0) -> None:
        """Put one on. UserError where its name is taken."""
        if lora.name in self._loras:
            raise UserError(f"a LoRA called {lora.name} is there already; give this one another name")
        self._loras[lora.name], self.strengths[lora.name] = lora, _finite(strength)
        self._rebuild(lora)

    def set_strength(self, name: str, strength: float) -> None:
        """Change the strength of one; 0 is none, and 1 as it was trained."""
        self.strengths[self._known(name)] = _finite(strength)
        self._rebuild(self._loras[name])

    def remove(self, name: str) -> None:
        """Take one off. Without any, the DiT is what it was, to the bit."""
        lora = self._loras.pop(self._known(name))
        del self.strengths[name]
        self._rebuild(lora)

    def described(self) -> tuple[str, ...]:
        """FILE:strength of each, which `parse` reads."""
        return tuple(f"{lora.file}:{self.strengths[name]:.9g}" for name, lora in self._loras.items())

    def _known(self, name: str) -> str:
        if name not in self._loras:
            there = f"there are {', '.join(self._loras)}" if self._loras else "there is none"
            raise UserError(f"no LoRA is called {name}; {there}")
        return name

    @torch.no_grad()
    def _rebuild(self, changed: Lora) -> None:
        """Make the layers that `changed` concerns anew, from what was there before any LoRA."""
        for name in dict.fromkeys(target.layer for target, *_ in changed.factors):
            layer = self.dit.get_submodule(name)
            factors = [
                (target, down, up * self.strengths[lora.name])
                for lora in self._loras.values()
                for target, down, up in lora.factors
                if target.layer == name
            ]
            build, attribute = (_branch, "branch") if name.startswith("blocks.") else (_merged, "weight")
            like = self.dit.patch_embed.weight
            before = self._before.get(name, getattr(layer, attribute, None))
            before = self._before[name] = _moved(before, like.device)
            if factors:
                setattr(layer, attribute, build(layer, before, factors, like, self.backend))
            else:
                setattr(layer, attribute, self._before.pop(name))


def _moved(before: LowRank | nn.Parameter | None, device: torch.device) -> LowRank | nn.Parameter | None:
    """What was there before, where the DiT is: of which it is no part meanwhile, and which may have been moved since."""
    if isinstance(before, nn.Parameter):
        return nn.Parameter(before.detach().to(device), before.requires_grad)
    return None if before is None else before.to(device)


def _branch(layer: nn.Module, before: LowRank | None, factors: list, like: Tensor, backend: str) -> LowRank:
    """`before`'s factors and these, one below the other, in the form that the layer's kernels read; in dtype and on the
    device of `like`."""
    dtype = like.dtype
    downs, ups = [], []
    if before is not None:
        rows = [t if t.ndim == 2 else unpack(t, backend) for t in (before.down, before.up)]
        dtype = rows[0].dtype
        downs, ups = [rows[0]], [rows[1]]
    for target, down, up in factors:
        whole = up.new_zeros(layer.out_features, up.shape[1])
        whole[target.first : target.first + target.rows] = up
        downs.append(down.to(like.device, dtype))
        ups.append(whole.to(like.device, dtype))
    branch = LowRank(torch.cat(downs), torch.cat(ups, dim=1))
    return branch if isinstance(layer, QuantizedLinear) else branch.packed(backend)


def _merged(layer: nn.Linear, before: nn.Parameter, factors: list, like: Tensor, backend: str) -> nn.Parameter:
    """W + up · down, summed in fp32."""
    weight = before.detach().float().clone()
    for target, down, up in factors:
        weight[target.first : target.first + target.rows] += (up @ down).to(weight.device)
    return nn.Parameter(weight.to(before.dtype), requires_grad=False)


# ------------------------------------------------------------------------------------------------ names


def _targets(config: DiTConfig) -> dict[str, Target]:
    """Every linear layer of the DiT by its mangled name, in both dialects."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in DiT(config).state_dict().items()}
    found = {}
    for rule in keys.rules(config):
        shape = shapes[rule.ours]
        if not rule.ours.endswith(".weight") or len(shape) != 2:  # the depthwise convolutions have four dimensions
            continue
        for dialect in DIALECTS:
            names = rule.theirs(dialect)
            rows = shape[0] // len(names)
            for i, name in enumerate(names):
                target = Target(rule.ours.removesuffix(".weight"), i * rows, rows, shape[1])
                found[_mangled(name.removesuffix(".weight"))] = target
    return found


def _mangled(name: str) -> str:
    """Without prefix, and with underscores for dots, as kohya's names have them in any case."""
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name.replace(".", "_")


def _metadata_scales(file: Path):
    """(key, rank) → alpha, from what diffusers writes into the file, or PEFT beside it; the rank where nobody says."""
    try:
        with safe_open(file, framework="pt") as handle:
            text = (handle.metadata() or {}).get("lora_adapter_metadata", "{}")
        config = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
        beside = file.with_name("adapter_config.json")
        if not config and file.name == "adapter_model.safetensors" and beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
        patterns = {re.compile(rf"(.*\.)?{p}"): float(a) for p, a in (config.get("alpha_pattern") or {}).items()}
        alpha = None if config.get("lora_alpha") is None else float(config["lora_alpha"])
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise UserError(f"{file}: the LoRA's metadata cannot be read ({error})") from error

    def scale(key: str, rank: int) -> float:
        layer = _KEY.fullmatch(key)["layer"]
        value = next((a for pattern, a in patterns.items() if pattern.fullmatch(layer)), alpha)
        if value is None:
            return float(rank)
        return value * math.sqrt(rank) if config.get("use_rslora") else value

    return scale


def _finite(strength: float) -> float:
    if not math.isfinite(strength):
        raise UserError(f"the strength of a LoRA must be a number, not {strength}")
    return strength
