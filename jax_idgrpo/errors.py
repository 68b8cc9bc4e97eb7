"""Define the exceptions that end a command with one line, and the hint for a misspelt name."""

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """A user's mistake, as one line: what is wrong, where, and what to do.

    The command line prints the line on standard error and exits with status 2, without a traceback.
    """


class Failure(Exception):
    """Work that could not be done for a reason other than the user's input, as one line.

    The command line prints the line on standard error and exits with status 1, without a traceback.
    """


def closest(name: str, names: Sequence[str]) -> str:
    """Return the hint "; did you mean NAME?", or "" when no name resembles `name`."""
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
