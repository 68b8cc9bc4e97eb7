"""The whole loop on the embedded models, small: files, exact resume, refusals."""

import warnings

import numpy as np
import pytest

from jax_idgrpo import config as c
from jax_idgrpo.errors import UserError
from jax_idgrpo.training import selection, setup, train


def test_forward_passes_of_a_step():
    """The published recipe at 25 steps: 50 passes to sample a video; 24 steps, two branches, the policy and the base to train it."""
    got = setup.forward_passes(c.Config(rollout=c.RolloutConfig(prompts=1, group=2)), branches=2)
    assert got == dict(
        forward_passes_rollout=100, forward_passes_update=2 * 24 * 2 * 2, backward_passes=2 * 24 * 2
    )
    nft = c.Config(
        rollout=c.RolloutConfig(prompts=1, group=2, steps=10, window="none"),
        grpo=c.GrpoConfig(objective="nft", kl=0.0, times=3, epochs=2),
    )
    assert setup.forward_passes(nft, branches=2) == dict(
        forward_passes_rollout=40, forward_passes_update=2 * 2 * 3 * 2, backward_passes=12
    )


def test_a_prompt_that_comes_twice_gets_other_noise():
    numbers = selection.members([5, 3, 5], 4)
    np.testing.assert_array_equal(numbers, [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]])


def test_group_statistics():
    got = selection.group_statistics(np.array([1.0, 3.0, 2.0, 2.0]), 2)
    assert got == {
        "reward": 2.0,
        "reward_group_std": 0.5,
        "zero_std_groups": 0.5,
        "rewards_failed": 0.0,
    }
    got = selection.group_statistics(np.array([1.0, 3.0, 2.0, np.nan, np.nan, np.nan]), 2)
    assert got == {
        "reward": 2.0,
        "reward_group_std": 0.5,
        "zero_std_groups": 0.5,
        "rewards_failed": 3.0,
    }


REWARDS = np.array([[1.0, 4, 2, 3], [5, 5, 5, 5], [np.nan, 1, 0, 0.5]], np.float32)
NONE: dict = {}


def test_what_is_trained_is_decided_on_all_groups():
    advantage, weight, picks = selection.choose(c.GrpoConfig(), REWARDS, NONE, NONE)
    np.testing.assert_array_equal(weight, [[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    np.testing.assert_array_equal(advantage[1], np.zeros(4))
    assert picks is None
    assert advantage[2, 0] == 0
    assert advantage[0].argmax() == 1
    _, weight, _ = selection.choose(c.GrpoConfig(drop_constant=True), REWARDS, NONE, NONE)
    np.testing.assert_array_equal(weight[1], np.zeros(4))
    _, weight, picks = selection.choose(c.GrpoConfig(best=1, worst=1), REWARDS, NONE, NONE)
    np.testing.assert_array_equal(picks, [1, 0, 4, 7, 9, 10])
    np.testing.assert_array_equal(weight.ravel()[picks], np.ones(6))
    pairs = c.GrpoConfig(objective="dpo", kl_units="velocity", best=1, worst=1)
    _, weight, picks = selection.choose(pairs, REWARDS, NONE, NONE)
    np.testing.assert_array_equal(
        weight.ravel()[picks], [1, 1, 0, 0, 1, 1]
    )  # equal rewards prefer nobody
    _, weight, picks = selection.choose(
        pairs, np.array([[np.nan, np.nan, 3, np.nan]], np.float32), NONE, NONE
    )
    np.testing.assert_array_equal(weight.ravel()[picks], [0, 0])


def test_pairs_of_identity_and_motion():
    motion = {"motion": np.array([[9.0, 1, 1, 2]], np.float32)}
    pairs = c.GrpoConfig(objective="dpo", kl_units="velocity", best=1, worst=1)
    assert selection.choose(pairs, REWARDS[:1], motion, {"motion": 2.0})[2][0] == 0
    assert selection.choose(c.GrpoConfig(best=1, worst=1), REWARDS[:1], motion, NONE)[2][0] == 1


def test_a_mixture_weighs_terms_in_units_of_their_own_spread():
    rewards = np.array([[1.0, 2, 3, 4], [2, 2, 2, 2], [np.nan, 1, 2, 3]], np.float32)
    other = np.random.default_rng(0).normal(size=rewards.shape).astype(np.float32)
    alone, own = (
        selection.choose(c.GrpoConfig(), values, NONE, NONE)[0] for values in (rewards, other)
    )
    terms = {"mimr": 1000 * other, "motion": np.zeros_like(other)}
    mixed, weight, _ = selection.choose(
        c.GrpoConfig(), rewards, terms, {"mimr": 0.5, "motion": 0.25}
    )
    seen = np.isfinite(rewards)
    np.testing.assert_allclose(
        mixed[seen], (alone + 0.5 * own)[seen], rtol=1e-3
    )  # the spread of the large one makes 1e-4 smaller
    assert mixed[2, 0] == weight[2, 0] == 0  # no reward, no say
    only, _, _ = selection.choose(
        c.GrpoConfig(), rewards, {"mimr": other}, {"reward": 0, "mimr": 1}
    )
    np.testing.assert_array_equal(only[seen], own[seen])
    selection.check_terms(
        "reward.mixture", {"mimr": 1.0, "reward": 0.0}, ("reward", "motion", "mimr")
    )
    with pytest.raises(
        UserError,
        match=r"knows no 'mimir'; did you mean mimr\? \(the terms of this reward: mimr, motion, reward\)",
    ):
        selection.check_terms("reward.mixture", {"mimir": 1.0}, ("reward", "motion", "mimr"))


def test_summary_keeps_the_ratio_of_the_first_update_and_of_the_last():
    logged = [
        dict(kl=1.0, ratio_min=1.0, ratio_max=1.0, skipped=0.0),
        dict(kl=3.0, ratio_min=0.9, ratio_max=1.2, skipped=1.0),
    ]
    got = train.summary(logged)
    assert got == dict(
        kl=2.0, ratio_min=1.0, ratio_max=1.0, skipped=0.5, ratio_min_last=0.9, ratio_max_last=1.2
    )
    assert train.summary(logged[:1]) == logged[0]


def test_failures_in_a_row_are_counted_from_what_is_stored():
    assert selection.failed_in_a_row([]) == 0
    assert selection.failed_in_a_row([{"skipped": s} for s in (1.0, 0.0, 1.0, 1.0)]) == 2
    assert selection.failed_in_a_row([{"skipped": s} for s in (1.0, 0.5)]) == 0


def test_constant_groups_are_warned_of_once():
    assert selection.constant_in_a_row([{"zero_std_groups": s} for s in (1.0, 0.5, 1.0, 1.0)]) == 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for constant in range(25):
            train.warn_if_constant(constant, constant)
    (warning,) = caught
    assert str(warning.message).startswith(
        "step 10: in each of the last 10 steps the rewards of every group were all equal"
    )
