"""Many prompts from a file, painted into a folder in one load; what is already there is not painted again.

    prompts.txt      a prompt per line; blank lines and lines that start with '#' are skipped
    prompts.jsonl    a JSON object per line: {"prompt": "a fox", "seed": 3, "steps": 10}, with any field of `Settings`

The folder gets 00000-a-fox.png (00000-a-fox-0.png, ... when a line asks for several) and results.jsonl, a line for
every prompt that was painted, written when its pictures are on the disk.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sana_model.errors import UserError
from sana_model.files import append_line, check_writable
from sana_model.pipeline import Pipeline, Progress
from sana_model.png import Metadata, read_metadata, write_png
from sana_model.settings import setting

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Entry:
    """A line of the prompts file."""

    place: str  # "prompts.txt, line 3", for errors
    values: dict  # fields of `Settings`


@dataclass(frozen=True)
class Painted:
    """The pictures of one entry."""

    files: list[Path]
    timings: dict[str, float] | None  # as in `Result`; None: they were there already


def read(file: str | Path) -> list[Entry]:
    """The entries of a prompts file; one that ends in .jsonl is read as JSON. Raises UserError naming the bad line."""
    file = Path(file)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # not splitlines(): JSON may hold other separators
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text file in UTF-8") from error
    parse = _json_values if file.suffix.lower() == ".jsonl" else lambda line: {"prompt": line}
    entries = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            place = f"{file}, line {number}"
            with _naming(place):
                entries.append(Entry(place, parse(line)))
    if not entries:
        raise UserError(f"{file} holds no prompts")
    return entries


def paint(
    pipe: Pipeline,
    entries: list[Entry],
    defaults: dict,
    folder: str | Path,
    *,
    model: str,
    base: str | None = None,
    decoder: str | None = None,
    progress: Progress | None = None,
) -> Iterator[Painted]:
    """Paint every entry that is not there yet, in order; `defaults` are fields of `Settings` that entries may override.

    A picture is there when its file and results.jsonl both say that it was painted with the same settings and model
    (`model`, `base` and `decoder` are what `load` was given). All settings are checked before any picture is painted.
    """
    jobs = []
    for entry in entries:
        with _naming(entry.place):
            jobs.append((entry.place, pipe.settings(**defaults | entry.values)))
    folder = Path(folder)
    results = folder / RESULTS
    check_writable(results)
    done = _done(results)
    for number, (place, settings) in enumerate(jobs):
        files = numbered(folder / f"{number:05d}{_slug(settings.prompt)}.png", settings.count)
        metadata = [
            Metadata.of(pipe, settings, i, model=model, base=base, decoder=decoder) for i in range(settings.count)
        ]
        if done.get(files[0].name) == _identity(metadata[0]) and all(map(_is_there, files, metadata)):
            yield Painted(files, None)
            continue
        with _naming(place):
            result = pipe(**vars(settings), progress=progress)
        for file, image, stored in zip(files, result.images, metadata, strict=True):
            write_png(file, image, stored)
        line = {
            "files": [file.name for file in files],
            "seeds": [stored.seed for stored in metadata],
            "timings_ms": result.timings,
            "metadata": metadata[0].as_json(),
        }
        append_line(results, json.dumps(line))
        yield Painted(files, result.timings)


def numbered(file: Path, count: int) -> list[Path]:
    """fox.png for one picture; fox-0.png, fox-1.png, ... for several."""
    return [file] if count == 1 else [file.with_stem(f"{file.stem}-{i}") for i in range(count)]


def _json_values(line: str) -> dict:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError('a line must be an object with a "prompt", such as {"prompt": "a fox", "seed": 3}')
    return {name: setting(name, value) for name, value in values.items()}


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Put the line that is at fault in front of an error."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{place}: {error}") from error


def _slug(prompt: str) -> str:
    """The prompt's first words as the end of a file name: letters and digits, of any script, are safe everywhere."""
    words = "-".join(re.findall(r"[^\W_]+", prompt.lower()))[:40].strip("-")
    return f"-{words}" if words else ""


def _identity(metadata: Metadata) -> dict:
    """What has to agree for a picture to be there already; as JSON gives it back, with lists for tuples."""
    return json.loads(json.dumps(metadata.as_json() | {"software": None}))


def _is_there(file: Path, metadata: Metadata) -> bool:
    """Does the file hold this very picture? Another run may have painted over it, and was interrupted before its line."""
    try:
        return _identity(read_metadata(file)) == _identity(metadata)
    except UserError:
        return False


def _done(results: Path) -> dict[str, dict]:
    """First file name → identity, of the latest line about it. A line that was cut off is as good as none."""
    done = {}
    for line in results.read_text(encoding="utf-8", errors="replace").splitlines() if results.exists() else ():
        try:
            record = json.loads(line)
            done[record["files"][0]] = record["metadata"] | {"software": None}
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            continue
    return done
