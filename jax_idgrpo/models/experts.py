"""Hold one value per expert: of a single transformer, or of a pair for high and low noise.

A model with one transformer has no container: its value is itself. So code that loops over
`each(value)` treats both kinds of model alike, and the names of a checkpoint's leaves are those of
the transformer.
"""

from collections.abc import Sequence
from typing import Generic, TypeVar

import flax.struct

T = TypeVar("T")

NAMES = ("high_noise", "low_noise")
"""Names of the experts in the order of the denoising steps."""


@flax.struct.dataclass
class Pair(Generic[T]):
    """One value per expert.

    Attributes:
      high_noise: of the expert of the first denoising steps.
      low_noise: of the expert of the last denoising steps.
    """

    high_noise: T
    low_noise: T


def each(value: T | Pair[T]) -> tuple[T, ...]:
    """Return the values of all experts: two of a pair, otherwise the value alone."""
    return (value.high_noise, value.low_noise) if isinstance(value, Pair) else (value,)


def together(values: Sequence[T]) -> T | Pair[T]:
    """Join the values of one or two experts; inverse of `each`."""
    return values[0] if len(values) == 1 else Pair(*values)
