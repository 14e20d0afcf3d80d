"""Samplers: how a velocity field and noise become a latent.

`timesteps(config, steps)` lays out a `Schedule`; `sample(velocity, latents, schedule)` walks it. A sampler is a plain
function `(velocity, x, schedule, noise, callback) → x`, and `SAMPLERS` names them all:

    flow_dpm     DPM-Solver++(2M) on the rectified flow; the default (arXiv 2410.10629, algorithm 1)
    flow_euler   first-order Euler on the same flow
    scm          consistency sampling of SANA-Sprint, 1 to 4 steps (arXiv 2503.09641)

The flow is x = (1 - σ)·x₀ + σ·ε with σ from 1 (noise) to 0 (image); the network predicts its velocity v = ε - x₀. The
latents are fp32 from the first step to the last, whatever the network computes in. The clean latent is x₀ = x - σ·v;
going by way of ε would divide by 1 - σ, which at the first of 20 steps multiplies rounding errors by 3000.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sana_model.config import SchedulerConfig
from sana_model.errors import UserError

MAX_STEPS = 1000  # the time resolution that the models were trained with
SCM_FIRST, SCM_MIDDLE = 1.57080, 1.3  # angles: pure noise (π/2, rounded), and the second step of two

Velocity = Callable[[Tensor, int], Tensor]
"""`velocity(x, i)`: the guided output of the network for the fp32 input x at step i; same shape, any float dtype."""
Noise = Callable[[int], Tensor]
"""`noise(i)`: the fp32 standard normal tensor that `scm` adds after step i."""
Callback = Callable[[int, Tensor, Tensor], None]
"""`callback(i, x, x0)`: called after step i with the new state and the current guess at the clean latent."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """The times of one sampling run."""

    kind: str
    steps: int
    sigmas: tuple[float, ...]
    """steps + 1 values, the last one 0: noise levels σ, or for scm the TrigFlow angles in radians. Exact in fp32."""
    model_times: Tensor
    """(steps,): what the network is told. int64 0..1000, or for scm fp32 flow times in [0, 1]."""
    sigma_data: float = 0.5


def timesteps(config: SchedulerConfig, steps: int) -> Schedule:
    """The schedule of `steps` network evaluations, exactly as diffusers lays it out.

    The network is told ⌊1000·σ⌋. With hundreds of steps some neighbours are told the same time; that is harmless here,
    because the samplers go by index. Raises UserError for an unknown kind and for numbers that no schedule exists for.
    """
    if config.kind not in SAMPLERS:
        raise UserError(f"sampler {config.kind!r} is not known; choose one of {', '.join(SAMPLERS)}")
    if not 1 <= steps <= MAX_STEPS:
        raise UserError(f"{steps} steps were asked for; supported are 1 to {MAX_STEPS}")
    if not (0 < config.flow_shift < math.inf and 0 < config.sigma_data < math.inf):
        raise UserError(
            "flow_shift and sigma_data must be positive numbers;"
            f" the scheduler has flow_shift {config.flow_shift}, sigma_data {config.sigma_data}"
        )
    if config.kind == "scm":
        return _scm_schedule(config, steps)

    def shift(sigma):
        """Spend more of the steps at high noise; larger images need a larger shift (arXiv 2403.03206, eq. 23)."""
        return config.flow_shift * sigma / (1 + (config.flow_shift - 1) * sigma)

    if config.kind == "flow_dpm":
        sigmas = shift(1 - np.linspace(1, 0.001, steps + 1)[:0:-1])
        times = (sigmas * 1000).astype(np.int64)  # from the fp64 values, before they are rounded
    else:
        # The smallest level is shifted twice, because diffusers does it and SANA's own flow_euler runs on diffusers.
        # That one shifts by 3 whatever the model's flow_shift is; we follow the model.
        sigmas = shift(np.linspace(1, shift(0.001), steps))
        times = (sigmas.astype(np.float32) * 1000).astype(np.int64)
    sigmas = (*sigmas.astype(np.float32).tolist(), 0.0)
    return Schedule(config.kind, steps, sigmas, torch.from_numpy(times), config.sigma_data)


def _scm_schedule(config: SchedulerConfig, steps: int) -> Schedule:
    """TrigFlow angles t, and the flow times sin t / (sin t + cos t) that the network was distilled with."""
    if steps == 2:
        angles = torch.tensor([SCM_FIRST, SCM_MIDDLE, 0.0], dtype=torch.float32, device="cpu")
    else:
        angles = torch.linspace(SCM_FIRST, 0, steps + 1, dtype=torch.float32, device="cpu")
    t = angles[:-1]
    times = torch.sin(t) / (torch.cos(t) + torch.sin(t))
    return Schedule("scm", steps, tuple(angles.tolist()), times, config.sigma_data)


def sample(
    velocity: Velocity,
    latents: Tensor,
    schedule: Schedule,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Latents of standard normal noise, (B, C, H, W) → clean latents, fp32, by the sampler that the schedule is for."""
    return SAMPLERS[schedule.kind](velocity, latents.float(), schedule, noise, callback)


def flow_dpm(
    velocity: Velocity, x: Tensor, schedule: Schedule, noise: Noise | None = None, callback: Callback | None = None
) -> Tensor:
    """DPM-Solver++(2M), midpoint (arXiv 2211.01095, algorithm 2); the first and the last step are of first order."""
    # λ = log(α/σ), half the log signal-to-noise ratio, is the time in which the solver's steps are exact
    lambdas = [math.log((1 - sigma) / sigma) if sigma else math.inf for sigma in schedule.sigmas]
    x0 = previous = None
    for i in range(schedule.steps):
        sigma, following = schedule.sigmas[i : i + 2]
        previous, x0 = x0, x - sigma * velocity(x, i).float()
        h = lambdas[i + 1] - lambdas[i]
        slope = x0
        if 0 < i < schedule.steps - 1:
            r = (lambdas[i] - lambdas[i - 1]) / h
            slope = x0 + (x0 - previous) / (2 * r)
        x = (following / sigma) * x - (1 - following) * math.expm1(-h) * slope  # at σ = 0: x = x₀
        if callback:
            callback(i, x, x0)
    return x


def flow_euler(
    velocity: Velocity, x: Tensor, schedule: Schedule, noise: Noise | None = None, callback: Callback | None = None
) -> Tensor:
    """Euler's method on dx/dσ = v (arXiv 2403.03206, section 2)."""
    for i in range(schedule.steps):
        sigma, following = schedule.sigmas[i : i + 2]
        v = velocity(x, i).float()
        x0 = x - sigma * v
        x = x + (following - sigma) * v
        if callback:
            callback(i, x, x0)
    return x


def scm(
    velocity: Velocity, x: Tensor, schedule: Schedule, noise: Noise | None = None, callback: Callback | None = None
) -> Tensor:
    """Multistep consistency sampling (arXiv 2503.09641, section 3): jump to x₀, add fresh noise, jump again.

    The network knows the flow; the consistency model lives on TrigFlow, x = cos(t)·x₀ + sin(t)·σ_data·ε. Between them
    lies a change of time and of scale, made here on the way in and out. `noise` is not called after the last step.
    """
    if noise is None and schedule.steps > 1:
        raise ValueError("scm with more than one step adds noise between steps; pass noise=")
    angles = torch.tensor(schedule.sigmas, dtype=torch.float32, device="cpu")
    cos, sin = torch.cos(angles), torch.sin(angles)
    x = x0 = x * schedule.sigma_data
    for i in range(schedule.steps):
        s = schedule.model_times[i]
        norm = torch.sqrt(s**2 + (1 - s) ** 2)
        flow_x = x / schedule.sigma_data * norm
        v = velocity(flow_x, i).float()
        trig_v = ((1 - 2 * s) * flow_x + (1 - 2 * s + 2 * s**2) * v) / norm * schedule.sigma_data
        x0 = cos[i] * x - sin[i] * trig_v
        x = x0
        if i < schedule.steps - 1:
            x = cos[i + 1] * x0 + sin[i + 1] * (noise(i) * schedule.sigma_data)
        if callback:
            callback(i, x, x0)
    return x0 / schedule.sigma_data


SAMPLERS = {"flow_dpm": flow_dpm, "flow_euler": flow_euler, "scm": scm}
