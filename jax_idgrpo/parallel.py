"""The mesh, and the one table that says how parameters lie on it.

Batches are sharded over `data` and `fsdp`, weights over `fsdp`. Models know nothing of this; programs receive sharded arrays and
the compiler carries the sharding through.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_idgrpo.config import MeshConfig
from jax_idgrpo.errors import UserError

BATCH = PartitionSpec(("data", "fsdp"))

# First match wins: the path of a leaf -> the axis that is split over `fsdp`, counted from the last. Adapters, their averages and
# their optimizer moments follow the same table; what is small stays whole.
TABLE: tuple[tuple[str, int | None], ...] = (
    (r"lora_[ab]$", None),
    (r"(to_out|linear_2|proj_out)/kernel$", -2),
    (r"/kernel$", -1),
    (r"embedding$", -1),
    (r".*", None),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh with axes `data` and `fsdp`; an axis of -1 takes the devices that are left.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for name, size in sizes.items():
        if size == -1:
            sizes[name] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise UserError(f"mesh: data {config.data} x fsdp {config.fsdp} does not use the {len(devices)} devices; set one axis to -1")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def check_rows(mesh: Mesh, rows: int, what: str) -> None:
    """Refuse a batch that the mesh cannot split evenly.

    Raises:
      UserError: `rows` is no multiple of the number of batch shards.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards:
        raise UserError(f"{what}: {rows} rows do not divide over the {shards} batch shards of the mesh; use a multiple of {shards}")


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of an array whose batch axis comes after `leading` other axes."""
    return NamedSharding(mesh, PartitionSpec(*([None] * leading), *BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def spec(path: str, shape: tuple[int, ...], shards: int) -> PartitionSpec:
    """Where the table puts a leaf; an axis that `shards` does not divide stays whole."""
    axis = next(axis for pattern, axis in TABLE if re.search(pattern, path))
    if axis is None or shards == 1 or shape[axis] % shards:
        return PartitionSpec()
    entries: list[str | None] = [None] * len(shape)
    entries[axis] = "fsdp"
    return PartitionSpec(*entries)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The sharding of every leaf of a pytree of arrays or shapes, from the table."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
        name = re.sub(r"/(value|raw_value)$", "", name)
        return NamedSharding(mesh, spec(name, np.shape(leaf), mesh.shape["fsdp"]))

    return jax.tree_util.tree_map_with_path(one, state)


def place(mesh: Mesh, state: Any) -> Any:
    """`state` on the mesh, every leaf where the table puts it."""
    return jax.device_put(state, state_shardings(mesh, state))
