"""A command run in this process as the shell runs it."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest


class Stopped(NamedTuple):
    """How a command ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


def stop_of(
    main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words
) -> Stopped:
    """Run `main` on the command line `words`, which must end by SystemExit.

    Args:
      main: entry point of a command, which reads `sys.argv`.
      monkeypatch: fixture of the test.
      capsys: fixture of the test.
      *words: the command line, with the name of the program.
    """
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as stop:
        main()
    return Stopped(stop.value.code, *capsys.readouterr())
