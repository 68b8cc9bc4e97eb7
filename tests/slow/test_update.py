"""Rollout and update: on-policy ratio, exact accumulation, rows that do not see their neighbours, and what is left untouched."""

import pytest

from tests.helpers.update import (
    OBJECTIVES,
    assert_awm_is_on_policy,
    assert_descends_without_a_trajectory,
    assert_micro_batches_equal_one_batch,
    assert_reward_gradient_climbs,
    named,
)


@pytest.mark.parametrize("wanted", [*OBJECTIVES[2:4], OBJECTIVES[5]], ids=named)
def test_micro_batches_equal_one_batch_with_every_other_objective(wanted):
    assert_micro_batches_equal_one_batch(wanted)


@pytest.mark.parametrize(
    ("guidance", "levels"), [(1.0, "grid"), (1.0, "logit_normal"), (3.0, "logit_normal")]
)
def test_awm_is_on_policy_with_other_levels_and_without_guidance(guidance, levels):
    assert_awm_is_on_policy(guidance, levels)


@pytest.mark.parametrize("wanted", OBJECTIVES[3:], ids=named)
def test_every_objective_on_latents_stores_no_trajectory_and_descends(wanted):
    assert_descends_without_a_trajectory(wanted)


def test_reward_gradient_through_the_last_step_alone_climbs():
    assert_reward_gradient_climbs(1)
