"""A run that trains by whole people as well."""

import dataclasses

import numpy as np

from checkpoints_convert import dino
from jax_idgrpo.training import train
from tests.helpers.people import small_network
from tests.helpers.tiny_run import rows, tiny


def test_a_run_trains_by_whole_people_beside_the_reward(tmp_path):
    dino.save(small_network(), tmp_path / "people")
    wanted = tiny(1)
    reward = dataclasses.replace(
        wanted.reward, people=str(tmp_path / "people"), mixture={"person_similarity": 0.5}
    )
    train.train(dataclasses.replace(wanted, reward=reward), tmp_path / "with")
    train.train(wanted, tmp_path / "without")
    mixed, plain = (rows(tmp_path / name)[0] for name in ("with", "without"))
    assert np.isfinite(mixed["person_similarity"])
    assert "person_similarity" not in plain
    assert mixed["reward"] == plain["reward"]
    assert mixed["gradient_norm"] != plain["gradient_norm"]
