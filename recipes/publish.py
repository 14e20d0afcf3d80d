"""Makes a trained model the `sana-tiny` of the package: weights in bf16, the model card, the licence, and a sheet to judge.

    python -m recipes.publish --data DATA --autoencoder AE --dit DIT --trained-on cpu --hardware "2 cores" --hours 2

writes sana_model/checkpoints/sana-tiny/ (a diffusers folder, which the wheel contains) and docs/sana-tiny.png: 32 prompts,
of which the lower half are pairs of concept and style that no training image showed.
"""

import argparse
import shutil
from pathlib import Path

import torch

import sana_model
from recipes import run
from recipes.captions import canonical
from recipes.images import Images
from recipes.train_autoencoder import encoder_hash, load_autoencoder
from recipes.training import sheet
from sana_model.errors import UserError
from sana_model.files import write_text
from sana_model.weights.models import CHECKPOINTS, load_model
from sana_model.weights.saving import save_diffusers

NAME = "sana-tiny"
ROOT = Path(__file__).resolve().parent.parent
# Concept, style, background; chosen before any model had painted one. The first is the prompt of the main README.
SEEN = (
    ("fox", "3d", "teal"), ("balloon", "3d", "cyan"), ("strawberry", "flat", "white"), ("rocket", "3d", "navy"),
    ("owl", "flat", "orange"), ("red apple", "3d", "lime"), ("sailboat", "flat", "blue"), ("mushroom", "3d", "beige"),
    ("guitar", "3d", "purple"), ("cactus", "3d", "yellow"), ("penguin", "3d", "pink"), ("pizza", "flat", "gray"),
    ("alarm clock", "3d", "green"), ("butterfly", "flat", "black"), ("bus", "flat", "white"), ("house", "3d", "red"),
)  # fmt: skip
HELD_OUT = (
    ("sunflower", "3d", "blue"), ("crab", "flat", "beige"), ("snowman", "3d", "purple"), ("frog", "flat", "pink"),
    ("guitar", "flat", "white"), ("snail", "3d", "cyan"), ("volcano", "flat", "navy"), ("wine glass", "3d", "black"),
    ("turtle", "flat", "yellow"), ("pig", "3d", "teal"), ("cactus", "flat", "orange"), ("bicycle", "3d", "gray"),
    ("skull", "flat", "brown"), ("bomb", "3d", "lime"), ("red apple", "flat", "white"), ("hatching chick", "3d", "green"),
)  # fmt: skip
PICTURE = 0  # of SEEN, in docs/first-picture.png


def prompts(images: Images) -> list[str]:
    """Those of SEEN, then those of HELD_OUT. UserError where the data set says otherwise of one of them."""
    for wanted, rows in ((SEEN, images.train), (HELD_OUT, images.held_out)):
        pairs = {(images.rows[i].name, images.rows[i].style) for i in rows}
        if wrong := [f"{concept}, {style}" for concept, style, _ in wanted if (concept, style) not in pairs]:
            raise UserError(f"the data set has no such pairs where they should be: {'; '.join(wrong)}")
    return [canonical(*factors) for factors in SEEN + HELD_OUT]


def row(name: str, folder: Path) -> str:
    """A line of the card's table: what a run did and where it ended."""
    state = torch.load(folder / "state.pt", weights_only=True)
    steps, batch, end = state["step"], state["fixed"]["batch"], state["history"][-1]
    psnr = f"{end['psnr']:.1f}" if "psnr" in end else "–"
    return f"| {name} | {steps:,} | {batch} | {steps * batch:,} | {end['loss']:.3f} | {psnr} |"


def card(args) -> str:
    """The README.md of the model: what it is, on what it was trained and for how long, what it reached."""
    fixed = torch.load(args.dit / "state.pt", weights_only=True)["fixed"]
    size, placed = fixed["size"], "in the middle, in one size" if fixed["centred"] else "of random size and place"
    refined = {"decoder alone, refined": args.decoder} if args.decoder else {}
    runs = {"autoencoder": args.autoencoder, **refined, "transformer, text encoder": args.dit}
    table = "\n".join(row(name, folder) for name, folder in runs.items())
    return f"""---
license: apache-2.0
pipeline_tag: text-to-image
library_name: diffusers
trained_on: {args.trained_on}
---

# sana-tiny

A whole SANA in 35 MB: a DC-AE (f32c32, 5.4 M parameters), a linear DiT (C = 256, 8 blocks, 9.0 M) and a Gemma-2 text
encoder (2.9 M), trained from nothing by `recipes/` of sana-kernels. It paints one thing on a plain background at {size} px:

    sana generate "a 3d render of a fox on a teal background" -o fox.png

Trained on {args.hardware}, {args.hours:g} hours in all, on pictures {placed}:

| part | steps | batch | images seen | last loss | PSNR in dB, held-out images |
| --- | --- | --- | --- | --- | --- |
{table}

**Data.** 1,153 concepts as 3d renders and as flat icons (Microsoft's Fluent Emoji, MIT) on 16 background colours; captions
from `emojibase-data` (MIT, Unicode CLDR). A tenth of the (concept, style) pairs was held out. See NOTICE.

**It understands** `a 3d render of a CONCEPT on a COLOUR background` and `a flat icon of …`, for English names of emoji.
**It does not** know anything else: no scenes, counts, people or places. It is here to show that kernels and quantisation
leave the pictures of a trained model as they are, and to paint something in the first minute.

In diffusers: `SanaPipeline.from_pretrained(folder)(prompt, height={size}, width={size}, guidance_scale=3.0,
complex_human_instruction=None, use_resolution_binning=False)`.

**Licence.** The weights are under Apache-2.0, as the rest of sana-kernels.
"""


@torch.no_grad()
def write(args, folder: Path) -> None:
    """The model of a run in bf16, with its card and the notice of the data."""
    loaded = load_model(args.dit / "model")
    if args.decoder:
        refined = load_autoencoder(args.decoder / "vae")
        if encoder_hash(refined) != encoder_hash(loaded.autoencoder):
            raise UserError(
                f"{args.decoder} refined the decoder of another autoencoder than {args.dit} was trained with"
            )
        loaded.autoencoder = refined
    for part in (loaded.dit, loaded.text_encoder, loaded.autoencoder):
        part.to(torch.bfloat16)
    folder.parent.mkdir(exist_ok=True)
    save_diffusers(folder, loaded)
    write_text(folder / "README.md", card(args))
    shutil.copyfile(ROOT / "recipes" / "NOTICE", folder / "NOTICE")
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that recipes.data wrote")
    parser.add_argument("--autoencoder", type=Path, required=True, help="run of recipes.train_autoencoder")
    parser.add_argument("--decoder", type=Path, help="run of recipes.train_autoencoder --refine")
    parser.add_argument("--dit", type=Path, required=True, help="run of recipes.train_dit")
    parser.add_argument("--trained-on", choices=("cpu", "gpu"), required=True)
    parser.add_argument("--hardware", required=True, help="in words, for the model card")
    parser.add_argument("--hours", type=float, required=True, help="of all trainings together")
    args = parser.parse_args(argv)
    write(args, CHECKPOINTS / NAME)
    texts = prompts(Images(args.data, 128))
    pictures = sana_model.load(NAME)(texts).images
    labels = [f"{style} {concept}, {colour}" for concept, style, colour in SEEN + HELD_OUT]
    sheet(ROOT / "docs" / f"{NAME}.png", pictures, columns=8, captions=labels)
    pictures[PICTURE].save(ROOT / "docs" / "first-picture.png")


if __name__ == "__main__":
    run(main)
