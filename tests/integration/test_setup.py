"""A run that is planned is the run that is trained: the same structure, shapes, dtypes and places, without reading a tensor."""

import jax
import pytest

from jax_idgrpo import config as c
from jax_idgrpo.parallel import sharding
from jax_idgrpo.training import setup
from tests.helpers.tiny_run import full, tiny


@pytest.mark.parametrize(
    "config",
    [
        tiny(2),
        tiny(
            2,
            grpo=dict(objective="nft", kl_units="velocity", updates=2),
            window="none",
            guidance=3.0,
        ),
        full(2, "blocks.1,attn2"),
    ],
    ids=["clip", "nft", "full"],
)
def test_shapes_are_those_of_the_arrays(config):
    mesh = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])
    real, planned = setup.build(config, mesh), setup.build(config, mesh, abstract=True)

    def parts(run):
        frozen = (run.base, run.reference, run.vae[1])
        networks = (jax.tree.map(lambda x: x, part) for part in frozen)
        return run.state, *networks, run.negative, run.schedule, run.reward.state

    leaves, shapes = (jax.tree_util.tree_leaves_with_path(parts(run)) for run in (real, planned))
    assert len(leaves) > 300
    assert [path for path, _ in leaves] == [path for path, _ in shapes]
    for (path, leaf), (_, shape) in zip(leaves, shapes, strict=True):
        name = jax.tree_util.keystr(path)
        assert isinstance(leaf, jax.Array), name
        assert isinstance(shape, jax.ShapeDtypeStruct), name
        assert (leaf.shape, leaf.dtype, leaf.weak_type) == (
            shape.shape,
            shape.dtype,
            shape.weak_type,
        ), name
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim), name
    assert planned.policy == real.policy
    assert planned.passes == real.passes
    assert planned.rule.policy == real.rule.policy
    assert planned.rule.grpo == real.rule.grpo
