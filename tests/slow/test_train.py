"""The whole loop on the embedded models, small: files, exact resume, refusals."""

import dataclasses

import numpy as np
import pytest

from jax_idgrpo.training import train
from tests.helpers.tiny_run import adapter, assert_same_adapter, failing, rows, tiny

VELOCITY = dict(kl=1e-3, kl_units="velocity")
RECIPES = {
    "cps, a step per prompt, two updates in two epochs": (
        dict(
            grpo=dict(**VELOCITY, updates=2, epochs=2, time_weights=True),
            sampler="cps",
            window="per_prompt",
        ),
        ("ratio_min_last", "approx_kl"),
    ),
    "guard, best and worst": (
        dict(
            grpo=dict(objective="guard", best=1, worst=1, drop_constant=True),
            group=3,
            micro_batch=2,
        ),
        ("ratio_min",),
    ),
    "nft": (dict(grpo=dict(**VELOCITY, objective="nft"), window="none"), ()),
    "awm, off-policy": (
        dict(grpo=dict(**VELOCITY, objective="awm", clip=0.5, updates=2), window="none"),
        ("ratio_min_last",),
    ),
    "dpo": (
        dict(grpo=dict(**VELOCITY, objective="dpo", best=1, worst=1), window="none", guidance=2.0),
        (),
    ),
    "dpo by dominance": (
        dict(
            grpo=dict(
                **VELOCITY,
                objective="dpo",
                best=1,
                worst=1,
                pairs="dominance",
                pair_terms={"reward": 1, "motion": 0.5},
                pair_slack={"motion": 9},
            ),
            window="none",
        ),
        ("pairs_used", "pair_gap", "pair_motion"),
    ),
    "gradient of the reward": (
        dict(grpo=dict(**VELOCITY, objective="reward_gradient", gradient_steps=2), window="none"),
        (),
    ),
    "sft on the best": (
        dict(grpo=dict(**VELOCITY, objective="sft", best=1), window="none", micro_batch=2),
        (),
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_in_the_same_loop(recipe, tmp_path):
    values, logged = RECIPES[recipe]
    config = tiny(2, **values)
    exact = dataclasses.replace(
        config.model, remat="full"
    )  # without, a ratio may be a unit in the last place off, by CPU
    train.train(dataclasses.replace(config, model=exact), tmp_path)
    for row in rows(tmp_path):
        assert row["skipped"] == 0
        assert row["gradient_norm"] > 0
        assert np.isfinite(row["policy_loss"])
        assert row["kl"] >= 0
        assert row.get("ratio_min", 1) == row.get("ratio_max", 1) == 1
        assert all(np.isfinite(row[name]) for name in logged)
    tensors = adapter(tmp_path)
    assert max(np.abs(tensor).max() for name, tensor in tensors.items() if "lora_B" in name) > 0


def test_a_reward_that_is_no_number_costs_one_video_and_the_same_one_after_a_resume(
    monkeypatch, tmp_path
):
    calls = failing(monkeypatch, lambda call: np.arange(4) == (1 if call == 3 else -1))
    train.train(tiny(4), tmp_path / "whole")
    calls.clear()
    train.train(tiny(2), tmp_path / "stopped")
    train.train(tiny(4), tmp_path / "stopped")
    assert [row["rewards_failed"] for row in rows(tmp_path / "whole")] == [0, 0, 1, 0]
    assert all(row["skipped"] == 0 for row in rows(tmp_path / "whole"))
    assert_same_adapter(tmp_path / "whole", tmp_path / "stopped")
