"""What all rewards that are trained on preference pairs share: options, the teacher's filter, the pairs of a step, loss and accuracy.

A teacher that was trained on the trusted pairs judges the automatic ones, which are dropped where it contradicts them in a dimension. What
remains is mixed by `mixing`:

    "smooth"     the share of automatic pairs in a step falls from `automatic` to 0 (see `csv_source`)
    "random"     both kinds shuffled together: the share is what it is among the pairs
    "trusted"    trusted pairs alone
    "automatic"  automatic pairs alone
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
"""Score of A less score of B of some pairs, in each of O dimensions."""


@dataclasses.dataclass(frozen=True)
class PairOptions:
    """Options (`finetune.options`) of every such task.

    pairs, held_out: a CSV (`csv_source`) or the folder of a data set (`tfds_source`); held_out may be "". dimensions: columns
    that hold the labels. theta: of the loss.
    teacher: folder of the reward that filters the automatic pairs, "" for none. mixing: see the module's docstring. automatic: share of
    automatic pairs that "smooth" starts from.
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
                f"finetune.options: automatic is 0 to 1, theta above 1, mixing {', '.join(MIXINGS[:-1])} or {MIXINGS[-1]}"
            )


OptionsT = TypeVar("OptionsT", bound=PairOptions)


def read_options(kind: type[OptionsT], values: Mapping[str, Any]) -> OptionsT:
    """Options of a task from the configuration.

    Raises:
      UserError: an option is missing, unknown, or of no use.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"finetune.options knows no {unknown[0]!r}; use {', '.join(known)}")
    if "pairs" not in values:
        raise UserError(
            "finetune.options names no pairs; name a CSV of preference pairs, or a data set of them"
        )
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return kind(**given)


def confirmed_pairs(pairs: Sequence[Pair], found: Float[np.ndarray, "N O"], theta: float) -> list[Pair]:
    """The pairs whose labels a teacher with these differences of scores takes to be right, in every dimension that is labelled."""
    return [
        pair
        for pair, row in zip(pairs, found, strict=True)
        if all(
            label not in (-1, 0, 1) or agrees(float(d), label, theta)
            for d, label in zip(row, pair.labels, strict=True)
        )
    ]


def filter_automatic(
    pairs: Sequence[Pair], options: PairOptions, teacher: Callable[[], Differences]
) -> Sequence[Pair]:
    """The pairs without those automatic ones that the teacher contradicts; all of them where `options` names none.

    teacher: reads it, and is asked only where there is something to filter.
    """
    automatic = [pair for pair in pairs if pair.source == "automatic"]
    if not (options.teacher and automatic):
        return pairs
    kept = confirmed_pairs(automatic, teacher()(automatic), options.theta)
    print(f"teacher: keeps {len(kept)} of {len(automatic)} automatic pairs")
    return [pair for pair in pairs if pair.source != "automatic"] + kept


def step_pairs(
    pairs: Mixture, options: PairOptions, config: Config, seed: int, step: int
) -> list[Pair]:
    """The pairs of a training step: a pure function of (seed, step)."""
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
    """Mean loss of the dimensions; agreement with the labels that are no ties, and the spread of the scores."""
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
    difference: Float[np.ndarray, "N"], label: Int[np.ndarray, "N"], seed: int
) -> dict[str, Any]:
    """Agreement with the labels: without ties (they are left out, equal scores are wrong), with its interval; and with ties.

    With ties: the best over eps of calling |difference| <= eps a tie. Source: arXiv 2305.14324.
    """
    valid = np.isin(label, (-1, 0, 1))
    difference, label = difference[valid], label[valid]
    decided = label != 0
    found: dict[str, Any] = {"pairs": len(label), "ties": int((~decided).sum())}
    if decided.any():
        right = (difference * label > 0)[decided].astype(float)
        found["without_ties"] = dataclasses.asdict(
            bootstrap.bootstrap(right, np.arange(len(right)), seed, RESAMPLES)
        )
    if len(label):
        found["with_ties"] = _with_ties(difference, label)
    return found


def _with_ties(difference: Float[np.ndarray, "N"], label: Int[np.ndarray, "N"]) -> float:
    """In order of |difference| the first n are called ties, and the others by their sign, for every n between two that differ."""
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
    """Measure the accuracy on held-out pairs, say it, and store it as `accuracy.json`; nothing without such pairs."""
    if not held_out:
        return
    found, labels = differences(held_out), np.asarray([pair.labels for pair in held_out])
    told = {
        name: accuracy(found[:, n], labels[:, n], seed) for n, name in enumerate(options.dimensions)
    }
    write_text(folder / "accuracy.json", json.dumps(told, indent=1))
    print(f"held-out accuracy: {json.dumps(told)}")
