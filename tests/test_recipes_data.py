"""The data of the recipe: the builder on a small package, captions, what is held out, pictures on backgrounds, tokens."""

import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_data import NAMES, write_pictures

from recipes import captions, data, training
from recipes.images import Images, Placement
from recipes.vocabulary import train_tokenizer
from sana_model.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------ captions


def test_captions_can_be_read_back():
    rng = random.Random(0)
    forms = set()
    for i in range(2000):
        tags = tuple(rng.sample(["animal", "orange", "sharp", "old"], rng.randint(0, 3)))
        style, colour = rng.choice(list(captions.STYLES)), rng.choice(list(captions.COLOURS))
        factors = captions.Factors(NAMES[i % len(NAMES)], style, colour, tags)
        text = captions.sample(rng, factors)
        read = captions.parse(text)
        assert (read.concept, read.style, read.colour) == (factors.concept, style, colour), text
        assert set(read.tags) <= set(tags)
        forms.add(text.replace(factors.concept, "…"))
    assert len(forms) > 200
    with pytest.raises(ValueError, match="names no style"):
        captions.parse("a fox on a teal background")


def test_the_canonical_caption():
    assert captions.canonical("fox", "3d", "teal") == "a 3d render of a fox on a teal background"
    assert captions.canonical("owl", "outline", "orange") == "an outline drawing of an owl on an orange background"
    assert captions.canonical("glasses", "flat") == "a flat icon of glasses"
    assert captions.with_article("bus") == "a bus" and captions.with_article("unicorn") == "a unicorn"
    assert captions.parse("a flat icon of glasses").colour == "white"


def test_background_colours_can_be_told_apart():
    colours = np.array(list(captions.COLOURS.values()), dtype=int)
    apart = np.abs(colours[:, None] - colours[None]).max(-1) + 255 * np.eye(len(colours), dtype=int)
    assert len(colours) >= 12 and apart.min() >= 50


# ------------------------------------------------------------------------------------------------ data


def archive(folder: Path, name: str, files: dict[str, bytes]) -> data.Package:
    """A package as npm packs it."""
    package = data.Package(name, "1.0.0", "")
    with tarfile.open(folder / package.archive, "w:gz") as tar:
        for path, content in files.items():
            entry = tarfile.TarInfo(f"package/{path}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return data.Package(name, "1.0.0", hashlib.sha256((folder / package.archive).read_bytes()).hexdigest())


def webp(shade: int, size: tuple[int, int] = (256, 256)) -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", size, (shade, 200, 255 - shade, 255)).save(out, "WEBP", lossless=True)
    return out.getvalue()


def test_the_builder_on_a_small_package(tmp_path):
    pytest.importorskip("resvg_py")
    entries = [  # label, code point, group, shade in 3d
        ("fox", "1F98A", 3, 0),
        ("copy of a fox", "1F98B", 3, 0),  # looks like a fox in both styles
        ("owl", "1F989-FE0F", 3, 255),
        ("person running", "1F3C3", 1, 120),
        ("man running", "1F3C3-200D-2642-FE0F", 1, 60),  # the same person
        ("no picture", "1F000", 3, None),
        ("keycap: 1", "0031-FE0F-20E3", 8, 90),  # lettering
    ]
    labels = [{"label": n, "hexcode": c, "group": g, "tags": ["animal", n]} for n, c, g, _ in entries]
    groups = {"1": "people-body", "3": "animals-nature", "8": "symbols"}
    pictures = {f"assets/{c.lower()}.webp": webp(s, (256, 264)) for _, c, _, s in entries if s is not None}
    square = '<rect width="32" height="32" fill="#{:02x}8040"/>'
    icons = {
        "width": 32, "height": 32,
        "icons": {n: {"body": square.format(s)} for n, _, _, s in entries if s is not None},
    }  # fmt: skip
    chars = {data.plain(c): n for n, c, _, _ in entries}
    packages = (
        archive(tmp_path, "@x/renders", pictures),
        archive(tmp_path, "icons", {"icons.json": json.dumps(icons).encode(), "chars.json": json.dumps(chars).encode()}),
        archive(tmp_path, "labels", {
            "en/data.json": json.dumps(labels).encode(), "meta/groups.json": json.dumps({"groups": groups}).encode(),
        }),
    )  # fmt: skip
    data.build(tmp_path / "set", tmp_path, packages=packages)
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    renders = np.load(tmp_path / "set" / "renders.npy")
    pairs = [(row["name"], row["style"]) for row in index]
    assert pairs == [(name, style) for name in ("fox", "owl", "person running") for style in ("3d", "flat")]
    assert index[0]["tags"] == ["animal"] and index[2]["codepoint"] == "1f989"
    assert renders.shape == (6, 256, 256, 4) and renders.dtype == np.uint8
    assert renders[0, 128, 128].tolist() == [0, 200, 255, 255] and renders[0, 128, 0, 3] == 0  # fitted, not cropped
    assert renders[3, 128, 128].tolist() == [255, 0x80, 0x40, 255]

    damaged = data.Package("labels", "1.0.0", "0" * 64)
    with pytest.raises(UserError, match="SHA-256"):
        data.fetch(damaged, tmp_path)


def test_held_out_pairs_are_never_trained(dataset):
    names = [f"thing {i}" for i in range(2000)]
    held = [data.heldout_style(name) for name in names]
    assert 0.17 < sum(style is not None for style in held) / len(held) < 0.23
    assert 0.4 < held.count("3d") / (held.count("3d") + held.count("flat")) < 0.6
    assert data.heldout_style("fox") is None  # the picture of the main README is a trained pair
    images = Images(dataset, 128)
    trained = {(images.rows[i].name, images.rows[i].style) for i in images.train}
    assert images.held_out and not set(images.train) & set(images.held_out)
    for i in images.held_out:
        row = images.rows[i]
        assert data.heldout_style(row.name) == row.style
        assert (row.name, {"3d": "flat", "flat": "3d"}[row.style]) in trained  # the concept itself is known


def test_compositing_is_what_pillow_does(dataset):
    images, colours, rows = Images(dataset, 256), ("red", "teal"), (0, 5)
    whole = Placement(Placement.centred(colours).colours, torch.ones(2), torch.zeros(2, 2))
    renders = np.load(dataset / "renders.npy")
    for row, colour, image in zip(rows, colours, images.compose(rows, whole), strict=True):
        expected = Image.new("RGBA", (256, 256), (*captions.COLOURS[colour], 255))
        expected.alpha_composite(Image.fromarray(renders[row]))
        error = np.asarray(training.to_pil(image), dtype=int) - np.asarray(expected.convert("RGB"), dtype=int)
        assert np.abs(error).max() <= 2


def test_placement_moves_the_picture_and_nothing_else(dataset):
    images = Images(dataset, 128)
    base = Placement.centred(["teal"])
    moved = Placement(base.colours, base.scales, torch.tensor([[0.05, -0.03125]]))  # 6.4 px right, 4 px up
    first, second = (images.compose([0], p)[0].sub(plain_colour("teal")).abs().sum(0) for p in (base, moved))
    grid = torch.stack(torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij"))
    centres = [(grid * weight).sum((1, 2)) / weight.sum() for weight in (first, second)]
    torch.testing.assert_close(centres[1] - centres[0], torch.tensor([-4.0, 6.4]), atol=0.1, rtol=0)
    corner = images.compose(range(4), Placement.centred(["teal"] * 4))[:, :, 0, 0]
    torch.testing.assert_close(corner, plain_colour("teal")[:, 0, 0].expand(4, 3))


def plain_colour(name: str) -> torch.Tensor:
    return (torch.tensor(captions.COLOURS[name]) / 127.5 - 1)[:, None, None]


# ------------------------------------------------------------------------------------------------ tokens


def test_the_tokenizer_reads_any_text(dataset, tmp_path):
    from sana_model.tokenizer import load_tokenizer

    rows = Images(dataset, 128).rows
    for folder in ("a", "b"):
        train_tokenizer(rows, tmp_path / folder)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.encode("") == [2] and tokenizer.pad_id == 0
    ids = tokenizer.encode("a 3d render of a fox on a teal background")
    assert ids[0] == 2 and len(ids) == 12 and 2 not in ids[1:]  # a token for each word, and two for "3d"
    for text in ("a fox", "zażółć 狐 🦊", "piñata, O'Neill"):
        assert tokenizer.decode(tokenizer.encode(text)).strip() == text.lower()
