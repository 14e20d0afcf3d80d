"""Fits the scorer of `sana bench quality` on the real renders, and writes the list of prompts that it is asked about.

    python -m recipes.fit_scorer --data DATA --cache FOLDER

Every (concept, style) pair of the data set, also those held out of the training of `sana-tiny`, is composited many times
at 128 and 256 px; two linear classifiers learn concept and style from the pooled features of EfficientNet-Lite1. They are
then tried on clean composites with backgrounds, scales, positions and crops that were not among those: that accuracy is the
ceiling of every accuracy measured with them. It goes into the file beside the weights.

Features are cached (60 MB); making them takes most of the time, about 15 minutes on a CPU core.
"""

import argparse
import itertools
import json
import random
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from recipes import run
from recipes.captions import COLOURS, canonical
from recipes.images import Images, Placement
from sana_bench import efficientnet, metrics, scorer
from sana_model.files import atomic, write_text

SIZES = (128, 256)
VARIANTS = 2  # composites of every picture at either size, to fit on in each kind of wear
FIT_SCALES = ((0.66, 0.74), (0.80, 0.86), (0.92, 1.04))
TRIAL_SCALES = ((0.74, 0.80), (0.86, 0.92))  # side of the picture over side of the image; disjoint from those above
CROP = 0.05  # how far the picture may leave the image, in its sides
APART = 24  # of 255: a background to fit on differs from each of COLOURS by at least so much in a channel
PROMPTS = 512
SAMPLE = 64  # composites whose features go along with the classifiers, so that these can be tried anywhere


# ------------------------------------------------------------------------------------------------ composites


def placement(count: int, bands: tuple[tuple[float, float], ...], generator: torch.Generator) -> Placement:
    """Scales uniform within a random band; positions uniform, up to CROP beyond the edge."""
    low, high = torch.tensor(bands)[torch.randint(len(bands), (count,), generator=generator)].unbind(1)
    scales = low + (high - low) * torch.rand(count, generator=generator)
    reach = ((1 - scales).clamp_min(0) / 2 + CROP)[:, None]
    shifts = reach * (2 * torch.rand(count, 2, generator=generator) - 1)
    return Placement(torch.randint(len(COLOURS), (count,), generator=generator), scales, shifts)


def unlike_the_palette(count: int, generator: torch.Generator) -> Tensor:
    """Random colours (count, 3) in [-1, 1] that none of COLOURS is near."""
    palette = torch.tensor(list(COLOURS.values()))
    drawn = torch.randint(256, (8 * count, 3), generator=generator)
    far = (drawn[:, None] - palette).abs().amax(-1).amin(-1) >= APART
    return drawn[far][:count] / 127.5 - 1


def backgrounds(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 3, size, size) in [-1, 1]: half of them plain, half gradients from one colour to another."""
    first, second = (unlike_the_palette(count, generator)[:, :, None, None] for _ in range(2))
    ramp = torch.linspace(0, 1, size)
    angle = 6.2832 * torch.rand(count, 1, 1, generator=generator)
    slope = (angle.cos() * (ramp - 0.5) + angle.sin() * (ramp[:, None] - 0.5) + 0.5).clamp(0, 1)[:, None]
    plain = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(plain, first, first + slope * (second - first))


def on_backgrounds(images: Images, rows: Tensor, place: Placement, behind: Tensor) -> Tensor:
    """Composites like `Images.compose`, on any backgrounds.

    That function knows the colours of the captions only; the same picture on two of them shows how much of what is
    behind comes through.
    """
    names = list(COLOURS)
    white, black = (
        images.compose(rows, replace(place, colours=torch.full((len(rows),), names.index(name))))
        for name in ("white", "black")
    )
    light, dark = (COLOURS[name][0] / 127.5 - 1 for name in ("white", "black"))
    through = (white - black) / (light - dark)
    return black + through * (behind - dark)


def softened(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures lose some detail, down to a third of the resolution."""

    def one(picture: Tensor) -> Tensor:
        keep = 0.35 + 1.3 * torch.rand((), generator=generator).item()
        return resampled(picture, keep) if keep < 1 else picture

    return torch.cat([one(picture) for picture in pictures.split(1)])


def worn(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures lose detail, down to a fifth of the resolution; half get noise, fine and coarse.

    Small autoencoders and young models leave such flaws, and are not to be judged by them where a person would still name
    what is painted.
    """

    def chance() -> float:
        return torch.rand((), generator=generator).item()

    def one(picture: Tensor) -> Tensor:
        side = picture.shape[-1]
        if chance() < 0.5:
            picture = resampled(picture, 0.2 ** chance())
        if chance() < 0.5:
            for grain in (1, 4, 16):
                noise = torch.randn(1, 3, side // grain, side // grain, generator=generator)
                picture = picture + 0.1 * chance() * F.interpolate(noise, side, mode="bilinear", align_corners=False)
        return picture

    return torch.cat([one(picture) for picture in pictures.split(1)])


def resampled(picture: Tensor, scale: float) -> Tensor:
    """(1, 3, S, S) at a lower resolution, and back."""
    side = picture.shape[-1]
    small = F.interpolate(picture, round(scale * side), mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(small, side, mode="bicubic", align_corners=False)


WEAR = {"softened": softened, "worn": worn}


def views(images: Images, rows: Tensor, wear: str | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Composites (B, 3, size, size) uint8 to fit on, worn in one way, or (None) to be tried on; (B,) colours of trials."""
    if wear is None:
        place = placement(len(rows), TRIAL_SCALES, generator)
        pictures = images.compose(rows, place)
    else:
        place = placement(len(rows), FIT_SCALES, generator)
        pictures = on_backgrounds(images, rows, place, backgrounds(len(rows), images.size, generator))
        pictures = WEAR[wear](pictures, generator)
    return metrics.to_bytes(pictures), place.colours


# ------------------------------------------------------------------------------------------------ features


def features(
    images: Images, wear: str | None, variant: int, network: efficientnet.Judge, cache: Path
) -> dict[str, Tensor]:
    """Of one composite of every picture: features (N, 1280) fp16; colours (N,) asked for and seen. Read or made.

    A variant is the same composite in every kind of wear.
    """
    size = images.size
    file = cache / f"{wear or 'trial'}-{size}-{variant}.safetensors"
    if not file.exists():
        parts = []
        for step, rows in enumerate(tqdm(torch.arange(len(images.rows)).split(32), desc=file.stem, unit="batch")):
            text = f"{'fit' if wear else 'trial'}-{size}-{variant}/{step}"
            pictures, colours = views(images, rows, wear, torch.Generator().manual_seed(zlib.crc32(text.encode())))
            seen = metrics.background(pictures, torch.tensor(list(COLOURS.values())))
            parts.append((network(pictures)[1].half(), colours, seen))
        found = dict(zip(("features", "colours", "seen"), map(torch.cat, zip(*parts, strict=True)), strict=True))
        with atomic(file) as temporary:
            save_file(found, temporary)
    return load_file(file)


# ------------------------------------------------------------------------------------------------ fitting


def fit_linear(x: Tensor, labels: Tensor, classes: int, steps: int = 500, batch: int = 1024) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: weight (classes, D), bias (classes,) for the features as they are.

    AdamW on standardised features, with a cosine decay of the learning rate.
    """
    mean, std = x.mean(0), x.std(0).clamp_min(1e-3)
    x = (x - mean) / std
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=2e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), desc=f"fit {classes} classes", unit="step"):
        chosen = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(x[chosen] @ weight.T + bias, labels[chosen], label_smoothing=0.05).backward()
        optimizer.step()
        decay.step()
    weight = weight.detach() / std
    return weight, bias.detach() - weight @ mean


def ceilings(trials: dict[int, dict], images: Images, judge: scorer.Scorer) -> dict[int, dict[str, float]]:
    """{pixels: accuracy by factor} on composites that nothing was fitted on; `pair` is concept and style at once."""
    concepts, styles = labels(images)
    found = {}
    for size, trial in trials.items():
        concept = judge.concept(trial["features"]) == concepts
        style = judge.style(trial["features"]) == styles
        right = {
            "concept": concept,
            "style": style,
            "pair": concept & style,
            "background": trial["seen"] == trial["colours"],
        }
        found[size] = {factor: round(ok.float().mean().item(), 4) for factor, ok in right.items()}
    return found


def labels(images: Images) -> tuple[Tensor, Tensor]:
    """Indices of concept and style of every row, (N,) each."""
    names, styles = names_of(images)
    index = {name: i for i, name in enumerate(names)}
    return (
        torch.tensor([index[row.name] for row in images.rows]),
        torch.tensor([styles.index(row.style) for row in images.rows]),
    )


def names_of(images: Images) -> tuple[list[str], list[str]]:
    """Concepts and styles, each in the order in which the data set has them first."""
    return list(dict.fromkeys(row.name for row in images.rows)), list(dict.fromkeys(row.style for row in images.rows))


def save(file: Path, tensors: dict[str, Tensor], images: Images, found: dict[int, dict[str, float]]) -> None:
    """Write the classifiers in the form that `sana_bench.scorer` reads."""
    concepts, styles = names_of(images)
    metadata = {"concepts": concepts, "styles": styles, "colours": COLOURS, "ceilings": found}
    with atomic(file) as temporary:
        save_file(
            {name: t.half() if t.is_floating_point() and t.ndim == 2 else t for name, t in tensors.items()}, temporary,
            {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()},
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ prompts


def prompts(images: Images, count: int) -> list[scorer.Asked]:
    """Captions in canonical form, of seen and held-out pairs in turn; no concept twice among the seen ones.

    Every colour comes equally often in each half. There are fewer held-out pairs than half of the list; the first of
    them come again with other colours.
    """
    rng, asked = random.Random(0), []
    for indices, held_out in ((images.train, False), (images.held_out, True)):
        rows = list({images.rows[i].name: images.rows[i] for i in rng.sample(indices, len(indices))}.values())
        colours = itertools.cycle(rng.sample(list(COLOURS), len(COLOURS)))
        asked.append([
            scorer.Asked(canonical(row.name, row.style, colour), row.name, row.style, colour, held_out)
            for row, colour in itertools.islice(zip(itertools.cycle(rows), colours, strict=False), count // 2)
        ])  # fmt: skip
    return [entry for pair in zip(*asked, strict=True) for entry in pair]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that recipes.data wrote")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the features; those it holds are used")
    parser.add_argument("--out", type=Path, default=scorer.HERE, help="folder of the two files (default: %(default)s)")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    network = efficientnet.load()
    fit, trials = [], {}
    for size in SIZES:
        images = Images(args.data, size)
        kinds = itertools.product(WEAR, range(VARIANTS))
        fit += [features(images, wear, variant, network, args.cache)["features"] for wear, variant in kinds]
        trials[size] = features(images, None, 0, network, args.cache)
    x, tensors = torch.cat(fit).float(), {}
    for factor, target in zip(("concept", "style"), labels(images), strict=True):
        weight, bias = fit_linear(x, target.repeat(len(fit)), int(target.max()) + 1)
        tensors |= {f"{factor}.weight": weight, f"{factor}.bias": bias}
    sample = torch.randperm(len(images.rows), generator=torch.Generator().manual_seed(0))[:SAMPLE]
    tensors |= {"sample.features": trials[max(SIZES)]["features"][sample]}
    tensors |= {
        f"sample.{factor}": target[sample] for factor, target in zip(("concept", "style"), labels(images), strict=True)
    }
    file = args.out / scorer.WEIGHTS.name
    save(file, tensors, images, {})
    found = ceilings(trials, images, scorer.Scorer(file))  # as it will be read, in 16 bits
    save(file, tensors, images, found)
    lines = ",\n".join(json.dumps(asdict(asked), ensure_ascii=False) for asked in prompts(images, PROMPTS))
    write_text(args.out / scorer.PROMPTS.name, f"[\n{lines}\n]\n")
    for size, accuracy in found.items():
        print(f"ceiling at {size} px:", ", ".join(f"{factor} {value:.1%}" for factor, value in accuracy.items()))


if __name__ == "__main__":
    run(main)
