"""The samplers against diffusers' schedulers, driven as its SANA pipelines drive them; the network is a formula."""

import pytest
import torch
from compare import assert_close
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler

import sana_model.scheduler as scheduler
from sana_model.config import SchedulerConfig
from sana_model.errors import UserError
from sana_model.scheduler import sample, timesteps

PUBLISHED_SIGMAS = (
    0.99967, 0.98242, 0.96394, 0.94409, 0.92272, 0.89964, 0.87464, 0.84746, 0.81781, 0.78534,
    0.74962, 0.71015, 0.66630, 0.61728, 0.56215, 0.49967, 0.42827, 0.34589, 0.24979, 0.13624, 0.0,
)  # fmt: skip
PUBLISHED_TIMES = (
    999, 982, 963, 944, 922, 899, 874, 847, 817, 785, 749, 710, 666, 617, 562, 499, 428, 345, 249, 136,
)  # fmt: skip
LIMIT = 4e-6  # of the RMS. Measured: 2.7e-6 (1.5e-6 absolute) after 20 steps; tanh differs from CPU to CPU
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers


def starting_noise(seed: int = 0) -> torch.Tensor:
    x = torch.randn(2, 32, 3, 5, generator=torch.Generator().manual_seed(seed))
    x[0, 3, 1, 2], x[1, 7, 0, 0] = 6.0, -5.0
    return x


def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Nonlinear in x and in time, mixes channels and places: whatever a sampler gets wrong, it feels."""
    time = time.double().reshape(-1, 1, 1, 1)
    time = (time / 1000 if time.max() > 1.5 else time).float()
    mixed = x.roll(1, dims=1) - 0.5 * x.roll(1, dims=-1)
    return 1.5 * torch.tanh(mixed) * torch.cos(3 * time) - 0.4 * torch.sin(x + 5 * time) + 0.6 * x


def ours(config: SchedulerConfig, steps: int, x: torch.Tensor, noise=None) -> torch.Tensor:
    schedule = timesteps(config, steps)
    return sample(lambda x, i: network(x, schedule.model_times[i]), x, schedule, noise=noise)


def diffusers_flow(public, steps: int, x: torch.Tensor, whole_times: bool = False) -> torch.Tensor:
    """The loop of diffusers' SanaPipeline."""
    public.set_timesteps(steps)
    for t in public.timesteps:
        x = public.step(network(x, t.long() if whole_times else t), t, x, return_dict=False)[0]
    return x


def diffusers_dpm(shift: float) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(flow_shift=shift, use_flow_sigmas=True, prediction_type="flow_prediction")


def diffusers_sprint(steps: int, x: torch.Tensor, seed: int, sigma_data: float = 0.5) -> torch.Tensor:
    """The loop of diffusers' SanaSprintPipeline."""
    public = SCMScheduler(sigma_data=sigma_data)
    public.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    public.set_begin_index(0)
    generator = torch.Generator().manual_seed(seed)
    x = x * sigma_data
    for t in public.timesteps[:-1]:
        t = t.expand(len(x))
        s = (torch.sin(t) / (torch.cos(t) + torch.sin(t))).view(-1, 1, 1, 1)
        norm = torch.sqrt(s**2 + (1 - s) ** 2)
        flow_x = x / sigma_data * norm
        v = ((1 - 2 * s) * flow_x + (1 - 2 * s + 2 * s**2) * network(flow_x, s)) / norm
        x, x0 = public.step(v * sigma_data, t, x, generator=generator, return_dict=False)
    return x0 / sigma_data


def step_noise(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda i: torch.randn(2, 32, 3, 5, generator=generator)


def test_published_schedule():
    schedule = timesteps(SchedulerConfig("flow_dpm", 3.0), 20)
    assert tuple(round(sigma, 5) for sigma in schedule.sigmas) == PUBLISHED_SIGMAS
    assert tuple(schedule.model_times.tolist()) == PUBLISHED_TIMES
    assert schedule.model_times.dtype == torch.int64


@pytest.mark.parametrize("shift", [1.0, 3.0, 4.0, 6.0])
def test_dpm_in_twenty_steps_is_within_2e_6(shift):
    x = starting_noise()
    error = ours(SchedulerConfig("flow_dpm", shift), 20, x) - diffusers_flow(diffusers_dpm(shift), 20, x)
    assert error.abs().max() <= 2e-6


@pytest.mark.parametrize("shift", [1.0, 3.0, 4.0, 6.0])
def test_dpm_schedule_is_bit_exact(shift):
    """Truncated times hang by the last bit of a σ, so every number of steps is tried, those with repeated times too."""
    public = diffusers_dpm(shift)
    for steps in [*range(1, 60), 100, 199, 200, 523, 999, 1000]:
        public.set_timesteps(steps)
        schedule = timesteps(SchedulerConfig("flow_dpm", shift), steps)
        assert schedule.sigmas == tuple(public.sigmas.tolist())
        assert torch.equal(schedule.model_times, public.timesteps)


@pytest.mark.parametrize("shift", [1.0, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 15, 20])
def test_dpm(shift, steps):
    x = starting_noise()
    expected = diffusers_flow(diffusers_dpm(shift), steps, x)
    assert_close(ours(SchedulerConfig("flow_dpm", shift), steps, x), expected, LIMIT)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_euler(shift, steps):
    x = starting_noise()
    expected = diffusers_flow(FlowMatchEulerDiscreteScheduler(shift=shift), steps, x, whole_times=True)
    assert_close(ours(SchedulerConfig("flow_euler", shift), steps, x), expected, LIMIT)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_scm(steps):
    x = starting_noise()
    expected = diffusers_sprint(steps, x, seed=1)
    assert_close(ours(SchedulerConfig("scm"), steps, x, step_noise(1)), expected, LIMIT)


def test_scm_follows_sigma_data():
    x = starting_noise()
    expected = diffusers_sprint(2, x, seed=1, sigma_data=0.7)
    assert_close(ours(SchedulerConfig("scm", sigma_data=0.7), 2, x, step_noise(1)), expected, LIMIT)


@pytest.mark.parametrize("mistake", ["shift", "order", "time", "noise"])
def test_parity_can_fail(mistake, monkeypatch):
    """A wrong shift, solver order, time or step noise is far outside the limit."""
    x = starting_noise()
    if mistake == "noise":
        expected = diffusers_sprint(2, x, seed=1)
        actual = ours(SchedulerConfig("scm"), 2, x, step_noise(2))
    else:
        expected = diffusers_flow(diffusers_dpm(3.0), 20, x)
        config = SchedulerConfig("flow_dpm", 4.0 if mistake == "shift" else 3.0)
        schedule = timesteps(config, 20)
        late = 1 if mistake == "time" else 0
        sampler = scheduler.flow_euler if mistake == "order" else scheduler.flow_dpm
        actual = sampler(lambda x, i: network(x, schedule.model_times[i] + late), x, schedule)
    with pytest.raises(AssertionError):
        assert_close(actual, expected, 100 * LIMIT)


@pytest.mark.parametrize("kind", ["flow_dpm", "flow_euler", "scm"])
def test_sampling_an_exact_velocity_finds_the_image(kind):
    """If the network knew the clean latent, every sampler would return it; half-precision inputs are upcast."""
    clean = starting_noise(5)
    schedule = timesteps(SchedulerConfig(kind), 4)

    def velocity(x, i):
        sigma = schedule.model_times[i] if kind == "scm" else schedule.sigmas[i]
        if kind == "scm":  # the network sees SANA's flow with unit-variance data
            return (x - clean * (1 - sigma)) / sigma - clean
        return (x - clean) / sigma

    x = sample(velocity, starting_noise().half(), schedule, noise=step_noise(1))
    assert x.dtype == torch.float32
    assert_close(x, clean, 1e-5)


@pytest.mark.parametrize("kind", ["flow_dpm", "flow_euler", "scm"])
def test_callback_sees_every_step_and_may_stop(kind):
    schedule = timesteps(SchedulerConfig(kind), 5)
    seen = []

    def callback(i, x, x0):
        seen.append(i)
        assert x.shape == x0.shape
        if i == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(lambda x, i: -x.bfloat16(), starting_noise(), schedule, noise=step_noise(1), callback=callback)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("config", "steps", "says"),
    [
        (SchedulerConfig("ddim"), 20, "flow_dpm, flow_euler, scm"),
        (SchedulerConfig(), 0, "1 to 1000"),
        (SchedulerConfig(), 1001, "1 to 1000"),
        (SchedulerConfig(flow_shift=0.0), 20, "positive"),
        (SchedulerConfig(flow_shift=float("nan")), 20, "positive"),
    ],
)
def test_mistakes_are_named(config, steps, says):
    with pytest.raises(UserError, match=says):
        timesteps(config, steps)


def test_scm_wants_noise():
    with pytest.raises(ValueError, match="noise"):
        sample(lambda x, i: x, starting_noise(), timesteps(SchedulerConfig("scm"), 2))
