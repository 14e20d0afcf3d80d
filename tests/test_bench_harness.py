"""How a benchmark measures: turns, peaks, a GPU's clock. Times themselves are not tested."""

import pytest
import torch
from fake_peaks import RATES, fake_peaks

from sana_bench import cli, harness, image, kernels, schema
from sana_bench.cases import CASES
from sana_model.cli import parser as cli_parser

pytestmark = pytest.mark.usefixtures("one_thread")


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

    def sleep(self, cycles):  # a clock of 1 GHz; the first time, the kernel has to be loaded
        self.free = max(self.free, self.host) + cycles / 1e6 + (0 if self.sleeps else 500)
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
    assert gpu.sleeps == 4  # two to learn the clock
    with monkeypatch.context() as awake:  # control: then it waits
        awake.setattr(torch.cuda, "_sleep", lambda cycles: None)
        gpu.free = gpu.host
        assert min(next(blocks)) > 0.04
    inputs = [(i,) for i in range(7)]
    seen = []
    monkeypatch.setattr(kernels, "BATCH_SECONDS", 0.001)
    times = kernels.time_calls(lambda i: (gpu.kernel(), seen.append(i)), inputs, torch.device("cuda"))
    assert len(times) == 20 and seen == [i % 7 for i in range(41)]  # the inputs stay cold


def test_the_clock_of_a_sleep_is_learnt_from_a_kernel_that_is_loaded(monkeypatch):
    FakeGPU(monkeypatch)
    assert harness._sleep_rate() == pytest.approx(1e9)


def test_a_probe_of_a_gpu_is_one_window(monkeypatch):
    measured = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(harness, "_gpu_rate", lambda kind, seconds: measured.append(kind) or (1e12, 1e12))
    peaks = harness.peaks(torch.device("cuda"))
    measured.clear()
    assert peaks.probe({"bf16"}) and measured == ["bf16"]


def test_the_state_of_the_gpu_is_asked_at_both_ends_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(harness, "gpu_state", lambda: asked.append("now") or [str(len(asked))])
    results = harness.Results(tmp_path / "x.json", seed=0)
    for _ in range(3):
        results.replace([])
    results.save(complete=True)
    assert results.document["machine"]["gpu_state"] == {"before": ["1"], "after": ["2"]} and len(asked) == 2


def test_fp32_of_a_benchmark_is_not_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    args = cli_parser().parse_args(["bench", "kernels", "--device", "cpu"])
    cli._setup(args)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


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
