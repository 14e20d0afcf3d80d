"""Models by hub id: `org/name`, or `hf://org/name/path/in/it` for one file, through huggingface_hub's shared cache.

What is in the cache is used as it is, without asking the network. With HF_HUB_OFFLINE=1 nothing else is ever used.
"""

import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from sana_model.errors import MissingError, UserError

_ID = re.compile(r"(?P<repo>[^/]+/[^/]+)(?:/(?P<file>.+))?")
_SMALL = ["*.json", "tokenizer/*"]


def parse(model: str) -> tuple[str, str | None] | None:
    """(repository, file or None) of a hub id; None if `model` is none. `org/name/file` needs the `hf://` in front."""
    match = _ID.fullmatch(model.removeprefix("hf://"))
    if match is None or (match["file"] and not model.startswith("hf://")):
        return None
    repo, file = match["repo"], match["file"]
    try:
        validate_repo_id(repo)
    except HFValidationError:  # a path that was mistyped, such as out/sana--v2
        return None
    return None if file and ".." in file.split("/") else (repo, file)


def fetch_folder(
    repo: str, choose: Callable[[list[str]], list[str]], indices: tuple[str, ...] = ("model_index.json",)
) -> Path:
    """The local folder of a diffusers model. `choose` picks what is needed from a list of file names.

    `choose` raises UserError where something is missing from the list. `indices`: files of which each such folder has one.
    """
    for index in indices:
        found = try_to_load_from_cache(repo, index)
        if not isinstance(found, str):
            continue
        cached = Path(found).parents[index.count("/")]
        try:
            choose([file.relative_to(cached).as_posix() for file in cached.rglob("*") if file.is_file()])
            return cached
        except UserError:
            pass  # an interrupted download, or another variant: fetch the rest

    def download() -> Path:
        # the small files first: this is the call that knows every way in which a network can fail
        snapshot_download(repo, allow_patterns=_SMALL)
        return Path(snapshot_download(repo, allow_patterns=choose(HfApi().list_repo_files(repo))))

    return _reaching(repo, repo, download)


def fetch_file(repo: str, file: str) -> Path:
    """The local copy of one file of a repository."""
    cached = try_to_load_from_cache(repo, file)
    if isinstance(cached, str):
        return Path(cached)
    return _reaching(f"{file} of {repo}", repo, lambda: Path(hf_hub_download(repo, file)))


def _reaching(what: str, repo: str, download: Callable[[], Path]) -> Path:
    try:
        return download()
    except GatedRepoError as error:
        raise UserError(f"{repo} is gated: accept its licence on its page, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"there is no model {repo} on the hub, or it is private: `hf auth login`") from error
    except LocalEntryNotFoundError as error:
        raise MissingError(
            f"{what} is no path here and is not in the hub's cache, and the hub cannot be reached (no network, or "
            "HF_HUB_OFFLINE is set)"
        ) from error
    except EntryNotFoundError as error:
        raise UserError(f"there is no {what} on the hub") from error
    except OSError as error:  # offline mode with a cache that is not whole, a full disk, a server's refusal
        raise MissingError(f"{what} cannot be fetched: {error}") from error
