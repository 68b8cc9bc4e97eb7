"""Resolve names on the Hugging Face Hub and entries of its local cache to folders.

The cache holds `models--ORG--NAME/` with `refs/main` (a commit) and `snapshots/COMMIT/`, whose
files link into `blobs/`. Its place is `HF_HUB_CACHE`, else `HF_HOME/hub`, else
`~/.cache/huggingface/hub`, as in huggingface_hub. A name that is not there is downloaded with the
package huggingface_hub, unless it is missing or `HF_HUB_OFFLINE` is set.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path

from checkpoints_convert import store
from jax_idgrpo.errors import UserError

NAME = r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*"  # ORG/NAME
ENTRY = "models--"
UNFINISHED = "unfinished-download-of-idgrpo"  # file in an entry while it is downloaded
TRUE = ("1", "ON", "YES", "TRUE")  # values of HF_HUB_OFFLINE, as in huggingface_hub
PICTURES = ["assets/*", "examples/*", *(f"*.{suffix}" for suffix in ("mp4", "gif", "png", "jpg"))]


def is_name(path: Path) -> bool:
    """Return whether a path that does not exist has the form ORG/NAME."""
    return re.fullmatch(NAME, path.as_posix()) is not None and not path.parent.exists()


def snapshot(entry: Path) -> Path:
    """Return the main snapshot of an entry of the cache.

    Raises:
      UserError: the entry has none.
    """
    snapshots, main = entry / "snapshots", entry / "refs" / "main"
    commit = main.read_text("utf-8", "replace").strip() if main.is_file() else ""
    if re.fullmatch(r"[0-9a-zA-Z]+", commit) and (snapshots / commit).is_dir():
        return snapshots / commit
    there = sorted(folder.name for folder in snapshots.iterdir() if folder.is_dir())
    if not there:
        raise UserError(
            f"{entry}: is a Hugging Face cache entry without a snapshot; download the model again"
        )
    what = "is a Hugging Face cache entry without its main snapshot"
    raise UserError(f"{entry}: {what}; pass {snapshots / there[0]}")


def is_entry(path: Path) -> bool:
    """Return whether a folder is an entry of the cache."""
    inside = any((path / name).is_dir() for name in ("refs", "blobs"))
    return inside and (path / "snapshots").is_dir()


def refuse_cache(path: Path) -> None:
    """Raise a UserError if a folder is the cache itself."""
    if entries := sorted(
        entry.name for entry in store.visible(path.glob(f"{ENTRY}*")) if entry.is_dir()
    ):
        raise UserError(
            f"{path}: is a Hugging Face cache; pass one of its entries, such as {path / entries[0]}"
        )


def cache() -> Path:
    """Return the folder of the local cache."""
    if place := os.environ.get("HF_HUB_CACHE"):
        return Path(place).expanduser()
    home = os.environ.get("HF_HOME")
    if home is None:
        home = str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    return Path(home).expanduser() / "hub"


def fetched(name: Path) -> Path:
    """Return the folder of a model on the Hub: in the local cache, or downloaded to it.

    A download that was interrupted is continued.

    Args:
      name: ORG/NAME.

    Raises:
      UserError: it is not in the cache and cannot be downloaded; the message has the command.
    """
    entry = cache() / f"{ENTRY}{name.as_posix().replace('/', '--')}"
    unfinished = entry / UNFINISHED
    if is_entry(entry) and not unfinished.exists():
        return snapshot(entry)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in TRUE:
        raise _missing(name, "HF_HUB_OFFLINE is set")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise _missing(name, "the package huggingface_hub is not installed")
    print(f"downloading {name} from the Hugging Face Hub to {entry.parent}", file=sys.stderr)
    library = importlib.import_module("huggingface_hub")
    try:
        entry.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        found = library.snapshot_download(
            name.as_posix(), cache_dir=entry.parent, ignore_patterns=PICTURES
        )
    except Exception as error:  # the library passes on those of its network and file libraries
        if list(entry.iterdir()) == [unfinished]:  # no such model, or no network
            unfinished.unlink()
            entry.rmdir()
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise _missing(name, f"cannot be downloaded: {reason}") from error
    unfinished.unlink()
    return Path(found)


def _missing(name: Path, reason: str) -> UserError:
    download = f"hf download {name.as_posix()} --local-dir {name.name}"
    return UserError(
        f"{name.as_posix()}: does not exist here and is not complete in {cache()} ({reason}); if it is a model on "
        f"the Hugging Face Hub, run: {download}; and pass {name.name}"
    )
