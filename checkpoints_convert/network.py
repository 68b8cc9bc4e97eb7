"""Hold one opened network: its config, its table of names and its lazily read tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import PyTree
from numpy.typing import DTypeLike

from checkpoints_convert import rules
from checkpoints_convert.identify import ADAPTER, FAMILIES, STANDALONE
from checkpoints_convert.lazy import FileTensor, ScaledArray, Tensor, blank, deferred
from checkpoints_convert.rules import Rule, Slot
from jax_idgrpo.errors import UserError


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a checkpoint.

    Attributes:
      part: transformer, vae, text_encoder, adapter or face.
      layout: diffusers, transformers, original, store, peft or diffusers-lora.
      config: config of our module, or (rank, alpha) of an adapter.
      values: config in the form of the published layout.
      table: rules between the names of the published layout and ours.
      shapes: abstract parameters.
      tensors: tensors of the files, by the names of the layout.
      source: the opened file or folder.
      original: config.json of the original layout, if there was one.
      surplus: pattern of additional tensors that are ignored, as in the published Phantom file.
      notices: lines about what was chosen, left out or dequantized.
    """

    part: str
    layout: str
    config: Any
    values: Mapping[str, Any]
    table: list[Rule]
    shapes: PyTree
    tensors: Mapping[str, FileTensor]
    source: Path
    original: Mapping[str, Any] | None = None
    surplus: str = ""
    notices: tuple[str, ...] = ()

    @functools.cached_property
    def slots(self) -> list[Slot]:
        """The table, expanded for the shapes, in the layout of the tensors."""
        return rules.expand(
            rules.stored(self.table) if self.layout == "store" else self.table, self.shapes
        )

    @functools.cached_property
    def extra(self) -> list[str]:
        """Names of tensors of the files that the network does not have and that are ignored."""
        known = {name for slot in self.slots for name in (slot.torch, *slot.aliases)}
        prefixes = () if self.part in STANDALONE else FAMILIES[self.part].ignored

        def is_ignored(name: str, tensor: FileTensor) -> bool:
            # Integer scalars are counters, such as the number of a step.
            counter = not tensor.shape and np.issubdtype(tensor.dtype, np.integer)
            surplus = self.surplus != "" and re.match(self.surplus, name) is not None
            return surplus or counter or name.startswith(prefixes)

        return sorted(
            name
            for name, tensor in self.tensors.items()
            if name not in known and is_ignored(name, tensor)
        )

    def matched(self) -> list[tuple[Slot, FileTensor]]:
        """Pair each slot with its tensor; ConversionError if they do not fit."""
        extra = set(self.extra)
        used = {name: tensor for name, tensor in self.tensors.items() if name not in extra}
        by_name = rules.match(self.slots, used, str(self.source))
        return [(slot, by_name[slot.torch]) for slot in self.slots]


@functools.lru_cache(maxsize=16)
def shapes_of(part: str, config: Hashable) -> nnx.State:
    """Return the abstract parameters of a network. The result is shared: do not change it."""
    return nnx.state(nnx.eval_shape(lambda: FAMILIES[part].build(config)))


@dataclasses.dataclass(frozen=True)
class Moved:
    """A tensor whose axes are moved on access.

    Attributes:
      tensor: a tensor of a file, or another `Moved`.
      move: moves the axes of an array or a `ScaledArray`.
      shape: shape after the move.
    """

    tensor: Any
    move: Callable[[Any], Any]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    @property
    def origin(self) -> str:
        return self.tensor.origin

    def deferred(self) -> np.ndarray | ScaledArray:
        """Return the moved values, not computed yet."""
        return self.move(deferred(self.tensor))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.deferred(), dtype=dtype, copy=copy)


def blank_matrices(network: Network) -> list[str]:
    """List matrices that hold only zeros, by their names in the files.

    Such matrices are parts of a file that were never written. Reading a matrix stops at the first
    other value. None are listed for an adapter, which has such matrices before training.
    """
    if network.part == ADAPTER:
        return []
    return [
        tensor.name
        for _, tensor in network.matched()
        if sum(size > 1 for size in tensor.shape) > 1 and blank(tensor)
    ]


def describe_blanks(names: list[str]) -> str:
    """Describe the fault of a file with these matrices of zeros."""
    listed = ", ".join(names[: rules.LISTED]) + (", ..." if len(names) > rules.LISTED else "")
    return (
        f"{len(names)} matrices hold nothing but zeros ({listed}); the file may be incomplete, "
        "compare its checksum"
    )


def ours(network: Network) -> dict[str, Moved]:
    """Return the tensors under our names and in our layout."""
    return {
        slot.name: Moved(tensor, slot.op.apply, slot.shape) for slot, tensor in network.matched()
    }


def published(network: Network, table: list[Rule] | None = None) -> dict[str, Moved]:
    """Return the tensors under the names of `table` (default: the network's) in torch's layout."""
    return renamed(ours(network), network.table if table is None else table, network.shapes)


def renamed(
    parameters: Mapping[str, Tensor], table: list[Rule], shapes: PyTree
) -> dict[str, Moved]:
    """Rename parameters to the names of a table, in torch's layout.

    Args:
      parameters: parameters by our names.
      table: rules between the new names and ours.
      shapes: abstract parameters.
    """
    return {
        slot.torch: Moved(parameters[slot.name], slot.op.invert, slot.torch_shape)
        for slot in rules.expand(table, shapes)
    }


def fill(network: Network, abstract: PyTree) -> PyTree:
    """Fill the tree `abstract` with the tensors of the network, as in `rules.to_jax`.

    Each host reads the slices of its devices. The notices of the network are warnings, and so are
    matrices of only zeros.
    """
    for notice in network.notices:
        warnings.warn(f"{network.source}: {network.part}: {notice}", stacklevel=2)
    if blanks := blank_matrices(network):
        warnings.warn(f"{network.source}: {describe_blanks(blanks)}", stacklevel=2)
    table = rules.stored(network.table) if network.layout == "store" else network.table
    extra = set(network.extra)
    tensors = {name: tensor for name, tensor in network.tensors.items() if name not in extra}
    return rules.to_jax(table, tensors, abstract, str(network.source))


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Convert errors about the content of a config to UserErrors that name the file."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{file}: has no {error}; it should describe this network") from error
    except (ValueError, TypeError, AttributeError) as error:
        line = " ".join(str(error).split())  # messages of some libraries have many lines
        raise UserError(f"{file}: {line}") from error
    except UserError as error:
        raise UserError(str(error) if str(file) in str(error) else f"{file}: {error}") from error
