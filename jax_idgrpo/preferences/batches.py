"""Code shared by all rewards trained on preference pairs: options, filter, batches, loss, accuracy.

A teacher that was trained on the trusted pairs filters the automatic ones: a pair is dropped where
the teacher contradicts its label in any dimension. `mixing` combines the remaining pairs:

    "smooth"     the share of automatic pairs in a step falls from `automatic` to 0 (`csv_source`)
    "random"     both kinds are shuffled together
    "trusted"    only trusted pairs
    "automatic"  only automatic pairs
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_idgrpo.config import Config
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.preferences.csv_source import Mixture, Pair, agrees, automatic_share, pair_batch
from jax_idgrpo.rewards.preference import btt_loss
from jax_idgrpo.workdir import write_text

RESAMPLES = 2000
MIXINGS = ("smooth", "random", "trusted", "automatic")

Differences = Callable[[Sequence[Pair]], Float[np.ndarray, "N O"]]
"""Maps pairs to the score of A minus the score of B in each of O dimensions."""


@dataclasses.dataclass(frozen=True)
class PairOptions:
    """Options (`finetune.options`) of every task that trains on preference pairs.

    Attributes:
      pairs: a CSV (`csv_source`) or the folder of a data set (`tfds_source`).
      held_out: pairs for measuring the accuracy, in the same formats; "" for none.
      dimensions: columns with labels.
      theta: tie parameter of the loss, above 1.
      mixing: see the module's docstring.
      automatic: initial share of automatic pairs with "smooth", in [0, 1].
      teacher: folder of the reward that filters the automatic pairs; "" for none.
    """

    pairs: str
    held_out: str = ""
    dimensions: tuple[str, ...] = ("SA",)
    theta: float = 5.0
    mixing: str = "smooth"
    automatic: float = 1.0
    teacher: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.automatic <= 1 or self.theta <= 1 or self.mixing not in MIXINGS:
            raise UserError(
                "finetune.options: automatic is 0 to 1, theta above 1, "
                f"mixing {', '.join(MIXINGS[:-1])} or {MIXINGS[-1]}"
            )


OptionsT = TypeVar("OptionsT", bound=PairOptions)


def read_options(kind: type[OptionsT], values: Mapping[str, object]) -> OptionsT:
    """Read a task's options from the configuration.

    Raises:
      UserError: an option is missing, unknown or invalid.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"finetune.options has no {unknown[0]!r}; use {', '.join(known)}")
    if "pairs" not in values:
        raise UserError(
            "finetune.options has no pairs; name a CSV of preference pairs, or a data set of them"
        )
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return kind(**given)


def confirmed_pairs(
    pairs: Sequence[Pair], differences: Float[np.ndarray, "N O"], theta: float
) -> list[Pair]:
    """Select the pairs whose labels a teacher confirms in every labelled dimension.

    Args:
      pairs: N pairs.
      differences: the teacher's score of A minus that of B.
      theta: tie parameter of the loss.
    """
    return [
        pair
        for pair, row in zip(pairs, differences, strict=True)
        if all(
            label not in (-1, 0, 1) or agrees(float(d), label, theta)
            for d, label in zip(row, pair.labels, strict=True)
        )
    ]


def filter_automatic(
    pairs: Sequence[Pair], options: PairOptions, teacher: Callable[[], Differences]
) -> Sequence[Pair]:
    """Drop the automatic pairs that the teacher contradicts; keep all if there is no teacher.

    Args:
      pairs: trusted and automatic pairs.
      options: options of the task; `teacher` may be "".
      teacher: loads the teacher; called only if there are pairs to filter.
    """
    automatic = [pair for pair in pairs if pair.source == "automatic"]
    if not (options.teacher and automatic):
        return pairs
    confirmed = confirmed_pairs(automatic, teacher()(automatic), options.theta)
    print(f"teacher: keeps {len(confirmed)} of {len(automatic)} automatic pairs")
    return [pair for pair in pairs if pair.source != "automatic"] + confirmed


def step_pairs(
    pairs: Mixture, options: PairOptions, config: Config, seed: int, step: int
) -> list[Pair]:
    """Select the pairs of a training step: a pure function of (seed, step).

    Args:
      pairs: all pairs by source.
      options: options of the task.
      config: supplies the batch size and the number of steps.
      seed: seed of the run.
      step: training step.
    """
    share = {
        "smooth": automatic_share(step, config.run.steps, options.automatic),
        "random": len(pairs.automatic) / len(pairs.pairs),
        "trusted": 0.0,
        "automatic": 1.0,
    }[options.mixing]
    return pair_batch(pairs, seed, step, config.finetune.batch, share)


def pair_loss(
    a: Float[Array, "B O"], b: Float[Array, "B O"], labels: Int[Array, "B O"], theta: float
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Compute the Bradley-Terry loss with ties, averaged over the dimensions.

    Args:
      a, b: scores of the videos A and B.
      labels: 1 (A is better), -1, 0 (tie) or another value (ignored).
      theta: tie parameter, above 1.

    Returns:
      The loss; its metrics: accuracy on the pairs that are no ties, and spread of the scores.
    """
    value = jnp.mean(
        jnp.stack([btt_loss(a[:, n], b[:, n], labels[:, n], theta) for n in range(a.shape[1])])
    )
    decided = jnp.abs(labels) == 1
    right = decided & ((a - b) * labels > 0)
    return value, {
        "accuracy": jnp.sum(right) / jnp.maximum(jnp.sum(decided), 1),
        "spread": jnp.std(jnp.concatenate([a, b])),
    }


def accuracy(
    difference: Float[np.ndarray, " N"], label: Int[np.ndarray, " N"], seed: int
) -> dict[str, object]:
    """Compute the agreement of scores with labels, without and with ties.

    Without ties: tied pairs are excluded, equal scores are wrong; reported with a confidence
    interval. With ties: the best accuracy over eps if |difference| <= eps predicts a tie. Source:
    arXiv 2305.14324.

    Args:
      difference: score of A minus score of B.
      label: labels as in `pair_loss`.
      seed: seed of the bootstrap.
    """
    valid = np.isin(label, (-1, 0, 1))
    difference, label = difference[valid], label[valid]
    decided = label != 0
    found: dict[str, object] = {"pairs": len(label), "ties": int((~decided).sum())}
    if decided.any():
        right = (difference * label > 0)[decided].astype(float)
        found["without_ties"] = dataclasses.asdict(
            bootstrap.bootstrap(right, np.arange(len(right)), seed, RESAMPLES)
        )
    if len(label):
        found["with_ties"] = _with_ties(difference, label)
    return found


def _with_ties(difference: Float[np.ndarray, " N"], label: Int[np.ndarray, " N"]) -> float:
    """Return the best accuracy over all thresholds of |difference| for predicting a tie."""
    size = np.abs(difference)
    order = np.argsort(size, kind="stable")
    tied = np.concatenate([[0], np.cumsum((label == 0)[order])])
    right = np.concatenate([np.cumsum((np.sign(difference) == label)[order][::-1])[::-1], [0]])
    between = np.concatenate([[True], np.diff(size[order]) > 0, [True]])
    return float(np.max((tied + right)[between]) / len(label))


def write_accuracy(
    folder: Path,
    held_out: Sequence[Pair],
    differences: Differences,
    options: PairOptions,
    seed: int,
) -> None:
    """Measure the accuracy on held-out pairs, print it, and write `accuracy.json`.

    Does nothing without held-out pairs.

    Args:
      folder: folder of `accuracy.json`.
      held_out: pairs of people who are not in the training pairs.
      differences: scores of the trained reward.
      options: options of the task.
      seed: seed of the bootstrap.
    """
    if not held_out:
        return
    scores, labels = differences(held_out), np.asarray([pair.labels for pair in held_out])
    report = {
        name: accuracy(scores[:, n], labels[:, n], seed)
        for n, name in enumerate(options.dimensions)
    }
    write_text(folder / "accuracy.json", json.dumps(report, indent=1))
    print(f"held-out accuracy: {json.dumps(report)}")
