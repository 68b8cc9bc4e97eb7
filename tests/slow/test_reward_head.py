"""The learned head: what does not matter to it, that it stays finite and inside what it saw, and its training from a CSV to a reward."""

import json
import shutil

import jax
import numpy as np
import pytest

from jax_idgrpo import config as c
from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import References
from jax_idgrpo.synthetic import scenes
from jax_idgrpo.training.finetune import finetune
from tests.helpers.reward_head import configuration, write_pairs


def test_a_stopped_run_ends_with_the_head_of_an_undisturbed_one(tmp_path):
    config = configuration(write_pairs(tmp_path / "pairs", 8, 0, "train"), steps=40)
    finetune(config, tmp_path / "run")
    stored = tmp_path / "run" / "export" / "head.safetensors"
    whole = stored.read_bytes()
    stored.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "40")
    finetune(config, tmp_path / "run")
    assert stored.read_bytes() == whole


def test_training_tells_held_out_pairs_apart_and_the_head_is_a_reward(tmp_path):
    train, held_out = (
        write_pairs(tmp_path / "pairs", 36, 0, "train"),
        write_pairs(tmp_path / "held_out", 24, 1, "eval"),
    )
    finetune(configuration(train, held_out), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "accuracy.json").read_text())["SA"]
    assert found["pairs"] == 24
    assert found["without_ties"]["low"] > 0.6

    export = tmp_path / "run" / "export"
    config = c.RewardConfig(head=str(export))
    drawn = scenes.batch(3, 0, 4, "eval")
    reward = factory.make_face_reward(config)
    people = reward.encode_references(References.of_pixels(drawn.portraits, drawn.mask), [""] * 4)
    terms = reward.score(drawn.video, people)
    np.testing.assert_allclose(terms["reward"], terms["head"] - terms["costs"], atol=1e-5)
    assert set(reward.term_names) == set(terms)
    gradient = jax.grad(lambda video: reward.apply(reward.state, video, people)["reward"].sum())(
        drawn.video
    )
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0
    assert "head" not in factory.make_judge(c.Config(reward=config)).term_names

    with pytest.raises(
        UserError, match=r"trained with reward.frames 5, not 4; pass --reward.frames 5"
    ):
        factory.make_face_reward(c.RewardConfig(head=str(export), frames=4))
    said = json.loads((export / "head.json").read_text())
    (export / "head.json").write_text(json.dumps(said | {"networks": "other"}))
    with pytest.raises(UserError, match=r"trained on other face networks"):
        factory.make_face_reward(config)
    with pytest.raises(UserError, match=r"head.json: cannot be read"):
        factory.make_face_reward(c.RewardConfig(head=str(tmp_path / "nowhere")))
