"""Copies of the photo: a pasted photo is seen, an honest face is not, and nothing but the matched faces matters."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo import config as c
from jax_idgrpo.preferences.clip_pairs import from_synthetic
from jax_idgrpo.preferences.corruptions import blur, codec, light, paste
from jax_idgrpo.rewards import factory, photo_copy
from jax_idgrpo.rewards.base import References
from jax_idgrpo.rewards.faces import ARCFACE_TEMPLATE, warp

apart, photo_crops = jax.jit(photo_copy.apart), jax.jit(photo_copy.photo_crops)
DIRECTION = np.array([0.6, 0.9, -0.4, -0.8])


@functools.cache
def reward():
    return factory.make_face_reward(c.RewardConfig(frames=4))


@functools.cache
def clips():
    """Of held-out people."""
    return [clip_pair.clips[0] for clip_pair in itertools.islice(from_synthetic(5, "eval"), 12)]


def asked(people=slice(None)):
    return References.of_pixels(
        *(
            np.stack([getattr(clip, name)[people] for clip in clips()])
            for name in ("photos", "mask")
        )
    )


def terms(videos, references=None):
    people = reward().encode_references(references or asked(), [""] * len(videos))
    return jax.device_get(reward().score(np.stack(videos).astype(np.float32), people))


@functools.cache
def honest():
    return terms([clip.video for clip in clips()])


@functools.cache
def pasted():
    return terms([paste(clip) for clip in clips()])


def test_a_pasted_photo_is_seen_and_an_honest_face_is_not():
    assert honest()["copied"].mean() < 0.02
    assert pasted()["copied"].mean() > 0.5
    assert (pasted()["copied"] > 0.1).all()


def test_pasting_loses_where_it_would_gain_without_a_price():
    gain = pasted()["reward"] - honest()["reward"]
    assert gain.mean() < -0.2
    assert (gain < 0).mean() > 0.9
    assert (
        gain + c.PENALTY_WEIGHTS["copied"] * (pasted()["copied"] - honest()["copied"])
    ).mean() > 0.02


def test_who_prices_other_penalties_still_prices_copies_and_may_say_otherwise():
    assert c.RewardConfig(penalties={"swapped": 0.2}).penalty_weights() == {
        "copied": 0.5,
        "swapped": 0.2,
    }
    assert c.RewardConfig(penalties={"copied": 0.0}).penalty_weights() == {"copied": 0.0}


@pytest.mark.parametrize("nuisance", [codec, light])
def test_nuisances_neither_make_copies_nor_hide_them(nuisance):
    assert terms([nuisance(clip.video, 0.7, DIRECTION) for clip in clips()])["copied"].mean() < 0.02
    assert terms([nuisance(paste(clip), 0.7, DIRECTION) for clip in clips()])["copied"].mean() > 0.3


def test_a_blurred_face_has_lost_detail_by_how_much_it_is_blurred_whatever_the_light():
    sharp = honest()["detail"]
    little, much = (
        terms([blur(clip, strength) for clip in clips()])["detail"] for strength in (0.4, 1.0)
    )
    assert (much < little).all()
    assert (little < sharp).mean() > 0.9
    assert 0.6 < sharp.mean() < 1.2
    assert much.mean() < 0.6 * sharp.mean()
    lit = terms([light(clip.video, 0.7, DIRECTION) for clip in clips()])["detail"]
    np.testing.assert_allclose(lit, sharp, rtol=0.1)


def test_order_of_people_changes_nothing():
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(
        terms([paste(clip) for clip in clips()], asked(order))["copied"],
        pasted()["copied"],
        atol=1e-5,
    )


def test_padding_changes_nothing():
    """Where people two and three are masked the first person alone decides, whatever stands in the padding."""
    videos = np.stack([paste(clip) for clip in clips()]).astype(np.float32)
    people = reward().encode_references(asked(), [""] * len(videos))
    alone = people.replace(mask=people.mask & np.array([True, False, False]))
    other = alone.replace(
        embeddings=np.where(alone.mask[..., None], alone.embeddings, np.float32(0.3)),
        crops=np.where(alone.mask[..., None, None, None], alone.crops, np.float32(0.3)),
    )
    found = np.asarray(reward().score(videos, alone)["copied"])
    assert found.mean() > 0.5
    np.testing.assert_allclose(reward().score(videos, other)["copied"], found, atol=1e-6)


def test_nobody_is_no_copy():
    found = terms([np.zeros_like(clip.video) for clip in clips()])
    assert not np.any(found["copied"])
    assert not np.any(found["detail"])
    assert np.isfinite(found["reward"]).all()


@functools.cache
def face():
    """A smooth picture and landmarks in its middle."""
    rng = np.random.default_rng(0)
    noise = jax.image.resize(
        jnp.asarray(rng.uniform(-1, 1, (16, 16, 3)), jnp.float32), (96, 96, 3), "cubic"
    )
    return jnp.clip(noise, -1, 1), jnp.asarray(np.asarray(ARCFACE_TEMPLATE) * 0.6 + 14, jnp.float32)


def moved(picture, points, angle, scale, shift):
    """The picture and its landmarks turned and scaled about the middle, and shifted."""
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    x, y = np.meshgrid(np.arange(96.0), np.arange(96.0))
    places = (np.stack([x, y], -1) - 47.5 - shift) @ np.linalg.inv(turn).T + 47.5
    return warp(picture, jnp.asarray(places, jnp.float32)), (points - 47.5) @ turn.T.astype(
        np.float32
    ) + 47.5 + np.float32(shift)


@pytest.mark.parametrize(
    ("angle", "scale", "error"), [(0.0, 1.0, 0.0), (0.15, 0.8, 1.5), (-0.2, 1.1, 2.0)]
)
def test_a_copy_is_registered_from_landmarks_that_are_pixels_off(angle, scale, error):
    """Whatever its light."""
    picture, points = face()
    photo = photo_crops(picture[None], points[None])[0]
    turned, there = moved(picture, points, angle, scale, (2.3, -1.7))
    wrong = there + error * np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)
    distance, alike = apart(0.6 * turned + 0.2, wrong, photo)
    assert distance < photo_copy.DRAWN.copy
    assert alike > 0.95


def test_a_face_whose_parts_stand_elsewhere_is_no_copy():
    """Each row of the picture moves by itself, as when a head turns or a mouth opens: by up to 2 % of the crop."""
    picture, points = face()
    photo = photo_crops(picture[None], points[None])[0]
    x, y = np.meshgrid(np.arange(96.0), np.arange(96.0))
    places = np.stack([x + 1.2 * np.sin(y / 6), y], -1).astype(np.float32)
    distance, alike = apart(warp(picture, jnp.asarray(places)), points, photo)
    assert distance > photo_copy.DRAWN.other
    assert alike > photo_copy.ALIKE


def test_gradients_are_finite_and_reach_the_pixels_of_a_doubtful_copy():
    picture, points = face()
    photo = photo_crops(picture[None], points[None])[0]
    slope = jax.jit(jax.grad(lambda frame: photo_copy.apart(frame, points, photo)[0]))

    other = picture + 0.1 * jnp.flip(picture, 0)
    gradient = slope(other)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0
    for flat in (jnp.zeros_like(picture), picture):
        assert np.isfinite(slope(flat)).all()
    assert np.isfinite(apart(picture, jnp.full((5, 2), 3.0), photo)).all()
