"""Write the folders and files of commands: complete or absent, and on this machine."""

import contextlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from jax_idgrpo.errors import UserError

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # `Path` makes one slash of two


def local_path(path: str | Path, what: str) -> Path:
    """Return `path` if it is a path on this machine.

    An address such as gs://bucket/run would become a local folder named `gs:`, which is lost with
    the machine.

    Args:
      path: as the user gave it.
      what: the option or field that it comes from, for the message.

    Raises:
      UserError: it is an address.
    """
    if _ADDRESS.match(str(path)):
        raise UserError(
            f"{what} {path}: is an address, not a path on this machine; mount it or copy it here, "
            "and pass the local path"
        )
    return Path(path)


def refuse_addresses(sections: Mapping[str, Mapping[str, object]], but: Collection[str]) -> None:
    """Refuse addresses in a configuration.

    Args:
      sections: values by section and field; text values may be paths.
      but: names `section.field` of text fields that are no paths.

    Raises:
      UserError: names the field that holds an address.
    """
    for section, fields in sections.items():
        for name, value in fields.items():
            if isinstance(value, str) and f"{section}.{name}" not in but:
                local_path(value, f"{section}.{name}")


def require_writable(path: str | Path, what: str, folder: bool = True) -> Path:
    """Return `path` if it can be created or written. Nothing is created.

    Args:
      path: as the user gave it.
      what: the option that it comes from, for the message.
      folder: whether the path is for a folder; otherwise it is for a file.

    Raises:
      UserError: it is an address, something else is in the way, or the nearest existing folder
        above is not writable.
    """
    path = local_path(path, what)
    if path.exists() and path.is_dir() != folder:
        kind = "a file, not a folder" if folder else "a folder, not a file"
        raise UserError(f"{what} {path}: is {kind}; choose another path")
    parent = path if folder and path.exists() else path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            return path
    except OSError as error:
        raise UserError(
            f"{what} {path}: cannot be written ({parent}: {error.strerror}); choose another path"
        ) from None


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block ends and is removed if it fails.

    Raises:
      UserError: `out` exists already or cannot be made.
    """
    if local_path(out, "--out").exists():
        raise UserError(f"--out {out}: exists already; remove it or name another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
            folder = Path(aside) / out.name
            folder.mkdir()
            yield folder
            folder.rename(out)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); name a folder you may write to"
        ) from None


def prepare_workdir(workdir: Path) -> None:
    """Create the folder and check that it is writable.

    Raises:
      UserError: the folder is not writable, or its path is an address.
    """
    local_path(workdir, "workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(
            f"workdir {workdir}: cannot be written ({error.strerror}); pass another folder "
            "with --workdir"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file under another name and rename it, so that it is never half-written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)
