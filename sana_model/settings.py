"""Everything that determines a picture, given a model; checked before anything is loaded or computed."""

import math
from dataclasses import asdict, dataclass
from typing import get_type_hints

import torch

from sana_model.bins import bins
from sana_model.config import DiTConfig, ModelConfig
from sana_model.errors import UserError
from sana_model.scheduler import MAX_STEPS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED = {"w8a8": torch.int8, "fp8": torch.float8_e4m3fn}  # what products run in, where not in bf16 as the rest
FOUR_BIT = ("w4a8", "w4a4", "w4a16")  # what weights are stored in; sana_model/plan.py says what they are executed in
OF_DECODERS = (*DTYPES, "w8a8")  # what an autoencoder can run in
PRECISIONS = DTYPES | dict.fromkeys((*QUANTIZED, *FOUR_BIT), torch.bfloat16)


@dataclass(frozen=True)
class Settings:
    """What a call of the pipeline can choose. Stored in every PNG."""

    prompt: str | tuple[str, ...]
    width: int
    height: int
    steps: int
    guidance: float
    negative_prompt: str = ""
    seed: int = 0  # image i of the batch is drawn from seed + i
    num_images: int = 1  # per prompt
    sampler: str = "flow_dpm"  # flow_dpm | flow_euler, or scm for Sprint models
    instruction: str = "default"  # default | none | a text of one's own
    pag_scale: float = 0.0  # perturbed-attention guidance; 0 is off
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # classifier-free guidance only where lo ≤ sigma ≤ hi
    binning: bool = False  # paint in the nearest trained aspect-ratio bin, then resize and crop
    tiled: bool = False  # decode in blended tiles: less memory, not the same pixels

    @property
    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)

    @property
    def count(self) -> int:
        """How many pictures this makes."""
        return len(self.prompts) * self.num_images

    def as_json(self) -> dict:
        return asdict(self)


_TYPES = get_type_hints(Settings)
_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def settings_for(
    config: ModelConfig, prompt: str | list[str] | tuple[str, ...], *, in_tiles: bool = False, **overrides
) -> Settings:
    """The defaults of a model with `overrides` (None: not given) applied. Raises UserError naming what is wrong.

    `in_tiles` is the default of `tiled`.
    """
    values = {
        "width": config.size, "height": config.size, "steps": config.steps, "guidance": config.guidance,
        "sampler": config.scheduler.kind, "instruction": config.instruction, "tiled": in_tiles, "prompt": prompt,
    }  # fmt: skip
    values |= {key: value for key, value in overrides.items() if value is not None}
    settings = Settings(**{name: setting(name, value) for name, value in values.items()})
    _check(settings, config)
    return settings


def setting(name: str, value: object) -> object:
    """A field of `Settings` that came from outside, in its type: what NumPy and PyTorch have of it becomes Python's.

    Raises UserError for a name that is none, and for any other type: True is no number here, and "7" is a text.
    """
    if name not in _TYPES:
        raise UserError(f"{name!r} is not a setting; the settings are {', '.join(_TYPES)}")
    kind = _TYPES[name]
    try:
        if name == "prompt":
            return _text(value) if isinstance(value, str) else tuple(map(_text, _sequence(value)))
        if name == "guidance_interval":
            lo, hi = map(_finite, _sequence(value))
            return lo, hi
        if kind is str:
            return _text(value)
        value = _plain(value)
        if kind is float:
            return _finite(value)
        if type(value) is not kind:
            raise TypeError
        return value
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not valid Unicode text") from error
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        wanted = {"prompt": "a text, or a list of texts", "guidance_interval": "two numbers"}.get(name)
        raise UserError(f"{name} is {wanted or _WANTED[kind]}, not {value!r}") from error


def _plain(value):
    """A number or an array of NumPy or PyTorch as Python's number or list; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _sequence(value) -> list | tuple:
    value = _plain(value)
    if not isinstance(value, list | tuple):
        raise TypeError
    return value


def _finite(value) -> float:
    value = _plain(value)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _text(value) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # not every string of Python's is Unicode: it may hold halves of characters
    return value


def precisions_for(precision: str, text: str | None = None, decoder: str | None = None) -> dict[str, str]:
    """The precision of every part. `precision` is the DiT's; the others default to bf16, or fp32 beside an fp32 DiT."""
    others = "fp32" if precision == "fp32" else "bf16"
    names = {"dit": precision, "text_encoder": text or others, "autoencoder": decoder or others}
    for part, name in names.items():
        known = OF_DECODERS if part == "autoencoder" else PRECISIONS
        if name not in known:
            raise UserError(
                f"precision {name!r} is not known for the {part.replace('_', ' ')}; choose one of {', '.join(known)}"
            )
    return names


def dtypes_of(precisions: dict[str, str]) -> dict[str, torch.dtype]:
    """The dtype of every part, as far as it is not quantised."""
    return {part: PRECISIONS[name] for part, name in precisions.items()}


def is_guided(guidance: float, dit: DiTConfig) -> bool:
    """Classifier-free guidance, which doubles the batch; Sprint takes the guidance scale as an input instead."""
    return guidance > 1 and not dit.guidance_embeds


def _check(settings: Settings, config: ModelConfig) -> None:
    step = config.autoencoder.spatial_compression
    if not settings.prompts:
        raise UserError("there is no prompt")
    for name in ("width", "height"):
        value = getattr(settings, name)
        if value <= 0:
            raise UserError(f"{name} {value} is not a positive multiple of {step}; the smallest is {step}")
        if value % step and not settings.binning:
            below, above = max(step, value // step * step), max(step, -(-value // step) * step)
            raise UserError(f"{name} {value} is not a positive multiple of {step}; the nearest are {below} and {above}")
    if settings.binning:
        bins(config.size)
    if not 1 <= settings.steps <= MAX_STEPS:
        raise UserError(f"steps must be at least 1 and at most {MAX_STEPS}, not {settings.steps}")
    if settings.num_images < 1:
        raise UserError(f"the number of images must be at least 1, not {settings.num_images}")
    if not 0 <= settings.seed < 2**63:
        raise UserError(f"the seed must lie in [0, 2^63), not {settings.seed}")
    sprint = config.scheduler.kind == "scm"
    if sprint != (settings.sampler == "scm"):
        allowed = "scm" if sprint else "flow_dpm or flow_euler"
        raise UserError(f"{config.name} is sampled with {allowed}, not {settings.sampler}")
    if settings.sampler not in ("flow_dpm", "flow_euler", "scm"):
        raise UserError(f"sampler {settings.sampler!r} is not known; choose flow_dpm or flow_euler (scm for Sprint)")
    if settings.guidance < 0:
        raise UserError(f"guidance must be 0 (off, as is 1) or positive, not {settings.guidance}")
    if settings.pag_scale < 0:
        raise UserError(f"the PAG scale must be 0 (off) or positive, not {settings.pag_scale}")
    lo, hi = settings.guidance_interval
    if not lo <= hi:
        raise UserError(f"the guidance interval goes from its lower end to its upper, so ({lo}, {hi}) is none")
    _refuse_what_nothing_reads(settings, config)


def _refuse_what_nothing_reads(settings: Settings, config: ModelConfig) -> None:
    """Raise UserError for settings of guidance where there is none, which would be ignored."""
    if is_guided(settings.guidance, config.dit):
        return
    unguided = f"{config.name} paints without classifier-free guidance"
    if not config.dit.guidance_embeds:
        unguided = f"with a guidance of {settings.guidance:g}, at most 1, {unguided}"
    if settings.negative_prompt:
        raise UserError(f"{unguided}, and reads no negative prompt; leave it empty (--negative '')")
    if settings.pag_scale == 0 and settings.guidance_interval != Settings.guidance_interval:
        raise UserError(f"{unguided}, so that it has no interval; leave it whole (--guidance-interval 0,1)")
