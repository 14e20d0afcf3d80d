"""Pictures for the tests of the recipe, which then need no network and no packages."""

import json
from pathlib import Path

import numpy as np

from recipes import data

NAMES = ["fox", "owl", "glasses", "bus", "chess pawn", "red apple", "house", "tent", "pear", "ox", "ring", "key"]


def write_pictures(folder: Path) -> Path:
    """What recipes.data writes, of coloured ellipses with soft edges; returns the folder."""
    pairs = [(name, style) for name in NAMES for style in ("3d", "flat")]
    rows = [data.Row(name, name, ("tag", "thing"), f"{i:x}", "objects", style) for i, (name, style) in enumerate(pairs)]
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    random_numbers = np.random.default_rng(0)
    renders = np.zeros((len(rows), 256, 256, 4), np.uint8)
    for picture in renders:
        width, height = random_numbers.uniform(0.3, 0.9, 2)
        picture[..., :3] = random_numbers.integers(0, 256, 3)
        picture[..., 3] = np.clip(255 * 8 * (1 - np.hypot(x / width, y / height)), 0, 255)
    np.save(folder / "renders.npy", renders)
    (folder / "index.json").write_text(json.dumps([vars(row) for row in rows]))
    return folder
