"""An image in bands is the image whole, bit for bit: every layer of the DC-AE family, in every precision of the CPU."""

from dataclasses import replace

import emulated_tiles
import pytest
import torch
from compare import relative_rms
from test_autoencoder import SMALL, randomise
from variants import isa_cap

from sana_model.autoencoder import bands, family
from sana_model.autoencoder.blocks import ResBlock, Upsample
from sana_model.autoencoder.dc_ae import Autoencoder
from sana_model.config import BUILT_IN, AutoencoderConfig
from sana_model.plan import resolve

SANA = replace(SMALL, widths=(16, 32, 64, 64, 64, 64))
CONFIGS = {
    "sana": SANA,  # strided and folded resampling, attention within
    "lite": family.lite(SANA),  # convolutions alone, pixel shuffles
    "in": replace(
        family.FAMILY["dc-ae-f32c32-in-1.0"],
        widths=SANA.widths, encoder_layers=(0, 1, 2, 1, 1, 1), decoder_layers=(0, 1, 2, 1, 1, 1),
    ),  # no layers at the full resolution, pixel unshuffles, batch norm
}  # fmt: skip
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "w8a8": torch.bfloat16}


def packed(config: AutoencoderConfig, precision: str, seed: int = 0, backend: str = "cpu") -> Autoencoder:
    """Random weights, as a backend's kernels read them."""
    autoencoder = Autoencoder(config).eval().requires_grad_(False)
    randomise(autoencoder, seed)
    model = replace(BUILT_IN["sana-tiny-random"], autoencoder=config)
    plan = resolve(
        model, backend, torch.device("cpu"), dict.fromkeys(("dit", "text_encoder", "autoencoder"), precision)
    )
    plan.prepare("autoencoder", autoencoder.to(PRECISIONS[precision]))
    autoencoder.use(plan.ops("autoencoder"))
    return autoencoder


def outputs(autoencoder: Autoencoder, x: torch.Tensor, method: str, sizes: list[int | None]) -> list[torch.Tensor]:
    results = []
    for size in sizes:
        autoencoder.band_bytes = size
        with torch.inference_mode():
            results.append(getattr(autoencoder, method)(x))
    return results


def signed(method: str, grid: tuple[int, int], batch: int = 1) -> torch.Tensor:
    """Latents or an image for a latent grid, with outliers."""
    shape = (batch, 32, *grid) if method == "decode" else (batch, 3, 32 * grid[0], 32 * grid[1])
    x = torch.randn(shape)
    x[0, 1, -1, -1], x[-1, 0, 0, 0] = 15.0, -12.0
    return x


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("method", ["decode", "encode"])
def test_bands_are_the_whole(method, config, precision):
    """Bands of 16 rows, of some more, of sizes that divide nothing; images that are not square; two at a time."""
    autoencoder = packed(config, precision)
    for grid, batch in (((3, 2), 1), ((5, 1), 1), ((1, 3), 2)):
        x = signed(method, grid, batch)
        whole, *banded = outputs(autoencoder, x, method, [None, 1, 50_000, 333_333])
        assert whole.float().isfinite().all() and whole.float().std() > 0.01
        for result in banded:
            assert torch.equal(result, whole), f"{method}, {grid}, {precision}"


def test_padding_at_seams_would_show(monkeypatch):
    """Bands that are padded with zeros where they meet, as by tools that only cut: what the test above would see."""
    autoencoder = packed(SANA, "bf16")
    x = signed("decode", (3, 2))
    drop = bands.Window.drop

    def forget(self, first, reader=0):
        drop(self, first, reader)
        if len(self._needed) == 1 and 0 < first < self.end:  # a window that no residual is read from
            self.rows(first, first + 1)[:] = 0

    whole, right = outputs(autoencoder, x, "decode", [None, 1])
    monkeypatch.setattr(bands.Window, "drop", forget)
    (wrong,) = outputs(autoencoder, x, "decode", [1])
    assert torch.equal(whole, right) and not torch.equal(whole, wrong)


def test_memory_does_not_grow_with_the_image(monkeypatch):
    """Between two layers there are never more than a few bands, however many rows the image has."""
    most = 0
    add = bands.Window.add

    def watch(self, rows):
        nonlocal most
        add(self, rows)
        pieces = [piece for piece in (self._above, self._rows) if piece is not None]
        stored = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in pieces}.values())
        most = max(most, stored // rows[0, 0].nbytes)

    monkeypatch.setattr(bands.Window, "add", watch)
    autoencoder = packed(SANA, "bf16")
    held = []
    for rows in (4, 12):
        most = 0
        outputs(autoencoder, signed("decode", (rows, 1)), "decode", [1])
        held.append(most)
    assert held[0] == held[1] <= 5 * 16, f"{held} rows of images of 128 and 384 rows are held at a time"


@pytest.mark.parametrize("precision", ["w8a8", "bf16", "fp32"])
def test_kernels_are_transformed_where_that_is_faster(precision):
    """Of 64 channels and more, in and out; not on AMX, where products cost less than transforms."""

    def kernels() -> dict[tuple[str, int], set[tuple[int, torch.dtype]]]:
        """Size and dtype of the kernels by block and the fewest channels."""
        found = {}
        for block in packed(SANA, precision).decoder.modules():
            if isinstance(block, ResBlock | Upsample):
                for conv in (block.conv1, block.conv2) if isinstance(block, ResBlock) else (block.conv,):
                    upsampled = 4 if isinstance(block, Upsample) and not conv.weight.transformed else 1
                    channels = min(conv.shape[0] // upsampled, conv.shape[1])
                    found.setdefault((type(block).__name__, channels), set()).add((conv.shape[2], conv.values.dtype))
        return found

    dtype = torch.int8 if precision == "w8a8" else PRECISIONS[precision]
    direct = {
        (block, width): {(size, dtype)} for block, size in (("ResBlock", 3), ("Upsample", 2)) for width in (16, 32, 64)
    }
    transformed = {
        integers: direct | {("ResBlock", 64): {(6, integers)}, ("Upsample", 64): {(3, integers)}}
        for integers in (torch.int8, torch.int16)
    }
    with isa_cap("avx512"):
        assert kernels() == {"w8a8": transformed[torch.int8], "bf16": transformed[torch.int16]}.get(precision, direct)
    if precision == "w8a8":  # without instructions for int8
        with isa_cap("avx2"):
            assert kernels() == transformed[torch.int16]
    with emulated_tiles.cpu():
        assert kernels() == direct


@pytest.mark.parametrize("method", ["decode", "encode"])
def test_bf16_is_as_close_to_fp32_as_pytorch(method):
    """By whatever products; kernels of 64 channels are transformed where that is faster."""
    x, exact = signed(method, (3, 2)), packed(SANA, "fp32", backend="reference")
    with torch.inference_mode():
        ours, theirs, fp32 = (
            getattr(autoencoder, method)(x).float()
            for autoencoder in (packed(SANA, "bf16"), packed(SANA, "bf16", backend="reference"), exact)
        )
    assert 1e-4 < relative_rms(ours, fp32) < 1.1 * relative_rms(theirs, fp32)


def test_the_plan_says_so():
    model, parts = BUILT_IN["sana-0.6b"], dict.fromkeys(("dit", "text_encoder"), "bf16")
    with isa_cap("avx512"):
        plans = [
            resolve(model, "cpu", torch.device("cpu"), parts | {"autoencoder": p}) for p in ("fp32", "bf16", "w8a8")
        ]
        assert ["Winograd" in str(plan) for plan in plans] == [False, True, True]
        assert [plan.as_json()["transformed"] for plan in plans] == ["", "int16", "int8"]
        with isa_cap("avx2"):
            assert [plan.transformed for plan in plans] == ["", "int16", "int16"]
    with emulated_tiles.cpu():
        assert [plan.transformed for plan in plans] == ["", "", ""]
