"""Read the pairs that people label, order them, and combine the labels of several people."""

import collections
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import krippendorff
import numpy as np

from jax_idgrpo.data.prompts import read_rows
from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences.csv_source import COLUMNS, LABELS, Row, load_pairs

ANSWERS = ("A", "B", "same")


ORDERS = ("random", "uncertain", "disagreement")


Order = Literal["random", "uncertain", "disagreement"]


@dataclass(frozen=True)
class Item:
    """A pair of videos to label.

    Attributes:
      id: hash of its videos, photos and prompt.
      row: videos, photos and prompt.
      gold: known labels by dimension; empty for pairs to label.
      differences: values of a model, A minus B, by dimension; from the columns difference_*.
    """

    id: str
    row: Row
    gold: Mapping[str, str]
    differences: Mapping[str, float]


def load_items(path: Path, dimensions: Sequence[str], gold: bool = False) -> list[Item]:
    """Read pairs from a CSV in the format of `csv_source`.

    Args:
      path: the CSV; columns of labels are ignored unless the pairs are gold.
      dimensions: dimensions to label.
      gold: whether the labels are the known answers.

    Raises:
      UserError: the file or a row violates the format.
    """
    pairs = load_pairs(path, dimensions if gold else ())
    names = {code: name for name, code in LABELS.items()}
    found: dict[str, Item] = {}
    for (_, cells), pair in zip(read_rows(path, COLUMNS, "pairs"), pairs, strict=True):
        row = pair.row.read()
        parts = [row.prompt, *map(str, (*row.videos, *row.references))]
        number = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        answers = dict(zip(dimensions, (names[label] for label in pair.labels), strict=False))
        known = {name: text for name, text in answers.items() if text in ANSWERS}
        if gold and not known:
            continue
        values = {
            name.removeprefix("difference_"): _number(text)
            for name, text in cells.items()
            if name and name.startswith("difference_")
        }
        found[number] = Item(number, row, known, values)
    if not found:
        raise UserError(f"pairs {path}: no pair has a known answer; label some with A, B or same")
    return list(found.values())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def draw(*parts: str) -> float:
    """Hash texts to a number in [0, 1)."""
    digest = hashlib.sha256("\n".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def ordered(items: Sequence[Item], order: Order, seed: int = 0) -> list[Item]:
    """Sort pairs by how useful their labels are.

    "uncertain": the smallest difference of the first dimension first, where the model that made the
    CSV is least sure. "disagreement": the strongest contradiction between two dimensions first; each
    is measured in its spread over the pairs. Pairs without the values come last.

    Args:
      items: pairs.
      order: one of `ORDERS`.
      seed: seed of the random order.

    Raises:
      UserError: the pairs lack the values that the order needs.
    """
    shuffled = sorted(items, key=lambda item: draw(str(seed), item.id))
    if order == "random":
        return shuffled
    names = list(dict.fromkeys(name for item in items for name in item.differences))
    needed = 1 if order == "uncertain" else 2
    if len(names) < needed:
        raise UserError(
            f"--choose {order}: the pairs have {len(names)} columns difference_*, and it needs "
            f"{needed}; label them with idgrpo annotate CONFIG first, with several --dimensions"
        )
    values = np.asarray(
        [[item.differences.get(name, math.nan) for name in names] for item in shuffled]
    )
    if order == "uncertain":
        worth = -np.abs(values[:, 0])
    else:
        scaled = values / np.maximum(np.nanstd(values, axis=0), 1e-12)
        low, high = np.nanmin(scaled, axis=1), np.nanmax(scaled, axis=1)
        worth = np.minimum(np.maximum(high, 0), np.maximum(-low, 0))
    worth = np.where(np.isfinite(worth), worth, -np.inf)
    return [shuffled[index] for index in np.argsort(-worth, kind="stable")]


def relative(path: object, out: Path) -> str:
    """Return a path relative to the folder of a file."""
    return os.path.relpath(str(path), out.absolute().parent)


def majority(votes: Sequence[str]) -> str:
    """Return the label with more than half of the votes, and "invalid" if there is none."""
    counts = collections.Counter(votes).most_common(1)
    return counts[0][0] if counts and 2 * counts[0][1] > len(votes) else "invalid"


def alpha(
    votes: Mapping[str, Mapping[str, Mapping[str, str]]], dimension: str, annotators: Sequence[str]
) -> float | None:
    """Compute Krippendorff's alpha of a dimension; None if it is not defined.

    Args:
      votes: as `Desk.votes` returns them.
      dimension: the dimension.
      annotators: names of the annotators.
    """
    given = [pair[dimension] for pair in votes.values() if len(pair.get(dimension, {})) > 1]
    table = np.full((len(annotators), len(given)), np.nan)
    for column, labels in enumerate(given):
        for name, text in labels.items():
            table[annotators.index(name), column] = ANSWERS.index(text)
    if len(set(table[np.isfinite(table)])) < 2:
        return None
    return float(
        krippendorff.alpha(
            reliability_data=table, level_of_measurement="nominal", value_domain=[0, 1, 2]
        )
    )
