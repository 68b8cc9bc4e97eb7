"""Hold one opened network: its config, its table of names and its tensors, still in their files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert import rules
from checkpoints_convert.identify import ADAPTER, ALONE, FAMILIES
from checkpoints_convert.lazy import LazyTensor, blank
from checkpoints_convert.rules import Rule, Slot
from jax_idgrpo.errors import UserError


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a checkpoint.

    part: transformer, vae, text_encoder, adapter or face. layout: diffusers, transformers, original, store, peft or diffusers-lora.
    config: of our module, or (rank, alpha) of an adapter. values: the config as the published layout writes it.
    table: names of the published layout against ours. shapes: abstract parameters. tensors: what the files hold, by the names
    of the layout. source: what was opened. original: the config.json of the original layout, as found.
    surplus: whether names that the network does not have are passed over, as in the published Phantom file.
    """

    part: str
    layout: str
    config: Any
    values: Mapping[str, Any]
    table: list[Rule]
    shapes: Any
    tensors: Mapping[str, LazyTensor]
    source: Path
    original: Mapping[str, Any] | None = None
    surplus: bool = False

    @functools.cached_property
    def slots(self) -> list[Slot]:
        """The table written out, in the layout that the tensors are in."""
        return rules.expand(
            rules.stored(self.table) if self.layout == "store" else self.table, self.shapes
        )

    @functools.cached_property
    def extra(self) -> list[str]:
        """Tensors of the files that the network does not have and that are passed over."""
        known = {name for slot in self.slots for name in (slot.torch, *slot.aliases)}
        ignored = () if self.part in ALONE else FAMILIES[self.part].ignored

        def is_passed_over(name: str, tensor: LazyTensor) -> bool:
            counter = not tensor.shape and np.issubdtype(
                tensor.dtype, np.integer
            )  # such as the number of a step
            return self.surplus or counter or name.startswith(ignored)

        return sorted(
            name
            for name, tensor in self.tensors.items()
            if name not in known and is_passed_over(name, tensor)
        )

    def matched(self) -> list[tuple[Slot, LazyTensor]]:
        """Each slot with its tensor; ConversionError when they do not fit."""
        passed = set(self.extra)
        wanted = {name: tensor for name, tensor in self.tensors.items() if name not in passed}
        found = rules.match(self.slots, wanted, str(self.source))
        return [(slot, found[slot.torch]) for slot in self.slots]


@dataclasses.dataclass(frozen=True)
class Moved:
    """A tensor with its axes moved when it is written or compared."""

    tensor: Any  # of a file, or itself moved
    move: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    @property
    def origin(self) -> str:
        return self.tensor.origin

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.move(np.asarray(self.tensor)), dtype=dtype, copy=copy)


def blank_matrices(network: Network) -> list[str]:
    """List matrices that hold nothing but zeros, by their names in the files.

    They are parts of a file that were never written. Little is read of any other matrix. An adapter
    has such matrices before it is trained, so that none of its are listed.
    """
    if network.part == ADAPTER:
        return []
    return [
        tensor.name
        for _, tensor in network.matched()
        if sum(size > 1 for size in tensor.shape) > 1 and blank(tensor)
    ]


def describe_blanks(names: list[str]) -> str:
    """Describe what is wrong with a file that has these matrices of zeros."""
    listed = ", ".join(names[: rules.LISTED]) + (", ..." if len(names) > rules.LISTED else "")
    return f"{len(names)} matrices hold nothing but zeros ({listed}); the file may not be whole, compare its checksum"


def ours(network: Network) -> dict[str, Moved]:
    """The tensors under our names and in our layout."""
    return {
        slot.name: Moved(tensor, slot.op.apply, slot.shape) for slot, tensor in network.matched()
    }


def published(network: Network, table: list[Rule] | None = None) -> dict[str, Moved]:
    """The tensors under the names of `table` (default: the network's own) and in torch's layout."""
    return renamed(ours(network), network.table if table is None else table, network.shapes)


def renamed(parameters: Mapping[str, Any], table: list[Rule], shapes: Any) -> dict[str, Moved]:
    """Parameters under our names as tensors under the names of `table` and in torch's layout."""
    return {
        slot.torch: Moved(parameters[slot.name], slot.op.invert, slot.torch_shape)
        for slot in rules.expand(table, shapes)
    }


def fill(network: Network, abstract: Any) -> Any:
    """Fill the tree `abstract` with the tensors of the network, as in `rules.to_jax`.

    Each host reads what its devices hold. Warns of matrices that hold nothing but zeros.
    """
    if blanks := blank_matrices(network):
        warnings.warn(f"{network.source}: {describe_blanks(blanks)}", stacklevel=2)
    table = rules.stored(network.table) if network.layout == "store" else network.table
    extra = set(network.extra)
    tensors = {name: tensor for name, tensor in network.tensors.items() if name not in extra}
    return rules.to_jax(table, tensors, abstract, str(network.source))


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Complaints about what a config says as UserErrors that name the file."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{file}: has no {error}; it should describe this network") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: {' '.join(str(error).split())}"
        ) from error  # some libraries complain over many lines
    except UserError as error:
        raise UserError(str(error) if str(file) in str(error) else f"{file}: {error}") from error
