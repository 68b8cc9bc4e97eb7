"""The face stack: geometry, decoding, stored networks, and the reward on drawn people nobody trained on."""

import dataclasses
import functools
import json
import shutil
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_idgrpo.config import Config, RewardConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.faces import bundled_detector
from jax_idgrpo.models.faces.arcface import ArcFace
from jax_idgrpo.models.faces.bundled_judge import Judge, JudgeConfig
from jax_idgrpo.rewards import faces, factory
from jax_idgrpo.rewards.base import References, frame_numbers
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.head import reading
from jax_idgrpo.rewards.identity import IdentityConfig
from jax_idgrpo.synthetic import scenes
from jax_idgrpo.synthetic.training import detector as detector_task
from jax_idgrpo.synthetic.training import embedder as embedder_task
from jax_idgrpo.synthetic.training.faces import FacePictures, degrade
from tests.helpers.small_faces import SMALL_ARCFACE, SMALL_DETECTOR, randomise, small_stack

SMALL_JUDGE = JudgeConfig(widths=(8, 16), input_size=16, embedding_size=6)
EMBEDDED = RewardConfig().folder()


def umeyama(points, template):
    """The published form, with a singular value decomposition: 2x3 matrix."""
    p, q = points - points.mean(0), template - template.mean(0)
    u, s, vt = np.linalg.svd(q.T @ p / len(p))
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(sign) @ vt
    scale = (s @ sign) / (p**2).sum(1).mean()
    return np.concatenate(
        [scale * rotation, (template.mean(0) - scale * rotation @ points.mean(0))[:, None]], 1
    )


def landmarks(seed=0, count=4, noise=2.0):
    """The template, turned, scaled, moved and disturbed."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        angle, scale = rng.uniform(-1, 1), rng.uniform(0.2, 0.6)
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = (np.array(faces.ARCFACE_TEMPLATE) - 56) @ turn.T + rng.uniform(25, 40, 2)
        out.append(points + noise * rng.normal(size=(5, 2)))
    return np.asarray(out, np.float32)


def test_similarity_is_umeyamas():
    template = np.array(faces.ARCFACE_TEMPLATE)
    points = landmarks(count=20)
    a, t = (
        np.asarray(x)
        for x in faces.similarity(jnp.asarray(points), jnp.asarray(template, jnp.float32))
    )
    for p, (real, imaginary), shift in zip(points, a, t, strict=True):
        ours = np.array([[real, -imaginary, shift[0]], [imaginary, real, shift[1]]])
        np.testing.assert_allclose(
            ours, umeyama(p.astype(np.float64), template), rtol=1e-4, atol=1e-3
        )


def test_aligned_crops_equal_opencvs_within_a_grey_level():
    rng = np.random.default_rng(0)
    picture = cv2.GaussianBlur(rng.uniform(0, 255, (64, 80, 3)).astype(np.float32), (0, 0), 1.0)
    points = landmarks()
    ours = faces.align(
        jnp.asarray(picture / 127.5 - 1)[None],
        jnp.asarray(points)[None],
        faces.ARCFACE_TEMPLATE,
        112,
    )[0]
    for crop, p in zip(np.asarray(ours), points, strict=True):
        matrix = umeyama(p.astype(np.float64), np.array(faces.ARCFACE_TEMPLATE))
        theirs = cv2.warpAffine(picture, matrix, (112, 112), borderValue=0)
        assert np.abs((crop + 1) * 127.5 - theirs).mean() < 1.0
        assert (
            np.quantile(np.abs((crop + 1) * 127.5 - theirs), 0.98) < 3.0
        )  # OpenCV rounds places to 1/32 of a pixel


def test_alignment_survives_landmarks_in_one_point():
    crops = faces.align(
        jnp.ones((1, 16, 16, 3)), jnp.full((1, 1, 5, 2), 3.0), faces.ARCFACE_TEMPLATE, 16
    )
    assert np.isfinite(crops).all()


def test_suppression_is_greedy():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 20, (40, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 12, (40, 2))], 1).astype(np.float32)
    boxes, mask = jnp.asarray(boxes), rng.random(40) < 0.9
    keep = np.asarray(bundled_detector.suppress(boxes, jnp.asarray(mask), 0.4))
    overlap = np.asarray(bundled_detector.intersection_over_union(boxes[:, None], boxes[None]))
    expected = []
    for k in np.flatnonzero(mask):
        if all(overlap[j, k] < 0.4 for j in expected):
            expected.append(k)
    assert np.flatnonzero(keep).tolist() == expected
    assert 3 < len(expected) < 30


def test_decoding_returns_planted_faces_best_first():
    height = width = 12
    logits = np.full((1, height, width), -6.0, np.float32)
    sides = np.full((1, height, width, 4), 6.0, np.float32)
    points = np.arange(10, dtype=np.float32).reshape(5, 2) * np.ones(
        (1, height, width, 1, 1), np.float32
    )
    for (y, x), level in {(2, 3): 1.0, (9, 9): 3.0, (9, 10): 2.0, (5, 1): -1.0}.items():
        logits[0, y, x] = level
    found = bundled_detector.decode(
        bundled_detector.DetectorOutput(*map(jnp.asarray, (logits, sides, points))),
        faces=3,
        threshold=0.5,
    )
    assert found.mask[0].tolist() == [
        True,
        True,
        False,
    ]  # the neighbour of the best is no peak, the last is below threshold
    centres = np.asarray(found.boxes[0, :2]).reshape(2, 2, 2).mean(1)
    np.testing.assert_allclose(centres, [[37.5, 37.5], [13.5, 9.5]])
    np.testing.assert_allclose(found.landmarks[0, 1], np.array([13.5, 9.5]) + points[0, 0, 0])


def test_frame_numbers():
    assert frame_numbers(9, 5).tolist() == [0, 2, 4, 6, 8]
    assert frame_numbers(9, 0).tolist() == frame_numbers(9, 20).tolist() == list(range(9))


@pytest.mark.parametrize(
    "network",
    [
        lambda: ArcFace(SMALL_ARCFACE, rngs=nnx.Rngs(0)),
        lambda: Judge(SMALL_JUDGE, rngs=nnx.Rngs(0)),
        lambda: bundled_detector.Detector(SMALL_DETECTOR, rngs=nnx.Rngs(0)),
    ],
)
def test_a_stored_network_comes_back(network, tmp_path):
    network = randomise(network())
    faces.save_network(network, tmp_path / "network", level=3)
    again, values = faces.load_network(tmp_path / "network")
    assert values["level"] == 3
    assert again.config == network.config
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(network)), jax.tree.leaves(nnx.state(again)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_broken_folders_are_errors_of_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        faces.load_stack(tmp_path, "embedder")
    faces.save_network(Judge(SMALL_JUDGE, rngs=nnx.Rngs(0)), tmp_path / "judge")
    weights = tmp_path / "judge.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        faces.load_network(tmp_path / "judge")
    (tmp_path / "judge.json").write_text('{"architecture": "vgg"}')
    with pytest.raises(UserError, match="architecture is 'vgg'"):
        faces.load_network(tmp_path / "judge")


def test_batch_norms_train_on_the_batch_and_remember_it():
    network = ArcFace(SMALL_ARCFACE, rngs=nnx.Rngs(0))
    crops = jax.random.uniform(jax.random.key(0), (8, 16, 16, 3), minval=-1.0)
    before = np.asarray(network.norm.mean[...])
    trained = network(crops, train=True)
    assert np.abs(np.asarray(trained).mean(0)).max() < 1e-5
    assert np.abs(np.asarray(network.norm.mean[...]) - before).max() > 0
    remembered = np.asarray(network.norm.mean[...])
    network(crops)
    np.testing.assert_array_equal(network.norm.mean[...], remembered)


def test_gradients_reach_the_pixels():
    stack = small_stack()
    videos = jax.random.uniform(jax.random.key(0), (1, 2, 32, 32, 3), minval=-1.0)
    found = stack(videos)
    assert found.mask.any()
    assert np.allclose(jnp.linalg.norm(found.embeddings, axis=-1), found.mask, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda v: stack(v).embeddings[..., 0].sum()))(videos)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


# ---------------------------------------------------------------------------------------------------------------------
# What the networks are trained with.


def test_angular_margin_loss_is_the_written_formula():
    rng = np.random.default_rng(0)
    cosines, person, weight = (
        rng.uniform(-0.9, 0.9, (6, 4)).astype(np.float32),
        np.array([0, 1, 2, 3, 0, 1]),
        np.array([1, 1, 1, 1, 1, 0]),
    )
    margin, scale = 0.3, 12.0
    value, scalars = embedder_task.arcface_loss(
        *map(jnp.asarray, (cosines, person, weight.astype(np.float32))), margin, scale
    )
    losses = []
    for row, y in zip(cosines[:5].astype(np.float64), person, strict=False):
        logits = scale * row
        logits[y] = scale * np.cos(np.arccos(row[y]) + margin)
        losses.append(np.log(np.exp(logits).sum()) - logits[y])
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(scalars["accuracy"], np.mean(cosines[:5].argmax(1) == person[:5]))


def test_area_under_curve_counts_pairs_in_order():
    same, different = np.array([0.9, 0.5, 0.2]), np.array([0.1, 0.5, 0.3, 0.0])
    pairs = [(a > b) + 0.5 * (a == b) for a in same for b in different]
    assert embedder_task.area_under_curve(same, different) == pytest.approx(np.mean(pairs))


def test_detector_targets_are_one_at_seen_faces_and_ignore_hidden_ones():
    boxes = np.array([[[10, 10, 30, 34], [40, 20, 60, 44], [5, 40, 20, 60]]], np.float32)
    visible = np.array([[1.0, 0.2, 0.0]], np.float32)
    truth = FacePictures(
        jnp.zeros((1, 64, 64, 3)),
        jnp.asarray(boxes),
        jnp.zeros((1, 3, 5, 2)),
        jnp.asarray(visible),
        jnp.arange(3)[None],
    )
    near, unsure = (np.asarray(x[0]) for x in detector_task.targets(truth, 16, 16))
    assert near[0].max() == 1
    assert near[0, 5, 5] == 1
    assert near[0, 0, 0] < 1e-3
    assert not near[1:].any()
    assert unsure[1].max() == 1
    assert not unsure[2].any()


def test_degraded_pictures_stay_pictures_and_some_stay_clean():
    pictures = jax.random.uniform(jax.random.key(0), (40, 16, 16, 3), minval=-1.0)
    spoiled = degrade(jax.random.key(1), pictures, 2.0)
    assert np.abs(spoiled).max() <= 1
    clean = (np.abs(spoiled - pictures).max((1, 2, 3)) < 1e-5).mean()
    assert 0.05 < clean < 0.6


# ---------------------------------------------------------------------------------------------------------------------
# The networks in the package, on held-out people.


class Drawn(NamedTuple):
    video: np.ndarray
    portraits: np.ndarray
    mask: np.ndarray


@functools.cache
def reward(name="embedder"):
    return FaceReward(faces.load_stack(EMBEDDED, name), IdentityConfig())


@functools.cache
def held_out():
    drawn = scenes.batch(99, 0, 12, "eval", frames=5)
    return Drawn(*(np.asarray(leaf) for leaf in (drawn.video, drawn.portraits, drawn.mask)))


def references(images, mask):
    return References.of_pixels(images, mask)


def encoded(name, images, mask):
    return reward(name).encode_references(references(images, mask), [""] * len(mask))


def terms_of(name, video, images, mask):
    return jax.device_get(reward(name).score(video, encoded(name, images, mask)))


@pytest.mark.parametrize("name", ["embedder", "judge"])
def test_the_right_people_score_higher_than_others(name):
    drawn = held_out()
    terms = terms_of(name, drawn.video, drawn.portraits, drawn.mask)
    assert np.mean(terms["faces_seen"]) == pytest.approx(drawn.mask.sum(1).mean(), rel=0.15)
    wrong = terms_of(name, drawn.video, np.roll(drawn.portraits, 1, 0), np.roll(drawn.mask, 1, 0))
    assert (terms["reward"] > wrong["reward"]).all()
    assert np.mean(terms["similarity"]) > np.mean(wrong["similarity"]) + 0.3


def test_one_program_on_the_device():
    drawn = held_out()
    people = encoded("embedder", drawn.portraits, drawn.mask)
    videos, people = jax.device_put((drawn.video, people))
    expected = reward("embedder").score(drawn.video, people)["reward"]
    with jax.transfer_guard_device_to_host("disallow"):
        terms = jax.jit(reward("embedder").score)(videos, people)
    np.testing.assert_allclose(terms["reward"], expected, atol=1e-5)


def test_a_photo_without_a_face_is_refused():
    drawn = held_out()
    images = drawn.portraits.copy()
    images[1, 0] = 1.0
    with pytest.raises(UserError, match=r"reference photo 1 of the prompt 'two friends': no face"):
        reward("embedder").encode_references(
            references(images, drawn.mask), ["one"] + ["two friends"] * 11
        )


def test_padding_references_changes_nothing():
    drawn = held_out()
    base = terms_of("embedder", drawn.video, drawn.portraits, drawn.mask)
    padded = (
        np.pad(drawn.portraits, [(0, 0), (0, 1)] + [(0, 0)] * 3),
        np.pad(drawn.mask, ((0, 0), (0, 1))),
    )
    np.testing.assert_allclose(
        terms_of("embedder", drawn.video, *padded)["reward"], base["reward"], atol=1e-5
    )


def test_an_empty_video_scores_nothing():
    blank = jnp.zeros((1, 3, 64, 64, 3))
    drawn = held_out()
    terms = terms_of("embedder", blank, drawn.portraits[:1], drawn.mask[:1])
    assert terms["identity_mean"][0] == 0
    assert terms["faces_found"][0] == 0
    assert np.isfinite(terms["reward"]).all()


def test_stored_settings_are_what_the_networks_were_trained_for():
    for name in ("embedder", "judge"):
        network, values = faces.load_network(EMBEDDED / name)
        assert np.asarray(values["template"]).shape == (5, 2)
        assert values["levels"]["clean"]["auc"] > 0.99
        assert dataclasses.asdict(network.config)["input_size"] > np.max(values["template"])


# ---------------------------------------------------------------------------------------------------------------------
# The cosines that a reward uses belong to its networks.

COSINES = ("similarity_low", "similarity_high", "missing")


def with_cosines(folder, **values):
    """A copy of the networks in the package, whose embedder has other cosines."""
    shutil.copytree(EMBEDDED, folder)
    stored = json.loads((folder / "embedder.json").read_text())
    stored = {name: value for name, value in stored.items() if name not in COSINES} | values
    (folder / "embedder.json").write_text(json.dumps(stored))
    return str(folder)


def cosines(config, embedder="embedder"):
    make = factory.make_reward if embedder == "embedder" else factory.make_judge
    made = make(Config(reward=config)).config
    return made.low, made.high, made.null_similarity


def test_unset_cosines_are_the_networks_and_explicit_ones_win(tmp_path):
    other = with_cosines(tmp_path / "other", similarity_low=0.25, similarity_high=0.8, missing=0.3)
    assert cosines(RewardConfig()) == (0.0, 0.9, 0.15)
    assert cosines(RewardConfig(faces=other)) == (0.25, 0.8, 0.3)
    assert cosines(RewardConfig(faces=other, missing=0.5, similarity_low=0.0)) == (0.0, 0.8, 0.5)
    older = with_cosines(tmp_path / "older")
    assert cosines(RewardConfig(faces=older)) == (0.0, 0.9, 0.15)


def test_the_judge_has_its_own_cosines(tmp_path):
    """Those of the reward say nothing about another network."""
    other = with_cosines(tmp_path / "other", similarity_low=0.25, similarity_high=0.8, missing=0.3)
    assert cosines(RewardConfig(faces=other, missing=0.5), "judge") == (0.0, 0.9, 0.15)


@pytest.mark.parametrize("values", [dict(missing="much"), dict(missing=True), dict(missing=None)])
def test_damaged_cosines_are_one_line(tmp_path, values):
    with pytest.raises(UserError, match=r"embedder\.json: missing is .*; use a number"):
        cosines(RewardConfig(faces=with_cosines(tmp_path / "other", **values)))


def test_cosines_in_the_wrong_order_are_one_line(tmp_path):
    other = with_cosines(tmp_path / "other", similarity_low=0.25, similarity_high=0.8)
    with pytest.raises(UserError, match="similarity_low 0.9 is not below similarity_high 0.8"):
        cosines(RewardConfig(faces=other, similarity_low=0.9))


def test_a_head_remembers_the_cosines_of_its_networks(tmp_path):
    other = with_cosines(tmp_path / "other", similarity_low=0.25, similarity_high=0.8, missing=0.3)
    assert reading(RewardConfig()) == {
        "frames": 5,
        "similarity_low": 0.0,
        "similarity_high": 0.9,
        "missing": 0.15,
    }
    assert reading(RewardConfig(faces=other))["missing"] == 0.3
