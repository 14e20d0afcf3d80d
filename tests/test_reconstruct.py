"""`sana reconstruct`, and the decoder in W8A8 on what the embedded model paints."""

import numpy as np
import pytest
import torch
from compare import psnr
from PIL import Image
from variants import isa_cap, isas

import sana_model
from sana_model.cli import main
from sana_model.commands.reconstruct import read, reconstruct, reflect

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def painted():
    """A picture of sana-tiny, and its latents."""
    pipe = sana_model.load("sana-tiny", precision="fp32", backend="reference")
    return pipe("a red apple on a white background", steps=8, num_images=2, seed=3)


def test_a_picture_comes_back(painted, tmp_path, capsys):
    """At its own size, though no multiple of 32; the PSNR printed is that of the file."""
    picture = painted.images[0].crop((5, 0, 128, 90))
    picture.save(tmp_path / "in.png")
    assert main(["reconstruct", str(tmp_path / "in.png"), str(tmp_path / "out.png")]) == 0
    result = Image.open(tmp_path / "out.png")
    assert result.size == (123, 90)
    expected = psnr(*(torch.from_numpy(np.array(image.convert("RGB"))) for image in (result, picture)))
    assert expected > 22  # a picture that the autoencoder has never seen, cut through
    assert f"PSNR {expected:.2f} dB" in capsys.readouterr().out


def test_padding_is_cropped_away(painted):
    """What lies beyond the edge is a reflection: the picture is not that of the same one padded with black."""
    autoencoder = sana_model.load("sana-tiny", precision="fp32", backend="reference").autoencoder
    picture = torch.from_numpy(np.array(painted.images[0])).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        whole = reconstruct(autoencoder, picture)
        cut = reconstruct(autoencoder, picture[..., :100, :])
        black = torch.nn.functional.pad(picture[..., :100, :], (0, 0, 0, 28), value=-1.0)
        wrong = reconstruct(autoencoder, black)[..., :100, :]
    assert whole.shape == picture.shape and cut.shape == (1, 3, 100, 128)
    original = ((picture[..., :100, :] / 2 + 0.5) * 255).round()
    assert psnr(cut[..., -8:, :], original[..., -8:, :]) > psnr(wrong[..., -8:, :], original[..., -8:, :])


def test_reflection():
    """Mirrored about the last row, which is not repeated; to and fro where the image is smaller than the padding."""
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    assert reflect(x, 5, dim=2).flatten().tolist() == [1, 2, 3, 2, 1, 2, 3, 2]
    assert reflect(x.view(1, 1, 1, 3), 1, dim=3).flatten().tolist() == [1, 2, 3, 2]
    assert reflect(x[:, :, :1], 2, dim=2).flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["gone.png", "out.png"], "gone.png: there is no such file"),
        (["text.png", "out.png"], "text.png cannot be read as a picture"),
        (["in.png", "out.jpg"], "must end in .png"),
        (["in.png", "out.png", "--precision", "w4a8"], "'w4a8' is not known for an autoencoder"),
        (["in.png", "out.png", "--model", "nothing"], "is no file"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("a picture")
    Image.new("RGB", (32, 32), (200, 30, 30)).save("in.png")
    assert main(["reconstruct", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_the_decoder_in_w8a8_keeps_35_db(painted):
    """8-bit pixels against fp32, with bf16, the floor, between the two; the plan says what is in 8 bits."""
    pictures = {}
    for precision in ("fp32", "bf16", "w8a8"):
        backend = "reference" if precision == "fp32" else "cpu"
        pipe = sana_model.load("sana-tiny", decoder_precision=precision, backend=backend)
        settings = pipe.settings("a red apple")
        images = torch.cat([pipe.decode(latent, settings) for latent in painted.latents.split(1)])
        pictures[precision] = ((images / 2 + 0.5).clamp(0, 1) * 255).round()
    assert "autoencoder   conv2d            cpu        w8a8" in str(pipe.plan)
    floor, eight = (psnr(pictures[precision], pictures["fp32"]) for precision in ("bf16", "w8a8"))
    assert 35 <= eight < floor and floor > 52


def test_a_picture_comes_back_in_w8a8_on_any_processor(painted, tmp_path):
    """The encoder's products stay in bf16, which PyTorch computes where the kernels have no vector instructions."""
    painted.images[0].save(tmp_path / "in.png")
    results = {}
    for isa in isas():
        with isa_cap(isa):
            out = str(tmp_path / f"{isa}.png")
            assert main(["reconstruct", str(tmp_path / "in.png"), out, "--precision", "w8a8"]) == 0
        results[isa] = torch.from_numpy(np.array(Image.open(out)))
    for result in results.values():
        assert psnr(result, results["portable"]) > 35


def test_read_gives_what_the_pipeline_paints(painted, tmp_path):
    painted.images[0].save(tmp_path / "x.png")
    pixels = torch.from_numpy(np.array(painted.images[0])).permute(2, 0, 1)[None]
    assert torch.equal(((read(tmp_path / "x.png") / 2 + 0.5) * 255).round(), pixels.float())
