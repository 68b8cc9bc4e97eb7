"""deepface as a backend of the face reward, on a photograph: where the face is, what shows nobody, and training beside it."""

import dataclasses
import functools
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import config as c
from jax_idgrpo.data.prompts import load_reference
from jax_idgrpo.data.video import from_uint8
from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import Photo, References
from jax_idgrpo.rewards.deepface import DeepFace, HostFaceReward, complete, find
from jax_idgrpo.rewards.faces import ARCFACE_TEMPLATE
from jax_idgrpo.rewards.host import collect
from jax_idgrpo.rewards.identity import IdentityConfig
from tests.helpers.deepface import astronaut, fake, grey
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import tiny

EYES = np.array([[203.0, 101.0], [247.0, 103.0]])  # of the astronaut, left in the picture first
OPENCV = "deepface:opencv/embedder"


def inside(face, point):
    return (face.box[:2] < point).all() and (point < face.box[2:]).all()


def test_the_face_of_a_photograph_is_where_it_is():
    (face,) = find(astronaut(), "opencv")
    assert inside(face, EYES[0])
    assert inside(face, EYES[1])
    assert inside(face, [224, 128])  # the nose
    assert 80 < face.box[2] - face.box[0] < 120
    np.testing.assert_allclose(face.landmarks[:2], EYES, atol=4)
    np.testing.assert_allclose(
        face.landmarks[2], [224, 128], atol=10
    )  # where the template puts the nose
    assert face.crop.min() >= 0
    assert 0.5 < face.crop.max() <= 1


@pytest.mark.parametrize(
    ("picture", "count"),
    [
        (lambda: np.full((64, 96, 3), 128, np.uint8), 0),  # nobody
        (lambda: np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8), 0),
        (lambda: astronaut(64), 0),  # a face of 12 pixels
        (lambda: np.ascontiguousarray(np.rot90(astronaut())), 0),  # lying on its side
        (lambda: grey(astronaut()), 1),
        (lambda: np.tile(astronaut(256), (2, 2, 1)), 4),
        (lambda: np.tile(astronaut(256), (3, 4, 1)), 8),  # no more are kept
    ],
)
def test_who_is_seen(picture, count):
    faces = find(picture(), "opencv")
    assert len(faces) == count
    areas = [float(np.prod(face.box[2:] - face.box[:2])) for face in faces]
    assert areas == sorted(areas, reverse=True)


def test_a_photo_that_lies_by_its_orientation_is_seen_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(astronaut()))).save(
        tmp_path / "photo.png", exif=exif
    )
    (face,) = find(np.asarray(load_reference(tmp_path / "photo.png")), "opencv")
    assert inside(face, EYES[0])
    assert inside(face, EYES[1])


def test_landmarks_that_lack_come_from_the_template():
    box = np.array([10.0, 20.0, 90.0, 100.0])
    alone = complete(box, {})
    assert ((alone > box[:2]) & (alone < box[2:])).all()
    template = np.asarray(ARCFACE_TEMPLATE)
    turned = 0.5 * template @ np.array([[0.8, 0.6], [-0.6, 0.8]]) + [5, 7]
    np.testing.assert_allclose(
        complete(box, {0: tuple(turned[0]), 1: tuple(turned[1])}), turned, atol=1e-6
    )
    assert complete(box, {0: (3.0, 4.0)})[0].tolist() == [3.0, 4.0]


@functools.cache
def reward():
    return factory.make_reward(c.Config(reward=c.RewardConfig(backend=OPENCV, frames=2)))


def photo(*pictures):
    return References(tuple((Photo(Image.fromarray(picture)),) for picture in pictures), 1)


def test_the_terms_are_those_of_the_reward_in_jax():
    """One video of the person, one of nobody, against the person's photo: same names, same meanings."""
    moving = np.stack([np.roll(astronaut(256), 4 * t, 1) for t in range(3)])
    videos = from_uint8(np.stack([moving, np.full_like(moving, 128)]))
    terms = collect(
        reward().score(
            videos, reward().encode_references(photo(astronaut(256), astronaut(256)), [""] * 2)
        )
    )
    inside = factory.make_face_reward(c.RewardConfig(frames=2))
    shapes = jax.eval_shape(
        inside.apply, inside.state, jnp.zeros((2, 3, 64, 64, 3)), inside.shapes(2, 1)
    )
    assert set(terms) == set(shapes) == set(reward().term_names) == set(inside.term_names)
    np.testing.assert_array_equal(terms["faces_seen"], [1, 0])
    assert terms["similarity"][0] > 0.9
    assert terms["similarity"][1] == 0
    assert terms["missing"].tolist() == [0, 1]
    assert terms["motion"][0] > 0.01
    assert terms["motion"][1] == 0
    assert all(np.isfinite(value).all() for value in terms.values())


def test_a_photo_without_a_face_is_refused():
    with pytest.raises(UserError, match=r"reference photo 1 of the prompt 'two': no face is found"):
        reward().encode_references(
            photo(astronaut(256), np.full((256, 256, 3), 9, np.uint8)), ["one", "two"]
        )


def test_scoring_goes_on_beside_the_caller_and_a_failure_costs_one_video():
    gate = threading.Event()
    gate.set()
    host = HostFaceReward(fake(gate), IdentityConfig())
    red, dark = (
        np.zeros((48, 48, 3), np.uint8) + np.uint8([200, 0, 0]),
        np.zeros((48, 48, 3), np.uint8),
    )
    people = host.encode_references(photo(red, red), [""] * 2)
    gate.clear()
    pending = host.score(jnp.asarray(from_uint8(np.stack([[red] * 2, [dark] * 2]))), people)
    assert not pending.done()  # handed over, although nothing can be scored yet
    gate.set()
    with pytest.warns(
        UserWarning, match=r"face reward: video 1 could not be scored \(RuntimeError: too dark\)"
    ):
        terms = collect(pending)
    assert terms["similarity"][0] == pytest.approx(1, abs=1e-4)
    assert np.isnan(terms["reward"][1])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            dict(backend="insightface"),
            r"reward\.backend is 'insightface'; use deepface:DETECTOR/MODEL",
        ),
        (dict(backend=OPENCV, faces=""), r"reward\.faces is empty"),
        (dict(backend=OPENCV, vlm="folder"), r"reward\.backend and reward\.vlm are both set"),
    ],
)
def test_a_backend_that_makes_no_sense_is_refused(values, reason):
    with pytest.raises(UserError, match=reason):
        c.RewardConfig(**values)


def test_nothing_flows_back_through_a_backend():
    grpo = dict(objective="reward_gradient", gradient_steps=2, kl_units="velocity")
    with pytest.raises(
        UserError,
        match="reward_gradient needs a reward in JAX, and reward.backend runs on the host",
    ):
        dataclasses.replace(tiny(1, grpo, window="none"), reward=c.RewardConfig(backend=OPENCV))


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (
            "deepface:opencv/ArcFase",
            r"deepface has no model 'ArcFase'; use one of VGG-Face, .*embedder",
        ),
        ("deepface:haar/ArcFace", r"deepface has no detector 'haar'; use one of opencv, "),
    ],
)
def test_an_unknown_part_is_named(backend, reason):
    with pytest.raises(UserError, match=reason) as caught:
        DeepFace(backend, Path("nowhere"))
    assert "\n" not in str(caught.value)


def test_without_deepface_the_command_ends_at_once_with_one_line(tmp_path):
    (tmp_path / "deepface").mkdir()
    (tmp_path / "deepface" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'deepface'\", name='deepface')"
    )
    (tmp_path / "0000-0.mp4").touch()
    words = [
        "score",
        "configs/quickstart.py",
        "--videos",
        str(tmp_path),
        "--prompts",
        "embedded:eval",
        "--out",
        str(tmp_path / "out"),
        "--reward.backend",
        OPENCV,
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "jax_idgrpo", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert ended.returncode == 2, ended.stderr
    assert (
        ended.stderr.splitlines()[-1]
        == f"idgrpo: reward.backend {OPENCV}: deepface is not installed; pip install jax-idgrpo[faces]"
    )
    assert not (tmp_path / "out").exists()


def test_opencv_with_our_embedder_writes_nothing_at_home(tmp_path):
    script = (
        "import warnings; from jax_idgrpo import config as c; from jax_idgrpo.rewards.factory import make_reward;"
        f"config = c.Config(reward=c.RewardConfig(backend='{OPENCV}'));"
        "before = warnings.filters[:]; make_reward(config); assert warnings.filters == before"
    )
    home = tmp_path / "home"
    environment = {name: value for name, value in os.environ.items() if name != "DEEPFACE_HOME"}
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        check=True,
        env={**environment, "HOME": str(home), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert not home.exists()
