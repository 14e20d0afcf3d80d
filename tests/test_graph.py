"""The denoising loop as a CUDA graph: the same latents as launch by launch, whatever was painted before.

Without a GPU a recorder stands for CUDA (tests/capture.py); planted mistakes show that it breaks where CUDA would.
"""

from dataclasses import replace

import pytest
import torch
from capture import Recorder, launches
from models import SMALL, SPRINT

from sana_kernels.cross_attention import library
from sana_model import graph, scheduler
from sana_model.config import ModelConfig
from sana_model.denoise import Inputs, Loop, denoise
from sana_model.dit import DiT
from sana_model.graph import Captured, Graphs, tensors, why_eager
from sana_model.ops import REFERENCE_OPS
from sana_model.pipeline import Pipeline
from sana_model.plan import resolve
from sana_model.settings import dtypes_of, precisions_for, settings_for
from sana_model.weights.random_weights import random_model

WITH_POSITIONS = replace(SMALL, dit=replace(SMALL.dit, pos_embed_scale=1.0))
MODELS = {"plain": SMALL, "2K": WITH_POSITIONS, "sprint": SPRINT}
SIZE = {"width": 96, "height": 64, "steps": 3}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pipeline(
    config: ModelConfig, device: str, capture=None, seed: int = 1, **kwargs
) -> tuple[Pipeline, Recorder | None]:
    """A pipeline whose loop is a graph; on the CPU one of a recorder, with the cross-attention that GPUs have."""
    device, precisions = torch.device(device), precisions_for("fp32")
    model = random_model(config, seed=seed)
    for part in (model.dit, model.text_encoder, model.autoencoder):
        part.to(device)
    plan = resolve(config, "reference" if device.type == "cpu" else "auto", device, precisions)
    pipe = Pipeline(model, plan, device, dtypes_of(precisions), low_memory=False)
    if device.type == "cpu":
        plan.eager = None
        capture = capture or Recorder()
        pipe.graphs = Graphs(10**12, capture=capture, **kwargs)
        pipe.dit.ops = replace(REFERENCE_OPS, cross_attention=masked)
    return pipe, capture


def masked(q, k, v, lengths, quantize=None):
    """As the reference on a GPU, which does not look at lengths."""
    mask = torch.arange(k.shape[1]) < lengths[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    return y.transpose(1, 2).contiguous()


@torch.inference_mode()
def paint(pipe: Pipeline, prompt: str = "a red fox", eager: bool = False, **settings) -> torch.Tensor:
    reason = pipe.plan.eager
    pipe.plan.eager = "to compare with" if eager else reason
    try:
        settings = pipe.settings(prompt, **SIZE | settings)
        # Not the picture's `latents`: they are a copy, which would hide that two results share a buffer.
        return pipe.denoise(settings, pipe.encode(settings))
    finally:
        pipe.plan.eager = reason


PICTURES = {
    "another prompt": {"prompt": "two blue whales under the stars, far from any coast"},
    "a shorter prompt": {"prompt": "a"},
    "another seed": {"seed": 7},
    "another guidance": {"guidance": 7.25},
    "another negative prompt": {"negative_prompt": "blurry, dark"},
    "another size": {"width": 64, "height": 64},
    "wide and not square": {"width": 160, "height": 32},
    "another number of steps": {"steps": 2},
    "unguided": {"guidance": 1.0},
    "guided in an interval": {"guidance_interval": (0.6, 0.95)},
    "guided in another interval": {"guidance_interval": (0.0, 0.9)},
    "PAG": {"pag_scale": 2.0},
    "PAG of another scale": {"pag_scale": 0.5},
    "PAG without guidance": {"pag_scale": 2.0, "guidance": 1.0},
    "Euler": {"sampler": "flow_euler"},
    "two pictures": {"num_images": 2, "seed": 3},
    "two prompts": {"prompt": ("a red fox", "a very long prompt about a very small fox")},
}  # fmt: skip
OF_SPRINT = ("another prompt", "another seed", "another guidance", "another size", "two pictures", "two prompts")


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Captions are padded to another length in a graph: the sums over text tokens may be grouped otherwise."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 2e-5 * b.abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_pictures_do_not_know_of_each_other(name, device):
    """Twice through all pictures, so that each is painted launch by launch, then from a graph that others have used."""
    pipe, _ = pipeline(MODELS[name], device, most=99) if device == "cpu" else pipeline(MODELS[name], device)
    pictures = {key: PICTURES[key] for key in (OF_SPRINT if name == "sprint" else PICTURES)}
    expected = {key: paint(pipe, eager=True, **settings) for key, settings in pictures.items()}
    for _ in range(2):
        for key, settings in pictures.items():
            assert close(paint(pipe, **settings), expected[key]), key
    assert len({latents.sum().item() for latents in expected.values()}) == len(pictures), "all pictures differ"


def test_one_graph_serves_every_prompt_seed_and_scale():
    pipe, recorder = pipeline(SMALL, "cpu")
    first = paint(pipe)
    assert (recorder.captures, recorder.replays) == (1, 0)
    for key in ("another prompt", "a shorter prompt", "another seed", "another guidance", "another negative prompt"):
        paint(pipe, **PICTURES[key])
    assert (recorder.captures, recorder.replays) == (1, 5)
    assert torch.equal(paint(pipe), first), "a replay gives the bytes of the first picture"
    for key in ("another size", "another number of steps", "unguided", "guided in an interval", "PAG", "two pictures"):
        paint(pipe, **PICTURES[key])
    assert (recorder.captures, recorder.replays) == (7, 6)


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_reads_weights_and_its_own_buffers_only(name):
    """Any other tensor could be let go, or stand for one picture alone. Numbers on the host are fixed in any case."""
    pipe, recorder = pipeline(MODELS[name], "cpu")
    paint(pipe)
    (captured,) = pipe.graphs._graphs.values()
    own = {t.untyped_storage().data_ptr() for t in (*pipe.dit.parameters(), *tensors(captured.inputs))}
    others = [t for t in recorder.external if t.ndim and t.untyped_storage().data_ptr() not in own]
    constants = {tuple(t.shape) for t in others}  # of the sampler, on the host
    assert constants <= ({(SIZE["steps"] + 1,), (SIZE["steps"],)} if name == "sprint" else set()), constants


# ------------------------------------------------------------------------------------------------ planted mistakes


def _stale(*names: str):
    """Copies all inputs but these."""

    def call(self: Captured, inputs: Inputs) -> torch.Tensor:
        inputs = replace(inputs, **{name: getattr(self.inputs, name) for name in names})
        return CALL(self, inputs)

    return call


CALL = Captured.__call__


def _not_copied_out(self: Captured, inputs: Inputs) -> torch.Tensor:
    CALL(self, inputs)
    return self.output


def _scale_fixed(dit, loop, inputs, callback=None):
    return DENOISE(dit, loop, replace(inputs, guidance=torch.tensor(inputs.guidance.tolist())), callback)


def _scale_read(dit, loop, inputs, callback=None):
    return DENOISE(dit, loop, replace(inputs, guidance=inputs.guidance.item()), callback)


def _own_noise(dit, loop, inputs, callback=None):
    noise = torch.cat([inputs.noise[:1], torch.randn_like(inputs.noise[1:])])
    return DENOISE(dit, loop, replace(inputs, noise=noise), callback)


def _trimmed(dit, loop, inputs, callback=None):
    """Cuts the captions off where the longest ends."""
    longest = max(inputs.text.lengths.tolist())
    pairs = tuple((k[:, :longest], v[:, :longest]) for k, v in inputs.text.keys_values)
    return DENOISE(dit, loop, replace(inputs, text=replace(inputs.text, keys_values=pairs)), callback)


DENOISE = denoise
MISTAKES = {
    "stale text": ("plain", (Captured, "__call__", _stale("text")), "another prompt"),
    "stale lengths": ("plain", (graph, "denoise", _trimmed), "another prompt"),
    "stale noise": ("plain", (Captured, "__call__", _stale("noise")), "another seed"),
    "stale times": ("sprint", (Captured, "__call__", _stale("time")), "another guidance"),
    "stale scale": ("plain", (Captured, "__call__", _stale("guidance")), "another guidance"),
    "stale PAG scale": ("plain", (Captured, "__call__", _stale("pag_scale")), "PAG of another scale"),
    "the scale is a constant": ("plain", (graph, "denoise", _scale_fixed), "another guidance"),
    "the scale is read": ("plain", (graph, "denoise", _scale_read), "another seed"),
    "noise is drawn in the loop": ("sprint", (graph, "denoise", _own_noise), "another seed"),
    "intervals share a graph": (
        "plain", (Loop, "key", property(lambda loop: loop.schedule.sigmas)), "guided in another interval",
    ),
    "samplers share a graph": ("plain", (Loop, "key", property(lambda loop: loop.combined)), "Euler"),
    "results share a buffer": ("plain", (Captured, "__call__", _not_copied_out), "another seed"),
    "sizes share a graph": ("plain", (graph, "tensors", lambda value: iter(())), "another size"),
}  # fmt: skip
BEFORE = {"stale PAG scale": "PAG", "intervals share a graph": "guided in an interval"}


def _first_and_second(pipe: Pipeline, mistake: str) -> bool:
    """Is the picture right after another one, and that one still right afterwards?"""
    _, _, after = MISTAKES[mistake]
    before = PICTURES[BEFORE[mistake]] if mistake in BEFORE else {}
    expected = [paint(pipe, eager=True, **settings) for settings in (before, PICTURES[after])]
    paint(pipe, **before)
    found = [paint(pipe, **settings) for settings in (before, PICTURES[after])]
    return all(map(close, found, expected))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_recorder_notices(monkeypatch, mistake):
    name, (owner, attribute, wrong), _ = MISTAKES[mistake]
    assert _first_and_second(pipeline(MODELS[name], "cpu")[0], mistake)
    monkeypatch.setattr(owner, attribute, wrong)
    try:
        assert not _first_and_second(pipeline(MODELS[name], "cpu")[0], mistake)
    except RuntimeError as error:
        assert "the host cannot read" in str(error)


# ------------------------------------------------------------------------------------------------ weights and memory


@pytest.mark.parametrize("change", ["new weights", "written in place", "another plan"])
def test_graphs_follow_the_weights(change):
    pipe, recorder = pipeline(SMALL, "cpu")
    before = [paint(pipe), paint(pipe)][0]
    layer = pipe.dit.blocks[0].attention.out
    if change == "new weights":  # a LoRA, say
        layer.weight = torch.nn.Parameter(layer.weight + 0.1, requires_grad=False)
    elif change == "written in place":
        layer.weight.data += 0.1
    else:
        pipe.dit.ops = replace(pipe.dit.ops, modulate=lambda *args, **kw: 1.1 * REFERENCE_OPS.modulate(*args, **kw))
    after = [paint(pipe), paint(pipe)]
    assert all(close(latents, paint(pipe, eager=True)) for latents in after) and not close(after[0], before)
    assert recorder.captures == (1 if change == "written in place" else 2) and len(pipe.graphs) == 1


def test_the_least_recently_used_graph_goes():
    pipe, recorder = pipeline(SMALL, "cpu", most=2)
    for steps in (1, 2, 1, 3, 1, 2):  # 3 takes the place of 2
        paint(pipe, steps=steps)
    assert recorder.captures == 4 and recorder.replays == 2 and len(pipe.graphs) == 2


def test_graphs_hold_no_more_than_their_share():
    pipe, recorder = pipeline(SMALL, "cpu", capture=Recorder(size=400 * 10**6))
    pipe.graphs.limit = 10**9
    for steps in (1, 2, 3, 3):
        paint(pipe, steps=steps)
    assert recorder.captures == 3 and recorder.replays == 1 and len(pipe.graphs) == 2
    assert 8e8 < pipe.graphs.bytes <= 1e9
    pipe.graphs.limit = 10**5
    result = pipe("a red fox", **SIZE)
    assert "a graph of this size would hold" in result.plan["eager"] and recorder.replays == 1


def test_when_memory_runs_out_the_graphs_go(monkeypatch):
    pipe, _ = pipeline(SMALL, "cpu")
    expected = paint(pipe)
    decode, failures = pipe.autoencoder.decode, [True, False, True, True]

    def short(z):
        if failures.pop(0):
            raise torch.OutOfMemoryError("of a GPU")
        return decode(z)

    monkeypatch.setattr(pipe.autoencoder, "decode", short)
    assert torch.equal(pipe("a red fox", **SIZE).latents, expected) and len(pipe.graphs) == 0
    with pytest.raises(torch.OutOfMemoryError):
        pipe("a red fox", **SIZE)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_graph_that_does_not_fit_costs_no_picture(failures):
    """One failure: the other graphs go, and then it fits. Two: it is left out, until the next picture of its shape."""
    recorder, left = Recorder(), []

    def capture(function):
        if left:
            raise torch.OutOfMemoryError(f"of a GPU, {left.pop()} times more")
        return recorder(function)

    pipe, _ = pipeline(SMALL, "cpu", capture=capture)
    paint(pipe, steps=2)
    expected = paint(pipe, eager=True)
    left += range(failures)
    assert close(paint(pipe), expected) and not left
    assert (len(pipe.graphs), recorder.captures) == ((1, 2) if failures == 1 else (0, 1))
    assert close(paint(pipe), expected) and close(paint(pipe), expected)
    assert (len(pipe.graphs), recorder.captures) == (1, 2)


def test_captures_are_made_on_the_gpu_of_the_picture(monkeypatch):
    current = []

    class DeviceOf:
        def __init__(self, tensor):
            self.device = tensor.device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *error):
            current.pop()

    def capture(function):
        assert current == [torch.device("cpu")]
        return Recorder()(function)

    pipe, _ = pipeline(SMALL, "cpu", capture=capture)
    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    paint(pipe)
    assert len(pipe.graphs) == 1 and not current


# ------------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize(
    ("backend", "device", "options", "reason"),
    [
        ("cuda", "cuda", {}, None),
        ("triton", "cuda:1", {}, None),
        ("cpu", "cpu", {}, "need an NVIDIA GPU"),
        ("reference", "cuda", {}, "the one to compare with"),
        ("cuda", "cuda", {"wanted": False}, "turned off"),
        ("cuda", "cuda", {"low_memory": True}, "--low-memory moves the weights"),
    ],
)
def test_when_the_loop_is_a_graph(backend, device, options, reason):
    found = why_eager(backend, torch.device(device), **options)
    assert found is None if reason is None else reason in found


def test_the_result_says_how_its_steps_ran():
    pipe, _ = pipeline(SMALL, "cpu")
    results = [pipe("a red fox", **SIZE) for _ in range(2)]
    assert [result.plan["eager"] for result in results] == [None, None]
    assert 0 < results[0].plan["outside_share"] == results[1].plan["outside_share"] <= 1
    seen = []
    pipe("a red fox", progress=lambda *event: seen.append(event), **SIZE)
    assert [event for event in seen if event[0] == "denoise"] == [("denoise", 0, 3), ("denoise", 3, 3)]


# ------------------------------------------------------------------------------------------------ what may be captured


def meta_inputs(config: ModelConfig, dit: DiT, loop: Loop, B: int = 2) -> Inputs:
    """Inputs on the device "meta", whose tensors have no values to read, as on a GPU that is not waited for."""
    rows, L = B * (1 + loop.guided + loop.perturbed), 20
    caption = torch.randn(rows, L, config.dit.caption_channels, device="meta")
    steps = loop.schedule.steps
    times = torch.rand(steps, device="meta")
    return Inputs(
        torch.randn(steps, B, config.dit.in_channels, 3, 5, device="meta"),
        dit.time(times, times if config.dit.guidance_embeds else None),
        dit.text(caption, torch.ones(rows, dtype=torch.int32, device="meta")),
        torch.randn(1, 15, config.dit.hidden, device="meta") if config.dit.pos_embed_scale else None,
        torch.ones((), device="meta"),
        torch.ones((), device="meta"),
    )


def walk(name: str, dtype: torch.dtype, loop_function=denoise, **settings) -> list[str]:
    """What the loop would launch on a GPU."""
    config = MODELS[name]
    settings = settings_for(config, "a", **{"steps": 3} | settings)
    schedule = scheduler.timesteps(replace(config.scheduler, kind=settings.sampler), settings.steps)
    loop = Loop.of(schedule, settings, config.dit, config.pag_layers)
    with torch.device("meta"):
        dit = DiT(config.dit).to(dtype)
    with torch.inference_mode():
        attention = library.cross_attention if dtype != torch.float32 else REFERENCE_OPS.cross_attention
        dit.ops = replace(REFERENCE_OPS, cross_attention=lambda *args, quantize: attention(*args))
        inputs = meta_inputs(config, dit, loop)
        loop_function(dit, loop, inputs)  # as in `Graphs`, what is cached is made before
        with launches() as found:
            loop_function(dit, loop, inputs)
    library.offsets.cache_clear()
    return found.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("plain", {}),
        ("plain", {"pag_scale": 1.0, "guidance_interval": (0.3, 0.9)}),
        ("plain", {"sampler": "flow_euler", "guidance": 1.0}),
        ("2K", {}),
        ("sprint", {}),
    ],
    ids=str,
)
def test_the_loop_never_waits_for_the_host(name, settings, dtype):
    names = walk(name, dtype, **settings)
    attention = "_flash_attention_forward" if dtype != torch.float32 else "scaled_dot_product"
    assert sum(attention in name for name in names) == 3 * MODELS[name].dit.layers


@pytest.mark.parametrize("mistake", [_scale_read, _scale_fixed, _trimmed])
def test_the_check_notices(mistake):
    with pytest.raises((RuntimeError, NotImplementedError), match=r"the host|on meta tensors|no data"):
        walk("plain", torch.bfloat16, mistake)
