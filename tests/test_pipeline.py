"""The whole pipeline against diffusers' pipelines, from one and the same folder; and how it behaves when shared.

Both sides start from the seed, not from shared tensors: tokeniser, text encoder, noise, solver, guidance, DiT and decoder
must all agree for the latents to agree.
"""

import contextlib
import json
import multiprocessing
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from compare import psnr, relative_rms
from diffusers import SanaPAGPipeline, SanaPipeline, SanaSprintPipeline
from diffusers.models.attention_processor import PAGCFGSanaLinearAttnProcessor2_0

import sana_kernels
import sana_model
from sana_model.bins import NATIVE_SIZES, bins, nearest_bin, resize_and_crop
from sana_model.config import BUILT_IN, SchedulerConfig
from sana_model.errors import UserError
from sana_model.settings import settings_for
from sana_model.weights.random_weights import random_model
from sana_model.weights.saving import save_diffusers

TINY = BUILT_IN["sana-tiny-random"]
SMALL = replace(TINY, dit=replace(TINY.dit, layers=3), pag_layers=(1,), instruction="default")
VARIANTS = {
    "plain": SMALL,
    "qk_norm": replace(SMALL, dit=replace(SMALL.dit, qk_norm=True)),
    "sprint": replace(
        SMALL,
        dit=replace(SMALL.dit, qk_norm=True, guidance_embeds=True),
        scheduler=SchedulerConfig(kind="scm"),
        steps=2,
    ),
}
PROMPT = 'A lighthouse, in "fog"; très tôt'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saves each variant as a diffusers folder, once."""
    saved = {}

    def save(variant: str) -> str:
        if variant not in saved:
            saved[variant] = tmp_path_factory.mktemp(variant) / "model"
            save_diffusers(saved[variant], random_model(VARIANTS[variant], seed=1))
        return str(saved[variant])

    return save


def ours(path: str, **settings):
    """Latents and float images of our pipeline in fp32."""
    pipe = sana_model.load(path, backend="reference", precision="fp32")
    result = pipe(PROMPT, **settings)
    with torch.inference_mode():
        images = torch.cat([pipe.decode(latent, result.settings) for latent in result.latents.split(1)])
    return result, images


def theirs(cls, path: str, *, seed: int = 0, count: int = 1, **arguments):
    """The same of a diffusers pipeline, whose image i also starts from seed + i."""
    pipe = cls.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    latents = pipe(
        prompt=PROMPT, generator=generators, num_images_per_prompt=count, output_type="latent",
        use_resolution_binning=False, max_sequence_length=TINY.max_text_tokens, **arguments,
    ).images  # fmt: skip
    with torch.inference_mode():
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return latents, images, [pipe.image_processor.postprocess(image[None])[0] for image in images]


def assert_same_picture(mine, expected):
    (result, images), (latents, expected_images, pictures) = mine, expected
    assert relative_rms(result.latents, latents) <= 1e-4
    assert ((images - expected_images).square().mean().sqrt() / expected_images.std()).item() <= 1e-3
    for picture, other in zip(result.images, pictures, strict=True):
        a, b = torch.from_numpy(np.array(picture)), torch.from_numpy(np.array(other))
        assert psnr(a, b) >= 50


CASES = {
    "plain": ("plain", {}, {}),
    "negative prompt": ("plain", {"negative_prompt": "blurry"}, {"negative_prompt": "blurry"}),
    "two images": ("plain", {"num_images": 2, "seed": 7}, {"count": 2, "seed": 7}),
    "wide": ("plain", {"width": 160, "height": 96}, {"width": 160, "height": 96}),
    "no guidance": ("plain", {"guidance": 1.0}, {"guidance_scale": 1.0}),
    "no instruction": ("plain", {"instruction": "none"}, {"complex_human_instruction": None}),
    "qk-norm": ("qk_norm", {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_matches_diffusers(folder, case):
    variant, mine, arguments = CASES[case]
    size = {"width": 128, "height": 128}
    result = ours(folder(variant), steps=4, **{**size, **mine})
    assert_same_picture(result, theirs(SanaPipeline, folder(variant), num_inference_steps=4, **{**size, **arguments}))


@pytest.mark.parametrize("steps", [1, 2])
def test_sprint_matches_diffusers(folder, steps):
    path = folder("sprint")
    result = ours(path, width=128, height=96, steps=steps, num_images=2)
    intermediate = {"intermediate_timesteps": 1.3 if steps == 2 else None}
    arguments = {"width": 128, "height": 96, "num_inference_steps": steps, "count": 2, **intermediate}
    assert_same_picture(result, theirs(SanaSprintPipeline, path, **arguments))


class NormedPAG(PAGCFGSanaLinearAttnProcessor2_0):
    """diffusers' PAG processor forgets the qk-norm (docs/dialects.md); this oracle has it."""

    def __call__(self, attn, *args, **kwargs):
        q, k = attn.to_q, attn.to_k
        attn.to_q, attn.to_k = torch.nn.Sequential(q, attn.norm_q), torch.nn.Sequential(k, attn.norm_k)
        try:
            return super().__call__(attn, *args, **kwargs)
        finally:
            attn.to_q, attn.to_k = q, k


@pytest.mark.parametrize("variant", ["plain", "qk_norm"])
def test_pag_matches_diffusers(folder, variant):
    class Oracle(SanaPAGPipeline):
        def set_pag_applied_layers(self, layers, pag_attn_processors):
            fixed = (NormedPAG() if variant == "qk_norm" else pag_attn_processors[0], pag_attn_processors[1])
            super().set_pag_applied_layers(layers, fixed)

        @classmethod
        def from_pretrained(cls, path, **kwargs):
            plain = SanaPipeline.from_pretrained(path, **kwargs)
            return cls(**plain.components, pag_applied_layers=["transformer_blocks.1"])

    path, size = folder(variant), {"width": 96, "height": 96}
    expected = theirs(Oracle, path, num_inference_steps=3, pag_scale=2.0, **size)
    assert_same_picture(ours(path, steps=3, pag_scale=2.0, **size), expected)
    without, _ = ours(path, steps=3, **size)
    assert relative_rms(without.latents, expected[0]) > 1e-2


SABOTAGE = {
    "negative prompt swapped": {"negative_prompt": "other"},
    "seed": {"seed": 1},
    "guidance": {"guidance": 4.6},
    "sampler": {"sampler": "flow_euler"},
    "instruction dropped": {"instruction": "none"},
}


@pytest.fixture(scope="module")
def small(folder):
    """Settings, and what diffusers paints with them, for the controls."""
    size = {"width": 64, "height": 64}
    expected = theirs(SanaPipeline, folder("plain"), num_inference_steps=3, **size)
    return {"steps": 3, **size}, expected


@pytest.mark.parametrize("what", [None, *SABOTAGE])
def test_parity_test_can_fail(folder, small, what):
    settings, expected = small
    mine = ours(folder("plain"), **{**settings, **SABOTAGE.get(what, {})})
    if what is None:
        assert_same_picture(mine, expected)
    else:
        with pytest.raises(AssertionError):
            assert_same_picture(mine, expected)


@pytest.fixture(scope="module")
def pipe():
    return sana_model.load("sana-tiny-random", precision="fp32")


SIZE = {"width": 64, "height": 64, "steps": 2}


def test_same_seed_same_bytes_and_no_stale_prompt(pipe):
    first, other, again = (pipe(p, **SIZE) for p in ("a red fox", "a blue whale", "a red fox"))
    assert torch.equal(first.latents, again.latents)
    assert not torch.equal(first.latents, other.latents)
    assert first.images[0].tobytes() == again.images[0].tobytes()


def test_image_i_of_a_batch_is_the_image_of_seed_plus_i(pipe):
    batch = pipe("a red fox", num_images=2, seed=5, **SIZE)
    single = pipe("a red fox", seed=6, **SIZE)
    assert relative_rms(batch.latents[1:], single.latents) < 1e-5
    assert not torch.equal(batch.latents[0], batch.latents[1])


def test_a_progress_callback_cannot_wait_for_its_own_picture(pipe):
    for action in (
        lambda: pipe.set_lora_scale("x", 1.0),
        lambda: pipe("again", **SIZE),
        lambda: sana_kernels.optimize(pipe),
    ):
        with pytest.raises(UserError, match="from a progress callback"):
            pipe("a red fox", progress=lambda *event, act=action: act(), **SIZE)
    assert pipe("a red fox", **SIZE).latents.mul_(2).isfinite().all()  # and it is free again


def test_several_prompts_at_once(pipe):
    both = pipe(["a red fox", "two blue whales in the sea"], **SIZE)
    assert relative_rms(both.latents[:1], pipe("a red fox", **SIZE).latents) < 1e-5


def test_guidance_interval(pipe):
    everywhere = pipe("a red fox", guidance_interval=(0.0, 1.0), **SIZE)
    nowhere = pipe("a red fox", guidance_interval=(2.0, 3.0), **SIZE)
    unguided = pipe("a red fox", guidance=1.0, **SIZE)
    assert relative_rms(nowhere.latents, unguided.latents) < 1e-5
    assert relative_rms(everywhere.latents, unguided.latents) > 1e-2


def test_two_threads(pipe):
    alone = {p: pipe(p, **SIZE).latents for p in ("a red fox", "a blue whale")}
    together = {}
    threads = [threading.Thread(target=lambda p=p: together.update({p: pipe(p, **SIZE).latents})) for p in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[p], together[p]) for p in alone)


def _paint_in_child(pipe, queue):
    queue.put(pipe("a red fox", **SIZE).latents.numpy())


def test_forked_process(pipe):
    expected = pipe("a red fox", **SIZE).latents
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_paint_in_child, args=(pipe, queue))
    child.start()
    latents = torch.from_numpy(queue.get(timeout=60))
    child.join(10)
    assert child.exitcode == 0
    assert relative_rms(latents, expected) < 1e-5


def test_model_that_requires_grad(pipe):
    expected = pipe("a red fox", **SIZE).latents
    pipe.dit.requires_grad_(True)
    try:
        assert torch.equal(pipe("a red fox", **SIZE).latents, expected)
    finally:
        pipe.dit.requires_grad_(False)


def test_timings_and_progress(pipe):
    seen = []
    timings = pipe("a red fox", progress=lambda *event: seen.append(event), **SIZE).timings
    stages = sum(timings[s] for s in ("text_encode", "denoise", "decode", "other"))
    assert abs(stages - timings["total"]) <= 0.02 * timings["total"]
    assert timings["per_step"] == timings["denoise"] / 2
    assert [e for e in seen if e[0] == "denoise"] == [("denoise", i, 2) for i in range(3)]


def test_plan_names_every_op(pipe):
    plan = pipe("a red fox", **SIZE).plan
    ops = {row["op"] for row in plan["rows"] if row["part"] == "dit"}
    assert ops >= {"linear_attention", "modulate", "gate_residual", "cross_attention", "mix_ffn", "gemm"}
    assert 0 < plan["outside_share"] <= 1


def test_backends_paint_the_same_picture():
    images = [
        sana_model.load("sana-tiny-random", backend=b, precision="fp32")("a red fox", **SIZE)
        for b in ("reference", "auto")
    ]
    assert relative_rms(images[1].latents, images[0].latents) < 1e-4


MISTAKES = [
    ({"width": 100}, "multiple of 32; the nearest are 96 and 128"),
    ({"steps": 0}, "steps"),
    ({"steps": 1001}, "at most 1000, not 1001"),
    ({"guidance_interval": (0.8, 0.2)}, r"\(0.8, 0.2\) is none"),
    ({"num_images": 0}, "number of images"),
    ({"seed": -1}, "seed"),
    ({"sampler": "scm"}, "flow_dpm or flow_euler"),
    ({"sampler": "ddim"}, "ddim"),
    ({"colour": 1}, "'colour' is not a setting"),
    ({"binning": True}, "256 px"),
    ({"pag_scale": -1.0}, "PAG"),
    ({"guidance": 1.0, "negative_prompt": "blur"}, "guidance of 1.* reads no negative prompt; leave it empty"),
    ({"guidance": 0.5, "guidance_interval": (0.2, 0.8)}, "guidance of 0.5.* no interval; leave it whole"),
    ({"steps": 2.0}, "steps is a whole number, not 2.0"),
    ({"guidance": float("nan")}, "guidance is a number, not nan"),
    ({"guidance_interval": 0.5}, "guidance_interval is two numbers, not 0.5"),
    ({"negative_prompt": ["blur"]}, r"negative_prompt is a text, not \['blur'\]"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_mistakes_are_one_sentence(pipe, mistake, message):
    with pytest.raises(UserError, match=message):
        pipe("a red fox", **{**SIZE, **mistake})


@pytest.mark.parametrize("mistake", [{"steps": 2000}, {"binning": True}, {"guidance_interval": (1.0, 0.5)}])
def test_mistakes_are_told_before_anything_is_loaded(mistake, monkeypatch):
    monkeypatch.delattr("sana_model.pipeline.load_model")
    with pytest.raises(UserError):
        sana_model.load("sana-tiny", picture={"prompt": "a red fox"} | mistake)


@pytest.mark.parametrize("ignored", [{"negative_prompt": "blur"}, {"guidance_interval": (0.2, 0.8)}])
def test_sprint_refuses_what_is_for_guidance(ignored):
    with pytest.raises(UserError, match=r"sprint.* paints without classifier-free guidance"):
        settings_for(BUILT_IN["sana-sprint-0.6b"], "a red fox", **ignored)
    assert settings_for(BUILT_IN["sana-sprint-0.6b"], "a red fox", negative_prompt="").guidance > 1


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "default device": lambda: torch.device("meta"),  # stands for "cuda": what lands there cannot be computed with
    "default dtype": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("model", ["sana-tiny-random", "sprint"])
@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"precision": "w8a8", "low_memory": True}], ids=str)
def test_what_else_is_set_in_pytorch_changes_nothing(folder, model, options, surroundings):
    """Neither weights nor pictures, the second of which loads the text encoder again where memory is low."""

    def latents():
        painter = sana_model.load(path, **options)
        return [painter(PROMPT, **SIZE).latents for _ in range(2)]

    path = model if model in BUILT_IN else folder(model)
    expected = latents()[0]
    with SURROUNDINGS[surroundings]():
        found = latents()
    assert all(one.dtype == torch.float32 and torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_overflow_is_told_with_what_helps(precision):
    pipe = sana_model.load("sana-tiny-random", backend="reference", precision=precision, decoder_precision=precision)
    helps = "run it with {} bf16 or fp32" if precision == "fp16" else "beyond bf16, most likely of a guidance"
    result = pipe(PROMPT, **SIZE)
    with pytest.raises(UserError, match="picture became NaN.*" + helps.format("--decoder-precision")):
        pipe.decode(result.latents * torch.inf, result.settings)
    pipe.dit.head.weight.data.fill_(torch.inf)
    with pytest.raises(UserError, match="latents became NaN.*" + helps.format("--precision")):
        pipe(PROMPT, **SIZE)


def test_other_devices_are_refused():
    for device in ("meta", "xpu", "fridge"):
        with pytest.raises(UserError, match="use cpu, cuda or cuda:N"):
            sana_model.load("sana-tiny-random", device=device)


def test_numbers_of_numpy_and_pytorch_are_numbers_and_settings_survive_json():
    theirs = {"seed": np.int64(3), "steps": torch.tensor(2), "tiled": np.True_, "guidance_interval": np.array([0, 0.5])}
    settings = settings_for(BUILT_IN["sana-0.6b"], "a fox", **theirs)
    ours = {"seed": 3, "steps": 2, "tiled": True, "guidance_interval": (0.0, 0.5)}
    assert settings == settings_for(BUILT_IN["sana-0.6b"], "a fox", **ours)
    assert settings_for(BUILT_IN["sana-0.6b"], **json.loads(json.dumps(settings.as_json()))) == settings


def test_an_interval_is_one_of_perturbed_attention_guidance_too():
    assert settings_for(BUILT_IN["sana-0.6b"], "a fox", guidance=1.0, pag_scale=1.0, guidance_interval=(0.2, 0.8))


@pytest.mark.parametrize("kwargs", [{"precision": "fp12"}, {"backend": "abacus"}, {"device": "warp"}])
def test_load_mistakes_are_one_sentence(kwargs):
    with pytest.raises(UserError, match=next(iter(kwargs.values()))):
        sana_model.load("sana-tiny-random", **kwargs)


def test_bins_match_the_published_tables():
    from diffusers.image_processor import PixArtImageProcessor
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
    from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN

    tables = (ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN, ASPECT_RATIO_2048_BIN, ASPECT_RATIO_4096_BIN)
    for native, table in zip(NATIVE_SIZES, tables, strict=True):
        assert bins(native) == tuple(sorted((int(h), int(w)) for h, w in table.values()))
        for height, width in ((1000, 1000), (768, 1344), (300, 2000), (2000, 300), (1080, 1920)):
            expected = PixArtImageProcessor.classify_height_width_bin(height, width, table)
            assert nearest_bin(height, width, native) == expected
    image = torch.randn(2, 3, 96, 160)
    assert torch.equal(resize_and_crop(image, 70, 90), PixArtImageProcessor.resize_and_crop_tensor(image, 90, 70))


@pytest.mark.parametrize("native", NATIVE_SIZES)
def test_what_covers_a_size_is_not_a_pixel_short_of_it(native):
    """480 / 832 * 832, say, is 479.99… in floating point."""
    for height, width in {(480, 640), (960, 1280)} | {
        (h, w) for h in range(300, 2200, 97) for w in range(320, 2200, 160)
    }:
        image = torch.empty(1, 3, *nearest_bin(height, width, native), device="meta")
        assert resize_and_crop(image, height, width).shape[2:] == (height, width)
