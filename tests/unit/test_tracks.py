"""Faces followed through a video: exact links, and penalties that see what they are named after and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo.config import PENALTIES
from jax_idgrpo.rewards import matching, tracks

CONFIG = tracks.TrackConfig()
NULL, SIZE = 0.15, (64, 64)
FRAMES, FACES, PEOPLE, WIDTH = 8, 5, 3, 16


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def honest(seed=0, batch=2):
    """Three people who walk, each face a noisy likeness, listed in another order in every frame; two places are empty."""
    rng = np.random.default_rng(seed)
    references = (
        np.linalg.qr(rng.normal(size=(batch, WIDTH, PEOPLE)))[0].swapaxes(1, 2).astype(np.float32)
    )
    at = np.array([4.0, 24.0, 44.0])[:, None] + np.arange(FRAMES)[None] * 0.5  # [people, frames]
    boxes, embeddings = (
        np.zeros((batch, FRAMES, FACES, 4), np.float32),
        np.zeros((batch, FRAMES, FACES, WIDTH), np.float32),
    )
    mask, slot = np.zeros((batch, FRAMES, FACES), bool), np.zeros((batch, FRAMES, PEOPLE), int)
    for b in range(batch):
        for t in range(FRAMES):
            slot[b, t] = rng.permutation(FACES)[:PEOPLE]
            for i, k in enumerate(slot[b, t]):
                likeness = references[b, i] + 0.1 * unit(rng, WIDTH)
                embeddings[b, t, k] = likeness / np.linalg.norm(likeness)
                boxes[b, t, k] = [at[i, t], 20, at[i, t] + 14, 36]
                mask[b, t, k] = True
    return dict(
        boxes=boxes,
        embeddings=embeddings,
        face_mask=mask,
        references=references,
        reference_mask=np.ones((batch, PEOPLE), bool),
    ), slot


@functools.partial(jax.jit, static_argnames="config")
def penalties(inputs, config=CONFIG):
    faces = (
        inputs["embeddings"],
        inputs["face_mask"],
        inputs["references"],
        inputs["reference_mask"],
    )
    matches = matching.match_videos(*faces, NULL)
    return tracks.penalties(
        **inputs, matches=matches, size=SIZE, null_similarity=NULL, config=config
    )


def move(inputs, slot, b, t, i, vector):
    """Give person i's face in frame t of video b another embedding."""
    inputs["embeddings"][b, t, slot[b, t, i]] = vector / np.linalg.norm(vector)


def test_an_honest_video_has_no_penalty_and_three_tracks():
    inputs, slot = honest()
    found = penalties(inputs)
    assert {*found, "copied", "confused", "unrecognised"} == set(PENALTIES)
    for name, value in found.items():
        np.testing.assert_allclose(value, 0, atol=1e-6, err_msg=name)
    found = np.asarray(
        tracks.link(
            *(jnp.asarray(inputs[name]) for name in ("boxes", "embeddings", "face_mask")),
            CONFIG.link,
        )
    )
    assert (found[~inputs["face_mask"]] == 2 * FACES).all()
    for b in range(2):
        ids = np.take_along_axis(found[b], slot[b], axis=1)
        assert (ids == ids[0]).all()
        assert len(set(ids[0])) == PEOPLE


def test_people_who_exchange_identities_are_swapped_from_then_on():
    inputs, slot = honest()
    for t in range(6, FRAMES):  # the last quarter; bodies stay, faces exchange
        one, other = (
            inputs["embeddings"][0, t, slot[0, t, 0]].copy(),
            inputs["embeddings"][0, t, slot[0, t, 1]].copy(),
        )
        move(inputs, slot, 0, t, 0, other)
        move(inputs, slot, 0, t, 1, one)
    got = {name: np.asarray(value) for name, value in penalties(inputs).items()}
    np.testing.assert_allclose(got["swapped"], [2 * 2 / (3 * 8), 0], atol=1e-6)
    np.testing.assert_allclose(got["switched"], [2 / 3 / 7, 0], atol=1e-6)
    np.testing.assert_allclose(got["missing"], 0, atol=1e-6)  # everybody is there in every frame


def test_one_face_given_to_two_people_is_a_duplicate_and_leaves_one_missing():
    inputs, slot = honest()
    for t in range(FRAMES):
        move(inputs, slot, 1, t, 2, inputs["references"][1, 0])
    got = {name: np.asarray(value) for name, value in penalties(inputs).items()}
    assert got["duplicated"][1] > 0.9
    assert got["duplicated"][0] == 0
    np.testing.assert_allclose(got["missing"], [0, 1 / 3], atol=1e-6)


def test_two_identities_meeting_half_way_are_blended():
    inputs, slot = honest()
    for t in range(FRAMES):
        half = inputs["references"][0, 0] + inputs["references"][0, 1]
        move(inputs, slot, 0, t, 0, half)
        move(inputs, slot, 0, t, 1, half)
    got = {name: np.asarray(value) for name, value in penalties(inputs).items()}
    np.testing.assert_allclose(got["blended"][0], 2 / 3 * (2**-0.5 - CONFIG.blend), atol=1e-3)
    assert got["blended"][1] == 0


def test_faces_that_are_too_large_or_too_small_leave_the_band():
    inputs, slot = honest()
    for t in range(FRAMES):
        inputs["boxes"][0, t, slot[0, t, 0]] = [0, 0, 64, 64]
        inputs["boxes"][1, t, slot[1, t, 0]] = [10, 10, 10.5, 10.5]
    got = np.asarray(penalties(inputs)["area"])
    np.testing.assert_allclose(got, [1 / 3, (1 - 0.25 / 64**2 / CONFIG.area_low) / 3], atol=1e-5)


def test_a_person_hidden_for_a_while_keeps_the_track():
    inputs, slot = honest()
    inputs["face_mask"][0, 3:5, :] &= np.arange(FACES) != slot[0, 3:5, 1][:, None]
    got = {name: np.asarray(value) for name, value in penalties(inputs).items()}
    np.testing.assert_allclose(got["missing"], [2 / 24, 0], atol=1e-6)
    np.testing.assert_allclose(got["switched"], 0, atol=1e-6)
    np.testing.assert_allclose(got["swapped"], 0, atol=1e-6)


def test_order_and_padding_change_nothing():
    inputs, _ = honest(3)
    rng = np.random.default_rng(4)
    base, k, p = penalties(inputs), rng.permutation(FACES), rng.permutation(PEOPLE)
    shuffled = {
        name: value[:, :, k] if name in ("boxes", "embeddings", "face_mask") else value[:, p]
        for name, value in inputs.items()
    }
    padded = dict(inputs)
    padded |= {
        name: np.concatenate([inputs[name], inputs[name][:, :, :1]], 2)
        for name in ("boxes", "embeddings")
    }
    padded["face_mask"] = np.pad(inputs["face_mask"], ((0, 0), (0, 0), (0, 1)))
    padded["references"] = np.concatenate([inputs["references"], unit(rng, 2, 1, WIDTH)], 1)
    padded["reference_mask"] = np.pad(inputs["reference_mask"], ((0, 0), (0, 1)))
    for changed in (shuffled, padded):
        for name, value in penalties(changed).items():
            np.testing.assert_allclose(value, base[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("frames", [1, 3])
def test_finite_and_within_bounds_whatever_is_there(frames):
    rng = np.random.default_rng(5)
    corner = rng.uniform(0, 40, (4, frames, FACES, 2))
    inputs = dict(
        boxes=np.concatenate([corner, corner + rng.uniform(0, 24, corner.shape)], -1).astype(
            np.float32
        ),
        embeddings=unit(rng, 4, frames, FACES, WIDTH),
        face_mask=rng.random((4, frames, FACES)) < 0.6,
        references=unit(rng, 4, PEOPLE, WIDTH),
        reference_mask=np.ones((4, PEOPLE), bool),
    )
    inputs["face_mask"][0] = False  # nobody at all
    inputs["reference_mask"][1, 1:] = False
    for name, value in penalties(inputs).items():
        assert np.isfinite(value).all(), name
        assert (value >= 0).all(), name
        assert (value <= 1 + 1e-6).all(), name
    assert penalties(inputs)["missing"][0] == 1
