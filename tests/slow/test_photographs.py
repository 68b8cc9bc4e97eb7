"""The published networks on photographs of real people, in the project's own face stack.

Tests are skipped where the packages with networks and photographs cannot be downloaded.
"""

import functools
import itertools

import cv2
import jax.numpy as jnp
import matplotlib.cbook
import numpy as np
import onnxruntime
import pytest
from flax import nnx
from PIL import Image
from skimage import data

from benchmarks import real_people
from checkpoints_convert import face_folder, photographs
from checkpoints_convert.__main__ import run
from jax_idgrpo.config import Config, RewardConfig
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import Photo, References
from jax_idgrpo.rewards.faces import align, load_embedder, load_network, load_stack
from jax_idgrpo.synthetic import scenes
from tests.helpers import packages

PORTRAITS, GROUP = real_people.PORTRAITS, real_people.GROUP


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command makes of the packages."""
    packages.all_packages()
    out = tmp_path_factory.mktemp("photographs") / "faces"
    files = ["--wheel", str(packages.package("networks")), "--dat", str(packages.package("judge"))]
    assert run(["faces", str(out), *files]) == 0
    return out


def pixels(picture):
    return jnp.asarray(picture, jnp.float32)[None] / 127.5 - 1


def canvas(picture, side=640):
    """The picture in the corner of a black square, so that one program serves all."""
    out = np.zeros((side, side, 3), np.uint8)
    out[: picture.shape[0], : picture.shape[1]] = picture
    return out


@functools.cache
def program(folder, name, faces=2):
    """A face stack as a function of a picture. faces: how many are looked for."""
    stack = load_stack(folder, name)
    stack.max_faces = faces
    return lambda picture: nnx.jit(lambda m, x: m(x))(stack, pixels(canvas(picture))[None])


@pytest.fixture(scope="module")
def faces(folder):
    """By network: unit embeddings of every face, and the person of each."""
    found = {"embedder": [], "judge": []}
    people = []
    photos = [
        (who, real_people.photo(*place)) for who, places in PORTRAITS.items() for place in places
    ]
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photos.append(("hopper", np.asarray(Image.open(file).convert("RGB"))))
    photos.append(("astronaut", data.astronaut()))
    for who, picture in photos:
        for name, embeddings in found.items():
            seen = program(folder, name)(picture)
            assert int(seen.mask.sum()) == 1, f"{who}: one face is there"
            embeddings.append(np.asarray(seen.embeddings[0, 0, 0]))
        people.append(who)
    for name, embeddings in found.items():
        seen = program(folder, name, 6)(real_people.photo(*GROUP))
        assert int(seen.mask.sum()) == 5
        embeddings.extend(np.asarray(seen.embeddings[0, 0, :5]))
    people += [f"group {n}" for n in range(5)]
    return {name: np.stack(embeddings) for name, embeddings in found.items()}, people


def pairs(embeddings, people):
    """Cosines of pairs of the same person, and of strangers."""
    cosines = embeddings @ embeddings.T
    same, strangers = [], []
    for a, b in itertools.combinations(range(len(people)), 2):
        (same if people[a] == people[b] else strangers).append(cosines[a, b])
    return np.asarray(same), np.asarray(strangers)


def test_the_embedder_tells_people_apart(faces):
    """As was measured with the originals: the same above 0.6, strangers below 0.5, 99 % below 0.35."""
    same, strangers = pairs(faces[0]["embedder"], faces[1])
    assert len(same) == 8
    assert len(strangers) == 202
    assert same.mean() == pytest.approx(0.754, abs=0.01)
    assert same.min() == pytest.approx(0.612, abs=0.01)
    assert strangers.mean() == pytest.approx(0.080, abs=0.01)
    assert strangers.max() == pytest.approx(0.476, abs=0.02)
    assert np.quantile(strangers, 0.99) < 0.35
    assert same.min() > strangers.max()


def test_the_judge_tells_people_apart(faces):
    """Its bias spreads the cosines: without it strangers have 0.83 and photographs of one person 0.96."""
    same, strangers = pairs(faces[0]["judge"], faces[1])
    assert same.mean() > 0.78
    assert strangers.mean() < 0.2
    assert same.min() > strangers.max()
    assert np.quantile(strangers, 0.99) < 0.66


def test_the_judge_is_independent_of_the_embedder(faces):
    """Which strangers look alike is another matter to each."""
    strangers = [pairs(faces[0][name], faces[1])[1] for name in ("embedder", "judge")]
    assert np.corrcoef(strangers)[0, 1] < 0.4


def test_the_bias_of_the_judge_is_the_mean_of_drawn_people(folder):
    """What the table of the converter says can be computed again, and no photograph is needed for it."""
    drawn = scenes.batch(5, 0, 48, "train", frames=1)
    portraits = np.asarray(drawn.portraits)[np.asarray(drawn.mask)]
    detector, _ = load_network(RewardConfig().folder() / "detector")
    seen = nnx.jit(lambda m, x: m.find(x, 1, 0.4))(detector, jnp.asarray(portraits))
    judge, template = load_embedder(folder, "judge")
    crops = align(jnp.asarray(portraits), seen.landmarks, template, 150)[:, 0]
    embed = nnx.jit(lambda m, x: m(x))
    centred = np.concatenate([embed(judge, crops[n : n + 32]) for n in range(0, len(crops), 32)])
    mean = (centred + np.asarray(face_folder.DLIB_CENTRE, np.float32))[
        np.asarray(seen.mask[:, 0])
    ].mean(0)
    cosine = mean @ np.asarray(face_folder.DLIB_CENTRE) / np.linalg.norm(mean)
    assert cosine / np.linalg.norm(face_folder.DLIB_CENTRE) > 0.998


@pytest.mark.parametrize("place", [PORTRAITS["macron"][1], PORTRAITS["obama"][0], GROUP])
def test_detections_equal_opencvs(folder, tmp_path, place):
    (tmp_path / "yunet.onnx").write_bytes(real_people.member("networks", photographs.DETECTOR.path))
    picture = real_people.photo(*place, side=480)
    size = (picture.shape[1], picture.shape[0])
    other = cv2.FaceDetectorYN.create(str(tmp_path / "yunet.onnx"), "", size, 0.6, 0.3, 5000)
    _, theirs = other.detect(np.ascontiguousarray(picture[..., ::-1]))
    network, values = load_network(folder / "detector")
    found = network.find(pixels(picture), values["max_faces"], values["threshold"])
    assert int(found.mask.sum()) == len(theirs)
    order = np.argsort(-theirs[:, 14])
    for n, face in enumerate(theirs[order]):
        box = np.asarray(found.boxes[0, n])
        assert abs(float(found.scores[0, n]) - face[14]) < 1e-4
        np.testing.assert_allclose(np.asarray(found.landmarks[0, n]).ravel(), face[4:14], atol=1e-3)
        np.testing.assert_allclose([*box[:2], *(box[2:] - box[:2])], face[:4], atol=1e-3)


def crops_of(folder, name, place):
    network, template = load_embedder(folder, name)
    detector, _ = load_network(folder / "detector")
    picture = pixels(real_people.photo(*place))
    found = detector.find(picture, 1, 0.6)
    crop = align(picture, found.landmarks, template, network.config.input_size)[0]
    crop = jnp.round((crop + 1) * 127.5)
    return network, np.asarray(crop), np.asarray(network(crop / 127.5 - 1))


def test_embeddings_equal_onnx_runtimes(folder):
    _, crop, ours = crops_of(folder, "embedder", PORTRAITS["macron"][1])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    other = onnxruntime.InferenceSession(
        real_people.member("networks", photographs.EMBEDDER.path),
        options,
        providers=["CPUExecutionProvider"],
    )
    unused = {one.name: np.zeros(one.shape, np.float32) for one in other.get_inputs()}
    (theirs,) = other.run(None, unused | {"data": crop.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert 5 < np.linalg.norm(ours) < 20


def test_embeddings_equal_dlibs(folder, tmp_path):
    dlib = pytest.importorskip("dlib", reason="dlib is not installed; pip install dlib-bin")
    _, crop, ours = crops_of(folder, "judge", PORTRAITS["macron"][1])
    (tmp_path / photographs.JUDGE.name).write_bytes(
        real_people.member("judge", photographs.JUDGE.path)
    )
    other = dlib.face_recognition_model_v1(str(tmp_path / photographs.JUDGE.name))
    theirs = np.asarray(other.compute_face_descriptor(crop[0].astype(np.uint8)))
    np.testing.assert_allclose(ours[0] + np.asarray(face_folder.DLIB_CENTRE), theirs, atol=1e-5)


def test_the_reward_knows_two_real_people(folder):
    """In two clips side by side everybody is found and matched, and strangers earn nothing."""
    left, right = (
        real_people.clip(real_people.LEFT, 5, (240, 208), 0.85),
        real_people.clip(real_people.RIGHT, 5, (240, 208)),
    )
    video = np.concatenate([left, right], 2)
    strangers = [
        real_people.photo(*place) for place in (PORTRAITS["sunak"][0], PORTRAITS["ardern"][1])
    ]
    rows = ([left[0], right[0]], strangers)
    photos = tuple(tuple(Photo(Image.fromarray(photo)) for photo in row) for row in rows)
    config = RewardConfig(faces=str(folder), frames=5)
    reward = factory.make_face_reward(config)
    assert (reward.config.low, reward.config.high, reward.config.null_similarity) == (
        0.25,
        0.8,
        0.3,
    )
    videos = jnp.repeat(pixels(video[None])[0], 2, 0)
    asked = reward.encode_references(References(photos, 2), ["two people", "two strangers"])
    terms = reward.score(videos, asked)
    assert np.asarray(terms["faces_seen"]) == pytest.approx([2, 2])
    right_people, others = np.asarray(terms["similarity"])
    assert right_people > 0.6
    assert others < 0.1
    assert np.asarray(terms["identity_mean"])[0] > 0.6
    assert np.asarray(terms["identity_mean"])[1] < 0.05
    judged = factory.make_judge(Config(reward=config))
    assert (judged.config.low, judged.config.high, judged.config.null_similarity) == (
        0.55,
        0.85,
        0.6,
    )
