"""prompt → picture: the whole story in one file.

    captions = text encoder(instruction + prompt)          sana_model/prompt.py, text_encoder.py
    latents  = noise of seed s, one generator per image    here
    latents  = solver(velocity) for `steps` steps          sana_model/scheduler.py, dit.py
    images   = decoder(latents / scaling factor)           sana_model/autoencoder.py

`load` makes a `Pipeline`; calling it with a prompt and any field of `Settings` gives a `Result`. The same settings give the
same picture, on any backend from the same noise.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from sana_model import memory, scheduler
from sana_model.bins import nearest_bin, resize_and_crop
from sana_model.config import ModelConfig
from sana_model.dit import TextContext
from sana_model.errors import MissingError, UserError
from sana_model.plan import Plan, dtype_name, resolve
from sana_model.prompt import CaptionStates, PromptEncoder
from sana_model.settings import Settings, dtypes_of, precisions_for, settings_for
from sana_model.weights import LoadedModel, find, load_model

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, of) with stage "text_encode", "denoise" or "decode"."""


@dataclass(frozen=True)
class Result:
    """Pictures, and what they took."""

    images: list[Image.Image]
    latents: Tensor  # (count, 32, H/32, W/32) fp32, before the decoder
    timings: dict[str, float]  # milliseconds: text_encode, denoise, per_step, decode, other, total
    plan: dict  # the resolved plan, with the share of the denoising time outside the named backend
    settings: Settings


class Pipeline:
    """A loaded model, ready to paint. Thread-safe: pictures are painted one call at a time."""

    def __init__(
        self, model: LoadedModel, plan: Plan, device: torch.device, dtypes: dict[str, torch.dtype], *, low_memory: bool
    ):
        self.config: ModelConfig = model.config
        self.model, self.plan, self.device, self.dtypes, self.low_memory = model, plan, device, dtypes, low_memory
        self.dit, self.autoencoder = model.dit, model.autoencoder
        self.dit.ops = plan.ops("dit")
        if self.autoencoder is not None:  # calibration only denoises
            self.autoencoder.use(plan.ops("autoencoder"))
        self._prompt_encoder: PromptEncoder | None = None
        self._lock, self._pid = threading.Lock(), os.getpid()

    def settings(self, prompt: str | list[str] | tuple[str, ...], **overrides) -> Settings:
        """The model's defaults with `overrides` applied and checked. Raises UserError naming what is wrong."""
        return settings_for(self.config, prompt, low_memory=self.low_memory, **overrides)

    def __call__(self, prompt, *, progress: Progress | None = None, **overrides) -> Result:
        """Paint. `overrides` are fields of `Settings`; `progress` is told of every stage and step."""
        settings = self.settings(prompt, **overrides)
        progress = progress or (lambda stage, done, of: None)
        self._after_fork()
        with self._lock, torch.inference_mode():
            self.plan.clock.reset()
            clock = _StageClock(self.device)
            progress("text_encode", 0, 1)
            captions = self.encode(settings)
            clock.stop("text_encode")
            progress("text_encode", 1, 1)
            progress("denoise", 0, settings.steps)
            latents = self.denoise(settings, captions, progress=progress)
            denoise_ms = clock.stop("denoise")
            images = []
            for i, latent in enumerate(latents.split(1)):
                progress("decode", i, len(latents))
                images.append(_to_pil(self.decode(latent, settings)))
            clock.stop("decode")
            progress("decode", len(latents), len(latents))
            plan = self.plan.as_json() | {"outside_share": self.plan.outside_share(denoise_ms / 1e3)}
        return Result(images, latents.cpu(), clock.timings(settings.steps), plan, settings)

    def encode(self, settings: Settings) -> tuple[CaptionStates | None, CaptionStates]:
        """Caption states (negative, positive), one row per prompt; no negative where the model is not guided by one."""
        if self.low_memory:
            self.dit.to("cpu")
        encoder = self._prompts()
        prompts = list(settings.prompts)
        if self._guided(settings):
            negative, positive = encoder.encode_pair(
                prompts, [settings.negative_prompt] * len(prompts), settings.instruction
            )
        else:
            negative, positive = None, encoder.encode(prompts, settings.instruction)
        if self.low_memory:
            self._prompt_encoder = self.model.text_encoder = None
            self.dit.to(self.device)
        return negative, positive

    def denoise(
        self,
        settings: Settings,
        captions: tuple[CaptionStates | None, CaptionStates],
        *,
        noise: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Noise → latents (count, 32, H/32, W/32) in fp32. `noise` replaces the seed's initial latents."""
        config, dit = self.config, self.dit
        height, width = self._canvas(settings)
        memory.check_run(config, settings, self.dtypes, self.device)
        scale = config.autoencoder.spatial_compression
        shape = (1, config.dit.in_channels, height // scale, width // scale)
        generators = [torch.Generator("cpu").manual_seed(settings.seed + i) for i in range(settings.count)]

        def draw(_step: int = 0) -> Tensor:
            return torch.cat([torch.randn(shape, generator=g, dtype=torch.float32) for g in generators]).to(self.device)

        noise = draw() if noise is None else noise.to(self.device, torch.float32)
        schedule = scheduler.timesteps(replace(config.scheduler, kind=settings.sampler), settings.steps)

        noise_levels = schedule.model_times.tolist() if schedule.kind == "scm" else schedule.sigmas
        times = torch.as_tensor(schedule.model_times, dtype=torch.float32, device=self.device)
        scales = torch.full_like(times, settings.guidance) if config.dit.guidance_embeds else None
        time_table = dit.time(times, scales)
        guided, perturbed = self._guided(settings), settings.pag_scale > 0
        text = self._text(settings, captions, perturbed)
        first = settings.count * guided
        unguided = _rows(text, slice(first, first + settings.count)) if guided or perturbed else text

        def velocity(x: Tensor, i: int) -> Tensor:
            lo, hi = settings.guidance_interval
            if (guided or perturbed) and not lo <= noise_levels[i] <= hi:
                return dit.step(x, time_table.step(i, len(x)), unguided)
            copies = 1 + guided + perturbed
            rows = torch.cat([x] * copies)
            time = time_table.step(i, len(rows))
            parts = dit.step(rows, time, text, len(x) * perturbed, config.pag_layers).float().chunk(copies)
            positive = parts[int(guided)]
            result = parts[0] + settings.guidance * (positive - parts[0]) if guided else positive
            return result + settings.pag_scale * (positive - parts[-1]) if perturbed else result

        def after_step(i: int, _x: Tensor, _x0: Tensor) -> None:
            if progress is not None:
                progress("denoise", i + 1, settings.steps)

        latents = scheduler.sample(velocity, noise, schedule, noise=draw, callback=after_step)
        if not bool(latents.isfinite().all()):
            raise UserError(
                f"the latents became NaN or infinite: this checkpoint overflows in {dtype_name(self.dtypes['dit'])}; "
                "run it with --precision bf16 or fp32"
            )
        return latents

    def decode(self, latents: Tensor, settings: Settings) -> Tensor:
        """Latents → images (B, 3, height, width), fp32 in [-1, 1] up to overshoot."""
        autoencoder = self.autoencoder
        z = latents.to(self.device, self.dtypes["autoencoder"]) / self.config.autoencoder.scaling_factor
        images = autoencoder.tiled_decode(z) if settings.tiled else autoencoder.decode(z)
        if not bool(images.isfinite().all()):
            raise UserError(
                f"the decoder overflowed in {dtype_name(self.dtypes['autoencoder'])}; run it with --decoder-precision bf16"
            )
        if settings.binning:
            images = resize_and_crop(images, settings.height, settings.width)
        return images.float()

    def _guided(self, settings: Settings) -> bool:
        """Classifier-free guidance, which doubles the batch; Sprint takes the guidance scale as an input instead."""
        return settings.guidance > 1 and not self.config.dit.guidance_embeds

    def _canvas(self, settings: Settings) -> tuple[int, int]:
        if settings.binning:
            return nearest_bin(settings.height, settings.width, self.config.size)
        return settings.height, settings.width

    def _prompts(self) -> PromptEncoder:
        if self._prompt_encoder is None:
            if self.model.text_encoder is None:  # freed by --low-memory after an earlier picture
                self.model.text_encoder = self.model.load_text_encoder().to(self.device)
            self._prompt_encoder = PromptEncoder(self.model.text_encoder, self.model.tokenizer, self.config)
        return self._prompt_encoder

    def _text(
        self, settings: Settings, captions: tuple[CaptionStates | None, CaptionStates], perturbed: bool
    ) -> TextContext:
        """Keys and values for the batch [negative | positive | perturbed], each of count rows (prompt-major)."""
        present = [c for c in captions if c is not None]
        longest = max(c.states.shape[1] for c in present)
        states = torch.cat([torch.nn.functional.pad(c.states, (0, 0, 0, longest - c.states.shape[1])) for c in present])
        lengths = torch.cat([c.lengths for c in present])
        text = self.dit.text(states.to(self.device), lengths.to(self.device))
        prompts = len(settings.prompts)
        groups = [*range(len(present)), *([len(present) - 1] if perturbed else [])]
        index = [g * prompts + p for g in groups for p in range(prompts) for _ in range(settings.num_images)]
        return text if index == list(range(len(states))) else _rows(text, index)

    def _after_fork(self) -> None:
        """A forked child has none of its parent's OpenMP threads: compute on one thread rather than wait for them."""
        if os.getpid() != self._pid:
            torch.set_num_threads(1)
            self._lock, self._pid = threading.Lock(), os.getpid()


def load(
    model: str = "sana-tiny",
    *,
    backend: str = "auto",
    precision: str | None = None,
    device: str | None = None,
    text_precision: str | None = None,
    decoder_precision: str | None = None,
    dialect: str = "diffusers",
    low_memory: bool = False,
    base: str | None = None,
    picture: dict | None = None,
) -> Pipeline:
    """Load a model: a built-in name, a diffusers folder, a single file (with `base` for the other parts) or a hub id.

    `precision` (fp32 | bf16 | fp16 | w8a8) is the DiT's, by default what the folder's sana.json asks for, or bf16; text
    encoder and decoder default to bf16, or fp32 beside an fp32 DiT. `low_memory` lets the text encoder go after encoding,
    has only one of it and the DiT on a GPU, and decodes in tiles. `picture`: fields of `Settings` that are going to be
    painted; what is wrong with them, or too large for this machine, is refused before anything is loaded.
    Raises UserError for a model that cannot be read and MissingError where this machine cannot run it.
    """
    target = _device(device, backend)
    source = find(model, base)
    precisions = precisions_for(precision or source.precision or "bf16", text_precision, decoder_precision)
    dtypes = dtypes_of(precisions)
    memory.check_load(source.config, dtypes, target, low_memory)
    if picture is not None:
        settings = settings_for(source.config, low_memory=low_memory, **picture)
        memory.check_run(source.config, settings, dtypes, target, loaded=False)
    plan = resolve(source.config, backend, target, precisions)
    loaded = load_model(
        source, precision=dtypes["dit"], text_precision=dtypes["text_encoder"], decoder_precision=dtypes["autoencoder"],
        dialect=dialect,
        prepare={"dit": partial(plan.prepare, "dit"), "text": partial(plan.prepare, "text_encoder")},
    )  # fmt: skip
    for part in (loaded.text_encoder, loaded.autoencoder, *([] if low_memory else [loaded.dit])):
        part.to(target)
    return Pipeline(loaded, plan, target, dtypes, low_memory=low_memory)


def _device(device: str | None, backend: str) -> torch.device:
    wanted = device or ("cuda" if backend in ("cuda", "triton") or torch.cuda.is_available() else "cpu")
    if backend == "cpu" and device is None:
        wanted = "cpu"
    try:
        target = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"device {device!r} is not known; use cpu, cuda or cuda:N") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise MissingError(
            "no NVIDIA GPU can be used here (torch sees none); run with --backend cpu, or see `sana doctor`"
        )
    return target


def _rows(text: TextContext, index) -> TextContext:
    pairs = tuple((k[index], v[index]) for k, v in text.keys_values)
    return TextContext(pairs, None if text.lengths is None else text.lengths[index])


def _to_pil(image: Tensor) -> Image.Image:
    """One decoded image (1, 3, H, W) → 8-bit RGB."""
    pixels = (image[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).cpu().numpy())


class _StageClock:
    """Wall time of each stage, in ms; on a GPU a stage ends when its work is done."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.start = self.last = time.perf_counter()
        self.stages: dict[str, float] = {}

    def stop(self, stage: str) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.stages[stage] = (now - self.last) * 1e3
        self.last = now
        return self.stages[stage]

    def timings(self, steps: int) -> dict[str, float]:
        total = (time.perf_counter() - self.start) * 1e3
        other = total - sum(self.stages.values())
        return {
            "text_encode": self.stages["text_encode"], "denoise": self.stages["denoise"],
            "per_step": self.stages["denoise"] / steps, "decode": self.stages["decode"], "other": other, "total": total,
        }  # fmt: skip
