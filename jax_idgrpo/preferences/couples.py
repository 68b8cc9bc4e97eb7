"""Pair the videos of a prompt, label the pairs by values of the videos, and write them as a CSV."""

import csv
import hashlib
import io
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_idgrpo.data.prompts import SEPARATOR, Prompt
from jax_idgrpo.data.video import Clip
from jax_idgrpo.workdir import write_text

REWARD = "SA"
"""Dimension whose value is the reward."""


LESS_IS_BETTER = frozenset(
    ("swapped", "duplicated", "blended", "copied", "missing", "switched", "area", "extra")
)
"""Terms whose smaller value wins; in every other dimension the larger value wins."""


THETA = 5.0


@dataclass(frozen=True)
class Scored:
    """A video with its prompt and the values of its dimensions; a missing value is NaN."""

    file: Path
    prompt: Prompt
    values: Mapping[str, float]


@dataclass(frozen=True)
class Couple:
    """Two videos of one prompt with a label per dimension: A, B, same or invalid.

    Attributes:
      a: video A.
      b: video B.
      labels: labels by dimension.
      differences: value of A minus value of B by dimension.
    """

    a: Scored
    b: Scored
    labels: Mapping[str, str]
    differences: Mapping[str, float]


def margins(
    videos: Sequence[Scored], dimensions: Sequence[str], spreads: float, log_odds: bool
) -> dict[str, float]:
    """Compute the difference below which two values are equal, by dimension.

    Args:
      videos: all scored videos.
      dimensions: names of the dimensions.
      spreads: margin in standard deviations of the dimension over all videos.
      log_odds: whether the reward is in log-odds. Its margin is then the difference below which
        a tie is the most likely outcome of the loss that it was trained with.
    """
    found = {}
    for name in dimensions:
        values = np.asarray([video.values[name] for video in videos])
        values = values[np.isfinite(values)]
        found[name] = spreads * float(values.std()) if len(values) else 0.0
    if log_odds and REWARD in found:
        found[REWARD] = math.log((THETA**2 - 2) / THETA)
    return found


def label(difference: float, margin: float, less_is_better: bool = False) -> str:
    """Return the label of a pair in one dimension.

    Args:
      difference: value of A minus value of B.
      margin: size of the difference below which the label is "same".
      less_is_better: whether the smaller value wins.
    """
    if not math.isfinite(difference):
        return "invalid"
    if difference == 0 or abs(difference) < margin:
        return "same"
    return "A" if (difference > 0) != less_is_better else "B"


def couples(
    videos: Sequence[Scored], margins: Mapping[str, float], per_prompt: int = 0
) -> list[Couple]:
    """Pair the videos of every prompt, and label the pairs.

    Args:
      videos: scored videos.
      margins: see `margins`; its keys are the dimensions.
      per_prompt: number of pairs of a prompt, half with the largest and half with the smallest
        differences of the first dimension; 0 takes all pairs.
    """
    first = next(iter(margins))
    found = []
    for group in by_prompt(videos):
        pairs = [couple(*two, margins) for two in itertools.combinations(group, 2)]
        if per_prompt and len(pairs) > per_prompt:
            pairs.sort(key=lambda pair: abs(pair.differences[first]))
            smallest = per_prompt // 2
            pairs = pairs[:smallest] + pairs[len(pairs) - (per_prompt - smallest) :]
        found += pairs
    return found


def path_hash(*files: Path) -> int:
    """Hash paths to a number that is the same in every run."""
    text = "\n".join(str(file) for file in files)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def in_order(one: Scored, other: Scored) -> tuple[Scored, Scored]:
    """Return video A and video B of a pair, which a hash of the paths decides."""
    return (one, other) if path_hash(one.file, other.file) % 2 else (other, one)


def couple(one: Scored, other: Scored, margins: Mapping[str, float]) -> Couple:
    """Label one pair.

    Args:
      one, other: the videos.
      margins: see `margins`.
    """
    return labelled(*in_order(one, other), margins)


def labelled(a: Scored, b: Scored, margins: Mapping[str, float]) -> Couple:
    """Label one pair.

    Args:
      a: video A.
      b: video B.
      margins: see `margins`.
    """
    differences = {name: a.values[name] - b.values[name] for name in margins}
    labels = {
        name: label(differences[name], margin, name in LESS_IS_BETTER)
        for name, margin in margins.items()
    }
    return Couple(a, b, labels, differences)


def select_couples(found: Sequence[Couple], ties: float) -> list[Couple]:
    """Drop pairs without any label, and pairs that are equal in every dimension beyond a share.

    Args:
      found: labelled pairs.
      ties: largest share of pairs that are equal in every dimension, in [0, 1).
    """
    labelled = [pair for pair in found if set(pair.labels.values()) != {"invalid"}]
    decided = [pair for pair in labelled if {"A", "B"} & set(pair.labels.values())]
    kept = set(map(id, decided))
    others = sorted(
        (pair for pair in labelled if id(pair) not in kept),
        key=lambda pair: path_hash(pair.a.file, pair.b.file),
    )
    kept |= set(map(id, others[: int(ties / (1 - ties) * len(decided))]))
    return [pair for pair in labelled if id(pair) in kept]


def agreed(found: Sequence[Couple], second: Sequence[Couple]) -> list[Couple]:
    """Keep the labels that a second annotator gives, too; the others become "invalid".

    Args:
      found: pairs of the first annotator.
      second: the same pairs, labelled by the second annotator.
    """
    return [
        Couple(
            ours.a,
            ours.b,
            {
                name: text if text == theirs.labels[name] else "invalid"
                for name, text in ours.labels.items()
            },
            ours.differences,
        )
        for ours, theirs in zip(found, second, strict=True)
    ]


def kappa(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Compute Cohen's kappa of two annotators' labels.

    Returns:
      1 for complete agreement, 0 for agreement by chance; NaN if no pair has two valid labels or
      both annotators use one label only.
    """
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if "invalid" not in (a, b)]
    if not both:
        return math.nan
    first, second = (np.asarray(side) for side in zip(*both, strict=True))
    chance = sum(np.mean(first == name) * np.mean(second == name) for name in ("A", "B", "same"))
    return float((np.mean(first == second) - chance) / (1 - chance)) if chance < 1 else math.nan


def by_prompt(videos: Sequence[Scored]) -> Iterator[list[Scored]]:
    """Group videos by prompt, in order."""
    ranked = sorted(videos, key=lambda video: (video.prompt.id, str(video.file)))
    for _, group in itertools.groupby(ranked, key=lambda video: video.prompt.id):
        yield list(group)


def write_couples(
    out: Path,
    pairs: Sequence[Couple],
    dimensions: Sequence[str],
    annotator: str,
    makers: Mapping[Path, str] | None = None,
) -> None:
    """Write the CSV of pairs; paths are relative to it.

    Args:
      out: file to write.
      pairs: labelled pairs.
      dimensions: columns of labels.
      annotator: content of the column `annotator`.
      makers: what made every video, for the columns `made_by_A` and `made_by_B`; None writes none.
    """

    def relative(path: Path) -> str:
        return os.path.relpath(path, out.absolute().parent)

    clips = {video.file: Clip.open(video.file) for pair in pairs for video in (pair.a, pair.b)}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        (
            *("path_A", "path_B", "prompt", "ref_paths", "fps_A", "fps_B"),
            *("num_frames_A", "num_frames_B", *dimensions, "source", "annotator"),
            *(f"difference_{name}" for name in dimensions),
            *(("made_by_A", "made_by_B") if makers is not None else ()),
        )
    )
    for pair in pairs:
        sides = pair.a.file, pair.b.file
        rows.writerow(
            (
                *map(relative, sides),
                pair.a.prompt.text,
                SEPARATOR.join(relative(Path(str(photo))) for photo in pair.a.prompt.references),
                *(f"{clips[file].rate or 0:g}" for file in sides),
                *(len(clips[file].numbers) for file in sides),
                *(pair.labels[name] for name in dimensions),
                "automatic",
                annotator,
                *(f"{pair.differences[name]:.6g}" for name in dimensions),
                *((makers[file] for file in sides) if makers is not None else ()),
            )
        )
    write_text(out, text.getvalue())
