"""Map tensors between torch and our parameters by one table of rules per network.

A `Rule` pairs the name of a torch tensor with the path of one of our parameters, and defines how
the axes move. `{i}` in both names stands for the leading axis of a stacked leaf: torch
`blocks.3.attn1.to_q.weight` is row 3 of the leaf `blocks.attn1.to_q.kernel`, and our name of the
row is `blocks.3.attn1.to_q.kernel`. Names match only as a whole.

`expand` writes out the table for given shapes and refuses a table that is not a bijection, so
`to_jax` and `to_torch` are exact inverses. Parameters are addressed by their dotted path in any
pytree of arrays or `jax.ShapeDtypeStruct` (an `nnx.State` from `nnx.split`, or nested
dictionaries).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from checkpoints_convert.lazy import Described, ScaledArray, Shaped, Tensor, deferred, finite
from jax_idgrpo.errors import UserError

LISTED = 6  # names of one kind shown in an error line

Array = TypeVar("Array", np.ndarray, ScaledArray, np.ndarray | ScaledArray)


class ConversionError(UserError):
    """A checkpoint does not fit the network.

    One line lists the missing, unexpected and mis-shaped tensors.
    """


@dataclasses.dataclass(frozen=True)
class Op:
    """Reorder the axes of a torch tensor, then merge neighbours.

    At most one size per group is free, so the operation has an inverse.

    Attributes:
      permutation: torch axis of each axis in the new order.
      groups: number of reordered axes that form each of our axes.
      sizes: size of each torch axis that the inverse cannot infer (kernel taps, axes of size one);
        None where the size is free.
    """

    permutation: tuple[int, ...]
    groups: tuple[int, ...]
    sizes: tuple[int | None, ...]

    def __post_init__(self):
        if sorted(self.permutation) != list(range(len(self.sizes))) or sum(self.groups) != len(
            self.sizes
        ):
            raise ValueError(f"not an invertible reordering: {self}")
        for axes in self._axes():
            if sum(self.sizes[axis] is None for axis in axes) > 1:
                raise ValueError(f"torch axes {axes} cannot be told apart once merged: {self}")

    def _axes(self) -> list[tuple[int, ...]]:
        """Return the torch axes that form each of our axes."""
        starts = np.cumsum((0, *self.groups))
        return [self.permutation[start:stop] for start, stop in itertools.pairwise(starts)]

    def apply(self, tensor: Array) -> Array:
        """Convert a tensor from torch's layout to ours."""
        return tensor.transpose(self.permutation).reshape(self.shape(tensor.shape))

    def shape(self, torch_shape: Sequence[int]) -> tuple[int, ...]:
        """Return our shape of a tensor of torch's shape."""
        return tuple(math.prod(torch_shape[axis] for axis in axes) for axes in self._axes())

    def invert(self, array: Array) -> Array:
        """Convert an array from our layout to torch's."""
        shape = self.torch_shape(array.shape)
        return array.reshape([shape[axis] for axis in self.permutation]).transpose(
            np.argsort(self.permutation)
        )

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return torch's shape of an array of our shape; ValueError if there is none."""
        if len(shape) != len(self.groups):
            raise ValueError(
                f"{len(self.groups)} axes expected, the parameter has shape {tuple(shape)}"
            )
        sizes = list(self.sizes)
        for axes, size in zip(self._axes(), shape, strict=True):
            known = math.prod(self.sizes[axis] or 1 for axis in axes)
            free = [axis for axis in axes if self.sizes[axis] is None]
            if size % known or (not free and size != known):
                raise ValueError(
                    f"axis of size {size} does not hold {known} of shape {tuple(shape)}"
                )
            for axis in free:
                sizes[axis] = size // known
        return tuple(int(size) for size in sizes if size is not None)


@dataclasses.dataclass(frozen=True)
class FlattenedDense(Op):
    """Convert a Linear [E, C h w] after a channels-first flatten to a kernel [h w C, E].

    The kernel follows a channels-last flatten.
    """

    channels: int = 0

    def apply(self, tensor: Array) -> Array:
        size, inputs = tensor.shape
        return (
            tensor.reshape(size, self.channels, inputs // self.channels)
            .transpose(2, 1, 0)
            .reshape(inputs, size)
        )

    def invert(self, array: Array) -> Array:
        inputs, size = array.shape
        return (
            array.reshape(inputs // self.channels, self.channels, size)
            .transpose(2, 1, 0)
            .reshape(size, inputs)
        )


VECTOR = Op((0,), (1,), (None,))  # biases, norm weights
MATRIX = Op((0, 1), (1, 1), (None, None))  # embeddings: as they are
TRANSPOSE = Op((1, 0), (1, 1), (None, None))  # Linear [out, in] -> [in, out]
TABLE = Op((0, 1, 2), (2, 1), (1, None, None))  # modulation [1, rows, D] -> [rows, D]
CONV2D = Op((2, 3, 1, 0), (1, 1, 1, 1), (None,) * 4)  # [O, I, h, w] -> [h, w, I, O]
CONV3D = Op((2, 3, 4, 1, 0), (1, 1, 1, 1, 1), (None,) * 5)  # [O, I, t, h, w] -> [t, h, w, I, O]
POINTWISE2D = Op((2, 3, 1, 0), (3, 1), (None, None, 1, 1))  # [O, I, 1, 1] -> [I, O]
POINTWISE3D = Op((2, 3, 4, 1, 0), (4, 1), (None, None, 1, 1, 1))  # [O, I, 1, 1, 1] -> [I, O]
GAMMA2D = Op((0, 1, 2), (3,), (None, 1, 1))  # [C, 1, 1] -> [C]
GAMMA3D = Op((0, 1, 2, 3), (4,), (None, 1, 1, 1))  # [C, 1, 1, 1] -> [C]


def patch(size: Sequence[int]) -> Op:
    """Return the op of a patch embedding: [D, C, t, h, w] to [t*h*w*C, D], channel fastest.

    Args:
      size: size (t, h, w) of the kernel.
    """
    return Op((2, 3, 4, 1, 0), (4, 1), (None, None, *size))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pair of a torch tensor and one of our parameters.

    Attributes:
      torch: name of the tensor; `{i}` stands for the index along the stacked axis.
      jax: path of the parameter, with `{i}` if `torch` has it.
      op: movement of the axes.
      aliases: other names of the tensor in published files (tied weights); read but not written.
    """

    torch: str
    jax: str
    op: Op
    aliases: tuple[str, ...] = ()

    def __post_init__(self):
        if {name.count("{i}") for name in (self.torch, self.jax, *self.aliases)} not in ({0}, {1}):
            raise ValueError(f"{{i}} must occur once in both names or in neither: {self}")


@dataclasses.dataclass(frozen=True)
class Slot:
    """One torch tensor and its place: a whole leaf, or one row of a stacked leaf.

    Attributes:
      torch: name of the tensor.
      aliases: other names of the tensor.
      name: our name of the leaf or row, with the index.
      leaf: dotted path of the leaf, without the index.
      index: row of a stacked leaf; None for a whole leaf.
      op: movement of the axes.
      shape: shape of the leaf or row in our layout.
    """

    torch: str
    aliases: tuple[str, ...]
    name: str
    leaf: str
    index: int | None
    op: Op
    shape: tuple[int, ...]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in torch's layout."""
        return self.op.torch_shape(self.shape)


Matched = TypeVar("Matched", bound=Shaped)


def linear(torch: str, jax: str, bias: bool = True) -> list[Rule]:
    """List the rules of a linear layer.

    Args:
      torch: torch's name of the module.
      jax: our name of the module.
      bias: whether the layer has a bias.
    """
    weight = Rule(f"{torch}.weight", f"{jax}.kernel", TRANSPOSE)
    return [weight, Rule(f"{torch}.bias", f"{jax}.bias", VECTOR)] if bias else [weight]


def stored(rules: Sequence[Rule]) -> list[Rule]:
    """List the rules of the project's store: our names, torch's axes.

    With torch's axes, import and export move none, and the rows of a matrix on one device are
    contiguous in the file.
    """
    return [Rule(rule.jax, rule.jax, rule.op) for rule in rules]


def is_stored(names: Iterable[str]) -> bool:
    """Return whether the names are ours; only our names end in `kernel` or `scale`."""
    return any(name.endswith((".kernel", ".scale")) for name in names)


def infer(
    rules: Sequence[Rule], tensors: Mapping[str, Described], source: str
) -> dict[str, jax.ShapeDtypeStruct]:
    """Infer the parameters of a file without a config.

    A stack is as long as the highest index in the names of its tensors.

    Args:
      rules: table of the network.
      tensors: name -> anything with `shape` and `dtype`.
      source: name of the file, for messages.

    Returns:
      Path -> shape and dtype.

    Raises:
      ConversionError: a rule matches no tensor.
    """
    heights: dict[str, int] = {}
    examples: dict[Rule, Described] = {}
    for rule in rules:
        pattern = re.compile(re.escape(rule.torch).replace(re.escape("{i}"), r"(\d+)"))
        for name, tensor in tensors.items():
            if found := pattern.fullmatch(name):
                examples.setdefault(rule, tensor)
                if len(tensor.shape) != len(rule.op.sizes):
                    raise ConversionError(
                        f"{source}: {name} has {len(tensor.shape)} axes instead of "
                        f"{len(rule.op.sizes)}"
                    )
                if found.groups():
                    stack = rule.jax.partition("{i}")[0]
                    heights[stack] = max(heights.get(stack, 0), 1 + int(found.group(1)))
    if missing := [rule.torch for rule in rules if rule not in examples]:
        raise ConversionError(
            f"{source}: no tensor named {', '.join(missing[:LISTED])}; is it of this network?"
        )
    leaves = {}
    for rule, tensor in examples.items():
        stack, stacked, _ = rule.jax.partition("{i}")
        leading = (heights[stack],) if stacked else ()
        shape = leading + rule.op.shape(tensor.shape)
        leaves[rule.jax.replace("{i}.", "")] = jax.ShapeDtypeStruct(shape, tensor.dtype)
    return leaves


def leaf_path(path: KeyPath) -> str:
    """Join a key path of `jax.tree_util` with dots, without the `value` of NNX variables."""
    keys = list(path)
    if isinstance(keys[-1], jax.tree_util.GetAttrKey):
        keys.pop()
    return jax.tree_util.keystr(tuple(keys), simple=True, separator=".")


def leaves(state: PyTree) -> dict[str, Any]:
    """Map dotted paths to the leaves of an `nnx.State` or of nested dictionaries."""
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def expand(rules: Sequence[Rule], state: PyTree) -> list[Slot]:
    """Expand the table for the shapes of `state`: one slot per torch tensor.

    The result is one to one by names, and each op is one to one on shapes.

    Raises:
      ValueError: the table is wrong: a leaf has no rule or two, a rule has no leaf, or two slots
        share a torch name.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves(state).items()}
    slots: list[Slot] = []
    covered: set[str] = set()
    for rule in rules:
        leaf = rule.jax.replace("{i}.", "")
        if leaf not in shapes:
            raise ValueError(f"rule for {rule.jax}: the network has no such parameter")
        if leaf in covered:
            raise ValueError(f"two rules for {rule.jax}")
        covered.add(leaf)
        stacked = "{i}" in rule.jax
        shape = shapes[leaf][1:] if stacked else shapes[leaf]
        for index in range(shapes[leaf][0]) if stacked else (None,):
            torch, name, *aliases = (
                text.replace("{i}", str(index)) for text in (rule.torch, rule.jax, *rule.aliases)
            )
            slots.append(Slot(torch, tuple(aliases), name, leaf, index, rule.op, shape))
    if missing := sorted(set(shapes) - covered):
        raise ValueError(f"no rule for {', '.join(missing)}")
    names = [name for slot in slots for name in (slot.torch, *slot.aliases)]
    if len(set(names)) != len(names):
        raise ValueError(
            f"two rules for the tensors {sorted({name for name in names if names.count(name) > 1})}"
        )
    return slots


def match(slots: Sequence[Slot], tensors: Mapping[str, Matched], source: str) -> dict[str, Matched]:
    """Match tensors to slots by names and shapes, before any value is read.

    Args:
      slots: slots of the network.
      tensors: name -> anything with `shape`.
      source: name of the file, for messages.

    Returns:
      The tensor of each slot, by the slot's torch name.

    Raises:
      ConversionError: tensors are missing, unexpected or mis-shaped; the message lists them.
    """
    matched: dict[str, Matched] = {}
    missing: list[str] = []
    shapes: list[str] = []
    used: set[str] = set()
    for slot in slots:
        present = [name for name in (slot.torch, *slot.aliases) if name in tensors]
        used.update(present)
        if not present:
            missing.append(slot.torch)
        shapes.extend(
            f"{name} {list(tensors[name].shape)} instead of {list(slot.torch_shape)}"
            for name in present
            if tuple(tensors[name].shape) != slot.torch_shape
        )
        if present:
            matched[slot.torch] = tensors[present[0]]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", sorted(set(tensors) - used)),
            ("mis-shaped", shapes),
        )
        if names
    ]
    if problems:
        raise ConversionError(
            f"{source}: the tensors do not fit the network; {'; '.join(problems)}"
        )
    return matched


def to_jax(
    rules: Sequence[Rule],
    tensors: Mapping[str, Tensor],
    abstract: PyTree,
    source: str = "the checkpoint",
) -> PyTree:
    """Fill a tree with torch tensors.

    A host reads only the slices of its devices, one leaf at a time. Values are cast to the dtype of
    their leaf.

    Args:
      rules: table of the network.
      tensors: name -> array, or lazily read tensor with `shape`.
      abstract: tree of shapes, dtypes and optionally shardings.
      source: name of the file, for messages.

    Returns:
      A tree of jax arrays.

    Raises:
      ConversionError: as in `match`, or a value is NaN or infinite.
    """
    slots = expand(rules, abstract)
    matched = match(slots, tensors, source)
    by_leaf: dict[str, list[Slot]] = {}
    for slot in slots:
        by_leaf.setdefault(slot.leaf, []).append(slot)

    def fill(path, leaf):
        place = slices(by_leaf[leaf_path(path)], matched, leaf, source)
        if leaf.sharding is None:
            return jax.device_put(place((slice(None),) * len(leaf.shape)))
        return jax.make_array_from_callback(tuple(leaf.shape), leaf.sharding, place)

    return jax.tree_util.tree_map_with_path(fill, abstract)


def slices(
    slots: Sequence[Slot], tensors: Mapping[str, Tensor], leaf: Described, source: str
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Make a function from an index into a leaf to the values there; it reads no others.

    The last few results are cached, because devices with copies request the same values in turn.

    Args:
      slots: slots of the leaf, in the order of its rows.
      tensors: tensors by torch name.
      leaf: anything with `shape` and `dtype`.
      source: name of the file, for messages.

    Raises:
      ConversionError: from the returned function, a value is NaN or infinite.
    """

    @functools.lru_cache(maxsize=8)
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        within = tuple(slice(*bound) for bound in bounds)
        stacked = slots[0].index is not None
        rows = slots[within[0]] if stacked else slots
        values = np.empty([stop - start for start, stop in bounds], leaf.dtype)
        for row, slot in enumerate(rows):
            moved = slot.op.apply(deferred(tensors[slot.torch]))
            value = np.asarray(moved[within[1:] if stacked else within])
            if not finite(value):
                raise ConversionError(
                    f"{source}: tensor {slot.torch} holds NaN or infinite values; get the file "
                    "again"
                )
            values[row if stacked else ...] = value
        return values

    shape = tuple(leaf.shape)
    return lambda index: read(
        tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
    )


def to_torch(rules: Sequence[Rule], state: PyTree) -> dict[str, np.ndarray]:
    """Invert `to_jax`: return torch name -> array with the dtype of the leaf.

    Arrays are views of leaves that are on the host.
    """
    host = {path: np.asarray(leaf) for path, leaf in leaves(state).items()}
    return {
        slot.torch: slot.op.invert(_row(host[slot.leaf], slot)) for slot in expand(rules, state)
    }


def _row(leaf: np.ndarray, slot: Slot) -> np.ndarray:
    return leaf if slot.index is None else leaf[slot.index]
