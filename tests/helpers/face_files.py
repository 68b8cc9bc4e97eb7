"""Files of face networks with random weights: ONNX graphs and networks of dlib."""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from checkpoints_convert import faces, rules
from jax_idgrpo.models.faces.dlib_resnet import MEAN, DlibResNetConfig
from jax_idgrpo.models.faces.sface import EPSILON, TAIL_EPSILON, SFaceConfig
from jax_idgrpo.models.faces.yunet import HEADS

BLOCK = 64


def random_tensors(architecture: str, config: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors under the published names, sized so that activations neither vanish nor explode."""
    rng = np.random.default_rng(seed)
    abstract = faces.abstract(architecture, config)
    tensors = {}
    for slot in rules.expand(faces.table(architecture, config, abstract), abstract):
        shape, name = slot.torch_shape, slot.torch
        if name.endswith(("moving_var", "gamma")):
            value = rng.uniform(0.5, 1.5, shape)
        elif math.prod(shape) == max(shape):
            value = rng.uniform(-0.2, 0.2, shape)
        else:
            value = rng.normal(size=shape) * np.sqrt(2 / math.prod(shape[1:]))
        tensors[name] = value.astype(np.float32)
    return tensors


# ---- protocol buffers ----------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | float | str | bytes) -> bytes:
    """One field: an integer, a float of four bytes, a text or a message."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def initializer(name: str, array: np.ndarray, packed_floats: bool = False) -> bytes:
    kind = {"float32": 1, "int8": 3, "int64": 7}[str(array.dtype)]
    dims = b"".join(field(1, side) for side in array.shape)
    return (
        dims + field(2, kind) + field(8, name) + field(4 if packed_floats else 9, array.tobytes())
    )


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> bytes:
    data = (
        b"".join(field(1, name) for name in inputs)
        + b"".join(field(2, name) for name in outputs)
        + field(4, op)
    )
    for name, value in attributes.items():
        kind, at = {float: (1, 2), int: (2, 3), str: (3, 4)}.get(type(value), (7, 8))
        values = value if isinstance(value, (list, tuple)) else [value]
        data += field(
            5, field(1, name) + b"".join(field(at, one) for one in values) + field(20, kind)
        )
    return data


def value_info(name: str, shape: Sequence[int | str]) -> bytes:
    dims = b"".join(
        field(1, field(1, side) if isinstance(side, int) else field(2, side)) for side in shape
    )
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))


def model(
    nodes: Sequence[bytes],
    initializers: Sequence[bytes],
    inputs: Sequence[bytes] = (),
    outputs: Sequence[bytes] = (),
) -> bytes:
    graph = (
        b"".join(field(1, one) for one in nodes)
        + field(2, "graph")
        + b"".join(field(5, one) for one in initializers)
    )
    graph += b"".join(field(11, one) for one in inputs) + b"".join(
        field(12, one) for one in outputs
    )
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 21))


class Graph:
    """Collects the nodes of a network, whose weights it stores as they are or as integers in blocks."""

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray],
        quantised: Sequence[str] = (),
        packed_floats: bool = False,
    ):
        self.tensors, self.quantised, self.packed = tensors, set(quantised), packed_floats
        self.nodes: list[bytes] = []
        self.initializers: list[bytes] = []
        self.count = 0

    def constant(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(
            initializer(name, array, self.packed and array.dtype == np.float32)
        )
        return name

    def weight(self, name: str) -> str:
        """The name under which an operation finds a weight."""
        array = self.tensors[name]
        if name not in self.quantised:
            return self.constant(name, array)
        rows = array.reshape(array.shape[0], -1)
        block = BLOCK if rows.shape[1] % BLOCK == 0 else rows.shape[1]
        scales = np.abs(rows.reshape(len(rows), -1, block)).max(-1).astype(np.float32) / 100
        zero = np.full(scales.shape, 3, np.int8)
        values = np.round(rows / np.repeat(scales, block, 1)).astype(np.int8) + np.int8(3)
        parts = [
            self.constant(f"{name}_{part}", data)
            for part, data in (("quantized", values), ("scales", scales), ("zero_point", zero))
        ]
        self.nodes.append(
            node("DequantizeLinear", parts, [f"{name}_dequantized"], block_size=block, axis=1)
        )
        if array.ndim == 2:
            return f"{name}_dequantized"
        shape = self.constant(f"{name}_shape", np.asarray(array.shape, np.int64))
        self.nodes.append(node("Reshape", [f"{name}_dequantized", shape], [f"{name}_reshaped"]))
        return f"{name}_reshaped"

    def op(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        self.count += 1
        output = name or f"v{self.count}"
        self.nodes.append(node(op, inputs, [output], **attributes))
        return output

    def conv(self, x: str, weight: str, bias: str = "", stride: int = 1) -> str:
        outputs, inputs, size, _ = self.tensors[weight].shape
        given = [self.weight(weight), *([self.weight(bias)] if bias else [])]
        group = outputs if inputs == 1 and size == 3 else 1
        pads = [size // 2] * 4
        return self.op(
            "Conv",
            x,
            *given,
            strides=[stride] * 2,
            pads=pads,
            group=group,
            dilations=[1, 1],
            kernel_shape=[size] * 2,
        )


def yunet_file(tensors: Mapping[str, np.ndarray], **options: Any) -> bytes:
    """YuNet with the outputs cls_8 ... kps_32, before the reshaping of the published file."""
    graph = Graph(tensors, **options)
    depth = iter(range(423, 463, 3))

    def unit(x: str, point: str) -> str:
        number = next(depth)
        x = graph.conv(x, f"{point}.weight", f"{point}.bias")
        return graph.op("Relu", graph.conv(x, str(number), str(number + 1)))

    def halve(x: str) -> str:
        return graph.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])

    x = unit(graph.op("Relu", graph.conv("input", "420", "421", 2)), "backbone.model0.conv2.conv1")
    x = halve(x)
    maps = []
    for stage in range(5):
        for part in (1, 2):
            x = unit(x, f"backbone.model{stage + 1}.conv{part}.conv1")
        maps.append(x)
        x = halve(x) if stage in (1, 2, 3) else x
    maps = maps[2:]
    scales = graph.constant("464", np.asarray([1, 1, 2, 2], np.float32))
    levels: dict[int, str] = {}
    for level in (2, 1, 0):
        x = maps[level]
        if level < 2:
            options = dict(
                coordinate_transformation_mode="asymmetric", mode="nearest", nearest_mode="floor"
            )
            x = graph.op("Add", x, graph.op("Resize", levels[level + 1], "", scales, **options))
        levels[level] = unit(x, f"neck.lateral_convs.{level}.conv1")
    outputs = []
    for head, size in HEADS.items():
        for level, stride in enumerate((8, 16, 32)):
            name = f"bbox_head.multi_level_{head}.{level}"
            x = graph.conv(levels[level], f"{name}.conv1.weight", f"{name}.conv1.bias")
            x = graph.conv(x, f"{name}.conv2.weight", f"{name}.conv2.bias")
            x = graph.op("Transpose", x, perm=[0, 2, 3, 1])
            if head in ("cls", "obj"):
                x = graph.op("Sigmoid", x)
            graph.op(
                "Reshape",
                x,
                graph.constant(f"shape_{head}_{stride}", np.asarray([1, -1, size], np.int64)),
                name=f"{head}_{stride}",
            )
            outputs.append(value_info(f"{head}_{stride}", [1, "n", size]))
    return model(graph.nodes, graph.initializers, [value_info("input", [1, 3, "h", "w"])], outputs)


def sface_file(tensors: Mapping[str, np.ndarray], config: SFaceConfig, **options: Any) -> bytes:
    """SFace, from pixels of 0 to 255 to the embedding `fc1`."""
    graph = Graph(tensors, **options)

    def norm(x: str, name: str, epsilon: float, output: str = "") -> str:
        parts = [
            graph.weight(f"{name}_{part}")
            for part in ("gamma", "beta", "moving_mean", "moving_var")
        ]
        return graph.op("BatchNormalization", x, *parts, name=output, epsilon=epsilon)

    def layer(x: str, name: str, stride: int = 1) -> str:
        x = norm(
            graph.conv(x, f"{name}_conv2d_weight", stride=stride), f"{name}_batchnorm", EPSILON
        )
        return graph.op("PRelu", x, graph.weight(f"{name}_relu_gamma"))

    x = graph.op("Sub", "data", graph.constant("scalar_op1", np.asarray([127.5], np.float32)))
    x = graph.op("Mul", x, graph.constant("scalar_op2", np.asarray([1 / 128], np.float32)))
    x = layer(x, "conv_1")
    for block in range(len(config.widths)):
        x = layer(x, f"conv_{block + 2}_dw", 2 if block in config.halved else 1)
        x = layer(x, f"conv_{block + 2}")
    x = graph.op("Flatten", norm(x, "bn1", TAIL_EPSILON, "bn1"), axis=1)
    x = graph.op("Gemm", x, graph.weight("pre_fc1_weight"), graph.weight("pre_fc1_bias"), transB=1)
    norm(x, "fc1", TAIL_EPSILON, "fc1")
    side = config.input_size
    outputs = [value_info("fc1", ["n", config.embedding_size])]
    return model(
        graph.nodes, graph.initializers, [value_info("data", ["n", 3, side, side])], outputs
    )


# ---- dlib ----------------------------------------------------------------------------------------------------------------


def number(value: int) -> bytes:
    size = max((abs(value).bit_length() + 7) // 8, 1)
    return bytes([size | (0x80 if value < 0 else 0)]) + abs(value).to_bytes(size, "little")


def real(value: float) -> bytes:
    mantissa, exponent = math.frexp(np.float32(value))
    return number(int(mantissa * (1 << 24))) + number(exponent - 24)


def text(value: str) -> bytes:
    return number(len(value)) + value.encode()


def sides(*values: int) -> bytes:
    return b"".join(map(number, values))


EMPTY = number(2) + sides(0, 0, 0, 0)
NO_ALIAS = number(1) + sides(0, 0, 0, 0)
AFTER = b"110" + 3 * EMPTY  # flags, gradient, output and gradient of the parameters
RATES = 3 * real(1.0) + real(0.0)


def _tensor(*parts: np.ndarray) -> bytes:
    flat = np.concatenate([part.ravel() for part in parts])
    return number(2) + sides(flat.size, 1, 1, 1) + flat.astype("<f4").tobytes()


def _alias(array: np.ndarray) -> bytes:
    return number(1) + sides(*array.shape)


def dlib_file(tensors: Mapping[str, np.ndarray], config: DlibResNetConfig) -> bytes:
    """dlib's face recognition network; without the bias of the last layer, as it is published."""
    layers: list[bytes | None] = []  # None: a tag
    count = 0

    def conv(width: int, size: int, stride: int) -> None:
        nonlocal count
        filters, biases, gamma, beta = (
            tensors[f"{kind}.{count}.{part}"]
            for kind, part in (
                ("con", "filters"),
                ("con", "biases"),
                ("affine", "gamma"),
                ("affine", "beta"),
            )
        )
        count += 1
        pad = size // 2 if stride == 1 else 0
        numbers = sides(width, size, size, stride, stride, pad, pad)
        layers.append(
            text("con_4")
            + _tensor(filters, biases)
            + numbers
            + _alias(filters)
            + _alias(biases)
            + RATES
        )
        layers.append(
            text("affine_") + _tensor(gamma, beta) + _alias(gamma) + _alias(beta) + number(0)
        )

    conv(config.stem, 7, 2)
    layers.extend([text("relu_"), text("max_pool_2") + sides(3, 3, 2, 2, 0, 0)])
    for width, blocks, halved in zip(config.widths, config.blocks, config.halved, strict=True):
        for block in range(blocks):
            down = halved and block == 0
            layers.append(None)
            conv(width, 3, 2 if down else 1)
            layers.append(text("relu_"))
            conv(width, 3, 1)
            layers.extend(
                [None, None, text("avg_pool_2") + sides(2, 2, 2, 2, 0, 0)] if down else []
            )
            layers.extend([text("add_prev_"), text("relu_")])
    weights = tensors["fc.0.weights"]
    layers.append(text("avg_pool_2") + sides(0, 0, 1, 1, 0, 0))
    dense = (
        sides(config.embedding_size, weights.shape[0])
        + _tensor(weights)
        + _alias(weights)
        + NO_ALIAS
    )
    layers.append(text("fc_2") + dense + number(1) + RATES)
    versions = [3] + [1 if layer is None else 2 for layer in layers[1:]]
    head = number(1) + text("loss_metric_2") + real(0.04) + real(0.6) + sides(*reversed(versions))
    start = (
        text("input_rgb_image_sized")
        + b"".join(map(real, MEAN))
        + sides(config.input_size, config.input_size)
    )
    bodies = [b"" if layer is None else layer + AFTER for layer in layers]
    return head + start + bodies[0] + number(1) + b"".join(bodies[1:])
