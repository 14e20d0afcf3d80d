"""LoRA on a DiT of every precision: the same as merged weights, several at once, and gone without a trace."""

import json

import pytest
import torch
from compare import relative_rms
from models import SMALL, SPRINT
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import sana_kernels
import sana_model
from sana_model import cli
from sana_model.errors import UserError
from sana_model.png import read_metadata
from sana_model.quantize.layers import LowRank, QuantizedLinear
from sana_model.weights import interop, keys, lora
from sana_model.weights.random_weights import random_model

ARGUMENTS = {"prompt": "a fox", "steps": 2, "width": 96, "height": 64}
TARGETS = (  # by diffusers' names: parts of fused matrices, 1×1 convolutions, and layers outside of the blocks
    "transformer_blocks.0.attn1.to_k", "transformer_blocks.1.attn1.to_out.0", "transformer_blocks.0.attn2.to_q",
    "transformer_blocks.1.attn2.to_v", "transformer_blocks.0.ff.conv_inverted", "transformer_blocks.1.ff.conv_point",
    "proj_out", "time_embed.linear", "caption_projection.linear_1",
)  # fmt: skip


def draw(
    targets=TARGETS, rank: int = 3, seed: int = 0, config=SMALL.dit
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By layer, factors (r, K) and (N, r) that change it by a good deal."""
    state = keys.to_diffusers(random_model(SMALL, seed=2).dit.state_dict(), config)
    torch.manual_seed(seed)
    shapes = {name: state[f"{name}.weight"].shape for name in targets}
    return {
        name: (torch.randn(rank, K, *tail) * K**-0.5, torch.randn(N, rank, *tail) * 0.2)
        for name, (N, K, *tail) in shapes.items()
    }


def peft(factors: dict) -> dict[str, torch.Tensor]:
    return {
        f"transformer.{name}.lora_{which}.weight": tensor
        for name, pair in factors.items()
        for which, tensor in zip("AB", pair, strict=True)
    }


def kohya(factors: dict, alpha: float) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (down, up) in factors.items():
        own = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{own}.lora_down.weight": down, f"{own}.lora_up.weight": up, f"{own}.alpha": torch.tensor(alpha)}
    return tensors


def write(path, tensors: dict, metadata: dict | None = None):
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def latents(pipe, **arguments) -> torch.Tensor:
    return pipe(**ARGUMENTS | arguments).latents


def buffers(pipe) -> dict[str, torch.Tensor]:
    return dict(pipe.dit.named_buffers()) | dict(pipe.dit.named_parameters())


def merged(saved, factors: list[tuple[dict, float]], **options):
    """A pipeline whose weights are W + s · up · down, added by hand under diffusers' names."""
    pipe = sana_model.load(str(saved), precision="fp32", **options)
    state = keys.to_diffusers(pipe.dit.state_dict(), pipe.config.dit)
    state = {name: tensor.clone() for name, tensor in state.items()}
    for pairs, strength in factors:
        for name, (down, up) in pairs.items():
            weight = state[f"{name}.weight"]
            weight += strength * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    for rule in keys.rules(pipe.config.dit):
        pipe.dit.load_state_dict({rule.ours: keys.join([state[name] for name in rule.diffusers], rule)}, strict=False)
    return pipe


@pytest.mark.parametrize("style", ["peft", "kohya"])
def test_is_the_same_as_merged_weights(saved, tmp_path, style):
    factors, alpha = draw(), 1.5
    tensors = peft(factors) if style == "peft" else kohya(factors, alpha)
    strength = 0.7 * (1 if style == "peft" else alpha / 3)
    file = write(tmp_path / "style.safetensors", tensors)
    pipe = sana_model.load(str(saved), precision="fp32", backend="reference", lora=[f"{file}:0.7"])
    expected = latents(merged(saved, [(factors, strength)], backend="reference"))
    assert relative_rms(latents(pipe), expected) < 1e-5
    assert relative_rms(latents(merged(saved, [], backend="reference")), expected) > 0.05  # control: it does something
    wrong = latents(merged(saved, [(factors, 1.0 if style == "kohya" else 0.35)], backend="reference"))
    assert relative_rms(wrong, expected) > 0.01  # control: strength and alpha count


@pytest.mark.parametrize(
    ("precision", "exact"),
    [("bf16", False), ("w8a8", False), ("w4a8", False), ("w4a4", False), ("w8a8", True), ("w4a4", True)],
)
def test_every_precision_wears_it_and_loses_it_without_a_trace(saved, tmp_path, precision, exact):
    """Beside 16-bit and quantised layers of the CPU's kernels; --exact: beside layers as they are stored."""
    factors = draw()
    file = write(tmp_path / "one.safetensors", peft(factors))
    pipe = sana_model.load(str(saved), precision=precision, backend="cpu", exact=exact)
    before, bytes_before = latents(pipe), {name: tensor.clone() for name, tensor in buffers(pipe).items()}
    name = pipe.add_lora(file, 0.8)
    changed = latents(pipe)
    assert relative_rms(changed, before) > 0.05

    reference = latents(merged(saved, [(factors, 0.8)], backend="reference"))
    plain = latents(merged(saved, [], backend="reference"))
    moved = (changed - before).double(), (reference - plain).double()
    cosine = nn.functional.cosine_similarity(moved[0].flatten(), moved[1].flatten(), dim=0)
    assert cosine > (0.9 if precision in ("bf16", "w8a8") else 0.6)  # the same change, up to the precision's own error

    pipe.remove_lora(name)
    after = buffers(pipe)
    assert after.keys() == bytes_before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in bytes_before.items())
    assert torch.equal(latents(pipe), before)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "w8a8"])
def test_beside_the_mix_ffn_runs_the_kernel_of_the_plan(saved, precision):
    """`mix_ffn` takes no branches: its parts run one by one, none of them in plain PyTorch."""
    plan = sana_model.load(str(saved), precision=precision, backend="cpu").plan
    (row,) = [row for row in plan.rows if row.op == "depthwise_glu"]
    assert row.backend == "cpu" and "only beside low-rank branches" in row.reason
    assert (
        plan.ops("dit").depthwise_glu(torch.randn(1, 6, 8), 2, 3, torch.randn(8, 1, 3, 3), torch.randn(8)).shape[2] == 4
    )
    assert ("dit", "depthwise_glu") in plan.clock.seconds()


@pytest.mark.parametrize("precision", ["bf16", "w4a4"])
def test_what_was_there_before_follows_the_dit_to_its_device(saved, tmp_path, precision):
    """With --low-memory a LoRA is put on before the DiT is on its GPU; here that is "meta", which mixes with no other."""
    pipe = sana_model.load(str(saved), precision=precision, backend="cpu", exact=precision == "w4a4")
    for layer in pipe.dit.modules():
        if precision == "w4a4" and isinstance(layer, QuantizedLinear):
            rows = torch.randn(32, layer.in_features), torch.randn(layer.out_features, 32)
            layer.branch = LowRank(*(tensor.bfloat16() for tensor in rows))
    name = pipe.add_lora(write(tmp_path / "one.safetensors", peft(draw())), 0.8)
    pipe.dit.to("meta")
    pipe.set_lora_scale(name, 0.4)
    assert {tensor.device.type for tensor in buffers(pipe).values()} == {"meta"}
    pipe.remove_lora(name)
    assert {tensor.device.type for tensor in buffers(pipe).values()} == {"meta"}


def test_strength_changes_while_running_and_several_add_up(saved, tmp_path):
    one, two = draw(seed=1), draw(TARGETS[:5], rank=5, seed=2)
    pipe = sana_model.load(str(saved), precision="fp32", backend="reference")
    before = latents(pipe)
    names = [
        pipe.add_lora(write(tmp_path / f"{i}.safetensors", peft(factors))) for i, factors in enumerate((one, two))
    ]  # fmt: skip
    assert names == ["0", "1"]
    for strengths in ((1.0, 1.0), (0.3, -0.5), (0.0, 2.0), (0.3, -0.5)):
        for name, strength in zip(names, strengths, strict=True):
            pipe.set_lora_scale(name, strength)
        expected = latents(merged(saved, list(zip((one, two), strengths, strict=True)), backend="reference"))
        assert relative_rms(latents(pipe), expected) < 1e-5
    pipe.remove_lora("0")  # not in the order in which they came
    assert relative_rms(latents(pipe), latents(merged(saved, [(two, -0.5)], backend="reference"))) < 1e-5
    pipe.remove_lora("1")
    assert torch.equal(latents(pipe), before)


def test_files_of_one_name_get_names_of_their_own(saved, tmp_path):
    """diffusers calls every LoRA pytorch_lora_weights.safetensors: one folder each, all on one command line."""
    files, expected = [], []
    for i, folder in enumerate(("fox", "owl", "map/owl", "")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        name = "pytorch_lora_weights.safetensors" if folder else "style.safetensors"
        expected.append((draw(seed=i), 0.25 * (i + 1)))
        files.append(f"{write(tmp_path / folder / name, peft(expected[-1][0]))}:{expected[-1][1]}")
    pipe = sana_model.load(str(saved), precision="fp32", backend="reference", lora=files)
    assert pipe.loras.strengths == {"fox": 0.25, "owl": 0.5, "owl-2": 0.75, "style": 1.0}
    assert relative_rms(latents(pipe), latents(merged(saved, expected, backend="reference"))) < 1e-5
    pipe.remove_lora("owl-2")
    del expected[2]
    assert relative_rms(latents(pipe), latents(merged(saved, expected, backend="reference"))) < 1e-5


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a/x.safetensors", "b/y.safetensors"], ["x", "y"]),
        (["a/w.safetensors", "b/w.safetensors", "b/a.safetensors"], ["a", "b", "a-2"]),
        (["a/w.safetensors", "b/a/w.safetensors", "c/a/w.safetensors"], ["a", "a-2", "a-3"]),
        (["/w.safetensors", "/w/w.safetensors"], ["w", "w-2"]),
        ([], []),
    ],
)
def test_names(files, names):
    assert lora.names_of([lora.Path(file) for file in files]) == names


def test_a_file_that_is_given_twice_is_refused(saved, tmp_path):
    """Its strength would double without a word."""
    file = write(tmp_path / "one.safetensors", peft(draw()))
    (tmp_path / "again.safetensors").symlink_to(file)
    (tmp_path / "folder").mkdir()
    for other in ("one.safetensors:0.5", "folder/../one.safetensors", "again.safetensors"):
        with pytest.raises(UserError, match="is given twice; a LoRA is added once, and FILE:STRENGTH"):
            sana_model.load(str(saved), precision="fp32", lora=[str(file), f"{tmp_path}/{other}"])


def test_a_quantised_branch_grows_and_shrinks(saved, tmp_path):
    """Where SVDQuant has a branch already, the factors are appended to its own."""
    from quantized_folders import quantized_folder

    folder = quantized_folder(saved, tmp_path / "q", "w4a4", rank=4)
    file = write(tmp_path / "one.safetensors", peft(draw(rank=40)))
    pipe = sana_model.load(str(folder), backend="cpu")
    before, layer = latents(pipe), pipe.dit.blocks[0].mix_ffn.expand
    own = layer.branch
    pipe.add_lora(file, 0.8)
    assert [2 * branch.up.shape[1] for branch in (own, layer.branch)] == [32, 96]  # 4 and 32 + 40, in whole steps
    exact = sana_model.load(str(folder), backend="reference", lora=[f"{file}:0.8"])
    assert relative_rms(latents(pipe), latents(exact)) < relative_rms(before, latents(exact))
    pipe.remove_lora("one")
    assert torch.equal(latents(pipe), before) and layer.branch is own


@pytest.mark.parametrize(
    ("config", "alpha"), [({}, 3.0), ({"lora_alpha": 6}, 6.0), ({"lora_alpha": 2, "use_rslora": True}, 2 * 3**0.5)]
)
def test_alpha_of_diffusers_and_peft_stands_in_the_metadata(tmp_path, config, alpha):
    factors = draw(TARGETS[:1])
    metadata = {f"transformer.{key}": value for key, value in config.items()}
    file = write(tmp_path / "a.safetensors", peft(factors), {"lora_adapter_metadata": json.dumps(metadata)})
    ((_, down, up),) = lora.read(file, SMALL.dit).factors
    assert torch.equal(down, factors[TARGETS[0]][0]) and relative_rms(up, factors[TARGETS[0]][1] * alpha / 3) < 1e-6
    folder = tmp_path / "adapter"
    folder.mkdir()
    write(folder / "adapter_model.safetensors", {f"base_model.model.{k[12:]}": v for k, v in peft(factors).items()})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ((_, _, other),) = lora.read(folder / "adapter_model.safetensors", SMALL.dit).factors
    assert torch.equal(other, up)


def test_original_names_are_known_and_qkv_is_one(tmp_path):
    down, up = torch.randn(2, 256), torch.randn(3 * 256, 2)
    names = {"blocks.1.attn.qkv.lora_A.weight": down, "blocks.1.attn.qkv.lora_B.weight": up}
    ((target, _, _),) = lora.read(write(tmp_path / "o.safetensors", names), SMALL.dit).factors
    assert (target.layer, target.first, target.rows, target.inputs) == ("blocks.1.attention.qkv", 0, 768, 256)
    sprint = lora._targets(SPRINT.dit)
    assert sprint["time_embed_guidance_embedder_linear_1"].layer == "guidance_embed.linear_1"


def test_parity_with_diffusers_and_peft(tmp_path):
    """Their own LoRA layers on their own transformer, saved by their own code."""
    pytest.importorskip("peft")
    from peft import LoraConfig

    pipe = interop.diffusers_pipeline(random_model(SMALL, seed=2))
    targets = ["to_k", "to_out.0", "conv_inverted", "linear_1"]
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights="gaussian"))
    torch.manual_seed(5)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    pipe.transformer.save_lora_adapter(tmp_path, weight_name="theirs.safetensors")
    latents, caption, time = torch.randn(2, 32, 4, 6), torch.randn(2, 5, 256), torch.tensor([500.0, 500.0])
    dit = random_model(SMALL, seed=2).dit
    with torch.no_grad():
        expected, before = pipe.transformer(latents, caption, time).sample, dit(latents, time, caption)
        lora.Loras(dit, "reference").add(lora.read(tmp_path / "theirs.safetensors", SMALL.dit))
        assert relative_rms(dit(latents, time, caption), expected) < 1e-5 < 1e-2 < relative_rms(before, expected)


def test_a_picture_names_its_loras_and_is_painted_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "fox.safetensors", peft(draw()))
    model = ["--model", "sana-tiny-random", "--precision", "w4a8", "--exact", "--backend", "cpu"]
    asked = [*model, "--steps", "1", "--size", "64", "--lora", "fox.safetensors:0.7"]
    assert cli.main(["generate", "a fox", *asked, "-o", "one.png"]) == 0
    recorded = read_metadata("one.png")
    assert recorded.lora == ("fox.safetensors:0.7",) and recorded.exact and recorded.precision == "w4a8"
    assert cli.main(["generate", "--from", "one.png", "-o", "two.png"]) == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert cli.main(["generate", "--from", "one.png", "--lora", "fox.safetensors:0.6", "-o", "three.png"]) == 0
    pixels = [Image.open(f"{name}.png").tobytes() for name in ("one", "three")]
    assert pixels[0] != pixels[1]


GOOD = peft(draw(TARGETS[:1]))
A, B = GOOD


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({A: GOOD[A]}, "the up factor that belongs to transformer.*lora_A.weight is missing"),
        (GOOD | {"text_encoder.q_proj.lora_A.weight": GOOD[A]}, "text_encoder.q_proj.*belongs to no linear layer"),
        (GOOD | {A.replace("lora_A", "lokr_w1"): GOOD[A]}, "lokr_w1.weight is no LoRA factor; known are lora_A"),
        ({A: GOOD[A], B: GOOD[B][:100]}, r"\(100, 3\) do not fit the layer's 256 × 256; it was trained for another"),
        ({A: GOOD[A][:, :100], B: GOOD[B]}, r"\(3, 100\).* do not fit the layer's"),
        ({A: GOOD[A] * float("nan"), B: GOOD[B]}, "holds NaN or infinite values"),
        ({A: GOOD[A][0], B: GOOD[B]}, "has shape .256,.; a factor is a matrix"),
        (
            {k.replace("attn1.to_k", "ff.conv_depth"): v for k, v in GOOD.items()},
            "conv_depth.lora_A.weight belongs to no linear layer of this DiT",
        ),
        ({}, "holds no tensors"),
        ({A: GOOD[A][:0], B: GOOD[B][:, :0]}, r"\(0, 256\).* do not fit the layer's"),
        (GOOD | {A.replace("lora_A.weight", "alpha"): torch.ones(3)}, r"alpha has shape \(3,\); it is one number"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, tensors, complaint):
    with pytest.raises(UserError, match=complaint) as raised:
        lora.read(write(tmp_path / "bad.safetensors", tensors), SMALL.dit)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "metadata",
    ['{"transformer.lora_alpha": "x"}', '{"transformer.alpha_pattern": {"(": 1}}', '{"transformer.alpha_pattern": [1]}',
     "[" * 100_000, "[]"],
)  # fmt: skip
def test_metadata_that_cannot_be_read_is_one_sentence(tmp_path, metadata):
    file = write(tmp_path / "bad.safetensors", GOOD, {"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match="metadata cannot be read") as raised:
        lora.read(file, SMALL.dit)
    assert "\n" not in str(raised.value)


def test_mistakes_in_using_one(saved, tmp_path):
    file = write(tmp_path / "one.safetensors", GOOD)
    with pytest.raises(UserError, match=r"one\.bin: LoRA files are safetensors"):
        sana_model.load(str(saved), lora=[str(tmp_path / "one.bin")])
    pipe = sana_model.load(str(saved), backend="cpu")
    with pytest.raises(UserError, match="no LoRA is called one; there is none"):
        pipe.set_lora_scale("one", 1.0)
    pipe.add_lora(file)
    with pytest.raises(UserError, match="a LoRA called one is there already"):
        pipe.add_lora(file)
    with pytest.raises(UserError, match="must be a number, not nan"):
        pipe.set_lora_scale("one", float("nan"))
    with pytest.raises(UserError, match="wears a LoRA; take it off first"):
        sana_kernels.optimize(pipe, "w8a8")
    with pytest.raises(UserError, match=r"b\.safetensors:x: the strength of a LoRA must be a number, not 'x'"):
        lora.parse("b.safetensors:x")
    assert lora.parse("a/b.safetensors:-0.5") == (lora.Path("a/b.safetensors"), -0.5)
    assert lora.parse("C:/b.safetensors") == (lora.Path("C:/b.safetensors"), 1.0)
