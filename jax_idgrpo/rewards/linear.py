"""Score videos by a weighted sum of the terms of the face reward.

Each term has a direction, +1 if more of it is better and -1 if it is worse. With x_k the value of
term k, clipped to its range in training and mapped to [-1, 1]:

    score = sum_k weight_k direction_k x_k,   weight_k >= 0

so a change that only makes terms worse never raises the score. The weights are the log-odds that a
term can contribute, and a person can read them. `preferences.train_linear` fits them to pairs.

Source: VisionReward, arXiv 2412.21059, which drops answers with negative weights; here the bound
replaces that step.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from checkpoints_convert import store
from jax_idgrpo.config import RewardConfig
from jax_idgrpo.errors import UserError, closest
from jax_idgrpo.rewards.head import (
    VIDEO,
    Tokens,
    check_trained_with,
    reading,
    scale_to_range,
)

NAME = "linear"
DIRECTIONS = {
    "identity_mean": 1,
    "identity_soft_min": 1,
    "similarity_min": 1,
    "mimr": 1,
    "id_conf": 1,
    "unique_faces": 1,
    "detail": 1,
    "apart_log": 1,
    "extra": -1,
    "missing": -1,
    "duplicated": -1,
    "swapped": -1,
    "switched": -1,
    "blended": -1,
    "area": -1,
    "copied": -1,
    "stalled": -1,
    "still": -1,
    "twins": -1,
    "twins_most": -1,
}
"""Direction of every term that can be a feature: +1 if more is better, -1 if it is worse."""


class Weight(nnx.Param):
    """Weights of the features, [K]; not negative."""


class Range(nnx.Variable):
    """Smallest and largest value of every feature, [2, K]; not trained."""


class LinearReward(nnx.Module):
    """Map the features of a video to a score, like `head.Head`.

    Attributes:
      features: names of the K features, in order.
      range: clipping range of every feature.
      weight: weights.
    """

    def __init__(
        self,
        features: Sequence[str],
        values_range: Float[np.ndarray, "2 K"],
        weight: Float[np.ndarray, " K"],
    ):
        """Store the parameters.

        Args:
          features: keys of `DIRECTIONS`.
          values_range: smallest and largest value of every feature; values outside are clipped.
          weight: weights, 0 or more.
        """
        self.features = tuple(features)
        self.range = Range(jnp.asarray(values_range, jnp.float32))
        self.weight = Weight(jnp.asarray(weight, jnp.float32))

    def inputs(self, given: Tokens) -> Float[Array, "B K"]:
        """Return direction times scaled feature, in [-1, 1]; larger is better."""
        columns = np.asarray([VIDEO.index(name) for name in self.features])
        direction = np.asarray([DIRECTIONS[name] for name in self.features], np.float32)
        return scale_to_range(jnp.asarray(given.video)[:, columns], self.range[...]) * direction

    def __call__(self, given: Tokens) -> Float[Array, " B"]:
        """Return the score of every video, in log-odds; higher is better."""
        return jnp.sum(self.inputs(given) * self.weight[...], -1)


def check_features(features: Sequence[str], where: str) -> None:
    """Refuse unknown or repeated features, and an empty list.

    Raises:
      UserError: the message begins with `where`.
    """
    for name in features:
        if name not in DIRECTIONS:
            raise UserError(f"{where}: no feature {name!r}{closest(str(name), list(DIRECTIONS))}")
    if not features or len(set(features)) < len(features):
        raise UserError(f"{where}: name at least one feature, and each once")


def save_linear(
    reward: LinearReward,
    intervals: Float[np.ndarray, "2 K"],
    folder: Path,
    networks: str,
    config: RewardConfig,
) -> None:
    """Write `linear.json` into a folder.

    Args:
      reward: the fitted reward.
      intervals: lower and upper end of every weight's 95 % interval.
      folder: destination.
      networks: `head.fingerprint` of the face networks behind the features.
      config: configuration of the features.
    """
    limits, weights = np.asarray(reward.range[...]), np.asarray(reward.weight[...])
    features = [
        {
            "name": name,
            "direction": DIRECTIONS[name],
            "weight": float(weight),
            "interval": [float(end) for end in interval],
            "range": [float(end) for end in limit],
        }
        for name, weight, interval, limit in zip(
            reward.features, weights, intervals.T, limits.T, strict=True
        )
    ]
    values = {"networks": networks, "reading": reading(config), "features": features}
    store.write_json(folder / f"{NAME}.json", values)


def load_linear(folder: Path, networks: str, config: RewardConfig) -> LinearReward:
    """Read the file of `save_linear`.

    Args:
      folder: holds the file.
      networks: `head.fingerprint` of the current face networks.
      config: current configuration.

    Raises:
      UserError: the file is missing or damaged, or the reward was fitted with other networks or
        settings.
    """
    file = folder / f"{NAME}.json"
    values, what = store.read_json(file), f"linear reward {folder}"
    features = values.get("features")
    if not isinstance(features, list) or not all(isinstance(row, Mapping) for row in features):
        raise UserError(f"{file}: has no list of features; train the reward again")
    check_features([row.get("name") for row in features], str(file))
    for row in features:
        _check_feature(row, file)
    check_trained_with(values, networks, config, what)
    return LinearReward(
        [row["name"] for row in features],
        np.asarray([row["range"] for row in features], np.float32).T,
        np.asarray([row["weight"] for row in features], np.float32),
    )


def _check_feature(row: Mapping[str, object], file: Path) -> None:
    """Refuse a feature without finite range and weight, with a negative weight or other direction."""
    name, limits = row["name"], row.get("range")
    numbers = [row.get("weight"), *(limits if isinstance(limits, list) else [])]
    finite = all(
        isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        for number in numbers
    )
    if len(numbers) != 3 or not finite or numbers[0] < 0 or numbers[1] > numbers[2]:
        raise UserError(
            f"{file}: feature {name} needs a weight of 0 or more and a range [low, high]"
        )
    if row.get("direction") != DIRECTIONS[str(name)]:
        raise UserError(
            f"{file}: feature {name} has direction {row.get('direction')!r}, "
            f"not {DIRECTIONS[str(name)]}"
        )
