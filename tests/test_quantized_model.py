"""Quantised models: folders and rounding to nearest, what is planned and executed, in every variant; and what is refused."""

import json
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from compare import relative_rms
from models import SMALL, SPRINT
from quantized_folders import quantized_folder

import sana_kernels
import sana_model
from sana_bench.check import sqnr
from sana_bench.runs import RunName
from sana_kernels.gemm import Quantized
from sana_kernels.gemm.int4 import Int4
from sana_model import memory
from sana_model.config import BUILT_IN
from sana_model.errors import UserError
from sana_model.packed import PackedLinear, is_plain
from sana_model.plan import precisions_here, resolve
from sana_model.quantize.layers import QuantizedLinear
from sana_model.settings import PRECISIONS
from sana_model.weights.models import convert, find, load_model
from sana_model.weights.random_weights import random_model
from sana_model.weights.saving import save_diffusers

ARGUMENTS = {"prompt": "a fox", "steps": 2, "width": 96, "height": 64}
CPU = torch.device("cpu")
QK_NORM = replace(SMALL, dit=replace(SMALL.dit, qk_norm=True))


@pytest.fixture(scope="module")
def svd(saved, tmp_path_factory):
    """The small model in W4A4, smoothed, with low-rank branches."""
    return quantized_folder(saved, tmp_path_factory.mktemp("svd") / "q", "w4a4", rank=8, smooth=True)


def velocity(pipe) -> torch.Tensor:
    """One evaluation of the DiT, signed and with outliers where the model has them."""
    config = pipe.config.dit
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(2, config.in_channels, 6, 4, generator=g)
    caption = torch.randn(2, 9, config.caption_channels, generator=g)
    guidance = torch.full((2,), 4.5) if config.guidance_embeds else None
    with torch.inference_mode():
        return pipe.dit(latents, torch.full((2,), 0.5), caption, torch.tensor([9, 4]), guidance).float()


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(
    ("config", "precision", "rank", "smooth"),
    [
        (SMALL, "w8a8", 0, True), (SMALL, "w4a8", 0, False), (SMALL, "w4a4", 0, False),
        (SMALL, "w4a4", 8, True), (QK_NORM, "w4a4", 8, True), (SPRINT, "w4a4", 8, True),
    ],
    ids=["w8a8", "w4a8", "w4a4", "svd", "svd-qk_norm", "svd-sprint"],
)  # fmt: skip
def test_a_folder_runs_in_every_variant(tmp_path, config, precision, rank, smooth):
    """As stored, exactly, and as executed on the CPU, which is no further from the 16-bit model than what is stored is."""
    variant = tmp_path / "model"
    save_diffusers(variant, random_model(config, seed=2))
    folder = quantized_folder(variant, tmp_path / "q", precision, rank, smooth)
    original = velocity(sana_model.load(str(variant), precision="fp32", backend="reference"))
    exact = velocity(sana_model.load(str(folder), backend="reference"))
    executed = sana_model.load(str(folder), backend="cpu")
    assert executed.plan.precisions["dit"] == precision and executed.plan.executed["dit"] == "w8a8"
    found = velocity(executed)
    assert sqnr(found, original) > sqnr(exact, original) - 1 > 8
    simulated = velocity(sana_model.load(str(folder), backend="cpu", exact=True))
    if (
        precision == "w4a4"
    ):  # activations are executed in 8 bits, and in 4 a rounding elsewhere becomes a whole step here
        assert sqnr(simulated, exact) > sqnr(exact, original)
    else:
        assert min(sqnr(found, exact), sqnr(simulated, exact)) > 25
    assert executed(**ARGUMENTS).latents.isfinite().all()


def test_smoothing_and_branches_of_the_file_are_used(svd, saved):
    """Without either, the same residual weights are of no use: a control for the test above."""
    original = velocity(sana_model.load(str(saved), precision="fp32", backend="reference"))
    pipe = sana_model.load(str(svd), backend="cpu")
    good = sqnr(velocity(pipe), original)
    layer = pipe.dit.blocks[1].mix_ffn.expand
    assert isinstance(layer, PackedLinear) and layer.factor is not None and not is_plain(layer)
    branch, layer.branch = layer.branch, None
    assert sqnr(velocity(pipe), original) < good - 2
    layer.branch, layer.factor = branch, None
    assert sqnr(velocity(pipe), original) < good - 2


def test_what_is_not_quantised_in_a_folder_stays_so(svd):
    """And keys and values of the caption, stored in W8A16, become what they stand for."""
    stored = load_model(svd, parts=("dit",)).dit
    assert isinstance(stored.blocks[0].cross_attention.kv, QuantizedLinear)
    pipe = sana_model.load(str(svd), backend="cpu")
    kv = pipe.dit.blocks[0].cross_attention.kv
    assert kv.weight.dtype == torch.bfloat16 == pipe.dit.head.weight.dtype
    expected = stored.blocks[0].cross_attention.kv.stored.dequantized().bfloat16()
    assert torch.equal(kv.unpacked().weight, expected)
    assert isinstance(pipe.dit.blocks[0].attention.qkv.weight, Quantized)


def test_the_same_bytes_on_one_and_two_threads(svd):
    pipe = sana_model.load(str(svd), backend="cpu")
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(pipe(**ARGUMENTS).latents)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


# ------------------------------------------------------------------------------------------------ rounding to nearest


@pytest.mark.parametrize("precision", ["w4a8", "w4a4"])
def test_rounding_while_loading_is_what_a_folder_of_rounded_weights_is(saved, tmp_path, precision):
    """But for what bf16 costs before rounding, and the 8 bits of the keys and values in the folder."""
    rounded = sana_model.load(str(saved), precision=precision, backend="cpu")
    folder = sana_model.load(str(quantized_folder(saved, tmp_path / "q", precision)), backend="cpu")
    name = "blocks.1.attention.out"
    original = velocity(sana_model.load(str(saved), precision="fp32", backend="reference"))
    assert 3 * relative_rms(velocity(rounded), velocity(folder)) < relative_rms(velocity(rounded), original)
    one, other = (pipe.dit.get_submodule(name) for pipe in (rounded, folder))
    assert one.values.dtype == torch.int8 and (one.values != other.values).float().mean() < 0.15


def test_the_order_of_precisions(saved):
    """Each loses more than the one before, on the same inputs; executed W4A4 is W4A8, which is no secret of the plan's."""
    original = velocity(sana_model.load(str(saved), precision="fp32", backend="reference"))
    found = {
        (precision, backend): sqnr(velocity(sana_model.load(str(saved), precision=precision, backend=backend)), original)
        for precision, backend in (
            ("bf16", "cpu"), ("w8a8", "cpu"), ("w4a8", "cpu"), ("w4a8", "reference"), ("w4a4", "cpu"), ("w4a4", "reference"),
        )
    }  # fmt: skip
    assert found["bf16", "cpu"] > found["w8a8", "cpu"] + 3 > found["w4a8", "cpu"] + 6
    assert found["w4a8", "cpu"] == pytest.approx(found["w4a8", "reference"], abs=1)
    assert found["w4a4", "cpu"] == found["w4a8", "cpu"] > found["w4a4", "reference"] + 1


@pytest.mark.parametrize("precision", ["w8a8", "w4a16", "w4a8"])
def test_the_text_encoder(saved, precision):
    states = {}
    for name, options in (
        ("original", {"text_precision": "fp32"}),
        ("executed", {"text_precision": precision}),
        ("exact", {"text_precision": precision, "exact": True}),
    ):
        pipe = sana_model.load(str(saved), precision="bf16", backend="cpu", **options)
        states[name] = pipe.encode(pipe.settings("a fox in the snow"))[1].states.float()
    loss = sqnr(states["exact"], states["original"])
    assert sqnr(states["executed"], states["exact"]) > max(20, loss + 5)
    assert {"w8a8": 18, "w4a16": 9, "w4a8": 9}[precision] < loss < 45


def test_optimize_takes_the_same_precisions(saved):
    pipe = sana_model.load(str(saved), precision="bf16", backend="reference")
    before = velocity(pipe)
    plan = sana_kernels.optimize(pipe, "w4a8", backend="cpu")
    assert plan.executed["dit"] == "w8a8" and "stored as w4a8" in str(plan)
    expected = velocity(sana_model.load(str(saved), precision="w4a8", backend="cpu"))
    assert torch.equal(velocity(pipe), expected)
    sana_kernels.restore(pipe)
    assert torch.equal(velocity(pipe), before)


# ------------------------------------------------------------------------------------------------ plans


def plan_of(precision: str, backend: str = "cpu", device: torch.device = CPU, text: str = "bf16", **options):
    precisions = {"dit": precision, "text_encoder": text, "autoencoder": "bf16"}
    return resolve(BUILT_IN["sana-1.6b"], backend, device, precisions, **options)


def rows(plan, part: str = "dit") -> dict:
    return {(row.op, row.precision): row for row in plan.rows if row.part == part}


def test_plans_name_storage_and_execution():
    plan = plan_of("w4a4", text="w4a16")
    row = rows(plan)["gemm", "w8a8"]
    assert (row.backend, row.stored) == ("cpu", "w4a4") and "no kernel of cpu multiplies w4a4" in row.reason
    assert rows(plan)["gemm", "bf16"].backend == "cpu"  # keys and values, branches
    assert plan.executed["dit"] == "w8a8" and plan.described("dit") == "w4a4 executed as w8a8"
    assert plan.as_json()["executed"]["dit"] == "w8a8"
    assert rows(plan, "text_encoder").keys() & {("gemm_w4a16", "w4a16"), ("gemm", "bf16")}
    assert plan_of("w8a8").described("dit") == "w8a8"
    exact = plan_of("w4a4", exact=True)
    assert exact.executed["dit"] == "exact" and exact.described("dit") == "w4a4 executed exactly"
    assert rows(exact)["quantized_linear", "w4a4"].backend == "reference"
    assert rows(plan_of("w8a8", exact=True))["gemm", "w8a8"].backend == "reference"


def test_what_the_doctor_says_of_precisions():
    lines = dict(line.split(maxsplit=1) for line in precisions_here().splitlines())
    assert lines.keys() == PRECISIONS.keys()
    if not torch.cuda.is_available():
        assert lines["w4a4"] == lines["w4a8"] == lines["w8a8"] == "w8a8 by cpu"


@pytest.fixture
def gpu(monkeypatch):
    """A machine that would have a GPU of this compute capability; nothing runs on it."""

    def pretend(capability: tuple[int, int]) -> torch.device:
        monkeypatch.setattr("sana_kernels.backend.backend_status", lambda name: None)
        monkeypatch.setattr("sana_model.plan.backend_status", lambda name: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        return torch.device("cuda")

    return pretend


@pytest.mark.parametrize(
    ("capability", "executed"), [((8, 0), "w4a4"), ((8, 9), "w4a4"), ((9, 0), "w8a8"), ((12, 0), "w8a8")]
)
def test_nvidia_multiplies_int4_where_its_tensor_cores_do(gpu, capability, executed):
    device = gpu(capability)
    plan = plan_of("w4a4", "cuda", device, text="w4a16")
    assert plan.executed == {"dit": executed, "text_encoder": "w4a16", "autoencoder": "bf16"}
    found = rows(plan)
    if executed == "w4a4":
        assert found["gemm_w4a4", "w4a4"].backend == found["quantize_int4", "w4a4"].backend == "cuda"
        assert ("mix_ffn", "bf16") not in found and found["depthwise_glu", "bf16"].backend == "cuda"
    else:
        assert found["gemm", "w8a8"].stored == "w4a4" and found["gemm", "w8a8"].backend == "cuda"
        assert "compute capability 9.0 and higher emulate" in found["gemm", "w8a8"].reason
        assert found["gemm", "bf16"].backend in ("triton", "library")  # the CUDA kernel multiplies int8 only
    assert rows(plan_of("w4a8", "cuda", device))["gemm", "w8a8"].stored == "w4a8"


def test_what_a_gpu_plan_prepares_and_how_its_ops_are_bound(gpu, svd):
    """On this machine's memory: layers are made as the plan says, and products go where their weights are read."""
    plan = plan_of("w4a4", "cuda", gpu((8, 6)))
    block = load_model(svd, parts=("dit",)).dit.blocks[0]
    plan.prepare("dit", block)
    assert isinstance(block.attention.qkv.weight, Int4) and block.attention.qkv.four_bit
    assert block.attention.qkv.branch.down.ndim == 2 and len(block.attention.qkv.branch.down) == 32
    assert block.cross_attention.kv.weight.dtype == torch.bfloat16
    plan = plan_of("w4a4", "cuda", gpu((9, 0)))
    block = load_model(svd, parts=("dit",)).dit.blocks[0]
    plan.prepare("dit", block)
    assert isinstance(block.attention.qkv.weight, Quantized) and block.attention.qkv.values.ndim == 2
    assert block.attention.qkv.branch.up.shape == (3 * SMALL.dit.hidden, 32)


# ------------------------------------------------------------------------------------------------ memory


def test_weights_are_counted_as_they_are_executed(svd, saved):
    small = find(saved).config
    for options, least in (({"precision": "w8a8"}, 0.97), ({"precision": "w4a8"}, 0.93), ({"precision": "bf16"}, 1.0)):
        pipe = sana_model.load(str(saved), backend="cpu", **options)
        held = sum(t.nbytes for t in (*pipe.dit.parameters(), *pipe.dit.buffers()))
        counted = memory.weights(small, pipe.plan.executed)["dit"]
        assert least * counted <= held <= 1.02 * counted, (options, held, counted)
    sizes = {p: memory.weights(BUILT_IN["sana-0.6b"], dict.fromkeys(("dit", "text_encoder"), p) | {"autoencoder": "bf16"})
             for p in ("bf16", "w8a8", "w4a16")}  # fmt: skip
    assert sizes["w8a8"]["dit"] < 0.6 * sizes["bf16"]["dit"]
    assert sizes["w4a16"]["text_encoder"] < 0.5 * sizes["bf16"]["text_encoder"]


# ------------------------------------------------------------------------------------------------ refusals


def damage(folder, tmp_path, change) -> str:
    """A copy of a quantised folder whose file's header (JSON text) was changed."""
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    file = copy / "transformer" / "quantized.safetensors"
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return str(copy)


def described(header: dict, change) -> None:
    values = json.loads(header["__metadata__"]["sana_quantization"])
    change(values)
    header["__metadata__"]["sana_quantization"] = json.dumps(values)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda h: h["__metadata__"].clear(), "is no quantised checkpoint"),
        (lambda h: h["__metadata__"].update(sana_quantization="{"), "has a damaged header"),
        (lambda h: described(h, lambda v: v.update(version=9)), "version 9, supported is 1"),
        (lambda h: described(h, lambda v: v.update(part="text_encoder")), "a quantised text_encoder, where a dit"),
        (
            lambda h: h.update(gone=h.pop("blocks.0.attention.qkv.scale")),
            r"blocks\.0\.attention\.qkv\.scale is missing",
        ),
    ],
)
def test_a_damaged_file_is_one_sentence(svd, tmp_path, change, complaint):
    folder = damage(svd, tmp_path, change)
    with pytest.raises(UserError, match=complaint) as raised:
        sana_model.load(folder)
    assert "\n" not in str(raised.value)


def test_values_that_are_no_numbers_are_found_when_they_are_read(svd, tmp_path):
    copy = tmp_path / "nan"
    shutil.copytree(svd, copy)
    file = copy / "transformer" / "quantized.safetensors"
    content = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", content[:8])
    start, _ = json.loads(content[8 : 8 + size])["blocks.1.mix_ffn.project.scale"]["data_offsets"]
    content[8 + size + start : 8 + size + start + 2] = b"\xff\x7f"  # NaN in bf16
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"blocks\.1\.mix_ffn\.project\.scale holds NaN"):
        sana_model.load(str(copy))


def test_a_folder_of_another_model_and_other_mistakes(svd, saved, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(svd, other)
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps(config | {"mlp_ratio": 3.0}))
    with pytest.raises(UserError, match="is of another model: its blocks"):
        sana_model.load(str(other))
    with pytest.raises(UserError, match=r"its dit is stored in w4a4, from which w8a8 cannot be made"):
        sana_model.load(str(svd), precision="w8a8")
    assert sana_model.load(str(svd), precision="w4a4").plan.precisions["dit"] == "w4a4"
    with pytest.raises(UserError, match=r"its dit is stored in w4a4\), and converting needs unquantised"):
        convert(str(svd), tmp_path / "out")
    with pytest.raises(UserError, match="holds no quantised DiT; `sana quantize` makes one"):
        RunName.parse(f"cpu@{saved}")
    with pytest.raises(UserError, match="precision 'w4a4' is not known; choose one of fp32, bf16, fp16"):
        RunName.parse("diffusers:w4a4")


def test_runs_of_folders_have_names_of_their_own(svd):
    name = RunName.parse(f"cpu@{svd}")
    assert (str(name), name.precision, name.precisions["text_encoder"]) == ("cpu:w4a4@q", "w4a4", "bf16")
    assert RunName.parse("cpu:w4a4").precisions == {"dit": "w4a4", "text_encoder": "bf16", "autoencoder": "bf16"}
