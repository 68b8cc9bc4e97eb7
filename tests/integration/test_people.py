"""Whole people in the bundled face reward: what it adds, what stays, and what a plan describes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from checkpoints_convert import dino
from jax_idgrpo import config as c
from jax_idgrpo.evaluation.scoring import values
from jax_idgrpo.parallel import sharding
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import Photo, References
from jax_idgrpo.rewards.planned import planned_reward
from jax_idgrpo.synthetic import scenes
from tests.helpers.people import small_network

NEW = {"person_similarity", "person_similarity_min"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("people")
    dino.save(small_network(), path)
    return path


@pytest.fixture(scope="module")
def rewards(folder):
    """The bundled reward without and with whole people."""
    return [
        factory.make_face_reward(c.RewardConfig(frames=2, people=name))
        for name in ("", str(folder))
    ]


@pytest.fixture(scope="module")
def drawn():
    """Videos of synthetic people, and their photos."""
    batch = scenes.batch(5, 0, 3, "eval", frames=3)
    return np.asarray(batch.video), np.asarray(batch.portraits), np.asarray(batch.mask)


def score(reward, drawn):
    video, portraits, mask = drawn
    photos = References.of_pixels(portraits, mask)
    return jax.device_get(reward.score(video, reward.encode_references(photos, [""] * len(mask))))


def test_the_other_terms_stay_bit_for_bit(rewards, drawn):
    without, with_people = (score(reward, drawn) for reward in rewards)
    assert set(with_people) == set(without) | NEW
    for name, value in without.items():
        np.testing.assert_array_equal(value, with_people[name], err_msg=name)
    for reward, found in zip(rewards, (without, with_people), strict=True):
        assert set(reward.term_names) == set(found)
        reported = values(reward, found, None)
        assert NEW & set(reported) == NEW & set(found)
    assert (with_people["person_similarity"] > 0).all()
    assert (with_people["person_similarity_min"] <= with_people["person_similarity"]).all()


def test_without_a_network_nothing_is_held_or_encoded(rewards, drawn):
    without, with_people = rewards
    _, portraits, mask = drawn
    photos = References.of_pixels(portraits[:1], mask[:1])
    assert without.encode_references(photos, [""]).people is None
    counts = with_people.encode_references(photos, [""]).people.counts
    np.testing.assert_array_equal(counts, mask[:1])
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(reward.state)) for reward in rewards]
    own = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(small_network())))
    assert sizes[1] - sizes[0] == own


def test_people_stay_after_distractors_are_given(folder, drawn):
    reward = factory.make_face_reward(c.RewardConfig(frames=2, people=str(folder)))
    reward.contrast(np.eye(2, reward.shapes(1, 1).embeddings.shape[-1], dtype=np.float32))
    video = jax.ShapeDtypeStruct(drawn[0].shape, np.float32)
    found = jax.eval_shape(reward.apply, reward.state, video, reward.shapes(*drawn[2].shape))
    assert NEW | {"recognised_log"} <= set(found)


def test_a_close_up_is_named_in_a_warning(rewards, drawn):
    portraits = drawn[1]
    close = Image.fromarray(((portraits[0, 0] + 1) * 127.5).astype(np.uint8)).crop((8, 10, 56, 56))
    photos = References(((Photo(close),),), 1)
    with pytest.warns(UserWarning, match="reference photo 1 of the prompt 'near': shows hardly"):
        found = rewards[1].encode_references(photos, ["near"])
    assert not found.people.counts.any()
    assert found.mask.all()


def test_a_plan_describes_what_a_run_holds(rewards, folder, drawn):
    _, portraits, mask = drawn
    mesh = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])
    config = c.Config(reward=c.RewardConfig(frames=2, people=str(folder)))
    described = planned_reward(config, mesh)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(described.state)]
    assert shapes == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(rewards[1].state)]
    people = mask.shape[1]
    encoded = rewards[1].encode_references(References.of_pixels(portraits, mask), [""] * len(mask))
    jax.tree.map(
        lambda shape, array: np.testing.assert_equal(shape.shape, array.shape),
        described.shapes(len(mask), people),
        encoded,
    )
    absent = dataclasses.replace(config, reward=c.RewardConfig(people=str(folder / "none")))
    with pytest.warns(UserWarning, match=r"no such folder; planned with ViT-S/16"):
        published = planned_reward(absent, mesh)
    assert published.shapes(1, 1).people.features.shape == (1, 1, 384)
    assert published.person_shape().shape == (224, 224, 3)
