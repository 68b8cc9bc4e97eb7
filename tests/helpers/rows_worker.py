"""Run by test_parallel.py in a process of its own with 8 devices: some rows of a rollout, taken on a mesh. Prints one JSON line.

python -m tests.helpers.rows_worker
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np

from jax_idgrpo import rng
from jax_idgrpo.config import MeshConfig
from jax_idgrpo.parallel import sharding
from jax_idgrpo.sampling.conditioning import Conditioning
from jax_idgrpo.sampling.rollout import Trajectory
from jax_idgrpo.training import update

CHUNKS, ROWS, STEPS = 4, 16, 6


def rollout() -> update.Rollout:
    """A rollout whose numbers are all different; its states are by far its largest leaves."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=(CHUNKS, ROWS, *shape)), jnp.float32)

    numbers = jnp.arange(CHUNKS * ROWS)
    return update.Rollout(
        trajectory=Trajectory(
            latents=normal(3, 8, 8, 16),
            x=normal(STEPS, 3, 8, 8, 16),
            velocity=normal(STEPS - 1, 3, 8, 8, 16),
        ),
        conditioning=Conditioning(
            text=normal(5, 4),
            control=normal(3, 8, 8, 96),
            frame_mask=normal(3) > 0,
            references=jnp.arange(CHUNKS * ROWS).reshape(4, 16),
        ),
        start=numbers.reshape(CHUNKS, ROWS),
        noise=rng.row_keys(rng.key(0, "noise"), numbers, numbers).reshape(CHUNKS, ROWS),
        advantage=normal(),
        weight=normal(),
    )


def main() -> None:
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, seq=2))
    whole, rows = (
        rollout(),
        np.random.default_rng(1).permutation(CHUNKS * ROWS)[: 2 * ROWS].astype(np.int32),
    )
    wanted = jax.tree.map(
        lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[rows].reshape(2, ROWS, *leaf.shape[2:]),
        whole,
    )
    placed = sharding.device_put_global(whole, sharding.batch_sharding(mesh, 1))
    given = placed, sharding.device_put_global(rows, sharding.replicated(mesh)), mesh
    compiled = update.select_rows.lower(*given).compile()
    found = update.select_rows(*given)

    def bits(tree: update.Rollout) -> list[jax.Array]:
        return jax.tree.leaves(dataclasses.replace(tree, noise=jax.random.key_data(tree.noise)))

    memory = compiled.memory_analysis()
    print(
        json.dumps(
            {
                "equal": [
                    bool(np.array_equal(one, other))
                    for one, other in zip(bits(found), bits(wanted), strict=True)
                ],
                "divided": all(
                    leaf.sharding.shard_shape(leaf.shape)[1] == ROWS // 4 for leaf in bits(found)
                ),
                "exchanges": sorted(
                    set(
                        re.findall(
                            r" (all-[\w-]+|collective-\w+|reduce-scatter)(?:-start)?\(",
                            compiled.as_text(),
                        )
                    )
                ),
                "arguments": memory.argument_size_in_bytes,
                "temporary": memory.temp_size_in_bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
