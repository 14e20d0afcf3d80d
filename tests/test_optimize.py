"""sana_kernels.optimize on diffusers' pipelines and on ours: the same pictures, in every mode, and back again."""

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import accelerate.hooks
import diffusers.hooks
import pytest
import torch
from compare import relative_rms
from diffusers import SanaPAGPipeline, SanaPipeline, SanaSprintPipeline, SanaTransformer2DModel
from diffusers.models.attention_processor import PAGCFGSanaLinearAttnProcessor2_0
from safetensors.torch import save_file

import sana_kernels
import sana_model
from sana_model.config import BUILT_IN, SchedulerConfig
from sana_model.errors import MissingError, UserError
from sana_model.plan import OpClock
from sana_model.weights.interop import diffusers_pipeline
from sana_model.weights.random_weights import random_model

TINY = BUILT_IN["sana-tiny-random"]
SMALL = replace(TINY, dit=replace(TINY.dit, layers=3))
SPRINT = replace(
    SMALL, dit=replace(SMALL.dit, qk_norm=True, guidance_embeds=True), scheduler=SchedulerConfig(kind="scm"), steps=2
)
LIMITS = {"fp32": 1e-5, "bf16": 0.04, "w8a8": 0.11}  # relative RMS after three steps of random weights


@pytest.fixture(scope="module")
def components() -> dict:
    return diffusers_pipeline(random_model(SMALL, seed=1, dtype=torch.float32)).components


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe, prompt: str = "a fox", **arguments) -> torch.Tensor:
    defaults = {
        "num_inference_steps": 2 if isinstance(pipe, SanaSprintPipeline) else 3, "height": 96, "width": 64,
        "output_type": "latent", "max_sequence_length": 64, "complex_human_instruction": None,
        "use_resolution_binning": False,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt=prompt, generator=generator, **defaults | arguments).images


@pytest.mark.parametrize("arguments", [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}], ids=str)
@pytest.mark.parametrize("precision", [*LIMITS, "w4a8"])
def test_paints_what_diffusers_paints(components, precision, arguments, capsys):
    pipe = quiet(SanaPipeline(**components))
    expected = paint(pipe, **arguments)
    plan = sana_kernels.optimize(pipe, precision)
    assert str(plan) in capsys.readouterr().out and "linear_attention  cpu" in str(plan)
    try:
        found = paint(pipe, **arguments)
    finally:
        sana_kernels.restore(pipe)
    assert 0 < relative_rms(found, expected) <= LIMITS.get(precision, 0.4)  # 4 bits, rounded to nearest: other pictures
    assert torch.equal(paint(pipe, **arguments), expected)


@pytest.mark.parametrize("precision", LIMITS)
def test_the_comparison_notices_one_transposed_grid(components, precision):
    pipe = quiet(SanaPipeline(**components))
    expected = paint(pipe)
    sana_kernels.optimize(pipe, precision)
    try:
        block = pipe.transformer.forward.dit.blocks[1].mix_ffn
        forward = block.forward
        block.forward = lambda x, grid, *rest: forward(x, grid[::-1], *rest)
        assert relative_rms(paint(pipe), expected) > LIMITS[precision]
    finally:
        sana_kernels.restore(pipe)


def test_a_second_prompt_in_the_same_buffer(components):
    """Keys and values belong to the caption that they were made of, not to the tensor that held it."""
    pipe = quiet(SanaPipeline(**components))
    transformer = pipe.transformer
    latents, time = torch.randn(1, 32, 3, 2), torch.tensor([500.0])
    caption, mask = torch.randn(1, 9, 256), torch.tensor([[1] * 6 + [0] * 3])
    captions = caption.clone(), torch.randn(1, 9, 256)
    expected = [transformer(latents, c, time, encoder_attention_mask=mask).sample for c in captions]
    sana_kernels.optimize(pipe, "fp32")
    try:
        for content, reference in zip(captions, expected, strict=True):
            caption.copy_(content)
            assert (
                relative_rms(transformer(latents, caption, time, encoder_attention_mask=mask).sample, reference) < 1e-5
            )
        shorter = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 0, 0]])  # the mask counts as well, and need not be a prefix
        found = transformer(latents, caption, time, encoder_attention_mask=shorter, return_dict=False)[0]
    finally:
        sana_kernels.restore(pipe)
    reference = transformer(latents, caption, time, encoder_attention_mask=shorter).sample
    assert relative_rms(found, reference) < 1e-5 < relative_rms(expected[1], reference)


def test_perturbed_attention_guidance(components):
    pipe = quiet(SanaPAGPipeline(**components, pag_applied_layers=["transformer_blocks.1"]))
    arguments = {"pag_scale": 2.0}
    expected, without = paint(pipe, **arguments), paint(pipe, pag_scale=0.0)
    unguided = paint(pipe, **arguments, guidance_scale=1.0)
    assert PAGCFGSanaLinearAttnProcessor2_0.__name__ in {type(p).__name__ for p in pipe._pag_attn_processors}
    sana_kernels.optimize(pipe, "fp32")
    try:
        assert relative_rms(paint(pipe, **arguments), expected) < 1e-5 < 1e-2 < relative_rms(without, expected)
        assert relative_rms(paint(pipe, **arguments, guidance_scale=1.0), unguided) < 1e-5
    finally:
        sana_kernels.restore(pipe)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sprint(precision):
    pipe = quiet(diffusers_pipeline(random_model(SPRINT, seed=1, dtype=torch.float32)))
    expected = paint(pipe)
    sana_kernels.optimize(pipe, precision)
    assert relative_rms(paint(pipe), expected) <= LIMITS[precision]


@pytest.mark.parametrize("name", ["Sana_600M_512px_diffusers", "Sana_1600M_1024px_BF16_diffusers"])
def test_what_was_trained_in_fp16_is_clamped_in_every_precision(name, tmp_path):
    """Their self-attention leaves fp16's range, which clipped it; diffusers clips in fp16 only."""
    pipe = diffusers_pipeline(random_model(SMALL, seed=1, dtype=torch.float32))
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn1.to_out[0].weight.mul_(1e6)
    pipe.save_pretrained(tmp_path / name)
    loaded = quiet(SanaPipeline.from_pretrained(tmp_path / name))
    unclamped = paint(loaded)
    out = loaded.transformer.transformer_blocks[0].attn1.to_out[0]
    hook = out.register_forward_hook(lambda _module, _inputs, y: y.clamp(-65504, 65504))
    clamped = paint(loaded)
    hook.remove()
    assert relative_rms(clamped, unclamped) > 1e-2
    for pipe in (loaded, quiet(SanaPipeline(**loaded.components))):  # which knows the name from the transformer alone
        sana_kernels.optimize(pipe, "fp32")
        try:
            assert relative_rms(paint(pipe), unclamped if "BF16" in name else clamped) < 1e-4
        finally:
            sana_kernels.restore(pipe)


@pytest.mark.parametrize(
    "name",
    [
        "Efficient-Large-Model/Sana_600M_1024px_diffusers", r"C:\models\Sana_600M_1024px_diffusers\transformer",
        "/cache/models--Efficient-Large-Model--Sana_600M_1024px_diffusers/snapshots/0123/transformer",
    ],
)  # fmt: skip
def test_a_checkpoint_is_known_wherever_it_lies(name):
    pipe = quiet(diffusers_pipeline(random_model(SMALL, seed=1)))
    for owner in (pipe.transformer, pipe):
        owner.register_to_config(_name_or_path=name)
        sana_kernels.optimize(pipe)
        assert pipe.transformer.forward.dit.config.clamp
        owner.register_to_config(_name_or_path=None)
    sana_kernels.optimize(pipe)
    assert not pipe.transformer.forward.dit.config.clamp


@pytest.mark.parametrize(
    ("name", "clamp"), [("mine", True), ("Sana_600M_512px_diffusers", False), ("Sana_600M_512px", None)]
)
def test_a_folder_of_ours_says_itself_whether_it_is_clamped(name, clamp, tmp_path):
    """As in `load`: what sana.json says counts for more than what the folder is called."""
    folder = tmp_path / name
    diffusers_pipeline(random_model(SMALL, seed=1)).save_pretrained(folder)
    if clamp is not None:
        (folder / "sana.json").write_text(json.dumps({"clamp": clamp}))
    pipe = quiet(SanaPipeline.from_pretrained(folder))
    assert pipe.transformer.config._name_or_path == str(folder / "transformer")
    alone = SanaPipeline(
        **pipe.components | {"transformer": SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer")}
    )
    for one in (pipe, alone):
        sana_kernels.optimize(one)
        assert one.transformer.forward.dit.config.clamp is (name.startswith("Sana") if clamp is None else clamp)
        sana_kernels.restore(one)
    (folder / "sana.json").write_text(json.dumps({"clamp": "yes"}))
    with pytest.raises(UserError, match=r"sana\.json: clamp is \"yes\"; it must be of type bool"):
        sana_kernels.optimize(pipe)


def test_our_own_pipeline():
    pipe = sana_model.load("sana-tiny-random", backend="reference")
    arguments = {"prompt": "a fox", "steps": 2, "width": 64, "height": 64}
    before = pipe(**arguments)
    plan = sana_kernels.optimize(pipe, "w8a8", backend="cpu")
    assert plan is pipe.plan and "mix_ffn           cpu        w8a8" in str(plan)
    quantised = pipe(**arguments)
    assert 0 < relative_rms(quantised.latents, before.latents) < 0.3
    sana_kernels.optimize(pipe, "bf16", backend="cpu")
    assert 0 < relative_rms(pipe(**arguments).latents, before.latents) < 0.1
    sana_kernels.restore(pipe)
    after = pipe(**arguments)
    assert torch.equal(after.latents, before.latents) and after.plan["backend"] == "reference"
    with pytest.raises(UserError, match=r"in bf16, from which fp32 cannot be made; load it with precision='fp32'"):
        sana_kernels.optimize(pipe, "fp32")


def test_one_clock_times_all_parts_of_our_own_pipeline():
    """It is reset before every picture: a clock of the decoder alone would count on and, on a GPU, keep all its events."""
    pipe = sana_model.load("sana-tiny-random", backend="cpu")
    decoder, dit = ("autoencoder", "conv2d"), ("dit", "modulate")
    for change in (lambda pipe: sana_kernels.optimize(pipe, "w8a8", backend="cpu"), sana_kernels.restore):
        change(pipe)
        pipe("a fox", steps=1, width=64, height=64)
        assert {decoder, dit} <= pipe.plan.clock.seconds().keys()


def test_a_lora_goes_on_the_dit_that_paints(tmp_path):
    file, dit = tmp_path / "style.safetensors", TINY.dit
    factors = {"A": torch.randn(2, dit.hidden) * dit.hidden**-0.5, "B": torch.randn(2 * dit.ffn, 2) * 0.5}
    save_file({f"transformer_blocks.0.ff.conv_inverted.lora_{x}.weight": t for x, t in factors.items()}, file)
    pipe = sana_model.load("sana-tiny-random", backend="cpu")
    arguments = {"prompt": "a fox", "steps": 1, "width": 64, "height": 64}
    loaded = pipe(**arguments).latents
    sana_kernels.optimize(pipe, "w8a8", backend="cpu")
    before = pipe(**arguments).latents
    name = pipe.add_lora(file)
    assert relative_rms(pipe(**arguments).latents, before) > 1e-2
    for refused in (sana_kernels.optimize, sana_kernels.restore):
        with pytest.raises(UserError, match=r"wears a LoRA; take it off first: pipe\.remove_lora"):
            refused(pipe)
    pipe.remove_lora(name)
    assert torch.equal(pipe(**arguments).latents, before)
    sana_kernels.restore(pipe)
    assert torch.equal(pipe(**arguments).latents, loaded)
    pipe.add_lora(file)
    assert relative_rms(pipe(**arguments).latents, loaded) > 1e-2


def test_no_clock_runs_for_users_of_diffusers(components, monkeypatch):
    """Nobody would reset it, and on a GPU it keeps two events of every op."""
    pipe = quiet(SanaPipeline(**components))
    wrapped = []
    monkeypatch.setattr(OpClock, "wrap", lambda clock, key, run: wrapped.append(key) or run)
    sana_kernels.optimize(pipe, "bf16")
    sana_kernels.restore(pipe)
    assert not wrapped


def test_mistakes_are_sentences(components):
    pipe = quiet(SanaPipeline(**components))
    with pytest.raises(UserError, match="not optimised: there is nothing to restore"):
        sana_kernels.restore(pipe)
    with pytest.raises(UserError, match=r"takes a pipeline with a SanaTransformer2DModel.*not a dict"):
        sana_kernels.optimize({})
    with pytest.raises(UserError, match="precision 'int3' is not known"):
        sana_kernels.optimize(pipe, "int3")
    with pytest.raises(MissingError, match="no kernel of backend 'reference' can run any"):
        sana_kernels.optimize(pipe, "bf16", backend="reference")
    assert "forward" not in pipe.transformer.__dict__  # nothing is half replaced
    sana_kernels.optimize(pipe, "fp32")
    first = pipe.transformer.forward
    try:
        with pytest.raises(UserError, match="'int3' is not known"):
            sana_kernels.optimize(pipe, "int3")
        assert pipe.transformer.forward is first  # a call that fails changes nothing
        with pytest.raises(UserError, match=r"takes no controlnet_block_samples; sana_kernels\.restore"):
            pipe.transformer(
                torch.zeros(1, 32, 2, 2), torch.zeros(1, 4, 256), torch.zeros(1), controlnet_block_samples=()
            )
    finally:
        sana_kernels.restore(pipe)


def test_a_transformer_that_changes_asks_for_another_call():
    pipe = quiet(diffusers_pipeline(random_model(SMALL, seed=1, dtype=torch.float32)))
    sana_kernels.optimize(pipe, "w8a8")
    before = paint(pipe)
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn1.to_v.weight.mul_(2)
    with pytest.raises(UserError, match=r"has changed since it was optimised; call sana_kernels\.optimize"):
        paint(pipe)
    sana_kernels.optimize(pipe, "w8a8")
    assert relative_rms(paint(pipe), before) > 1e-3

    class Own:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    pipe.transformer.transformer_blocks[0].attn1.processor = Own()
    with pytest.raises(UserError, match="does not know the attention processor Own"):
        paint(pipe)


def _accelerate(transformer):
    """A hook as offloading adds it, and how to remove it."""
    accelerate.hooks.add_hook_to_module(transformer, accelerate.hooks.ModelHook())
    return functools.partial(accelerate.hooks.remove_hook_from_module, transformer)


def _diffusers(transformer):
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(transformer)
    registry.register_hook(diffusers.hooks.ModelHook(), "mine")
    return functools.partial(registry.remove_hook, "mine")


@pytest.mark.parametrize("hook", [_accelerate, _diffusers])
def test_hooks_are_refused_until_they_are_removed(hook):
    """Removed, they leave the transformer's own forward behind, as an attribute of the object."""
    pipe = quiet(diffusers_pipeline(random_model(SMALL, seed=1, dtype=torch.float32)))
    expected = paint(pipe)
    remove = hook(pipe.transformer)
    with pytest.raises(UserError, match="hook"):
        sana_kernels.optimize(pipe, "fp32")
    with pytest.raises(UserError, match="replaced, by a hook"):
        sana_kernels.restore(pipe)
    remove()
    with pytest.raises(UserError, match="not optimised"):
        sana_kernels.restore(pipe)
    sana_kernels.optimize(pipe, "fp32")
    assert relative_rms(paint(pipe), expected) < 1e-3
    sana_kernels.restore(pipe)
    assert torch.equal(paint(pipe), expected)


def test_attention_that_somebody_else_computes_is_refused():
    """Also diffusers' own where it does not belong, and what only has its name."""
    pipe = quiet(diffusers_pipeline(random_model(SMALL, seed=1, dtype=torch.float32)))
    attention = pipe.transformer.transformer_blocks[0].attn1
    linear, softmax = attention.processor, pipe.transformer.transformer_blocks[0].attn2.processor
    for other in (softmax, type(type(linear).__name__, (type(linear),), {"__module__": "mine"})()):
        attention.processor = other
        with pytest.raises(UserError, match="where diffusers has SanaLinearAttnProcessor2_0"):
            sana_kernels.optimize(pipe, "fp32")
    attention.processor = linear
    sana_kernels.optimize(pipe, "fp32")


def test_a_forward_that_somebody_else_replaced_is_not_lost():
    pipe = quiet(diffusers_pipeline(random_model(SMALL, seed=1, dtype=torch.float32)))
    transformer = pipe.transformer
    transformer.forward = theirs = functools.partial(type(transformer).forward, transformer)
    with pytest.raises(UserError, match="forward has been replaced"):
        sana_kernels.optimize(pipe, "fp32")
    assert transformer.forward is theirs
    del transformer.forward
    sana_kernels.optimize(pipe, "fp32")
    ours = transformer.forward
    transformer.forward = lambda *args, **kwargs: ours(*args, **kwargs)  # as hooks do
    with pytest.raises(UserError, match="forward has been replaced"):
        sana_kernels.restore(pipe)
    transformer.forward = ours
    sana_kernels.restore(pipe)


def test_autocast_and_default_dtypes_change_nothing(components):
    """The plan says what is computed in what, and the schedule's numbers are fp32's."""
    pipe = quiet(SanaPipeline(**components))
    sana_kernels.optimize(pipe, "fp32")
    try:
        given = torch.randn(2, 32, 3, 2), torch.randn(2, 4, 256), torch.tensor([900.0, 500.0])
        expected = pipe.transformer(*given, return_dict=False)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(pipe.transformer(*given, return_dict=False)[0], expected)
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(pipe.transformer(*given, return_dict=False)[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)
        sana_kernels.restore(pipe)


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_the_last_norm_has_an_epsilon_of_its_own(eps):
    config = {"attention_head_dim": 32, "num_attention_heads": 2, "num_cross_attention_heads": 2, "num_layers": 1}
    config |= {"cross_attention_head_dim": 32, "cross_attention_dim": 64, "caption_channels": 48, "sample_size": 4}
    transformer = SanaTransformer2DModel(**config, norm_eps=eps).eval().requires_grad_(False)
    pipe = SimpleNamespace(transformer=transformer)
    given = 0.02 * torch.randn(1, 32, 4, 4), torch.randn(1, 5, 48), torch.tensor([3.0])
    expected = transformer(*given, return_dict=False)[0]
    sana_kernels.optimize(pipe, "fp32")
    assert relative_rms(transformer(*given, return_dict=False)[0], expected) < 3e-6


def lora_file(folder, scale: float):
    """A LoRA of one layer, as PEFT writes them."""
    torch.manual_seed(4)
    factors = {"A": torch.randn(2, 256) / 16, "B": torch.randn(256, 2) * scale}
    name = "transformer.transformer_blocks.1.attn1.to_q"
    save_file({f"{name}.lora_{x}.weight": t for x, t in factors.items()}, folder / "style.safetensors")
    return folder


def test_a_lora_that_is_worn_has_to_be_fused_and_unloaded(tmp_path):
    """As the error says; and what is fused afterwards is noticed, though PEFT hides it from autograd's counters."""
    pytest.importorskip("peft")
    pipe = quiet(diffusers_pipeline(random_model(SMALL, seed=1)))
    pipe.load_lora_weights(lora_file(tmp_path, 0.5), weight_name="style.safetensors")
    advice = r"a LoRA has to be fused first: pipe\.fuse_lora\(\); pipe\.unload_lora_weights\(\)"
    with pytest.raises(UserError, match=advice):
        sana_kernels.optimize(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    expected = paint(pipe)
    sana_kernels.optimize(pipe)
    assert relative_rms(paint(pipe), expected) <= LIMITS["bf16"]

    pipe.load_lora_weights(lora_file(tmp_path, 0.01), weight_name="style.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with pytest.raises(UserError, match=r"has changed since it was optimised; call sana_kernels\.optimize"):
        paint(pipe)
    sana_kernels.optimize(pipe)
    paint(pipe)
