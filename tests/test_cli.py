"""The command line as a person meets it: files, metadata, exit statuses, one-line errors, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import sana_model
from sana_model import batch, memory
from sana_model.cli import main
from sana_model.commands import generate
from sana_model.png import read_metadata, write_png
from sana_model.weights import verify

SMALL = ["--size", "96x64", "--steps", "1"]
ROOT = Path(__file__).parent.parent


@cache
def _load_once(**options):
    return sana_model.load(**options)


def _load(picture=None, **options):
    """As `sana_model.load`, but each model is loaded only once."""
    pipe = _load_once(**options)
    if picture is not None:
        pipe.settings(**picture)
    return pipe


@pytest.fixture(autouse=True)
def _start(monkeypatch, tmp_path):
    """Every test has a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load", _load)


def pixels(file: str | Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def refused(capsys, status: int, *arguments: str) -> str:
    """The one line on stderr of a command that must fail, and must leave nothing behind."""
    before = sorted(os.listdir())
    try:
        assert main(list(arguments)) == status
    except SystemExit as stop:  # argparse
        assert stop.code == status
    errors = capsys.readouterr().err
    assert errors.startswith("sana: ") and errors.count("\n") == 1 and "Traceback" not in errors
    assert sorted(os.listdir()) == before
    return errors


def test_a_picture_is_that_of_the_python_interface(capsys):
    assert main(["generate", "a red fox", *SMALL, "--seed", "7", "--negative", "blur", "--guidance", "3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("sana-tiny, loaded in ") and "out.png   seed 7" in said
    assert all(f"\n{stage} " in said for stage in ("text encoder", "denoising", "decoder", "other", "total"))
    same = {"width": 96, "height": 64, "steps": 1, "negative_prompt": "blur", "guidance": 3.0}
    pipe = _load_once(model="sana-tiny", low_memory=False, cuda_graph=True)
    assert (pixels("out.png") == np.asarray(pipe("a red fox", seed=7, **same).images[0])).all()
    assert (pixels("out.png") != np.asarray(pipe("a red fox", seed=8, **same).images[0])).any()
    assert os.listdir() == ["out.png"]


def test_several_pictures_a_plan_and_the_numbers(capsys):
    assert main(["generate", "a fox", *SMALL, "--num-images", "2", "-o", "f.png", "--plan", "--json", "s.json"]) == 0
    assert "plan for backend" in capsys.readouterr().out
    stats = json.loads(Path("s.json").read_text())
    assert stats["files"] == ["f-0.png", "f-1.png"] and stats["seeds"] == [0, 1]
    assert sorted(os.listdir()) == ["f-0.png", "f-1.png", "s.json"]
    assert stats["settings"]["num_images"] == 2 and stats["model"]["random"] is False
    assert 0 <= stats["plan"]["outside_share"] <= 1 and stats["plan"]["rows"]
    stages = [stats["timings_ms"][name] for name in ("text_encode", "denoise", "decode", "other")]
    assert sum(stages) == pytest.approx(stats["timings_ms"]["total"])
    assert (pixels("f-0.png") != pixels("f-1.png")).any()


def test_a_picture_is_painted_again_from_its_file():
    given = ["--size", "64", "--steps", "2", "--sampler", "flow_euler", "--pag", "1.5", "--guidance-interval", "0,0.9"]
    assert main(["generate", "renard, «très» tôt", *given, "--num-images", "2", "--precision", "fp32"]) == 0
    assert main(["generate", "--from", "out-1.png"]) == 0
    assert (pixels("again.png") == pixels("out-1.png")).all()
    assert read_metadata("again.png") == read_metadata("out-1.png")

    assert main(["generate", "--from", "out-1.png", "--steps", "1", "-o", "less.png"]) == 0
    less = read_metadata("less.png")
    assert (less.seed, less.settings.steps, less.precision) == (1, 1, "fp32") and less.settings.num_images == 1
    assert less.prompt == "renard, «très» tôt" and less.settings.sampler == "flow_euler"
    assert (pixels("less.png") != pixels("out-1.png")).any()
    assert main(["generate", "another prompt", "--from", "out-1.png", "--size", "96", "-o", "other.png"]) == 0
    assert read_metadata("other.png").prompt == "another prompt" and pixels("other.png").shape == (96, 96, 3)


def test_a_prompt_that_is_cut_off_is_a_warning_of_one_line(capsys):
    assert main(["generate", "fox " * 40, *SMALL]) == 0
    errors = capsys.readouterr().err
    assert errors.startswith("sana: warning: ") and errors.count("\n") == 1


def test_an_instruction_may_come_from_a_file():
    Path("ask.txt").write_text("Schöner malen: ")
    for number, instruction in enumerate(("ask.txt", "none", "default")):
        assert main(["generate", "a fox", *SMALL, "--instruction", instruction, "-o", f"{number}.png"]) == 0
    assert read_metadata("0.png").settings.instruction == "Schöner malen: "
    assert [read_metadata(f"{i}.png").settings.instruction for i in (1, 2)] == ["none", "default"]
    assert (pixels("0.png") != pixels("1.png")).any() and (pixels("0.png") != pixels("2.png")).any()


@pytest.mark.parametrize(("backend", "tiled"), [("reference", True), ("cpu", False)])
def test_low_memory_frees_the_text_encoder_and_decodes_in_tiles_where_bands_cannot_be(backend, tiled):
    for _ in range(2):
        assert main(["generate", "a fox", *SMALL, "--low-memory", "--backend", backend]) == 0
        pipe = _load_once(backend=backend, model="sana-tiny", low_memory=True, cuda_graph=True)
        assert pipe.model.text_encoder is None
    assert read_metadata("out.png").settings.tiled is tiled


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate"], "nothing to paint"),
        (["generate", "a", "--sise", "64"], "unrecognized arguments"),
        (["generate", "a", "--size", "big"], "'big' is not a size"),
        (["generate", "a", "--size", "96x"], "'96x' is not a size"),
        (["generate", "a", "--size", "0"], "width 0 is not a positive multiple of 32; the smallest is 32"),
        (["generate", "a", "--guidance", "-5"], "guidance must be 0 .* or positive, not -5.0"),
        (["convert", "sana-tiny", "x", "--base", "sana-tiny"], "sana-tiny has all its parts: a base"),
        (["generate", "a", "--threads", "100000"], "between 1 and 1024, not 100000"),
        (["generate", "a", "-o", "b.png", "--json", "b.png"], "b.png is one of the pictures"),
        (["generate", "a", "-o", "b.png", "--num-images", "2", "--json", "b-1.png"], "b-1.png is one of the pictures"),
        (["generate", "a", "-o", "empty.txt/b.png"], "empty.txt is a file, so that empty.txt/b.png cannot be in it"),
        (["generate", "a", "-o", "it's here/b.png"], """mkdir -p 'it'"'"'s here'"""),
        (["generate", "--prompts", "deep.jsonl"], "deep.jsonl, line 1: not JSON: maximum recursion depth"),
        (["generate", "--from", "deep.png"], "the settings stored in deep.png cannot be read: maximum recursion"),
        (["generate", "--from", "list.png"], "the settings stored in list.png .* missing, or of another form"),
        (["show", "."], "cannot be read as a PNG picture: Is a directory"),
        (["verify", "sana-tiny", "--precision", "w8a8"], "choose one of fp32, bf16, fp16"),
        (["convert", "sana-tiny-random", "kept.txt", "--to", "original"], "must end so; kept.txt does not"),
        (["convert", "sana-tiny-random", "kept.pth", "--to", "original"], "kept.pth is there already; --force"),
        (["reconstruct", "foreign.png", "./foreign.png"], "the picture itself, which would be lost"),
        (["quantize", "sana-tiny", "--precision", "w8a8", "--seed", "-1", "-o", "q"], "seed must be 0 or more, not -1"),
        (["bench", "quality", "--json", "x.md"], "name a .json"),
        (["bench", "quality", "--json", "x.png"], "name a .json"),
        (["bench", "image", "--seed", "-1"], "seed must be 0 or more, not -1"),
        (["bench", "image", "--text-tokens", "0"], "between 2 and 64"),
        (["bench", "image", "--guidance", "nan"], "guidance is a number, not nan"),
        (["bench", "step", "--size", "50"], "nearest are 32 and 64"),
        (["bench", "decode", "--size", "0"], "--size 0 is not a positive multiple of 32"),
        (["tune", "--merge", "nothing.json", "--json", "t.json"], "nothing.json proposes nothing"),
        (["generate", "a", "--guidance", "nan"], "'nan' is not a number"),
        (["generate", "a", "--guidance-interval", "0.9,0.1"], "not an interval"),
        (["generate", "a", "--dialect", "klingon"], "invalid choice"),
        (["generate", "a", "--size", "100x64"], "nearest are 96 and 128"),
        (["generate", "a", "--steps", "0"], "at least 1"),
        (["generate", "a", "--num-images", "0"], "at least 1"),
        (["generate", "a", "--threads", "0"], "threads"),
        (["generate", "a", "--seed", "-1"], "seed"),
        (["generate", "a", "--precision", "fp7"], "'fp7' is not known"),
        (["generate", "a", "--backend", "abacus"], "'abacus' is not known"),
        (["generate", "a", "--sampler", "scm"], "flow_dpm or flow_euler"),
        (["generate", "a", "--model", "sana-tinny"], "did you mean sana-tiny"),
        (["generate", "a", "--instruction", "missing.txt"], "missing.txt"),
        (["generate", "a \udcff", *SMALL], "not valid Unicode"),
        (["generate", "a", "-o", "out.jpg"], "must end in .png"),
        (["generate", "a", "-o", "folder.png"], "is a folder"),
        (["generate", "a", "-o", "many.png", "--num-images", "3"], "many-2.png is a folder"),
        (["generate", "a", "-o", "no/where.png"], "mkdir -p no"),
        (["generate", "a", "--json", os.devnull], "not an ordinary file"),
        (["generate", "--from", "missing.png"], "no such file"),
        (["generate", "--from", "foreign.png"], "not painted by sana"),
        (["generate", "--prompts", "missing.txt"], "cannot read missing.txt"),
        (["generate", "a", "--prompts", "empty.txt"], "goes without PROMPT"),
        (["generate", "--prompts", "empty.txt"], "holds no prompts"),
        (["generate", "--prompts", "latin.txt"], "UTF-8"),
        (["show", "foreign.png"], "not painted by sana"),
        (["convert", "sana-tinny", "x"], "did you mean"),
        ([], "required"),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, monkeypatch, arguments, complaint):
    Path("folder.png").mkdir()
    Path("many-2.png").mkdir()
    Path("empty.txt").write_text("# nothing\n\n")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("deep.jsonl").write_text("[" * 100_000)
    Path("nothing.json").write_text("{}")
    for name in ("kept.txt", "kept.pth"):
        Path(name).write_text("precious")
    for name, stored in (("foreign", {}), ("deep", {"sana": "[" * 100_000}), ("list", {"sana": '{"settings": []}'})):
        chunks = PngImagePlugin.PngInfo()
        for key, text in stored.items():
            chunks.add_text(key, text)
        Image.new("RGB", (32, 32)).save(f"{name}.png", pnginfo=chunks)
    before = Path("foreign.png").read_bytes()
    monkeypatch.setattr("sana_model.weights.models.load_model", None)  # whatever is refused, is before that
    assert re.search(complaint, refused(capsys, 2, *arguments))
    assert Path("kept.txt").read_text() == Path("kept.pth").read_text() == "precious"
    assert Path("foreign.png").read_bytes() == before


def test_what_the_machine_lacks_is_one_line_and_status_3(capsys, monkeypatch):
    if not torch.cuda.is_available():
        assert "NVIDIA GPU" in refused(capsys, 3, "generate", "a", "--backend", "cuda")
    monkeypatch.setattr(memory, "available", lambda _device: 400_000_000)
    assert "--size" in refused(capsys, 3, "generate", "a", "--size", "2048")
    monkeypatch.setattr(memory, "available", lambda _device: 4_000_000)
    monkeypatch.setattr(generate, "load", sana_model.load)
    assert "weights of sana-tiny" in refused(capsys, 3, "generate", "a")

    def fail(*_args, **_kwargs):
        torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(generate, "load", fail)
    assert "out of memory; try --low-memory" in refused(capsys, 3, "generate", "a")


def test_memory_that_is_lacking_is_saved_by_flags_that_the_command_has(capsys, monkeypatch):
    Image.new("RGB", (32, 32)).save("in.png")
    commands = {
        "sana_model.commands.generate.load": ["generate", "a"],
        "sana_model.weights.verify.load": ["verify", "sana-tiny"],
        "sana_model.commands.reconstruct.load_model": ["reconstruct", "in.png", "out.png"],
        "sana_model.quantize.model.load_model": ["quantize", "sana-tiny", "--precision", "w4a4", "-o", "q"],
        "sana_model.weights.models.load_model": ["convert", "sana-tiny", "c"],
    }

    def fail(*_args, **_kwargs):
        raise MemoryError

    for loader, (command, *arguments) in commands.items():
        with monkeypatch.context() as patch:
            patch.setattr(loader, fail)
            assert main([command, *arguments]) == 3
        said = capsys.readouterr().err
        with pytest.raises(SystemExit):
            main([command, "--help"])
        usage = capsys.readouterr().out
        assert said.startswith("sana: out of memory; ") and said.count("\n") == 1
        assert all(flag in usage for flag in re.findall(r"--[a-z-]+", said)), said


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["reconstruct", "in.png", "out.png"], "autoencoder"),
        (["quantize", "sana-tiny", "--precision", "w4a4", "-o", "q"], "text encoder"),
        (["export", "onnx", "sana-tiny", "-o", "x", "--only", "transformer"], "DiT"),
    ],
)
def test_a_part_that_is_too_large_is_refused_before_it_is_loaded(capsys, monkeypatch, arguments, part):
    Image.new("RGB", (32, 32)).save("in.png")
    for module in ("sana_model.commands.reconstruct", "sana_model.quantize.model", "sana_export.exporter"):
        monkeypatch.setattr(f"{module}.load_model", lambda *_args, **_kwargs: pytest.fail("loaded"))
    monkeypatch.setattr(memory, "available", lambda _device: 1_000_000)
    assert main(arguments) == 3
    said = capsys.readouterr().err
    assert f"the {part} of sana-tiny needs" in said and "1 MB are free" in said and said.count("\n") == 1


def test_a_picture_of_a_model_that_is_elsewhere_asks_for_it(capsys):
    assert main(["generate", "a", *SMALL]) == 0
    metadata = read_metadata("out.png")
    write_png("moved.png", Image.open("out.png"), replace(metadata, model="q8"))
    complaint = "moved.png was painted with the model q8, which is not here; say where it is with --model PATH"
    assert complaint in refused(capsys, 2, "generate", "--from", "moved.png")
    assert main(["generate", "--from", "moved.png", "--model", "sana-tiny"]) == 0


def test_a_picture_of_a_backend_that_is_off_asks_for_another(capsys, monkeypatch):
    assert main(["generate", "a", *SMALL, "--backend", "reference"]) == 0
    monkeypatch.setattr(generate, "backend_status", lambda name: f"{name} is on holiday")
    assert "add --backend auto" in refused(capsys, 3, "generate", "--from", "out.png")
    assert main(["generate", "--from", "out.png", "--backend", "auto"]) == 0


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def fail(**_options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(generate, "load", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["generate", "a"])


def test_a_model_is_loaded_without_the_compiler_of_torch():
    """Importing it takes longer than all the rest."""
    code = (
        "import sys, sana_model; sana_model.load('sana-tiny-random', backend='cpu', precision='w8a8');"
        " assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_an_interrupted_run_leaves_nothing_behind(capsys, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    assert "interrupted" in refused(capsys, 130, "generate", "a", *SMALL)


@pytest.fixture
def usual_ctrl_c():
    """pytest's workers have none."""
    before, alarm = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGALRM)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler  # `main` gave them back
    assert signal.getsignal(signal.SIGALRM) is alarm and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_ctrl_c_that_a_library_turned_into_another_error(capsys, monkeypatch, usual_ctrl_c):
    def load(**_options):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise RuntimeError("trying to pop from empty mode stack")

    monkeypatch.setattr(generate, "load", load)
    assert refused(capsys, 130, "generate", "a") == "sana: interrupted\n"


def test_ctrl_c_waits_for_the_end_of_an_import(capsys, monkeypatch, tmp_path, usual_ctrl_c):
    def load(**_options):
        import interrupted

        assert interrupted.whole
        time.sleep(10)
        raise AssertionError("Ctrl-C was lost")

    (tmp_path / "interrupted.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(generate, "load", load)
    assert refused(capsys, 130, "generate", "a") == "sana: interrupted\n"
    assert sys.modules.pop("interrupted").whole


@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("importing torch", signal.SIGINT),
        ("painting", signal.SIGINT),
        ("painting", signal.SIGTERM),
        ("painting", signal.SIGHUP),
    ],
)
def test_signals_to_end_leave_nothing_behind(tmp_path, when, number):
    command = [sys.executable, "-u", "-m", "sana_model", "generate", "a", "--size", "64", "--steps", "1000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if when == "painting":
        while not process.stdout.readline().startswith("backend"):
            assert process.poll() is None, process.stderr.read()
    while "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (128 + number, -number), errors  # CPython's choice; a shell shows the same for both
    assert errors == "sana: interrupted\n" and os.listdir(tmp_path) == []


def _command(line: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = line.replace("sana ", f"{sys.executable} -m sana_model ")
    return subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True)


def test_a_daemon_has_no_streams():
    done = _command("sana generate a --size 64 --steps 1 <&- >&- 2>&-")
    assert done.returncode == 0 and pixels("out.png").shape == (64, 64, 3)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_behind_the_standard_output():
    done = _command("sana show --help >/dev/full; sana doctor >/dev/full")
    assert done.returncode == 3 and done.stderr.endswith("sana: the disk is full, to which the standard output goes\n")
    assert done.stderr.count("\n") == 1


def test_a_bar_counts_the_steps_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["generate", "a fox", "--size", "64", "--steps", "3"]) == 0
    bars = capsys.readouterr().err
    assert "denoising: 100%" in bars and "3/3" in bars
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert main(["generate", "a fox", "--size", "64", "--steps", "3"]) == 0
    assert capsys.readouterr().err == ""


def test_many_prompts_are_resumed(capsys):
    def paint(*flags: str) -> str:
        assert main(["generate", "--prompts", "p.txt", "-o", "all/of", *SMALL, *flags]) == 0
        return capsys.readouterr().out.splitlines()[-1].split(";")[0]

    prompts = Path("p.txt")
    prompts.write_text("\ufeffa fox\n\n# a comment\nüber {a|b}\n狐狸\n", encoding="utf-8")
    assert paint() == "3 painted, 0 already there"
    names = sorted(os.listdir("all/of"))
    assert names == ["00000-a-fox.png", "00001-über-a-b.png", "00002-狐狸.png", "results.jsonl"]
    lines = [json.loads(line) for line in Path("all/of/results.jsonl").read_text().splitlines()]
    assert [line["files"] for line in lines] == [[name] for name in names[:3]]
    assert read_metadata("all/of/00001-über-a-b.png").prompt == "über {a|b}"
    first = pixels("all/of/00000-a-fox.png")
    assert paint() == "0 painted, 3 already there"

    Path("all/of/00002-狐狸.png").unlink()
    assert paint() == "1 painted, 2 already there"
    prompts.write_text("a fox!\nüber {a|b}\n狐狸\n", encoding="utf-8")  # the file name stays, the prompt does not
    assert paint() == "1 painted, 2 already there"
    assert (pixels("all/of/00000-a-fox.png") != first).any()
    assert paint("--seed", "1") == "3 painted, 0 already there"
    whole = Path("all/of/results.jsonl").read_text()
    Path("all/of/results.jsonl").write_text(whole[:-40])  # as after a power cut
    assert paint("--seed", "1") == "1 painted, 2 already there"
    assert paint("--seed", "1") == "0 painted, 3 already there"


def test_pictures_of_another_run_that_was_interrupted_are_not_there_already(capsys, monkeypatch):
    def paint(seed: str) -> str:
        flags = ["--seed", seed, "--num-images", "3"]
        assert main(["generate", "--prompts", "p.txt", "-o", "all", *SMALL, *flags]) == 0
        return capsys.readouterr().out.splitlines()[-1].split(";")[0]

    def interrupted(*args) -> None:
        write_png(*args)
        raise KeyboardInterrupt

    Path("p.txt").write_text("a fox\n")
    paint("0")
    first = pixels("all/00000-a-fox-0.png")
    with monkeypatch.context() as patch:
        patch.setattr(batch, "write_png", interrupted)
        assert main(["generate", "--prompts", "p.txt", "-o", "all", *SMALL, "--seed", "5", "--num-images", "3"]) == 130
    assert (pixels("all/00000-a-fox-0.png") != first).any()
    assert paint("0") == "1 painted, 0 already there" and (pixels("all/00000-a-fox-0.png") == first).all()
    assert paint("0") == "0 painted, 1 already there"


def test_prompts_with_settings_of_their_own():
    lines = [{"prompt": "a fox", "seed": 5, "num_images": 2}, {"prompt": "a cat", "width": 64, "guidance": 2}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["generate", "--prompts", "p.jsonl", *SMALL, "--seed", "9"]) == 0
    assert sorted(os.listdir("out")) == ["00000-a-fox-0.png", "00000-a-fox-1.png", "00001-a-cat.png", "results.jsonl"]
    assert read_metadata("out/00000-a-fox-1.png").seed == 6
    cat = read_metadata("out/00001-a-cat.png").settings
    assert (cat.width, cat.height, cat.seed, cat.guidance) == (64, 64, 9, 2.0)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "a", "seed": "x"}', "seed is a whole number, not 'x'"),
        ('{"prompt": "a", "style": 1}', "'style' is not a setting"),
        ('{"seed": 1}', "an object with"),
        ("a fox", "not JSON"),
        ('{"prompt": "a", "width": 70}', "width 70"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_painted(capsys, line, complaint):
    Path("p.jsonl").write_text('{"prompt": "a fox"}\n\n' + line + "\n")
    Path("out").mkdir()
    errors = refused(capsys, 2, "generate", "--prompts", "p.jsonl", *SMALL)
    assert "p.jsonl, line 3" in errors and complaint in errors and os.listdir("out") == []


def test_show_prints_what_was_painted_and_no_control_characters(capsys):
    assert main(["generate", "a fox \x1b[31m, très tôt", *SMALL]) == 0
    capsys.readouterr()
    assert main(["show", "out.png"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("a fox ?[31m, très tôt\nSteps: 1, Sampler: flow_dpm") and "\x1b" not in said
    assert '"height": 64' in said


def test_convert_writes_a_folder_that_paints_the_same_picture(capsys):
    assert main(["convert", "sana-tiny-random", "tiny"]) == 0
    for model in ("sana-tiny-random", "tiny"):
        assert main(["generate", "a fox", *SMALL, "--model", model, "--precision", "fp32", "-o", f"{model}.png"]) == 0
    assert (pixels("tiny.png") == pixels("sana-tiny-random.png")).all()
    assert read_metadata("tiny.png").model == "tiny" and read_metadata("tiny.png").random
    assert "sana-tiny-random (random weights: timing only)" in capsys.readouterr().out
    assert main(["convert", "tiny", "dit.pth", "--to", "original"]) == 0
    assert capsys.readouterr().out == "dit.pth\n" and Path("dit.pth").stat().st_size > 10**6


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
def test_verify_answers_by_its_status(capsys, monkeypatch, passed, status):
    def fake(model, precision, base):
        return verify.Report(f"{model} {precision} {base}", (verify.Row("decoder", "1e-6", "1e-5", passed),))

    monkeypatch.setattr(verify, "verify", fake)
    assert main(["verify", "sana-tiny", "--precision", "bf16"]) == status
    said = capsys.readouterr().out
    assert said.startswith("sana-tiny bf16 None\n") and ("PASS" if passed else "FAIL") in said


def test_doctor_prints_every_op(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert all(op in said for op in ("linear_attention", "mix_ffn", "reference", "torch"))


def test_help_is_light():
    heavy = "{'torch', 'numpy', 'PIL', 'tqdm', 'diffusers'}"
    script = f"import sys; from sana_model.cli import parser; parser(); sys.exit(str({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.stderr == "set()\n"
    assert main.__module__ == "sana_model.cli"
    for command in ("generate", "show", "verify", "convert", "doctor", "bench"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
