"""The benchmark's files: what a result must look like, how two are compared, the tables that come of them."""

import json

import pytest

from sana_bench import compare, harness, report, schema
from sana_model.errors import UserError


def example(**changes):
    """A small valid document; `changes` go into its one row."""
    r = {
        "kind": "image", "name": "m_64x64", "backend": "cpu", "precision": "bf16", "status": "ok",
        "workload": {"batch": 1, "height": 64, "width": 64, "steps": 2, "guidance": 4.5, "text_tokens": 60},
        "timing": {"n": 5, "ms": {"median": 100.0, "p10": 95.0, "p90": 105.0}},
        "stages_ms": {"text_encode": 10.0, "denoise": 60.0, "per_step": 30.0, "decode": 29.0, "other": 1.0},
        "check": {
            "against": "fp32", "metric": "dit_sqnr_db", "value": 40.0, "limit": 30, "passed": True, "parts": [],
            "failures": [],
        },
        "work": {"pct_of_peak": {"denoise": 30.0, "decode": 40.0}}, "memory_mib": {"rss": 100, "weights": 10},
        "speedup": {"reference:bf16": 2.0},
    }  # fmt: skip
    machine = {"cpu": "c", "isa": "avx512", "threads_used": 2, "gpus": [], "measured_peak": {"fp32": 1e12}}
    run = {"id": "2026-01-01T00:00:00Z-cpu-abc", "command": "sana bench image", "complete": True}
    return {
        "schema": 1,
        "run": run,
        "machine": machine,
        "software": {"versions": {"torch": "2"}},
        "results": [r | changes],
    }


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "picture"}, "kind"),
        ({"status": "fine"}, "status"),
        ({"name": None}, "name is missing"),
        ({"workload": {"batch": 1}}, "workload.height"),
        ({"timing": {"ms": {"median": float("nan"), "p10": 1.0, "p90": 2.0}}}, "timing.ms.median"),
        ({"timing": {"ms": {"median": 100.0, "p10": 101.0, "p90": 102.0}}}, "ordered"),
        ({"check": {"against": "fp32", "value": 1.0, "limit": 30}}, "check.passed"),
        (
            {"check": {"against": "fp32", "value": 1.0, "limit": 30, "passed": False}},
            "a row that failed its check has a speedup",
        ),
        (
            {"stages_ms": {"text_encode": 10.0, "denoise": 60.0, "per_step": 30.0, "decode": 20.0, "other": 1.0}},
            "sum to the median",
        ),
        ({"status": "out of memory"}, "without a measurement has a speedup"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_schema_says_what_is_wrong(change, complaint):
    assert schema.validate(example()) == []
    assert any(complaint in problem for problem in schema.validate(example(**change)))


def test_files_that_are_no_results_are_refused(tmp_path):
    path = tmp_path / "x.json"
    for text in ("{", "[]", '{"schema": 99}', '{"schema": 1}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"x\.json"):
            schema.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        schema.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("ms", "verdict"),
    [((50.0, 45.0, 55.0), "faster"), ((150.0, 140.0, 160.0), "slower"), ((97.0, 90.0, 104.0), "same")],
)
def test_compare_tells_apart_what_does_not_overlap(ms, verdict):
    new = example(timing={"n": 3, "ms": dict(zip(("median", "p10", "p90"), ms, strict=True))})
    (entry,) = compare.compare(example(), new)
    assert entry["verdict"] == verdict
    assert entry["ratio"] == pytest.approx(100 / ms[0])
    assert verdict in compare.render([entry], example(), new)


@pytest.mark.parametrize("n", [1, 2])
def test_compare_does_not_judge_by_one_or_two_repetitions(n):
    few = example(timing={"n": n, "ms": dict.fromkeys(("median", "p10", "p90"), 90.0)})
    for old, new in ((example(), few), (few, example()), (few, few)):
        (entry,) = compare.compare(old, new)
        assert entry["verdict"] == "too few" and entry["ratio"] is not None


def test_the_command_to_run_it_again_names_no_file_of_this_machine(tmp_path, monkeypatch):
    for flags in (["--json", f"{tmp_path}/a.json"], [f"--json={tmp_path}/a.json"]):
        monkeypatch.setattr("sys.argv", [f"{tmp_path}/sana", "bench", "image", *flags, "--size", "64"])
        assert harness.Results(None, seed=0).document["run"]["command"] == "sana bench image --size 64"

    monkeypatch.setattr("sys.argv", [str(harness.Path(harness.__file__).parent / "text.py"), "--json", "a.json"])
    assert harness.Results(None, seed=0).document["run"]["command"] == "python -m sana_bench.text"


def test_a_result_of_the_cpu_names_no_gpu(monkeypatch):
    found = harness.diagnostics.describe() | {"gpus": [{"name": "Fake GPU"}]}
    monkeypatch.setattr(harness.diagnostics, "describe", lambda: found)
    for device, where, named in (("cpu", "Z-cpu-", False), ("cuda", "Z-gpu-", True)):
        document = harness.Results(None, 0, device).document
        assert where in document["run"]["id"] and document["run"]["device"] == device
        document["results"] = example()["results"]
        assert ("Fake GPU" in report.image_table(document)) == named


def test_what_speaks_against_a_table_stands_below_it():
    document = example()
    table = report.image_table(document)
    assert "+dirty" not in table and "unsteady" not in table
    document["run"]["dirty"] = True
    document["results"][0]["timing"]["unsteady"] = 2
    document["results"].append(example(kind="decode", backend="cuda")["results"][0])
    document["results"][1]["timing"]["unsteady"] = 7  # of another table
    assert "Z-cpu-abc+dirty, 2 unsteady repetitions. Again" in report.image_table(document)


def test_compare_gives_no_ratio_where_there_is_none():
    failed = example(status="FAIL")
    assert compare.compare(example(), failed)[0]["verdict"] == "FAIL"
    assert compare.compare(failed, example())[0]["verdict"] == "was FAIL"
    other = example(precision="fp32")
    assert [e["verdict"] for e in compare.compare(example(), other)] == ["only in A", "only in B"]
    assert all(e["ratio"] is None for e in compare.compare(example(), other))
    slower = example()
    slower["machine"]["measured_peak"] = {"fp32": 5e11}
    assert "speed changed" in compare.render([], example(), slower)


def test_the_report_writes_tables_between_markers(tmp_path, capsys):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "a.json").write_text(json.dumps(example()))
    later = example(backend="cuda")
    later["run"]["id"] = "2026-02-01T00:00:00Z-gpu-abc"
    (tmp_path / "bench" / "results" / "b.json").write_text(json.dumps(later))
    readme = tmp_path / "README.md"
    readme.write_text(
        "one\n<!-- table:image -->\nold\n<!-- /table -->\ntwo\n<!-- table:image bench/results/a.json -->\n<!-- /table -->\n"
        "three\n<!-- table:ops -->\n<!-- /table -->\n"
    )
    assert report.main([str(readme), "--check"]) == 1
    assert report.main([str(readme)]) == 0
    first, rest = readme.read_text().split("two\n")
    assert "| cuda:bf16 |" in first  # the newest file
    assert "old" not in first
    assert "| cpu:bf16 | 10 | 30 | 29 | 100 [95–105] |" in rest
    assert "| `linear_attention` |" in rest
    assert report.main([str(readme), "--check"]) == 0
    readme.write_text("<!-- table:nonsense -->\n<!-- /table -->")
    assert report.main([str(readme)]) == 2
    assert "nonsense" in capsys.readouterr().err
