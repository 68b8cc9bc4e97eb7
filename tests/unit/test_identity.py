"""The identity reward: exact matching and the properties its users rely on."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jax_idgrpo.rewards import identity, matching
from tests.helpers.identity_cases import case, terms


@pytest.mark.parametrize(("people", "faces"), [(1, 1), (2, 5), (3, 8), (8, 8), (3, 2)])
def test_matching_equals_the_assignment_oracle(people, faces):
    rng = np.random.default_rng(people * 10 + faces)
    null = 0.15
    similarity = rng.uniform(-0.5, 1, (20, people, faces)).astype(np.float32)
    reference_mask, face_mask = rng.random((20, people)) < 0.8, rng.random((20, faces)) < 0.7
    found = np.asarray(
        matching.match(
            jnp.asarray(similarity), jnp.asarray(reference_mask), jnp.asarray(face_mask), null
        )
    )
    for s, rows, columns, indices in zip(similarity, reference_mask, face_mask, found, strict=True):
        allowed = np.where(rows[:, None] & columns, s, -100.0)
        table = np.concatenate([allowed, np.full((people, people), null)], 1)
        best = table[linear_sum_assignment(table, maximize=True)].sum()
        used = [k for k in indices if k < faces]
        assert len(set(used)) == len(used)
        value = sum(allowed[i, k] if k < faces else null for i, k in enumerate(indices))
        assert value == pytest.approx(best, abs=1e-5)


def test_a_missing_person_counts_zero_and_adding_them_back_helps():
    inputs = case(noise=0.05) | {"face_mask": np.ones((3, 4, 5), bool)}
    inputs["face_mask"][:, :, 3:] = False
    inputs["reference_mask"][:] = True
    full = terms(inputs)
    gone = inputs | {"face_mask": inputs["face_mask"].copy()}
    gone["face_mask"][:, :, 1] = False
    without = terms(gone)
    np.testing.assert_allclose(without["identity_mean"], full["identity_mean"] * 2 / 3, atol=0.02)
    assert (without["identity_soft_min"] < 0.15).all()
    assert (full["identity_soft_min"] > 0.9).all()
    assert (without["reward"] < full["reward"]).all()
    np.testing.assert_allclose(without["faces_found"], 2)
    np.testing.assert_allclose(full["faces_found"], 3)


def test_soft_minimum_lies_between_minimum_and_mean():
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 1, (50, 4)).astype(np.float32)
    mask = rng.random((50, 4)) < 0.7
    mask[:, 0] = True
    soft = np.asarray(identity.soft_minimum(jnp.asarray(values), jnp.asarray(mask), 10.0))
    for row, keep, s in zip(values, mask, soft, strict=True):
        assert row[keep].min() - 1e-6 <= s <= row[keep].mean() + 1e-6
        assert s == pytest.approx(-math.log(np.mean(np.exp(-10.0 * row[keep]))) / 10, abs=1e-5)


def test_motion_ignores_what_happens_inside_faces():
    videos = np.zeros((1, 2, 8, 8, 3), np.float32)
    videos[0, 1, 2:5, 2:5] = 1.0
    boxes = np.asarray([2, 2, 4, 4], np.float32).reshape(1, 1, 1, 4).repeat(2, 1)
    videos, boxes, mask = jnp.asarray(videos), jnp.asarray(boxes), jnp.ones((1, 2, 1), bool)
    assert float(identity.motion(*identity.changes(videos, boxes, mask))[0]) == 0
    assert float(identity.motion(*identity.changes(videos, boxes, ~mask))[0]) == pytest.approx(
        9 / 64
    )


def test_a_video_that_comes_to_a_standstill_has_stalled_for_a_share_of_its_steps():
    moving = np.random.default_rng(0).uniform(-1, 1, (1, 5, 8, 8, 3)).astype(np.float32)
    boxes, mask = jnp.zeros((1, 5, 1, 4)), jnp.zeros((1, 5, 1), bool)
    for last in range(5):
        video = jnp.asarray(moving[:, np.minimum(np.arange(5), last)])
        assert float(
            identity.stalled(*identity.changes(video, boxes, mask), 0.01)[0]
        ) == pytest.approx(1 - last / 4)
    slow = jnp.asarray(moving[:, :1]) * 0 + 0.005 * jnp.arange(5.0)[:, None, None, None]
    assert float(identity.stalled(*identity.changes(slow, boxes, mask), 0.02)[0]) == pytest.approx(
        0.75, abs=1e-5
    )
    assert (
        float(identity.stalled(*identity.changes(slow[:, :1], boxes[:, :1], mask[:, :1]), 0.02)[0])
        == 0
    )


def test_frames_with_the_right_count():
    shown = np.zeros((1, 4, 3), bool)
    shown[0, 0, :2] = shown[0, 1, :1] = shown[0, 2, :3] = True
    asked = jnp.asarray([[True, True, False]])
    assert float(identity.count_accuracy(jnp.asarray(shown), asked)[0]) == 0.25


def test_largest_face_sees_one_person_and_skips_frames_without_any():
    """Two people asked for; the first is large in frame 0 and alone in frame 1, where a stranger is larger; nobody is in frame 2."""
    references = np.eye(3, dtype=np.float32)[None, :2]
    embeddings = np.zeros((1, 3, 2, 3), np.float32)
    embeddings[0, 0] = [[0.8, 0, 0.6], [0, 1, 0]]
    embeddings[0, 1] = [[1, 0, 0], [-0.6, -0.8, 0]]
    boxes = np.zeros((1, 3, 2, 4), np.float32)
    boxes[0, 0, :, 2:] = [[9, 9], [5, 5]]
    boxes[0, 1, :, 2:] = [[5, 5], [9, 9]]
    mask = np.asarray([[[True, True], [True, True], [False, False]]])
    given = [
        jnp.asarray(array) for array in (boxes, embeddings, mask, references, np.ones((1, 2), bool))
    ]
    assert float(identity.largest_face_similarity(*given)[0]) == pytest.approx((0.8 + 0) / 2)
    given[2] = jnp.zeros_like(given[2])
    assert float(identity.largest_face_similarity(*given)[0]) == 0
