"""The published face networks against the classes inside deepface and retinaface, and minimal ones of our own where no package has one."""

import copy
import dataclasses

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from scipy.ndimage import map_coordinates
from skimage import data

from checkpoints_convert import faces
from jax_idgrpo.models.faces import retinaface
from jax_idgrpo.rewards.deepface import LANDMARKS
from jax_idgrpo.rewards.faces import align, load_stack
from tests.helpers.face_networks import channels_first, make_folder, make_originals


@pytest.fixture(scope="module")
def originals():
    return make_originals()


@pytest.fixture(scope="module")
def folder(originals, tmp_path_factory):
    return make_folder(originals, tmp_path_factory)


def test_the_folder_is_a_stack(folder):
    """Shapes of detect, align, embed; nothing is computed."""
    stack = load_stack(folder, "embedder")
    seen = nnx.eval_shape(
        lambda m, x: m(x), stack, jax.ShapeDtypeStruct((1, 2, 60, 90, 3), jnp.float32)
    )
    assert seen.embeddings.shape == (1, 2, 8, 512)
    assert seen.landmarks.shape == (1, 2, 8, 5, 2)


def straight_crop(picture, points, size):
    """Umeyama's similarity by singular values, and SciPy's bilinear samples with a black border."""
    template = np.array(faces.ARCFACE_TEMPLATE) * (size / 112)
    p, q = points - points.mean(0), template - template.mean(0)
    u, s, vt = np.linalg.svd(q.T @ p / 5)
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    matrix = (s @ sign) / (p**2).sum(1).mean() * (u @ np.diag(sign) @ vt)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1)
    places = (grid - template.mean(0)) @ np.linalg.inv(matrix).T + points.mean(0)
    rows_and_columns = places[..., ::-1].transpose(2, 0, 1)
    return np.stack(
        [
            map_coordinates(picture[..., c], rows_and_columns, order=1, mode="grid-constant")
            for c in range(3)
        ],
        -1,
    )


def give_landmarks_of_faces(original, ours):
    """Random numbers round the template in the place of random numbers: crops of points that resemble no face magnify every rounding."""
    shape = np.tile((np.array(faces.ARCFACE_TEMPLATE) - 56).ravel() / 80, 2).astype(np.float32)
    original = copy.deepcopy(original)
    for stride in retinaface.STRIDES:
        theirs, mine = (
            getattr(network, f"face_rpn_stride{stride}").landmark_pred
            for network in (original, ours)
        )
        with torch.no_grad():
            theirs.weight.mul_(0.02)
            theirs.bias.copy_(torch.from_numpy(shape))
        mine.kernel[...] = 0.02 * mine.kernel[...]
        mine.bias[...] = jnp.asarray(shape)
    return original


def chain_equals(folder, originals, picture, monkeypatch, sides, threshold):
    """Detect, align, embed of one picture in pixels, RGB 0 to 255, here and by the published code; -> how many faces."""
    from retinaface import RetinaFace as original
    from retinaface.commons import preprocess

    resize = preprocess.resize_image
    monkeypatch.setattr(
        preprocess, "resize_image", lambda image, _, enlarge: resize(image, list(sides), enlarge)
    )
    stack = load_stack(folder, "embedder")
    detector = give_landmarks_of_faces(originals["detector"], stack.detector)
    with torch.no_grad():
        found = list(original.detect_faces(picture[..., ::-1], threshold, detector).values())[:8]
    theirs = np.array([[face["landmarks"][name] for name in LANDMARKS] for face in found])

    stack.threshold = threshold
    stack.detector.config = dataclasses.replace(
        stack.detector.config, short_side=sides[0], long_side=sides[1]
    )
    ours = nnx.jit(lambda m, x: m(x))(stack, jnp.asarray(picture / 127.5 - 1)[None, None])
    count = int(ours.mask.sum())
    assert count == len(found)
    np.testing.assert_allclose(
        ours.scores[0, 0, :count], [face["score"] for face in found], atol=1e-4
    )
    boxes = np.asarray(ours.boxes[0, 0, :count])
    below = np.array([face["facial_area"] for face in found])  # cut to whole pixels
    assert np.all((boxes > below - 0.01) & (boxes < below + 1.01))
    np.testing.assert_allclose(ours.landmarks[0, 0, :count], theirs, atol=2e-2)

    crops = np.stack([straight_crop(picture, points.astype(np.float64), 160) for points in theirs])
    mine = align(
        jnp.asarray(picture / 127.5 - 1)[None], ours.landmarks[0, :, :count], stack.template, 160
    )[0]
    assert np.abs((np.asarray(mine) + 1) * 127.5 - crops).max() < 1.0
    with torch.no_grad():
        wanted = originals["embedder"](
            channels_first((crops[..., ::-1] / 255).astype(np.float32))
        ).numpy()
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert np.min(np.sum(wanted * np.asarray(ours.embeddings[0, 0, :count]), 1)) > 0.9999
    return count


def test_a_picture_to_embeddings_equals_the_published_code(folder, originals, monkeypatch):
    """At a small size of the detector's input, which doubles the picture as the published one does with small videos."""
    rng = np.random.default_rng(3)
    picture = cv2.GaussianBlur(rng.uniform(0, 255, (52, 68, 3)).astype(np.float32), (0, 0), 3.0)
    picture = (picture - picture.min()) * (255 / np.ptp(picture))
    assert chain_equals(folder, originals, picture, monkeypatch, (104, 200), 0.55) > 2


def test_a_photograph_to_embeddings_equals_the_published_code(folder, originals, monkeypatch):
    """At the published size: the long side of a strip at 1980 pixels."""
    picture = data.astronaut()[60:156].astype(np.float32)
    assert chain_equals(folder, originals, picture, monkeypatch, (1024, 1980), 0.9) > 2
