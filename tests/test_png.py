"""PNG metadata: what goes in comes out, other programs can read it, and nothing broken or foreign is believed."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from sana_model.errors import MissingError, UserError
from sana_model.png import Metadata, read_metadata, write_png
from sana_model.settings import Settings, setting

SETTINGS = Settings(
    prompt="a red fox", width=64, height=96, steps=7, guidance=4.75, negative_prompt="blur", seed=2**63 - 5,
    num_images=3, sampler="flow_euler", instruction="Paint: ", pag_scale=0.5, guidance_interval=(0.25, 0.75),
    binning=True, tiled=True,
)  # fmt: skip
METADATA = Metadata(
    SETTINGS, 2, "models/my fox, v2", "cpu", "fp16", "bf16", "fp32", "original", "org/name", random=True
)
PROMPTS = [
    'two\nlines, "quotes", commas: colons \\ and a tab\t',
    "a fox\nNegative prompt: not really\nSteps: 3, Seed: 9",
    "狐狸在雪地里, лиса, ثعلب, 🦊",
    " spaces \r\n kept ",
    "a NUL \0 and an escape \x1b[31m",
    "",
]


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_everything_survives_the_file(tmp_path, image, prompt):
    metadata = replace(METADATA, settings=replace(SETTINGS, prompt=prompt, negative_prompt=prompt, instruction=prompt))
    write_png(tmp_path / "a.png", image, metadata)
    assert read_metadata(tmp_path / "a.png") == metadata
    assert read_metadata(tmp_path / "a.png") != replace(metadata, index=1)
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.format == "PNG" and stored.tobytes() == image.tobytes()
        assert stored.text["parameters"].startswith(prompt.replace("\0", ""))
    assert os.listdir(tmp_path) == ["a.png"]


def test_the_web_ui_line_has_the_picture_s_own_prompt_and_seed(tmp_path, image):
    metadata = Metadata(replace(SETTINGS, prompt=("a fox", "a cat")), 4, "models/my fox, v2", "cpu", *["bf16"] * 3)
    write_png(tmp_path / "a.png", image, metadata)
    with Image.open(tmp_path / "a.png") as stored:
        prompt, negative, line = stored.text["parameters"].split("\n")
    assert prompt == "a cat" and negative == "Negative prompt: blur"
    assert line == (
        f"Steps: 7, Sampler: flow_euler, CFG scale: 4.75, Seed: {2**63 - 1}, Size: 64x96, "
        'Model: "models/my fox, v2", Version: sana_kernels 0.1.0'
    )


def stored_with(tmp_path, image, text: str):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("sana", text)
    image.save(tmp_path / "a.png", pnginfo=chunks)
    return tmp_path / "a.png"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"index": 3}, "no picture 3 among 3"),
        ({"index": "0"}, "cannot be read"),
        ({"model": 7}, "not a text"),
        ({"settings": {"prompt": "a"}}, "missing"),
        ({"settings": METADATA.as_json()["settings"] | {"steps": True}}, "steps is a whole number, not True"),
        ({"settings": METADATA.as_json()["settings"] | {"sigma": 1}}, "'sigma' is not a setting"),
        ({"settings": None}, "cannot be read"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(tmp_path, image, change, complaint):
    good = stored_with(tmp_path, image, json.dumps(METADATA.as_json()))
    assert read_metadata(good) == METADATA
    bad = stored_with(tmp_path, image, json.dumps(METADATA.as_json() | change))
    with pytest.raises(UserError, match=complaint):
        read_metadata(bad)


def test_files_of_others_are_refused_in_a_sentence(tmp_path, image):
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("not a picture")
    write_png(tmp_path / "whole.png", image, METADATA)
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    stored_with(tmp_path, image, "{")
    for name in ("plain.png", "photo.jpg", "text.png", "cut.png", "a.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            read_metadata(tmp_path / name)


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, MissingError), (errno.EACCES, UserError)])
def test_a_write_that_fails_leaves_the_old_picture_and_nothing_else(tmp_path, image, monkeypatch, number, error):
    write_png(tmp_path / "a.png", image, METADATA)
    before = (tmp_path / "a.png").read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(error, match=r"a\.png cannot be written") as raised:
        write_png(tmp_path / "a.png", image, replace(METADATA, index=0))
    assert type(raised.value) is error
    assert (tmp_path / "a.png").read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("guidance", 4, 4.0),
        ("guidance_interval", [0, 0.5], (0, 0.5)),
        ("prompt", ["a", "b"], ("a", "b")),
        ("steps", 4.0, UserError),
        ("seed", "1", UserError),
        ("guidance", float("nan"), UserError),
        ("guidance_interval", [0.5], UserError),
        ("prompt", ["a", 1], UserError),
        ("prompt", "half a pair: \ud800", UserError),
        ("prompt", None, UserError),
        ("tiled", True, True),
        ("tiled", 1, UserError),
        ("tiled", "no", UserError),
        ("steps", True, UserError),
        ("steps", np.array([2]), UserError),
        ("steps", torch.empty((), device="meta"), UserError),
        ("guidance", "7", UserError),
        ("guidance", 10**400, UserError),
        ("guidance", np.float32(4.5), 4.5),
        ("guidance_interval", "01", UserError),
        ("guidance_interval", {0.9, 0.1}, UserError),
        ("guidance_interval", (0.0, True), UserError),
    ],
)
def test_settings_from_outside_have_the_right_type_or_are_refused(name, value, expected):
    if expected is UserError:
        with pytest.raises(UserError, match=name):
            setting(name, value)
    else:
        assert setting(name, value) == expected and type(setting(name, value)) is type(expected)
