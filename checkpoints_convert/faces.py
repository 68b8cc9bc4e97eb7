"""Define the tables of names of the face networks.

The IR residual family has three sets of names (`arcface`): those of deepface's
`arcface_weights.pth`, which our small embedder also uses, of insightface and of CurricularFace. The
configuration selects one, since no two of them build the same network. RetinaFace and Facenet name
their modules as the published files do, so only the leaves are renamed (`torch_names`). YuNet and
SFace have the names of the graphs in their ONNX files, dlib's ResNet the names of `dlib_dat`.
Bundled networks keep our names (`plain`). The counters `num_batches_tracked` of a PyTorch file have
no effect and are dropped before matching (`without_counters`).
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from checkpoints_convert.lazy import Described, Shaped
from checkpoints_convert.rules import (
    CONV2D,
    GAMMA2D,
    POINTWISE2D,
    TRANSPOSE,
    VECTOR,
    Op,
    Rule,
    leaves,
)
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.faces.arcface import (
    ARCFACE_R34,
    IR_101,
    IRESNET_34,
    IRESNET_50,
    IRESNET_100,
    ArcFace,
    ArcFaceConfig,
)
from jax_idgrpo.models.faces.dlib_resnet import DlibResNet, DlibResNetConfig
from jax_idgrpo.models.faces.facenet import Facenet, FacenetConfig
from jax_idgrpo.models.faces.retinaface import RetinaFace, RetinaFaceConfig
from jax_idgrpo.models.faces.sface import SFace, SFaceConfig
from jax_idgrpo.models.faces.yunet import HEADS, STRIDES, YuNet, YuNetConfig

Value = TypeVar("Value")

NAMES_OF_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
ARCFACE_TEMPLATE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
TEMPLATE_SIZE = 112  # pixels of the template's crop
FACES = 8  # largest number of faces per frame
COUNTER, UNIT_SCALE = "num_batches_tracked", "features.weight"


@dataclasses.dataclass(frozen=True)
class FlattenedDense(Op):
    """Convert a Linear [E, C h w] after a channels-first flatten to a kernel [h w C, E].

    The kernel follows a channels-last flatten.
    """

    channels: int = 0

    def apply(self, tensor: np.ndarray) -> np.ndarray:
        size, inputs = tensor.shape
        return (
            tensor.reshape(size, self.channels, inputs // self.channels)
            .transpose(2, 1, 0)
            .reshape(inputs, size)
        )

    def invert(self, array: np.ndarray) -> np.ndarray:
        inputs, size = array.shape
        return (
            array.reshape(inputs // self.channels, self.channels, size)
            .transpose(2, 1, 0)
            .reshape(size, inputs)
        )


def _batch_norm(torch: str, jax: str, norm: str = "affine") -> list[Rule]:
    pairs = (
        ("weight", "scale"),
        ("bias", "bias"),
        ("running_mean", "mean"),
        ("running_var", "var"),
    )
    return [
        Rule(f"{torch}.{theirs}", f"{jax}.{ours}", VECTOR)
        for theirs, ours in pairs[{"affine": 0, "bias": 1, "plain": 2}[norm] :]
    ]


def _conv(torch: str, jax: str) -> Rule:
    return Rule(f"{torch}.weight", f"{jax}.kernel", CONV2D)


@dataclasses.dataclass(frozen=True)
class _Names:
    """Names of the parts of an ArcFace network in one family of files."""

    stem: tuple[str, str, str]  # convolution, norm, PReLU
    unit: str  # with {stage} from 1, {k} within the stage, {n} over all stages
    parts: tuple[str, ...]  # of a unit: norm, convolution, norm, PReLU, convolution, norm
    shortcut: tuple[str, str]  # of a unit: convolution, norm
    tail: tuple[str, str, str]  # norm, dense, norm of the embedding


_DEEPFACE = _Names(
    ("backbone.conv1_conv", "backbone.conv1_bn", "backbone.conv1_prelu"),
    "backbone.conv{stage1}.{k}",
    ("bn_1", "conv_1", "bn_2", "prelu_1", "conv_2", "bn_3"),
    ("conv_0", "bn_0"),
    ("bn", "dense", "embedding"),
)
_INSIGHTFACE = _Names(
    ("conv1", "bn1", "prelu"),
    "layer{stage}.{k}",
    ("bn1", "conv1", "bn2", "prelu", "conv2", "bn3"),
    ("downsample.0", "downsample.1"),
    ("bn2", "fc", "features"),
)
_CURRICULARFACE = _Names(
    ("input_layer.0", "input_layer.1", "input_layer.2"),
    "body.{n}",
    tuple(f"res_layer.{k}" for k in range(6)),
    ("shortcut_layer.0", "shortcut_layer.1"),
    ("output_layer.0", "output_layer.3", "output_layer.4"),
)
_BY_NORM = {"affine": _DEEPFACE, "bias": _INSIGHTFACE, "plain": _CURRICULARFACE}


def arcface(config: ArcFaceConfig) -> list[Rule]:
    """List the rules of an ArcFace network; its last norm selects the family of names."""
    names = _BY_NORM[config.embedding_norm]
    rules = [_conv(names.stem[0], "conv"), *_batch_norm(names.stem[1], "norm")]
    rules += [Rule(f"{names.stem[2]}.weight", "prelu.slope", VECTOR)]
    number = 0
    for stage, units in enumerate(config.units):
        for k in range(units):
            torch = names.unit.format(stage=stage + 1, stage1=stage + 2, k=k, n=number)
            jax = f"stages.{stage}.{k}"
            number += 1
            if k == 0 and (stage or config.first_shortcut == "conv"):
                conv, norm = (f"{torch}.{part}" for part in names.shortcut)
                rules += [
                    _conv(conv, f"{jax}.shortcut.conv"),
                    *_batch_norm(norm, f"{jax}.shortcut.norm"),
                ]
            norm1, conv1, norm2, prelu, conv2, norm3 = (f"{torch}.{part}" for part in names.parts)
            rules += [
                _conv(conv1, f"{jax}.conv1"),
                _conv(conv2, f"{jax}.conv2"),
                Rule(f"{prelu}.weight", f"{jax}.prelu.slope", VECTOR),
            ]
            for part, norm in ((1, norm1), (2, norm2), (3, norm3)):
                rules += _batch_norm(norm, f"{jax}.norm{part}")
    norm, dense, embedding = names.tail
    flattened = FlattenedDense(
        TRANSPOSE.permutation, TRANSPOSE.groups, TRANSPOSE.sizes, channels=config.widths[-1]
    )
    rules += [
        Rule(f"{dense}.weight", "dense.kernel", flattened),
        Rule(f"{dense}.bias", "dense.bias", VECTOR),
    ]
    return [
        *rules,
        *_batch_norm(norm, "tail_norm"),
        *_batch_norm(embedding, "embedding_norm", config.embedding_norm),
    ]


def torch_names(state: PyTree) -> list[Rule]:
    """List the rules of a network whose modules are named as in PyTorch; only leaves differ."""
    ops = {1: VECTOR, 2: TRANSPOSE, 4: CONV2D}
    rules = []
    for path, leaf in leaves(state).items():
        module, _, name = path.rpartition(".")
        rules.append(Rule(f"{module}.{NAMES_OF_LEAVES[name]}", path, ops[len(leaf.shape)]))
    return rules


def plain(state: PyTree) -> list[Rule]:
    """List one identity rule per leaf of `state`, for networks that only this project has."""
    sizes = {path: len(leaf.shape) for path, leaf in leaves(state).items()}
    return [
        Rule(path, path, Op(tuple(range(axes)), (1,) * axes, (None,) * axes))
        for path, axes in sizes.items()
    ]


def yunet(config: YuNetConfig) -> list[Rule]:
    """List the rules of YuNet's graph.

    1x1 convolutions have PyTorch's names; the stem and most depthwise convolutions have numbers.
    """
    del config  # no name depends on it
    rules = [Rule("420", "stem.kernel", CONV2D), Rule("421", "stem.bias", VECTOR)]
    units = [("backbone.model0.conv2.conv1", "first")]
    units += [
        (f"backbone.model{k + 1}.conv{j + 1}.conv1", f"stages.{k}.{j}")
        for k in range(5)
        for j in range(2)
    ]
    units += [(f"neck.lateral_convs.{level}.conv1", f"laterals.{level}") for level in (2, 1, 0)]
    named = [
        (point, ours, str(423 + 3 * n), str(424 + 3 * n)) for n, (point, ours) in enumerate(units)
    ]
    for head in HEADS:
        for level in range(len(STRIDES)):
            name = f"bbox_head.multi_level_{head}.{level}"
            depth = f"{name}.conv2"
            named.append((f"{name}.conv1", f"{head}.{level}", f"{depth}.weight", f"{depth}.bias"))
    for point, ours, weight, bias in named:
        rules += [
            Rule(f"{point}.weight", f"{ours}.point.kernel", POINTWISE2D),
            Rule(f"{point}.bias", f"{ours}.point.bias", VECTOR),
        ]
        rules += [
            Rule(weight, f"{ours}.depth_kernel", CONV2D),
            Rule(bias, f"{ours}.depth_bias", VECTOR),
        ]
    return rules


def sface(config: SFaceConfig) -> list[Rule]:
    """List the rules of SFace's graph, whose layers are numbered from 1."""
    rules = [Rule("conv_1_conv2d_weight", "conv.kernel", CONV2D)]
    norms = [("conv_1_batchnorm", "norm"), ("bn1", "tail_norm"), ("fc1", "embedding_norm")]
    slopes = [("conv_1_relu_gamma", "prelu")]
    for block in range(len(config.widths)):
        name, ours = f"conv_{block + 2}", f"blocks.{block}"
        rules += [Rule(f"{name}_dw_conv2d_weight", f"{ours}.depth_kernel", CONV2D)]
        rules += [Rule(f"{name}_conv2d_weight", f"{ours}.point.kernel", POINTWISE2D)]
        norms += [
            (f"{name}_dw_batchnorm", f"{ours}.depth_norm"),
            (f"{name}_batchnorm", f"{ours}.point_norm"),
        ]
        slopes += [
            (f"{name}_dw_relu_gamma", f"{ours}.depth_prelu"),
            (f"{name}_relu_gamma", f"{ours}.point_prelu"),
        ]
    parts = (("gamma", "scale"), ("beta", "bias"), ("moving_mean", "mean"), ("moving_var", "var"))
    rules += [
        Rule(f"{name}_{theirs}", f"{jax}.{ours}", VECTOR)
        for name, jax in norms
        for theirs, ours in parts
    ]
    rules += [Rule(name, f"{jax}.slope", GAMMA2D) for name, jax in slopes]
    flattened = FlattenedDense(
        TRANSPOSE.permutation, TRANSPOSE.groups, TRANSPOSE.sizes, channels=config.widths[-1]
    )
    return [
        *rules,
        Rule("pre_fc1_weight", "dense.kernel", flattened),
        Rule("pre_fc1_bias", "dense.bias", VECTOR),
    ]


DLIB_VECTOR = Op((0, 1, 2, 3), (4,), (1, None, 1, 1))  # [1, N, 1, 1] -> [N]
DLIB_MATRIX = Op((0, 1, 2, 3), (1, 3), (None, None, 1, 1))  # [in, out, 1, 1] -> [in, out]


def dlib_resnet(config: DlibResNetConfig) -> list[Rule]:
    """List the rules of dlib's ResNet, whose layers are numbered from the input.

    The published file has no bias of the last layer; `face_folder.centred` adds one.
    """
    places = ["stem", *(f"blocks.{k}.conv{j}" for k in range(sum(config.blocks)) for j in (1, 2))]
    rules = [
        Rule("fc.0.weights", "dense.kernel", DLIB_MATRIX),
        Rule("fc.0.biases", "dense.bias", DLIB_VECTOR),
    ]
    for n, place in enumerate(places):
        rules += [
            Rule(f"con.{n}.filters", f"{place}.conv.kernel", CONV2D),
            Rule(f"con.{n}.biases", f"{place}.conv.bias", DLIB_VECTOR),
        ]
        rules += [
            Rule(f"affine.{n}.gamma", f"{place}.scale", DLIB_VECTOR),
            Rule(f"affine.{n}.beta", f"{place}.shift", DLIB_VECTOR),
        ]
    return rules


def without_counters(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Drop the batch counters of PyTorch's batch norms."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}


# ---- identification of a file --------------------------------------------------------------------

_EMBEDDERS: dict[str, tuple[str, ArcFaceConfig]] = {
    "ArcFace-R34 of deepface": ("backbone.conv1_conv.weight", ARCFACE_R34),
    "IResNet-34": ("layer1.0.bn1.weight", IRESNET_34),
    "IResNet-50": ("layer1.0.bn1.weight", IRESNET_50),
    "IResNet-100": ("layer1.0.bn1.weight", IRESNET_100),
    "IR-101 of CurricularFace": ("input_layer.0.weight", IR_101),
}


def known(tensors: Mapping[str, Shaped]) -> tuple[str, str, Any] | None:
    """Identify the network of a file of face weights.

    Returns:
      (name for messages, architecture, configuration); None for any other file.
    """
    tensors = without_counters(tensors)
    if "face_rpn_stride32.cls_score.weight" in tensors:
        return "RetinaFace-R50", "retinaface", RetinaFaceConfig()
    if "block35.0.up.weight" in tensors and "bottleneck.weight" in tensors:
        size = tensors["bottleneck.weight"].shape[0]
        return f"Facenet, {size} numbers", "facenet", FacenetConfig(embedding_size=size)
    if "neck.lateral_convs.0.conv1.weight" in tensors and "420" in tensors:
        return "YuNet", "yunet", YuNetConfig()
    if "pre_fc1_weight" in tensors and "conv_2_dw_conv2d_weight" in tensors:
        return "SFace", "sface", SFaceConfig()
    if "fc.0.weights" in tensors and "con.0.filters" in tensors:
        return "ResNet of dlib", "dlib_resnet", DlibResNetConfig()
    there = set(tensors) - {UNIT_SCALE}
    names = {
        name: {rule.torch for rule in arcface(config)}
        for name, (example, config) in _EMBEDDERS.items()
        if example in there
    }
    if not names:
        return None
    # `rules.match` then reports missing and unexpected tensors.
    nearest = min(names, key=lambda name: len(names[name] ^ there))
    return nearest, "arcface", _EMBEDDERS[nearest][1]


def recognise(tensors: Mapping[str, Shaped], source: str) -> tuple[str, str, Any]:
    """Do the same as `known`, but raise a UserError that lists the networks for any other file."""
    if (identified := known(tensors)) is not None:
        return identified
    networks = ", ".join(
        ["RetinaFace-R50", "YuNet", "Facenet", "SFace", "ResNet of dlib", *_EMBEDDERS]
    )
    raise UserError(
        f"{source}: holds none of the face networks that can be read ({networks}); give the file "
        "that the library downloads"
    )


def table(architecture: str, config: Any, state: PyTree) -> list[Rule]:
    """List the rules of a face network.

    Args:
      architecture: name of the architecture.
      config: configuration of the network.
      state: abstract parameters of the network.
    """
    named: dict[str, Callable[[Any], list[Rule]]] = {
        "arcface": arcface,
        "yunet": yunet,
        "sface": sface,
        "dlib_resnet": dlib_resnet,
    }
    if architecture in named:
        return named[architecture](config)
    return torch_names(state) if architecture in ("retinaface", "facenet") else plain(state)


CLASSES: dict[str, tuple[type[nnx.Module], type]] = {
    "retinaface": (RetinaFace, RetinaFaceConfig),
    "arcface": (ArcFace, ArcFaceConfig),
    "facenet": (Facenet, FacenetConfig),
    "yunet": (YuNet, YuNetConfig),
    "sface": (SFace, SFaceConfig),
    "dlib_resnet": (DlibResNet, DlibResNetConfig),
}
DETECTORS = ("retinaface", "yunet")


def file_name(architecture: str, config: Any) -> str:
    """Return the name of a face network's published file.

    YuNet, SFace and dlib's ResNet are written as safetensors with the names of their tensors.
    """
    if architecture in ("yunet", "sface", "dlib_resnet"):
        return f"{architecture}.safetensors"
    if architecture == "arcface":
        return {
            "affine": "arcface_weights.pth",
            "bias": "backbone.pth",
            "plain": "CurricularFace_Backbone.pth",
        }[config.embedding_norm]
    return (
        "retinaface.pth"
        if architecture == "retinaface"
        else f"facenet{'512' if config.embedding_size == 512 else ''}_weights.pth"
    )


def config_from_json(schema: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Read the configuration of class `schema` under `config` in a JSON file.

    Raises:
      KeyError, TypeError, AttributeError: the file describes no network.
    """
    return schema(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values["config"].items()
        }
    )


@functools.lru_cache(maxsize=8)
def abstract(architecture: str, config: Hashable) -> nnx.State:
    """Return the abstract parameters of a face network. The result is shared: do not change it."""
    return nnx.state(nnx.eval_shape(lambda: CLASSES[architecture][0](config, rngs=nnx.Rngs(0))))


def with_unused_tensors(
    architecture: str, config: Hashable, tensors: Mapping[str, Described]
) -> tuple[list[Rule], dict[str, jax.ShapeDtypeStruct]]:
    """Return the table and the shapes of a whole file: of the network and of unused tensors.

    Unused are the batch counters and insightface's frozen scale of ones. They keep their names,
    because `load_state_dict` requires them.

    Args:
      architecture: name of the architecture.
      config: configuration of the network.
      tensors: tensors of the file.
    """
    parameters = abstract(architecture, config)
    beside = {
        name: tensor
        for name, tensor in tensors.items()
        if name == UNIT_SCALE or name.endswith(COUNTER)
    }
    shapes = {
        name: jax.ShapeDtypeStruct(tuple(tensor.shape), tensor.dtype)
        for name, tensor in beside.items()
    }
    return [*table(architecture, config, parameters), *plain(shapes)], {
        **leaves(parameters),
        **shapes,
    }
