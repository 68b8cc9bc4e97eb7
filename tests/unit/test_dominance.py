"""Pairs by dominance with slack: by brute force, on Pareto fronts, under permutation, and as the training step chooses them."""

import itertools
import math

import numpy as np
import pytest

import jax_idgrpo as idg
from jax_idgrpo import config as c
from jax_idgrpo.errors import UserError
from jax_idgrpo.training import selection

GROUPS, MEMBERS = 400, 6
WEIGHTS, SLACK = np.array([1.0, 0.5, -0.25]), np.array([0.0, 0.3, 0.0])


def values(seed=0, terms=3):
    """Return terms with ties (values on a grid of five), a constant term in some groups, and NaN."""
    draw = np.random.default_rng(seed)
    made = draw.integers(0, 5, (GROUPS, MEMBERS, terms)).astype(float)
    made[::7, :, 1] = 2.0
    made[draw.random(made.shape) < 0.03] = math.nan
    return made


def brute_force(group, weights, slack, margin=0.0, eps=1e-4):
    """Return the pair of one group by its definition, or None, and its gap."""
    real = [i for i in range(len(group)) if np.isfinite(group[i]).all()]
    best, found = -math.inf, None
    for i, j in itertools.product(real, real):
        differences = []
        for k, weight in enumerate(weights):
            spread = np.std([group[m][k] for m in real])
            sign = -1 if weight < 0 else 1
            differences.append(sign * (group[i][k] - group[j][k]) / (spread + eps))
        gap = sum(abs(w) * d for w, d in zip(weights, differences, strict=True))
        allowed = all(d >= -s for d, s in zip(differences, slack, strict=True))
        if allowed and any(d > 0 for d in differences) and gap > max(margin, best + 1e-9):
            best, found = gap, (i, j)
    return found, best


@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_pairs_equal_brute_force(margin):
    drawn = values()
    members, usable = idg.grpo.dominant_pairs(drawn, WEIGHTS, SLACK, margin=margin)
    assert members.shape == (GROUPS, 2)
    gaps = []
    for group, pair, used in zip(drawn, members, usable, strict=True):
        found, gap = brute_force(group, WEIGHTS, SLACK, margin)
        assert used == (found is not None)
        assert tuple(pair) == (found or (0, 1))
        gaps.append(gap)
    assert 0.2 < usable.mean() < 1.0
    assert np.isfinite(np.array(gaps)[usable]).all()


def test_without_slack_the_winner_is_on_the_first_front_and_the_loser_dominates_nobody():
    drawn = values(1)
    members, usable = idg.grpo.dominant_pairs(drawn, WEIGHTS, 0 * SLACK)
    for group, (winner, loser) in zip(drawn[usable], members[usable], strict=True):
        real = group[np.isfinite(group).all(axis=-1)]

        def dominates(a, b):
            difference = np.sign(WEIGHTS) * (a - b)
            return (difference >= 0).all() and (difference > 0).any()

        assert dominates(group[winner], group[loser])
        assert not any(dominates(other, group[winner]) for other in real)
        assert not any(dominates(group[loser], other) for other in real)


def test_the_order_of_the_members_does_not_matter():
    drawn = np.random.default_rng(2).normal(size=(GROUPS, MEMBERS, 3))  # without ties
    order = np.random.default_rng(3).permutation(MEMBERS)
    members, usable = idg.grpo.dominant_pairs(drawn, WEIGHTS, SLACK)
    moved, still = idg.grpo.dominant_pairs(drawn[:, order], WEIGHTS, SLACK)
    np.testing.assert_array_equal(usable, still)
    np.testing.assert_array_equal(order[moved][usable], members[usable])


def test_infinite_slack_gives_the_extremes_of_the_weighted_sum():
    drawn = np.random.default_rng(4).normal(size=(GROUPS, MEMBERS, 3))
    members, usable = idg.grpo.dominant_pairs(drawn, WEIGHTS, np.full(3, np.inf))
    total = (WEIGHTS * drawn / (drawn.std(axis=1, keepdims=True) + 1e-4)).sum(axis=-1)
    assert usable.all()
    np.testing.assert_array_equal(members, np.stack([total.argmax(1), total.argmin(1)], axis=1))


def test_a_weight_of_zero_constrains_and_does_not_count():
    """MagicID's first stage: identity counts, and motion may be worse by the slack at most."""
    drawn = np.array([[[3.0, 0.0], [2.0, 1.0], [1.0, 1.0]]])
    weights = np.array([1.0, 0.0])
    for slack, pair in ((0.0, (1, 2)), (3.0, (0, 2))):
        members, usable = idg.grpo.dominant_pairs(drawn, weights, np.array([0.0, slack]))
        assert usable.all()
        assert tuple(members[0]) == pair


def settings(**changes):
    """Return settings of dpo with pairs by dominance."""
    fields = dict(objective="dpo", kl_units="velocity", best=1, worst=1, pairs="dominance")
    return c.GrpoConfig(**(fields | {"pair_terms": {"reward": 1, "motion": 0.5}} | changes))


def test_settings_are_a_static_argument_of_compiled_functions():
    assert hash(settings()) == hash(settings())
    assert settings() != settings(pair_terms={"reward": 1})


REWARDS = np.array([[3.0, 2, 1], [1, 2, 3], [1, 1, 1], [np.nan, 2, 1]], np.float32)
TERMS = {"motion": np.array([[0.0, 2, 1], [3, 2, 1], [1, 1, 1], [9, 2, 1]], np.float32)}


def test_a_step_trains_the_pairs_that_are_better_in_everything():
    _, weight, rows = selection.choose(settings(), REWARDS, TERMS, {})
    np.testing.assert_array_equal(rows, [1, 2, 3, 4, 6, 7, 10, 11])
    np.testing.assert_array_equal(weight.ravel()[rows], [1, 1, 0, 0, 0, 0, 1, 1])
    _, _, measures = selection.select_pairs(settings(), REWARDS, TERMS)
    assert measures["pairs_used"] == 2
    assert measures["pair_gap"] > 0
    assert measures["pair_reward"] > 0
    assert measures["pair_motion"] > 0
    _, usable, measures = selection.select_pairs(settings(pair_share=0.5), REWARDS, TERMS)
    # Two members of the last group have a number: they are two spreads apart.
    np.testing.assert_array_equal(usable, [False, False, False, True])
    assert measures["pairs_used"] == 1
    _, usable, measures = selection.select_pairs(settings(pair_margin=9.0), REWARDS, TERMS)
    assert not usable.any()
    assert math.isnan(measures["pair_gap"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pair_terms": {}}, "grpo.pair_terms weighs no term; name some as JSON"),
        ({"pair_terms": {"reward": "much"}}, "grpo.pair_terms: reward is 'much'; use a number"),
        (
            {"pair_slack": {"motion": -1}},
            "grpo.pair_slack: motion is -1; use a number of 0 or more",
        ),
        ({"pair_slack": {"missing": 1}}, "missing is not among grpo.pair_terms"),
        ({"pair_share": 0.0}, "grpo.pair_share is 0.0"),
        ({"pairs": "extremes"}, "grpo.pair_terms belongs to grpo.pairs dominance"),
        (
            {"objective": "clip", "best": 0, "worst": 0},
            "grpo.pairs dominance chooses pairs, and grpo.objective clip trains none",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, match):
    with pytest.raises(UserError, match=match) as caught:
        settings(**changes)
    assert "\n" not in str(caught.value)


def test_terms_that_the_reward_does_not_have_are_refused_and_many_are_warned_of():
    with pytest.raises(UserError, match=r"grpo.pair_terms knows no 'motoin'; did you mean motion"):
        selection.check_terms("grpo.pair_terms", {"motoin": 1}, ("reward", "motion"))
    names = [f"term{n}" for n in range(6)]
    with pytest.warns(UserWarning, match="grpo.pair_terms has 6 terms"):
        selection.check_terms("grpo.pair_terms", dict.fromkeys(names, 1), names, most=5)
