"""`sana reconstruct`: a picture through the encoder and the decoder, and how far what comes back is from it."""

import argparse
import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sana_model import memory
from sana_model.autoencoder.dc_ae import Autoencoder
from sana_model.autoencoder.family import find_autoencoder
from sana_model.errors import UserError
from sana_model.files import atomic, check_writable
from sana_model.plan import resolve
from sana_model.settings import OF_DECODERS, PRECISIONS
from sana_model.weights.models import load_model


def run(args: argparse.Namespace) -> int:
    """Carry out the parsed command line; raises UserError and MissingError."""
    if args.precision not in OF_DECODERS:
        raise UserError(
            f"precision {args.precision!r} is not known for an autoencoder; choose one of {', '.join(OF_DECODERS)}"
        )
    if args.output.suffix.lower() != ".png":
        raise UserError(f"pictures are written as PNG, so the name must end in .png; {args.output} does not")
    check_writable(args.output)
    picture = read(args.picture)
    if args.output.exists() and args.output.samefile(args.picture):
        raise UserError(f"{args.output} is the picture itself, which would be lost; name another file")

    source = find_autoencoder(args.model)
    device = torch.device("cuda" if args.backend in ("cuda", "triton") else "cpu")
    plan = resolve(
        source.config, args.backend, device, dict.fromkeys(("dit", "text_encoder", "autoencoder"), args.precision)
    )
    memory.check_part(source.config, "autoencoder", plan.executed["autoencoder"], device)
    loaded = load_model(source, decoder_precision=PRECISIONS[args.precision], parts=("autoencoder",))
    autoencoder = loaded.autoencoder
    plan.prepare("autoencoder", autoencoder)
    autoencoder.to(device).use(plan.ops("autoencoder"))
    with torch.inference_mode():
        result = reconstruct(autoencoder, picture.to(device)).cpu()
    with atomic(args.output) as temporary:
        Image.fromarray(result[0].permute(1, 2, 0).numpy()).save(temporary, format="PNG")
    label = " (random weights: it means nothing)" if loaded.random else ""
    print(f"{args.output}   PSNR {psnr(result, _bytes(picture)):.2f} dB{label}")
    return 0


def read(path) -> Tensor:
    """A picture file → (1, 3, H, W) in [-1, 1], fp32."""
    try:
        with Image.open(path) as image:
            pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            width, height = image.size
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from error
    return pixels.view(1, height, width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruct(autoencoder: Autoencoder, picture: Tensor) -> Tensor:
    """Encode and decode a picture (1, 3, H, W) in [-1, 1] → uint8 of the same size.

    Sizes that are no multiples of the latent's pixels are padded by reflection, right and below, and cropped again.
    """
    factor = autoencoder.config.spatial_compression
    _, _, height, width = picture.shape
    padded = reflect(reflect(picture, -height % factor, dim=2), -width % factor, dim=3)
    return _bytes(autoencoder.decode(autoencoder.encode(padded)))[..., :height, :width].contiguous()


def reflect(x: Tensor, count: int, dim: int) -> Tensor:
    """`count` more rows or columns of (1, 3, H, W), mirrored about the last; to and fro where there are too few."""
    while count:
        size = x.shape[dim]
        step = min(count, size - 1)
        if step == 0:  # a single row is its own reflection
            return torch.cat([x, *[x] * count], dim)
        padding = (0, step, 0, 0) if dim == 3 else (0, 0, 0, step)
        x, count = F.pad(x, padding, mode="reflect"), count - step
    return x


def psnr(actual: Tensor, expected: Tensor) -> float:
    """Of 8-bit pixels, in dB; inf for equal ones."""
    error = (actual.double() - expected.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def _bytes(image: Tensor) -> Tensor:
    return ((image.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
