"""Run by test_processes.py in several processes: what crosses them, and what they must agree on. Prints one JSON line.

python -m tests.helpers.processes_worker FACT_OF_PROCESS_0 FACT_OF_PROCESS_1
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_idgrpo import rng
from jax_idgrpo.config import MeshConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation.monitor import Watch
from jax_idgrpo.parallel import hosts, sharding
from jax_idgrpo.rewards.host import HostPool, collect

hosts.initialise()
mesh = sharding.make_mesh(MeshConfig())
rows = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
keys_of_rows = rng.row_keys(rng.key(0, "noise"), jnp.arange(8), jnp.arange(8))
divided, numbers = sharding.device_put_global((rows, keys_of_rows), sharding.batch_sharding(mesh))
moved = sharding.device_put_global(divided, sharding.replicated(mesh))
doubled = jax.jit(lambda x: (2 * x, jnp.sum(x)))(divided)
try:
    hosts.assert_facts_match(
        {"the library": "1", "the configuration": sys.argv[1 + jax.process_index()]}
    )
    answer = ""
except UserError as error:
    answer = str(error)
mine: list[float] = []


def score(row, number):
    """Row 5 cannot be scored, and only odd rows have a term more."""
    mine.append(float(number))
    if number == 5:
        raise ValueError("no face")
    return {"reward": row.sum(), **({"odd": 1.0} if number % 2 else {})}


with warnings.catch_warnings(record=True) as warned:
    scored = collect(HostPool().submit(score, (divided, np.arange(8))))
began: list[int] = []  # scores of the start of a run, which process 0 alone sees in its folder


class SeenByFirst(Watch):
    """A watch that only notes that it would sample videos."""

    def scores(self, model, step):
        began.append(step)


with tempfile.TemporaryDirectory() as seen:
    watch = SeenByFirst(sampler=None, scorer=None, rows=(), folder=Path(seen))
    if jax.process_index() == 0:
        (watch.folder / "000000.json").write_text('{"reward": [1.0]}')
    watch.begin(None)
    initial = watch.initial()["reward"].tolist()
wrote: list[int] = []
hosts.run_once(wrote.append, jax.process_index())
found = {
    "began": began,
    "initial": initial,
    "wrote": wrote,
    "share": hosts.memory_share(1000),
    "scored": {name: np.nan_to_num(values, nan=-1).tolist() for name, values in scored.items()},
    "mine": sorted(mine),
    "warned": [str(warning.message) for warning in warned],
    "devices": len(jax.devices()),
    "held": sum(shard.data.shape[0] for shard in divided.addressable_shards),
    "doubled": hosts.to_host(doubled[0]).tolist(),
    "sum": float(hosts.to_host(doubled[1])),
    "moved": hosts.to_host(moved).tolist(),
    "noise": hosts.to_host(
        jax.jit(lambda keys: jax.vmap(jax.random.uniform)(keys))(numbers)
    ).tolist(),
    "marks": [hosts.any_process(jax.process_index() == 1), hosts.any_process(False)],
    "answer": answer,
}
print(json.dumps(found))
