"""Tricks and faults on clips: they do what they are named after, where they are asked to, and leave what they are given as it was."""

import functools

import numpy as np
import pytest

from jax_idgrpo.preferences import corruptions
from jax_idgrpo.preferences.corruptions import (
    DISTORTIONS,
    DISTRACTOR,
    NUISANCES,
    TOGETHER,
    TRICKS,
    AnnotatedClip,
    pasted,
)

FRAMES, SIZE = 4, 32
BOXES = np.array([[2.0, 6, 12, 18], [18.0, 8, 28, 20], [0.0, 0, 0, 0]], np.float32)
COLOURS = np.array([[-0.8, 0.1, 0.2], [0.7, -0.3, 0.6]], np.float32)
STRANGE = np.array([-0.2, 0.9, -0.7], np.float32)
PHOTO_COLOURS = np.array([[0.9, 0.9, -0.9], [-0.5, 0.4, 0.8]], np.float32)


@pytest.fixture
def clip() -> AnnotatedClip:
    """Two people of one colour each before moving noise, and an absent third; photos and distractor have other colours."""
    video = np.random.default_rng(0).uniform(-0.2, 0.2, (FRAMES, SIZE, SIZE, 3)).astype(np.float32)
    boxes = np.repeat(BOXES[None], FRAMES, axis=0)
    photos = np.ones((3, 16, 16, 3), np.float32)
    for i in range(2):
        boxes[:, i, ::2] += np.arange(FRAMES)[:, None]
        for t in range(FRAMES):
            x0, y0, x1, y1 = boxes[t, i].astype(int)
            video[t, y0:y1, x0:x1] = COLOURS[i]
        photos[i, 4:12, 4:12] = PHOTO_COLOURS[i]
    photo_boxes = np.repeat([[4.0, 4, 12, 12]], 3, axis=0).astype(np.float32)
    return with_video(
        AnnotatedClip(
            video, boxes, np.array([True, True, False]), photos, photo_boxes, lambda faces: video
        ),
        video,
    )


def with_video(clip, video, distractor=STRANGE):
    """The same people in another clip, and somebody else of one colour."""
    others = (
        np.broadcast_to(distractor, (FRAMES, 8, 8, 3)),
        np.repeat([[0.0, 0, 8, 8]], FRAMES, axis=0).astype(np.float32),
    )
    return clip.replace(
        video=video, swap_faces=functools.partial(pasted, video, clip.boxes, *others)
    )


def middle(clip, video, t, i):
    """The pixel in the middle of a face."""
    x, y = (clip.boxes[t, i, :2] + clip.boxes[t, i, 2:]) / 2
    return video[t, int(y), int(x)]


@pytest.mark.parametrize("name", DISTORTIONS)
def test_the_clip_given_stays_as_it_is_and_strength_0_changes_nothing(clip, name):
    before = clip.video.copy()
    changed = DISTORTIONS[name](clip)
    assert changed.shape == before.shape
    assert changed.dtype == np.float32
    assert np.abs(changed).max() <= 1
    np.testing.assert_array_equal(clip.video, before)
    assert np.abs(changed - before).max() > 0.1
    np.testing.assert_allclose(DISTORTIONS[name](clip, 0.0), before, atol=1e-6)


def test_each_does_what_it_is_named_after(clip):
    made = {name: distort(clip) for name, distort in DISTORTIONS.items()}
    for t in range(FRAMES):
        seen = {name: [middle(clip, video, t, i) for i in range(2)] for name, video in made.items()}
        np.testing.assert_allclose(seen["paste"], PHOTO_COLOURS, atol=1e-5)
        np.testing.assert_allclose(seen["duplicate"], COLOURS[[0, 0]], atol=1e-5)
        np.testing.assert_allclose(seen["blend"], [COLOURS.mean(0)] * 2, atol=1e-5)
        np.testing.assert_allclose(
            seen["swap"], COLOURS if t < FRAMES // 2 else COLOURS[::-1], atol=1e-5
        )
        np.testing.assert_allclose(
            seen["drop"], [COLOURS[0], clip.video[t].mean((0, 1))], atol=1e-5
        )
        np.testing.assert_allclose(seen["replace"], [COLOURS[0], STRANGE], atol=1e-5)
        share = t / (FRAMES - 1)
        np.testing.assert_allclose(
            seen["drift"], [COLOURS[0], (1 - share) * COLOURS[1] + share * STRANGE], atol=1e-5
        )
        np.testing.assert_array_equal(made["freeze"][t], clip.video[0])
        area = [
            (np.abs(video[t] - COLOURS[0]).max(-1) < 1e-4).sum()
            for video in (clip.video, made["enlarge"])
        ]
        assert area[1] > 1.5 * area[0]


def test_blur_takes_details_from_faces(clip):
    noisy = with_video(
        clip, np.random.default_rng(2).uniform(-0.9, 0.9, clip.video.shape).astype(np.float32)
    )
    left, top, right, bottom = noisy.boxes[0, 0].astype(int)
    detail = [
        corruptions.blur(noisy, q)[0, top + 3 : bottom - 3, left + 3 : right - 3].std()
        for q in (0.0, 0.4, 1.0)
    ]
    assert detail[0] > 1.3 * detail[1] > 1.3 * detail[2]


@pytest.mark.parametrize("name", DISTORTIONS)
def test_more_strength_is_further_from_the_clip(clip, name):
    clip = with_video(
        clip, np.random.default_rng(3).uniform(-0.9, 0.9, clip.video.shape).astype(np.float32)
    )
    away = [np.abs(DISTORTIONS[name](clip, q) - clip.video).mean() for q in (0.0, 0.2, 0.6, 1.0)]
    assert (np.diff(away) >= 0).all(), away
    assert 0 < away[1] < away[3], away


@pytest.mark.parametrize(("name", "frames"), [("drop", 2), ("duplicate", 2), ("swap", 1)])
def test_strength_is_a_share_of_the_clip(clip, name, frames):
    changed = np.abs(DISTORTIONS[name](clip, 0.5) - clip.video).max((1, 2, 3)) > 0.1
    assert changed.tolist() == [False] * (FRAMES - frames) + [True] * frames


@pytest.mark.parametrize("name", sorted(set(DISTORTIONS) - {"freeze", "enlarge", "drop"}))
def test_nothing_but_faces_changes(clip, name):
    outside = np.ones((FRAMES, SIZE, SIZE), bool)
    for t in range(FRAMES):
        for x0, y0, x1, y1 in clip.boxes[t, :2].astype(int):
            outside[t, y0:y1, x0:x1] = False
    np.testing.assert_array_equal(DISTORTIONS[name](clip)[outside], clip.video[outside])


def test_what_needs_others_is_listed(clip):
    alone = clip.replace(mask=np.array([True, False, False]))
    lone = with_video(clip, clip.video, distractor=COLOURS[1])
    for name, distort in DISTORTIONS.items():
        assert np.array_equal(distort(alone), clip.video) == (name in TOGETHER), name
        assert np.array_equal(distort(lone), distort(clip)) == (name not in ("replace", "drift")), (
            name
        )
    assert set(TRICKS) < set(DISTORTIONS)


def test_faces_are_pasted_where_they_are_asked_for(clip):
    for faces, expected in (
        ({}, COLOURS),
        ({0: 1, 1: 0}, COLOURS[::-1]),
        ({0: DISTRACTOR, 1: 0}, [STRANGE, COLOURS[0]]),
    ):
        changed = clip.swap_faces(faces)
        for t in range(FRAMES):
            np.testing.assert_allclose(
                [middle(clip, changed, t, i) for i in range(2)], expected, atol=1e-5
            )


@pytest.mark.parametrize("name", NUISANCES)
def test_a_nuisance_is_a_small_change_of_everything(name):
    x, y = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE))
    slope = np.stack([x, y, np.sin(6 * x * y)], -1).astype(np.float32) * 0.7
    video = np.stack([np.roll(slope, 2 * t, axis=1) for t in range(FRAMES)])
    before, direction = video.copy(), np.array([0.8, -0.6, 0.7, -0.9])
    little, much = (NUISANCES[name](video, q, direction) for q in (0.3, 1.0))
    np.testing.assert_array_equal(video, before)
    assert much.shape == video.shape
    assert much.dtype == np.float32
    assert np.abs(much).max() <= 1
    assert 0 < np.abs(little - video).mean() < np.abs(much - video).mean() < 0.25


@pytest.mark.parametrize(
    "box", [[-5.0, -5, 6, 6], [28.0, 28, 40, 40], [50.0, 50, 60, 60], [4.0, 4, 4, 9]]
)
def test_a_face_that_reaches_outside_the_picture_is_cut(box):
    frame = np.zeros((SIZE, SIZE, 3), np.float32)
    corruptions.put(frame, np.array(box), np.ones((8, 8, 3), np.float32), np.array([0.0, 0, 8, 8]))
    x0, y0, x1, y1 = np.clip(box, 0, SIZE).astype(int)
    painted = frame[..., 0] > 0
    assert painted.any() == (x1 > x0 and y1 > y0)
    assert painted.sum() == painted[y0:y1, x0:x1].sum()


def test_a_face_put_where_it_was_is_the_same():
    frame = np.random.default_rng(1).uniform(-1, 1, (SIZE, SIZE, 3)).astype(np.float32)
    again, box = frame.copy(), np.array([3.3, 4.1, 21.7, 25.9])
    corruptions.put(again, box, frame, box)
    np.testing.assert_allclose(again, frame, atol=1e-5)
