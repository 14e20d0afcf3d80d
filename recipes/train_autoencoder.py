"""Trains the autoencoder of `sana-tiny`: a DC-AE, 32 × 32 pixels to a latent of 32 numbers.

    python -m recipes.train_autoencoder --data DATA --out RUN [--size 128] [--preset larger] [--minutes 90]

The loss is L1 plus the perceptual distance of recipes.perceptual. RUN gets state.pt (give the same command again to
continue), loss.png, samples.png (held-out pictures: original, then reconstruction) and vae/, the average of the weights
as a part of a diffusers folder.

The last step makes latents easy to denoise. A channel that hardly varies would drown in the noise of a diffusion model,
so every channel is brought to the same spread. That costs nothing: it is folded into the two convolutions at the latent.

    python -m recipes.train_autoencoder --data DATA --refine RUN/vae --out RUN2

goes on with the decoder alone, for half the price, and teaches it to bear latents that are a little wrong, as those of a
diffusion model are. The encoder, and so every latent, stays as it is: this can run beside the training of the transformer.
"""

import copy
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from recipes import perceptual, run
from recipes.captions import COLOURS
from recipes.images import Images, Placement
from recipes.training import Training, arguments, chart, check, generator, psnr, sheet, to_pil
from sana_model.autoencoder.dc_ae import Autoencoder
from sana_model.config import BUILT_IN, AutoencoderConfig
from sana_model.files import atomic, write_text
from sana_model.weights.checkpoint import check as check_shapes
from sana_model.weights.checkpoint import fill, open_safetensors, same_names
from sana_model.weights.checkpoint_config import read_autoencoder, read_json, write_autoencoder

EMBEDDED = BUILT_IN["sana-tiny"].autoencoder
PRESETS = {"embedded": EMBEDDED, "larger": replace(EMBEDDED, widths=(32, 64, 128, 128, 256, 256))}  # 5.4 M, 20.4 M
SHOWN = 16  # held-out pictures on the sample sheet
EVALUATED = 64  # held-out pictures in the PSNR
MEASURED = 512  # pictures whose latents give the scaling factor
NOISE = 0.2  # most noise, in standard deviations of the latent, that a refined decoder learns to bear


class Reconstruction(nn.Module):
    """Images (B, 3, H, W) → the same, through the latent."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        latents = self.autoencoder.encode(images)
        return self.autoencoder.decode(latents if noise is None else latents + noise.to(latents))


def new_autoencoder(config: AutoencoderConfig, seed: int) -> Autoencoder:
    """Every block starts small beside its shortcut: the network begins as the parameter-free path that it corrects."""
    torch.manual_seed(seed)
    autoencoder = Autoencoder(config)
    for name, parameter in autoencoder.named_parameters():
        if name.endswith(("norm.weight", "norm_out.weight")) and "decoder.norm_out" not in name:
            nn.init.constant_(parameter, 0.1)
    return autoencoder.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Loss:
    """L1 + weight · perceptual distance; without features, L1 alone."""

    features: perceptual.Features | None
    weight: float

    def __call__(self, images: Tensor, originals: Tensor) -> Tensor:
        images = images.float()
        loss = (images - originals).abs().mean()
        return loss if self.features is None else loss + self.weight * self.features.distance(images, originals)


def train(training: Training, images: Images, loss: Loss, args) -> None:
    """Train until the end, the time or an interruption, with a save and a look at held-out pictures every now and then."""
    rows = torch.tensor(images.train)
    held_out, config = held_out_images(images), training.network.autoencoder.config
    for step in training.numbers(args.minutes):
        random = generator(args.seed, step)
        chosen = rows[torch.randint(len(rows), (args.batch,), generator=random)]
        placement = Placement.sample(args.batch, random, args.centred)
        originals = images.compose(chosen[training.share], placement[training.share])
        noise = latent_noise(args.batch, args.size, config, random)[training.share] if args.refine else None
        training.update(loss(training(originals, noise), originals))
        if (training.step % args.every == 0 or training.step == args.steps) and training.rank == 0:
            training.record(psnr=look(training, held_out, args.out))
            chart(args.out / "loss.png", training.history)
            training.save()
    if training.rank == 0:
        training.save()
        look(training, held_out, args.out)
        export(training, images, args)


def latent_noise(count: int, size: int, config: AutoencoderConfig, random: torch.Generator) -> Tensor:
    """(count, 32, size / 32, size / 32): of every strength up to NOISE. A finished autoencoder's latents have spread 1."""
    side = size // config.spatial_compression
    strength = NOISE * torch.rand(count, 1, 1, 1, generator=random)
    return strength * torch.randn(count, config.latent_channels, side, side, generator=random)


def held_out_images(images: Images) -> Tensor:
    """Pictures of pairs that training never sees, on every background in turn; the same ones in every run."""
    rows = images.held_out[:: max(1, len(images.held_out) // EVALUATED)][:EVALUATED]
    names = list(COLOURS)
    return images.compose(rows, Placement.centred([names[i % len(names)] for i in range(len(rows))]))


@torch.no_grad()
def look(training: Training, originals: Tensor, out: Path) -> float:
    """PSNR of the averaged network; writes the sample sheet."""
    results = [torch.func.functional_call(training.network, training.average, (part,)) for part in originals.split(8)]
    reconstructed = torch.cat(results).float()
    pairs = zip(originals[:SHOWN], reconstructed[:SHOWN], strict=True)
    sheet(out / "samples.png", [to_pil(image) for pair in pairs for image in pair], columns=8)
    return psnr(reconstructed, originals)


# ------------------------------------------------------------------------------------------------ the result


@torch.no_grad()
def export(training: Training, images: Images, args) -> None:
    """Write the averaged network to vae/, with latents of equal spread and their scaling factor."""
    network = copy.deepcopy(training.network)
    network.load_state_dict(training.average, strict=False)  # but for an encoder that stays as it is
    autoencoder = network.autoencoder
    if args.refine:
        return save_autoencoder(args.out / "vae", autoencoder, autoencoder.config)
    random = generator(args.seed, 0)
    rows = torch.tensor(images.train)[torch.randint(len(images.train), (MEASURED,), generator=random)]
    batches = [images.compose(part, Placement.sample(len(part), random, args.centred)) for part in rows.split(32)]
    equalise(autoencoder, torch.cat([autoencoder.encode(batch) for batch in batches]).std(dim=(0, 2, 3)))
    latents = torch.cat([autoencoder.encode(batch) for batch in batches])
    config = replace(autoencoder.config, scaling_factor=round(1 / latents.std().item(), 5))
    save_autoencoder(args.out / "vae", autoencoder, config)


def equalise(autoencoder: Autoencoder, spread: Tensor) -> None:
    """Divide latent channel c by spread[c] in the encoder, and multiply it back in the decoder: images stay the same.

    Both convolutions stand beside a shortcut without parameters, which goes on unscaled. What it lacks is itself a
    1 × 1 convolution, and so goes into the centre of the 3 × 3.
    """
    last, first = autoencoder.encoder.conv_out, autoencoder.decoder.conv_in
    channels, wide = last.out_channels, last.in_channels
    group = wide // channels
    repeat = torch.eye(channels, device=spread.device).repeat_interleave(group, dim=0)  # (wide, channels)
    gain = 1 / spread
    last.weight.mul_(gain[:, None, None, None])
    last.weight[:, :, 1, 1] += (gain - 1)[:, None] * repeat.T / group
    last.bias.mul_(gain)
    first.weight.mul_(spread[None, :, None, None])
    first.weight[:, :, 1, 1] += repeat * (spread - 1)


def save_autoencoder(folder: Path, autoencoder: Autoencoder, config: AutoencoderConfig) -> None:
    """Write the vae/ of a diffusers folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "diffusion_pytorch_model.safetensors") as temporary:
        save_file({name: t.contiguous() for name, t in autoencoder.state_dict().items()}, temporary, {"format": "pt"})
    write_text(folder / "config.json", json.dumps(write_autoencoder(config), indent=2) + "\n")


def load_autoencoder(folder: Path) -> Autoencoder:
    """The vae/ of a diffusers folder, in fp32."""
    file = folder / "config.json"
    with torch.device("meta"):
        autoencoder = Autoencoder(read_autoencoder(read_json(file), file))
    checkpoint = open_safetensors([folder / "diffusion_pytorch_model.safetensors"])
    rules = same_names(autoencoder)
    check_shapes(checkpoint, autoencoder, rules, "diffusers")
    filled = fill(autoencoder, checkpoint, rules, "diffusers", torch.float32)
    return filled.to(memory_format=torch.channels_last)


def encoder_hash(autoencoder: Autoencoder) -> str:
    """SHA-256 of the encoder's weights: latents fit a decoder, and a transformer, whose encoder has the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(autoencoder.encoder.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, steps=20000, batch=16, lr=2e-3, every=500)
    parser.add_argument("--perceptual", type=float, default=0.5, help="weight of that loss (default: %(default)s)")
    parser.add_argument("--refine", type=Path, metavar="VAE", help="train the decoder of this vae/ alone")
    args = parser.parse_args(argv)
    check(args)
    images = Images(args.data, args.size, args.device)
    fixed = {name: getattr(args, name) for name in ("preset", "size", "centred", "batch", "seed", "perceptual")}
    if args.refine:
        autoencoder = load_autoencoder(args.refine)
        autoencoder.requires_grad_(True).encoder.requires_grad_(False)
        fixed |= {"refine": encoder_hash(autoencoder)}
    else:
        autoencoder = new_autoencoder(PRESETS[args.preset], args.seed)
    network = Reconstruction(autoencoder).to(args.device)
    training = Training(network, args.out, args, fixed)
    training.resume()
    features = perceptual.load(args.device, training.dtype) if args.perceptual else None
    train(training, images, Loss(features, args.perceptual), args)


if __name__ == "__main__":
    run(main)
