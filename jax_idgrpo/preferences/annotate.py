"""Label pairs of videos by a reward, for training another reward on them.

Every video is scored by the reward of a configuration (`evaluation.commands.score`). Two videos of
one prompt become a pair. In each dimension, the video with the better value wins, unless the values
are close: then the label is "same". With a second annotator, a label is kept where both agree.

Which video is A depends on a hash of the two paths, so the position carries no information.

Source: VisionPrefer, arXiv 2404.15100, where GPT-4V is the annotator; the tie bands and the second
annotator are ours.
"""

import csv
import hashlib
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import SEPARATOR, Prompt, load_prompts
from jax_idgrpo.data.video import Clip
from jax_idgrpo.errors import Failure, UserError, closest
from jax_idgrpo.evaluation.commands import score
from jax_idgrpo.evaluation.listing import list_rows
from jax_idgrpo.parallel.hosts import print_once, run_once
from jax_idgrpo.preferences.csv_source import COLUMNS
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
      log_odds: whether the reward speaks in log-odds. Its margin is then the difference below which
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
    for _, group in itertools.groupby(
        sorted(videos, key=lambda video: (video.prompt.id, str(video.file))),
        key=lambda video: video.prompt.id,
    ):
        pairs = [_couple(*two, margins) for two in itertools.combinations(group, 2)]
        if per_prompt and len(pairs) > per_prompt:
            pairs.sort(key=lambda pair: abs(pair.differences[first]))
            smallest = per_prompt // 2
            pairs = pairs[:smallest] + pairs[len(pairs) - (per_prompt - smallest) :]
        found += pairs
    return found


def _hash(*files: Path) -> int:
    text = "\n".join(str(file) for file in files)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _couple(one: Scored, other: Scored, margins: Mapping[str, float]) -> Couple:
    """Label one pair; a hash of the paths decides which video is A."""
    a, b = (one, other) if _hash(one.file, other.file) % 2 else (other, one)
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
        key=lambda pair: _hash(pair.a.file, pair.b.file),
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


def annotate(
    config: Config,
    videos: Sequence[Path],
    prompts: Path,
    out: Path,
    dimensions: Sequence[str] = (REWARD,),
    per_prompt: int = 0,
    margin: float = 0.25,
    ties: float = 0.2,
    second: Config | None = None,
) -> None:
    """Score videos and write the CSV of labelled pairs.

    Scores are kept in `OUT.scores/`, so an interrupted command continues when it is run again.

    Args:
      config: its reward is the annotator.
      videos: folders of videos, as `idgrpo sample` or other programs write them.
      prompts: the prompts CSV.
      out: CSV to write, as `csv_source` describes it.
      dimensions: columns of labels: "SA" is the reward, others are terms by name.
      per_prompt: see `couples`.
      margin: see `margins`.
      ties: see `select_couples`.
      second: configuration of the second annotator; None for one annotator.

    Raises:
      UserError: an option or file cannot be used, or no pair has a label.
    """
    check_options(dimensions, per_prompt, margin, ties)
    annotators = [config, *([second] if second else [])]
    folder = out.with_name(f"{out.name}.scores")
    listed = load_prompts(prompts, config.data.max_people)
    found = []
    for number, annotator in enumerate(annotators):
        scored = [
            video
            for place, source in enumerate(videos)
            for video in _score(
                annotator, source, prompts, listed, folder / f"{number}-{place}.jsonl", dimensions
            )
        ]
        wanted = annotator.reward
        bands = margins(
            scored, dimensions, margin, bool(wanted.head or wanted.linear or wanted.vlm)
        )
        found.append((scored, bands))
    first = couples(*found[0], per_prompt)
    if not first:
        raise UserError(
            f"--videos {videos[0]}: no prompt has two videos; sample two or more per prompt, or "
            "name several folders"
        )
    if second is not None:
        first = _with_second(first, *found[1])
    kept = select_couples(first, ties)
    if not kept:
        raise UserError(
            f"--videos {videos[0]}: no pair got a label in {', '.join(dimensions)}; "
            "use a smaller --margin, or other videos"
        )
    run_once(_write, out, kept, dimensions, annotator_name(config))
    counts = [
        f"{name}: "
        + ", ".join(
            f"{sum(pair.labels[name] == text for pair in kept)} {text}"
            for text in ("A", "B", "same", "invalid")
        )
        for name in dimensions
    ]
    print_once(f"{len(kept)} pairs in {out} ({'; '.join(counts)})")


def _with_second(
    first: Sequence[Couple], videos: Sequence[Scored], bands: Mapping[str, float]
) -> list[Couple]:
    """Keep the labels that the second annotator confirms, and print the agreement.

    Args:
      first: pairs of the first annotator.
      videos: videos with the values of the second annotator.
      bands: its margins.
    """
    of_file = {video.file: video for video in videos}
    theirs = [_couple(of_file[pair.a.file], of_file[pair.b.file], bands) for pair in first]
    theirs = [
        other if other.a.file == pair.a.file else _exchanged(other)
        for pair, other in zip(first, theirs, strict=True)
    ]
    for name in bands:
        sides = ([pair.labels[name] for pair in pairs] for pairs in (first, theirs))
        print_once(f"agreement of the annotators in {name}: kappa {kappa(*sides):.3f}")
    return agreed(first, theirs)


def _exchanged(pair: Couple) -> Couple:
    names = {"A": "B", "B": "A"}
    return Couple(
        pair.b,
        pair.a,
        {name: names.get(text, text) for name, text in pair.labels.items()},
        {name: -value for name, value in pair.differences.items()},
    )


def check_options(dimensions: Sequence[str], per_prompt: int, margin: float, ties: float) -> None:
    """Refuse invalid options of `annotate`.

    Args:
      dimensions: see `annotate`.
      per_prompt: see `annotate`.
      margin: see `annotate`.
      ties: see `annotate`.

    Raises:
      UserError: an option is invalid.
    """
    reserved = {*COLUMNS, "source", "annotator"}
    if not dimensions or len(set(dimensions)) < len(dimensions) or reserved & set(dimensions):
        raise UserError(f"--dimensions {','.join(dimensions)}: name terms, each once")
    if per_prompt < 0:
        raise UserError(f"--pairs-per-prompt is {per_prompt}; use 1 or more, or 0 for all")
    if not 0 <= margin < math.inf:
        raise UserError(f"--margin is {margin}; use 0 or more")
    if not 0 <= ties < 1:
        raise UserError(f"--ties is {ties}; use 0 to below 1")


def annotator_name(config: Config) -> str:
    """Return a short description of the reward, for the column `annotator`."""
    wanted = config.reward
    for name in ("custom", "head", "linear", "vlm", "backend"):
        if value := getattr(wanted, name):
            return f"reward.{name} {value}"
    return f"reward.faces {wanted.faces}"


def _score(
    config: Config,
    videos: Path,
    prompts: Path,
    listed: Sequence[Prompt],
    out: Path,
    dimensions: Sequence[str],
) -> list[Scored]:
    """Score a folder of videos; those that cannot be scored have no values.

    Args:
      config: the annotator.
      videos: the folder.
      prompts: the prompts CSV.
      listed: its prompts.
      out: file of the scores.
      dimensions: values to read.

    Raises:
      UserError: a dimension is no term of the reward, or the videos or prompts cannot be used.
    """
    try:
        score(config, videos, prompts, out)
    except Failure as failure:
        run_once(print, f"{failure}; these videos are in no pair", file=sys.stderr)
    prompt_of = {
        file.name: (file, prompt) for file, prompt in list_rows(videos, prompts, listed)[0]
    }
    found = []
    for text in out.read_text().splitlines():
        line = json.loads(text)
        if line["reward"] is not None:
            for name in dimensions:
                if name != REWARD and name not in line:
                    terms = [key for key, value in line.items() if isinstance(value, int | float)]
                    raise UserError(
                        f"--dimensions: the scores have no {name!r}{closest(name, terms)}"
                    )
        values = {
            name: _number(line.get("reward" if name == REWARD else name)) for name in dimensions
        }
        found.append(Scored(*prompt_of[line["file"]], values))
    return found


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _write(out: Path, pairs: Sequence[Couple], dimensions: Sequence[str], annotator: str) -> None:
    """Write the CSV of pairs; paths are relative to it.

    Args:
      out: file to write.
      pairs: labelled pairs.
      dimensions: columns of labels.
      annotator: content of the column `annotator`.
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
        )
    )
    for pair in pairs:
        sides = pair.a.file, pair.b.file
        rows.writerow(
            (
                *map(relative, sides),
                pair.a.prompt.text,
                SEPARATOR.join(relative(Path(photo)) for photo in pair.a.prompt.references),
                *(f"{clips[file].rate or 0:g}" for file in sides),
                *(len(clips[file].numbers) for file in sides),
                *(pair.labels[name] for name in dimensions),
                "automatic",
                annotator,
                *(f"{pair.differences[name]:.6g}" for name in dimensions),
            )
        )
    write_text(out, text.getvalue())
