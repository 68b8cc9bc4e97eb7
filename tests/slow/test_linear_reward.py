"""The linear reward, from a CSV of pairs to a reward with readable weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import References
from jax_idgrpo.synthetic import scenes
from jax_idgrpo.training.finetune import finetune
from tests.helpers.reward_head import configuration, write_pairs


def test_it_learns_the_faults_of_its_pairs_and_serves_as_reward(tmp_path, capsys):
    features = ["identity_mean", "swapped", "duplicated", "copied"]
    config = configuration(
        write_pairs(tmp_path / "pairs", 24, 0, "train"),
        write_pairs(tmp_path / "held_out", 12, 1, "eval"),
        features=features,
    )
    config = dataclasses.replace(
        config, finetune=dataclasses.replace(config.finetune, task="reward_linear")
    )
    finetune(config, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "export" / "linear.json").read_text())
    weights = {row["name"]: row["weight"] for row in stored["features"]}
    assert weights["identity_mean"] > 0
    assert max(weights["swapped"], weights["duplicated"]) > 0
    for row in stored["features"]:
        low, high = row["interval"]
        assert 0 <= low <= high
    accuracy = json.loads((tmp_path / "run" / "accuracy.json").read_text())["SA"]
    assert accuracy["without_ties"]["mean"] > 0.7
    assert "95 % interval" in capsys.readouterr().out

    wanted = dataclasses.replace(
        config.reward, linear=str(tmp_path / "run" / "export"), frames=config.reward.frames
    )
    reward = factory.make_face_reward(wanted)
    drawn = scenes.batch(3, 0, 2, "eval")
    videos = jnp.asarray(drawn.video[:, :3])
    photos = References.of_pixels(drawn.portraits, drawn.mask)
    people = reward.encode_references(photos, [""] * 2)
    terms = reward.score(videos, people)
    np.testing.assert_allclose(terms["reward"], terms["head"] - terms["costs"], atol=1e-6)
    slope = jax.grad(lambda v: jnp.sum(reward.apply(reward.state, v, people)["reward"]))(videos)
    assert np.all(np.isfinite(slope))
    assert np.any(np.asarray(slope) != 0)
