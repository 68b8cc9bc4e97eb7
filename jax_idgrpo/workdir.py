"""Folders and files that commands write: made whole, or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jax_idgrpo.errors import UserError


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends and is gone when it fails.

    Raises:
      UserError: `out` exists already or cannot be made.
    """
    if out.exists():
        raise UserError(f"--out {out}: exists already; remove it or name another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
            folder = Path(aside) / out.name
            folder.mkdir()
            yield folder
            folder.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name a folder you may write to") from None


def prepare_workdir(workdir: Path) -> None:
    """Make the folder and prove that it can be written.

    Raises:
      UserError: it cannot.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(f"workdir {workdir}: cannot be written ({error.strerror}); pass another folder with --workdir") from None


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that it is never half there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)
