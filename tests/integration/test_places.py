"""The term `placed` of the face reward on drawn clips, whose faces are known."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_idgrpo import config as c
from jax_idgrpo.data.places import Places
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import References
from jax_idgrpo.synthetic import scenes

SIZE = 64


@pytest.fixture(scope="module")
def drawn():
    """Two clips of one person, and two of several people."""
    batch = jax.device_get(scenes.batch(3, 0, 16, "eval"))
    count = batch.mask.sum(1)
    rows = [*np.flatnonzero(count == 1)[:2], *np.flatnonzero(count > 1)[:2]]
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def moving(boxes):
    """Return the boxes of a person's face in the first and in the last frame."""
    first, last = (tuple(map(float, box)) for box in np.asarray(boxes)[[0, -1]] / SIZE)
    return first, last


def test_people_of_a_clip_are_in_their_own_boxes_and_not_in_each_others(drawn):
    reward = factory.make_face_reward(c.RewardConfig(frames=5))
    photos = References.of_pixels(drawn.portraits, drawn.mask)
    boxes = [
        tuple(moving(drawn.boxes[n, :, m]) for m in np.flatnonzero(drawn.mask[n])) for n in range(4)
    ]
    own = (Places(), *(Places(boxes=each) for each in boxes[1:]))
    exchanged = (*own[:2], *(Places(boxes=(b, a, *rest)) for a, b, *rest in boxes[2:]))
    centres = (drawn.boxes[..., 0] + drawn.boxes[..., 2]).mean(1)
    orders = [tuple(np.argsort(np.argsort(x[mask])) + 1) for x, mask in zip(centres, drawn.mask)]
    order = (Places(), Places(), *(Places(order=tuple(map(int, rank))) for rank in orders[2:]))

    def placed(places):
        asked = reward.encode_references(dataclasses.replace(photos, places=places), [""] * 4)
        return np.asarray(reward.score(drawn.video, asked)["placed"])

    right, wrong, ordered = map(placed, (own, exchanged, order))
    assert np.isnan(right).tolist() == [True, False, False, False]
    assert right[1:].min() > 0.75
    assert right[1] == wrong[1]
    assert (wrong[2:] < right[2:] - 0.4).all()
    assert ordered[2:].min() > 0.75
    plain = reward.score(drawn.video, reward.encode_references(photos, [""] * 4))
    assert "placed" not in plain
    assert "placed" not in reward.term_names
