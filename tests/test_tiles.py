"""The table of tiles: what it is for, that the choice is a function of the shape, and what `sana tune` makes of it."""

import importlib
import json

import pytest
import torch

from sana_bench import tune
from sana_kernels import tiles
from sana_kernels.tiles import Tile
from sana_model import cli


def test_the_choice_weighs_speed_against_idle_multiprocessors():
    """The example of tiles.py: half of the last tile of 2240 columns is empty, and yet it is the fastest choice."""
    assert tiles.gemm_tile(torch.bfloat16, False, 2, 1024, 2240, 90)[:2] == (128, 128)
    assert tiles.gemm_tile(torch.bfloat16, False, 2, 1024, 11200, 90)[:2] == (128, 256)
    assert tiles.gemm_tile(torch.bfloat16, False, 1, 64, 1152, 90)[:2] == (64, 64)
    assert tiles.gemm_tile(torch.int8, True, 2, 1024, 11200, 90)[:2] == (128, 128)  # no registers for a larger one


@pytest.mark.parametrize("arch", [80, 86, 87, 89, 90, 100, 103, 120, 121])
def test_every_architecture_has_tiles_of_every_dtype(arch):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn):
        if dtype == torch.float8_e4m3fn and arch < 89:
            continue
        for residual in (False, True):
            for tile, speed in tiles.candidates(dtype, residual, arch):
                assert 0 < speed <= 1 and all(n & (n - 1) == 0 for n in tile[:4])
            assert tiles.candidates(dtype, residual, arch)[0][1] == 1
        assert tiles.attention_tile(dtype, arch).n % 32 == 0


def test_chunks_depend_on_the_number_of_tokens_alone():
    for tokens in (1, 256, 257, 1024, 4096, 16384, 65536):
        chunk = tiles.state_chunk(tokens)
        assert chunk % 128 == 0 and chunk >= 256 and -(-tokens // chunk) <= 8


HOPPER, ADA = 227 << 10, 99 << 10  # bytes of shared memory


@pytest.mark.parametrize("shared", [HOPPER, ADA])
@pytest.mark.parametrize("dtype", tune.DTYPES)
@pytest.mark.parametrize("op", tune.OPS)
def test_a_part_takes_less_than_two_minutes_to_compile(op, dtype, shared):
    tried = tune.space(tune.OPS[op], tune.DTYPES[dtype], shared)
    assert 12 <= len(tried) <= 60
    table = tiles.TABLE[90 if shared == HOPPER else 89][tune.OPS[op]][str(tune.DTYPES[dtype]).removeprefix("torch.")]
    assert {tuple(row[:5]) for row in ([table] if op == "linear_attention_from" else table)} <= set(tried)


def fake_seconds(kind, dtype, tile):
    """Larger tiles are faster, 8 warps and k = 64 best; 128 × 256 does not fit in 8 bits."""
    if dtype == torch.int8 and tile.m * tile.n > 128 * 128:
        return None
    return 1e-12 / (tile.m * tile.n) * (1 + (tile.warps != 8) + (tile.k != 64) + tile.stages / 10)


def test_a_proposal_is_a_table(monkeypatch):
    proposal = tune.propose([*tune.OPS], [*tune.DTYPES], 90, 78, HOPPER, fake_seconds, say=lambda text: None)
    text = tune.render(proposal)
    assert json.loads(text) == proposal
    monkeypatch.setattr(tiles, "TABLE", {int(arch): entry for arch, entry in json.loads(text).items()})
    assert tiles.candidates(torch.bfloat16, False, 90)[0] == (Tile(128, 256, 64, 8, 2), 1.0)
    assert tiles.candidates(torch.float16, True, 90)[0] == (Tile(128, 256, 64, 8, 2), 1.0)
    eight_bits = tiles.candidates(torch.int8, False, 90)
    assert {tile[:2] for tile, _ in eight_bits} == {(64, 256), (128, 128), (64, 128), (128, 64), (64, 64)}
    assert eight_bits[-1] == (Tile(64, 64, 64, 4, 2), 0.14)
    assert proposal["90"]["processors"] == 78
    assert proposal["80"] == json.loads(json.dumps(tiles.TABLE[80]))  # the others stay as they are


def test_what_is_measured_is_kept_dtype_by_dtype():
    kept = []
    proposal = tune.propose(
        ["gemm"], ["bf16", "int8"], 90, 78, HOPPER, fake_seconds, say=lambda text: None,
        keep=lambda table: kept.append(tune.render(table)),
    )  # fmt: skip
    assert len(kept) == 2 and kept[1] == tune.render(proposal)
    bf16 = tune.propose(["gemm"], ["bf16"], 90, 78, HOPPER, fake_seconds, say=lambda text: None)
    assert kept[0] == tune.render(bf16) != kept[1], "a table of its own, which may be merged with others"


def test_the_table_is_written_as_tune_writes_it():
    """So that a proposal differs from it in what was measured alone."""
    table = {str(arch): entry for arch, entry in tiles.TABLE.items()}
    assert tune.render(table) == tiles.Path(tiles.__file__).with_suffix(".json").read_text()


def test_parts_are_merged(tmp_path, capsys):
    files = []
    for op in tune.OPS:
        for dtype in tune.DTYPES:
            part = tune.propose([op], [dtype], 90, 78, HOPPER, fake_seconds, say=lambda text: None)
            files.append(tmp_path / f"{op}_{dtype}.json")
            files[-1].write_text(tune.render(part))
    whole = tune.propose([*tune.OPS], [*tune.DTYPES], 90, 78, HOPPER, fake_seconds, say=lambda text: None)
    merged = tmp_path / "merged.json"
    assert cli.main(["tune", "--merge", *map(str, files), "--json", str(merged)]) == 0
    assert merged.read_text() == tune.render(whole)
    slower = tune.propose(["gemm"], ["int8"], 90, 78, HOPPER, lambda *args: 1e-12 * args[2].k, say=lambda text: None)
    files[0].write_text(tune.render(slower))
    assert cli.main(["tune", "--merge", *map(str, files), "--json", str(merged)]) == 2
    assert "two proposals differ in 'gemm' of int8 on 90" in capsys.readouterr().err
    files[0].write_text("{")
    assert cli.main(["tune", "--merge", str(files[0]), "--json", str(merged)]) == 2
    assert "is no proposal of `sana tune`" in capsys.readouterr().err


def test_a_merge_keeps_the_multiprocessors_that_were_measured():
    """Whichever proposal comes first: each has the other architecture's entry as it stands in the table."""
    hopper, ampere = (
        tune.propose(["gemm"], ["bf16"], arch, processors, HOPPER, fake_seconds, say=lambda text: None)
        for arch, processors in ((90, 114), (80, 100))
    )
    for order in ([hopper, ampere], [ampere, hopper]):
        merged = tune.merge(order)
        assert (merged["90"]["processors"], merged["80"]["processors"]) == (114, 100)


def test_the_tiles_that_are_measured_are_those_that_run(monkeypatch):
    """The tile takes its place before the clock starts, not within it."""
    module = importlib.import_module("sana_kernels.gemm.triton")
    ran, before = [], module.gemm_tile
    wanted = Tile(64, 128, 64, 4, 3)
    chosen = tune.mock.patch.object(module, "gemm_tile", lambda *shape: wanted)
    call = lambda: ran.append(module.gemm_tile(torch.bfloat16, False, 1, 1, 1, 90))  # noqa: E731
    monkeypatch.setattr(tune, "_product", lambda *args: (chosen, call, 1000))
    monkeypatch.setattr(tune, "gpu_times", lambda calls: iter([[next(calls)() or 2.0 for _ in range(20)]]))
    assert tune.measure("gemm", torch.bfloat16, wanted) == pytest.approx(2e-6)
    assert ran == [wanted] * 20 and module.gemm_tile is before


@pytest.mark.parametrize("name", ["OutOfResources", "CompilationError", "RuntimeError", "AcceleratorError"])
def test_a_tile_that_cannot_run_is_left_out(monkeypatch, name):
    """Whatever Triton or its compiler says; not what the GPU says, after which nothing runs."""
    errors = {
        "OutOfResources": lambda: pytest.importorskip("triton.runtime.errors").OutOfResources(3, 2, "shared memory"),
        "CompilationError": lambda: pytest.importorskip("triton.compiler.errors").CompilationError(None, None, "no"),
        "RuntimeError": lambda: RuntimeError("PassManager::run failed"),
        "AcceleratorError": lambda: torch.AcceleratorError("an illegal memory access was encountered", 700),
    }
    error = errors[name]()

    def raising(calls):
        raise error

    monkeypatch.setattr(tune, "_product", lambda *args: (tune.mock.MagicMock(), None, 1000))
    monkeypatch.setattr(tune, "gpu_times", raising)
    if name == "AcceleratorError":
        with pytest.raises(torch.AcceleratorError):
            tune.measure("gemm", torch.bfloat16, Tile(64, 64, 64, 4, 2))
    else:
        assert tune.measure("gemm", torch.bfloat16, Tile(64, 64, 64, 4, 2)) is None


def test_a_place_that_cannot_be_written_is_refused_before_measuring(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "wanted", lambda *args: pytest.fail("it began"))
    assert cli.main(["tune", "--json", str(tmp_path / "nowhere" / "tiles.json")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would measure")
def test_without_a_gpu_it_says_so(capsys):
    assert cli.main(["tune"]) == 3
    assert "torch sees none here" in capsys.readouterr().err
    assert cli.main(["tune", "softmax"]) == 2
    assert "choose one of gemm, gemm_residual, linear_attention_from" in capsys.readouterr().err
    assert cli.main(["tune", "gemm", "--dtypes", "fp64"]) == 2
    assert "choose from bf16, int8, fp8" in capsys.readouterr().err
