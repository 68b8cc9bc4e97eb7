"""Read preference pairs from a CSV, and select the pairs of a training step.

A pair is two videos of one prompt and the label of the better one. The CSV has VideoAlign's
columns and a column for photos: `path_A,path_B,prompt,ref_paths`, and one column per scored
dimension, such as SA, with the values A, B, same or invalid. Optional columns: `fps_A,fps_B`
(frames per second of the videos), `num_frames_A,num_frames_B`, and `source`: `trusted` (labelled by
people, the default) or `automatic`. Paths are relative to the CSV; photos are joined by `;`.
Further columns are ignored. `tfds_source` reads the same pairs from a data set built from such a
CSV.

Automatic pairs are numerous and partly wrong. As published, a teacher trained on trusted pairs
filters them, and the share of automatic pairs in a batch falls along half a cosine from its start
to 0 at the end of training:

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
    """The inputs of a pair.

    references: photos, one per person. fps, num_frames: of A and B; 0 if unknown.
    """

    references: tuple[File, ...]
    videos: tuple[File, File]
    prompt: str
    fps: tuple[float, float] = (0.0, 0.0)
    num_frames: tuple[int, int] = (0, 0)

    def read(self) -> "Row":
        """Return the row itself, which is in memory already."""
        return self


@runtime_checkable
class Readable(Protocol):
    """A row that is in memory or is read on demand."""

    def __hash__(self) -> int: ...

    def read(self) -> Row:
        """Read the row."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two videos of one prompt.

    labels: one per dimension, in the coding of `rewards.preference`. source: "trusted" or
    "automatic". Labels and source are in memory; the row is read on demand.
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
        """Videos A and B."""
        return self.row.read().videos

    @property
    def prompt(self) -> str:
        """Prompt of both videos."""
        return self.row.read().prompt

    @property
    def fps(self) -> tuple[float, float]:
        """Frames per second of A and B; 0 if unknown."""
        return self.row.read().fps


def check_dimensions(dimensions: Sequence[str]) -> None:
    """Refuse repeated dimensions, and names of other columns.

    Raises:
      UserError: a dimension cannot be used.
    """
    reserved = {*COLUMNS, "", "source", "annotator"}
    if not dimensions or len(set(dimensions)) < len(dimensions) or reserved & set(dimensions):
        raise UserError(f"--dimensions {','.join(dimensions)}: name dimensions, each once")


def load_pairs(path: str | Path, dimensions: Sequence[str]) -> list[Pair]:
    """Load the pairs of a CSV with the labels of `dimensions`.

    Checks that the videos and photos exist, and does not read them.

    Raises:
      UserError: the file or a row violates the format; the message names the line.
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
            f"{where}: has more or fewer fields than the header; "
            "put texts with commas in double quotes"
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
    """Parse a number of 0 or more; an empty field is 0."""
    try:
        number = float(text.strip() or 0)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{where} is {text!r}; write a number, or leave it empty")
    return number


def pair_digests(pairs: Sequence[Pair]) -> list[str]:
    """Compute digests of pairs in the form of `data.prompts.row_digests`.

    A run stores the digests so that a resumed run can describe a changed data set. The digest
    covers prompt, labels, source, frame rates, and name and size of each file. Videos are not read,
    because they are gigabytes. For a packed data set the digest covers labels and sources only.
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
    """Compute the share of automatic pairs at a step: half a cosine from `start` to 0.

    Args:
      step: training step.
      steps: number of training steps.
      start: share at step 0, in [0, 1].
    """
    return start * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def agrees(difference: float, label: int, theta: float = 5.0) -> bool:
    """Return whether a teacher confirms a pair's label.

    A win is confirmed by the sign of the difference. A tie is confirmed where it is the most likely
    outcome: |difference| < log((theta^2 - 2) / theta).

    Args:
      difference: the teacher's score of A minus that of B.
      label: 1 (A is better), -1 or 0 (tie).
      theta: tie parameter of the loss.
    """
    if label == 0:
        return abs(difference) < math.log((theta**2 - 2) / theta)
    return difference * label > 0


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Pairs, and the indices of the trusted and of the automatic ones."""

    pairs: Sequence[Pair]
    trusted: Int[np.ndarray, " T"]
    automatic: Int[np.ndarray, " U"]


def by_source(pairs: Sequence[Pair]) -> Mixture:
    """Index the pairs by source."""
    automatic = np.fromiter((pair.source == "automatic" for pair in pairs), bool, len(pairs))
    return Mixture(pairs, np.flatnonzero(~automatic), np.flatnonzero(automatic))


def pair_batch(mixture: Mixture, seed: int, step: int, count: int, share: float) -> list[Pair]:
    """Select the pairs of a step: a pure function of (seed, step).

    Each kind is read in an endless sequence with a new permutation for every pass. If one kind is
    absent, all pairs are of the other.

    Args:
      mixture: all pairs by source.
      seed: seed of the run.
      step: training step.
      count: number of pairs.
      share: probability that a pair is automatic, in [0, 1].
    """
    kinds = (mixture.trusted, mixture.automatic)
    draws = np.asarray(jax.random.uniform(rng.fold(rng.key(seed, "data"), step), (count,)))
    orders = [
        grain.MapDataset.range(max(len(kind), 1)).seed(seed).shuffle().repeat() for kind in kinds
    ]
    chosen = []
    for row, draw in enumerate(draws):
        kind = int((draw < share and len(kinds[1]) > 0) or not len(kinds[0]))
        chosen.append(mixture.pairs[int(kinds[kind][int(orders[kind][step * count + row])])])
    return chosen
