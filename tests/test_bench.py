"""The benchmark's own claims: what it counts, how it measures, what it refuses. Times themselves are not tested."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sana_bench import check, cli, harness, image, kernels, report, schema, work
from sana_bench.cases import CASES
from sana_model.config import BUILT_IN
from sana_model.errors import MissingError, UserError
from sana_model.settings import PRECISIONS
from sana_model.weights import checkpoint_config

RATES = {"fp32_fake": 1e13, "bf16_fake": 1e14, "copy": 1e13}


def fake_peaks(**rates):
    """Peaks of a machine that never changes its speed."""
    found = RATES | rates
    return harness.Peaks(list(found), lambda kind, seconds: (found[kind], found[kind]))


@pytest.fixture(autouse=True)
def one_thread():
    """Nothing here is large enough for two, and on a busy machine they wait for each other."""
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------ operation counts


@pytest.mark.parametrize(
    ("model", "height", "width", "gmac"),
    [("sana-0.6b", 512, 512, 157.811), ("sana-0.6b", 1024, 1024, 560.744), ("sana-1.6b", 1024, 1024, 1483.331)],
)
def test_dit_macs_are_those_that_torch_counts_in_diffusers(model, height, width, gmac):
    diffusers = pytest.importorskip("diffusers")
    dit = BUILT_IN[model].dit
    fields = {k: v for k, v in checkpoint_config.write_dit(dit).items() if not k.startswith("_")}
    with torch.device("meta"):
        theirs = diffusers.SanaTransformer2DModel(**fields)
        latents, states = torch.empty(1, 32, height // 32, width // 32), torch.empty(1, 300, dit.caption_channels)
        with FlopCounterMode(display=False) as counter:
            theirs(latents, encoder_hidden_states=states, timestep=torch.empty(1))
    ours = work.denoise_macs(dit, latents[0, 0].numel(), 1, (300,))
    assert ours == counter.get_total_flops() / 2
    assert ours / 1e9 == pytest.approx(gmac, abs=1e-3)  # as published for this model


@pytest.mark.parametrize(("height", "width", "gmac"), [(1024, 1024, 4184.306), (768, 1344, None)])
def test_decoder_macs_are_those_that_torch_counts_in_diffusers(height, width, gmac):
    diffusers = pytest.importorskip("diffusers")
    config = BUILT_IN["sana-0.6b"].autoencoder
    fields = {k: v for k, v in checkpoint_config.write_autoencoder(config).items() if not k.startswith("_")}
    with torch.device("meta"):
        theirs = diffusers.AutoencoderDC(**fields)
        latents = torch.empty(1, 32, height // 32, width // 32)
        with FlopCounterMode(display=False) as counter:
            theirs.decode(latents)
    ours = work.decoder_macs(config, height, width, folded=False)
    assert ours == counter.get_total_flops() / 2
    assert gmac is None or ours / 1e9 == pytest.approx(gmac, abs=1e-3)


def test_text_is_counted_once_and_steps_as_often_as_they_run():
    dit = BUILT_IN["sana-0.6b"].dit
    one, two = (work.denoise_macs(dit, 1024, steps, (1, 60)) for steps in (1, 2))
    text = sum(work.dit_text_macs(dit, length) for length in (1, 60))
    assert two - text == 2 * (one - text)


# ------------------------------------------------------------------------------------------ the check


def test_sqnr_of_known_noise():
    signal = torch.randn(100_000)
    assert check.sqnr(signal + 0.1 * torch.randn(100_000), signal) == pytest.approx(20, abs=0.2)
    assert check.sqnr(signal, signal) == check.SQNR_CAP
    assert check.sqnr(signal * float("nan"), signal) == -check.SQNR_CAP


def test_neither_half_of_the_guided_batch_hides_behind_the_other():
    expected = torch.randn(2, 32, 4, 4)
    actual = expected.clone()
    assert check.dit_check(actual, expected, "bf16").passed
    actual[0] += 0.1 * torch.randn_like(actual[0])
    assert not check.dit_check(actual, expected, "bf16").passed


def test_kernel_error_is_measured_in_errors_of_torch():
    oracle = torch.randn(64, 64, dtype=torch.float64)
    plain = oracle.bfloat16()
    assert check.kernel_check(plain, plain, oracle)["passed"]
    worse = plain + 8 * torch.finfo(torch.bfloat16).eps * plain.abs().max()
    assert not check.kernel_check(worse, plain, oracle)["passed"]
    assert not check.kernel_check(plain.float(), plain, oracle)["passed"]


# ------------------------------------------------------------------------------------------ the harness


def test_variants_take_turns_and_an_unsteady_repetition_is_repeated_up_to_a_bound():
    rates = iter([100.0] * 4 + [50.0] + [100.0, 50.0] * 50)  # from the second round on, the speed halves and doubles
    seen = []

    def task(name):
        return lambda i: seen.append((name, i)) or name

    verdicts = list(
        harness.interleave({name: task(name) for name in "abc"}, 2, lambda: {"fp32": next(rates)}, max_rejected=1)
    )
    assert [name for name, _ in seen[:3]] == ["a", "b", "c"]
    assert [(name, verdict) for name, _, verdict in verdicts] == [
        ("a", "steady"), ("b", "steady"), ("c", "steady"),
        ("b", "rejected"), ("b", "unsteady"), ("c", "rejected"), ("c", "unsteady"), ("a", "rejected"), ("a", "unsteady"),
    ]  # fmt: skip
    assert len(set(seen)) == len(
        seen
    )  # a repeated repetition gets another prompt: nothing is remembered from the first


def test_a_task_that_gave_up_is_skipped():
    found = list(harness.interleave({"a": lambda i: None, "b": lambda i: i}, 2, dict))
    assert [name for name, *_ in found] == ["b", "b"]


def test_peaks_of_a_precision_are_the_fastest_arithmetic_it_may_use():
    peaks = fake_peaks(fp32_slow=1.0, bf16_fake=1e12, int8_fake=1e15)
    assert peaks.kind("fp32") == "fp32_fake"
    assert peaks.kind("bf16") == "fp32_fake"  # on this machine bf16 is the slower way
    assert peaks.kind("w8a8") == "int8_fake"
    assert peaks.percent(5e12, 1.0, "fp32") == pytest.approx(50)
    assert fake_peaks(int16_fake=1.02 * RATES["bf16_fake"]).kind("bf16") == "bf16_fake"  # as fast, but for noise
    assert fake_peaks(int16_fake=2 * RATES["bf16_fake"]).kind("bf16") == "int16_fake"


def test_a_peak_leaves_out_what_others_took_and_a_probe_does_not():
    windows = iter([(6e11, 9e11), (7e11, 1e12), (5e11, 8e11)])
    peaks = harness.Peaks(["bf16", "fp32"], lambda kind, seconds: next(windows) if kind == "bf16" else (1e10, 1e10))
    assert peaks.probe({"bf16"}, windows=2) == {"bf16": 7e11}
    assert peaks.percent(1e12, 1.0, "bf16") == pytest.approx(100)


def test_this_machines_peaks_can_be_measured():
    peaks = harness.peaks(torch.device("cpu"), window=0.002)
    assert peaks.best[peaks.kind("fp32")] > 1e8
    assert peaks.best["copy"] > 1e8
    assert peaks.probe({peaks.kind("bf16")}, windows=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_the_product_of_a_peak_is_that_of_rows(dtype):
    x, weight = (torch.randint(-9, 9, (n, 64)).to(dtype) for n in (32, 48))
    assert torch.equal(harness.product(x, weight).bfloat16(), (x.float() @ weight.float().t()).bfloat16())


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


class FakeGPU:
    """Events and sleep of torch.cuda, on a clock that counts milliseconds; a call that Python launches late waits for it."""

    def __init__(self, monkeypatch):
        self.host = self.free = 0.0  # when Python has got so far; when the GPU has done all that is queued
        self.sleeps = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                gpu.free = max(gpu.free, gpu.host)
                self.at = gpu.free

            def elapsed_time(self, end):
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep, raising=False)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.host / 1e3)

    def sleep(self, cycles):  # a clock of 1 GHz
        self.free = max(self.free, self.host) + cycles / 1e6
        self.sleeps += 1

    def kernel(self):
        """0.001 ms of the GPU's time, which takes Python 0.05 ms to launch."""
        self.host += 0.05
        self.free = max(self.free, self.host) + 0.001


def test_what_is_timed_on_a_gpu_does_not_wait_for_python(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    blocks = harness.gpu_times(gpu.kernel for _ in range(101))
    for _ in range(2):
        assert next(blocks) == pytest.approx([0.001] * 20)
    assert gpu.sleeps == 3  # one to learn the clock
    with monkeypatch.context() as awake:  # control: then it waits
        awake.setattr(torch.cuda, "_sleep", lambda cycles: None)
        gpu.free = gpu.host
        assert min(next(blocks)) > 0.04
    inputs = [(i,) for i in range(7)]
    seen = []
    monkeypatch.setattr(kernels, "BATCH_SECONDS", 0.001)
    times = kernels.time_calls(lambda i: (gpu.kernel(), seen.append(i)), inputs, torch.device("cuda"))
    assert len(times) == 20 and seen == [i % 7 for i in range(41)]  # the inputs stay cold


@pytest.mark.gpu
def test_gpu_peaks_and_timing():
    device = torch.device("cuda")
    peaks = harness.peaks(device, window=0.01)
    assert all(rate > 1e11 for rate in peaks.best.values())
    inputs = kernels.cold_inputs(CASES[0], "bf16", device, 0)
    assert min(kernels.time_calls(kernels.runner(CASES[0].op, "reference"), inputs, device)) > 0


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_stages_are_those_of_the_median_repetition_and_sum_to_it(n):
    samples = [
        {"text_encode": 1.0, "denoise": 10.0 * i, "decode": 5.0, "other": 0.5, "total": 6.5 + 10.0 * i}
        for i in range(n)
    ]
    median = image.median_repetition(samples[::-1])
    assert median["total"] == harness.statistics_ms([s["total"] for s in samples])["median"]
    assert schema.stages_sum_up(median, median["total"])
    assert not schema.stages_sum_up(median | {"decode": 6.0}, median["total"])


# ------------------------------------------------------------------------------------------ kernels


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


def test_every_precision_has_limits():
    """4-bit text encoders, too (`cpu:w4a8+`)."""
    assert check.DIT_LIMITS.keys() == check.TEXT_LIMITS.keys() == PRECISIONS.keys()
    assert check.RANDOM_TEXT_LIMITS.keys() == PRECISIONS.keys()
