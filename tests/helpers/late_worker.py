"""Run by test_processes.py in two processes of two devices: process 1 comes late to the first exchanges of a program. Prints one JSON line.

python -m tests.helpers.late_worker SECONDS
"""

import json
import sys
import time

import jax
import numpy as np

from jax_idgrpo.config import MeshConfig
from jax_idgrpo.parallel import hosts, sharding

hosts.initialise()
mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, seq=2))
numbers = sharding.device_put_global(
    np.arange(4).reshape(2, 2), jax.NamedSharding(mesh, jax.P("fsdp", "seq"))
)
if jax.process_index() == 1:
    time.sleep(float(sys.argv[1]))
found = [
    jax.jit(lambda x: x.sum(axis), out_shardings=jax.NamedSharding(mesh, jax.P(kept)))(numbers)
    for axis, kept in ((0, "seq"), (1, "fsdp"))
]
print(json.dumps([hosts.to_host(sums).tolist() for sums in found]))
