"""Read ONNX files of convolutional networks without the onnx package, and run nothing in them.

An ONNX file is a protocol buffer: fields of a number, a wire type and a value, nested by lengths.
The reader parses the messages Model > Graph > Initializer and Model > Graph > Node > Attribute,
which have a fixed depth, and skips all others. Before an array is made, every length is checked
against the enclosing message and every tensor against its dimensions. Weights that were quantised
in blocks are restored:

    DequantizeLinear   y = (x - zero_point) * scale, each per `block_size` neighbours on `axis`
    Reshape            to a stored shape

Sources: onnx/onnx `onnx/onnx.proto`, `docs/Operators.md`; the encoding of protocol buffers at
protobuf.dev.
"""

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.file_types import read_face_file
from jax_idgrpo.errors import UserError

FIELD_LIMIT = 1_000_000  # fields in a file; the published files have some ten thousand
AXES_LIMIT = 8
# ONNX's numbers of the types that are read.
DTYPES: dict[int, np.dtype] = {1: np.dtype("<f4"), 3: np.dtype("i1"), 7: np.dtype("<i8")}
QUANTISED = "_quantized"  # the end of the name of a tensor's integers
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
SHOWN = 60  # characters of a name from a file that a message repeats


class _Damaged(Exception):
    """Description of a fault of the file."""


Field = int | memoryview
"""Value of a field of a message."""
Attribute = int | float | bytes | tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation. Inputs and outputs are names; attributes are numbers, bytes or integers."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Graph:
    """Constants by name, and the operations other than those that only restore constants."""

    tensors: dict[str, np.ndarray]
    nodes: list[Node]


def is_onnx(start: bytes) -> bool:
    """Return whether a file with these first nine bytes may be ONNX: field 1 is a small version."""
    return start[:1] == b"\x08" and b"\x03" <= start[1:2] < b"\x40" and start[8:9] != b"{"


def open_file(path: Path) -> Graph:
    """Read the constants and operations of an ONNX file.

    Raises:
      UserError: the file cannot be read, is damaged, or has types and operations that no face
      network here has.
    """
    data = read_face_file(path)
    try:
        return _Reader(data).graph()
    except _Damaged as error:
        raise UserError(
            f"{path}: is no complete ONNX file ({error}); get the file again"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is no complete ONNX file (a name is no text); get the file again"
        ) from error


def _quoted(name: str) -> str:
    return ascii(name if len(name) <= SHOWN else f"{name[:SHOWN]}...")


def _integer(value: Field) -> int:
    """Convert a varint to the signed number of 64 bits that it encodes."""
    if not isinstance(value, int):
        raise _Damaged("a number is stored as something else")
    return value - (1 << 64) if value >> 63 else value


def _bytes(value: Field) -> memoryview:
    if not isinstance(value, memoryview):
        raise _Damaged("a text or message is stored as a number")
    return value


def _text(value: Field) -> str:
    return bytes(_bytes(value)).decode()


class _Reader:
    """Parse a file, and limit the number of fields over all messages."""

    def __init__(self, data: bytes):
        self.data = memoryview(data)
        self.fields_left = FIELD_LIMIT

    def varint(self, data: memoryview, at: int) -> tuple[int, int]:
        """Read the varint at `at`; return its value and its end."""
        value = 0
        for count in range(10):
            if at + count >= len(data):
                raise _Damaged("it ends within a number")
            byte = data[at + count]
            value |= (byte & 0x7F) << (7 * count)
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at + count + 1
        raise _Damaged("a number has more than 64 bits")

    def fields(self, data: memoryview) -> Iterator[tuple[int, Field]]:
        """Yield the number and value of each field of a message; values are integers or bytes."""
        at = 0
        while at < len(data):
            self.fields_left -= 1
            if self.fields_left < 0:
                raise _Damaged(f"more than {FIELD_LIMIT:,} fields")
            key, at = self.varint(data, at)
            kind = key & 7
            value: Field
            if kind == VARINT:
                value, at = self.varint(data, at)
            elif kind in (BYTES, FIXED32, FIXED64):
                length, at = (
                    self.varint(data, at) if kind == BYTES else ({FIXED32: 4, FIXED64: 8}[kind], at)
                )
                if length > len(data) - at:
                    raise _Damaged(f"a field of {length} bytes where {len(data) - at} are left")
                value, at = data[at : at + length], at + length
            else:
                raise _Damaged(f"a field of wire type {kind}")
            yield key >> 3, value

    def integers(self, value: Field) -> list[int]:
        """Read a repeated integer, which is stored as one number or as packed numbers."""
        if isinstance(value, int):
            return [_integer(value)]
        numbers, at = [], 0
        while at < len(value):
            self.fields_left -= 1
            if self.fields_left < 0:
                raise _Damaged(f"more than {FIELD_LIMIT:,} numbers")
            number, at = self.varint(value, at)
            numbers.append(_integer(number))
        return numbers

    def graph(self) -> Graph:
        graphs = [_bytes(value) for number, value in self.fields(self.data) if number == 7]
        if len(graphs) != 1:
            raise _Damaged(f"{len(graphs)} graphs")
        tensors: dict[str, np.ndarray] = {}
        nodes = []
        for number, value in self.fields(graphs[0]):
            if number == 1:
                nodes.append(self.node(_bytes(value)))
            elif number == 5:
                name, tensor = self.tensor(_bytes(value))
                if name in tensors:
                    raise _Damaged(f"two tensors named {_quoted(name)}")
                tensors[name] = tensor
        return _restored(tensors, nodes)

    def node(self, data: memoryview) -> Node:
        inputs: list[str] = []
        outputs: list[str] = []
        op, attributes = "", {}
        for number, value in self.fields(data):
            if number == 1:
                inputs.append(_text(value))
            elif number == 2:
                outputs.append(_text(value))
            elif number == 4:
                op = _text(value)
            elif number == 5:
                name, attribute = self.attribute(_bytes(value))
                attributes[name] = attribute
        return Node(op, tuple(inputs), tuple(outputs), attributes)

    def attribute(self, data: memoryview) -> tuple[str, Attribute]:
        name, many = "", []
        single: Attribute = None
        for number, value in self.fields(data):
            if number == 1:
                name = _text(value)
            elif number == 2:
                if not isinstance(value, memoryview) or len(value) != 4:
                    raise _Damaged(f"attribute {_quoted(name)} is no number")
                single = struct.unpack("<f", value)[0]
            elif number == 3:
                single = _integer(value)
            elif number == 4:
                single = bytes(_bytes(value))
            elif number == 8:
                many += self.integers(value)
        return name, tuple(many) if many else single

    def tensor(self, data: memoryview) -> tuple[str, np.ndarray]:
        shape: list[int] = []
        name, kind, elsewhere = "", 0, False
        parts: list[tuple[int | None, memoryview]] = []
        for number, value in self.fields(data):
            if number == 1:
                shape += self.integers(value)
            elif number == 2:
                kind = _integer(value)
            elif number == 8:
                name = _text(value)
            elif number == 9:
                parts.append((None, _bytes(value)))
            elif number == 4:
                parts.append((1, _bytes(value)))
            elif number in (5, 6, 7, 10, 11, 13, 14):
                elsewhere = elsewhere or bool(value)
        if elsewhere or kind not in DTYPES:
            raise _Damaged(
                f"tensor {_quoted(name)} of ONNX type {kind} is stored in a way that no face "
                "network here is"
            )
        if len(shape) > AXES_LIMIT or any(side < 0 for side in shape):
            raise _Damaged(f"tensor {_quoted(name)} has no possible shape")
        held = sum(len(part) for _, part in parts)
        needed = math.prod(shape) * DTYPES[kind].itemsize
        if held != needed or len(parts) > 1 or any(of not in (None, kind) for of, _ in parts):
            raise _Damaged(f"tensor {_quoted(name)} of {needed:,} bytes holds {held:,}")
        return name, np.frombuffer(parts[0][1] if held else b"", DTYPES[kind]).reshape(shape)


def _restored(tensors: dict[str, np.ndarray], nodes: list[Node]) -> Graph:
    """Restore quantised constants as float32, under their names without `_quantized`."""
    names: dict[str, str] = {}  # name of a restored constant in the nodes -> name in the result
    restored: dict[str, np.ndarray] = {}
    used: set[str] = set()
    rest = []
    for node in nodes:
        if node.op == "DequantizeLinear" and all(name in tensors for name in node.inputs):
            if len(node.inputs) != 3 or len(node.outputs) != 1:
                raise _Damaged("a DequantizeLinear without a zero point")
            name = node.inputs[0].removesuffix(QUANTISED)
            if name in restored or name in tensors:
                raise _Damaged(f"two tensors named {_quoted(name)}")
            values, scale, zero_point = (tensors[part] for part in node.inputs)
            restored[name] = _dequantised(name, values, scale, zero_point, node.attributes)
            names[node.outputs[0]] = name
            used.update(node.inputs)
        elif (
            node.op == "Reshape"
            and len(node.inputs) == 2
            and node.inputs[0] in names
            and node.inputs[1] in tensors
        ):
            name, shape = names[node.inputs[0]], tensors[node.inputs[1]]
            sides = [int(side) for side in shape.ravel()]
            if (
                shape.ndim != 1
                or min(sides, default=0) < 1
                or math.prod(sides) != restored[name].size
            ):
                raise _Damaged(f"tensor {_quoted(name)} does not have the shape that it is given")
            restored[name] = restored[name].reshape(sides)
            names.update(dict.fromkeys(node.outputs, name))
            used.add(node.inputs[1])
        else:
            inputs = tuple(names.get(name, name) for name in node.inputs)
            rest.append(dataclasses.replace(node, inputs=inputs))
    others = {name: tensor for name, tensor in tensors.items() if name not in used}
    return Graph(others | restored, rest)


def _dequantised(
    name: str,
    values: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    attributes: Mapping[str, Any],
) -> np.ndarray:
    """Return (values - zero point) * scale, with one scale per block of neighbours on one axis.

    Args:
      name: name of the tensor, for messages.
      values: int8 integers.
      scale: float32 scale of each block.
      zero_point: int8 zero point of each block.
      attributes: `block_size`, and `axis` (default 1).
    """
    block, axis = attributes.get("block_size"), attributes.get("axis", 1)
    if values.dtype != np.int8 or zero_point.dtype != np.int8 or scale.dtype != np.float32:
        raise _Damaged(f"tensor {_quoted(name)} is not quantised to eight bits")
    whole = (
        isinstance(block, int) and isinstance(axis, int) and block > 0 and 0 <= axis < values.ndim
    )
    blocks = [
        -(-side // block) if whole and k == axis else side for k, side in enumerate(values.shape)
    ]
    if not whole or list(scale.shape) != blocks or list(zero_point.shape) != blocks:
        raise _Damaged(f"tensor {_quoted(name)} is not quantised in blocks")
    group = np.arange(values.shape[axis]) // block
    offset = np.take(zero_point, group, axis).astype(np.int16)
    return (values.astype(np.int16) - offset).astype(np.float32) * np.take(scale, group, axis)
