"""From noise to latents, as a function of tensors alone.

    denoise(dit, loop, inputs) → latents

Whatever differs between two pictures of one shape is a tensor in `Inputs`; whatever Python decides by is in `Loop`. So the
same function serves step by step and inside a CUDA graph (sana_model/graph.py), which repeats the launches of its capture
on whatever the tensors hold by then.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sana_model import scheduler
from sana_model.config import DiTConfig
from sana_model.dit import DiT, TextContext, TimeEmbedding
from sana_model.scheduler import Callback, Schedule
from sana_model.settings import Settings, is_guided


@dataclass(frozen=True)
class Inputs:
    """All that a picture is made of, on the DiT's device. B images make (guided + 1 + perturbed) · B rows of text."""

    noise: Tensor  # (draws, B, channels, H, W) fp32: the first latents, then what scm adds after each step but the last
    time: TimeEmbedding  # a row per step
    text: TextContext  # [negative | positive | perturbed], each of B rows
    positions: Tensor | None  # (1, N, C), of models that have them
    guidance: Tensor  # () fp32, the scale of classifier-free guidance
    pag_scale: Tensor  # () fp32, the scale of perturbed-attention guidance


@dataclass(frozen=True)
class Loop:
    """How the steps go; `key` is equal for loops that go alike."""

    schedule: Schedule
    guided: bool  # classifier-free guidance (arXiv 2207.12598)
    perturbed: bool  # perturbed-attention guidance (arXiv 2403.17377)
    pag_layers: tuple[int, ...]
    combined: tuple[bool, ...]  # by step: is either guidance at work, or does the step lie outside of its interval?

    @property
    def key(self) -> tuple:
        s = self.schedule
        return s.kind, s.sigmas, s.sigma_data, self.guided, self.perturbed, self.pag_layers, self.combined

    @classmethod
    def of(cls, schedule: Schedule, settings: Settings, config: DiTConfig, pag_layers: tuple[int, ...]) -> "Loop":
        """What the settings ask for. Sprint takes the guidance scale as an input, and needs no second half of a batch."""
        guided, perturbed = is_guided(settings.guidance, config), settings.pag_scale > 0
        levels = schedule.model_times.tolist() if schedule.kind == "scm" else schedule.sigmas[:-1]
        lo, hi = settings.guidance_interval
        combined = tuple((guided or perturbed) and lo <= level <= hi for level in levels)
        return cls(schedule, guided, perturbed, tuple(pag_layers), combined)


def denoise(dit: DiT, loop: Loop, inputs: Inputs, callback: Callback | None = None) -> Tensor:
    """Latents (B, channels, H, W) fp32. Nothing here reads a tensor on the host or draws a random number."""
    B = inputs.noise.shape[1]
    positive_rows = slice(B * loop.guided, B * loop.guided + B)
    alone = inputs.text.rows(positive_rows) if loop.guided or loop.perturbed else inputs.text

    def velocity(x: Tensor, i: int) -> Tensor:
        if not loop.combined[i]:
            return dit.step(x, inputs.time.step(i, B), alone, positions=inputs.positions)
        copies = 1 + loop.guided + loop.perturbed
        time = inputs.time.step(i, copies * B)
        parts = dit.step(
            torch.cat([x] * copies), time, inputs.text, B * loop.perturbed, loop.pag_layers, inputs.positions
        ).float().chunk(copies)  # fmt: skip
        positive = parts[int(loop.guided)]
        result = parts[0] + inputs.guidance * (positive - parts[0]) if loop.guided else positive
        return result + inputs.pag_scale * (positive - parts[-1]) if loop.perturbed else result

    def noise(i: int) -> Tensor:
        return inputs.noise[i + 1]

    return scheduler.sample(velocity, inputs.noise[0], loop.schedule, noise=noise, callback=callback)
