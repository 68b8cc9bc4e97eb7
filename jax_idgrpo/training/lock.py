"""Lock a workdir, so that only one training run uses it at a time."""

import contextlib
import errno
import fcntl
import functools
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Concatenate, ParamSpec

import jax

from jax_idgrpo.config import Config
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel.hosts import gather_objects
from jax_idgrpo.workdir import prepare_workdir

P = ParamSpec("P")

LOCK = ".lock"
"""File in a workdir that process 0 of a run locks."""


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
        file.close()  # the previous holder removed the file between `open` and `flock`


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Create a workdir and lock it against other runs inside the context (collective).

    Process 0 holds the lock.

    Raises:
      UserError: the folder is not writable, or another process is training there. If one process
        of this run raises it, all do.
    """
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
    run: Callable[Concatenate[Config, Path, P], None],
) -> Callable[Concatenate[Config, Path, P], None]:
    """Decorate a command `run(config, workdir, ...)` to run with its workdir `locked`."""

    @functools.wraps(run)
    def alone(config: Config, workdir: Path, *args: P.args, **kwargs: P.kwargs) -> None:
        with locked(Path(workdir)):
            run(config, Path(workdir), *args, **kwargs)

    return alone
