"""Read dlib's files of networks (`.dat`) without dlib and without running anything in them.

    integer   a byte with the sign (highest bit) and the number of bytes; then these, lowest first
    float     two integers: mantissa and exponent of 2
    text      its length as an integer, then its bytes
    flag      the character 0 or 1
    tensor    the version 2, four sizes, float32 numbers
    alias     the version 1, four sizes: a view of a part of a tensor

A network is the loss, then the version numbers of all its layers from the last to the first, then
the layers from the first to the last. Versions 2 and 3 (the first one, with the input) are layers,
1 is a tag that later layers refer to. A size that goes beyond the end of the file is an error.
Sources: davisking/dlib `dlib/serialize.h`, `dlib/float_details.h`, `dlib/dnn/core.h`,
`dlib/dnn/layers.h`.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from checkpoints_convert.file_types import read_face_file
from jax_idgrpo.errors import UserError

LAYER_LIMIT = 10_000
TEXT_LIMIT = 100  # characters of the name of a kind of layer
TAG, LAYER, FIRST = 1, 2, 3  # versions: of a tag or skip, of a layer, of the layer at the input


class _Damaged(Exception):
    """Description of a fault of the file."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer: its kind without the version, and its integers (sizes, strides and paddings)."""

    kind: str
    numbers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of dlib.

    Attributes:
      tensors: tensors by kind of layer, number of the layer in its kind, and part, as in
        `con.0.filters`.
      layers: layers from the input to the loss.
      mean: mean of red, green and blue, which the input layer subtracts.
      side: height and width of the input in pixels.
    """

    tensors: dict[str, np.ndarray]
    layers: list[Layer]
    mean: tuple[float, ...]
    side: tuple[int, ...]


def is_dat(start: bytes) -> bool:
    """Return whether a file with these first nine bytes is a network of dlib."""
    return start[:3] == b"\x01\x01\x01" and start[4:9] == b"loss_"


def open_file(path: Path) -> Network:
    """Read a network with an input of RGB images of one size.

    Raises:
      UserError: the file cannot be read, is damaged, or has layers that no face network here has.
    """
    data = read_face_file(path)
    try:
        return _Reader(data).network()
    except _Damaged as error:
        raise UserError(
            f"{path}: is no complete network of dlib ({error}); get the file again"
        ) from error


class _Reader:
    """Parse a file from its beginning to its end."""

    def __init__(self, data: bytes):
        self.data, self.at = memoryview(data), 0
        self.tensors: dict[str, np.ndarray] = {}
        self.counts: dict[str, int] = {}
        self.details: dict[str, Callable[[str], list[int]]] = {
            "con_4": self.convolution,
            "affine_": self.affine,
            "fc_2": self.dense,
            "relu_": lambda name: [],
            "add_prev_": lambda name: [],
            "max_pool_2": lambda name: self.integers(6),
            "avg_pool_2": lambda name: self.integers(6),
        }

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise _Damaged(f"{count} bytes expected at byte {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self) -> int:
        head = self.take(1)[0]
        count = head & 0x7F
        if not 1 <= count <= 8:
            raise _Damaged(f"a number of {count} bytes at byte {self.at - 1}")
        value = int.from_bytes(self.take(count), "little")
        return -value if head & 0x80 else value

    def integers(self, count: int) -> list[int]:
        return [self.integer() for _ in range(count)]

    def real(self) -> float:
        mantissa, exponent = self.integers(2)
        if not -1100 <= exponent <= 960:  # infinities and NaN have exponents beyond these
            raise _Damaged("a number that is not finite")
        return math.ldexp(mantissa, exponent)

    def text(self) -> str:
        length = self.integer()
        if not 0 <= length <= TEXT_LIMIT:
            raise _Damaged(f"a name of {length} characters")
        return bytes(self.take(length)).decode("ascii", "backslashreplace")

    def version(self, *known: int) -> int:
        number = self.integer()
        if number not in known:
            raise _Damaged(f"version {number} at byte {self.at}, where {known[0]} is expected")
        return number

    def shape(self) -> list[int]:
        sides = self.integers(4)
        if min(sides) < 0:
            raise _Damaged("a negative size")
        return sides

    def tensor(self) -> np.ndarray:
        self.version(2)
        count = math.prod(self.shape())
        return np.frombuffer(self.take(4 * count), "<f4")

    def parts(self, name: str, values: np.ndarray, *parts: str) -> None:
        """Cut a tensor into the aliases that follow it in the file; skip empty aliases.

        Args:
          name: kind of the layer and its number in this kind.
          values: values of the tensor.
          parts: names of the aliases.
        """
        begin = 0
        for part in parts:
            self.version(1)
            sides = self.shape()
            count = math.prod(sides)
            if begin + count > values.size:
                raise _Damaged(f"{name}.{part} has more than {values.size - begin} numbers")
            if count:
                self.tensors[f"{name}.{part}"] = values[begin : begin + count].reshape(sides)
            begin += count
        if begin != values.size:
            raise _Damaged(f"{name} has {values.size - begin} unused numbers")

    def convolution(self, name: str) -> list[int]:
        values, numbers = self.tensor(), self.integers(7)
        self.parts(name, values, "filters", "biases")
        self.rates()
        return numbers

    def affine(self, name: str) -> list[int]:
        self.parts(name, self.tensor(), "gamma", "beta")
        return self.integers(1)

    def dense(self, name: str) -> list[int]:
        numbers, values = self.integers(2), self.tensor()
        self.parts(name, values, "weights", "biases")
        numbers += self.integers(1)
        self.rates()
        return numbers

    def rates(self) -> None:
        """Skip the four multipliers of training."""
        for _ in range(4):
            self.real()

    def layer(self) -> Layer:
        tag = self.text()
        if tag not in self.details:
            raise _Damaged(f"a layer of kind {tag!a}, which no face network here has")
        kind = tag.rstrip("_0123456789")
        number = self.counts.get(kind, 0)
        self.counts[kind] = number + 1
        numbers = self.details[tag](f"{kind}.{number}")
        for _ in range(3):
            if bytes(self.take(1)) not in (b"0", b"1"):
                raise _Damaged(f"no flag at byte {self.at - 1}")
        for _ in range(3):  # gradients and outputs, which are empty in a published file
            self.tensor()
        return Layer(kind, tuple(numbers))

    def network(self) -> Network:
        self.version(1)
        if (loss := self.text()) != "loss_metric_2":
            raise _Damaged(f"its loss is {loss!a}, not that of a face network")
        self.real(), self.real()
        versions = [self.version(LAYER, TAG, FIRST)]
        while versions[-1] != FIRST:
            if len(versions) > LAYER_LIMIT:
                raise _Damaged(f"more than {LAYER_LIMIT:,} layers")
            versions.append(self.version(LAYER, TAG, FIRST))
        if (entry := self.text()) != "input_rgb_image_sized":
            raise _Damaged(f"its input is {entry!a}, not an image of one size")
        mean = tuple(self.real() for _ in range(3))
        side = tuple(self.integers(2))
        layers = []
        for version in reversed(versions):
            if version == TAG:
                continue
            layers.append(self.layer())
            if version == FIRST:
                self.integer()  # how many images the input layer makes of one
        if self.at != len(self.data):
            raise _Damaged(f"{len(self.data) - self.at} bytes after its end")
        return Network(self.tensors, layers, mean, side)
