"""The mesh changes who computes what, and nothing else; what does not fit on one says which number."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jax_idgrpo.config import MeshConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import Dtypes, LoRAParam
from jax_idgrpo.models.wan import WanTransformer, vace_1_3b, vace_14b
from jax_idgrpo.parallel import sharding
from jax_idgrpo.training.state import start
from tests.helpers.paths import ROOT

MESHES = [
    {"data": 1},
    {"data": 2, "seq": 4},  # 30 tokens and 6 heads: neither divides
    {"fsdp": 2, "seq": 2, "tensor": 2},  # 3 heads per shard over 2
]


WEIGHTS = [{"data": 1, "weights": "blocks.[12],vace_*,proj_out"}]
WEIGHTS.append(WEIGHTS[0] | {"fsdp": 2, "tensor": 2})


def fake_mesh(**sizes: int) -> Mesh:
    """A mesh of many devices that is never run on."""
    shape = [sizes.get(name, 1) for name in sharding.AXES]
    return Mesh(np.full(shape, jax.devices()[0]), sharding.AXES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return run_meshes(tmp_path_factory.mktemp("meshes"), MESHES)


def run_meshes(out, meshes):
    """Run the worker and return the arrays of each mesh."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    command = [
        sys.executable,
        "-m",
        "tests.helpers.mesh_worker",
        str(out),
        *map(json.dumps, meshes),
    ]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags})
    return [dict(np.load(out / f"{number}.npz")) for number in range(len(meshes))]


@pytest.mark.parametrize(
    "number",
    range(1, len(MESHES)),
    ids=lambda number: "-".join(f"{k}{v}" for k, v in MESHES[number].items()),
)
def test_every_mesh_equals_one_device(runs, number):
    """The start noise to the bit; rewards, log-probabilities, losses and gradients of a first step to rounding."""
    one, other = runs[0], runs[number]
    np.testing.assert_array_equal(other["start"], one["start"])
    for name in ("latents", "log_prob", "rewards", "loss", "gradient"):
        assert np.linalg.norm(one[name]) > 0
        error = np.linalg.norm(other[name] - one[name]) / np.linalg.norm(one[name])
        assert error < 1e-5, (name, error)
    np.testing.assert_allclose(other["log_prob"], one["log_prob"], rtol=1e-5)


@pytest.mark.parametrize(
    "number",
    range(1, len(MESHES)),
    ids=lambda number: "-".join(f"{k}{v}" for k, v in MESHES[number].items()),
)
def test_rows_are_decoded_where_they_are(runs, number):
    assert runs[number]["exchanges"].tolist() == []


@pytest.mark.parametrize(
    "number",
    range(len(MESHES)),
    ids=lambda number: "-".join(f"{k}{v}" for k, v in MESHES[number].items()),
)
def test_on_policy_ratio_is_one_on_every_mesh(runs, number):
    np.testing.assert_array_equal(runs[number]["ratio"], np.ones_like(runs[number]["ratio"]))


def test_a_step_of_trained_weights_on_a_mesh_equals_one_device(tmp_path):
    """Weights, moments and average after a step, to rounding; each lies where the table puts it, and no device holds a whole kernel."""
    one, other = run_meshes(tmp_path, WEIGHTS)
    for run in (one, other):
        np.testing.assert_array_equal(run["ratio"], np.ones_like(run["ratio"]))
        assert run["in_place"].all()
    for name in ("loss", "gradient", "step"):
        assert np.linalg.norm(one[name]) > 0
        error = np.linalg.norm(other[name] - one[name]) / np.linalg.norm(one[name])
        assert error < 1e-5, (name, error)
    assert other["largest"] <= one["largest"] / 2


def test_rows_of_a_rollout_are_taken_without_gathering_it():
    """Those that are trained arrive bit for bit, divided over the devices; nobody holds the whole rollout meanwhile."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "tests.helpers.rows_worker"]
    done = subprocess.run(
        command,
        check=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found["equal"])
    assert found["divided"]
    assert found["exchanges"] == ["all-to-all"]
    assert (
        found["temporary"] < 0.5 * found["arguments"]
    )  # of one device, which holds a quarter of the rollout


def test_the_table_divides_the_14b_policy_and_its_state_alike():
    """Adapters, averages and moments lie alike, and no device holds much more than its share of the weights."""
    mesh = fake_mesh(fsdp=16, tensor=4)
    config = vace_14b(rank=32, alpha=32.0)
    model = nnx.eval_shape(
        lambda: WanTransformer(config, dtypes=Dtypes.named("bfloat16"), rngs=nnx.Rngs(0))
    )
    _, lora, base = nnx.split(model, LoRAParam, ...)
    state = jax.eval_shape(lambda lora: start(optax.adamw(1e-4), lora), lora)

    def share(tree):
        shardings = sharding.state_shardings(mesh, tree)
        pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True))
        return sum(np.prod(s.shard_shape(leaf.shape)) for leaf, s in pairs) / sum(
            np.prod(leaf.shape) for leaf, _ in pairs
        )

    assert share(base) < 1.15 / 64
    assert share(state) < 1.01 / 16
    shardings = sharding.state_shardings(mesh, state)
    like = jax.tree.leaves(shardings.params)
    assert jax.tree.leaves(shardings.ema) == like == jax.tree.leaves(shardings.optimizer[0].mu)


@pytest.mark.parametrize(
    ("path", "shape", "want"),
    [
        ("blocks/attn1/to_q/kernel", (40, 5120, 5120), PartitionSpec(None, "fsdp", "tensor")),
        ("attn1/to_q/kernel", (5120, 5120), PartitionSpec("fsdp", "tensor")),
        ("vace_blocks/attn2/to_out/kernel", (8, 5120, 5120), PartitionSpec(None, "tensor", "fsdp")),
        ("0/mu/blocks/attn1/to_q/lora_a", (40, 5120, 32), PartitionSpec(None, "fsdp", None)),
        ("blocks/attn1/to_q/kernel", (40, 5121, 5120), PartitionSpec(None, None, "tensor")),
        ("blocks/scale_shift_table", (40, 6, 5120), PartitionSpec()),
        ("count", (), PartitionSpec()),
    ],
)
def test_where_a_leaf_lies(path, shape, want):
    assert sharding.spec(path, shape, fake_mesh(fsdp=4, tensor=2)) == want


def test_what_does_not_fit_names_the_number():
    with pytest.raises(
        UserError, match="data 1 x fsdp 3 x seq 1 x tensor 1 does not use the 1 devices"
    ):
        sharding.make_mesh(MeshConfig(data=1, fsdp=3))
    with pytest.raises(UserError, match="6 rows do not divide over the 4 batch shards"):
        sharding.check_rows(fake_mesh(data=2, fsdp=2, seq=2), 6, "rows")
    with pytest.raises(UserError, match=r"mesh.tensor 8 does not divide the 12 attention heads"):
        vace_1_3b(mesh=fake_mesh(tensor=8))
    with pytest.raises(UserError, match="mesh.seq is 0"):
        MeshConfig(seq=0)
    with pytest.raises(UserError, match="only one axis can be -1"):
        MeshConfig(data=-1, tensor=-1)
