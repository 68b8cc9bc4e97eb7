"""The published face networks against the classes inside deepface and retinaface, and minimal ones of our own where no package has one."""

import dataclasses

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from checkpoints_convert import arcface as arcface_names
from checkpoints_convert import faces, rules, store
from checkpoints_convert.__main__ import run
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.faces import arcface, retinaface
from jax_idgrpo.rewards.faces import load_network
from tests.helpers.comparison import largest_relative_error
from tests.helpers.face_networks import channels_first, make_folder, make_originals, random_state
from tests.helpers.paths import GOLDEN

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def originals():
    return make_originals()


@pytest.fixture(scope="module")
def folder(originals, tmp_path_factory):
    return make_folder(originals, tmp_path_factory)


@pytest.fixture(scope="module")
def maps(folder):
    network, _ = load_network(folder / "detector")
    golden = np.load(GOLDEN / "faces_retinaface.npz")
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
        assert largest_relative_error(leaf, other.numpy()) < TOLERANCE, name
        assert largest_relative_error(leaf, golden[name]) < TOLERANCE, name


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
    golden = np.load(GOLDEN / "faces_facenet.npz")
    images = golden["images"].astype(np.float32) / 255
    with torch.no_grad():
        theirs = originals["embedder"](channels_first(images)).numpy()
    ours = nnx.jit(lambda m, x: m(x))(network, jnp.asarray(images[..., ::-1] * 2 - 1))
    assert largest_relative_error(ours, theirs) < TOLERANCE
    assert largest_relative_error(ours, golden["embeddings"]) < TOLERANCE
    assert values["source"] == "facenet512_weights.pth"


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
    assert (
        largest_relative_error(nnx.jit(lambda m, x: m(x))(network, jnp.asarray(crops)), theirs)
        < TOLERANCE
    )


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
