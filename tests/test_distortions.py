"""Tricks and faults on clips: they do what they are named after, where they are asked to, and leave what they are given as it was."""

import dataclasses

import numpy as np
import pytest

from jax_idgrpo.data import distortions
from jax_idgrpo.data.distortions import DISTORTIONS, Subject

FRAMES, SIZE = 4, 32
BOXES = np.array([[2.0, 6, 12, 18], [18.0, 8, 28, 20], [0.0, 0, 0, 0]], np.float32)
COLOURS = np.array([[-0.8, 0.1, 0.2], [0.7, -0.3, 0.6]], np.float32)
PHOTO_COLOURS = np.array([[0.9, 0.9, -0.9], [-0.5, 0.4, 0.8]], np.float32)


@pytest.fixture
def subject() -> Subject:
    """Two people of one colour each in front of noise that moves; the third is absent. Their photos have other colours."""
    video = np.random.default_rng(0).uniform(-0.2, 0.2, (FRAMES, SIZE, SIZE, 3)).astype(np.float32)
    boxes = np.repeat(BOXES[None], FRAMES, axis=0)
    photos = np.ones((3, 16, 16, 3), np.float32)
    for i in range(2):
        boxes[:, i, ::2] += np.arange(FRAMES)[:, None]
        for t in range(FRAMES):
            x0, y0, x1, y1 = boxes[t, i].astype(int)
            video[t, y0:y1, x0:x1] = COLOURS[i]
        photos[i, 4:12, 4:12] = PHOTO_COLOURS[i]
    return Subject(video, boxes, np.array([True, True, False]), photos, np.repeat([[4.0, 4, 12, 12]], 3, axis=0).astype(np.float32))


def middle(subject, video, t, i):
    """The pixel in the middle of a face."""
    x, y = (subject.boxes[t, i, :2] + subject.boxes[t, i, 2:]) / 2
    return video[t, int(y), int(x)]


@pytest.mark.parametrize("name", DISTORTIONS)
def test_the_clip_given_stays_as_it_is_and_strength_0_changes_nothing(subject, name):
    before = subject.video.copy()
    changed = DISTORTIONS[name](subject)
    assert changed.shape == before.shape and changed.dtype == np.float32 and np.abs(changed).max() <= 1
    np.testing.assert_array_equal(subject.video, before)
    assert np.abs(changed - before).max() > 0.1
    np.testing.assert_allclose(DISTORTIONS[name](subject, 0.0), before, atol=1e-6)


def test_each_does_what_it_is_named_after(subject):
    made = {name: trick(subject) for name, trick in DISTORTIONS.items()}
    for t in range(FRAMES):
        seen = {name: [middle(subject, video, t, i) for i in range(2)] for name, video in made.items()}
        np.testing.assert_allclose(seen["paste"], PHOTO_COLOURS, atol=1e-5)
        np.testing.assert_allclose(seen["duplicate"], COLOURS[[0, 0]], atol=1e-5)
        np.testing.assert_allclose(seen["average"], [COLOURS.mean(0)] * 2, atol=1e-5)
        np.testing.assert_allclose(seen["swap"], COLOURS if t < FRAMES // 2 else COLOURS[::-1], atol=1e-5)
        np.testing.assert_allclose(seen["hide"], [COLOURS[0], subject.video[t].mean((0, 1))], atol=1e-5)
        np.testing.assert_array_equal(made["freeze"][t], subject.video[0])
        area = [(np.abs(video[t] - COLOURS[0]).max(-1) < 1e-4).sum() for video in (subject.video, made["enlarge"])]
        assert area[1] > 1.5 * area[0]


@pytest.mark.parametrize("name", sorted(set(DISTORTIONS) - {"freeze", "enlarge", "hide"}))
def test_nothing_but_faces_changes(subject, name):
    outside = np.ones((FRAMES, SIZE, SIZE), bool)
    for t in range(FRAMES):
        for x0, y0, x1, y1 in subject.boxes[t, :2].astype(int):
            outside[t, y0:y1, x0:x1] = False
    np.testing.assert_array_equal(DISTORTIONS[name](subject)[outside], subject.video[outside])


@pytest.mark.parametrize("name", ["duplicate", "average", "swap"])
def test_one_person_alone_has_nobody_to_be_mixed_with(subject, name):
    alone = dataclasses.replace(subject, mask=np.array([True, False, False]))
    np.testing.assert_array_equal(DISTORTIONS[name](alone), subject.video)


@pytest.mark.parametrize("box", [[-5.0, -5, 6, 6], [28.0, 28, 40, 40], [50.0, 50, 60, 60], [4.0, 4, 4, 9]])
def test_a_face_that_reaches_outside_the_picture_is_cut(box):
    frame = np.zeros((SIZE, SIZE, 3), np.float32)
    distortions.put(frame, np.array(box), np.ones((8, 8, 3), np.float32), np.array([0.0, 0, 8, 8]))
    x0, y0, x1, y1 = np.clip(box, 0, SIZE).astype(int)
    painted = frame[..., 0] > 0
    assert painted.any() == (x1 > x0 and y1 > y0) and painted.sum() == painted[y0:y1, x0:x1].sum()


def test_a_face_put_where_it_was_is_the_same():
    frame = np.random.default_rng(1).uniform(-1, 1, (SIZE, SIZE, 3)).astype(np.float32)
    again, box = frame.copy(), np.array([3.3, 4.1, 21.7, 25.9])
    distortions.put(again, box, frame, box)
    np.testing.assert_allclose(again, frame, atol=1e-5)
