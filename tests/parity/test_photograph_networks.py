"""YuNet, SFace and dlib's ResNet with random weights against ONNX Runtime and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import torch
from flax import nnx
from torch.nn import functional

from checkpoints_convert import dlib_dat, face_folder, faces, onnx, rules, store
from checkpoints_convert.__main__ import run
from jax_idgrpo.models.faces.dlib_resnet import MEAN, DlibResNetConfig
from jax_idgrpo.models.faces.sface import SFaceConfig
from jax_idgrpo.models.faces.yunet import STRIDES, YuNetConfig
from jax_idgrpo.rewards.faces import load_network, load_stack
from tests.helpers import face_files
from tests.helpers.comparison import largest_relative_error

TOLERANCE = 1e-5


def session(data: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def weights():
    return {
        "detector": face_files.random_tensors("yunet", YuNetConfig(), 1),
        "embedder": face_files.random_tensors("sface", SFaceConfig(), 2),
        "judge": face_files.random_tensors("dlib_resnet", DlibResNetConfig(), 3),
    }


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    """Files as they are published: YuNet and SFace with integers in blocks."""
    place = tmp_path_factory.mktemp("files")
    quantised = {
        part: [name for name, tensor in weights[part].items() if tensor.ndim in (2, 4)]
        for part in ("detector", "embedder")
    }
    (place / "yunet.onnx").write_bytes(
        face_files.yunet_file(weights["detector"], quantised=quantised["detector"])
    )
    data = face_files.sface_file(
        weights["embedder"], SFaceConfig(), quantised=quantised["embedder"], packed_floats=True
    )
    (place / "sface.onnx").write_bytes(data)
    (place / "resnet.dat").write_bytes(face_files.dlib_file(weights["judge"], DlibResNetConfig()))
    return place


@pytest.fixture(scope="module")
def folder(files):
    words = ["faces", str(files / "made")]
    for part, file in (
        ("detector", "yunet.onnx"),
        ("embedder", "sface.onnx"),
        ("judge", "resnet.dat"),
    ):
        words += [f"--{part}", str(files / file)]
    assert run(words) == 0
    return files / "made"


def test_yunet_equals_onnx_runtime(folder, files):
    network, values = load_network(folder / "detector")
    assert values["threshold"] == 0.6
    pictures = np.random.default_rng(0).uniform(0, 255, (1, 64, 96, 3)).astype(np.float32)
    other = session((files / "yunet.onnx").read_bytes())
    theirs = dict(
        zip(
            (one.name for one in other.get_outputs()),
            other.run(None, {"input": pictures.transpose(0, 3, 1, 2)}),
        )
    )
    ours = nnx.jit(lambda m, x: m(x))(network, jnp.asarray(pictures))
    for level, stride in zip(ours, STRIDES, strict=True):
        for name, maps in level.items():
            maps = jax.nn.sigmoid(maps) if name in ("cls", "obj") else maps
            assert (
                largest_relative_error(
                    maps.reshape(1, -1, maps.shape[-1]), theirs[f"{name}_{stride}"]
                )
                < TOLERANCE
            ), (name, stride)


def test_sface_equals_onnx_runtime(folder, files):
    network, values = load_network(folder / "embedder")
    assert [values[name] for name in ("similarity_low", "similarity_high", "missing")] == [
        0.25,
        0.8,
        0.3,
    ]
    crops = np.random.default_rng(0).uniform(0, 255, (2, 112, 112, 3)).astype(np.float32)
    (theirs,) = session((files / "sface.onnx").read_bytes()).run(
        None, {"data": crops.transpose(0, 3, 1, 2)}
    )
    ours = nnx.jit(lambda m, x: m(x))(network, jnp.asarray(crops / 127.5 - 1))
    assert largest_relative_error(ours, theirs) < TOLERANCE


def dlib_reference(tensors, crops, config):
    """The network in PyTorch, in double precision. crops: RGB, 0 to 255, channels first."""
    weights = {
        name: torch.from_numpy(tensor.astype(np.float64)) for name, tensor in tensors.items()
    }
    count = 0

    def conv(x, stride):
        nonlocal count
        filters, biases = weights[f"con.{count}.filters"], weights[f"con.{count}.biases"].ravel()
        pad = filters.shape[-1] // 2 if stride == 1 else 0
        x = (
            functional.conv2d(x, filters, biases, stride, pad) * weights[f"affine.{count}.gamma"]
            + weights[f"affine.{count}.beta"]
        )
        count += 1
        return x

    x = (
        torch.from_numpy(crops.astype(np.float64))
        - torch.tensor(MEAN, dtype=torch.float64)[:, None, None]
    ) / 256
    x = functional.max_pool2d(functional.relu(conv(x, 2)), 3, 2)
    for blocks, halved in zip(config.blocks, config.halved, strict=True):
        for block in range(blocks):
            down = halved and block == 0
            inner = conv(functional.relu(conv(x, 2 if down else 1)), 1)
            skip = functional.avg_pool2d(x, 2) if down else x
            total = torch.zeros(
                [max(sides) for sides in zip(inner.shape, skip.shape, strict=True)],
                dtype=torch.float64,
            )
            for part in (inner, skip):
                total[tuple(map(slice, part.shape))] += part
            x = functional.relu(total)
    return (x.mean((2, 3)) @ weights["fc.0.weights"][:, :, 0, 0]).numpy()


def test_dlib_resnet_equals_a_reference(folder, weights):
    network, values = load_network(folder / "judge")
    assert values["similarity_low"] < values["missing"] < values["similarity_high"]
    crops = np.random.default_rng(0).uniform(0, 255, (2, 150, 150, 3)).astype(np.float32)
    theirs = dlib_reference(
        weights["judge"], crops.transpose(0, 3, 1, 2), network.config
    ) - np.asarray(face_folder.DLIB_CENTRE)
    assert (
        largest_relative_error(
            nnx.jit(lambda m, x: m(x))(network, jnp.asarray(crops / 127.5 - 1)), theirs
        )
        < TOLERANCE
    )


def test_integers_in_blocks_become_what_onnx_runtime_makes_of_them():
    """Each block has its own scale and zero point, also the last one, which is shorter."""
    rng = np.random.default_rng(0)
    values, scales, zero = (
        rng.integers(-128, 128, (3, 5), np.int8),
        rng.random((3, 2), np.float32),
        rng.integers(-9, 9, (3, 2), np.int8),
    )
    given = [
        face_files.initializer(name, data)
        for name, data in (("w_quantized", values), ("scales", scales), ("zero", zero))
    ]
    nodes = [
        face_files.node(
            "DequantizeLinear",
            ["w_quantized", "scales", "zero"],
            ["w_dequantized"],
            block_size=3,
            axis=1,
        )
    ]
    data = face_files.model(nodes, given, [], [face_files.value_info("w_dequantized", [3, 5])])
    (theirs,) = session(data).run(None, {})
    np.testing.assert_array_equal(onnx._Reader(data).graph().tensors["w"], theirs)


@pytest.mark.parametrize("architecture", ["yunet", "sface", "dlib_resnet"])
def test_tables_are_inverses(architecture):
    config = faces.NETWORKS[architecture].config()
    tensors, abstract = (
        face_files.random_tensors(architecture, config),
        faces.abstract(architecture, config),
    )
    table = faces.table(architecture, config, abstract)
    again = rules.to_torch(table, rules.to_jax(table, tensors, abstract))
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_published_names_go_in_and_out_of_the_store(folder, tmp_path, capsys):
    for part in ("detector", "embedder", "judge"):
        assert run(["import", str(folder / f"{part}.safetensors"), str(tmp_path / part)]) == 0
        assert (
            run(
                [
                    "export",
                    str(tmp_path / part),
                    str(tmp_path / f"{part}-out"),
                    "--format",
                    "original",
                ]
            )
            == 0
        )
        (out,) = (tmp_path / f"{part}-out").glob("*.safetensors")
        ours, theirs = store.open_file(folder / f"{part}.safetensors")[0], store.open_file(out)[0]
        assert {n: np.asarray(t).tobytes() for n, t in ours.items()} == {
            n: np.asarray(t).tobytes() for n, t in theirs.items()
        }


def test_the_folder_is_a_stack(folder):
    """Faces of pictures of any size, larger and smaller than what the detector takes; gradients reach the pixels."""
    stack = load_stack(folder, "embedder")
    for size in ((1, 2, 60, 90, 3), (1, 1, 900, 1300, 3)):
        seen = nnx.eval_shape(lambda m, x: m(x), stack, jax.ShapeDtypeStruct(size, jnp.float32))
        assert seen.embeddings.shape == (1, size[1], 8, 128)
        assert seen.landmarks.shape == (
            1,
            size[1],
            8,
            5,
            2,
        )
    stack.threshold = 0.0
    videos = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 1, 40, 56, 3)), jnp.float32)
    gradient = nnx.jit(lambda m, x: jax.grad(lambda v: m(v).embeddings[..., 0].sum())(x))(
        stack, videos
    )
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_the_reader_of_dlib_gives_what_was_written(files, weights):
    network = dlib_dat.open_file(files / "resnet.dat")
    assert network.side == (150, 150)
    for name, tensor in network.tensors.items():
        np.testing.assert_array_equal(tensor, weights["judge"][name])
    assert set(weights["judge"]) - set(network.tensors) == {"fc.0.biases"}
