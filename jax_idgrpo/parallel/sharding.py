"""Build the device mesh, shard parameters by one table, and shard sequences.

    data     rows of a batch
    fsdp     rows of a batch, and the weights, which are gathered where a block needs them
    seq      tokens; attention exchanges tokens for heads, so that every device computes some heads
             over whole sequences
    tensor   heads and hidden features of a block, with its weights

Models call `shard_tokens`, `unshard_fsdp` and `attend` with the mesh that they receive and use no
axis name. Without a mesh, or on one device, these functions do nothing.

Sources: ZeRO, arXiv 1910.02054 (fsdp); DeepSpeed-Ulysses, arXiv 2309.14509 (seq); Megatron-LM,
arXiv 1909.08053 (tensor).
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from jax_idgrpo.config import MeshConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel.hosts import barrier

Tree = TypeVar("Tree")
Network = TypeVar("Network", bound=nnx.Module)

AXES = ("data", "fsdp", "seq", "tensor")
ROWS = ("data", "fsdp")
BATCH = PartitionSpec(ROWS)

# Maps the path of a leaf to the mesh axes of its last dimensions; the first match wins. Adapters,
# their averages and their optimizer moments use the same table. Small leaves, and axes that do not
# divide evenly, stay whole.
TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"lora_a$", ("fsdp", None)),
    (r"lora_b$", (None, "fsdp")),
    (r"attn[12]/to_[qkv]/kernel$", ("fsdp", "tensor")),
    (r"attn[12]/to_[qkv]/bias$", ("tensor",)),
    (r"attn[12]/norm_[qk]/scale$", ("tensor",)),
    (r"attn[12]/to_out/kernel$", ("tensor", "fsdp")),
    (r"ffn/linear_1/kernel$", ("fsdp", "tensor")),
    (r"ffn/linear_1/bias$", ("tensor",)),
    (r"ffn/linear_2/kernel$", ("tensor", "fsdp")),
    (r"/kernel$", (None, "fsdp")),
    (r"(embedding|embed_tokens)$", (None, "fsdp")),
    (r".*", ()),
)


# ---- the mesh ------------------------------------------------------------------------------------


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh of `AXES`; an axis of -1 takes the remaining devices (collective).

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{name} {getattr(config, name)}" for name in AXES)
        raise UserError(
            f"mesh: {asked} does not use the {len(devices)} devices; make their product {len(devices)}, or let an axis take "
            "what is left, as --mesh.data 1 --mesh.fsdp -1 does"
        )
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    if jax.process_count() > 1 and platform(mesh) == "cpu":
        connect_groups(mesh)
    return mesh


def connect_groups(mesh: Mesh) -> None:
    """Let every group of devices along one or several axes exchange a number (collective).

    Gloo connects the processes of a group at their first exchange, and fails if they come to it
    more than 30 s apart. Processes that compile a program are often further apart, above all when
    only some of them find it in the cache. Exchanges of a connected group wait for all.
    """
    barrier("mesh")
    axes = [name for name in AXES if mesh.shape[name] > 1]
    groups = [
        group for count in range(len(axes)) for group in itertools.combinations(axes, count + 1)
    ]
    split = PartitionSpec(tuple(axes))
    sums = jax.shard_map(
        lambda number: [jax.lax.psum(number, group) for group in groups],
        mesh=mesh,
        in_specs=split,
        out_specs=[split] * len(groups),
        check_vma=False,
    )
    ones = device_put_global(np.ones(mesh.size, np.float32), NamedSharding(mesh, split))
    jax.block_until_ready(jax.jit(sums)(ones))


def batch_shards(mesh: Mesh) -> int:
    """Return the number of parts into which the rows of a batch are divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(mesh: Mesh, rows: int, what: str) -> None:
    """Refuse a batch that the mesh cannot split evenly.

    Args:
      mesh: the device mesh.
      rows: number of rows of the batch.
      what: name of the batch in the error message.

    Raises:
      UserError: `rows` is no multiple of the number of batch shards.
    """
    shards = batch_shards(mesh)
    if rows % shards:
        raise UserError(
            f"{what}: {rows} rows do not divide over the {shards} batch shards of the mesh; use a multiple of {shards}"
        )


def rows_for(mesh: Mesh | None, rows: int) -> int:
    """Round `rows` up to a multiple of the number of batch shards."""
    shards = 1 if mesh is None else batch_shards(mesh)
    return -(-rows // shards) * shards


def check_heads(mesh: Mesh, heads: int, ffn_dim: int) -> None:
    """Refuse a network whose heads or hidden features the `tensor` axis cannot split evenly.

    The `seq` axis pads and takes any number of heads.

    Args:
      mesh: the device mesh.
      heads: attention heads of a block.
      ffn_dim: hidden features of a block.

    Raises:
      UserError: one of the numbers is no multiple of the size of `tensor`.
    """
    shards = mesh.shape["tensor"]
    for what, size in (("attention heads", heads), ("feed-forward features", ffn_dim)):
        if size % shards:
            raise UserError(
                f"mesh.tensor {shards} does not divide the {size} {what} of the transformer; use one that does, or mesh.seq"
            )


def platform(mesh: Mesh | None) -> str:
    """Return the platform of the mesh: "cpu", "gpu" or "tpu"; without a mesh, JAX's default."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


# ---- whole arrays --------------------------------------------------------------------------------


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Return the sharding of an array whose batch axis comes after `leading` other axes."""
    return NamedSharding(mesh, PartitionSpec(*([None] * leading), *BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding with which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Look up the partition of a leaf in `TABLE`; leading axes, such as that of layers, stay whole.

    Args:
      path: path of the leaf, as `leaf_name` writes it.
      shape: shape of the leaf.
      mesh: the device mesh.
    """
    last = next(axes for pattern, axes in TABLE if re.search(pattern, path))
    axes = (None,) * (len(shape) - len(last)) + last
    used = [
        name if name and shape[axis] % mesh.shape[name] == 0 and mesh.shape[name] > 1 else None
        for axis, name in enumerate(axes)
    ]
    return PartitionSpec(*used) if any(used) else PartitionSpec()


def leaf_name(path: KeyPath) -> str:
    """Join the keys of a leaf's path with slashes, as `TABLE` expects."""
    name = "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )
    return re.sub(r"/(value|raw_value)$", "", name)


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """Look up the sharding of every leaf of a pytree of arrays or shapes in `TABLE`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(leaf_name(path), np.shape(leaf), mesh)), state
    )


def shard_params(mesh: Mesh, state: Tree) -> Tree:
    """Put the arrays of `state` on the mesh, sharded by `TABLE` (collective)."""
    return device_put_global(state, state_shardings(mesh, state))


def shapes(tree: Tree, shardings: PyTree) -> Tree:
    """Describe a tree of arrays or shapes with shardings: one for all leaves, or a tree of them."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=where),
        tree,
        shardings,
    )


@functools.lru_cache(maxsize=64)
def _reshard(sharding: NamedSharding) -> Callable[[Array], Array]:
    """Compile a program that reshards an array which spans processes (collective)."""
    return jax.jit(lambda array: array, out_shardings=sharding)


def device_put_global(tree: Tree, shardings: PyTree) -> Tree:
    """Put a tree on the devices of its shardings (collective if they span processes).

    Every process passes the same values and transfers only the shards of its own devices.

    Args:
      tree: arrays on the host or on devices.
      shardings: one sharding for all leaves, or a tree of them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(leaf: ArrayLike, sharding: NamedSharding) -> Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return _reshard(sharding)(leaf)
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            bits = one(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: one(leaf, shardings), tree)
    return jax.tree.map(one, tree, shardings)


def fully_shard(mesh: Mesh, state: PyTree) -> PyTree:
    """Shard each leaf over all devices along its largest axis that divides evenly.

    Suits a network that seldom runs.
    """

    def one(leaf: ArrayLike | jax.ShapeDtypeStruct) -> NamedSharding:
        shape = np.shape(leaf)
        axis = max(
            (axis for axis, size in enumerate(shape) if size % mesh.size == 0),
            key=lambda axis: shape[axis],
            default=None,
        )
        return NamedSharding(
            mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXES)
        )

    return jax.tree.map(one, state)


def in_host_memory(shardings: Tree) -> Tree:
    """Return the same shardings in pinned host memory.

    Arrays there must be fetched before use (see `on_devices`).
    """
    return jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), shardings)


def on_devices(network: Network) -> Network:
    """Copy the arrays of a network from host memory to its devices.

    Returns the network itself if its arrays are there already.
    """
    graph, state = nnx.split(network)
    there = fetched(state)
    return network if there is state else nnx.merge(graph, there)


def is_in_host_memory(tree: PyTree) -> bool:
    """Return whether arrays, or shapes with shardings, are in pinned host memory."""
    return any(
        isinstance(where := getattr(leaf, "sharding", None), NamedSharding)
        and where.memory_kind == "pinned_host"
        for leaf in jax.tree.leaves(tree)
    )


def fetched(tree: Tree) -> Tree:
    """Copy arrays from host memory to their devices; returns a tree on devices itself.

    Shapes with shardings become shapes on the devices.
    """
    if not is_in_host_memory(tree):
        return tree
    there = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("device"), tree)
    if isinstance(jax.tree.leaves(tree)[0], jax.ShapeDtypeStruct):
        return shapes(tree, there)
    return device_put_global(tree, there)


# ---- inside a program ----------------------------------------------------------------------------


def unshard_fsdp(mesh: Mesh | None, state: Tree) -> Tree:
    """Gather the parameters of a block over `fsdp` before its matrix products.

    The parameters stay sharded over `tensor`.
    """
    if mesh is None or mesh.size == 1:
        return state

    def one(path: KeyPath, leaf: Array) -> Array:
        kept = [
            name if name == "tensor" else None for name in spec(leaf_name(path), leaf.shape, mesh)
        ]
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*kept)))

    return jax.tree_util.tree_map_with_path(one, state)


def padded(mesh: Mesh | None, tokens: int) -> int:
    """Round `tokens` up to a multiple of the size of the `seq` axis."""
    shards = 1 if mesh is None else mesh.shape["seq"]
    return -(-tokens // shards) * shards


def shard_tokens(mesh: Mesh | None, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """Shard a sequence: rows over the batch axes, tokens over `seq`."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, PartitionSpec(ROWS, "seq", None))
    )


def shard_batch(mesh: Mesh | None, x: Array) -> Array:
    """Shard the rows of an array over the batch axes, and no other axis."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def shard_heads(mesh: Mesh | None, x: Float[Array, "B M K d"]) -> Float[Array, "B M K d"]:
    """Shard keys or values of a short text for `attend` without `split_keys`.

    Rows are sharded over the batch axes, heads over `tensor`.
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, PartitionSpec(ROWS, None, "tensor", None))
    )


def attend(
    mesh: Mesh | None,
    kernel: Callable[[Array, Array, Array, Array | None], Array],
    q: Float[Array, "B N K d"],
    k: Float[Array, "B M K d"],
    v: Float[Array, "B M K d"],
    lengths: Int[Array, " B"] | None,
    split_keys: bool,
) -> Float[Array, "B N K d"]:
    """Apply an attention kernel on every device to its rows and heads, as one `shard_map`.

    Heads are sharded over `tensor`, tokens over `seq`. With `split_keys` (self-attention), tokens
    are exchanged for heads before the kernel and back after it. Heads are padded with zeros to a
    multiple of `seq`. Without `split_keys` (a short text), every device of `seq` holds k and v
    whole and attends from its own tokens.

    Args:
      mesh: the device mesh; without one the kernel is called directly.
      kernel: computes attention from (q, k, v, lengths).
      q: queries.
      k: keys.
      v: values.
      lengths: valid keys of each row; None if all are.
      split_keys: whether k and v are sharded over `seq` like q.

    Returns:
      The attention output, sharded like q.
    """
    if mesh is None or mesh.size == 1:
        return kernel(q, k, v, lengths)
    shards = mesh.shape["seq"]
    exchange = split_keys and shards > 1

    def local(q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
        if not exchange:
            return kernel(q, k, v, lengths)
        heads = q.shape[2]
        missing = -heads % shards
        q, k, v = (
            jax.lax.all_to_all(
                jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))),
                "seq",
                split_axis=2,
                concat_axis=1,
                tiled=True,
            )
            for x in (q, k, v)
        )
        out = jax.lax.all_to_all(
            kernel(q, k, v, lengths), "seq", split_axis=1, concat_axis=2, tiled=True
        )
        return out[:, :, :heads]

    tokens, keys = (
        PartitionSpec(ROWS, "seq", "tensor"),
        PartitionSpec(ROWS, "seq" if split_keys else None, "tensor"),
    )
    given = (q, k, v, lengths)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(tokens, keys, keys, BATCH), out_specs=tokens, check_vma=False
    )(*given)
