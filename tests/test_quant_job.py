"""`sana quantize` from end to end on small models: what it writes, that it goes on after a kill, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from capture import Recorder
from compare import psnr, relative_rms
from full_disk import full_disk
from models import SMALL, SPRINT
from PIL import Image
from safetensors.torch import load_file, save_file

from sana_kernels.quant import calibration, checkpoint
from sana_kernels.quant.layer import round_to_nearest
from sana_kernels.quant.svdquant import Recipe, quantize_layer, sqnr_db
from sana_model.cli import main
from sana_model.commands.quantize import PROMPTS, read_prompts, summary
from sana_model.dit import DiT
from sana_model.errors import UserError
from sana_model.graph import Graphs
from sana_model.pipeline import Pipeline, load
from sana_model.plan import resolve
from sana_model.quantize.job import Job
from sana_model.quantize.model import Progress, _layer, fingerprint, quantize
from sana_model.settings import dtypes_of, precisions_for
from sana_model.text_encoder import TextEncoder
from sana_model.weights.models import convert, find, load_model
from sana_model.weights.random_weights import random_model
from sana_model.weights.saving import save_diffusers

CPU = torch.device("cpu")
FILE = f"transformer/{checkpoint.FILE}"
QUICK = {"prompts": ("a fox", "an owl in the rain"), "samples": 2, "steps": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


def shapes(kind, config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in kind(config).state_dict().items()}


def opened(folder: Path, config) -> checkpoint.Checkpoint:
    return checkpoint.load(folder / FILE, "dit", shapes(DiT, config.dit))


# ------------------------------------------------------------------------------------------------ calibration


@pytest.fixture(scope="module")
def pipeline(model) -> Pipeline:
    precisions = precisions_for("fp32")
    return Pipeline(
        model, resolve(model.config, "reference", CPU, precisions), CPU, dtypes_of(precisions), low_memory=False
    )


def test_calibration_sees_what_every_layer_reads(pipeline, model, tmp_path):
    seen = {}
    with calibration.observed(model.dit, lambda name, x: seen.setdefault(name, []).append(x.clone())):
        captions = pipeline.encode(pipeline.settings(["a fox"], steps=2))
        pipeline.denoise(pipeline.settings("a fox", steps=2), captions)
    inputs = calibration.calibrate(pipeline, ["a fox"], 1, 2, rows=12)
    names = [name for name, layer in model.dit.named_modules() if name.startswith("blocks.") and hasattr(layer, "bias")]
    assert set(inputs) == {name for name in names if not name.endswith("depthwise")} == set(seen)
    for name, found in inputs.items():
        rows = torch.cat([x.flatten(0, -2) for x in seen[name]])
        assert torch.equal(found.absmax, rows.abs().amax(0))
        assert len(found.rows) == (12 if not name.endswith(".kv") else 6)
        assert all((rows == row).all(1).any() for row in found.rows)
    folder = tmp_path / "inputs"
    folder.mkdir()
    assert calibration.read(folder) is None
    filed = calibration.calibrate(pipeline, ["a fox"], 1, 2, rows=12, folder=folder)
    for name, found in calibration.read(folder).items():
        assert torch.equal(found.rows, inputs[name].rows) and torch.equal(filed[name].absmax, inputs[name].absmax)
    with pytest.raises(ValueError, match="at least one prompt"):
        calibration.calibrate(pipeline, [], 1, 2)


def test_observing_changes_nothing(pipeline, model):
    settings = pipeline.settings("a fox", steps=2)
    captions = pipeline.encode(settings)
    plain, ops = pipeline.denoise(settings, captions), model.dit.ops
    with calibration.observed(model.dit, lambda name, x: None):
        watched = pipeline.denoise(settings, captions)
    assert model.dit.ops is ops and torch.allclose(plain, watched, atol=1e-3)
    layer, seen = torch.nn.Linear(3, 4), []
    with calibration.observed_linear(torch.nn.Sequential(layer), lambda name, x: seen.append((name, x))):
        layer(torch.ones(2, 3))
    layer(torch.ones(2, 3))
    assert len(seen) == 1 and seen[0][0] == "0"


def test_calibration_sees_every_step_where_steps_run_in_a_graph(pipeline, monkeypatch):
    """As on a GPU, whose graphs repeat launches and call no Python; afterwards pictures are painted in graphs again."""
    recorder = Recorder()
    expected = calibration.calibrate(pipeline, ["a fox"], 2, 2)
    monkeypatch.setattr(pipeline.plan, "eager", None)
    monkeypatch.setattr(pipeline, "graphs", Graphs(10**12, capture=recorder))
    found = calibration.calibrate(pipeline, ["a fox"], 2, 2)
    assert recorder.captures == 0 and pipeline.plan.eager is None
    for name, inputs in expected.items():
        assert torch.equal(found[name].rows, inputs.rows) and torch.equal(found[name].absmax, inputs.absmax)

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate(pipeline, ["a fox"], 1, 1, progress=interrupted)
    assert pipeline.plan.eager is None


def test_any_seed_draws_tokens():
    x, found = torch.arange(64.0)[:, None], {}
    for seed in (0, 1, 20261121152714, 2**63 - 1):
        collector = calibration.Collector(8, seed=seed)
        collector.observe("layer", x)
        found[seed] = tuple(collector.finish()["layer"].rows.flatten().tolist())
    assert len(set(found.values())) == len(found)


# ------------------------------------------------------------------------------------------------ the result


def test_every_layer_as_the_table_says(saved, tmp_path):
    job = Job(str(saved), "w4a4", text_precision="w4a16", rank=8, **QUICK)
    plan = quantize(job, tmp_path / "q")
    found = opened(tmp_path / "q", SMALL)
    assert found.header.method == "svdquant" and found.header.source == fingerprint(find(saved), "dit")
    assert found.header.calibration["samples"] == 2
    kinds = {name.split(".", 2)[2]: (i.format, i.activations, i.rank) for name, i in found.header.layers.items()}
    main_layers = ("attention.qkv", "attention.out", "cross_attention.q", "cross_attention.out", "mix_ffn.expand")
    assert kinds == dict.fromkeys((*main_layers, "mix_ffn.project"), ("int4", "int4", 8)) | {
        "cross_attention.kv": ("int8", "16bit", 0)
    }
    text = checkpoint.load(
        tmp_path / "q" / "text_encoder" / checkpoint.FILE, "text_encoder", shapes(TextEncoder, SMALL.text)
    )
    assert len(text.header.layers) == 7 * SMALL.text.layers and text.header.method == "awq"
    assert len(plan) == len(text.header.layers) + len(found.header.layers)
    assert all(10 < row.sqnr_db < 60 if row.part == "dit" else row.sqnr_db is None for row in plan)
    stored = json.loads((tmp_path / "q" / "quantization.json").read_text())["plan"]
    assert [row["layer"] for row in stored] == [row.layer for row in plan]
    assert "mix_ffn.expand" in summary(plan) and "bits per weight" in summary(plan)
    # What is not quantised is what it was, in 16 bits; the other parts are there.
    dit = load_model(saved, parts=("dit",)).dit.state_dict()
    assert all(torch.equal(found.tensor(name), dit[name].bfloat16()) for name in found.plain)
    assert (tmp_path / "q" / "vae").is_dir() and (tmp_path / "q" / "tokenizer" / "tokenizer.json").is_file()
    vae = "vae/diffusion_pytorch_model.safetensors"
    before, after = load_file(saved / vae), load_file(tmp_path / "q" / vae)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "q.partial").exists()


def test_a_layer_is_scored_on_rows_that_it_was_not_fitted_to(tmp_path):
    """With GPTQ, and fewer rows than channels, the rows that it was fitted to say nothing."""
    weight, rows = torch.randn(32, 256), torch.randn(128, 256)
    inputs = calibration.LayerInputs(rows, rows.abs().amax(0))
    recipe = Recipe("int4", "16bit", gptq=True)
    info, _ = _layer(SimpleNamespace(name="m"), tmp_path, "l", weight, recipe, inputs, CPU)
    fitted, held_out = inputs.split()
    layer = quantize_layer(weight, recipe, fitted)
    assert info.sqnr_db == pytest.approx(sqnr_db(layer, weight, held_out), abs=0.01)
    assert sqnr_db(layer, weight, fitted.rows) > info.sqnr_db + 3


def test_awq_scales_the_text_encoder(tmp_path):
    """Where a few channels carry most, the states of another prompt are nearer to the original's than by rounding."""
    model, saved = random_model(SMALL), tmp_path / "m"
    for block in model.text_encoder.layers:
        for norm in (block.input_layernorm, block.pre_feedforward_layernorm):
            norm.weight[::32] += 15
    save_diffusers(saved, model)
    prompts = ("a fox in the snow", "three owls", "an old map, ink on paper", "a violin")
    quantize(Job(str(saved), "w8a8", prompts, samples=4, steps=1, text_precision="w4a16"), tmp_path / "awq")
    quantize(Job(str(saved), "w8a8", prompts, samples=0, text_precision="w4a16"), tmp_path / "rtn")

    def states(folder: Path) -> torch.Tensor:
        loaded = load_model(folder, parts=("text",), text_precision=torch.float32)
        ids = torch.tensor([loaded.tokenizer.encode("a lighthouse on a cliff, oil on canvas")])
        with torch.inference_mode():
            return loaded.text_encoder(ids, torch.tensor([ids.shape[1]]))

    exact = states(saved)
    rtn, scaled = (relative_rms(states(tmp_path / name), exact) for name in ("rtn", "awq"))
    assert scaled < 0.9 * rtn, (rtn, scaled)
    # 1 + weight of a norm that absorbed a scale may be small: the weight stays in fp32, in the file and in memory.
    found = load_model(tmp_path / "awq", parts=("text",), text_precision=torch.bfloat16).text_encoder
    for block in found.layers:
        for norm in (block.input_layernorm, block.pre_feedforward_layernorm):
            assert norm.weight.dtype == torch.float32 and not torch.equal(norm.weight, norm.weight.bfloat16().float())
        assert block.post_attention_layernorm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config", [SPRINT, replace(SMALL, dit=replace(SMALL.dit, qk_norm=True))], ids=["sprint", "1.5"]
)
def test_other_families(config, tmp_path):
    save_diffusers(tmp_path / "m", random_model(config))
    quantize(Job(str(tmp_path / "m"), "w4a8", gptq=True, **QUICK), tmp_path / "q")
    header = opened(tmp_path / "q", config).header
    assert header.method == "gptq" and header.layers["blocks.1.mix_ffn.project"].activations == "int8"


def test_plain_rounding_needs_no_calibration(saved, tmp_path):
    plan = quantize(Job(str(saved), "w8a8", ("unused",), samples=0), tmp_path / "q")
    found = opened(tmp_path / "q", SMALL)
    assert found.header.calibration is None and found.header.method == "rtn" and plan[0].sqnr_db is None
    weight = load_model(saved, parts=("dit",)).dit.blocks[1].attention.out.weight
    expected = round_to_nearest(weight, "int8", "int8")
    assert torch.equal(found.layer("blocks.1.attention.out").values, expected.values)


def test_a_quantised_base_is_quantised_where_the_file_takes_its_parts(saved, tmp_path):
    """A lone DiT with the text encoder of a quantised folder: what is stored is what runs, and nothing is made of it."""
    quantize(Job(str(saved), "w4a8", ("unused",), samples=0, text_precision="w8a8"), tmp_path / "q")
    quantize(Job(str(saved), "w4a8", ("unused",), samples=0), tmp_path / "dit")
    file = saved / "transformer" / "diffusion_pytorch_model.safetensors"
    base = str(tmp_path / "q")
    assert load(str(file), base=base, backend="cpu").plan.precisions == {
        "dit": "bf16", "text_encoder": "w8a8", "autoencoder": "bf16"
    }  # fmt: skip
    with pytest.raises(UserError, match="text encoder is stored in w8a8, from which bf16 cannot be made"):
        load(str(file), base=base, text_precision="bf16")
    with pytest.raises(UserError, match=r"text encoder is stored in w8a8.*quantising needs unquantised weights"):
        quantize(Job(str(file), "w8a8", ("unused",), samples=0, base=base), tmp_path / "out")
    with pytest.raises(UserError, match=r"text encoder is stored in w8a8.*converting needs unquantised weights"):
        convert(file, tmp_path / "out", base=base)
    convert(file, tmp_path / "out", base=tmp_path / "dit")  # whose quantised DiT is not used
    weight = "blocks.1.attention.out.weight"
    found, expected = (load_model(f, parts=("dit",)).dit.state_dict()[weight] for f in (tmp_path / "out", saved))
    assert torch.equal(found, expected)


def test_an_output_of_zeros_has_no_sqnr(folder, tmp_path):
    """Its signal is 0, of which the logarithm is no number that JSON has."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["transformer_blocks.1.attn1.to_out.0.weight"].zero_()
    save_file(tensors, file)
    plan = quantize(Job(str(folder), "w8a8", **QUICK), tmp_path / "q")
    (silent,) = (row for row in plan if row.layer == "blocks.1.attention.out")
    assert silent.sqnr_db is None and "  -  " in str(silent) and "  -  " in summary([silent])
    assert all(row is silent or row.sqnr_db > 20 for row in plan)
    text = (tmp_path / "q" / "quantization.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert opened(tmp_path / "q", SMALL).header.layers["blocks.1.attention.out"].sqnr_db is None


def test_smaller_on_disk(saved, tmp_path):
    """The DiT alone: 8 bits take about half of 16, 4 bits about a quarter; the embeddings stay as they are."""
    sizes = {"bf16": sum(2 * p.numel() for p in load_model(saved, parts=("dit",)).dit.parameters())}
    for precision in ("w8a8", "w4a8"):
        quantize(Job(str(saved), precision, ("unused",), samples=0), tmp_path / precision)
        sizes[precision] = (tmp_path / precision / FILE).stat().st_size
    block = sum(2 * p.numel() for p in load_model(saved, parts=("dit",)).dit.blocks.parameters())
    rest = sizes["bf16"] - block
    assert sizes["w8a8"] - rest < 0.55 * block and sizes["w4a8"] - rest < 0.36 * block


def test_random_weights_are_drawn_again(tmp_path, capsys):
    out = tmp_path / "q"
    assert (
        main(["quantize", "sana-tiny-random", "--precision", "w4a8", "--samples", "1", "--steps", "1", "-o", str(out)])
        == 0
    )
    assert list((out / "vae").iterdir()) == [out / "vae" / "config.json"]
    output = capsys.readouterr().out
    assert "100.0 %" in output and " left" in output and "kernel on this machine" in output


@pytest.mark.parametrize(
    "flags", [{"precision": "w8a8"}, {"precision": "w8a8", "smooth": True}, {"precision": "w4a4", "rank": 8}], ids=str
)
def test_it_paints(saved, tmp_path, flags):
    """The folder is a model like any other; its pictures are near those of the original, and differ."""
    quantize(Job(str(saved), **flags, **QUICK), tmp_path / "q")
    original, first, second = (
        sana_generate(model, tmp_path / f"{i}.png") for i, model in enumerate((saved, tmp_path / "q", tmp_path / "q"))
    )
    assert torch.equal(first, second) and psnr(first, original) > 20 and not torch.equal(first, original)


def sana_generate(model, file) -> torch.Tensor:
    assert main(["generate", "a fox", "--model", str(model), "--size", "64", "--steps", "2", "-o", str(file)]) == 0
    return torch.from_numpy(np.array(Image.open(file).convert("RGB")))


# ------------------------------------------------------------------------------------------------ interruptions


class Killed(BaseException):
    """As SIGKILL would: no handler runs but `finally`."""


def test_killed_and_resumed_gives_the_same_bytes(saved, tmp_path):
    job = Job(str(saved), "w4a4", text_precision="w8a8", rank=4, gptq=True, **QUICK)
    quantize(job, tmp_path / "whole")
    done = []

    def killed_after(count):
        def layer(planned, new, fraction):
            done.append((planned.layer, new))
            if sum(new for _, new in done) == count:
                raise Killed

        return Progress(layer=layer)

    out = tmp_path / "resumed"
    for count in (3, 9):
        with pytest.raises(Killed):
            quantize(job, out, progress=killed_after(count))
        assert not out.exists() and (tmp_path / "resumed.partial").is_dir()
    (tmp_path / "resumed.partial" / "dit" / ".torn.tmp").write_bytes(b"half a layer")
    done.clear()
    quantize(job, out, progress=killed_after(10**6))
    assert [new for _, new in done].count(False) == 9  # those of the first two runs
    for file in sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file()):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert not (tmp_path / "resumed.partial").exists()


def test_killed_while_it_calibrates(saved, tmp_path):
    job = Job(str(saved), "w4a8", gptq=True, **QUICK)
    steps = []

    def step(done, of):
        steps.append(done)
        if len(steps) == 3:
            raise Killed

    with pytest.raises(Killed):
        quantize(job, tmp_path / "q", progress=Progress(step=step))
    quantize(job, tmp_path / "q")
    quantize(job, tmp_path / "whole")
    assert (tmp_path / "q" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_unfinished_work_of_another_job(saved, tmp_path):
    job = Job(str(saved), "w8a8", ("a fox",), samples=0)
    with pytest.raises(Killed):
        quantize(job, tmp_path / "q", progress=Progress(layer=lambda *args: (_ for _ in ()).throw(Killed)))
    with pytest.raises(UserError, match="of another job"):
        quantize(replace(job, precision="w4a8"), tmp_path / "q")
    shutil.rmtree(tmp_path / "q.partial")
    (tmp_path / "q.partial").mkdir()
    (tmp_path / "q.partial" / "thesis.tex").touch()
    with pytest.raises(UserError, match="in use"):
        quantize(job, tmp_path / "q")


# ------------------------------------------------------------------------------------------------ refusals


def test_nothing_is_written_over_a_good_file(saved, folder, tmp_path, monkeypatch):
    job = Job(str(saved), "w8a8", ("a fox",), samples=0)
    out = tmp_path / "q"
    quantize(job, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr(checkpoint, "_finite", lambda tensor, what: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match="disk is full"):
        quantize(job, out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    monkeypatch.undo()
    with pytest.raises(UserError, match="the model that is to be quantised"):
        quantize(Job(str(folder), "w8a8", ("a fox",), samples=0), folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(UserError, match="in use and holds no model"):
        quantize(job, tmp_path / "thesis")
    with pytest.raises(UserError, match="quantised"):
        quantize(Job(str(out), "w4a8", ("a fox",), samples=0), tmp_path / "twice")


@pytest.mark.parametrize("most", [100, 3_000, 20_000, 100_000])
def test_a_full_disk_is_one_sentence(saved, tmp_path, most):
    """Whichever of its files is the first that is too large; the same job then goes on from there."""
    job, out = Job(str(saved), "w8a8", **QUICK), tmp_path / "q"
    with full_disk(most), pytest.raises(UserError, match=r"cannot be written: File too large"):
        quantize(job, out)
    assert not out.exists()
    quantize(job, out)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_a_mixture_of_dtypes_is_known_by_every_value_and_quantised(folder, tmp_path):
    """Matrices in bf16 and biases in fp32: these differ by less than bf16 can tell."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    prints = []
    for factor in (1.0, 1.0001):
        state = {name: tensor.bfloat16() if tensor.ndim > 1 else tensor for name, tensor in load_file(file).items()}
        save_file(state | {"proj_out.bias": state["proj_out.bias"] * factor}, file)
        prints.append(fingerprint(find(folder), "dit"))
    assert prints[0] != prints[1]
    quantize(Job(str(folder), "w8a8", ("a fox",), samples=0), tmp_path / "q")
    assert opened(tmp_path / "q", SMALL).header.source == prints[1]


def test_a_folder_that_cannot_be_made_is_one_sentence(saved, tmp_path):
    job = Job(str(saved), "w8a8", ("a fox",), samples=0)
    with pytest.raises(UserError, match=r"q\.partial cannot be written: File name too long"):
        quantize(job, tmp_path / ("q" * 250))


def test_a_reader_that_has_gone_is_no_error_of_the_disk(saved, tmp_path):
    def gone(*_args):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        quantize(Job(str(saved), "w8a8", ("a fox",), samples=0), tmp_path / "q", progress=Progress(layer=gone))


def test_the_folder_that_one_works_in_is_not_replaced(saved, tmp_path, monkeypatch, capsys):
    """Whoever is in it would be in no folder afterwards, where not even `sana generate --model .` starts."""
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    for place, out in (("empty/deeper", "."), ("empty/deeper", str(tmp_path / "empty" / "deeper"))):
        monkeypatch.chdir(tmp_path / place)
        assert main(["quantize", str(saved), "--precision", "w8a8", "--samples", "0", "-o", out]) == 2
        said = capsys.readouterr().err
        assert "you are in it" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["empty", "deeper"]


@pytest.mark.parametrize("name", ["transformer_blocks.1.attn1.to_out.0.weight", "proj_out.bias"])
def test_nan_in_the_weights(folder, tmp_path, name):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"(blocks.1.attention.out|head.bias).* holds NaN"):
        quantize(Job(str(folder), "w8a8", ("a fox",), samples=0), tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_the_command_line_refuses_in_a_sentence(saved, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    settings = tmp_path / "settings.jsonl"
    settings.write_text('{"prompt": "a fox", "seed": 1}\n')
    out = ["-o", str(tmp_path / "q")]
    for argv, message in (
        ([str(saved), "--precision", "w8a8", "--calibration", str(empty)], "holds no prompts"),
        ([str(saved), "--precision", "w8a8", "--calibration", str(tmp_path / "none")], "cannot read"),
        ([str(saved), "--precision", "w8a8", "--calibration", str(settings)], "prompts only"),
        ([str(saved), "--precision", "w3a3"], "not to 'w3a3'"),
        ([str(saved), "--precision", "w8a8", "--text-precision", "w2"], "not to 'w2'"),
        ([str(saved), "--precision", "w8a8", "--gptq"], "for 4-bit weights"),
        ([str(saved), "--precision", "w4a4", "--samples", "0"], "needs calibration"),
        ([str(saved), "--precision", "w4a4", "--rank", "-1"], "the rank"),
        ([str(saved), "--precision", "w4a4", "--steps", "0"], "at least one step"),
        ([str(saved), "--precision", "w4a4", "--steps", "2000"], "1000 at most"),
        (["no-such-model", "--precision", "w8a8"], "no built-in name"),
        ([str(saved), "--precision", "w8a8", "--threads", "0"], "threads"),
    ):
        assert main(["quantize", *argv, *out]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "q").exists() and not (tmp_path / "q.partial").exists()
    assert len(read_prompts(PROMPTS)) == 32
