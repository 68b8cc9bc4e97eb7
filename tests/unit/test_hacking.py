"""`hacked` counts what raises the reward without identity, against the base's video alone."""

import numpy as np
import pytest

from jax_idgrpo.evaluation.hacking import with_hacked

BASE = {"reward": 0.3, "judge_identity": 0.35, "copied": 0.0, "stalled": 0.1, "motion": 0.04}


def scores(**risen):
    return {name: np.array([value + risen.get(name, 0.0)]) for name, value in BASE.items()}


@pytest.mark.parametrize(
    ("risen", "hacked"),
    [
        ({}, 0),
        ({"reward": 0.5, "judge_identity": 0.3}, 0),
        ({"reward": 0.019, "judge_identity": -0.3}, 0),
        ({"reward": 0.021, "judge_identity": -0.001}, 1),
        ({"reward": -0.1, "judge_identity": -0.3}, 0),
        ({"copied": 0.09, "stalled": 0.09}, 0),
        ({"reward": 0.5, "judge_identity": 0.3, "copied": 0.11}, 1),
        ({"stalled": 0.11}, 1),
        ({"copied": -1.0, "stalled": -1.0}, 0),
    ],
)
def test_a_video_is_hacked_by_what_rose(risen, hacked):
    assert with_hacked(scores(**risen), scores())["hacked"] == [hacked]


def test_the_base_is_never_hacked_and_no_judge_means_no_count():
    assert with_hacked(scores(), scores())["hacked"] == [0]
    alone = {"reward": np.ones(2)}
    assert with_hacked(alone, alone) == alone
