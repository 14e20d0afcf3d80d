"""`sana bench decode`: what it measures, checks, refuses and writes. Times themselves are not tested."""

import pytest
import torch
from fake_peaks import fake_peaks

from sana_bench import decode, harness, report, runs, schema, work
from sana_model import memory
from sana_model.autoencoder.family import FAMILY, find_autoencoder
from sana_model.cli import main
from sana_model.config import BUILT_IN
from sana_model.weights.models import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loaded():
    return load_model(find_autoencoder("sana-tiny-random"), decoder_precision=torch.bfloat16, parts=("autoencoder",))


@pytest.fixture
def measure(loaded, tmp_path):
    def run(*names, sizes=(64,), before=lambda bench: None):
        results = harness.Results(tmp_path / "out.json", seed=0)
        names = [runs.RunName.parse(name) for name in names]
        bench = decode.DecodeBench(
            loaded, names, list(sizes), torch.device("cpu"), fake_peaks(), results, say=lambda text: None
        )
        before(bench)
        bench.run(2)
        results.save(bench.peaks, complete=True)
        return bench

    return run


def rows(bench) -> dict[tuple[str, int], dict]:
    return {
        (f"{row['backend']}:{row['precision']}", row["workload"]["height"]): row
        for row in bench.results.document["results"]
    }


def test_rows(measure):
    """Every run at every size, checked against fp32 of the same latents; the file is one that scripts may read."""
    bench = measure("diffusers:bf16", "reference:bf16", "cpu:bf16", "cpu:fp32", "cpu:w8a8", sizes=(64, 96))
    found = rows(bench)
    assert len(found) == 10 and schema.validate(bench.results.document) == []
    assert schema.load(bench.results.path)["results"] == bench.results.document["results"]
    for (name, size), row in found.items():
        assert row["kind"] == "decode" and row["status"] == "ok", name
        assert row["timing"]["n"] == 2 and row["stages_ms"]["decode"] == row["timing"]["ms"]["median"]
        transformed = name in ("cpu:bf16", "cpu:w8a8")
        macs = work.decoder_macs(bench.config.autoencoder, size, size, transformed=transformed)
        assert row["work"]["gmac"] == macs / 1e9
        assert set(row["speedup"]) == {"diffusers:bf16", "reference:bf16"} - {name}
        assert row["memory_mib"]["rss"] > row["memory_mib"]["added"] >= 0
    errors = {name: found[name, 64]["check"]["value"] for name in ("cpu:fp32", "cpu:bf16", "cpu:w8a8")}
    assert errors["cpu:fp32"] > 80 > errors["cpu:bf16"] > 30 and errors["cpu:bf16"] > errors["cpu:w8a8"] > 22
    plan = found["cpu:w8a8", 96]["plan"]
    assert plan["op_ms"]["conv2d"] > 0 and {"cpu"} == {r["backend"] for r in plan["rows"] if r["op"] == "conv2d"}
    assert set(found["diffusers:bf16", 96]["plan"]["memory_format_trial_ms"]) == {"contiguous_format", "channels_last"}
    table = report.decode_table(bench.results.document)
    assert table.count("sana-tiny-random_96x96") == 5 and "× diffusers:bf16" in table


def test_others_are_calibrated_with_latents_like_those_that_are_timed(loaded, monkeypatch):
    seen = []
    monkeypatch.setattr(decode.openvino, "check_installed", lambda precision: None)
    monkeypatch.setattr(decode.openvino, "compiled", lambda network, examples, precision: seen.extend(examples))
    decode.OpenVINODecoder("openvino", "w8a8", runs.Weights(loaded, torch.device("cpu"))).prepare(256)
    config = loaded.config.autoencoder
    for example in seen:
        assert example["hidden_states"].shape == (1, config.latent_channels, 8, 8)
        assert example["hidden_states"].std().item() == pytest.approx(1 / config.scaling_factor, rel=0.1)
    assert len({example["hidden_states"].sum().item() for example in seen}) == len(seen) >= 4


def test_a_wrong_decoder_fails(measure):
    """The control: a decoder that is off by one part in ten passes nowhere, and has no speed-up."""

    def spoil(bench):
        original = decode.OwnDecoder.decode
        bench.weights.part("autoencoder", torch.bfloat16)

        class Spoiled(decode.OwnDecoder):
            def decode(self, z):
                image = original(self, z)
                return image + 0.1 * image.std() * torch.randn_like(image)

        bench.kinds = {"cpu": Spoiled}

    found = rows(measure("reference:bf16", "cpu:bf16", before=spoil))
    assert found["cpu:bf16", 64]["status"] == "FAIL" and "speedup" not in found["cpu:bf16", 64]
    assert found["reference:bf16", 64]["status"] == "ok" and found["reference:bf16", 64]["speedup"] == {}


def test_what_does_not_fit_is_not_tried(measure, monkeypatch):
    """A baseline that is too large has a row that says so; ours in bands fits beside it, and has its oracle in bands."""
    room = 2_000_000_000
    monkeypatch.setattr(memory, "available", lambda _device: room)
    monkeypatch.setattr(decode, "LARGEST_WHOLE", 32)
    monkeypatch.setattr(decode.DiffusersDecoder, "needs", lambda self, size: 2 * room)
    found = rows(measure("diffusers:bf16", "cpu:bf16"))
    row = found["diffusers:bf16", 64]
    assert row["status"] == "out of memory" and "4.0 GB more are needed, and 2.0 GB are free" in row["reason"]
    assert found["cpu:bf16", 64]["status"] == "ok" and "in bands" in found["cpu:bf16", 64]["check"]["oracle"]


def test_memory_of_large_images_is_estimated():
    """4096 px in bf16: whole, more than most machines have; in bands, less than 10 GB. (bench/notes/decoder.md measures.)"""
    config, cpu = BUILT_IN["sana-0.6b"], torch.device("cpu")
    whole, bands = (
        memory.decoder_bytes(config, 4096, 4096, torch.bfloat16, cpu, in_bands=in_bands) for in_bands in (False, True)
    )
    assert whole > 24e9 and bands < 10e9


def test_folding_spares_the_taps_that_are_the_same():
    """Of a decode of 1024 px, 889 GMAC are convolutions after nearest ×2, of which 4 / 9 remain."""
    sana = FAMILY["dc-ae-f32c32-sana-1.1"]
    full, folded = (work.decoder_macs(sana, 1024, 1024, folded=folded) / 1e9 for folded in (False, True))
    assert full == pytest.approx(4184, abs=1) and full - folded == pytest.approx(889 * 5 / 9, abs=1)
    blocks = 2 * sum(1024**2 * C**2 * n >> 2 * i for i, (C, n) in enumerate(((128, 3), (256, 3), (512, 3)))) / 1e9
    transformed = work.decoder_macs(sana, 1024, 1024, transformed=True) / 1e9
    assert folded - transformed == pytest.approx((9 - 9 / 4) * blocks + 889 * (4 - 9 / 4) / 9, abs=1)
    lite = FAMILY["dc-ae-lite-f32c32-sana-1.1"]
    assert work.decoder_macs(lite, 1024, 1024, folded=False) == work.decoder_macs(lite, 1024, 1024)
    assert work.decoder_macs(lite, 512, 512) / 1e9 == pytest.approx(939, abs=1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--size", "100"], "--size 100 is not a positive multiple of 32"),
        (["--size", "big"], "--size 'big' is not a list of numbers"),
        (["--runs", "onnx:bf16"], "is not known"),
        (["--runs", "reference-compile:bf16"], "the decoder is measured on"),
    ],
)
def test_mistakes_are_named(capsys, arguments, complaint):
    assert main(["bench", "decode", "--model", "sana-tiny", *arguments]) == 2
    assert complaint in capsys.readouterr().err
