"""Runs of exported graphs in `sana bench image`: timed beside PyTorch, or said not to be measured."""

import exported
import pytest
import torch
from fake_peaks import fake_peaks

from sana_bench import harness, image, report, runs, schema
from sana_model.weights.models import load_model

pytest.importorskip("onnxruntime")


@pytest.fixture
def bench(tmp_path, tmp_path_factory):
    """bench("reference:fp32", ...) → (rows of these runs at 64×32 px, by name; the document)."""
    stored = dict.fromkeys(("precision", "text_precision", "decoder_precision"), torch.bfloat16)
    model = load_model(exported.model(tmp_path_factory, "small"), **stored)

    def run(*names):
        results = harness.Results(tmp_path / "out.json", seed=0)
        workload = image.Workload(64, 32, 2, 4.5)
        parsed = [runs.RunName.parse(name) for name in names]
        measured = image.ImageBench(
            model, parsed, workload, torch.device("cpu"), fake_peaks(), results, say=lambda text: None
        )
        measured.run(1)
        results.save(measured.peaks, complete=True)
        assert schema.validate(results.document) == []
        rows = (row for row in results.document["results"] if row["kind"] == "image")
        return {f"{row['backend']}:{row['precision']}": row for row in rows}, results.document

    return run


def test_onnx_runtime_is_timed_beside_pytorch(bench):
    """On the same weights: the parity of the same run lets it have a speed-up."""
    rows, _ = bench("reference:fp32", "onnxruntime:fp32")
    assert [row["status"] for row in rows.values()] == ["ok", "ok"]
    theirs = rows["onnxruntime:fp32"]
    metrics = {part["metric"] for part in theirs["check"]["parts"]}
    assert theirs["check"]["passed"] and metrics == set(report.PARITY)
    assert theirs["timing"]["ms"]["median"] > 0 and theirs["speedup"].keys() == {"reference:fp32"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tensorrt_without_a_gpu_is_not_measured(bench):
    rows, document = bench("reference:bf16", "tensorrt:bf16", "tensorrt:w8a8")
    assert [row["status"] for row in rows.values()] == ["ok", "not measured", "not measured"]
    assert "torch sees none" in rows["tensorrt:bf16"]["reason"] and "speedup" not in rows["tensorrt:bf16"]
    (line,) = (line for line in report.image_table(document).splitlines() if line.startswith("| tensorrt:w8a8"))
    assert "| not measured |" in line and not any(character.isdigit() for character in line.split("|", 2)[2])
