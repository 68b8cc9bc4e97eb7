"""Drawn prompts with several portraits of each person, and the bundled reward on them."""

import numpy as np
import pytest

from jax_idgrpo import cli
from jax_idgrpo import config as c
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards.base import References, check_references, require_pools
from jax_idgrpo.rewards.factory import make_face_reward


def test_drawn_pools_are_of_the_right_people(tmp_path):
    given = ["draw-prompts", "--split", "eval", "--count", "3"]
    cli.run([*given, "--out", str(tmp_path / "one")])
    cli.run([*given, "--out", str(tmp_path / "four"), "--photos", "4"])
    one, four = (load_prompts(tmp_path / name / "prompts.csv", 3) for name in ("one", "four"))
    for single, several in zip(one, four, strict=True):
        assert (several.text, several.digests) == (single.text, single.digests)
        assert [len(group) for group in several.more] == [3] * several.people
    pooled = make_face_reward(c.RewardConfig(pool="pool"))
    check_references(pooled, four)
    photo = make_face_reward(c.RewardConfig())
    texts = [prompt.text for prompt in four]
    with_pool, alone = (
        reward.encode_references(References.of_prompts(four, 3), texts)
        for reward in (pooled, photo)
    )
    cosine = np.sum(with_pool.embeddings * alone.embeddings, axis=-1)[alone.mask]
    assert cosine.min() > 0.7
    assert cosine.max() < 0.9999
    np.testing.assert_array_equal(with_pool.crops, alone.crops)
    check_references(pooled, one)  # held-out prompts may have one photo per person
    require_pools(photo, one)
    with pytest.raises(UserError, match="no row of data.prompts has further photos"):
        require_pools(pooled, one)
