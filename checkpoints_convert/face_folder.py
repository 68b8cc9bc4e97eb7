"""Make the folder of networks for `--reward.faces` from downloaded files.

A folder holds `detector`, `embedder` and optionally `judge`. Each is a file of tensors and a JSON
file with the architecture, the positions of landmarks in its crops, and the cosines for the reward.
Files of PyTorch are read by `pth`, ONNX by `onnx`, dlib's by `dlib_dat`; nothing in them is run. A
graph in a file must be the published one, since only its weights are used.
"""

import collections
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert import arcface, dlib_dat, faces, file_types, onnx, rules, store
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.faces.dlib_resnet import MEAN, DlibResNetConfig
from jax_idgrpo.models.faces.sface import EPSILON, TAIL_EPSILON, SFaceConfig
from jax_idgrpo.models.faces.yunet import YuNetConfig

WEIGHTED = ("Conv", "BatchNormalization", "PRelu", "Gemm")  # operations with weights
WITHOUT_EFFECT = ("Reshape", "Transpose", "Flatten", "Dropout", "Constant")
GRAPHS = {  # how often an operation is in a published graph
    "yunet": {"Conv": 53, "Relu": 15, "MaxPool": 4, "Resize": 2, "Add": 2, "Sigmoid": 6},
    "sface": {"BatchNormalization": 29, "Conv": 27, "PRelu": 27, "Sub": 1, "Mul": 1, "Gemm": 1},
}

# fmt: off
DLIB_CENTRE = (  # mean of dlib's embeddings of 346 synthetic people; see `centred`
    -0.089, 0.0307, 0.0706, -0.0517, -0.0911, -0.0215, -0.0743, -0.0683, 0.1399, -0.112, 0.1647,
    -0.0463, -0.2047, 0.0198, -0.0428, 0.1649, -0.1579, -0.1116, -0.1143, -0.0718, 0.0231, 0.0513,
    0.0383, 0.0386, -0.147, -0.2868, -0.0984, -0.0818, 0.024, -0.0564, -0.0011, 0.0886, -0.1277,
    0.0118, 0.0493, 0.0867, -0.0376, -0.0798, 0.1851, 0.013, -0.2186, 0.0145, 0.0548, 0.2556,
    0.1944, 0.0103, 0.0325, -0.0803, 0.0937, -0.2766, 0.0422, 0.1637, 0.0835, 0.0826, 0.0643,
    -0.1218, 0.0228, 0.128, -0.1558, 0.0548, 0.0532, -0.0756, -0.0116, -0.0851, 0.192, 0.1268,
    -0.1332, -0.1761, 0.1515, -0.1674, -0.0499, 0.1104, -0.1484, -0.1745, -0.2594, -0.0156, 0.3578,
    0.1151, -0.1227, 0.0408, -0.0774, -0.0425, -0.0226, 0.1186, -0.0483, -0.0096, -0.0387, 0.0477,
    0.2299, -0.0902, 0.0026, 0.2286, 0.0214, -0.0239, -0.0231, 0.04, -0.0877, -0.0224, -0.0959,
    -0.0199, 0.0148, -0.0472, 0.0154, 0.0949, -0.1827, 0.1693, -0.0407, -0.0313, 0.0122, 0.0085,
    -0.0769, -0.0474, 0.1883, -0.2273, 0.1451, 0.1995, 0.0701, 0.099, 0.0486, 0.0902, -0.0017,
    0.0071, -0.1484, -0.045, 0.0319, -0.0339, -0.0261, 0.0369,
)
# fmt: on


def centred(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add a bias to dlib's last layer that moves the mean embedding to zero.

    All raw embeddings point in one direction: the cosine of two people is 0.83, that of two photos
    of one person 0.96. The mean over synthetic faces is within 13 degrees of the mean over
    photographs, and depends on no photograph.
    """
    return {**tensors, "fc.0.biases": -np.asarray(DLIB_CENTRE, np.float32)[None, :, None, None]}


def _of_onnx(path: Path) -> tuple[dict[str, np.ndarray], onnx.Graph]:
    """Read a graph, and those of its tensors that are weights of operations."""
    graph = onnx.open_file(path)
    names = {name for node in graph.nodes if node.op in WEIGHTED for name in node.inputs[1:]}
    return {name: tensor for name, tensor in graph.tensors.items() if name in names}, graph


def _convolutions(
    config: YuNetConfig | SFaceConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, tuple[int, int, int]]:
    """Map the weight of each published convolution to (stride, padding, groups)."""
    halving = (
        ["420"]
        if isinstance(config, YuNetConfig)
        else [f"conv_{k + 2}_dw_conv2d_weight" for k in config.halved]
    )
    expected = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 4:
            outputs, inputs, size, _ = tensor.shape
            groups = outputs if inputs == 1 and size == 3 else 1
            expected[name] = 2 if name in halving else 1, size // 2, groups
    return expected


def _check_graph(
    path: Path,
    name: str,
    architecture: str,
    config: Any,
    tensors: Mapping[str, np.ndarray],
    graph: onnx.Graph,
) -> None:
    """Check that the operations of a graph are those of the published network.

    Args:
      path: the file, for messages.
      name: name of the network, for messages.
      architecture: name of the architecture.
      config: configuration of the network.
      tensors: weights of the operations.
      graph: the graph.

    Raises:
      UserError: the operations differ.
    """
    other = UserError(
        f"{path}: has the tensors of {name}, but another graph; give the published file"
    )
    counts = collections.Counter(node.op for node in graph.nodes if node.op not in WITHOUT_EFFECT)
    if counts != GRAPHS[architecture]:
        raise other
    convolutions = _convolutions(config, tensors)
    for node in graph.nodes:
        attributes = node.attributes
        if node.op == "Conv":
            stride, pad, groups = convolutions.pop(
                node.inputs[1] if len(node.inputs) > 1 else "", (0, 0, 0)
            )
            expected = {
                "strides": (stride,) * 2,
                "pads": (pad,) * 4,
                "group": groups,
                "dilations": (1, 1),
            }
            if any(attributes.get(key) != value for key, value in expected.items()):
                raise other
        elif node.op == "BatchNormalization":
            epsilon = TAIL_EPSILON if node.outputs[:1] in (("bn1",), ("fc1",)) else EPSILON
            if attributes.get("epsilon") != epsilon:
                raise other
        elif node.op in ("Sub", "Mul"):
            number = graph.tensors.get(node.inputs[1]) if len(node.inputs) == 2 else None
            if number is None or number.tolist() != ([127.5] if node.op == "Sub" else [1 / 128]):
                raise other


def _check_layers(path: Path, config: DlibResNetConfig, network: dlib_dat.Network) -> None:
    """Raise a UserError if the layers of dlib's file are not those of the published network."""
    expected = [
        ("con", config.stem, 7, 7, 2, 2, 0, 0),
        ("affine", 0),
        ("relu",),
        ("max_pool", 3, 3, 2, 2, 0, 0),
    ]
    for width, count, halved in zip(config.widths, config.blocks, config.halved, strict=True):
        for number in range(count):
            down = halved and number == 0
            step = (2, 2, 0, 0) if down else (1, 1, 1, 1)
            expected += [
                ("con", width, 3, 3, *step),
                ("affine", 0),
                ("relu",),
                ("con", width, 3, 3, 1, 1, 1, 1),
                ("affine", 0),
            ]
            expected += [
                *([("avg_pool", 2, 2, 2, 2, 0, 0)] if down else []),
                ("add_prev",),
                ("relu",),
            ]
    expected += [
        ("avg_pool", 0, 0, 1, 1, 0, 0),
        ("fc", config.embedding_size, max(config.widths), 1),
    ]
    same = [(layer.kind, *layer.numbers) for layer in network.layers] == expected
    if (
        not same
        or network.side != (config.input_size,) * 2
        or not np.allclose(network.mean, MEAN, atol=1e-4)
    ):
        raise UserError(
            f"{path}: holds a network of dlib with other layers than its face recognition ResNet; "
            "give the published file"
        )


def _open(path: Path) -> tuple[str, str, Any, dict[str, Any]]:
    """Open a file with a published graph.

    Returns:
      (name for messages, architecture, configuration, tensors).
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if onnx.is_onnx(start):
        tensors, graph = _of_onnx(path)
        if faces.known(tensors) is None:
            raise UserError(
                f"{path}: is an ONNX file of another network than YuNet or SFace; "
                f"{file_types.FACE_FILES}"
            )
        name, architecture, config = faces.recognise(tensors, str(path))
        if architecture not in GRAPHS:
            raise UserError(
                f"{path}: has the tensors of {name} in ONNX; give the file that the library "
                "downloads"
            )
        _check_graph(path, name, architecture, config, tensors, graph)
    elif dlib_dat.is_dat(start):
        network = dlib_dat.open_file(path)
        name, architecture, config = faces.recognise(network.tensors, str(path))
        _check_layers(path, config, network)
        tensors = centred(network.tensors)
    else:
        opened = faces.without_counters(store.open_file(path)[0])
        name, architecture, config = faces.recognise(opened, str(path))
        return name, architecture, config, opened
    return name, architecture, config, tensors


def _published(path: Path) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Read a downloaded file.

    Returns:
      (name for messages, content of the JSON file, checked tensors).
    """
    name, architecture, config, tensors = _open(path)
    unit = tensors.pop(arcface.UNIT_SCALE, None)
    if unit is not None and not np.all(np.asarray(unit) == 1.0):
        raise UserError(
            f"{path}: {arcface.UNIT_SCALE} is not all ones as in the published networks; give the "
            "published file"
        )
    parameters = faces.abstract(architecture, config)
    matched = rules.match(
        rules.expand(faces.table(architecture, config, parameters), parameters), tensors, str(path)
    )
    values: dict[str, Any] = {
        "architecture": architecture,
        "config": dataclasses.asdict(config),
        "source": path.name,
    }
    values |= faces.NETWORKS[architecture].settings(config)
    return name, values, {key: np.asarray(tensor, np.float32) for key, tensor in matched.items()}


def write_folder(
    destination: Path,
    detector: Path,
    embedder: Path,
    judge: Path | None,
    texts: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Make the folder of a face stack from downloaded files.

    Args:
      destination: the folder; an existing folder of this kind is replaced.
      detector: file of RetinaFace or YuNet.
      embedder: file of ArcFace, Facenet, IResNet, IR-101, SFace or dlib's ResNet.
      judge: as `embedder`; it is used for evaluation but never as a reward.
      texts: further files of the folder by name, such as licences.

    Returns:
      The name of each network by its part.

    Raises:
      UserError: a file is missing, damaged, or of another network; nothing is written then.
    """
    parts = {
        "detector": detector,
        "embedder": embedder,
        **({"judge": judge} if judge is not None else {}),
    }
    names = {}
    with store.atomic_path(destination, marker="detector.json") as new:
        new.mkdir()
        for part, path in parts.items():
            names[part], values, tensors = _published(path)
            if faces.NETWORKS[values["architecture"]].is_detector != (part == "detector"):
                kind = "a detector" if part == "detector" else "an embedder"
                raise UserError(f"--{part} {path}: holds {names[part]}; give {kind}")
            if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
                raise UserError(f"{path}: holds NaN or infinite values; get the file again")
            store.write_file(new / f"{part}.safetensors", tensors)
            store.write_json(new / f"{part}.json", values)
        for name, text in (texts or {}).items():
            (new / name).write_text(text, "utf-8")
    return names
