"""The cast: people are functions of their ids, and the truth of a clip agrees with its pixels."""

import csv
import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import cli
from jax_idgrpo.errors import UserError
from jax_idgrpo.synthetic import captions, renderer, scenes
from jax_idgrpo.synthetic.people import SPLITS, identity

FRAMES, ROWS = 3, 24


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
    """A few dozen pictures: compiling with all optimisations would take far longer than drawing saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def drawn() -> scenes.Batch:
    return jax.device_get(scenes.batch(5, 2, ROWS, "train", frames=FRAMES))


@jax.jit
def clips(people, mask, scene):
    return jax.vmap(lambda p, m, s: scenes.render_clip(p, m, s, frames=FRAMES))(people, mask, scene)


@jax.jit
def portraits(people, keys):
    return jax.vmap(jax.vmap(renderer.render_portrait))(people, keys)


def as_arrays(tree):
    """Leaves on the device, as the functions of the cast take them."""
    return jax.tree.map(jnp.asarray, tree)


def slots(drawn):
    """(row, frame, slot) of every present person."""
    return [
        (b, f, m) for b in range(ROWS) for f in range(FRAMES) for m in np.flatnonzero(drawn.mask[b])
    ]


def test_batches_are_pure_functions_of_seed_and_step(drawn):
    again = scenes.batch(5, 2, ROWS, "train", frames=FRAMES)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), drawn)
    later = jax.device_get(scenes.batch(5, 3, ROWS, "train", frames=FRAMES))
    assert not np.array_equal(later.ids, drawn.ids)
    assert not np.array_equal(later.video, drawn.video)


def test_an_identity_does_not_depend_on_its_company():
    together = identity(jnp.array([[3, 2_000_007], [41, 3]]))
    alone = identity(jnp.array([3]))
    for both, one in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
        np.testing.assert_array_equal(both[0, 0], one[0])
        np.testing.assert_array_equal(both[1, 1], one[0])


def test_shapes_and_ranges(drawn):
    assert drawn.video.shape == (ROWS, FRAMES, 64, 64, 3)
    assert drawn.portraits.shape == (
        ROWS,
        3,
        64,
        64,
        3,
    )
    assert drawn.video.dtype == drawn.portraits.dtype == drawn.boxes.dtype == np.float32
    for pixels in (drawn.video, drawn.portraits):
        assert np.isfinite(pixels).all()
        assert pixels.min() >= -1
        assert pixels.max() <= 1
    assert ((drawn.visible >= 0) & (drawn.visible <= 1)).all()
    assert (drawn.mask[:, 0]).all()
    assert {1, 2, 3} == set(drawn.mask.sum(1).tolist())
    for row, mask in zip(drawn.ids, drawn.mask):
        assert len(set(row[mask].tolist())) == mask.sum()


def test_absent_people_leave_no_trace(drawn):
    gone = ~drawn.mask
    assert (drawn.portraits[gone] == 1).all()
    assert (drawn.ids[gone] == -1).all()
    for truth in (drawn.boxes, drawn.landmarks, drawn.visible):
        assert (np.moveaxis(truth, 1, 0)[:, gone] == 0).all()
    # Who stands in an empty slot must not matter.
    drawn = as_arrays(drawn)
    strangers = identity(jnp.where(drawn.mask, drawn.ids, 77))
    np.testing.assert_allclose(
        clips(strangers, drawn.mask, drawn.scene).video, drawn.video, atol=1e-3
    )


def test_splits_are_disjoint_and_kept():
    ranges = sorted(SPLITS.values())
    assert all(last <= first for (_, last), (first, _) in itertools.pairwise(ranges))
    for split, (first, last) in SPLITS.items():
        ids = np.asarray(scenes.sample_ids(jax.random.key(1), 500, split))
        assert ids.min() >= first
        assert ids.max() < last
        assert all(len(set(row)) == 3 for row in ids.tolist())


def test_number_of_people_follows_its_shares():
    count = np.asarray(scenes.sample_mask(jax.random.key(2), 4000).sum(1))
    assert np.abs(np.bincount(count, minlength=4)[1:] / 4000 - (0.3, 0.5, 0.2)).max() < 0.03


def test_landmarks_lie_in_their_box_in_order(drawn):
    for b, f, m in slots(drawn):
        (x0, y0, x1, y1), points = drawn.boxes[b, f, m], drawn.landmarks[b, f, m]
        assert (points > (x0, y0)).all()
        assert (points < (x1, y1)).all()
        left_eye, right_eye, nose, left_mouth, right_mouth = points
        assert left_eye[0] < right_eye[0]
        assert left_mouth[0] < right_mouth[0]
        assert max(left_eye[1], right_eye[1]) < nose[1] < max(left_mouth[1], right_mouth[1])
        assert 10 < x1 - x0 < 36
        assert 14 < y1 - y0 < 44


def test_box_agrees_with_the_pixels_of_the_face(drawn):
    """Green skin and nothing else green: the green pixels of a person alone lie in the box, or are a raised hand."""
    drawn = as_arrays(drawn)
    green = jnp.array([0.0, 1.0, 0.0])
    paint = {
        name: jnp.zeros_like(drawn.people.skin)
        for name in ("hair", "eye", "lips", "clothes", "trim", "hat", "frame")
    }
    people = dataclasses.replace(
        drawn.people, skin=jnp.broadcast_to(green, drawn.people.skin.shape), **paint
    )
    white = dataclasses.replace(
        drawn.scene.light, colour=jnp.ones((ROWS, 3)), direction=jnp.zeros(ROWS)
    )
    scene = dataclasses.replace(drawn.scene, light=white, background=jnp.zeros(ROWS, jnp.int32))
    clip = jax.device_get(clips(people, drawn.mask, scene))
    alone = drawn.mask.sum(1) == 1
    assert alone.sum() >= 3
    for b in np.flatnonzero(alone):
        x0, _, x1, y1 = clip.boxes[b, 0, 0]
        face = (clip.video[b, 0, ..., 1] > 0.75) & (clip.video[b, 0, ..., 0] < 0)
        rows, columns = np.nonzero(face)
        inside = (columns > x0 - 2) & (columns < x1 + 2) & (rows < y1 + 2)
        assert inside.mean() > 0.85  # the rest is a raised hand
        assert face[int((clip.boxes[b, 0, 0, 1] + y1) / 2) :, :].any()


def test_skin_at_the_nose_is_the_persons_skin(drawn):
    """Between the nose and the eyes there is skin of that person, in the light of the scene."""
    errors = []
    for b, f, m in slots(drawn):
        if drawn.visible[b, f, m] < 0.99:
            continue
        left, right, nose = drawn.landmarks[b, f, m, :3]
        x, y = 0.35 * (left + right) / 2 + 0.65 * nose
        pixel = (drawn.video[b, f, int(y), int(x)] + 1) / 2
        skin = drawn.people.skin[b, m] * drawn.scene.light.colour[b]
        errors.append(np.abs(pixel / pixel.sum() - skin / skin.sum()).max())
    assert len(errors) > 20
    assert np.median(errors) < 0.03


def test_removing_a_person_changes_only_their_surroundings(drawn):
    drawn, second = as_arrays(drawn), jnp.array([False, True, False])
    without = jax.device_get(clips(drawn.people, drawn.mask & ~second, drawn.scene))
    pairs = np.flatnonzero(drawn.mask.sum(1) == 2)
    assert len(pairs) >= 5
    for b in pairs:
        changed = np.abs(without.video[b] - drawn.video[b]).max(-1) > 1e-3
        x0, y0, x1, y1 = np.moveaxis(np.asarray(drawn.boxes[b, :, 1]), -1, 0)[..., None]
        near = np.abs(np.arange(64) - (x0 + x1) / 2) < 2.2 * (x1 - x0)
        above = np.arange(64) < y0 - 0.8 * (y1 - y0)
        assert changed.any()
        assert not (changed & ~near[:, None, :]).any()
        assert not (changed & above[:, :, None]).any()
        np.testing.assert_allclose(without.boxes[b, :, 0], drawn.boxes[b, :, 0], atol=1e-3)


def test_covered_people_are_less_visible(drawn):
    """Two people at one place: the nearer is seen whole, the other hardly."""
    drawn = as_arrays(drawn)
    still = {
        name: getattr(drawn.scene, name).at[:, :, :3].set(0) for name in ("slope", "amplitude")
    }
    base = drawn.scene.base.at[:, :, :3].set(jnp.array([32.0, 28.0, 13.0]))
    scene = dataclasses.replace(
        drawn.scene, base=base, depth=jnp.tile(jnp.array([1.0, 2.0, 0.0]), (ROWS, 1)), **still
    )
    visible = np.asarray(
        clips(drawn.people, jnp.tile(jnp.array([True, True, False]), (ROWS, 1)), scene).visible
    )
    near, far = visible[..., 1], visible[..., 0]  # a wide face shows at the sides of a narrow one
    assert near.min() > 0.93
    assert far.max() < 0.5
    assert np.median(far) < 0.15
    assert (visible[..., 2] == 0).all()


def test_people_move_and_the_background_stays(drawn):
    centre = (drawn.boxes[..., :2] + drawn.boxes[..., 2:]) / 2
    travelled = np.linalg.norm(np.diff(centre, axis=1), axis=-1).sum(1)[drawn.mask]
    assert travelled.min() > 0.05
    assert np.median(travelled) > 1.0  # pixels in a quarter of a second
    difference = np.abs(np.diff(drawn.video, axis=1))
    assert (difference.mean((1, 2, 3, 4)) > 0.002).all()
    corner = difference[:, :, :3, :3]
    assert np.median(corner) < 1e-6


def test_different_people_look_different_and_the_same_alike(drawn):
    """The nearest photo among those of everybody, by plain pixels, is mostly another photo of the same person."""
    keys = jax.random.split(jax.random.key(1), (ROWS, 3))
    other = np.asarray(portraits(as_arrays(drawn.people), keys))[drawn.mask]
    first = drawn.portraits[drawn.mask]
    distance = np.abs(first[:, None] - other[None]).mean((2, 3, 4))
    assert (distance.argmin(1) == np.arange(len(first))).mean() > 0.8
    assert (np.diagonal(distance) > 0).all()
    assert (first[:, 0, 0] == 1).all()
    assert (first[:, 0, -1] == 1).all()


def test_portrait_and_clip_show_the_same_colours(drawn):
    """The hue of the face in a clip is nearer to the own portrait than to the other person's, when their skins differ."""
    right = total = 0
    for b in np.flatnonzero(drawn.mask.sum(1) >= 2):
        skins = drawn.people.skin[b, :2]
        if np.abs(skins[0] - skins[1]).max() < 0.25:
            continue
        for m in range(2):
            if drawn.visible[b, 0, m] < 0.9:
                continue
            left, eye, nose = drawn.landmarks[b, 0, m, :3]
            x, y = np.clip(0.35 * (left + eye) / 2 + 0.65 * nose, 0, 63)
            seen = (drawn.video[b, 0, int(y), int(x)] + 1) / 2 / drawn.scene.light.colour[b]
            photos = (drawn.portraits[b, :2, 34:40, 29:35].mean((1, 2)) + 1) / 2
            right += np.abs(photos - seen).sum(1).argmin() == m
            total += 1
    assert total >= 4
    assert right / total > 0.75


def test_the_truth_of_a_portrait(drawn):
    keys = jax.random.split(jax.random.key(4), (ROWS, 3))
    boxes, points = jax.jit(jax.vmap(jax.vmap(renderer.portrait_truth)))(
        as_arrays(drawn.people), keys
    )
    width = boxes[..., 2] - boxes[..., 0]
    assert (width > 24).all()
    assert (width < 42).all()
    assert (points > boxes[..., None, :2]).all()
    assert (points < boxes[..., None, 2:]).all()


def test_other_sizes_show_the_same_scene(drawn):
    people, mask, scene = as_arrays((drawn.people, drawn.mask, drawn.scene))
    large = jax.jit(jax.vmap(lambda p, m, s: scenes.render_clip(p, m, s, 1, (128, 128))))(
        people, mask, scene
    )
    np.testing.assert_allclose(large.boxes[:, 0], 2 * drawn.boxes[:, 0], atol=1e-3)
    np.testing.assert_allclose(large.visible[:, 0], drawn.visible[:, 0], atol=0.05)
    halved = np.asarray(large.video)[:, 0].reshape(ROWS, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(halved - drawn.video[:, 0]).mean() < 0.03


def test_wide_clips_are_closer_and_calmer(drawn):
    wide = jax.device_get(scenes.batch(5, 2, ROWS, "train", FRAMES, (64, 96)))
    seen = drawn.mask[:, None] & (drawn.visible > 0.9) & (wide.visible > 0.9)
    height, square = (b.boxes[..., 3] - b.boxes[..., 1] for b in (wide, drawn))
    assert np.quantile(height[seen], 0.05) > 27
    assert np.median(height[seen] / square[seen]) > 1.2
    moved = [
        np.abs(np.diff(b.boxes, axis=1))[drawn.mask[:, None].repeat(2, 1)] for b in (wide, drawn)
    ]
    assert moved[0].mean() < 0.8 * moved[1].mean()
    # A photo is the square photo with white at both sides.
    np.testing.assert_allclose(wide.portraits[:, :, :, 16:80], drawn.portraits, atol=2e-3)
    assert (wide.portraits[:, :, :8, :8] > 0.99).all()


def test_prompts_use_the_vocabulary_and_name_what_is_drawn(drawn):
    words = captions.vocabulary()
    assert len(words) < 200
    assert words == sorted(set(words))
    assert all(re.fullmatch("[a-z]+", word) for word in words)
    texts = captions.prompts(drawn)
    assert len(texts) == ROWS
    assert len(set(texts)) == ROWS
    for text, mask in zip(texts, drawn.mask):
        assert set(re.findall(r"[^\s.,:]+", text)) <= set(words)
        assert text.split()[0] == ("one", "two", "three")[mask.sum() - 1]
        assert len(re.findall(r"\bperson with\b", text)) == mask.sum()


def test_every_word_can_be_said():
    key = jax.random.key(3)
    mask = scenes.sample_mask(key, 400)
    several = jax.jit(jax.vmap(scenes.sample_scene))(jax.random.split(key, 400), mask)
    told = jax.device_get((several, identity(scenes.sample_ids(key, 400, "train")), mask))
    texts = [captions.prompt(*jax.tree.map(lambda leaf: leaf[k], told)) for k in range(400)]
    assert set(re.findall("[a-z]+", " ".join(texts))) == set(captions.vocabulary())


def test_written_prompts_are_read_back(tmp_path):
    out = tmp_path / "set" / "eval"
    cli.run(["draw-prompts", "--out", str(out), "--split", "eval", "--count", "4", "--seed", "1"])
    with (out / "prompts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        names = row["ref_paths"].split(";")
        assert row["prompt"].split()[0] == ("one", "two", "three")[len(names) - 1]
        for name in names:
            pixels = np.asarray(Image.open(out / name))
            assert pixels.shape == (64, 64, 3)
            assert (pixels[0, 0] == 255).all()
            assert pixels.std() > 20
    assert [path.name for path in out.parent.iterdir()] == ["eval"]
    cli.run(
        [
            "draw-prompts",
            "--out",
            str(tmp_path / "again"),
            "--split",
            "eval",
            "--count",
            "4",
            "--seed",
            "1",
        ]
    )
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_takes_share_people_photos_and_prompts_and_nothing_else():
    one, other, again = (scenes.batch(1, 0, 12, "eval", variant=variant) for variant in (0, 1, 1))
    assert captions.prompts(one) == captions.prompts(other)
    for name in ("portraits", "portrait_boxes", "ids", "mask"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(other.video, again.video)
    np.testing.assert_array_equal(one.video, scenes.batch(1, 0, 12, "eval").video)
    assert (np.abs(one.video - other.video).mean((1, 2, 3, 4)) > 0.02).all()


def test_mistakes_get_one_line(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        captions.write_prompts(tmp_path / "there", "rl", 2)
    for split, count, says in (("test", "2", "train, rl, eval"), ("rl", "0", "--count 0")):
        with pytest.raises(UserError, match=says):
            cli.run(
                ["draw-prompts", "--out", str(tmp_path / "x"), "--split", split, "--count", count]
            )
    assert not (tmp_path / "x").exists()
