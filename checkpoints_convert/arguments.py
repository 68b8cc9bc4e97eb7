"""Parse both command lines: raise a `UserError` for mistakes and for repeated options."""

import argparse
from typing import Any, NoReturn

from jax_idgrpo.errors import UserError


class _Once(argparse.Action):
    """Store the value of an option; refuse a repeated option, which would lose a value."""

    def __call__(
        self,
        parser: Any,  # a `Parser`
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.option_strings and self in parser.given:
            raise UserError(f"{option_string} is given twice; give it once")
        parser.given.append(self)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Parse one command line with argparse; raise a `UserError` for every mistake in it."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.given: list[argparse.Action] = []
        for name in (None, "store"):
            self.register("action", name, _Once)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")
