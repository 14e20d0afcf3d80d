"""`make gpu` without a GPU: bench/gpu.py with a Python in its place that only pretends to build, test and measure."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from sana_bench import gpu, tune
from sana_bench.kernels import select
from sana_bench.runs import RunName
from sana_kernels import backend
from sana_kernels.backend import BACKENDS
from sana_model import cli

# Its first argument is -c (a question of the runner) or -m (a step). FAKE has what to do differently: {word: action}
# for the steps that have this word among their arguments.
FAKE_PYTHON = """
import json, os, signal, subprocess, sys, time
args, actions = sys.argv[1:], json.loads(os.environ["FAKE"])
if args[0] == "-c":
    print("warning: of some library")
    if "get_device_name" in args[1]:
        print("Fake GPU")
        sys.exit("no gpu" in actions)
    else:
        print(actions.get("facts", "facts: ") + json.dumps({"precisions": ["fp32", "bf16", "w8a8", "w4a4"],
              "baselines": ["diffusers", "diffusers-compile", "openvino"],
              "kernels": {"gemm": ["bf16", "w8a8"]}, "tuned": [["gemm", "int8"]], "cuda": actions.get("cuda")}))
        print("warning: {of another library, at its end}")
    sys.exit()
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(args) + "\\n")
action = next((actions[word] for word in args if word in actions), "work")
if action == "hang":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("child", child.pid, flush=True)
    time.sleep(60)
if action == "fail":
    sys.exit("it broke")
if "--json" in args:
    row = {"kind": "image", "backend": "cuda", "precision": "bf16", "status": "ok", "workload": {"batch": 4},
           "timing": {"ms": {"median": 200.0}}}
    if action in ("FAIL", "error"):
        row["status"] = action
    document = {"run": {"complete": action != "partial"}, "results": [row]} if "bench" in args else {"90": {}}
    with open(args[args.index("--json") + 1], "w") as file:
        file.write(json.dumps(document)[: 20 if action == "torn" else None])
    if action == "killed":
        os.kill(os.getppid(), signal.SIGKILL)
    if action == "Ctrl-C":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
print("did", args[1])
sys.exit(action in ("FAIL", "partial", "crash"))
"""
SANITIZER = """#!/bin/sh
printf '%s\\n' "$*" "57 calls of 9 CUDA ops" "$PYTORCH_NO_CUDA_MEMORY_CACHING" "========= {line}"
exit {status}
"""
ROW = "image_sana-0.6b_1024_batch1"
COMPILED = "diffusers-compile_sana-0.6b_1024_batch1"
KERNELS = "kernels_gemm_bf16"
TILES = "tiles_gemm_int8"
OTHERS = [f"{label}_sana-0.6b_1024_batch1" for label in ("triton", "others")]
ROWS = [ROW, COMPILED, KERNELS, "kernels_gemm_w8a8", TILES, *OTHERS, "image_sana-0.6b_512_batch1"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the runner → (exit status, what it printed); `run.calls()` has the steps that ran since, by their arguments."""
    fake, out = tmp_path / "python.py", tmp_path / "out"
    fake.write_text(FAKE_PYTHON)
    monkeypatch.setattr(gpu, "PYTHON", [sys.executable, "-I", "-S", str(fake)])
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    monkeypatch.setattr(gpu, "MODELS", ("sana-0.6b",))
    monkeypatch.setattr(gpu, "SIZES", (512, 1024))
    monkeypatch.setattr(gpu, "BATCHES", (1,))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))

    def run(what: str, *flags: str, **actions: str):
        (tmp_path / "calls").write_text("")
        monkeypatch.setenv("FAKE", json.dumps({word.replace("_", " "): action for word, action in actions.items()}))
        status = gpu.main([what, "--out", str(out), *flags])
        return status, capsys.readouterr().out

    def sanitizer(line: str, status: int = 0) -> None:
        (tmp_path / "compute-sanitizer").write_text(SANITIZER.format(line=line, status=status))
        (tmp_path / "compute-sanitizer").chmod(0o755)

    def calls() -> list[list[str]]:
        return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    run.out, run.sanitizer, run.calls = out, sanitizer, calls
    sanitizer("ERROR SUMMARY: 0 errors")
    return run


def verdicts(text: str) -> dict[str, str]:
    """Name → verdict, of the table that comes last."""
    lines = text.split("log and results in")[1].splitlines()[1:]
    found = (
        (line.split()[0], next(v for v in VERDICTS if f" {v} " in line)) for line in lines if "rows are" not in line
    )
    return dict(found)


VERDICTS = ("ok", "FAIL", "skipped", "out of time")
STEPS = ("build", "tests", "image", "kernels", "memcheck", "racecheck")


def alive(pid: int) -> bool:
    """Is it there, and no zombie that nobody has waited for?"""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


@pytest.mark.parametrize("what", ["quick", "more"])
def test_without_a_gpu_it_says_so_and_does_nothing(run, what):
    assert run(what, no_gpu="")[0] == 3
    assert not run.calls() and not run.out.exists()


# ---- quick


def test_quick_does_every_step_and_prints_a_table(run):
    status, text = run("quick")
    assert status == 0 and verdicts(text) == dict.fromkeys(STEPS, "ok")
    assert "cuda:bf16 50.0 ms" in text  # 200 ms for four pictures
    pip, pytest_, image, kernels = run.calls()
    assert pip[1] == "pip" and {"--no-build-isolation", "--no-deps"} <= {*pip}
    assert pytest_[1] == "pytest" and "gpu" in pytest_
    assert kernels[1:4] == ["sana_model", "bench", "kernels"]
    assert image[image.index("--runs") + 1] == "auto:w8a8,auto:bf16,auto:bf16-eager,diffusers:bf16"
    assert image[image.index("--repeat") + 1] == "3"  # what `sana bench compare` asks for
    log = (run.out / "log.txt").read_text()
    assert "--tool memcheck" in log and "--tool racecheck" in log
    assert "gpu ops\n57 calls of 9 CUDA ops\n1\n" in log and text.count("0 errors; 57 calls of 9 CUDA ops") == 2
    assert {path.name for path in run.out.iterdir()} == {"log.txt", "kernels.json", "image.json"}


@pytest.mark.parametrize("word, step", [("pip", "build"), ("pytest", "tests"), ("kernels", "kernels")])
def test_a_step_that_fails_is_reported_and_does_not_stop_the_rest(run, word, step):
    status, text = run("quick", **{word: "fail"})
    assert status == 1 and verdicts(text) == dict.fromkeys(STEPS, "ok") | {step: "FAIL"}
    assert "it broke" in text


def test_a_step_that_hangs_is_ended_with_all_that_it_started(run, monkeypatch):
    left = gpu.Runner.left
    monkeypatch.setattr(gpu.Runner, "left", lambda self, until: 0.4 if until == 240 else left(self, until))
    start = time.monotonic()
    status, text = run("quick", pytest="hang")
    assert time.monotonic() - start < 10
    assert status == 1 and verdicts(text) == dict.fromkeys(STEPS, "ok") | {"tests": "out of time"}
    child = next(line for line in (run.out / "log.txt").read_text().splitlines() if line.startswith("child"))
    assert not alive(int(child.split()[1]))


def test_every_step_is_given_the_time_until_its_second(run, monkeypatch):
    given = []
    execute = gpu.execute
    monkeypatch.setattr(gpu, "execute", lambda name, command, seconds, *a, **k: given.append((name, seconds)) or execute(
        name, command, seconds, *a, **k))  # fmt: skip
    run("quick")
    limits = [seconds for name, seconds in given if name in STEPS]
    assert limits == sorted(limits) and limits[0] < 151 and 460 < limits[-1] <= gpu.QUICK_SECONDS
    assert gpu.QUICK_SECONDS + 5 <= 8 * 60


def test_a_build_without_cuda_fails_and_the_rest_goes_on(run):
    status, text = run("quick", cuda="no nvcc was found")
    assert status == 1 and verdicts(text) == dict.fromkeys(STEPS, "ok") | {"package": "FAIL"}
    assert "no nvcc was found" in text


def test_a_package_that_does_not_tell_is_no_crash(run):
    status, text = run("quick", facts="nothing: ")
    assert status == 1 and verdicts(text) == {"build": "ok", "package": "FAIL"}


@pytest.mark.parametrize(
    "line, status, expected",
    [
        ("RACECHECK SUMMARY: 0 hazards displayed", 0, "ok"),
        ("ERROR SUMMARY: 3 errors", 9, "FAIL"),
        ("ERROR SUMMARY: 0 errors", 3, "FAIL"),  # the ops crashed
        ("Error: Device not supported. ERROR SUMMARY: 1 error", 9, "skipped"),
        ("Error: Unable to find injection library", 1, "skipped"),
    ],
)
def test_what_compute_sanitizer_says(run, line, status, expected):
    run.sanitizer(line, status)
    runner = gpu.Runner(run.out, 60)
    run.out.mkdir()
    found = runner.sanitize("racecheck", 50)
    assert found.verdict == expected and line in found.detail


def test_no_compute_sanitizer_is_a_sentence(run, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda *args, **options: None)
    status, text = run("quick")
    assert status == 0 and verdicts(text) == dict.fromkeys(STEPS, "ok") | dict.fromkeys(STEPS[4:], "skipped")


# ---- more


def test_more_measures_each_row_once(run):
    status, text = run("more")
    measured = {path.stem for path in run.out.glob("*.json")}
    assert status == 0 and list(verdicts(text)) == ["build", *ROWS] and {*verdicts(text).values()} == {"ok"}
    assert measured == {*ROWS}
    (run.out / f"{KERNELS}.json").unlink()
    (run.out / f"{ROW}.json").write_text('{"run": {"comp')  # of a disk that was full, say
    status, text = run("more")
    assert [call[2:4] for call in run.calls()[1:]] == [["bench", "image"], ["bench", "kernels"]]
    assert status == 0 and len(verdicts(text)) == 1 + len(ROWS)


@pytest.mark.parametrize("action", ["fail", "partial", "torn"])
def test_a_row_that_broke_leaves_no_result_and_is_tried_again_last(run, action):
    status, text = run("more", **{"1024": action})
    assert status == 1 and verdicts(text)[ROW] == "FAIL" and "4 of 8 rows" in text
    assert not (run.out / f"{ROW}.json").exists() and not (run.out / ".partial").exists()
    assert (run.out / f"{ROW}.partial.json").exists() == (action != "fail")  # what there is of it
    assert (f"{ROW}.partial.json" in text) == (action != "fail")
    (run.out / f"{KERNELS}.json").unlink()
    status, text = run("more")
    assert status == 0 and not list(run.out.glob("*.failed.json")) and not list(run.out.glob("*.partial.json"))
    assert [call[3] for call in run.calls()[1:]] == ["kernels", *["image"] * 4]


def test_half_a_proposal_is_no_result(run):
    """Tiles are written dtype by dtype, and a table does not say that some are missing."""
    status, text = run("more", tune="crash")
    assert status == 1 and verdicts(text)[TILES] == "FAIL" and (run.out / f"{TILES}.partial.json").exists()
    assert run("more")[0] == 0 and [call[2] for call in run.calls()[1:]] == ["tune"]


def test_a_run_that_breaks_leaves_the_result_of_an_earlier_one(run):
    run("quick")
    before = (run.out / "kernels.json").read_text()
    status, text = run("quick", kernels="fail")
    assert status == 1 and verdicts(text)["kernels"] == "FAIL"
    assert (run.out / "kernels.json").read_text() == before


@pytest.mark.parametrize("action", ["FAIL", "error"])
def test_a_row_that_fails_parity_or_crashes_is_a_result(run, action):
    status, text = run("more", **{"1024": action})
    assert status == 1 and verdicts(text)[ROW] == "FAIL" and (run.out / f"{ROW}.json").exists()
    run("more")
    assert len(run.calls()) == 1  # the build


def test_a_row_that_hangs_is_ended_and_the_next_one_measured(run, monkeypatch):
    monkeypatch.setattr(gpu, "ROW_SECONDS", 0.5)
    status, text = run("more", tune="hang")
    assert status == 1 and verdicts(text)[TILES] == "out of time" and verdicts(text)[ROWS[-1]] == "ok"


def test_ctrl_c_leaves_whole_files_and_a_table(run):
    status, text = run("more", kernels="Ctrl-C")
    assert status == 130 and verdicts(text)[ROW] == "ok" and KERNELS not in verdicts(text)
    assert "6 of 8 rows are missing" in text
    assert len(list(run.out.glob("*.json"))) == 2 and not (run.out / ".partial").exists()
    assert run("more")[0] == 0 and len(run.calls()) == 1 + 6


def test_no_row_is_begun_when_the_time_is_over(run):
    status, text = run("more", "--minutes", "0.1")
    assert status == 0 and verdicts(text) == {"build": "ok"} and "8 of 8 rows are missing" in text
    assert len(run.calls()) == 1


def test_calls_of_less_than_ten_minutes_get_further_each_time(run, monkeypatch):
    """What does not fit into a call is left for the next one, and not begun; what was measured is not measured again."""
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    execute, begun = gpu.execute, []

    def taking(name, command, seconds, *rest, **options):
        now[0] += {"build": 60, "package": 5}.get(name, 150)
        if name in ROWS:
            begun.append((name, seconds))
        return execute(name, command, seconds, *rest, **options)

    monkeypatch.setattr(gpu, "execute", taking)
    calls = []
    while len(begun) < len(ROWS):
        before, now[0] = len(begun), 0.0
        run("more", "--minutes", "8.5")
        assert now[0] <= 8.5 * 60
        calls.append([name for name, _ in begun[before:]])
    # A call has 445 s, and what is compiled is not begun with less than 300: only at the start of one.
    assert calls == [[ROW, KERNELS], [COMPILED, "kernels_gemm_w8a8"], [TILES, OTHERS[0]], [OTHERS[1]], [ROWS[-1]]]
    assert all(150 <= seconds <= gpu.ROW_SECONDS for _, seconds in begun)


def test_a_call_that_is_killed_leaves_what_it_measured(run):
    """As where a machine is lent for ten minutes: nothing of the runner's own gets a chance."""
    arguments = [sys.executable, "-c", KILLED, str(run.out)]
    env = os.environ | {"FAKE": json.dumps({"1024": "killed"}), "PYTHONPATH": str(gpu.ROOT)}
    monkeypatched = json.dumps(gpu.PYTHON)
    killed = subprocess.run([*arguments, monkeypatched], env=env, capture_output=True, timeout=60)
    assert killed.returncode == -9
    assert (run.out / ".partial" / f"{ROW}.json").exists() and not (run.out / f"{ROW}.json").exists()
    run("more", "--minutes", "0.1")
    assert (run.out / f"{ROW}.partial.json").exists()
    assert run("more")[0] == 0 and not (run.out / f"{ROW}.partial.json").exists()


KILLED = """
import json, sys
from sana_bench import gpu
gpu.PYTHON = json.loads(sys.argv[2])
gpu.main(["more", "--out", sys.argv[1]])
"""


FACTS = {
    "precisions": ["fp32", "bf16", "w8a8", "fp8", "w4a4"], "tuned": [["gemm", "bf16"]],
    "kernels": {"rms_norm": ["fp32", "bf16"], "gemm": ["fp32", "bf16", "w8a8", "fp8"], "mix_ffn": ["bf16", "w8a8"]},
    "baselines": ["diffusers", "diffusers-compile", "reference-compile"],
}  # fmt: skip


def test_more_begins_with_what_matters_most():
    rows = list(gpu.more_rows(FACTS))
    assert rows[:2] == [ROW, COMPILED]
    assert rows[2:6] == [KERNELS, "kernels_gemm_w8a8", "kernels_mix_ffn_bf16", "kernels_mix_ffn_w8a8"]
    assert (
        rows.index("image_sana-1.6b_1024_batch1") < rows.index("kernels_rms_norm_bf16") < rows.index("tiles_gemm_bf16")
    )
    assert rows.index("tiles_gemm_bf16") < rows.index("others_sana-0.6b_1024_batch1") < rows.index("kernels_gemm_fp32")
    assert rows[-1].startswith("image_") and len(rows) == len({*rows})


def test_more_has_every_workload_once():
    rows = gpu.more_rows(FACTS)
    runs = {name: {*row.command[-1].split(",")} for name, row in rows.items() if "--runs" in row.command}
    for model in gpu.MODELS:
        for size, batch in ((512, 8), (1024, 4), (2048, 4), (4096, 1)):
            assert f"image_{model}_{size}_batch{batch}" in rows
        assert "reference-compile:bf16" in runs[f"reference-compile_{model}_1024_batch1"]
    assert "image_sana-0.6b_4096_batch4" not in rows
    assert runs[ROW] == {"auto:w8a8", "auto:fp8", "auto:bf16", "auto:bf16-eager", "diffusers:bf16"}
    assert runs[COMPILED] == {"auto:w8a8", "auto:fp8", "auto:bf16", "diffusers-compile:bf16"}
    assert "triton:w8a8" in runs[OTHERS[0]] and "auto:fp32" in runs[OTHERS[1]]
    assert all(sum("-compile" in run for run in found) <= 1 for found in runs.values())
    assert not any("w4" in run for found in runs.values() for run in found)
    kernels = [row for name, row in rows.items() if name.startswith("kernels")]
    assert len(kernels) == sum(map(len, FACTS["kernels"].values()))
    assert all(0 < row.needs <= 300 for row in rows.values()), "with a build there is room in a call of 8.5 minutes"


def test_quick_times_every_op_on_a_shape_of_the_models(monkeypatch, run):
    """And with 8 bits a product, and what most of the decoder's work is, a residual block's convolution."""
    run("quick")
    (kernels,) = (call for call in run.calls() if "kernels" in call)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backend, "backend_status", lambda name: None)
    args = cli.parser().parse_args(kernels[2:])
    chosen = select(args.op, args.case, args.backends, args.dtypes, torch.device("cuda"), quick=args.quick)
    found = {(one.case.op, one.precision): one for one in chosen}
    assert {op for op, _ in found} == {*backend.OPS} and not any("tiny" in one.case.name for one in chosen)
    assert {"cuda", "triton", "torch-8bit"} <= {*found["gemm", "w8a8"].backends}
    assert found["conv2d", "bf16"].case.name == "decoder_stage2_1024_silu"


def test_what_counts_as_our_failure():
    assert set(gpu.OURS) == {*BACKENDS} - {"reference"}
    assert gpu.failed({"status": "error", "backend": "cuda"}) and gpu.failed({"status": "FAIL", "backend": "diffusers"})
    assert not gpu.failed({"status": "error", "backend": "diffusers"})
    assert not gpu.failed({"status": "out of memory", "backend": "cuda"})


def test_compute_sanitizer_looks_at_every_kernel_of_ours():
    """It is told the namespace that they are in."""
    sources = [path for path in (gpu.ROOT / "csrc").rglob("*.cu*") if "__global__" in path.read_text()]
    assert len(sources) > 5
    for path in sources:
        before = path.read_text().split("__global__")[0]
        assert "namespace sana {" in before or "namespace sana::" in before, path


@pytest.mark.parametrize("flags", [["slow"], ["quick", "--out", __file__], ["more", "--minutes", "soon"]])
def test_wrong_flags(run, monkeypatch, flags):
    monkeypatch.setenv("FAKE", "{}")
    with pytest.raises(SystemExit) as stopped:
        gpu.main(flags)
    assert stopped.value.code == 2


def test_its_commands_are_understood(capsys):
    """By the parser of `sana`, and by what stands for this checkout's precisions, baselines and ops."""
    exec(gpu.FACTS, {})
    facts = json.loads(capsys.readouterr().out.strip().removeprefix(gpu.FACTS_ARE))
    for name, row in gpu.more_rows(facts).items():
        args = cli.parser().parse_args([*row.command, "--json", "x.json"])
        if "--runs" in row.command:
            assert all(RunName.parse(run.replace("auto", "cuda")) for run in args.runs.split(","))
        elif name.startswith("kernels"):
            assert select(args.op, args.case, "reference", args.dtypes, torch.device("cpu")), name
        else:
            assert args.op in tune.OPS and args.dtypes in tune.DTYPES
    assert {"bf16", "w8a8", "fp8"} <= {*facts["kernels"]["gemm"]} and "w4a4" not in facts["kernels"]["gemm"]
