"""Select the weights that full fine-tuning trains, and combine them with the frozen ones.

The blocks of a stack share one leaf with a leading axis of layers. If only some layers of a leaf
are trained, the leaf is divided: both parts have its path and fewer layers. Trained weights may be
float32. The network gets them in the dtypes in which an export stores them.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, DTypeLike

from checkpoints_convert import rules, wan
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.wan import WanTransformer
from jax_idgrpo.parallel import sharding

EXAMPLE = "blocks.0.attn1.to_q.weight"

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What is trained of one leaf.

    Attributes:
      dtype: dtype in which the network uses the leaf.
      layers: number of layers of the leaf; 0 for a leaf that is trained as a whole.
      chosen: trained layers in rising order; empty for a leaf that is trained as a whole.
    """

    dtype: DTypeLike
    layers: int = 0
    chosen: tuple[int, ...] = ()

    @property
    def others(self) -> tuple[int, ...]:
        """Frozen layers in rising order."""
        return tuple(sorted({*range(self.layers)} - {*self.chosen}))

    def merged(self, trained: Array, frozen: Array) -> Array:
        """Put the trained and the frozen layers of a leaf in order."""
        pieces, at = [], {True: 0, False: 0}
        for ours, run in itertools.groupby(range(self.layers), key=set(self.chosen).__contains__):
            count = len(list(run))
            start, at[ours] = at[ours], at[ours] + count
            pieces.append((trained if ours else frozen)[start : start + count])
        return jnp.concatenate(pieces)


@dataclasses.dataclass(frozen=True)
class TrainedWeights:
    """The trained weights of a transformer; hashable.

    Attributes:
      leaves: pairs of a leaf's path and what is trained of it.
      mesh: devices of the weights.
    """

    leaves: tuple[tuple[Path, Trained], ...]
    mesh: Mesh | None = None

    def split(self, state: nnx.State) -> tuple[nnx.State, nnx.State]:
        """Split the parameters of a transformer, or their shapes, into trained and frozen ones."""
        wanted = dict(self.leaves)
        trained: dict[Path, nnx.Variable] = {}
        frozen: dict[Path, nnx.Variable] = {}
        for path, variable in nnx.to_flat_state(state):
            if path not in wanted:
                frozen[path] = variable
            elif not (leaf := wanted[path]).chosen:
                trained[path] = variable
            else:
                value = variable.get_value()
                trained[path] = variable.replace(_take(value, leaf.chosen))
                frozen[path] = variable.replace(_take(value, leaf.others))
        return tuple(nnx.from_flat_state(sorted(part.items())) for part in (trained, frozen))

    def merge(self, trained: nnx.State, frozen: nnx.State) -> nnx.State:
        """Combine the results of `split`, of which the trained part may have other dtypes."""
        whole, wanted = dict(nnx.to_flat_state(frozen)), dict(self.leaves)
        # The constraint keeps the conversion before the gathering over `fsdp`.
        for path, variable in nnx.to_flat_state(self.shard(self.stored(trained))):
            if wanted[path].chosen:
                values = variable.get_value(), whole[path].get_value()
                variable = variable.replace(wanted[path].merged(*values))
            whole[path] = variable
        return nnx.from_flat_state(sorted(whole.items()))

    def stored(self, trained: nnx.State) -> nnx.State:
        """Convert trained weights to the dtypes in which the network uses them."""
        wanted = dict(self.leaves)
        return nnx.from_flat_state(
            [
                (path, variable.replace(variable.get_value().astype(wanted[path].dtype)))
                for path, variable in nnx.to_flat_state(trained)
            ]
        )

    def shard(self, trained: nnx.State) -> nnx.State:
        """Shard trained weights or their gradients by the table, inside a program."""
        if self.mesh is None or self.mesh.size == 1:
            return trained
        return jax.lax.with_sharding_constraint(
            trained, sharding.state_shardings(self.mesh, trained)
        )


def _take(
    leaf: Array | jax.ShapeDtypeStruct, layers: Sequence[int]
) -> Array | jax.ShapeDtypeStruct:
    """Select layers of a stacked leaf, or of its shape."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda leaf: leaf[jnp.asarray(layers)], leaf)
    return leaf[jnp.asarray(layers)]


def select_weights(transformer: WanTransformer, patterns: str) -> TrainedWeights:
    """Select weights by patterns of their names in diffusers' layout.

    A pattern is as in `fnmatch` and matches a name, its end, or a module in it: "blocks.2?" are the
    blocks 20 to 29, "attn1" all self-attentions, "blocks.*.ffn" the feed-forward layers of the main
    blocks, "bias" all biases.

    Args:
      transformer: the network without an adapter, with arrays or shapes.
      patterns: patterns separated by commas; "" selects all weights.

    Raises:
      UserError: a pattern selects no weight.
    """
    state = nnx.state(transformer)
    slots = rules.expand(wan.rules(transformer.config), state)
    chosen = {slot.name for slot in slots} if not patterns else set()
    for pattern in map(str.strip, patterns.split(",") if patterns else ()):
        found = {slot.name for slot in slots if _matches(slot.torch, pattern)}
        if not found:
            raise UserError(
                f"model.train_layers {pattern!r}: selects no weight of the transformer; its weights "
                f"have diffusers' names, such as {EXAMPLE}"
            )
        chosen |= found
    leaves = dict(nnx.to_flat_state(state))

    def trained() -> Iterator[tuple[Path, Trained]]:
        for name, group in itertools.groupby(
            sorted(slots, key=lambda slot: slot.leaf), key=lambda slot: slot.leaf
        ):
            rows = list(group)
            layers = tuple(sorted(slot.index or 0 for slot in rows if slot.name in chosen))
            path = tuple(name.split("."))
            if layers:
                dtype = leaves[path].get_value().dtype
                partly = len(layers) < len(rows)
                yield path, Trained(dtype, len(rows), layers) if partly else Trained(dtype)

    return TrainedWeights(tuple(trained()), transformer.config.mesh)


def _matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a name, its end, or a module in it."""
    places = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
    return any(fnmatchcase(name, place) for place in places)
