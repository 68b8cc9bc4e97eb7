"""Exceptions that end a command with one line, and the hint that goes with a misspelt name."""

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """A mistake in what the user gave: one line that says what is wrong, where, and what to do.

    The command line prints the line on standard error and exits with status 2, without a traceback.
    """


class Failure(Exception):
    """Work that was not done although nothing in the user's input is known to be wrong: one line.

    The command line prints the line on standard error and exits with status 1, without a traceback.
    """


def closest(name: str, names: Sequence[str]) -> str:
    """The hint "; did you mean NAME?" with the name most like `name`, or nothing when no name resembles it."""
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
