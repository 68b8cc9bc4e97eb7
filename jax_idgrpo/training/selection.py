"""Select the videos that a step trains on; compute advantages and reward statistics."""

import collections
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jax_idgrpo import grpo
from jax_idgrpo.config import GrpoConfig
from jax_idgrpo.errors import UserError, closest


def members(ids: Sequence[int], group: int) -> Int[np.ndarray, "P G"]:
    """Number the videos of each prompt, P prompts with `group` videos each.

    If a prompt occurs twice in a step, numbering continues, so that no two videos have the same
    noise.
    """
    seen: collections.Counter[int] = collections.Counter()
    numbers = []
    for prompt in ids:
        numbers.append(np.arange(group) + group * seen[prompt])
        seen[prompt] += 1
    return np.stack(numbers)


def group_statistics(rewards: Float[np.ndarray, " B"], group: int) -> dict[str, float]:
    """Compute statistics of the rewards of a step, whose groups are consecutive.

    Returns:
      The mean, the mean standard deviation within groups, the share of groups with zero standard
      deviation, and the number of non-finite rewards, which are excluded from the other statistics.
    """
    seen = np.isfinite(rewards)
    groups = zip(rewards.reshape(-1, group), seen.reshape(-1, group), strict=True)
    spread = np.array([members[real].std() for members, real in groups if real.any()] or [math.nan])
    return {
        "reward": mean_of_numbers(rewards),
        "reward_group_std": float(spread.mean()),
        "zero_std_groups": float(np.mean(spread == 0)),
        "rewards_failed": float(np.sum(~seen)),
    }


def mean_of_numbers(values: Float[np.ndarray, " B"]) -> float:
    """Return the mean of the finite values, or NaN if there are none."""
    seen = np.isfinite(values)
    return float(values[seen].mean()) if seen.any() else math.nan


def choose(
    config: GrpoConfig,
    rewards: Float[np.ndarray, "P G"],
    terms: Mapping[str, Float[np.ndarray, "P G"]],
    mixture: Mapping[str, int | float],
) -> tuple[Float[np.ndarray, "P G"], Float[np.ndarray, "P G"], Int[np.ndarray, " n"] | None]:
    """Compute the advantages and select the videos that a step trains on.

    The advantage is a weighted sum over the reward and the other terms of `mixture`. Each term is
    normalised by its own standard deviation first. Excluded are non-finite rewards, constant groups
    if `drop_constant` is set, and pairs without a winner.

    Args:
      config: settings of the objective.
      rewards: rewards of P prompts with G videos each.
      terms: values of the other terms by name.
      mixture: weights of the terms by name; "reward" has weight 1 by default.

    Returns:
      The advantage of every video; its weight, 0 or 1; and the indices of the selected rows, or
      None for all.
    """

    def advantages(values: Float[np.ndarray, "P G"]) -> Float[np.ndarray, "P G"]:
        groups = np.repeat(np.arange(len(values)), values.shape[1])
        found = grpo.advantages(
            values.ravel(),
            groups,
            eps=config.advantage_eps,
            clip=config.advantage_clip,
            global_std=config.global_std,
        )
        return np.asarray(found).reshape(values.shape)

    advantage, weight = mixture.get("reward", 1.0) * advantages(rewards), np.isfinite(rewards)
    for name, factor in mixture.items():
        if name != "reward":
            advantage = advantage + factor * advantages(terms[name])
    advantage = np.where(weight, advantage, 0).astype(np.float32)
    pairs = "pairs" in config.needs
    if config.drop_constant or pairs:
        weight &= np.any(advantage != 0, axis=1, keepdims=True)
    if config.best + config.worst == 0:
        return advantage, weight.astype(np.float32), None
    members = np.asarray(
        grpo.best_and_worst(np.where(weight, advantage, np.nan), config.best, config.worst)
    )
    if pairs:
        weight &= np.take_along_axis(weight, members, axis=1).all(axis=1, keepdims=True)
    rows = members + np.arange(len(rewards))[:, None] * rewards.shape[1]
    return advantage, weight.astype(np.float32), rows.ravel()


def check_mixture(mixture: Mapping[str, int | float], names: Sequence[str]) -> None:
    """Check that the reward has every term of a mixture.

    Raises:
      UserError: the mixture names an unknown term.
    """
    for name in mixture:
        if name not in names:
            known = ", ".join(sorted(names))
            raise UserError(
                f"reward.mixture knows no {name!r}{closest(name, names)} (the terms of this reward: {known})"
            )


def failed_in_a_row(rows: Sequence[dict[str, Any]]) -> int:
    """Count the consecutive steps without a finite update at the end of the metrics."""
    return sum(1 for _ in itertools.takewhile(lambda row: row.get("skipped") == 1, reversed(rows)))


def constant_in_a_row(rows: Sequence[dict[str, Any]]) -> int:
    """Count the consecutive steps with only constant groups at the end of the metrics."""
    return sum(
        1 for _ in itertools.takewhile(lambda row: row.get("zero_std_groups") == 1, reversed(rows))
    )
