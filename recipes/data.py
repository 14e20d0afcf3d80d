"""Builds the data set: every concept in every style, as transparent 256 px pictures, and an index of what they show.

    python -m recipes.data --out FOLDER          renders.npy (N, 256, 256, 4) uint8 RGBA, index.json

The pictures come from packages of the npm registry, pinned by version and SHA-256 and fetched with `npm pack` (npm has to
be installed); see NOTICE for their licences. Backgrounds are added when the pictures are used (recipes.images).

A concept is an emoji that exists in every style. Left out are flags, keycaps and the other symbols that are mostly
lettering; of concepts that look the same (skin tones, man / woman / person, clock faces) one stands for all.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from recipes import run
from recipes.captions import clean
from sana_model.errors import MissingError, UserError
from sana_model.files import atomic, write_text

SIZE = 256
CACHE = Path("~/.cache/sana-recipes")
LOOK_ALIKE = 15.5  # from here on, the nearest pairs are different things (an onion and an egg)


@dataclass(frozen=True)
class Package:
    """An npm package, and the SHA-256 of its archive."""

    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


RENDERS_3D = Package(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
)
ICONS_FLAT = Package(
    "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
)
LABELS = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
OPENMOJI = Package("openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68")


@dataclass(frozen=True)
class Concept:
    """Something to paint."""

    name: str  # as captions have it, unique
    label: str  # as the data has it
    tags: tuple[str, ...]
    codepoint: str  # lower-case hexadecimal, without variation selectors: 1f98a
    group: str


@dataclass(frozen=True)
class Row(Concept):
    """One picture: entry i of index.json is picture i of renders.npy."""

    style: str


# ------------------------------------------------------------------------------------------------ packages


def fetch(package: Package, cache: Path) -> Path:
    """The archive of a package: from the cache, or fetched into it. MissingError without npm or network."""
    file = cache / package.archive
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", str(cache)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise MissingError("npm fetches the pictures and is not installed; install Node.js first") from error
        if done.returncode:
            raise MissingError(f"`{' '.join(command)}` failed: {(done.stderr.strip() or 'no message')[-300:]}")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise UserError(
            f"{file} has SHA-256 {found}, expected {package.sha256}: it is damaged or not what was published; "
            "delete it and run this again"
        )
    return file


def members(archive: Path, pattern: str) -> Iterator[tuple[re.Match, bytes]]:
    """The files of an archive whose names (without the leading "package/") match, with their contents."""
    with tarfile.open(archive) as tar:
        for member in tar:
            match = re.fullmatch(pattern, member.name.partition("/")[2])
            if match and member.isfile():
                yield match, tar.extractfile(member).read()


def member(archive: Path, name: str) -> bytes:
    for _, content in members(archive, re.escape(name)):
        return content
    raise UserError(f"{archive} holds no {name}: it is not the package it should be")


# ------------------------------------------------------------------------------------------------ concepts

_LETTERING = {"component", "flags", "symbols"}
_RENAMED = {
    "person: bald": "bald person",
    "person: beard": "bearded person",
    "flag in hole": "golf flag",
    "ten o’clock": "clock",
}


def concepts(labels: Path) -> list[Concept]:
    """What the labels name, without skin tones and genders, in their order."""
    entries = json.loads(member(labels, "en/data.json"))
    groups = json.loads(member(labels, "meta/groups.json"))["groups"]
    known = {entry["label"] for entry in entries}
    kept, seen = [], set()
    for entry in entries:  # skin tones are not entries of their own
        label, group = entry["label"], groups.get(str(entry.get("group")))
        name = clean(_RENAMED.get(label, label))
        if group is None or group in _LETTERING or _is_variant(label, known) or name in seen:
            continue
        seen.add(name)
        words = set(re.findall(r"\w+", name))
        tags = [clean(tag) for tag in entry.get("tags", ())]
        tags = tuple(tag for tag in tags if re.fullmatch(r"[a-z][a-z ]{2,15}", tag) and not words & set(tag.split()))
        kept.append(Concept(name, label, tags, plain(entry["hexcode"]), group))
    return kept


def _is_variant(label: str, known: set[str]) -> bool:
    """Whether another label stands for this one: a clock at another hour, a man or a woman where there is a person."""
    if re.fullmatch(r"\w+ o’clock|\w+-thirty", label):
        return label not in _RENAMED
    neutral = {"man": "person", "woman": "person", "men": "people", "women": "people"}
    alike = re.sub(r"\b(man|woman|men|women)\b", lambda m: neutral[m[0]], label)
    without = re.sub(r"^(man|woman|men|women)[ :]+", "", label)
    return any(other != label and other in known for other in (alike, without)) and label not in ("man", "woman")


def plain(codepoint: str) -> str:
    """A sequence of code points without variation selectors, which the packages write in different ways."""
    return "-".join(part for part in codepoint.lower().split("-") if part != "fe0f")


def heldout_style(name: str) -> str | None:
    """The style in which a concept never appears in training: a fifth of the concepts have one, so a tenth of the pairs.

    A function of the name alone, so it stays as it is when concepts or styles are added.
    """
    value = int.from_bytes(hashlib.sha256(f"heldout/{name}".encode()).digest()[:8], "big")
    return ("3d", "flat")[value // 5 % 2] if value % 5 == 0 else None


# ------------------------------------------------------------------------------------------------ pictures


def pictures_3d(archive: Path) -> dict[str, Image.Image]:
    """Code point → render."""
    found = members(archive, r"assets/([0-9a-f-]+)\.webp")
    return {plain(match[1]): Image.open(io.BytesIO(content)) for match, content in found}


def svgs_flat(archive: Path) -> dict[str, str]:
    """Code point → SVG."""
    icons = json.loads(member(archive, "icons.json"))
    chars = json.loads(member(archive, "chars.json"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {icons["width"]} {icons["height"]}">'
    bodies = icons["icons"]
    return {plain(c): f"{head}{bodies[name]['body']}</svg>" for c, name in chars.items() if name in bodies}


def svgs_openmoji(archive: Path) -> dict[str, str]:
    """Code point → SVG."""
    return {plain(match[1]): content.decode() for match, content in members(archive, r"color/svg/([0-9A-F-]+)\.svg")}


def rasterise(svg: str) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise MissingError("resvg_py draws the SVGs: pip install -r recipes/requirements.txt") from error
    return Image.open(
        io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))
    )


def pixels(picture: Image.Image) -> np.ndarray:
    """(256, 256, 4) uint8; a picture that is not square is fitted and centred."""
    picture = picture.convert("RGBA")
    if picture.size != (SIZE, SIZE):
        picture.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
        canvas = Image.new("RGBA", (SIZE, SIZE))
        canvas.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2))
        picture = canvas
    return np.asarray(picture)


def distinct(thumbnails: np.ndarray) -> list[int]:
    """Of concepts with thumbnails (N, styles, values): those that do not look like an earlier one in every style.

    Two look alike when the RMS of their difference is less than LOOK_ALIKE of 255.
    """
    kept: list[int] = []
    for i, pictures in enumerate(thumbnails):
        distance = np.sqrt(np.square(thumbnails[kept] - pictures).mean(-1)).max(-1)
        if not (distance < LOOK_ALIKE).any():
            kept.append(i)
    return kept


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """32 × 32 of a picture on gray, as a flat fp32 vector."""
    gray = Image.new("RGBA", (SIZE, SIZE), (136, 136, 136, 255))
    gray.alpha_composite(Image.fromarray(picture))
    return np.asarray(gray.convert("RGB").resize((32, 32), Image.Resampling.BOX), dtype=np.float32).ravel()


# ------------------------------------------------------------------------------------------------ the whole set


def build(
    out: Path, cache: Path, openmoji: bool = False, packages: tuple[Package, ...] = (RENDERS_3D, ICONS_FLAT, LABELS)
) -> list[Row]:
    """Write renders.npy and index.json into `out`, from the packages of 3d renders, of flat icons and of labels."""
    renders, icons, labels = packages
    drawn = pictures_3d(fetch(renders, cache))
    svgs = {"flat": svgs_flat(fetch(icons, cache))}
    if openmoji:
        svgs["outline"] = svgs_openmoji(fetch(OPENMOJI, cache))
    found = [
        concept
        for concept in concepts(fetch(labels, cache))
        if concept.codepoint in drawn and all(concept.codepoint in style for style in svgs.values())
    ]
    stack = np.stack([
        np.stack([pixels(drawn[c.codepoint]), *(pixels(rasterise(style[c.codepoint])) for style in svgs.values())])
        for c in found
    ])  # fmt: skip
    kept = distinct(np.stack([[thumbnail(picture) for picture in pictures] for pictures in stack]))
    rows = [Row(**asdict(found[i]), style=style) for i in kept for style in ("3d", *svgs)]
    out.mkdir(parents=True, exist_ok=True)
    with atomic(out / "renders.npy") as temporary, temporary.open("wb") as file:
        np.save(file, stack[kept].reshape(-1, SIZE, SIZE, 4))
    write_text(out / "index.json", json.dumps([asdict(row) for row in rows], indent=0) + "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for renders.npy (about 600 MB) and index.json")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the packages (default: %(default)s)")
    parser.add_argument("--openmoji", action="store_true", help="add a third style, outline; OpenMoji is CC BY-SA 4.0")
    args = parser.parse_args()
    rows = build(args.out, args.cache.expanduser(), args.openmoji)
    styles = sorted({row.style for row in rows})
    print(f"{len(rows)} pictures of {len(rows) // len(styles)} concepts in {', '.join(styles)} → {args.out}")


if __name__ == "__main__":
    run(main)
