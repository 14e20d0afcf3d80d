"""`sana bench image`: what it shares, checks, refuses and writes. Times themselves are not tested."""

import argparse
import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fake_peaks import fake_peaks

from sana_bench import check, cli, harness, image, report, runs, schema
from sana_bench.prompts import Prompts
from sana_model import memory, scheduler
from sana_model.config import SchedulerConfig
from sana_model.errors import MissingError, UserError
from sana_model.plan import OpClock
from sana_model.prompt import PromptEncoder
from sana_model.weights.models import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loaded():
    bf16 = torch.bfloat16
    return load_model("sana-tiny-random", precision=bf16, text_precision=bf16, decoder_precision=bf16)


@pytest.fixture
def paint(loaded, tmp_path):
    """paint("reference:bf16", ...) → the bench after one comparison of 32×64 px; its document is in .results."""

    def run(*names, model=loaded, peaks=None, repeat=2, before=lambda bench: None):
        results = harness.Results(tmp_path / "out.json", seed=0)
        names = [runs.RunName.parse(name) for name in names]
        bench = image.ImageBench(
            model, names, image.Workload(64, 32, 2, 4.5), torch.device("cpu"), peaks or fake_peaks(), results,
            say=lambda text: None,
        )  # fmt: skip
        before(bench)
        bench.run(repeat)
        results.save(bench.peaks, complete=True)
        return bench

    return run


def row(document, kind, name):
    return next(r for r in document["results"] if r["kind"] == kind and f"{r['backend']}:{r['precision']}" == name)


def test_the_oracle_is_the_model_in_fp32_to_the_bit(loaded):
    latents, times = torch.randn(2, 32, 3, 2), torch.tensor([499.0, 499.0])
    states, lengths = torch.randn(2, 9, loaded.config.dit.caption_channels), torch.tensor([1, 9])
    ids, parts = torch.randint(64, (2, 9)), (loaded.dit, loaded.autoencoder, loaded.text_encoder)

    def outputs(dit, autoencoder, text_encoder, latents):
        decoded = autoencoder.decode(latents.to(next(autoencoder.parameters()).dtype))
        return dit(latents, times, states, lengths), decoded, text_encoder(ids, lengths)

    with torch.inference_mode():
        expected = outputs(*(copy.deepcopy(part).float() for part in parts), latents)
        with check.ComputeInFp32():
            actual = outputs(*parts, latents)
        narrow = outputs(*parts, latents)
    for a, e, n in zip(actual, expected, narrow, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, e)
        assert not torch.equal(n.float(), e)  # control: in bf16 they differ


@pytest.mark.parametrize("instruction", ["none", "default", "Paint: "])
def test_prompts_have_exactly_the_tokens_asked_for(loaded, instruction):
    config = replace(loaded.config, instruction=instruction)
    prompts = Prompts(loaded.tokenizer, config, 60)
    texts = [prompts(i) for i in range(4)]
    assert len(set(texts)) == 4
    assert texts == [Prompts(loaded.tokenizer, config, 60)(i) for i in range(4)]
    lengths = PromptEncoder(loaded.text_encoder, loaded.tokenizer, config).encode(texts).lengths
    assert lengths.tolist() == [60] * 4
    with pytest.raises(UserError, match="between 2 and 64"):
        Prompts(loaded.tokenizer, config, 65)


def test_an_instruction_in_bytes_is_as_long_as_gemmas(loaded, paint, monkeypatch):
    """diffusers computes it for every picture: of 1058 bytes instead of 209 tokens that would be most of its time."""
    read, prepare = [], runs.DiffusersRun.prepare

    def watched(run, settings):
        prepare(run, settings)
        run.pipe.text_encoder.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))

    monkeypatch.setattr(runs.DiffusersRun, "prepare", watched)
    default = replace(loaded, config=replace(loaded.config, instruction="default"))
    document = paint("diffusers:bf16", "reference:bf16", model=default).results.document
    assert set(read) == {209 + 64 - 2, 64}  # as their pipeline pads a prompt, and a negative one
    for name in ("diffusers:bf16", "reference:bf16"):
        assert row(document, "image", name)["status"] == "ok"
        assert row(document, "image", name)["workload"]["instruction_tokens"] == 209
    assert "209 + 60 text tokens" in report.image_table(document)


def test_runs_share_their_weights_and_copy_each_dtype_once(loaded):
    weights = runs.Weights(loaded, torch.device("cpu"))
    names = {p: runs.RunName.parse(f"reference:{p}") for p in ("bf16", "fp32", "w8a8")}
    sizes = {p: weights.bytes(name.precisions) for p, name in names.items()}
    bf16, fp32 = names["bf16"].dtypes, names["fp32"].dtypes
    assert weights.missing_bytes(bf16) == 0
    assert weights.missing_bytes(fp32) == sizes["fp32"] == 2 * sizes["bf16"] > 2 * sizes["w8a8"]
    first, second = weights.model(bf16), weights.model(bf16)
    assert first.dit is not second.dit
    assert first.dit.head.weight.data_ptr() == second.dit.head.weight.data_ptr() == loaded.dit.head.weight.data_ptr()
    wide, again = weights.model(fp32), weights.model(fp32)
    assert wide.dit.head.weight.data_ptr() == again.dit.head.weight.data_ptr() != loaded.dit.head.weight.data_ptr()
    assert torch.equal(wide.dit.head.weight, loaded.dit.head.weight.float())
    assert weights.missing_bytes(fp32) == 0


def test_weights_are_stored_in_what_most_of_them_have(loaded):
    """Of a mixture: the first tensor may be a small one that was kept in fp32."""
    dit = copy.deepcopy(loaded.dit)
    first = next(dit.parameters())
    first.data = first.data.float()
    weights = runs.Weights(replace(loaded, dit=dit), torch.device("cpu"))
    assert weights.stored["dit"] == torch.bfloat16


def test_a_comparison_from_beginning_to_end(paint):
    bench = paint("diffusers:bf16", "reference:bf16", "reference:fp32")
    document = json.loads(bench.results.path.read_text())
    assert schema.validate(document) == []
    assert document["run"]["complete"]
    for name in ("diffusers:bf16", "reference:bf16", "reference:fp32"):
        assert {r["kind"] for r in document["results"] if f"{r['backend']}:{r['precision']}" == name} == {
            "first_image", "image", "decode",
        }  # fmt: skip
        found = row(document, "image", name)
        assert found["status"] == "ok", found["check"]
        assert found["workload"] == {
            "batch": 1,
            "height": 64,
            "width": 32,
            "steps": 2,
            "guidance": 4.5,
            "text_tokens": 60,
            "instruction_tokens": 0,
        }
        assert found["stages_ms"]["per_step"] == pytest.approx(found["stages_ms"]["denoise"] / 2)
        assert len(found["timing"]["raw_ms"]) == 2
    ours, theirs = row(document, "image", "reference:fp32"), row(document, "image", "diffusers:bf16")
    ratio = theirs["timing"]["ms"]["median"] / ours["timing"]["ms"]["median"]
    assert ours["speedup"]["diffusers:bf16"] == pytest.approx(ratio)
    assert theirs["plan"]["decoder_memory_format"] in ("contiguous_format", "channels_last")
    assert row(document, "image", "reference:bf16")["plan"]["rows"]
    assert "FAIL" not in report.image_table(document)


def test_sprint_is_driven_as_diffusers_drives_it(loaded, paint):
    dit = replace(loaded.config.dit, guidance_embeds=True, qk_norm=True)
    config = replace(loaded.config, name="sprint-tiny", dit=dit, scheduler=SchedulerConfig(kind="scm"))
    fp32 = torch.float32
    sprint = load_model(config, precision=fp32, text_precision=fp32, decoder_precision=fp32)
    bench = paint("diffusers:fp32", "reference:fp32", model=sprint)
    theirs, ours = (bench.measured[name] for name in ("diffusers:fp32", "reference:fp32"))
    assert [row["status"] for row in bench.results.document["results"]] == ["ok"] * 6
    assert theirs.latents.shape == ours.latents.shape
    assert theirs.checks[0].value > 100 < ours.checks[0].value  # dB: the same time, guidance and caption went in


def test_a_wrong_run_prints_fail_and_no_speedup(paint):
    def sabotage(bench):
        run = bench.measured["reference:bf16"].run
        prepare = run.prepare

        def wrong(settings):
            prepare(settings)
            ops = run.pipeline.dit.ops
            run.pipeline.dit.ops = replace(
                ops, modulate=lambda x, shift, scale, **options: ops.modulate(x, scale, shift, **options)
            )

        run.prepare = wrong

    bench = paint("diffusers:bf16", "reference:bf16", before=sabotage)
    found = row(bench.results.document, "image", "reference:bf16")
    assert found["status"] == "FAIL"
    assert found["check"]["value"] < found["check"]["limit"] == 30
    assert "speedup" not in found
    assert "reference:bf16" not in row(bench.results.document, "image", "diffusers:bf16")["speedup"]
    assert row(bench.results.document, "decode", "reference:bf16")["status"] == "ok"  # its decoder is right
    line = next(line for line in report.image_table(bench.results.document).splitlines() if "| reference:bf16" in line)
    assert "**FAIL** (dit" in line
    assert schema.validate(bench.results.document) == []


@pytest.mark.parametrize("steps", [1, 2])
def test_what_is_timed_is_compared_and_not_only_its_parts(paint, steps):
    """Captions that change places: the DiT, the decoder and the captions themselves are right."""

    def sabotage(bench):
        bench.workload = replace(bench.workload, steps=steps)
        run = bench.measured["reference:bf16"].run
        denoise = run.denoise
        run.denoise = lambda settings, captions, noise: denoise(settings, captions[::-1], noise)

    bench = paint("diffusers:bf16", "reference:bf16", before=sabotage)
    found = row(bench.results.document, "image", "reference:bf16")
    assert (found["status"], found["check"]["metric"]) == ("FAIL", "latents_sqnr_db")
    assert [part["metric"] for part in found["check"]["parts"] if not part["passed"]] == ["latents_sqnr_db"]
    assert row(bench.results.document, "image", "diffusers:bf16")["status"] == "ok"
    assert "dB: DiT, latents, image, text" in report.image_table(bench.results.document)


def test_the_step_of_second_order_is_compared_with_fp32(paint, monkeypatch):
    """A sampler that forgets the step before is right in its first and last steps, and in all of the model's parts."""

    def forgetful(velocity, x, schedule, noise, callback):
        for i in range(schedule.steps):
            step = replace(schedule, steps=1, sigmas=schedule.sigmas[i : i + 2])
            x = scheduler.flow_dpm(lambda x, _, i=i: velocity(x, i), x, step)
        return x

    def sabotage(bench):
        bench.workload = replace(bench.workload, steps=4)
        run = bench.measured["reference:fp32"].run
        denoise = run.denoise

        def spoiled(*args):
            with monkeypatch.context() as patch:
                patch.setitem(scheduler.SAMPLERS, "flow_dpm", forgetful)
                return denoise(*args)

        run.denoise = spoiled

    document = paint("cpu:fp32", "reference:fp32", before=sabotage).results.document
    found = row(document, "image", "reference:fp32")
    assert [part["metric"] for part in found["check"]["parts"] if not part["passed"]] == ["latents_sqnr_db"]
    assert row(document, "image", "cpu:fp32")["status"] == "ok"


def test_what_paints_the_oracle_is_weighed_by_its_decoding_alone(paint, monkeypatch):
    """Its latents come after a decode that did fit: a refusal of memory there would cost all the rows."""
    weigh, oracle = memory.check_run, []

    def refuse(config, settings, executed, *args, **options):
        if executed == oracle[0]:
            raise MissingError("a picture does not fit")
        weigh(config, settings, executed, *args, **options)

    monkeypatch.setattr(memory, "check_run", refuse)
    bench = paint("reference:fp32", before=lambda bench: oracle.append(bench.oracle.plan.executed))
    assert {row["status"] for row in bench.results.document["results"]} == {"ok"}


def test_a_picture_that_comes_out_otherwise_the_second_time_fails(paint):
    """What was remembered or captured by then is not what the first picture was made of."""

    def sabotage(bench):
        run = bench.measured["cpu:fp32"].run
        denoise, pictures = run.denoise, []

        def drifting(*args):
            pictures.append(denoise(*args))
            return pictures[-1] + 1e-6 * (len(pictures) - 1)

        run.denoise = drifting

    bench = paint("reference:fp32", "cpu:fp32", before=sabotage)
    found = row(bench.results.document, "image", "cpu:fp32")
    assert found["status"] == "FAIL" and found["check"]["value"] > found["check"]["limit"]
    assert found["check"]["failures"] == ["the first picture, denoised again, has other latents"]
    assert row(bench.results.document, "decode", "cpu:fp32")["status"] == "ok"
    assert schema.validate(bench.results.document) == []
    assert row(paint("cpu:bf16").results.document, "image", "cpu:bf16")["status"] == "ok"  # ours without sabotage


def test_four_bits_are_judged_by_what_is_executed():
    name = runs.RunName.parse("cpu:w4a4")
    executed = {"text_encoder": "bf16", "autoencoder": "bf16"}
    assert name.judged(executed | {"dit": "w8a8"})["dit"] == "w4a8"  # the rows that w4a8 has, too
    assert name.judged(executed | {"dit": "w4a4"})["dit"] == name.judged(executed | {"dit": "exact"})["dit"] == "w4a4"
    assert runs.RunName.parse("cpu:w4a8").judged(executed | {"dit": "w8a8"})["dit"] == "w4a8"
    output = torch.randn(2, 32, 4, 4)
    noisy = output + 10 ** (-13.5 / 20) * torch.randn_like(output)
    assert check.dit_check(noisy, output, "w4a4").passed and not check.dit_check(noisy, output, "w4a8").passed


def test_limits_of_captions_are_closer_for_trained_weights():
    states, lengths = torch.randn(1, 9, 64), torch.tensor([9])
    noisy = states + 10 ** (-12 / 20) * torch.randn_like(states)
    assert check.text_check(noisy, states, lengths, "w8a8", random=True).passed
    assert not check.text_check(noisy, states, lengths, "w8a8", random=False).passed


def test_more_than_the_peak_fails(paint):
    bench = paint("reference:bf16", peaks=fake_peaks(bf16_fake=1e5, fp32_fake=1e5))
    found = row(bench.results.document, "image", "reference:bf16")
    assert found["status"] == "FAIL"
    assert "of the measured peak" in found["check"]["failures"][0]
    assert found["check"]["value"] > found["check"]["limit"]  # its numbers are right, its time cannot be


def test_what_does_not_fit_gets_a_row_and_the_rest_goes_on(paint, monkeypatch):
    available, room = memory.available, []

    def limit(bench):
        room.append(bench.weights.kept_free + 2**20)

    monkeypatch.setattr(memory, "available", lambda device: room[0] if room else available(device))
    bench = paint("reference:fp32", "cpu:bf16", "reference:w8a8", "reference:bf16", before=limit)
    for name in ("reference:fp32", "cpu:bf16", "reference:w8a8"):  # whose weights are there once more
        lost = row(bench.results.document, "image", name)
        assert lost["status"] == "out of memory"
        assert "GB" in lost["reason"]
    assert row(bench.results.document, "image", "reference:bf16")["status"] == "ok"
    assert "out of memory" in report.image_table(bench.results.document)
    assert schema.validate(bench.results.document) == []


@pytest.mark.parametrize("name", ["reference:bf16", "onnxruntime:fp32"])
def test_every_run_leaves_room_for_the_check(paint, monkeypatch, name):
    """Pictures in bf16 are compared with those in fp32, which need more, when all runs are there."""
    available, room = memory.available, []

    def limit(bench):
        own = memory.estimate(bench.config, bench.settings(0), runs.RunName.parse("reference:bf16").precisions)
        room.append(bench.weights.kept_free - 1)
        assert room[0] > max(own["denoise"], own["decode"])

    monkeypatch.setattr(memory, "available", lambda device: room[0] if room else available(device))
    document = paint(name, before=limit).results.document
    assert row(document, "image", name)["status"] == "out of memory"


def test_after_the_check_its_room_is_free(paint):
    bench = paint("reference:bf16", before=lambda bench: setattr(bench.weights, "kept_free", 1))
    assert bench.weights.kept_free == 0 and row(bench.results.document, "image", "reference:bf16")["status"] == "ok"


def test_a_check_that_does_not_fit_costs_rows_not_the_run(paint, monkeypatch):
    def crash(*args):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    document = paint(
        "reference:bf16", "cpu:bf16", before=lambda bench: setattr(bench, "expected", crash)
    ).results.document
    for name in ("reference:bf16", "cpu:bf16"):
        lost = row(document, "image", name)
        assert lost["status"] == "out of memory" and lost["reason"].startswith("parity with fp32: OutOfMemoryError")
    assert schema.validate(document) == []


def test_a_baseline_that_crashes_does_not_take_the_others_along(paint, monkeypatch):
    def crash(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(runs.DiffusersRun, "decode", crash)
    document = paint("diffusers:bf16", "reference:bf16").results.document
    assert row(document, "image", "diffusers:bf16")["status"] == "out of memory"
    assert row(document, "image", "reference:bf16")["status"] == "ok"


def test_neither_does_one_of_ours(paint, monkeypatch):
    def crash(run, *args):
        if run.name.precision == "fp32":
            raise RuntimeError("no kernel image is available")
        return decode(run, *args)

    decode = runs.PipelineRun.decode
    monkeypatch.setattr(runs.PipelineRun, "decode", crash)
    document = paint("reference:fp32", "reference:bf16").results.document
    lost = row(document, "image", "reference:fp32")
    assert (lost["status"], lost["reason"]) == ("error", "RuntimeError: no kernel image is available")
    assert row(document, "image", "reference:bf16")["status"] == "ok"
    assert schema.validate(document) == []
    assert not cli._status(SimpleNamespace(document={"results": [lost]}))  # a baseline
    assert cli._status(SimpleNamespace(document={"results": [lost | {"backend": "cuda"}]})) == 1


@pytest.mark.parametrize("status", ["not available", "not measured", "out of memory"])
def test_nothing_that_can_be_measured_here_is_status_3(status):
    lost = {"status": status, "backend": "cuda"}
    assert cli._status(SimpleNamespace(document={"results": [lost, lost]})) == 3
    assert cli._status(SimpleNamespace(document={"results": [lost, lost | {"status": "ok"}]})) == 0
    assert cli._status(SimpleNamespace(document={"results": [lost, lost | {"status": "FAIL"}]})) == 1


def test_what_was_learnt_of_first_pictures_before_ctrl_c_is_kept(paint, monkeypatch):
    kept = []

    def decode(run, *args):
        raise RuntimeError("no kernel image is available") if run.name.precision == "fp32" else KeyboardInterrupt

    monkeypatch.setattr(runs.PipelineRun, "decode", decode)
    with pytest.raises(KeyboardInterrupt):
        paint("reference:fp32", "reference:bf16", before=lambda bench: kept.append(bench.results))
    assert [row["status"] for row in json.loads(kept[0].path.read_text())["results"]] == ["error"]


def test_a_gpu_is_timed_without_the_clock_of_ops():
    """From the second picture on: its events would slow what runs launch by launch."""
    clock = OpClock(cuda=True)
    plan = SimpleNamespace(clock=clock, outside_share=lambda seconds: 0.5)
    run = runs.PipelineRun(runs.RunName.parse("reference:bf16"), None)
    run.pipeline = SimpleNamespace(plan=plan, denoise=lambda *args, **options: clock.running)
    assert [run.denoise(None, None, None) for _ in range(3)] == [True, False, False]
    assert clock.wrap(("dit", "gemm"), lambda x: x + 1)(1) == 2  # no event, which would need a GPU
    plan.clock = OpClock(cuda=False)
    run.denoise(None, None, None)
    assert plan.clock.running


def test_what_was_measured_before_ctrl_c_is_kept(paint):
    kept = []

    def interrupt(bench):
        kept.append(bench.results)
        bench.say = lambda text: (_ for _ in ()).throw(KeyboardInterrupt) if text.endswith("steady") else None

    with pytest.raises(KeyboardInterrupt):
        paint("reference:bf16", before=interrupt)
    document = json.loads(kept[0].path.read_text())
    assert schema.validate(document) == []
    assert not document["run"]["complete"]
    assert row(document, "first_image", "reference:bf16")["status"] == "ok"


@pytest.mark.parametrize("name", ["gpu:bf16", "cpu:int3", "diffusers:bf17+"])
def test_unknown_runs_are_refused(name):
    with pytest.raises(UserError, match="is not known"):
        runs.RunName.parse(name)


def test_a_plus_holds_for_text_encoder_and_decoder():
    name = runs.RunName.parse("cpu:fp16+")
    assert str(name) == "cpu:fp16+"
    assert set(name.dtypes.values()) == {torch.float16}
    assert runs.RunName.parse("cpu:fp16").dtypes["autoencoder"] == torch.bfloat16


def test_the_compiled_reference_paints_the_same(loaded, monkeypatch):
    """Without max-autotune, which takes minutes: that the compiled functions are the ones that run, and are right."""
    monkeypatch.setattr(runs, "compile_options", lambda device: {"backend": "eager"})
    weights = runs.Weights(loaded, torch.device("cpu"))
    made = [runs.make(runs.RunName.parse(name), weights) for name in ("reference:bf16", "reference-compile:bf16")]
    settings = None
    latents = []
    with torch.inference_mode():
        for run in made:
            settings = settings or _pipeline(run).settings("a boat", width=64, height=64, steps=1)
            run.prepare(settings)
            noise = torch.randn(1, 32, 2, 2, generator=torch.Generator().manual_seed(1))
            latents.append(run.denoise(settings, run.text_encode(settings), noise))
    assert torch.equal(*latents)
    assert hasattr(made[1].pipeline.dit.step, "_torchdynamo_orig_callable")


def _pipeline(run):
    run.prepare(SimpleNamespace(count=1, width=64, height=64, guidance=4.5, binning=False, tiled=False, pag_scale=0.0))
    return run.pipeline


def test_the_command_line_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "WINDOWS", 1)
    root = argparse.ArgumentParser()
    cli.add_parser(root.add_subparsers(required=True))

    def sana(*argv):
        args = root.parse_args(["bench", *map(str, argv)])
        return args.run(args)

    out = tmp_path / "out.json"
    status = sana(
        "image",
        "--quick",
        "--size",
        64,
        "--steps",
        1,
        "--repeat",
        1,
        "--runs",
        "diffusers:bf16,auto:bf16",
        "--json",
        out,
    )
    document = schema.load(out)
    assert status == any(r["status"] == "FAIL" for r in document["results"])
    assert {r["backend"] for r in document["results"]} >= {"diffusers"}
    assert document["machine"]["measured_peak"]["copy"] > 0
    assert "ms/image" in capsys.readouterr().out
    assert sana("compare", out, out) == 0
    assert "too few" in capsys.readouterr().out  # one repetition
    for flags in (["--size", "big"], ["--repeat", 0], ["--runs", ","], ["--batch", 0], ["--json", tmp_path]):
        with pytest.raises(UserError):
            sana("image", *flags)
