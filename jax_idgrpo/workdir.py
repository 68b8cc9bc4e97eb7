"""Folders and files that commands write: complete or absent, and by one run at a time."""

import contextlib
import errno
import fcntl
import functools
import os
import re
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec

from jax_idgrpo.errors import UserError

P = ParamSpec("P")

LOCK = ".lock"
"""File in a workdir that process 0 of a run locks."""


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # `Path` makes one slash of two


def local_path(path: str | Path, what: str) -> Path:
    """Return `path` if it is a path of this machine.

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
            f"{what} {path}: is an address, not a path of this machine; mount it or copy it here, "
            "and pass the local path"
        )
    return Path(path)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends and is gone when it fails.

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
    """Make the folder and check that it is writable.

    Raises:
      UserError: it is not, or its path is an address.
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


def _lock(path: Path) -> IO[str]:
    """Open a file and lock it until it is closed. The kernel unlocks it if the process is killed.

    Raises:
      UserError: another process holds the lock.
    """
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                warnings.warn(
                    f"workdir {path.parent}: its file system has no locks ({error.strerror}); start "
                    "no second run there",
                    stacklevel=2,
                )
                return file
            file.seek(0)
            holder = file.read().strip()
            file.close()
            who = f" ({holder})" if holder else ""
            raise UserError(
                f"workdir {path.parent}: another process is training here{who}; wait for its end, "
                "or pass another --workdir"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()  # its holder removed it between our opening and locking


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make a workdir and lock it against other runs inside the context (collective).

    Process 0 holds the lock.

    Raises:
      UserError: the folder is not writable, or another process is training there. Raised in all
        processes of this run if in one.
    """
    import jax  # slow to import, and not needed by the rest of this module

    from jax_idgrpo.parallel.hosts import gather_objects

    lock, refusal = None, ""
    try:
        try:
            prepare_workdir(workdir)
            if jax.process_index() == 0:
                lock = _lock(workdir / LOCK)
        except UserError as error:
            refusal = str(error)
        if refused := [text for text in gather_objects(refusal) if text]:
            raise UserError(refused[0])
        yield
    finally:
        if lock is not None:
            (workdir / LOCK).unlink(missing_ok=True)
            lock.close()


def exclusive(
    run: Callable[Concatenate[Any, Path, P], None],
) -> Callable[Concatenate[Any, Path, P], None]:
    """Decorate a command `run(config, workdir, ...)` so that it holds its workdir `locked`."""

    @functools.wraps(run)
    def alone(config: Any, workdir: Path, *args: P.args, **kwargs: P.kwargs) -> None:
        with locked(Path(workdir)):
            run(config, Path(workdir), *args, **kwargs)

    return alone


def write_text(path: Path, text: str) -> None:
    """Write a text file under another name and rename it, so that it is never half-written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)
