"""What is planned for a GPU, on a machine that has none: which kernel for which op, on which generation; and fp8."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from compare import assert_close, relative_rms
from models import SMALL

import sana_kernels
import sana_model
from sana_bench import runs
from sana_bench.check import DIT_LIMITS, sqnr
from sana_bench.weights import RunName
from sana_kernels import backend
from sana_model import plan as plan_module
from sana_model.autoencoder.family import lite
from sana_model.config import BUILT_IN
from sana_model.errors import MissingError, UserError
from sana_model.ops import REFERENCE_OPS
from sana_model.plan import resolve
from sana_model.settings import OF_DECODERS, precisions_for
from sana_model.weights.random_weights import random_dit

SANA = {name: BUILT_IN[f"sana-{name}"] for name in ("0.6b", "1.6b", "sprint-0.6b")}


@pytest.fixture
def gpu(monkeypatch):
    """Makes the plan believe in a GPU of a compute capability."""

    def of(capability: tuple[int, int]) -> torch.device:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        for module in (backend, plan_module):
            monkeypatch.setattr(module, "backend_status", lambda name: None)
        return torch.device("cuda")

    return of


def rows(
    name: str, backend: str, device: torch.device, precision: str, part: str = "dit", **others: str
) -> dict[str, tuple[str, str]]:
    """op → (backend, precision), of the DiT or another part; the first row of each op."""
    plan = resolve(SANA[name], backend, device, precisions_for(precision, **others))
    found = [(row.op, (row.backend, row.precision)) for row in plan.rows if row.part == part]
    return dict(reversed(found))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize(
    ("order", "precision", "expected"),
    [
        ("cuda", "bf16", {"modulate": "cuda", "gemm": "triton", "cross_attention": "library", "mix_ffn": "cuda"}),
        ("cuda", "fp16", {"linear_attention": "cuda", "linear_attention_from": "triton", "gate_residual": "cuda"}),
        ("cuda", "fp32", {"cross_attention": "reference", "mix_ffn": "cuda", "linear_attention": "cuda"}),
        ("cuda", "w8a8", {"gemm": "cuda", "mix_ffn": "cuda", "modulate_quantized": "cuda", "quantize": "cuda"}),
        ("triton", "bf16", {"modulate": "triton", "cross_attention": "library", "linear_attention_from": "triton"}),
        ("triton", "w8a8", {"gemm": "triton", "mix_ffn": "triton", "linear_attention_from": "triton"}),
    ],
    ids=str,
)
def test_kernels_of_the_dit(gpu, capability, order, precision, expected):
    found = rows("1.6b", order, gpu(capability), precision)
    assert {op: found[op][0] for op in expected} == expected


def test_a_plan_asks_the_gpu_that_it_is_for(gpu, monkeypatch):
    """On a machine with several, of which the first is not Hopper."""
    gpu((8, 0))
    current, capabilities = [0], {0: (8, 0), 1: (9, 0)}

    @contextmanager
    def device(chosen):
        current.append(chosen.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[current[-1]])
    products = [
        rows("1.6b", "cuda", torch.device("cuda", index), "w4a4")["gemm_w4a4" if index == 0 else "gemm"][0]
        for index in (0, 1)
    ]
    assert products == ["cuda", "cuda"] and current == [0]
    with pytest.raises(MissingError, match=r"compute capability 8\.9"):
        rows("0.6b", "triton", torch.device("cuda", 0), "fp8")
    assert rows("0.6b", "triton", torch.device("cuda", 1), "fp8")["gemm"] == ("triton", "fp8")


def test_the_fused_projection_is_for_models_without_qk_norm(gpu):
    device = gpu((9, 0))
    assert "linear_attention_from" in rows("0.6b", "cuda", device, "bf16")
    assert "linear_attention_from" not in rows("sprint-0.6b", "cuda", device, "bf16")
    assert "linear_attention_from" not in rows("0.6b", "reference", torch.device("cpu"), "bf16")
    assert "linear_attention_from" not in rows("0.6b", "cpu", torch.device("cpu"), "bf16")


def test_a_plan_says_how_the_steps_run(gpu):
    plan = resolve(SANA["1.6b"], "cuda", gpu((9, 0)), precisions_for("bf16"))
    assert plan.eager is None and "denoising loop: one CUDA graph per shape" in str(plan)
    plan = resolve(SANA["1.6b"], "cuda", gpu((9, 0)), precisions_for("bf16"), cuda_graph=False)
    assert "denoising loop: eager (CUDA graphs are turned off)" in str(plan)
    plan = resolve(SANA["1.6b"], "cuda", gpu((9, 0)), precisions_for("fp32"))
    assert "library: FlashAttention computes in bfloat16 and float16, not torch.float32" in str(plan)


@pytest.mark.parametrize("name, graph", [("cuda:w8a8", True), ("cuda:w8a8-eager", False), ("cuda:bf16+-eager", False)])
def test_a_run_of_the_benchmark_may_do_without_a_graph(gpu, monkeypatch, name, graph):
    """So that there are figures where a capture fails."""
    run = RunName.parse(name)
    assert str(run) == name and run.precision == name[5:9].rstrip("+-") and run.everywhere == ("+" in name)
    plans = []

    def resolved(*args, **options):
        plans.append(resolve(*args, **options))
        raise MissingError("as far as this machine gets")

    monkeypatch.setattr(runs, "resolve", resolved)
    weights = SimpleNamespace(config=SANA["0.6b"], device=gpu((9, 0)))
    with pytest.raises(MissingError):
        runs.make(run, weights).prepare(None)
    assert (plans[0].eager is None) == graph


@pytest.mark.parametrize("name", ["diffusers:bf16-eager", "reference-compile:bf16-eager", "cuda:nothing-eager"])
def test_only_runs_of_ours_have_a_graph_to_do_without(name):
    with pytest.raises(UserError, match=r"precision '(bf16-eager|nothing)' is not known"):
        RunName.parse(name)


# ------------------------------------------------------------------------------------------------ 4 bits


@pytest.mark.parametrize("name", ["0.6b", "1.6b"])
@pytest.mark.parametrize(
    ("order", "capability", "products"),
    [
        *(("cuda", capability, {"gemm_w4a4": ("cuda", "w4a4")}) for capability in ((8, 0), (8, 6), (8, 9))),
        *(("cuda", capability, {"gemm": ("cuda", "w8a8"), "mix_ffn": ("cuda", "w8a8")})
          for capability in ((9, 0), (10, 0), (12, 0))),
        ("triton", (8, 0), {"gemm": ("triton", "w8a8"), "mix_ffn": ("triton", "w8a8")}),
    ],
    ids=str,
)  # fmt: skip
def test_4_bit_checkpoints_run_on_every_generation(gpu, name, order, capability, products):
    """W4A4 where GPUs multiply 4 bits, else its weights in int8; W4A8 in int8; of the text encoder W4A16."""
    device = gpu(capability)
    found = rows(name, order, device, "w4a4")
    assert {op: found[op] for op in products} == products
    if "gemm_w4a4" in products:
        assert found["quantize_int4"] == found["gemm_w4a4"] and "mix_ffn" not in found
        assert found["gemm"][1] == "bf16", "the low-rank branches"
    found = rows(name, order, device, "w4a8")
    assert found["gemm"] == found["mix_ffn"] == (order, "w8a8")
    found = rows(name, order, device, "bf16", "text_encoder", text="w4a16")
    assert found.get("gemm_w4a16") == (("cuda", "w4a16") if order == "cuda" else None)


def test_a_plan_says_why_4_bits_are_not_multiplied_as_they_are(gpu):
    reason = {}
    for order, capability in (("cuda", (9, 0)), ("triton", (8, 0))):
        plan = resolve(SANA["1.6b"], order, gpu(capability), precisions_for("w4a4"))
        (reason[order],) = {row.reason for row in plan.rows if row.stored == "w4a4" and row.op == "gemm"}
    assert reason["cuda"].startswith("cuda: GPUs of compute capability 9.0") and "triton" not in reason["cuda"]
    assert reason["triton"] == "no kernel of triton multiplies w4a4"


# ------------------------------------------------------------------------------------------------ the decoder


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp16"])
def test_kernels_of_the_decoder(gpu, precision):
    found = rows("1.6b", "cuda", gpu((9, 0)), "bf16", "autoencoder", decoder=precision)
    expected = {"conv2d": "cuda", "upsample": "cuda", "rms_norm": "cuda", "linear_attention": "cuda", "mix_ffn": "cuda"}
    assert {op: found[op] for op in expected} == {op: (backend, precision) for op, backend in expected.items()}
    found = rows("1.6b", "triton", gpu((9, 0)), "bf16", "autoencoder", decoder=precision)
    assert found["conv2d"] == ("library", precision)


def test_what_a_decoder_keeps_in_16_bits_has_its_own_kernel(gpu):
    """W8A8: no GPU kernel convolves int8, so the reference does; the ends, which stay in 16 bits, are CUDA's."""
    plan = resolve(SANA["1.6b"], "cuda", gpu((9, 0)), precisions_for("bf16", decoder="w8a8"))
    found = [(row.backend, row.precision) for row in plan.rows if (row.part, row.op) == ("autoencoder", "conv2d")]
    assert found == [("reference", "w8a8"), ("cuda", "bf16")]
    called = []
    run = plan_module._by_weight(lambda *args: called.append("quantized"), lambda *args: called.append("wide"))
    weight = torch.randn(4, 4, 3, 3)
    run(None, weight), run(None, sana_kernels.quantize_conv2d(weight)), run(None, sana_kernels.quantize(weight))
    assert called == ["wide", "quantized", "quantized"]


def test_decoders_that_shuffle_pixels_are_not_planned_on_the_folded_kernel(gpu):
    config = replace(SANA["1.6b"], autoencoder=lite(SANA["1.6b"].autoencoder))
    plan = resolve(config, "cuda", gpu((9, 0)), precisions_for("bf16"))
    (row,) = [row for row in plan.rows if row.op == "upsample"]
    assert row.backend == "reference" and "kernels of 2 × 2" in row.reason


# ------------------------------------------------------------------------------------------------ fp8


@pytest.mark.parametrize("order", ["cuda", "triton"])
def test_fp8_runs_from_ada_on(gpu, order):
    expected = {"gemm": ("triton", "fp8"), "mix_ffn": ("triton", "fp8"), "linear_attention_from": ("triton", "fp8")}
    for capability in ((8, 9), (9, 0), (12, 0)):
        found = rows("0.6b", order, gpu(capability), "fp8")
        assert {op: found[op] for op in expected} == expected
        assert found["modulate_quantized"] == (order, "fp8") and found["cross_attention"] == ("library", "bf16")


@pytest.mark.parametrize(("order", "capability"), [("cuda", (8, 0)), ("triton", (8, 6)), ("cpu", None), ("auto", None)])
def test_fp8_is_refused_elsewhere_with_a_way_out(gpu, order, capability):
    device = torch.device("cpu") if capability is None else gpu(capability)
    with pytest.raises(
        MissingError, match=r"fp8 cannot run here .*--precision w8a8 or bf16, or with --backend reference"
    ):
        resolve(SANA["0.6b"], order, device, precisions_for("fp8"))
    assert rows("0.6b", order, device, "w8a8")["gemm"][1] == "w8a8"


def test_fp8_is_no_precision_of_decoders():
    assert "fp8" not in OF_DECODERS
    with pytest.raises(UserError, match="autoencoder; choose one of fp32, bf16, fp16, w8a8"):
        precisions_for("fp8", decoder="fp8")


def dit_inputs(config, batch: int = 2) -> tuple:
    caption = torch.randn(batch, 9, config.caption_channels)
    caption[..., ::40] *= 30
    return torch.randn(batch, config.in_channels, 5, 6), torch.tensor([999, 428]), caption, torch.tensor([9, 3])


@torch.inference_mode()
def in_precision(precision: str, spoil=None, seed: int = 3) -> torch.Tensor:
    """The DiT on the reference backend, its matrix products in that precision."""
    plan = resolve(SMALL, "reference", torch.device("cpu"), precisions_for(precision))
    dit = random_dit(SMALL.dit, seed=seed, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    for block in dit.blocks:
        plan.prepare("dit", block)
    if spoil is not None:
        spoil(dit)
    dit.ops = plan.ops("dit")
    torch.manual_seed(5)
    return dit(*dit_inputs(SMALL.dit)).float()


def with_scales_of_neighbours(dit) -> None:
    for block in dit.blocks:
        block.mix_ffn.expand.scale.copy_(block.mix_ffn.expand.scale.roll(1))


def test_the_reference_simulates_fp8():
    exact, wide = in_precision("fp32"), in_precision("bf16")
    found = in_precision("fp8")
    worst = min(map(sqnr, found, exact))
    assert DIT_LIMITS["fp8"] <= worst < min(map(sqnr, wide, exact)) - 3, "fp8, and not bf16"
    assert min(map(sqnr, in_precision("fp8", with_scales_of_neighbours), exact)) < DIT_LIMITS["fp8"]


# ------------------------------------------------------------------------------------------------ how a DiT is prepared


@pytest.mark.parametrize(
    ("order", "precision"), [("cuda", "bf16"), ("triton", "w8a8"), ("cuda", "fp8"), ("cpu", "bf16")]
)
def test_depthwise_weights_lie_as_the_kernel_reads_them(gpu, order, precision):
    device = torch.device("cpu") if order == "cpu" else gpu((9, 0))
    plan = resolve(SMALL, order, device, precisions_for(precision))
    dit, other = (random_dit(SMALL.dit, seed=3, dtype=torch.bfloat16) for _ in range(2))
    shared = dit.blocks[0].mix_ffn.depthwise.weight
    plan.prepare("dit", dit.blocks[0])
    weight = dit.blocks[0].mix_ffn.depthwise.weight
    assert torch.equal(weight, other.blocks[0].mix_ffn.depthwise.weight)
    assert weight.stride(0) == (9 if order == "cpu" else 1)
    assert shared.is_contiguous(), "whoever else has the weight keeps it as it was"


@pytest.mark.parametrize("perturbed", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
def test_the_fused_projection_is_the_same_attention(precision, perturbed):
    """In a DiT, with the reference as its kernel; perturbed images need their values, and so the two ops."""
    plan = resolve(SMALL, "reference", torch.device("cpu"), precisions_for(precision))
    dit = random_dit(SMALL.dit, seed=3, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    for block in dit.blocks:
        plan.prepare("dit", block)
    calls = []

    def fused(*args, **kwargs):
        calls.append(kwargs)
        return sana_kernels.linear_attention_from(*args, backend="reference", **kwargs)

    arguments = dit_inputs(SMALL.dit)
    with torch.inference_mode():
        dit.ops = REFERENCE_OPS
        expected = dit(*arguments, perturbed=perturbed)
        dit.ops = replace(REFERENCE_OPS, linear_attention_from=fused)
        found = dit(*arguments, perturbed=perturbed)
    assert len(calls) == (0 if perturbed else SMALL.dit.layers)
    assert_close(found, expected, of_rms=1e-5 if precision == "fp32" else 0.05)
    if not perturbed:
        with torch.inference_mode():
            dit.ops = replace(dit.ops, linear_attention_from=lambda *args, **kwargs: fused(*args, **kwargs).roll(1, 2))
            assert relative_rms(dit(*arguments), expected) > 0.05, "heads out of step are noticed"


def test_the_kernels_of_the_cpu_are_not_for_a_model_on_a_gpu(gpu, monkeypatch):
    """Refused before anything is loaded; the plan would be plain PyTorch on the GPU, under the name of `cpu`."""
    monkeypatch.delattr("sana_model.pipeline.load_model")
    gpu((9, 0))
    with pytest.raises(UserError, match=r"'cpu' computes on the CPU, and the model is meant to be on cuda; .* choose"):
        sana_model.load("sana-tiny-random", backend="cpu", device="cuda")
