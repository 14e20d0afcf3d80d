"""How far a set of pictures is from a folder of a user's own: Fréchet and kernel distance of their features (FID, KID).

A figure is named for its network. `fid_efficientnet_lite1` ranks models as FID does, and its values are its own: only
`fid_inception`, where the Inception weights are installed, can be compared with those in papers.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sana_bench import metrics
from sana_model.errors import UserError

FID_IMAGES = 5000  # of either set; below, only the kernel distance, which is unbiased at any number
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Network = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) uint8 → features (B, D)."""


def features(folder: Path, networks: dict[str, Network], say: Callable[[str], None]) -> dict[str, Tensor]:
    """Features (N, D) by network of all pictures in a folder and in those below it. Raises UserError for fewer than 2."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} pictures ({', '.join(SUFFIXES)}); at least 2 are needed")
    found: dict[str, list[Tensor]] = {name: [] for name in networks}
    for i, file in enumerate(files):
        picture = read(file)[None]
        for name, network in networks.items():
            found[name].append(network(picture).cpu())
        if i % 500 == 0:
            say(f"reference: {i} of {len(files)} pictures")
    return {name: torch.cat(parts) for name, parts in found.items()}


def read(file: Path) -> Tensor:
    """(3, H, W) uint8. Raises UserError for what is no picture."""
    try:
        with Image.open(file) as image:
            rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} cannot be read as a picture: {error}") from error
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3).permute(2, 0, 1)


def distances(pictures: Tensor, wanted: Tensor, network: str) -> dict[str, float]:
    """The figures of two sets of features (N, D) and (M, D), by name."""
    found = {f"kid_{network}": metrics.kernel_distance(pictures, wanted)}
    if min(len(pictures), len(wanted)) >= FID_IMAGES:
        found[f"fid_{network}"] = metrics.frechet_distance(pictures, wanted)
    return found
