"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in what the user gave: one line that says what is wrong, where, and what to do.

    The command line prints the line on standard error and exits with status 2, without a traceback.
    """
