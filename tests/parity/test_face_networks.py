"""The published face networks against the classes inside deepface and retinaface, and minimal ones of our own where no package has one."""

import copy
import dataclasses
import os

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from scipy.ndimage import map_coordinates
from skimage import data
from torch import nn

from checkpoints_convert import arcface as arcface_names
from checkpoints_convert import faces, rules, store
from checkpoints_convert.__main__ import run
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.faces import arcface, retinaface
from jax_idgrpo.rewards.deepface import LANDMARKS
from jax_idgrpo.rewards.faces import align, load_network, load_stack
from tests.parity.test_arcface import GOLDEN, relative

TOLERANCE = 1e-4


def random_state(model, seed, unit_gamma=False, gain=1.0):
    """The weights behind the reference arrays: uniform numbers in the order of the state dict."""
    rng = np.random.RandomState(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        shape = tuple(tensor.shape)
        u = rng.random_sample(shape)
        if name == "bn_data.running_mean":
            value = 100 + 50 * u
        elif name == "bn_data.running_var":
            value = 2000 + 2000 * u
        elif name.endswith(("running_mean", "bias")):
            value = 0.4 * u - 0.2
        elif name.endswith("running_var"):
            value = 0.5 + u
        elif len(shape) == 1:
            value = np.ones(shape) if unit_gamma else 0.5 + u
        else:
            value = (2 * u - 1) * np.sqrt(3 * gain / np.prod(shape[1:]))
        state[name] = torch.from_numpy(value.astype(np.float32))
    model.load_state_dict(state, strict=False)
    return model.eval()


def channels_first(images):
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def originals():
    os.environ["DEEPFACE_BACKEND_ENGINE"] = "pytorch"
    from deepface.models.facial_recognition.pytorch.Facenet import InceptionResNetV1
    from retinaface.model.retinaface_pth_model import RetinaFace

    return {
        "detector": random_state(RetinaFace(), 1124),
        "embedder": random_state(InceptionResNetV1(dimension=512), 1123, unit_gamma=True, gain=2.0),
    }


@pytest.fixture(scope="module")
def folder(originals, tmp_path_factory):
    """What the command makes of files as the libraries download them."""
    place = tmp_path_factory.mktemp("faces")
    torch.save(originals["detector"].state_dict(), place / "retinaface.pth")
    torch.save(originals["embedder"].state_dict(), place / "facenet512_weights.pth")
    words = [
        "faces",
        str(place / "made"),
        "--detector",
        str(place / "retinaface.pth"),
        "--embedder",
    ]
    assert run([*words, str(place / "facenet512_weights.pth")]) == 0
    with pytest.raises(UserError, match=r"--embedder .*RetinaFace-R50; give an embedder"):
        run(["faces", str(place / "other"), *words[2:], str(place / "retinaface.pth")])
    assert not (place / "other").exists()
    return place / "made"


@pytest.fixture(scope="module")
def maps(folder):
    network, _ = load_network(folder / "detector")
    golden = np.load(GOLDEN.parent / "faces_retinaface.npz")
    return (
        network,
        golden,
        nnx.jit(lambda m, x: m(x))(network, jnp.asarray(golden["images"], jnp.float32)),
    )


def test_retinaface_equals_the_original(maps, originals):
    _, golden, ours = maps
    with torch.no_grad():
        theirs = originals["detector"](torch.from_numpy(golden["images"].astype(np.float32)))
    flat = [leaf for level in ours for leaf in level]
    names = [
        f"{kind}_stride{stride}"
        for stride in (32, 16, 8)
        for kind in ("probability", "box", "landmark")
    ]
    for name, leaf, other in zip(names, flat, theirs, strict=True):
        assert relative(leaf, other.numpy()) < TOLERANCE, name
        assert relative(leaf, golden[name]) < TOLERANCE, name


def test_detections_equal_the_original(maps):
    """Scores, boxes and landmarks after decoding and suppression; published boxes are cut to integers."""
    network, golden, ours = maps
    config = dataclasses.replace(network.config, candidates=10_000)
    found = jax.jit(lambda m: retinaface.decode(m, (104, 136), 128, 0.55, config))(ours)
    for picture in range(2):
        count = int(found.mask[picture].sum())
        assert count == len(golden[f"detections{picture}_score"])
        np.testing.assert_allclose(
            found.scores[picture, :count], golden[f"detections{picture}_score"], atol=1e-5
        )
        boxes = np.asarray(found.boxes[picture, :count])
        below = golden[f"detections{picture}_box"]
        assert np.all((boxes >= below - 1e-3) & (boxes < below + 1 + 1e-3))
        np.testing.assert_allclose(
            found.landmarks[picture, :count], golden[f"detections{picture}_landmarks"], atol=2e-2
        )


@pytest.mark.parametrize(("height", "width"), [(240, 416), (1080, 1920), (832, 480), (100, 1000)])
def test_pictures_grow_as_in_the_original(height, width):
    from retinaface.commons.preprocess import resize_image

    picture = cv2.GaussianBlur(
        np.random.default_rng(0).uniform(0, 255, (height, width, 3)).astype(np.float32), (0, 0), 1.0
    )
    theirs, scale = resize_image(picture, [1024, 1980], True)
    ours = retinaface.resize_scale(height, width, retinaface.RetinaFaceConfig())
    assert ours == pytest.approx(scale)
    assert theirs.shape[:2] == (round(height * ours), round(width * ours))
    assert (
        np.abs(
            np.asarray(retinaface.resized(jnp.asarray(picture)[None], theirs.shape[:2], ours)[0])
            - theirs
        ).max()
        < 0.05
    )


def test_facenet_equals_the_original(folder, originals):
    network, values = load_network(folder / "embedder")
    golden = np.load(GOLDEN.parent / "faces_facenet.npz")
    images = golden["images"].astype(np.float32) / 255
    with torch.no_grad():
        theirs = originals["embedder"](channels_first(images)).numpy()
    ours = nnx.jit(lambda m, x: m(x))(network, jnp.asarray(images[..., ::-1] * 2 - 1))
    assert relative(ours, theirs) < TOLERANCE
    assert relative(ours, golden["embeddings"]) < TOLERANCE
    assert values["source"] == "facenet512_weights.pth"


@pytest.mark.slow
def test_the_folder_is_a_stack(folder):
    """Shapes of detect, align, embed; nothing is computed."""
    stack = load_stack(folder, "embedder")
    seen = nnx.eval_shape(
        lambda m, x: m(x), stack, jax.ShapeDtypeStruct((1, 2, 60, 90, 3), jnp.float32)
    )
    assert seen.embeddings.shape == (1, 2, 8, 512)
    assert seen.landmarks.shape == (1, 2, 8, 5, 2)


def test_another_file_is_refused(tmp_path):
    store.write_file(tmp_path / "other.safetensors", {"a.weight": np.ones(3, np.float32)})
    with pytest.raises(UserError, match="holds none of the face networks"):
        run(
            [
                "faces",
                str(tmp_path / "out"),
                *(
                    f"--{part}={tmp_path / 'other.safetensors'}"
                    for part in ("detector", "embedder")
                ),
            ]
        )
    assert not (tmp_path / "out").exists()


class InsightUnit(nn.Module):
    """Residual unit with insightface's names."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        if stride == 2:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, width, 1, 2, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        out = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return out + (self.downsample(x) if hasattr(self, "downsample") else x)


class InsightFace(nn.Module):
    def __init__(self, units, widths, stem, size, grid):
        super().__init__()
        self.conv1, self.bn1, self.prelu = (
            nn.Conv2d(3, stem, 3, 1, 1, bias=False),
            nn.BatchNorm2d(stem),
            nn.PReLU(stem),
        )
        self.layers = []
        for number, (count, width) in enumerate(zip(units, widths, strict=True)):
            layer = nn.Sequential(
                *(InsightUnit(width if k else stem, width, 1 if k else 2) for k in range(count))
            )
            setattr(self, f"layer{number + 1}", layer)
            self.layers.append(f"layer{number + 1}")
            stem = width
        self.bn2, self.fc, self.features = (
            nn.BatchNorm2d(stem),
            nn.Linear(stem * grid**2, size),
            nn.BatchNorm1d(size),
        )

    def forward(self, x):
        x = self.prelu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            x = getattr(self, layer)(x)
        return self.features(self.fc(self.bn2(x).flatten(1)))


class CurricularUnit(nn.Module):
    """Residual unit with CurricularFace's names; where the width stays, its first unit of a stage takes every second pixel."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        if inputs == width:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class CurricularFace(nn.Module):
    def __init__(self, units, widths, stem, size, grid):
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.PReLU(stem)
        )
        body = []
        for count, width in zip(units, widths, strict=True):
            body += [
                CurricularUnit(width if k else stem, width, 1 if k else 2) for k in range(count)
            ]
            stem = width
        self.body = nn.Sequential(*body)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(stem),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(stem * grid**2, size),
            nn.BatchNorm1d(size, affine=False),
        )

    def forward(self, x):
        return self.output_layer(self.body(self.input_layer(x)))


@pytest.mark.parametrize(
    ("published", "original"),
    [(arcface.IRESNET_100, InsightFace), (arcface.IR_101, CurricularFace)],
)
def test_the_residual_family_equals_its_originals(published, original):
    """Structure and table at small widths; the input is stretched as the network wants it."""
    config = dataclasses.replace(
        published, units=(2, 3), widths=(8, 12), stem=8, input_size=28, embedding_size=10
    )
    model = random_state(original(config.units, config.widths, 8, 10, config.grid), 7)
    state = faces.without_counters(model.state_dict())
    if original is InsightFace:
        model.features.weight.data.fill_(1.0)
        del state["features.weight"]
    graph, abstract = nnx.split(nnx.eval_shape(lambda: arcface.ArcFace(config, rngs=nnx.Rngs(0))))
    network = nnx.merge(graph, rules.to_jax(arcface_names.names(config), state, abstract))
    crops = np.random.default_rng(0).uniform(-1, 1, (3, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(channels_first(crops)).numpy()
    assert relative(nnx.jit(lambda m, x: m(x))(network, jnp.asarray(crops)), theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "original", "count"),
    [
        (arcface.IRESNET_50, InsightFace, 475),
        (arcface.IRESNET_100, InsightFace, 925),
        (arcface.IR_101, CurricularFace, 917),
    ],
)
def test_published_files_are_recognised(config, original, count):
    """The names of a whole file, in full size and without memory, are those of its network and of no other."""
    with torch.device("meta"):
        state = original(config.units, config.widths, 64, 512, 7).state_dict()
    assert len(state) == count
    assert faces.recognise(faces.without_counters(state), "file")[2] == config


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


@pytest.mark.slow
def test_a_picture_to_embeddings_equals_the_published_code(folder, originals, monkeypatch):
    """At a small size of the detector's input, which doubles the picture as the published one does with small videos."""
    rng = np.random.default_rng(3)
    picture = cv2.GaussianBlur(rng.uniform(0, 255, (52, 68, 3)).astype(np.float32), (0, 0), 3.0)
    picture = (picture - picture.min()) * (255 / np.ptp(picture))
    assert chain_equals(folder, originals, picture, monkeypatch, (104, 200), 0.55) > 2


@pytest.mark.slow
def test_a_photograph_to_embeddings_equals_the_published_code(folder, originals, monkeypatch):
    """At the published size: the long side of a strip at 1980 pixels."""
    picture = data.astronaut()[60:156].astype(np.float32)
    assert chain_equals(folder, originals, picture, monkeypatch, (1024, 1980), 0.9) > 2
