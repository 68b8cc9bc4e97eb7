"""Compare adapters with the base: bootstrap intervals, paired differences, and printed tables.

All models use the same prompts and noise. Videos of one prompt are not independent, so prompts are
resampled instead of videos (cluster bootstrap). With s_k the sum and n_k the number of the values
of prompt k, one resample of prompts has the mean sum(s_k) / sum(n_k). The interval is between the
2.5th and the 97.5th percentile of these means. See Davison and Hinkley, Bootstrap Methods and their
Application, sections 2.4 and 3.8.
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jax_idgrpo import rng

# Metrics of the table: metric -> label.
LABELS = {
    "reward": "training reward",
    "judge_identity": "judge identity",
    "faces": "faces found / asked",
    "motion": "motion",
    "judge_minimum": "judge, least person",
    "judge_largest": "judge, largest face",
    "recognised": "people recognised",
    "identities": "identities shown / asked",
    "placed": "people in their places",
    "turning": "head turn / 90 degrees",
    "faces_frontal": "faces below 20 degrees",
    "faces_half": "faces from 20 to 45 degrees",
    "faces_side": "faces from 45 degrees",
    "similarity_frontal": "judge, below 20 degrees",
    "similarity_half": "judge, 20 to 45 degrees",
    "similarity_side": "judge, from 45 degrees",
    "embedder_identity": "embedder identity",
    "person_similarity": "whole person",
    "person_similarity_min": "whole person, least person",
    "count": "frames, right count",
    "swapped": "swapped (less is better)",
    "duplicated": "duplicated (less)",
    "blended": "blended (less)",
    "unique": "videos, no face twice",
    "copied": "copied (less)",
    "stalled": "stalled (less)",
    "hacked": "hacked (less)",
}
LESS = (
    "swapped",
    "duplicated",
    "blended",
    "copied",
    "stalled",
    "hacked",
)  # metrics for which lower is better
BY_YAW = tuple(
    f"{kind}_{name}" for kind in ("faces", "similarity") for name in ("frontal", "half", "side")
)
"""Metrics of the faces in bins of the yaw."""
PARTIAL = ("placed", *BY_YAW)
"""Metrics that only some videos have. Their other values are NaN and are left out of means."""
FEWEST = 8
"""Videos that a metric of `BY_YAW` needs to be compared."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, sign: bool = False) -> str:
        """Format as `0.123 [0.100, 0.150]`; `sign` adds a plus sign for differences."""
        form = "{:+.3f}" if sign else "{:.3f}"
        return f"{form.format(self.mean)} [{form.format(self.low)}, {form.format(self.high)}]"


Scores = Mapping[str, Float[np.ndarray, " N"]]
"""Metric -> one value per video."""

Intervals = dict[str, dict[str, Interval]]
"""Model -> metric -> interval."""


def bootstrap(
    values: Float[np.ndarray, " N"], clusters: Int[np.ndarray, " N"], seed: int, resamples: int
) -> Interval:
    """Compute a mean and its 95 % interval by resampling clusters (prompts) with replacement.

    Args:
      values: one value per video.
      clusters: prompt of each video.
      seed: seed of the resampling.
      resamples: number of resamples.
    """
    _, index = np.unique(clusters, return_inverse=True)
    count = int(index.max()) + 1
    sums, sizes = np.bincount(index, values), np.bincount(index).astype(float)
    drawn = np.asarray(jax.random.randint(rng.key(seed, "bootstrap"), (resamples, count), 0, count))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))


def without_absent(scores: Scores) -> dict[str, Float[np.ndarray, " N"]]:
    """Leave out the metrics of `PARTIAL` that no video has."""
    return {
        name: values
        for name, values in scores.items()
        if name not in PARTIAL or not np.isnan(values).all()
    }


def without_rare(scores: Mapping[str, Scores]) -> dict[str, dict[str, Float[np.ndarray, " N"]]]:
    """Leave out the metrics of `PARTIAL` that too few videos of all models have.

    A metric of the result has a video, or `FEWEST` videos, for which every model has a value.

    Args:
      scores: model -> metric -> one value per video.
    """
    names = set.intersection(*(set(metrics) for metrics in scores.values()))
    kept = {
        name
        for name in names
        if np.sum(np.all([_known(name, metrics[name]) for metrics in scores.values()], 0))
        >= (FEWEST if name in BY_YAW else 1)
    }
    return {
        model: {name: values for name, values in metrics.items() if name in kept}
        for model, metrics in scores.items()
    }


def _known(name: str, values: Float[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Return which values of a metric count: all, except NaN in a metric of `PARTIAL`."""
    return ~np.isnan(values) if name in PARTIAL else np.ones(len(values), bool)


def mean(name: str, values: Float[np.ndarray, " N"]) -> float:
    """Average a metric over the videos that have it."""
    return float(values[_known(name, values)].mean())


def _bootstrap_known(
    name: str,
    values: Float[np.ndarray, " N"],
    clusters: Int[np.ndarray, " N"],
    seed: int,
    resamples: int,
) -> Interval:
    """Call `bootstrap` with the videos that have a metric.

    Args:
      name: the metric.
      values: one value per video.
      clusters: prompt of each video.
      seed: seed of the resampling.
      resamples: number of resamples.
    """
    known = _known(name, values)
    return bootstrap(values[known], clusters[known], seed, resamples)


def summarise(
    scores: Mapping[str, Scores], clusters: Int[np.ndarray, " N"], seed: int, resamples: int
) -> tuple[Intervals, Intervals]:
    """Compute means of every model, and paired differences of every adapter from "base".

    Args:
      scores: model -> metric -> one value per video. Video n of every model has the same prompt and
        noise.
      clusters: prompt of each video.
      seed: seed of the resampling.
      resamples: number of resamples.

    Returns:
      The means of every model, and the means of adapter minus base.
    """
    means = {
        model: {
            name: _bootstrap_known(name, values, clusters, seed, resamples)
            for name, values in metrics.items()
        }
        for model, metrics in scores.items()
    }
    changes = {
        model: {
            name: _bootstrap_known(name, values - scores["base"][name], clusters, seed, resamples)
            for name, values in metrics.items()
        }
        for model, metrics in scores.items()
        if model != "base"
    }
    return means, changes


@dataclasses.dataclass(frozen=True)
class Pair:
    """Comparison of two models on the same prompts and noise.

    Attributes:
      difference: first model minus second model.
      wins: share of videos for which the first model is better; ties count one half.
    """

    difference: Interval
    wins: Interval


Pairs = dict[tuple[str, str], dict[str, Pair]]
"""(model, earlier model) -> metric -> comparison of the first with the second."""


def pairs(
    scores: Mapping[str, Scores], clusters: Int[np.ndarray, " N"], seed: int, resamples: int
) -> Pairs:
    """Compare every model with every earlier model.

    Args:
      scores: model -> metric -> one value per video, paired as in `summarise`.
      clusters: prompt of each video.
      seed: seed of the resampling.
      resamples: number of resamples.
    """

    def compare(name: str, left: Float[np.ndarray, " N"], right: Float[np.ndarray, " N"]) -> Pair:
        better = np.sign(right - left if name in LESS else left - right)
        return Pair(
            difference=_bootstrap_known(name, left - right, clusters, seed, resamples),
            wins=_bootstrap_known(name, (better + 1) / 2, clusters, seed, resamples),
        )

    return {
        (model, other): {
            name: compare(name, values, scores[other][name])
            for name, values in scores[model].items()
        }
        for other, model in itertools.combinations(scores, 2)
    }


def relative(change: Interval, base: Interval) -> float:
    """Return the change relative to the base, or 0 if the base is 0."""
    return change.mean / abs(base.mean) if base.mean else 0.0


def labels(metrics: Collection[str]) -> dict[str, str]:
    """Return the labels of the given metrics, in the order of the table."""
    return {name: label for name, label in LABELS.items() if name in metrics}


def document(means: Intervals, changes: Intervals, compared: Pairs) -> dict[str, object]:
    """Convert a comparison to the content of `metrics.json`.

    Args:
      means: means of every model.
      changes: paired differences of every adapter from the base.
      compared: comparisons of every two models.
    """
    return {
        "labels": labels(means["base"]),
        "less": LESS,
        "models": {
            model: {name: dataclasses.asdict(value) for name, value in metrics.items()}
            for model, metrics in means.items()
        },
        "differences": {
            model: {
                name: dataclasses.asdict(value) | {"relative": relative(value, means["base"][name])}
                for name, value in metrics.items()
            }
            for model, metrics in changes.items()
        },
        "pairs": [
            {
                "model": model,
                "other": other,
                "metrics": {name: dataclasses.asdict(value) for name, value in metrics.items()},
            }
            for (model, other), metrics in compared.items()
        ],
    }


def lines(scores: Scores) -> list[dict[str, float]]:
    """List the values of each video by metric, without metrics that it does not have."""
    count = len(next(iter(scores.values())))
    known = {name: _known(name, values) for name, values in scores.items()}
    return [
        {name: float(values[n]) for name, values in scores.items() if known[name][n]}
        for n in range(count)
    ]


def column(lines: Sequence[Mapping[str, float]], name: str) -> Float[np.ndarray, " N"]:
    """Collect a metric of the lines of `lines`; NaN where one of `PARTIAL` is absent."""
    return np.asarray([line.get(name, np.nan) if name in PARTIAL else line[name] for line in lines])


def per_video(
    scores: Mapping[str, Scores], clusters: Int[np.ndarray, " N"]
) -> list[dict[str, object]]:
    """List the prompt and every model's values of each video."""
    of_models = {model: lines(metrics) for model, metrics in scores.items()}
    return [
        {"prompt": int(prompt)} | {model: values[n] for model, values in of_models.items()}
        for n, prompt in enumerate(clusters)
    ]


def markdown(means: Intervals, changes: Intervals) -> str:
    """Format the comparison as a Markdown table with padded columns."""
    header = [
        "",
        "base",
        *(cell for name in changes for cell in (name, f"{name} - base", "relative")),
    ]
    rows = [header]
    for name, label in labels(means["base"]).items():
        row = [label, means["base"][name].text()]
        for model, change in changes.items():
            row += [
                means[model][name].text(),
                change[name].text(sign=True),
                f"{relative(change[name], means['base'][name]):+.1%}",
            ]
        rows.append(row)
    return align(rows)


def pairs_markdown(compared: Pairs) -> str:
    """Format win rates of all pairs, and differences between adapters, as a Markdown table."""
    rows = [
        ["share of videos that are better", *(f"{model} over {other}" for model, other in compared)]
    ]
    named = labels(next(iter(compared.values())))
    for name, label in named.items():
        rows.append([label, *(metrics[name].wins.text() for metrics in compared.values())])
    for name, label in named.items():
        between = [
            metrics[name].difference.text(sign=True) if other != "base" else ""
            for (_, other), metrics in compared.items()
        ]
        if any(between):
            rows.append([f"{label}, difference", *between])
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as a padded Markdown table. The first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
        for row in rows
    ]
    return (
        "\n".join(
            [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
        )
        + "\n"
    )
