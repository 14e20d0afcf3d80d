"""A contact sheet: a row per prompt, a column per run, so that the eye can judge what the figures say."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from sana_model.files import atomic

SIDE = 192  # pixels of the longer side of a picture, at most
NARROWEST = 96  # so that there is room for the name of a run
_LINE, _MARGIN = 16, 4


def write_sheet(file: Path, columns: dict[str, Sequence[Tensor]], captions: Sequence[str]) -> None:
    """`columns`: run → pictures (3, H, W) uint8, one per caption or fewer; all of one shape. Raises UserError."""
    height, width = next(iter(columns.values()))[0].shape[1:]
    scale = max(min(1.0, SIDE / max(height, width)), NARROWEST / width)
    width, height = round(width * scale), round(height * scale)
    across, down = width + _MARGIN, height + _LINE + _MARGIN
    names = [name.replace("@", "\n@") for name in columns]  # in one line they may be wider than a picture
    top = _LINE * max(name.count("\n") + 1 for name in names) + _MARGIN
    page = Image.new("RGB", (across * len(columns) + _MARGIN, down * len(captions) + top), "white")
    pen = ImageDraw.Draw(page)
    for i, (name, pictures) in enumerate(zip(names, columns.values(), strict=True)):
        x = _MARGIN + i * across
        pen.text((x, 2), name, "black")
        for j, picture in enumerate(pictures[: len(captions)]):
            image = Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
            page.paste(image.resize((width, height), Image.Resampling.LANCZOS), (x, top + j * down))
    for j, caption in enumerate(captions):  # below the row, as wide as it is: about 6 pixels a letter
        pen.text((_MARGIN, top + j * down + height + 1), _latin(caption)[: page.width // 6], "black")
    with atomic(file) as temporary:
        page.save(temporary, format="PNG")


def _latin(text: str) -> str:
    """What the built-in font of every PIL can draw."""
    return " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")
