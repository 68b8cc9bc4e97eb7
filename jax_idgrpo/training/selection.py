"""Select the videos that a step trains on; compute advantages and reward statistics."""

import collections
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

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
    if `drop_constant` is set, pairs without a winner, and what `select_pairs` leaves out.

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
            # A term that no video of the step has must not spread its NaN.
            known = np.isfinite(terms[name])
            advantage = advantage + np.where(known, factor * advantages(terms[name]), 0)
    advantage = np.where(weight, advantage, 0).astype(np.float32)
    if config.pairs == "dominance":
        members, usable, _ = select_pairs(config, rewards, terms)
        rows = members + np.arange(len(rewards))[:, None] * rewards.shape[1]
        return advantage, (weight & usable[:, None]).astype(np.float32), rows.ravel()
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


def select_pairs(
    config: GrpoConfig,
    rewards: Float[np.ndarray, "P G"],
    terms: Mapping[str, Float[np.ndarray, "P G"]],
) -> tuple[Int[np.ndarray, "P 2"], Bool[np.ndarray, " P"], dict[str, float]]:
    """Select the pair of each group by dominance, and of those the share with the largest gaps.

    Args:
      config: settings of the objective.
      rewards: rewards of P prompts with G videos each.
      terms: values of the other terms by name.

    Returns:
      Winner and loser of each group; whether the pair is trained; and metrics: the number of trained
      pairs, their mean gap, and their mean difference in each term, in spreads (NaN without pairs).
    """
    names = list(config.pair_terms)
    values = np.stack(
        [rewards if name == "reward" else _alike_without(terms[name]) for name in names], axis=-1
    )
    weights = np.array([config.pair_terms[name] for name in names], np.float64)
    slack = np.array([config.pair_slack.get(name, 0) for name in names], np.float64)
    eps = config.advantage_eps
    members, usable = grpo.dominant_pairs(
        values, weights, slack, margin=config.pair_margin, eps=eps
    )
    z = np.take_along_axis(grpo.directed(values, weights, eps=eps), members[..., None], axis=1)
    difference = z[:, 0] - z[:, 1]
    gap = difference @ np.abs(weights)
    number = math.ceil(config.pair_share * usable.sum())
    order = np.argsort(np.where(usable, -gap, np.inf), kind="stable")
    usable = usable & np.isin(np.arange(len(usable)), order[:number])
    measures = {"pairs_used": float(usable.sum()), "pair_gap": mean_of_numbers(gap[usable])}
    for index, name in enumerate(names):
        measures[f"pair_{name}"] = mean_of_numbers(difference[usable, index])
    return members, usable, measures


def _alike_without(values: Float[np.ndarray, "P G"]) -> Float[np.ndarray, "P G"]:
    """Set a term to 0 in groups that have no value of it, so that it distinguishes none of them."""
    return np.where(np.isfinite(values).any(axis=1, keepdims=True), values, 0)


def check_terms(
    field: str, weights: Mapping[str, int | float], names: Sequence[str], most: int | None = None
) -> None:
    """Check that the reward has every term that a field weighs.

    Args:
      field: name of the field, for messages.
      weights: weights by term.
      names: terms of the reward.
      most: number of terms above which a warning is given; None never warns.

    Raises:
      UserError: the field names an unknown term.
    """
    for name in weights:
        if name not in names:
            known = ", ".join(sorted(names))
            raise UserError(
                f"{field} knows no {name!r}{closest(name, names)} (the terms of this reward: {known})"
            )
    if most is not None and len(weights) > most:
        warnings.warn(
            f"{field} has {len(weights)} terms; few videos are better in more than {most}, so that "
            "most groups will have no pair",
            stacklevel=2,
        )


def failed_in_a_row(rows: Sequence[dict[str, Any]]) -> int:
    """Count the consecutive steps without a finite update at the end of the metrics."""
    return sum(1 for _ in itertools.takewhile(lambda row: row.get("skipped") == 1, reversed(rows)))


def constant_in_a_row(rows: Sequence[dict[str, Any]]) -> int:
    """Count the consecutive steps with only constant groups at the end of the metrics."""
    return sum(
        1 for _ in itertools.takewhile(lambda row: row.get("zero_std_groups") == 1, reversed(rows))
    )
