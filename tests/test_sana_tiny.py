"""The trained model in the package: it paints what it is asked for, and diffusers paints the same picture with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import sana_model
from recipes.captions import COLOURS
from sana_model.config import BUILT_IN
from sana_model.weights.models import CHECKPOINTS

FOLDER = CHECKPOINTS / "sana-tiny"
FOX = "a 3d render of a fox on a teal background"  # the README's first command


@pytest.fixture(scope="module")
def pipe():
    return sana_model.load("sana-tiny", precision="fp32", backend="reference")


def paint(pipe, prompt: str, **settings) -> np.ndarray:
    """(H, W, 3), 0 to 255."""
    return np.asarray(pipe(prompt, **settings).images[0], dtype=float)


def border(picture: np.ndarray) -> np.ndarray:
    """The pixels of the outermost 5 %."""
    width = len(picture) // 20
    inner = np.zeros(picture.shape[:2], bool)
    inner[width:-width, width:-width] = True
    return picture[~inner]


def background(picture: np.ndarray) -> str:
    """The colour of COLOURS nearest to the median of the border."""
    distance = {name: np.abs(np.median(border(picture), 0) - colour).max() for name, colour in COLOURS.items()}
    return min(distance, key=distance.get)


def test_the_default_model_is_small_trained_and_documented(pipe):
    built_in = BUILT_IN["sana-tiny"]
    autoencoder = replace(built_in.autoencoder, scaling_factor=pipe.config.autoencoder.scaling_factor)
    assert pipe.config == replace(built_in, autoencoder=autoencoder) and not pipe.model.random
    assert sana_model.load().config == pipe.config
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 40e6
    assert "\ntrained_on: " in (FOLDER / "README.md").read_text() and "MIT" in (FOLDER / "NOTICE").read_text()


@pytest.mark.parametrize("thing", ["3d render of a fox", "flat icon of an owl"])
def test_the_background_is_the_one_asked_for(pipe, thing):
    wanted = ["teal", "red", "yellow", "navy", "white", "pink"]
    assert [background(paint(pipe, f"a {thing} on a {colour} background")) for colour in wanted] == wanted
    noise = [background(np.random.default_rng(i).uniform(0, 255, (128, 128, 3))) for i in range(6)]
    assert noise != wanted  # control


def test_the_first_picture_is_a_fox_on_a_plain_background(pipe):
    picture = paint(pipe, FOX)
    assert picture.shape == (128, 128, 3)
    plain = np.array(COLOURS["teal"])
    assert np.abs(border(picture) - plain).mean() < 20
    thing = np.abs(picture - plain).max(-1) > 60
    assert 0.2 < thing.mean() < 0.8
    red, green, blue = np.median(picture[thing], 0)
    assert red > green > blue and red - blue > 60  # orange, as foxes are
    other = paint(pipe, FOX.replace("fox", "whale"))  # control
    red, _, blue = np.median(other[np.abs(other - plain).max(-1) > 60], 0)
    assert red - blue < 60


def test_guidance_and_the_prompt_matter(pipe):
    fox, again, owl, unguided = (
        paint(pipe, prompt, guidance=guidance)
        for prompt, guidance in ((FOX, 3.0), (FOX, 3.0), (FOX.replace("a fox", "an owl"), 3.0), (FOX, 1.0))
    )
    assert (fox == again).all()
    assert np.abs(fox - owl).mean() > 5 and np.abs(fox - unguided).mean() > 0.5


def test_diffusers_paints_the_same(pipe):
    diffusers = pytest.importorskip("diffusers")
    ours = paint(pipe, FOX, seed=5, steps=4)
    theirs = diffusers.SanaPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    noise = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(5))
    image = theirs(
        FOX, num_inference_steps=4, guidance_scale=3.0, height=128, width=128, latents=noise, output_type="np",
        complex_human_instruction=None, use_resolution_binning=False, max_sequence_length=64,
    ).images[0]  # fmt: skip
    assert np.abs(ours - 255 * image).max() < 2
    assert np.abs(paint(pipe, FOX, seed=6, steps=4) - 255 * image).max() > 2  # control
