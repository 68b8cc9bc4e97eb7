"""Declare and check fields of the configuration: default, description, and accepted values."""

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar

from jax_idgrpo.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise a one-line `UserError` unless the condition holds."""
    if not condition:
        raise UserError(f"config: {message}")


def require_seed(name: str, seed: int) -> None:
    """Refuse a seed of more than 32 bits: it would draw the same numbers as its remainder.

    Raises:
      UserError: the seed is negative or too large. The message begins with `name`.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"{name} is {seed}; use 0 to {2**32 - 1}")


def option(
    default: object,
    help: str,
    *,
    choices: Collection[str] = (),
    least: int | float | None = None,
    above: int | float | None = None,
    most: int | float | None = None,
) -> Any:
    """Declare a field of a section.

    Args:
      default: value when the field is not set; a dictionary is copied for every instance.
      help: one sentence for `--help`, with the meaning of special values such as 0 or "".
      choices: the accepted strings, if they are few.
      least: smallest accepted number.
      above: number that the value must exceed.
      most: largest accepted number.
    """
    metadata = {"help": help, "choices": choices, "least": least, "above": above, "most": most}
    if isinstance(default, dict):
        # Sections are static arguments of compiled functions, so that they must be hashable; equality
        # still compares the dictionary.
        return dataclasses.field(default_factory=default.copy, hash=False, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of fields, each checked when the section is built.

    Subclasses add checks across fields.
    """

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(f"{self.section}.{field.name}", getattr(self, field.name), field.metadata)


def _check(name: str, value: Any, accepts: Any) -> None:
    """Refuse a value that a field does not accept."""
    choices, least, above, most = (accepts[key] for key in ("choices", "least", "above", "most"))
    if choices:
        choices = tuple(choices)
        use = " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
        require(value in choices, f"{name} is {value!r}; use {use}")
    if value is None or isinstance(value, str):
        return
    if least is not None and most is not None:
        require(least <= value <= most, f"{name} is {value}; use {least} to {most}")
    elif least is not None:
        require(value >= least, f"{name} is {value}; use {least} or more")
    if above is not None:
        number = "positive number" if above == 0 else f"number above {above}"
        require(value > above, f"{name} is {value}; use a {number}")
