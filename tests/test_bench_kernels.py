"""`sana bench kernels`: its rows, what it refuses, which cases it measures against which baselines."""

import pytest
import torch
from fake_peaks import fake_peaks

from sana_bench import check, cli, harness, kernels, report, schema
from sana_bench.cases import CASES
from sana_kernels import backend
from sana_model.errors import MissingError, UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny_kernels(tmp_path):
    """Measures one small case of modulate in fp32."""

    def run(peaks=None):
        chosen = kernels.select("modulate", "tiny", "reference", "fp32", torch.device("cpu"))
        results = harness.Results(tmp_path / "kernels.json", seed=0)
        bench = kernels.KernelBench(chosen, torch.device("cpu"), peaks or fake_peaks(), results, say=lambda text: None)
        bench.run(1)
        results.save(bench.peaks, complete=True)
        return results.document

    return run


def test_kernel_rows(tiny_kernels, monkeypatch):
    monkeypatch.setattr(kernels, "BATCH_SECONDS", 0.01)
    document = tiny_kernels()
    assert schema.validate(document) == []
    (found,) = document["results"]
    assert found["status"] == "ok"
    assert found["check"]["against"] == "reference_fp64"
    assert found["work"]["gb_s"] == pytest.approx(found["work"]["gib"] * 2**30 / found["timing"]["ms"]["median"] / 1e6)
    assert "modulate/tiny_256" in report.kernel_table(document)


def test_a_wrong_kernel_fails(tiny_kernels, monkeypatch):
    monkeypatch.setattr(kernels, "BATCH_SECONDS", 0.01)
    right, made = kernels.runner, []

    def runner(op, backend):
        made.append(right(op, backend))  # PyTorch's, the oracle, and then the kernel
        return made[-1] if len(made) <= 2 else lambda *args: made[0](*args) * (1 + 1e-4)

    monkeypatch.setattr(kernels, "runner", runner)
    document = tiny_kernels()
    (found,) = document["results"]
    assert found["status"] == "FAIL"
    assert "speedup" not in found
    assert "**FAIL**" in report.kernel_table(document)


def test_a_kernel_that_crashes_does_not_take_the_others_along(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "BATCH_SECONDS", 0.01)
    right, calls = kernels.runner, []

    def runner(op, backend):
        def crash(*args):
            calls.append(backend)
            if len(calls) == dies_at:
                raise TypeError("a mistake of ours")
            return right(op, "reference")(*args)

        return crash if backend == "cpu" else right(op, backend)

    monkeypatch.setattr(kernels, "runner", runner)
    cpu = torch.device("cpu")
    chosen = kernels.select("modulate", "tiny", "reference,cpu", "fp32", cpu)
    for when in (1, 3):  # at its first call, and while it is timed
        calls.clear()
        dies_at = when
        results = harness.Results(tmp_path / "kernels.json", seed=0)
        bench = kernels.KernelBench(chosen, cpu, fake_peaks(), results, say=lambda text: None)
        status = cli._finish(bench, 2, results, report.kernel_table)
        found = {row["backend"]: row for row in results.document["results"]}
        assert found["cpu"]["status"] == "error" and found["cpu"]["reason"] == "TypeError: a mistake of ours"
        assert found["reference"]["status"] == "ok" and schema.validate(results.document) == []
        assert status == 1 and "| error |" in capsys.readouterr().out
    monkeypatch.setattr(kernels, "expected", lambda *args: (_ for _ in ()).throw(MemoryError("too large")))
    bench.run(1)
    assert [row["status"] for row in results.document["results"][2:]] == ["out of memory"] * 2


def test_no_case_is_measured_twice():
    names = [(case.op, case.name) for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", [c for c in CASES if "tiny" in c.name or "stage5" in c.name], ids=str)
def test_cold_inputs_are_the_same_values_in_the_same_strides_elsewhere(case):
    first = case.arguments("fp32")
    other = kernels.clone(first)
    tensors = [(a, b) for a, b in zip(first, other, strict=True) if isinstance(a, torch.Tensor)]
    for a, b in tensors:
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.data_ptr() != b.data_ptr()
    distances = [[t.data_ptr() - side[0].data_ptr() for t in side] for side in zip(*tensors, strict=True)]
    if case.op == "linear_attention":  # views of one packed projection stay so
        assert distances[0] == distances[1]
    assert min(t.min() for t, _ in tensors if t.is_floating_point()) < 0


def test_inputs_are_called_cold_where_the_cache_cannot_hold_them(tiny_kernels, monkeypatch):
    monkeypatch.setattr(kernels, "BATCH_SECONDS", 0.01)
    for cache, label in ((2**20, "cold"), (2**40, "cached")):
        monkeypatch.setattr(kernels, "last_cache_bytes", lambda device, cache=cache: cache)
        (row,) = tiny_kernels()["results"]
        assert row["timing"]["inputs"] == label
        assert (row["work"]["pct_of_peak"]["copy"] is None) == (label == "cached")  # no byte has to cross the bus


def test_a_gpu_gets_more_cold_inputs(monkeypatch):
    monkeypatch.setattr(kernels, "last_cache_bytes", lambda device: 2**20)
    assert kernels.cold_bytes(torch.device("cuda")) == 4 * 2**20
    assert kernels.cold_bytes(torch.device("cpu")) == 2 * 2**20


def case_named(name: str):
    return next(case for case in CASES if str(case) == name)


@pytest.mark.parametrize("op", ["quantize", *(op for op in backend.OPS if op.endswith("_quantized"))])
def test_of_quantised_rows_the_bytes_are_those_that_are_written(op):
    arguments = case_named(f"{op}/tiny_256").arguments("bf16")
    plain, oracle = kernels.expected(op, arguments)
    values, scale = plain
    read = sum(t.nbytes for t in arguments if isinstance(t, torch.Tensor))
    assert kernels.bytes_moved(arguments, plain, cache=0) == read + values.numel() + 4 * scale.numel()
    assert kernels.bytes_moved(arguments, plain, cache=2**30) == read
    made = kernels.values(op, plain)
    assert made.shape[:-1] == oracle.shape[:-1] and made.dtype == torch.float64


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu", "reference"])
@pytest.mark.parametrize("name", ["depthwise_glu/tiny_256", "depthwise_glu_quantized/tiny_256", "mix_ffn/tiny_256"])
def test_depthwise_weights_are_measured_as_a_model_hands_them_over(name, backend):
    case = case_named(name)
    given = case.arguments("fp32")
    made = kernels.prepared(case.op, backend, given)
    (weight,) = (a for a in made if isinstance(a, torch.Tensor) and a.ndim == 4)
    assert weight.stride(0) == (1 if backend in ("cuda", "triton") else 9)
    assert any(torch.equal(weight, a) for a in given if isinstance(a, torch.Tensor) and a.shape == weight.shape)


@pytest.mark.parametrize("name", ["conv2d/tiny_decoder_stage2", "upsample/tiny_decoder_stage5"])
def test_convolutions_of_cuda_are_measured_channels_last(name):
    case = case_named(name)
    given = case.arguments("bf16")
    weight = kernels.prepared(case.op, "cuda", given)[1]
    assert weight.is_contiguous(memory_format=torch.channels_last) and torch.equal(weight, given[1])
    assert kernels.prepared(case.op, "reference", given)[1] is given[1]


def test_every_case_of_an_op_is_compiled(monkeypatch):
    """Dynamo compiles a function for eight shapes, and would run the ninth as it is."""
    compiled = []

    def counting(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)  # left as it was
    monkeypatch.setattr(torch, "compile", lambda run, mode, dynamic: compile_(run, backend=counting, dynamic=dynamic))
    for tokens in range(1, 12):
        run = kernels.runner("gate_residual", kernels.COMPILED)
        run(torch.zeros(1, tokens, 8), torch.zeros(1, tokens, 8), torch.zeros(1, 8))
    assert len(compiled) == 11
    with pytest.raises(Exception, match="recompile_limit"):  # and is no longer silent where the limit is met
        for tokens in range(1, 12):
            run(torch.zeros(1, tokens, 8), torch.zeros(1, tokens, 8), torch.zeros(1, 8))


@pytest.mark.parametrize(
    "flags", [{"op": "nope"}, {"backends": "tpu"}, {"dtypes": "int3"}, {"name": "no such case"}], ids=str
)
def test_kernel_flags_that_name_nothing_are_refused(flags):
    asked = {"op": None, "name": "", "backends": None, "dtypes": "fp32"} | flags
    with pytest.raises(UserError, match=r"is not known|has .no such case. in its name"):
        kernels.select(**asked, device=torch.device("cpu"))


def test_a_backend_asked_for_by_name_that_cannot_run_is_not_passed_over():
    with pytest.raises(MissingError, match="triton"):
        kernels.select("modulate", "tiny", "reference,triton", "fp32", torch.device("cpu"))
    chosen = kernels.select("modulate", "tiny", None, "fp32", torch.device("cpu"))
    assert "reference" in chosen[0].backends
    assert "triton" not in chosen[0].backends


# ---- which cases, and against which baselines


@pytest.fixture
def hopper(monkeypatch):
    """Makes the registry believe in a GPU of compute capability 9.0, or another."""

    def gpu(capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(backend, "backend_status", lambda name: None)
        return torch.device("cuda")

    return gpu


def test_8_bits_on_a_gpu_have_the_library_as_their_baseline(hopper):
    gpu = hopper()
    for precision, ours in (("w8a8", {"cuda", "triton"}), ("fp8", {"triton"})):
        chosen = kernels.select(None, "0.6b_1024", None, precision, gpu)
        found = {one.case.op: set(one.backends) for one in chosen}
        assert found["gemm"] >= ours | {kernels.COMPILED, kernels.EIGHT_BIT}, precision
        assert found["mix_ffn"] >= ours and not found["mix_ffn"] & {*kernels.BASELINES}
        assert "reference" not in found["gemm"], "which computes in fp64"
    quantized = {p: kernels.select("gemm", "0.6b_1024_qkv+quantize", None, p, gpu)[0].backends for p in ("w8a8", "fp8")}
    assert "cuda" in quantized["w8a8"] and "cuda" not in quantized["fp8"], "by what multiplies, not by what comes in"
    chosen = kernels.select("gemm", "0.6b_1024", None, "bf16", gpu)
    assert all(kernels.EIGHT_BIT not in one.backends and "reference" in one.backends for one in chosen)


def test_what_no_kernel_of_ours_multiplies_is_not_measured(hopper):
    assert kernels.select(None, "0.6b_1024", None, "fp8", hopper((8, 0))) == []
    chosen = kernels.select("gemm", "tiny", None, "w8a8", torch.device("cpu"))
    assert not any(set(one.backends) & {*kernels.BASELINES} for one in chosen), "on a CPU only by name"
    with pytest.raises(MissingError, match=r"torch-8bit.*multiplies 8 bits in gemm, in w8a8 and fp8"):
        kernels.select("gemm", "tiny", "torch-8bit", "bf16", torch.device("cpu"))


@pytest.mark.parametrize("precision", ["w8a8", "fp8"])
def test_the_library_multiplies_the_same_8_bits(precision):
    found = [case for case in CASES if case.op == "gemm" and "tiny" in case.name]
    assert len(found) == 5
    for case in found:
        arguments = case.arguments(precision)
        plain, oracle = kernels.expected("gemm", arguments)
        made = kernels.runner("gemm", kernels.EIGHT_BIT)(*arguments)
        assert check.kernel_check(made, plain, oracle)["passed"], case
        made[:, 0] = 0
        assert not check.kernel_check(made, plain, oracle)["passed"]


def test_quick_measures_the_smallest_case_of_each_op_in_each_precision(hopper):
    chosen = kernels.select(None, "0.6b_1024,decoder_stage2_1024", None, "bf16,w8a8", hopper(), quick=True)
    found = {(one.case.op, one.precision): one.case.name for one in chosen}
    assert len(found) == len(chosen)
    assert found["gemm", "bf16"] == found["gemm", "w8a8"] == "0.6b_1024_out"
    assert found["conv2d", "bf16"] == "decoder_stage2_1024_silu", "not a transformed one, which is the CPU's"
    assert ("conv2d", "w8a8") not in found and ("modulate", "bf16") in found
    assert kernels.COMPILED not in chosen[0].backends


def test_quick_leaves_no_op_out_whose_smallest_case_is_of_another_precision():
    """The smallest upsampling to 1024 px is of transformed int8."""
    (one,) = kernels.select("upsample", "decoder_stage4_1024", None, "fp32", torch.device("cpu"), quick=True)
    assert one.case.name == "decoder_stage4_1024"


def test_a_peak_that_cannot_be_measured_leaves_its_percentages_out(tiny_kernels, monkeypatch):
    def measure(kind, seconds):
        if kind in ("int8", broken):
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return 1e12, 1e12

    broken = "int8"
    peaks = harness.Peaks(["fp32", "bf16", "int8", "copy"], measure)
    assert peaks.percent(5e11, 1.0, "bf16") == pytest.approx(50)
    assert peaks.percent(5e11, 1.0, "w8a8") is None
    assert peaks.percent(5e11, 1.0, "fp8") == pytest.approx(50)  # simulated in bf16 where there is none
    assert peaks.probe({peaks.kind("w8a8")}, windows=1)  # the machine's speed is watched all the same
    broken = "bf16"
    with pytest.raises(RuntimeError, match="NOT_SUPPORTED"):
        harness.Peaks(["fp32", "bf16"], measure)
    monkeypatch.setattr(kernels, "BATCH_SECONDS", 0.01)
    peaks = fake_peaks()
    monkeypatch.setattr(peaks, "_unknown", {"fp32"})
    document = tiny_kernels(peaks)
    assert document["results"][0]["status"] == "ok" and schema.validate(document) == []
    assert " | – | " in report.kernel_table(document)
