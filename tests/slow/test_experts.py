"""Two experts, and a weakened branch, on a mesh."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.paths import ROOT

WEAK = {"scale": 0.5, "blocks": [1], "photos": "none"}


@pytest.mark.parametrize("extra", [{"experts": 2}, {"weakened": WEAK}], ids=["experts", "weakened"])
def test_two_experts_and_a_weakened_branch_on_a_mesh_equal_one_device(extra, tmp_path):
    meshes = [extra, {"data": 2, "seq" if "weakened" in extra else "fsdp": 2} | extra]
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    worker = [sys.executable, "-m", "tests.helpers.mesh_worker", str(tmp_path)]
    subprocess.run(
        [*worker, *map(json.dumps, meshes)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    one, other = (dict(np.load(tmp_path / f"{number}.npz")) for number in range(2))
    for name in ("latents", "log_prob", "loss", "gradient"):
        assert np.linalg.norm(one[name]) > 0
        error = np.linalg.norm(other[name] - one[name]) / np.linalg.norm(one[name])
        assert error < 1e-5, (name, error)
    np.testing.assert_array_equal(other["ratio"], 1)
