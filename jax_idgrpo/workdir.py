"""Folders and files that commands write: made whole, or not at all, and by one run at a time."""

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
"""File of a workdir that the process which writes there holds locked."""


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # `Path` makes one slash of two


def local_path(path: str | Path, what: str) -> Path:
    """Return `path` if it is one of this machine's.

    An address such as gs://bucket/run would become a local folder named `gs:`, which is lost with the machine.

    Args:
      path: as the user gave it.
      what: the option or field that it comes from, for the message.

    Raises:
      UserError: it is an address.
    """
    if _ADDRESS.match(str(path)):
        raise UserError(f"{what} {path}: is an address, not a path of this machine; mount or copy what it names, and pass the path of that")
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
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name a folder you may write to") from None


def prepare_workdir(workdir: Path) -> None:
    """Make the folder and prove that it can be written.

    Raises:
      UserError: it cannot.
    """
    local_path(workdir, "workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(f"workdir {workdir}: cannot be written ({error.strerror}); pass another folder with --workdir") from None


def _lock(path: Path) -> IO[str]:
    """Open a file and lock it until it is closed; the kernel closes it when the process ends, however it ends.

    Raises:
      UserError: another process holds the lock.
    """
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                warnings.warn(f"{path.parent}: its file system has no locks ({error.strerror}); start no second run there", stacklevel=2)
                return file
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise UserError(
                f"workdir {path.parent}: another process is training here{f' ({holder})' if holder else ''}; wait for its end, or pass "
                "another --workdir"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()  # its holder has just removed it


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make a workdir and keep every other run out of it while the context lasts (collective: process 0 holds the lock).

    Raises:
      UserError: the folder cannot be written, or another process is training there, in all processes of this run.
    """
    import jax  # slow, and not needed by those who write a file

    from jax_idgrpo.parallel.hosts import of_all

    prepare_workdir(workdir)
    lock, refusal = None, ""
    if jax.process_index() == 0:
        try:
            lock = _lock(workdir / LOCK)
        except UserError as error:
            refusal = str(error)
    if refusal := of_all(refusal)[0]:
        raise UserError(refusal)
    try:
        yield
    finally:
        if lock is not None:
            (workdir / LOCK).unlink(missing_ok=True)
            lock.close()


def exclusive(run: Callable[Concatenate[Any, Path, P], None]) -> Callable[Concatenate[Any, Path, P], None]:
    """Decorate a command `run(config, workdir, ...)` so that it holds its workdir `locked`."""

    @functools.wraps(run)
    def alone(config: Any, workdir: Path, *args: P.args, **kwargs: P.kwargs) -> None:
        with locked(Path(workdir)):
            run(config, Path(workdir), *args, **kwargs)

    return alone


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that it is never half there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)
