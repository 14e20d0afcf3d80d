"""`sana bench step`: what its rows hold, and when they hold no speed-up. Times themselves are not tested."""

from dataclasses import replace

import pytest
import torch
from fake_peaks import fake_peaks

from sana_bench import check, harness, report, runs, schema, step, work
from sana_model.config import BUILT_IN
from sana_model.dit import DiT

TOKENS = 40


@pytest.fixture
def measure(tmp_path):
    def run(*names, model="sana-tiny-random"):
        torch.set_num_threads(1)
        results = harness.Results(tmp_path / "step.json", seed=0)
        names = [runs.RunName.parse(name) for name in names]
        bench = step.StepBench(
            step.load(model, torch.bfloat16), names, (96, 64), TOKENS, torch.device("cpu"), fake_peaks(), results,
            say=lambda text: None,
        )  # fmt: skip
        bench.run(2)
        results.save(bench.peaks, complete=True)
        return schema.load(tmp_path / "step.json")

    return run


def test_a_row_per_run_with_ops_and_products(measure):
    pytest.importorskip("diffusers")
    document = measure("diffusers:bf16", "reference:bf16", "cpu:w8a8")
    theirs, plain, ours = document["results"]
    assert [row["status"] for row in (theirs, plain, ours)] == ["ok"] * 3
    assert "ops_ms" not in theirs and set(theirs["speedup"]) == {"reference:bf16"}
    for row in (plain, ours):
        assert {"gemm", "mix_ffn", "linear_attention", "cross_attention", "modulate"} <= set(row["ops_ms"])
        assert sum(row["ops_ms"].values()) > 0 and row["gemms_alone_ms"]["median"] > 0
    assert ours["ops_ms"]["quantize"] > 0 and plain["ops_ms"].get("quantize", 0) == 0
    table = report.step_table(document)
    assert table.count("\n| ") == 4 and "step / products" in table and "× diffusers:bf16" in table


def test_the_work_is_that_of_the_picture_bench(measure):
    (row,) = measure("reference:bf16")["results"]
    dit = BUILT_IN["sana-tiny-random"].dit
    assert row["work"]["gmac"] == sum(work.dit_step_macs(dit, 6, length) for length in (1, TOKENS)) / 1e9


def test_a_wrong_result_has_no_speed_up(measure, monkeypatch):
    right = DiT.unembed
    monkeypatch.setattr(
        DiT, "unembed", lambda self, x, *rest: right(self, x, *rest) * (1.5 if x.dtype == torch.bfloat16 else 1)
    )
    document = measure("reference:bf16", "cpu:bf16")
    assert [row["status"] for row in document["results"]] == ["FAIL", "FAIL"]
    assert not any("speedup" in row for row in document["results"])
    assert "**FAIL** (dit" in report.step_table(document)


def test_what_eight_bits_cost_plain_pytorch_is_no_mistake_of_a_kernel(measure, monkeypatch):
    """As in the 1.6B with random weights, whose W8A8 misses the limit."""
    load = step.load
    (row,) = measure("cpu:w8a8")["results"]
    keeps = row["check"]["value"]
    monkeypatch.setitem(check.DIT_LIMITS, "w8a8", keeps + 0.7)
    document = measure("cpu:w8a8")
    (row,) = document["results"]
    assert row["status"] == "ok" and keeps - check.PLAIN_LOSS - 0.5 < row["check"]["limit"] < keeps
    assert "cpu:w8a8 against fp32, of which plain PyTorch keeps" in report.step_table(document)
    with monkeypatch.context() as patch:  # trained weights are held to the limit
        patch.setattr(step, "load", lambda *args: replace(load(*args), random=False))
        assert [row["status"] for row in measure("cpu:w8a8")["results"]] == ["FAIL"]
    with monkeypatch.context() as patch:  # and so is what plain PyTorch is too large for
        patch.setattr(step, "plain_velocity", lambda *args: None)
        assert [row["status"] for row in measure("cpu:w8a8")["results"]] == ["FAIL"]
    right = runs.PipelineRun.velocity

    def worse(run, moment):
        velocity = right(run, moment)
        return velocity if run.name.backend == "reference" else velocity * (1 + 10 ** (-keeps / 20))

    monkeypatch.setattr(runs.PipelineRun, "velocity", worse)
    (row,) = measure("cpu:w8a8")["results"]
    assert row["status"] == "FAIL" and row["check"]["value"] > check.DIT_LIMITS["w8a8"] - check.LIMIT_LOSS


def test_sprint_takes_its_guidance_as_an_input(measure):
    sprint = next(name for name, config in BUILT_IN.items() if config.dit.guidance_embeds)
    tiny = BUILT_IN["sana-tiny-random"]
    dit = replace(tiny.dit, guidance_embeds=True, qk_norm=True)
    small = replace(tiny, dit=dit, scheduler=BUILT_IN[sprint].scheduler)
    (row,) = measure("cpu:bf16", model=small)["results"]
    assert row["status"] == "ok" and row["workload"]["rows"] == 1


def test_four_bit_weights_are_more_than_a_product(measure):
    """Not an error, and no time of products alone."""
    document = measure("cpu:w4a16", "reference:w4a4", "cpu:bf16")
    assert not {row["status"] for row in document["results"]} - {"ok", "FAIL"}  # FAIL: of random weights, too few dB
    assert ["gemms_alone_ms" in row for row in document["results"]] == [False, False, True]
    assert report.step_table(document).count("\n| ") == 4
