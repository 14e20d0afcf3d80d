"""Memory estimates against the memory that is really used, and refusals whose advice holds."""

import gc
import multiprocessing
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import psutil
import pytest
import torch
from variants import isa_cap

import sana_model
from sana_model import heap, memory, pipeline
from sana_model.autoencoder import family
from sana_model.autoencoder.blocks import ResBlock
from sana_model.autoencoder.dc_ae import Autoencoder
from sana_model.config import BUILT_IN, ModelConfig
from sana_model.dit import DiT
from sana_model.errors import MissingError
from sana_model.plan import dtype_name, resolve
from sana_model.settings import Settings

TINY, FULL = BUILT_IN["sana-tiny-random"], BUILT_IN["sana-1.6b"]
CPU = torch.device("cpu")
PARTS = ("dit", "text_encoder", "autoencoder")
BF16, FP32 = dict.fromkeys(PARTS, "bf16"), dict.fromkeys(PARTS, "fp32")


def settings(width: int, height: int, **values) -> Settings:
    return Settings("a fox", width, height, 1, 4.5, **values)


def peak_of(run) -> int:
    """Bytes of resident memory that `run` adds at its peak."""
    process, done = psutil.Process(), threading.Event()
    gc.collect()
    before = peak = process.memory_info().rss

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with torch.inference_mode():
            run()
    finally:
        done.set()
        watcher.join()
    return peak - before


def in_a_fresh_process(function, *arguments):
    """function(*arguments). The heap of an old process has holes: what is freed into them stays resident, up to 300 MB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


SMALL_DECODER = replace(TINY, autoencoder=replace(TINY.autoencoder, decoder_layers=(1,) * 6))


def peak_of_decoding(dtype: torch.dtype, method: str) -> int:
    autoencoder, latents = Autoencoder(SMALL_DECODER.autoencoder).to(dtype).eval(), torch.randn(1, 32, 40, 32)
    return peak_of(lambda: getattr(autoencoder, method)(latents))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoding_stays_below_the_estimate_and_near_it(dtype):
    used, used_in_tiles = (in_a_fresh_process(peak_of_decoding, dtype, m) for m in ("decode", "tiled_decode"))
    precisions = BF16 | {"autoencoder": dtype_name(dtype)}
    estimated, in_tiles = (
        memory.estimate(SMALL_DECODER, settings(1024, 1280, tiled=tiled), precisions)["decode"]
        for tiled in (False, True)
    )
    assert used <= estimated, f"{used / 1e6:.0f} MB used, {estimated / 1e6:.0f} MB estimated"
    assert estimated - memory.SMALL <= 3 * used
    assert used_in_tiles <= in_tiles < estimated and in_tiles - memory.SMALL <= 3 * used_in_tiles


NARROW = replace(TINY, autoencoder=replace(TINY.autoencoder, widths=(64,) * 6))
LITE = replace(NARROW, autoencoder=family.lite(NARROW.autoencoder))  # 20 blocks, all of them in bands
IN_BANDS = {  # the model, the decoder's precision, width and height
    "bf16": (NARROW, "bf16", 1536, 2048),
    "w8a8": (NARROW, "w8a8", 1536, 2048),
    "lite": (LITE, "bf16", 2048, 2048),
    "wide": (NARROW, "bf16", 8192, 512),  # two tiles are larger than BAND_BYTES
}


def peak_of_decoding_in_bands(config: ModelConfig, precision: str, width: int, height: int) -> int:
    """As the command line does."""
    heap.keep_freed()
    autoencoder = Autoencoder(config.autoencoder).bfloat16().eval().requires_grad_(False)
    plan = resolve(config, "cpu", CPU, dict.fromkeys(PARTS, precision))
    plan.prepare("autoencoder", autoencoder)
    autoencoder.use(plan.ops("autoencoder"))
    latents = torch.randn(1, 32, height // 32, width // 32)
    return peak_of(lambda: autoencoder.decode(latents))


@pytest.mark.parametrize("case", IN_BANDS)
def test_decoding_in_bands_stays_below_the_estimate_and_far_below_the_whole(case):
    config, precision, width, height = IN_BANDS[case]
    used = in_a_fresh_process(peak_of_decoding_in_bands, config, precision, width, height)
    sizes = config, width, height, torch.bfloat16, CPU
    bands, whole = (memory.decoder_bytes(*sizes, in_bands=in_bands) for in_bands in (True, False))
    assert used <= bands < whole / 4, f"{used / 1e6:.0f} MB used, {bands / 1e6:.0f} MB estimated"


SHALLOW = replace(FULL, dit=replace(FULL.dit, layers=1, hidden=1120, cross_heads=10))


def peak_of_a_step(dtype: torch.dtype) -> int:
    dit = DiT(SHALLOW.dit).to(dtype).eval()
    caption, lengths = torch.randn(2, 300, 2304), torch.tensor([300, 30])
    return peak_of(lambda: dit(torch.randn(2, 32, 48, 64), torch.full((2,), 500.0), caption, lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_denoising_stays_below_the_estimate_and_near_it(dtype):
    used = in_a_fresh_process(peak_of_a_step, dtype)
    precisions = BF16 | {"dit": dtype_name(dtype)}
    estimated = memory.estimate(SHALLOW, settings(2048, 1536), precisions)["denoise"]
    assert used <= estimated, f"{used / 1e6:.0f} MB used, {estimated / 1e6:.0f} MB estimated"
    assert estimated - memory.SMALL <= 4 * used


def test_a_picture_that_is_too_large_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(pipeline, "load_model", lambda *args, **kwargs: pytest.fail("it was loaded"))
    with pytest.raises(MissingError, match=r"65536x65536 need .* what would fit: .*--size"):
        pipeline.load("sana-tiny-random", picture={"prompt": "a fox", "width": 65536, "height": 65536})


def test_weights_are_counted_as_published_and_as_loaded():
    assert memory.parameters(FULL)["dit"] == 1_604_462_752
    assert memory.parameters(FULL)["autoencoder"] == 153_027_104 + 159_223_171
    loaded = sana_model.load("sana-tiny-random", text_precision="fp32", backend="reference").model
    counted = memory.weights(TINY, BF16 | {"text_encoder": "fp32"})
    for part in PARTS:
        assert counted[part] == sum(p.nbytes for p in getattr(loaded, part).parameters())


@pytest.mark.parametrize(("precision", "isa"), [("bf16", "avx512"), ("w8a8", "avx512"), ("w8a8", "avx2")])
def test_kernels_are_counted_as_they_are_transformed(precision, isa):
    with isa_cap(isa):
        model = sana_model.load("sana-tiny-random", decoder_precision=precision, backend="cpu").model
        asked = BF16 | {"autoencoder": precision}
        counted = memory.weights(TINY, asked, CPU)["autoencoder"] - memory.weights(TINY, asked)["autoencoder"]
    blocks = [block for block in model.autoencoder.modules() if isinstance(block, ResBlock)]
    kernels = [conv.weight for block in blocks for conv in (block.conv1, block.conv2)]
    grown = [w.values.nbytes - 18 * w.shape[0] * w.shape[1] for w in kernels if w.transformed]
    assert sum(grown) > 1e5 and counted == sum(grown)


def test_the_estimate_grows_with_what_is_asked_for():
    base = memory.estimate(FULL, settings(1024, 1024), BF16)
    for change, part in [
        ({"num_images": 2}, "denoise"),
        ({"pag_scale": 1.0}, "denoise"),
        ({"num_images": 2}, "decode"),
        ({"width": 2048}, "decode"),
    ]:
        assert memory.estimate(FULL, replace(settings(1024, 1024), **change), BF16)[part] > base[part], (change, part)
    assert memory.estimate(FULL, replace(settings(1024, 1024), guidance=1.0), BF16)["denoise"] < base["denoise"]
    assert memory.estimate(FULL, settings(990, 1000, binning=True), BF16) == base


def refusal(check, *arguments, **options) -> str:
    with pytest.raises(MissingError) as raised:
        check(*arguments, **options)
    return str(raised.value)


def test_a_picture_that_does_not_fit_is_refused_with_advice_that_holds(monkeypatch):
    room = 4_000_000_000
    monkeypatch.setattr(memory, "available", lambda _device: room)
    memory.check_run(FULL, settings(1024, 1024), BF16, CPU)
    asked = settings(4096, 2048, num_images=2)
    message = refusal(memory.check_run, FULL, asked, BF16, CPU)
    assert "2 pictures of 4096x2048" in message and "4.0 GB are free" in message and "--low-memory" in message
    width, height = map(int, re.search(r"--size (\d+)x(\d+)", message).groups())
    assert width % 32 == height % 32 == 0 and width / height == pytest.approx(2, rel=0.05)
    memory.check_run(FULL, replace(asked, width=width, height=height), BF16, CPU)
    refusal(memory.check_run, FULL, replace(asked, width=width + 32, height=height + 32), BF16, CPU)
    memory.check_run(FULL, replace(asked, tiled=True), BF16, CPU)


def test_what_is_decoded_in_bands_is_not_told_of_the_tiles_of_low_memory(monkeypatch):
    """There `--low-memory` frees the text encoder, and tiles are another matter."""
    asked = settings(16384, 8192)
    tiled = replace(asked, tiled=True)
    needed, room = (
        max(parts["denoise"], parts["decode"])
        for parts in (memory.estimate(FULL, one, BF16, CPU, in_bands=True) for one in (asked, tiled))
    )
    assert needed > room + memory.weights(FULL, BF16, CPU)["text_encoder"]
    monkeypatch.setattr(memory, "available", lambda _device: room)
    message = refusal(memory.check_run, FULL, asked, BF16, CPU, in_bands=True)
    assert "--tiled" in message and "--low-memory" not in message
    memory.check_run(FULL, tiled, BF16, CPU, in_bands=True)
    monkeypatch.setattr(memory, "available", lambda _device: needed - 1)
    assert "--low-memory" in refusal(memory.check_run, FULL, asked, BF16, CPU, in_bands=True)


def test_one_of_many_pictures_and_a_lighter_precision_are_advised_where_they_are_enough(monkeypatch):
    asked = settings(1024, 1024, num_images=16, tiled=True)
    one = memory.estimate(FULL, replace(asked, num_images=1), FP32)
    monkeypatch.setattr(memory, "available", lambda _device: max(one["denoise"], one["decode"]))
    message = refusal(memory.check_run, FULL, asked, FP32, CPU, low_memory=True)
    assert "--num-images 1" in message and "--precision bf16" in message and "--low-memory" not in message


def test_weights_that_do_not_fit_are_refused_before_they_are_allocated(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda _device: 12_000_000_000)
    message = refusal(memory.check_load, FULL, FP32, CPU)
    assert (
        "need 18.1 GB" in message and re.search(r"--precision bf16 \(9\.[12] GB\)", message) and "sana-0.6b" in message
    )
    memory.check_load(FULL, BF16, CPU)
    monkeypatch.setattr(memory, "available", lambda _device: 1_000_000)
    assert "nothing smaller" in refusal(memory.check_load, TINY, BF16, CPU)

    monkeypatch.setattr("sana_model.pipeline.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(MissingError, match="weights of sana-tiny"):
        sana_model.load("sana-tiny-random")


def test_a_model_that_is_too_large_for_the_gpu_may_go_to_the_cpu(monkeypatch):
    rooms = {"cpu": 64_000_000_000, "cuda": 8_000_000_000}
    monkeypatch.setattr(memory, "available", lambda device: rooms[device.type])
    message = refusal(memory.check_load, FULL, BF16, torch.device("cuda"))
    assert "GPU memory" in message and "--device cpu" in message


GIB = 2**30


def cgroups(root, own: str, files: dict[str, dict[str, object]]):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    for folder, contents in files.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, value in contents.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(f"{value}\n")


def v2(limit, used: int, cache: int) -> dict[str, object]:
    return {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {cache}"}


def v1(limit: int, used: int, cache: int) -> dict[str, object]:
    stat = f"inactive_file 3\ntotal_inactive_file {cache}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


@pytest.mark.parametrize(
    ("own", "files", "room"),
    [
        ("0::/job/step\n", {"job/step": v2("max", 3 * GIB, 0), "job": v2(8 * GIB, 3 * GIB, GIB)}, 6 * GIB),
        ("0::/\n", {"": v2(2 * GIB, 3 * GIB, 0)}, 0),
        ("4:memory:/gone\n0::/\n", {"memory": v1(4 * GIB, 3 * GIB, GIB)}, 2 * GIB),
        ("4:memory:/a\n3:cpu:/a\n", {"memory/a": v1(4 * GIB, GIB, 0), "memory": v1(2 * GIB, GIB, 0)}, GIB),
        ("0::/\n", {"": v2("max", GIB, 0)}, None),
        ("0::/\n", {}, None),
    ],
)
def test_limits_of_control_groups_are_found(tmp_path, own, files, room):
    cgroups(tmp_path, own, files)
    assert min(memory.cgroup_rooms(tmp_path), default=None) == room


def test_the_tightest_limit_counts(monkeypatch):
    assert 0 < memory.available(CPU) <= psutil.virtual_memory().total
    monkeypatch.setattr(memory, "cgroup_rooms", lambda: iter([2**60, 12345]))
    assert memory.available(CPU) == 12345
