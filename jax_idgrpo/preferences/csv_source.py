"""Preference pairs: two videos of one prompt, and which is better; and which pairs a training step reads.

The CSV has VideoAlign's columns and photos: `path_A,path_B,prompt,ref_paths` and one column per scored dimension that holds A, B, same or
invalid, such as SA. Optional: `fps_A,fps_B` (frames per second that the videos are taken to have), `num_frames_A,num_frames_B` and
`source`: `trusted` (labelled by people, the default) or `automatic`. Paths are relative to the CSV; photos are joined by `;`. Further
columns are ignored. `tfds_source` reads the same from a data set that was made of such a CSV.

Automatic pairs are many and wrong in part. As published, a teacher that was trained on trusted pairs filters them, and the share of
automatic pairs in a batch falls by half a cosine from its start to 0 at the end of training:

    share(s) = share(0) (1 + cos(pi s / S)) / 2

Sources: `KwaiVGI/VideoAlign` `data.py`; Identity-GRPO, section on the reward's data.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from jaxtyping import Int

from jax_idgrpo import rng
from jax_idgrpo.data.prompts import SEPARATOR, read_rows
from jax_idgrpo.data.video import File
from jax_idgrpo.errors import UserError

COLUMNS = ("path_A", "path_B", "prompt", "ref_paths")
LABELS = {"A": 1, "B": -1, "same": 0, "invalid": 22}
SOURCES = {
    "": "trusted",
    "trusted": "trusted",
    "automatic": "automatic",
    "auto": "automatic",
    "synthetic": "automatic",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What a pair is of. references: photos, one per person. fps, num_frames: of A and B, 0 where nobody said."""

    references: tuple[File, ...]
    videos: tuple[File, File]
    prompt: str
    fps: tuple[float, float] = (0.0, 0.0)
    num_frames: tuple[int, int] = (0, 0)

    def read(self) -> "Row":
        """Itself: nothing remains to be read."""
        return self


@runtime_checkable
class Readable(Protocol):
    """A row that may have to be read first."""

    def __hash__(self) -> int: ...

    def read(self) -> Row:
        """The row."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two videos of one prompt. labels: by dimension, as `rewards.preference` reads them. source: "trusted" or "automatic".

    These two are at hand; the rest is read when it is asked for.
    """

    row: Readable
    labels: tuple[int, ...]
    source: str = "trusted"

    @property
    def references(self) -> tuple[File, ...]:
        """Photos, one per person."""
        return self.row.read().references

    @property
    def videos(self) -> tuple[File, File]:
        """A and B."""
        return self.row.read().videos

    @property
    def prompt(self) -> str:
        """What both were to show."""
        return self.row.read().prompt

    @property
    def fps(self) -> tuple[float, float]:
        """Frames per second of A and B, 0 where nobody said."""
        return self.row.read().fps


def load_pairs(path: str | Path, dimensions: Sequence[str]) -> list[Pair]:
    """The pairs of a CSV, labelled in `dimensions`; that the files exist is checked, not that they can be read.

    Raises:
      UserError: the file or a row is not as the module's docstring says; the message names the line.
    """
    path = Path(path)
    rows = read_rows(path, (*COLUMNS, *dimensions), "pairs")
    pairs = [_pair(row, path, line, dimensions) for line, row in rows]
    if not pairs:
        raise UserError(f"pairs {path}: no rows below the header; write one pair per line")
    return pairs


def _pair(row: dict, path: Path, line: int, dimensions: Sequence[str]) -> Pair:
    where = f"pairs {path}, line {line}"
    if None in row or None in row.values():
        raise UserError(
            f"{where}: has more or fewer fields than the header; put texts with commas in double quotes"
        )
    labels = [row[name].strip() for name in dimensions]
    if unknown := [label for label in labels if label not in LABELS]:
        raise UserError(f"{where}: a label is {unknown[0]!r}; use {', '.join(LABELS)}")
    source = row.get("source", "").strip()
    if source not in SOURCES:
        raise UserError(f"{where}: source is {source!r}; use trusted or automatic")
    fps, frames = (
        tuple(_number(row.get(f"{name}_{side}", ""), f"{where}: {name}_{side}") for side in "AB")
        for name in ("fps", "num_frames")
    )
    photos = tuple(
        path.parent / name.strip() for name in row["ref_paths"].split(SEPARATOR) if name.strip()
    )
    videos = tuple(path.parent / row[f"path_{side}"].strip() for side in "AB")
    if not photos:
        raise UserError(
            f"{where}: no reference photo; name image files in ref_paths, joined by {SEPARATOR}"
        )
    for file in (*photos, *videos):
        if not file.is_file():
            raise UserError(f"{where}: {file} is no file; paths are relative to the CSV")
    content = Row(
        photos,
        (videos[0], videos[1]),
        row["prompt"].strip(),
        (fps[0], fps[1]),
        (int(frames[0]), int(frames[1])),
    )
    return Pair(content, tuple(LABELS[label] for label in labels), SOURCES[source])


def _number(text: str, where: str) -> float:
    """A number from 0 on; 0 for an empty field."""
    try:
        number = float(text.strip() or 0)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{where} is {text!r}; write a number, or leave it empty")
    return number


def pair_digests(pairs: Sequence[Pair]) -> list[str]:
    """Digests of pairs, in the form of `data.prompts.row_digests`: what a run stores to describe a change later.

    Hashed are prompt, labels, source and frame rates, and name and size of each file. The contents of videos, gigabytes, are
    not read. Of a packed data set only labels and sources are hashed, which its index holds.
    """

    def digest(pair: Pair) -> str:
        values: list[Any] = [pair.labels, pair.source]
        if isinstance(pair.row, Row):
            files = [path for path in (*pair.references, *pair.videos) if isinstance(path, Path)]
            values += [
                pair.prompt,
                pair.fps,
                pair.row.num_frames,
                [(path.name, path.stat().st_size) for path in files],
            ]
        short = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]
        return f"{short}-{short}"

    return [digest(pair) for pair in pairs]


def automatic_share(step: int, steps: int, start: float) -> float:
    """Share of automatic pairs at a step: half a cosine from `start` to 0."""
    return start * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def agrees(difference: float, label: int, theta: float = 5.0) -> bool:
    """Whether a teacher whose scores differ by `difference` (A minus B) takes a pair's label to be right.

    A win by its sign; a tie where a tie is the likeliest outcome, which is |difference| < log((theta^2 - 2) / theta).
    """
    if label == 0:
        return abs(difference) < math.log((theta**2 - 2) / theta)
    return difference * label > 0


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Pairs, and the numbers of those of either source among them."""

    pairs: Sequence[Pair]
    trusted: Int[np.ndarray, "T"]
    automatic: Int[np.ndarray, "U"]


def by_source(pairs: Sequence[Pair]) -> Mixture:
    """Which of the pairs are trusted, and which automatic."""
    automatic = np.fromiter((pair.source == "automatic" for pair in pairs), bool, len(pairs))
    return Mixture(pairs, np.flatnonzero(~automatic), np.flatnonzero(automatic))


def pair_batch(given: Mixture, seed: int, step: int, count: int, share: float) -> list[Pair]:
    """The `count` pairs of a step: a pure function of (seed, step). Each is automatic with probability `share`.

    Both kinds are read in endless sequences in which every pass is its own permutation. Where one kind is absent all are of the other.
    """
    kinds = (given.trusted, given.automatic)
    draws = np.asarray(jax.random.uniform(rng.fold(rng.key(seed, "data"), step), (count,)))
    orders = [
        grain.MapDataset.range(max(len(kind), 1)).seed(seed).shuffle().repeat() for kind in kinds
    ]
    chosen = []
    for row, draw in enumerate(draws):
        kind = int((draw < share and len(kinds[1]) > 0) or not len(kinds[0]))
        chosen.append(given.pairs[int(kinds[kind][int(orders[kind][step * count + row])])])
    return chosen
