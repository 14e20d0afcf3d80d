"""What the autoencoder costs: how often the scorer names real pictures, and the same pictures after encoding and decoding.

    python -m recipes.ceiling --data DATA [--model sana-tiny]

No DiT can do better than the second line, on the first 192 prompts of `sana bench quality`.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from recipes import run
from recipes.images import Images, Placement
from sana_bench import efficientnet
from sana_bench.metrics import to_bytes
from sana_bench.scorer import Asked, Scorer, prompts_of_concepts
from sana_model.weights.models import load_model

PICTURES, BATCH = 192, 32


def accuracy(scorer: Scorer, asked: list[Asked], pixels: Tensor) -> dict[str, float]:
    """Shares in %: of seen pairs whose concept is named, of held-out pairs named whole, of styles named."""
    features = efficientnet.load()
    pictures = to_bytes(pixels)
    verdicts = scorer.judge(asked, pictures, torch.cat([features(part)[1] for part in pictures.split(BATCH)]))
    seen = [v.concept for a, v in zip(asked, verdicts, strict=True) if not a.held_out]
    held_out = [v.concept and v.style for a, v in zip(asked, verdicts, strict=True) if a.held_out]
    shares = {"concept": seen, "held-out pair": held_out, "style": [v.style for v in verdicts]}
    return {name: 100 * sum(right) / len(right) for name, right in shares.items()}


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that recipes.data wrote")
    parser.add_argument("--model", default="sana-tiny", help="a built-in name or a folder")
    args = parser.parse_args(argv)
    loaded = load_model(args.model)
    images = Images(args.data, loaded.config.size)
    asked = prompts_of_concepts()[:PICTURES]
    where = {(row.name, row.style): i for i, row in enumerate(images.rows)}
    real = images.compose([where[a.concept, a.style] for a in asked], Placement.centred([a.colour for a in asked]))
    autoencoder = loaded.autoencoder.float()
    again = torch.cat([autoencoder.decode(autoencoder.encode(part)) for part in real.split(BATCH)])
    scorer = Scorer()
    for name, pixels in (("real", real), ("reconstructed", again)):
        shares = accuracy(scorer, asked, pixels)
        print(f"{name:14}" + "   ".join(f"{key} {share:.1f} %" for key, share in shares.items()), flush=True)


if __name__ == "__main__":
    run(main)
