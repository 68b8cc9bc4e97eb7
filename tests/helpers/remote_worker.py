"""Run by test_remote_reward.py in two processes: rewards of a server for videos that lie in both. Prints one JSON line.

python -m tests.helpers.remote_worker ADDRESS
"""

import json
import sys
import warnings

import numpy as np

from jax_idgrpo.config import MeshConfig
from jax_idgrpo.parallel import hosts, sharding
from jax_idgrpo.rewards.base import References
from jax_idgrpo.rewards.host import collect
from jax_idgrpo.rewards.remote import HttpReward

hosts.initialise()
mesh = sharding.make_mesh(MeshConfig())
videos = np.ones((8, 3, 4, 4, 3), np.float32) * np.arange(8)[:, None, None, None, None] / 10
reward = HttpReward(sys.argv[1], videos.shape[1:4], 60.0, 0)
encoded = reward.encode_references(References(((),) * 8, 1), [str(n) for n in range(8)])
placed = sharding.device_put_global((videos, encoded), sharding.batch_sharding(mesh))
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    found = collect(reward.score(*placed))
lines = [str(line.message) for line in warned if "reward.backend" in str(line.message)]
print(json.dumps({"reward": [round(float(x), 5) for x in found["reward"]], "lines": lines}))
