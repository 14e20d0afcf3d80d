"""Trains the diffusion transformer of `sana-tiny`, and with it a small Gemma-2 text encoder and its tokenizer.

    python -m recipes.train_dit --data DATA --vae AE_RUN/vae --out RUN [--size 128] [--preset larger] [--minutes 90]

Flow matching as SANA does it (arXiv 2410.10629, section 3): x = (1 - σ)·x₀ + σ·ε, the network predicts ε - x₀, and σ is a
logistic-normal variable, shifted towards noise by the `flow_shift` that the sampler will use. A tenth of the captions is
dropped for classifier-free guidance: the network sees that of an empty prompt instead.

RUN gets latents-*.safetensors (every picture encoded on a number of random backgrounds, once), tokenizer/, state.pt (give
the same command again to continue), loss.png, samples.png and model/, the average of the weights as a whole diffusers
folder, which paints: sana generate "a 3d render of a fox on a teal background" --model RUN/model -o fox.png
"""

import copy
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import sana_model
from recipes import run
from recipes.captions import COLOURS, canonical, sample
from recipes.images import Images, Placement
from recipes.train_autoencoder import encoder_hash, load_autoencoder
from recipes.training import (
    Training,
    anywhere,
    arguments,
    chart,
    check,
    generator,
    processes,
    sheet,
    sum_over_processes,
)
from recipes.vocabulary import VOCABULARY, train_tokenizer
from sana_model.autoencoder.dc_ae import Autoencoder
from sana_model.config import BUILT_IN, AutoencoderConfig, ModelConfig
from sana_model.dit import DiT
from sana_model.files import atomic
from sana_model.text_encoder import TextEncoder
from sana_model.tokenizer import Tokenizer, load_tokenizer
from sana_model.weights.loaded import LoadedModel
from sana_model.weights.saving import save_diffusers

EMBEDDED = BUILT_IN["sana-tiny"].dit
PRESETS = {"embedded": EMBEDDED, "larger": replace(EMBEDDED, hidden=384, layers=12, cross_heads=6)}  # 9 M, 29 M
TEXT = replace(BUILT_IN["sana-tiny"].text, vocab=VOCABULARY)  # 3 M
DROPOUT = 0.1
BATCH = 64  # pictures that are encoded at once
GUIDANCE = 3.0


class TextToVelocity(nn.Module):
    """The two networks that are trained: token ids and noisy latents in, a velocity out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dit, self.text_encoder = DiT(config.dit), TextEncoder(config.text)

    def forward(self, latents: Tensor, timestep: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.dit(latents, timestep, self.text_encoder(ids, lengths), lengths)


def new_network(config: ModelConfig, seed: int) -> TextToVelocity:
    """Random weights as SANA starts from: each cross-attention and the head begin at zero, gates near it."""
    torch.manual_seed(seed)
    network = TextToVelocity(config)
    for name, p in network.dit.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        elif "cross_attention.out" in name or name.startswith("head") or name.endswith("bias"):
            nn.init.zeros_(p)
        elif name.startswith(("time_embed", "modulation", "caption_embed.linear")):
            nn.init.normal_(p, std=0.02)
        elif p.ndim == 2:
            nn.init.xavier_uniform_(p)
    nn.init.normal_(network.text_encoder.embed_tokens.weight, std=config.text.hidden**-0.5)  # Gemma scales it up again
    return network


# ------------------------------------------------------------------------------------------------ latents


@dataclass(frozen=True)
class Latents:
    """Every training picture on `variants` random backgrounds, encoded and scaled."""

    latents: Tensor  # (rows · variants, 32, h, w) fp16
    rows: Tensor  # (rows · variants,) int64, into Images.rows
    colours: Tensor  # (rows · variants,) int64, into COLOURS


@torch.no_grad()
def encode(images: Images, autoencoder: Autoencoder, args, file: Path) -> None:
    """Write the latents of a data set to `file`, unless they are there; the processes of a run share the work."""
    if file.exists():
        return
    rank, number = processes()
    rows = torch.tensor(images.train).repeat(args.variants)
    config = autoencoder.config
    side = args.size // config.spatial_compression
    latents, colours = torch.zeros(len(rows), config.latent_channels, side, side), torch.zeros(len(rows))
    for start in tqdm(range(rank * BATCH, len(rows), number * BATCH), desc="encode", unit="batch", disable=rank > 0):
        chosen = rows[start : start + BATCH]
        placement = Placement.sample(len(chosen), generator(args.seed, start), args.centred)
        encoded = autoencoder.encode(images.compose(chosen, placement)).float() * config.scaling_factor
        latents[start : start + BATCH] = encoded.cpu()
        colours[start : start + BATCH] = placement.colours
    sum_over_processes([latents, colours])
    if rank == 0:
        with atomic(file) as temporary:
            save_file({"latents": latents.half(), "rows": rows, "colours": colours.long()}, temporary)


class Batches:
    """Batch i, as a function of (seed, i): latents, and the captions that go with them."""

    def __init__(self, data: Latents, images: Images, tokenizer: Tokenizer, args):
        self.data, self.images, self.tokenizer, self.args = data, images, tokenizer, args

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, list[str], torch.Generator]:
        """Latents (B, 32, h, w) fp32 and noise like them, captions, and the generator for what is still to be drawn."""
        numbers, words = generator(self.args.seed, step), random.Random(f"{self.args.seed}/{step}")
        chosen = torch.randint(len(self.data.rows), (self.args.batch,), generator=numbers)
        latents = self.data.latents[chosen].float()
        pairs = zip(self.data.rows[chosen].tolist(), self.data.colours[chosen].tolist(), strict=True)
        factors = [self.images.factors(row, colour) for row, colour in pairs]
        if not self.args.tags:
            factors = [replace(entry, tags=()) for entry in factors]
        captions = ["" if words.random() < DROPOUT else sample(words, entry) for entry in factors]
        return latents, torch.randn(latents.shape, generator=numbers), captions, numbers


def tokenize(tokenizer: Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Ids (B, L), padded on the right to the longest, and lengths (B,)."""
    rows = [torch.tensor(tokenizer.encode(caption)) for caption in captions]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)
    return ids, torch.tensor([len(row) for row in rows])


def noise_levels(count: int, shift: float, random: torch.Generator) -> Tensor:
    """σ = shift·u / (1 + (shift - 1)·u) with u = sigmoid(normal): mostly the middle (arXiv 2403.03206, section 3.1)."""
    u = torch.randn(count, generator=random).sigmoid()
    return shift * u / (1 + (shift - 1) * u)


def flow_loss(
    training: Training, latents: Tensor, noise: Tensor, sigma: Tensor, ids: Tensor, lengths: Tensor
) -> Tensor:
    """Mean squared error of the velocity. The network is told ⌊1000·σ⌋, as the sampler will tell it."""
    level = sigma.view(-1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    with sdpa_kernel(SDPBackend.MATH):  # faster than the fused one for so few tokens
        velocity = training(noisy, (1000 * sigma).floor(), ids, lengths)
    return F.mse_loss(velocity.float(), noise - latents)


def train(training: Training, batches: Batches, config: ModelConfig, finish, args) -> None:
    """Train until the end, the time or an interruption; `finish` writes the model and paints."""
    shift = config.scheduler.flow_shift
    for step in training.numbers(args.minutes):
        latents, noise, captions, numbers = batches[step]
        sigma = noise_levels(len(latents), shift, numbers)
        ids, lengths = tokenize(batches.tokenizer, captions)
        inputs = (t[training.share].to(args.device) for t in (latents, noise, sigma, ids, lengths))
        training.update(flow_loss(training, *inputs))
        if (training.step % args.every == 0 or training.step == args.steps) and training.rank == 0:
            training.record()
            chart(args.out / "loss.png", training.history)
            training.save()
            finish()
    if training.rank == 0:
        training.save()
        finish()


# ------------------------------------------------------------------------------------------------ the result


def save_model(training: Training, config: ModelConfig, autoencoder: Autoencoder, tokenizer: Path, out: Path) -> None:
    """Write the averaged networks and the autoencoder as a diffusers folder."""
    network = copy.deepcopy(training.network)
    network.load_state_dict(training.average)
    parts = {"dit": network.dit, "text_encoder": network.text_encoder, "autoencoder": autoencoder}
    parts |= {"tokenizer": load_tokenizer(tokenizer), "tokenizer_folder": tokenizer}
    save_diffusers(out, LoadedModel(config=config, source=str(out), random=False, **parts))


def prompts(images: Images, count: int = 8) -> list[str]:
    """Half of pairs that were trained, half of pairs that were held out; the same ones in every run."""
    colours = [name for name in COLOURS if name != "white"]
    parts = (images.train, images.held_out)
    rows = [part[i * len(part) // (count // 2)] for part in parts for i in range(count // 2)]
    entries = [images.rows[row] for row in rows]
    return [canonical(e.name, e.style, colours[i % len(colours)]) for i, e in enumerate(entries)]


def paint(model: Path, texts: list[str], device: str, file: Path) -> None:
    """The sample sheet, by the pipeline that people use."""
    pipe = sana_model.load(str(model), precision="fp32", device=device)
    sheet(file, pipe(texts).images, columns=4, captions=texts)


def model_config(preset: str, size: int, autoencoder: AutoencoderConfig, flow_shift: float) -> ModelConfig:
    base = BUILT_IN["sana-tiny"]
    dit = replace(PRESETS[preset], sample_size=size // autoencoder.spatial_compression, caption_channels=TEXT.hidden)
    scheduler = replace(base.scheduler, flow_shift=flow_shift)
    pag_layers = (dit.layers // 2,)
    return replace(
        base, dit=dit, text=TEXT, autoencoder=autoencoder, scheduler=scheduler, pag_layers=pag_layers, guidance=GUIDANCE
    )


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, steps=40000, batch=128, lr=2e-3, every=2000)
    parser.add_argument("--vae", type=Path, required=True, help="vae/ that recipes.train_autoencoder wrote")
    parser.add_argument("--variants", type=int, default=32, help="encodings of each picture (default: %(default)s)")
    parser.add_argument("--flow-shift", type=float, default=3.0, help="default: %(default)s")
    parser.add_argument("--no-tags", dest="tags", action="store_false", help="captions without tags, for a short run")
    args = parser.parse_args(argv)
    check(args)
    images = Images(args.data, args.size, args.device)
    autoencoder = load_autoencoder(args.vae).to(args.device)
    config = model_config(args.preset, args.size, autoencoder.config, args.flow_shift)
    weights = encoder_hash(autoencoder)
    placed = "-centred" if args.centred else ""
    file = args.out / f"latents-{weights[:8]}-{args.size}-{args.variants}{placed}.safetensors"
    tokenizer = args.out / "tokenizer"
    encode(images, autoencoder, args, file)
    if processes()[0] == 0:
        train_tokenizer(images.rows, tokenizer)
    anywhere(False)  # the other processes wait here for the files
    data = Latents(**load_file(file))
    fixed = {
        name: getattr(args, name)
        for name in ("preset", "size", "centred", "batch", "seed", "variants", "flow_shift", "tags")
    }
    training = Training(new_network(config, args.seed).to(args.device), args.out, args, fixed | {"vae": weights})
    training.resume()

    def finish() -> None:
        save_model(training, config, autoencoder, tokenizer, args.out / "model")
        paint(args.out / "model", prompts(images), args.device, args.out / "samples.png")

    train(training, Batches(data, images, load_tokenizer(tokenizer), args), config, finish, args)


if __name__ == "__main__":
    run(main)
