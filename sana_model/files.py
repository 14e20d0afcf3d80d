"""Output files: whole or not there, errors in a sentence, and known to be writable before minutes of work begin."""

import errno
import os
import secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sana_model.errors import MissingError, UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError or MissingError, as one sentence about `path`, where the system refuses to write in the block."""
    try:
        yield
    except BrokenPipeError:  # whoever read what the block prints has gone
        raise
    except OSError as error:
        raise _refused(path, error) from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, which takes its place when the block ends well and is removed when not.

    Raises UserError or MissingError, as one sentence, where the system refuses to write.
    """
    temporary = _beside(path)
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a whole text file in UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file, on the disk when this returns. A last line that was cut off stays by itself."""
    with writing(path), path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = file.read() not in (b"", b"\n")
        file.write(("\n" if torn else "").encode() + line.encode() + b"\n")


def check_writable(*paths: Path) -> None:
    """Raise UserError unless each path can become a file: an ordinary file there is replaced, nothing else ever."""
    for path in paths:
        with writing(path):
            if path.is_dir():
                raise UserError(f"{path} is a folder; name a file in it")
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is not an ordinary file, and is not replaced by one")
    for path in {path.parent: path for path in paths}.values():
        check_parent(path)
        # Permission bits do not tell of read-only file systems, quotas or full disks; trying does.
        probe = _beside(path)
        with writing(path):
            try:
                probe.touch()
            finally:
                with suppress(FileNotFoundError):
                    probe.unlink()


def check_parent(path: Path) -> None:
    """Raise UserError unless the folder that `path` is to be in is there."""
    parent = path.parent
    if parent.is_dir():
        return
    if file := next((place for place in (parent, *parent.parents) if place.is_file()), None):
        raise UserError(f"{file} is a file, so that {path} cannot be in it; name another folder")
    raise UserError(f"the folder {parent} does not exist; make it first: mkdir -p {shlex.quote(str(parent))}")


def check_replaceable(folder: Path) -> None:
    """Raise UserError where a new folder cannot take the place of `folder` because somebody works in it.

    It could on the disk, but whoever is in the old one would find themselves in a folder that is no more.
    """
    here = Path.cwd()
    if here.is_relative_to(folder.resolve()):
        raise UserError(
            f"{folder} is replaced as a whole, and you are in it ({here}); name a folder that is still to be made"
        )


def _beside(path: Path) -> Path:
    return path.with_name(f".{secrets.token_hex(8)}.tmp")


def _refused(path: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MissingError(f"{path} cannot be written: the disk is full; make room, or write elsewhere")
    return UserError(f"{path} cannot be written: {error.strerror or error}")
