"""Define the tables of names of the face networks.

The IR residual family has its own module (`arcface`). RetinaFace and Facenet name
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
from flax import nnx
from jaxtyping import PyTree

from checkpoints_convert import arcface
from checkpoints_convert.lazy import Described, Shaped
from checkpoints_convert.rules import (
    CONV2D,
    GAMMA2D,
    POINTWISE2D,
    TRANSPOSE,
    VECTOR,
    FlattenedDense,
    Op,
    Rule,
    leaves,
)
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.faces.arcface import ArcFace, ArcFaceConfig
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
DLIB_TEMPLATE = ((47.34, 44.33), (99.85, 44.33), (73.60, 76.83), (50.54, 101.78), (96.65, 101.78))
FACES = 8  # largest number of faces per frame
COUNTER = "num_batches_tracked"


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


# ---- the networks ---------------------------------------------------------------------------------

Points = tuple[tuple[float, float], ...]
Tensors = Mapping[str, Shaped]


@dataclasses.dataclass(frozen=True)
class FaceNetwork:
    """One architecture: its classes, its published files, and what a reward needs to know of it.

    Attributes:
      network: module class; `network(config, rngs=rngs)` builds it.
      config: frozen dataclass of its configuration, with the published values as defaults.
      names: names of its published networks, for messages.
      signs: tensors that all its published files hold.
      file_name: name of the published file of a configuration.
      rules: lists its table of names; None if its modules are named as in the PyTorch file.
      threshold: minimum score of a detector, as published; None for an embedder.
      template: x, y of the landmarks in an embedder's crop with a side of `template_size` pixels.
      template_size: see `template`.
      cosines: similarity_low, similarity_high and missing of an embedder.
    """

    network: Any
    config: Any
    names: tuple[str, ...]
    signs: tuple[str, ...]
    file_name: Callable[[Any], str]
    rules: Callable[[Any], list[Rule]] | None = None
    threshold: float | None = None
    template: Points = ARCFACE_TEMPLATE
    template_size: int = 112
    cosines: tuple[float, float, float] = (0.0, 0.9, 0.15)

    @property
    def is_detector(self) -> bool:
        """Whether the network detects faces; otherwise it embeds them."""
        return self.threshold is not None

    def settings(self, config: Any) -> dict[str, Any]:
        """Return the fields of the network's JSON file beside architecture and configuration."""
        if self.is_detector:
            return {"max_faces": FACES, "threshold": self.threshold}
        scale = config.input_size / self.template_size
        low, high, missing = self.cosines
        return {
            "template": [[scale * x, scale * y] for x, y in self.template],
            "similarity_low": low,
            "similarity_high": high,
            "missing": missing,
        }


# To add a network, add its rules above and one entry here.
NETWORKS: dict[str, FaceNetwork] = {
    "retinaface": FaceNetwork(
        RetinaFace,
        RetinaFaceConfig,
        ("RetinaFace-R50",),
        ("face_rpn_stride32.cls_score.weight",),
        lambda config: "retinaface.pth",
        threshold=0.9,
    ),
    "yunet": FaceNetwork(
        YuNet,
        YuNetConfig,
        ("YuNet",),
        ("neck.lateral_convs.0.conv1.weight", "420"),
        lambda config: "yunet.safetensors",
        yunet,
        threshold=0.6,
    ),
    "facenet": FaceNetwork(
        Facenet,
        FacenetConfig,
        ("Facenet",),
        ("block35.0.up.weight", "bottleneck.weight"),
        lambda config: f"facenet{'512' if config.embedding_size == 512 else ''}_weights.pth",
    ),
    "sface": FaceNetwork(
        SFace,
        SFaceConfig,
        ("SFace",),
        ("pre_fc1_weight", "conv_2_dw_conv2d_weight"),
        lambda config: "sface.safetensors",
        sface,
        cosines=(0.25, 0.8, 0.3),
    ),
    "dlib_resnet": FaceNetwork(
        DlibResNet,
        DlibResNetConfig,
        ("ResNet of dlib",),
        ("fc.0.weights", "con.0.filters"),
        lambda config: "dlib_resnet.safetensors",
        dlib_resnet,
        template=DLIB_TEMPLATE,
        template_size=150,
        cosines=(0.55, 0.85, 0.6),
    ),
    "arcface": FaceNetwork(
        ArcFace,
        ArcFaceConfig,
        tuple(arcface.NETWORKS),
        (),  # `arcface.nearest` decides
        lambda config: arcface.FILES[config.embedding_norm],
        arcface.names,
    ),
}


def known(tensors: Tensors) -> tuple[str, str, Any] | None:
    """Identify the network of a file of face weights.

    Returns:
      (name for messages, architecture, configuration); None for any other file.
    """
    tensors = without_counters(tensors)
    for architecture, entry in NETWORKS.items():
        if entry.signs and all(name in tensors for name in entry.signs):
            if architecture == "facenet":  # Facenet and Facenet512 differ in one size
                size = tensors["bottleneck.weight"].shape[0]
                return f"Facenet, {size} numbers", architecture, FacenetConfig(embedding_size=size)
            return entry.names[0], architecture, entry.config()
    nearest = arcface.nearest(tensors)
    return nearest and (nearest[0], "arcface", nearest[1])


def recognise(tensors: Tensors, source: str) -> tuple[str, str, Any]:
    """Do the same as `known`, but raise a UserError that lists the networks for any other file."""
    if (identified := known(tensors)) is not None:
        return identified
    networks = ", ".join(name for entry in NETWORKS.values() for name in entry.names)
    raise UserError(
        f"{source}: holds none of the face networks that can be read ({networks}); give the file "
        "that the library downloads"
    )


def table(architecture: str, config: Any, state: PyTree) -> list[Rule]:
    """List the rules of a face network.

    Args:
      architecture: name of the architecture; names that are not in `NETWORKS` are bundled networks.
      config: configuration of the network.
      state: abstract parameters of the network.
    """
    if architecture not in NETWORKS:
        return plain(state)
    named = NETWORKS[architecture].rules
    return torch_names(state) if named is None else named(config)


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
    return nnx.state(
        nnx.eval_shape(lambda: NETWORKS[architecture].network(config, rngs=nnx.Rngs(0)))
    )


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
        if name == arcface.UNIT_SCALE or name.endswith(COUNTER)
    }
    shapes = {
        name: jax.ShapeDtypeStruct(tuple(tensor.shape), tensor.dtype)
        for name, tensor in beside.items()
    }
    return [*table(architecture, config, parameters), *plain(shapes)], {
        **leaves(parameters),
        **shapes,
    }
