"""Run by test_checkpoints_of_processes.py in several processes: write or restore checkpoints of a sharded state.

Prints one JSON line.

python -m tests.helpers.checkpoint_worker write|read WORKDIR
"""

import json
import sys
import warnings
from pathlib import Path

import jax
import numpy as np

from jax_idgrpo.parallel import hosts, sharding
from jax_idgrpo.training.checkpoint import open_checkpoints, restore, save, stored_steps
from jax_idgrpo.training.lock import locked

hosts.initialise()
mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))


def numbers(step):
    """Arrays large enough for files of their own, and a small one."""
    random = np.random.default_rng(step)
    return {
        "divided": random.normal(size=(jax.device_count(), 20_000)).astype(np.float32),
        "whole": random.normal(size=20_000).astype(np.float32),
        "step": np.int32(step),
    }


def state(step):
    layout = {"divided": jax.P("fsdp"), "whole": jax.P(), "step": jax.P()}
    return sharding.device_put_global(
        numbers(step), {name: jax.NamedSharding(mesh, spec) for name, spec in layout.items()}
    )


def bits_of(found, step):
    """Whether every shard that this process holds has the bits of `numbers(step)`."""
    expected = numbers(step)
    return all(
        np.array_equal(np.asarray(shard.data), expected[name][shard.index])
        for name, array in found.items()
        for shard in array.addressable_shards
    )


task, workdir = sys.argv[1], Path(sys.argv[2])
answer = {}
with (
    locked(workdir),
    open_checkpoints(workdir, keep=2) as manager,
    warnings.catch_warnings(record=True) as warned,
):
    warnings.simplefilter("always", UserWarning)
    if task == "write":
        for step in (3, 6):
            save(manager, step, state(step))
    else:
        found = restore(manager, state(0))
        answer["step"] = int(found["step"])
        answer["exact"] = bits_of(found, answer["step"])
        save(manager, 6, state(6))
        answer["again"] = bits_of(restore(manager, state(0)), 6)
    answer["steps"] = stored_steps(manager)
    answer["warned"] = [
        str(warning.message) for warning in warned if "is damaged" in str(warning.message)
    ]
print(json.dumps(answer))
