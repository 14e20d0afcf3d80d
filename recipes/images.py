"""The data set in use: pictures on coloured backgrounds, made anew for every batch, and what each of them shows.

Rendering and compositing are in premultiplied alpha, where scaling and moving a picture do not bleed the colour of its
transparent pixels into its edges. Everything random comes from the generator that is passed in, so that a batch can be
made a function of its number and training resumes exactly.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.captions import COLOURS, Factors
from recipes.data import Row, heldout_style
from sana_model.errors import UserError

SCALES = (0.8, 0.95)  # side of the picture over side of the image; the rest is room to move in
CENTRED = 0.88

_PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 127.5 - 1


@dataclass(frozen=True)
class Placement:
    """How a batch of B pictures is put on backgrounds."""

    colours: Tensor  # (B,) int64, into COLOURS
    scales: Tensor  # (B,)
    shifts: Tensor  # (B, 2), right and down, in units of the image

    def __getitem__(self, part: slice) -> "Placement":
        return Placement(self.colours[part], self.scales[part], self.shifts[part])

    @classmethod
    def sample(cls, count: int, generator: torch.Generator, centred: bool = False) -> "Placement":
        """Random colours and, unless `centred`, random sizes and places."""
        low, high = (CENTRED, CENTRED) if centred else SCALES
        scales = low + (high - low) * torch.rand(count, generator=generator)
        room = 0.0 if centred else (1 - scales)[:, None] / 2
        shifts = room * (2 * torch.rand(count, 2, generator=generator) - 1)
        return cls(torch.randint(len(COLOURS), (count,), generator=generator), scales, shifts)

    @classmethod
    def centred(cls, colours: Sequence[str]) -> "Placement":
        index = torch.tensor([list(COLOURS).index(colour) for colour in colours])
        return cls(index, torch.full((len(index),), CENTRED), torch.zeros(len(index), 2))


class Images:
    """All pictures at `size` × `size`, in memory on `device`: 64 kB each at 128 px."""

    def __init__(self, folder: str | Path, size: int, device: str | torch.device = "cpu"):
        folder = Path(folder)
        try:
            rows = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            renders = np.load(folder / "renders.npy", mmap_mode="r")
        except OSError as error:
            raise UserError(
                f"{folder} is no data set ({error}); build it: python -m recipes.data --out {folder}"
            ) from error
        if renders.shape[1] % size:
            raise UserError(f"{size} px is not supported; supported are {renders.shape[1]} and its halves")
        self.rows = [Row(**row | {"tags": tuple(row["tags"])}) for row in rows]
        self.size = size
        self.pixels = torch.cat([_premultiplied(renders[i : i + 64], size) for i in range(0, len(rows), 64)]).to(device)
        held_out = [heldout_style(row.name) == row.style for row in self.rows]
        self.train = [i for i, held in enumerate(held_out) if not held]
        self.held_out = [i for i, held in enumerate(held_out) if held]

    def factors(self, row: int, colour: int) -> Factors:
        """What the picture of a row on a colour (an index into COLOURS) shows."""
        entry = self.rows[row]
        return Factors(entry.name, entry.style, list(COLOURS)[colour], entry.tags)

    def compose(self, rows: Sequence[int] | Tensor, placement: Placement) -> Tensor:
        """Images (B, 3, size, size) fp32 in [-1, 1] of the given rows."""
        device = self.pixels.device
        pictures = self.pixels[torch.as_tensor(rows, device=device)].float() / 255  # (B, 4, size, size)
        # A point of the image is at (point - shift) / scale in the picture, whose coordinates run from -1 to 1.
        scales, shifts = placement.scales.to(device), 2 * placement.shifts.to(device)
        affine = torch.zeros(len(scales), 2, 3, device=device)
        affine[:, 0, 0] = affine[:, 1, 1] = 1 / scales
        affine[:, :, 2] = -shifts / scales[:, None]
        grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
        placed = F.grid_sample(pictures, grid, align_corners=False)  # outside of the picture: transparent
        background = _PALETTE.to(device)[placement.colours.to(device)][:, :, None, None]
        colour, alpha = placed[:, :3], placed[:, 3:]
        return 2 * colour - alpha + background * (1 - alpha)  # [0, 1] → [-1, 1] is 2c - 1, also under premultiplication


def _premultiplied(renders: np.ndarray, size: int) -> Tensor:
    """RGBA (N, S, S, 4) uint8 → premultiplied (N, 4, size, size) uint8, S a multiple of size."""
    pictures = torch.from_numpy(np.array(renders)).permute(0, 3, 1, 2).float()
    pictures[:, :3] *= pictures[:, 3:] / 255
    return F.avg_pool2d(pictures, pictures.shape[-1] // size).round().to(torch.uint8)
