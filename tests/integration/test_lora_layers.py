"""LoRA on chosen linear layers: the mathematics, ranks of their own, the on-policy ratio, the plan."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert import lora, lora_names, rules, wan
from checkpoints_convert.lora import Scale
from jax_idgrpo import config as configuration
from jax_idgrpo.config import MeshConfig, ModelConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import Dtypes, LoRAParam
from jax_idgrpo.models.wan import WanTransformer, vace_1_3b, wan_1_3b
from jax_idgrpo.parallel import sharding
from jax_idgrpo.sampling import adapters, lora_layers, policy
from jax_idgrpo.training import setup
from tests.helpers import update as helpers
from tests.helpers.comparison import relative_error
from tests.helpers.noise import add_noise
from tests.helpers.paths import CONFIGS
from tests.helpers.wan import SCALE, TINY, abstract, inputs, random_state


def mixed(config):
    """Every linear layer adapted but for some blocks, each with a rank and an alpha of its own."""
    known = lora_names.layers(config)
    scales = {
        layer: Scale(1 + number % 3, 0.5 + number % 5)
        for number, layer in enumerate(known)
        if number % 11 != 4
    }
    return scales, dataclasses.replace(config, **lora.fields(scales, config))


def own_ranks(state, scales):
    """The state with zeros beyond the rank of every block."""
    ranks = {}
    for layer, scale in scales.items():
        ranks.setdefault(layer.leaf, {})[layer.block or 0] = scale.rank

    def zeroed(path, leaf):
        name, _, part = rules.leaf_path(path).rpartition(".")
        if not part.startswith("lora_"):
            return leaf
        value, axis = np.array(leaf), -1 if part == "lora_a" else -2
        blocks = value if value.ndim == 3 else value[None]
        for block, matrix in enumerate(blocks):
            np.moveaxis(matrix, axis, 0)[ranks[name].get(block, 0) :] = 0
        return jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(zeroed, state)


def merged(state, scales):
    """The base whose kernels are W + (alpha / rank) A B."""
    leaves = {name: np.array(leaf) for name, leaf in rules.leaves(state).items()}
    for layer, (rank, alpha) in scales.items():
        at = () if layer.block is None else (layer.block,)
        a, b = (leaves[f"{layer.leaf}.lora_{part}"][at] for part in "ab")
        leaves[f"{layer.leaf}.kernel"][at] += alpha / rank * (a[:, :rank] @ b[:rank])
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(leaves[rules.leaf_path(path)]), nnx.state(abstract(TINY))
    )


def test_every_layer_adds_its_own_scaled_product_and_keeps_its_rank():
    """The stacked leaves hold ranks 0 to 3, and gradients beyond a block's rank are exactly zero."""
    scales, config = mixed(TINY)
    state, arrays = own_ranks(random_state(config), scales), inputs(1)
    graph = nnx.graphdef(abstract(config))

    def velocity(state):
        return nnx.merge(graph, state)(*arrays, SCALE)

    weight = np.random.default_rng(1).standard_normal(arrays[0].shape).astype(np.float32)
    gradient, got = jax.jit(
        jax.grad(lambda state: (jnp.sum(velocity(state) * weight), velocity(state)), has_aux=True)
    )(state)
    base = jax.jit(lambda state: nnx.merge(nnx.graphdef(abstract(TINY)), state)(*arrays, SCALE))
    plain = base(jax.tree.map(jnp.asarray, nnx.filter_state(state, nnx.Not(LoRAParam))))
    assert relative_error(got, base(merged(state, scales))) < 1e-4
    assert relative_error(got - plain, base(merged(state, scales)) - plain) < 1e-4
    slopes = nnx.filter_state(gradient, LoRAParam)
    for a, b in zip(*map(jax.tree.leaves, (slopes, own_ranks(slopes, scales))), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.any(a)

    # A new adapter starts inside the ranks, with the spread of each rank, and changes nothing.
    fresh = adapters.add_adapter(
        nnx.merge(nnx.graphdef(abstract(TINY)), nnx.filter_state(state, nnx.Not(LoRAParam))),
        config.rank,
        config.alpha,
        jax.random.key(0),
        config.lora,
    )
    started = nnx.state(fresh, LoRAParam)
    for a, b in zip(*map(jax.tree.leaves, (started, own_ranks(started, scales))), strict=True):
        np.testing.assert_array_equal(a, b)
    blocks = np.asarray(rules.leaves(started)["blocks.ffn.linear_2.lora_a"])
    for layer, (rank, _) in scales.items():
        if layer.leaf == "blocks.ffn.linear_2":
            assert np.std(blocks[layer.block][:, :rank]) == pytest.approx(1 / rank, rel=0.35)


def test_the_first_ratio_is_one_with_lora_on_every_layer():
    """Also where LoRA is before the fence round a velocity: in the control's projection."""
    _, config = mixed(helpers.CONFIG)
    transformer = WanTransformer(config, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0))
    add_noise(transformer)
    actor, state, base = policy.split(transformer, 1.0)
    batch = helpers.chunked([helpers.sampled((actor, state, base))], helpers.ADVANTAGE)
    gradient, rows = helpers.gradients(helpers.objective(actor, kl=0.004), state, base, batch)
    np.testing.assert_array_equal(rows["ratio"], np.ones_like(rows["ratio"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


# ---- patterns ----------------------------------------------------------------------------------------


def leaves_of(**model):
    """Our names of the chosen layers of VACE-1.3B with their (rank, alpha), by stack and layer."""
    config = vace_1_3b()
    fields = lora_layers.configured(ModelConfig(**model), config)
    scales = lora.scales_of(dataclasses.replace(config, **fields))
    return {layer.name: tuple(scale) for layer, scale in scales.items()}


def test_the_default_is_the_projections_of_both_attentions():
    fields = lora_layers.configured(ModelConfig(), vace_1_3b())
    assert fields == {"rank": 32, "alpha": 32.0, "lora": None}
    assert len(leaves_of()) == 8 * 45


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("*", 10 * 30 + 11 * 15 + 7),
        ("ffn.*", 2 * 45),
        ("ffn.net.2,ffn.0", 2 * 45),
        ("blocks.*.to_q", 2 * 30),
        ("vace_blocks.*", 11 * 15 + 1),
        ("cross_attn.[kv]", 2 * 45),
        ("attn2.to_out.0, self_attn.o", 2 * 45),
        ("blocks.1[0-9].attn1.to_v", 10),
        ("before_proj,after_proj", 16),
        ("head.head,time_proj", 2),
    ],
)
def test_patterns_choose_layers_by_the_names_of_any_layout(pattern, count):
    assert len(leaves_of(lora_targets=pattern)) == count


def test_ranks_and_alphas_are_chosen_by_the_first_pattern_that_matches():
    found = leaves_of(
        rank=8,
        alpha=4.0,
        lora_targets="to_q,ffn.*",
        lora_ranks={"blocks.0.*": 2, "ffn.*": 16},
        lora_alphas={"ffn.0": 1},
    )
    assert found["blocks.3.attn1.to_q"] == (8, 4.0)
    assert found["blocks.0.attn1.to_q"] == (2, 4.0)
    assert found["blocks.0.ffn.linear_1"] == (2, 1.0)
    assert found["vace_blocks.0.ffn.linear_1"] == (16, 1.0)
    assert found["vace_blocks.0.ffn.linear_2"] == (16, 4.0)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ({"lora_targets": "to_q,to_x"}, "model.lora_targets: 'to_x' matches no linear layer"),
        ({"lora_targets": " , "}, "model.lora_targets names no layer"),
        ({"lora_targets": "vace_blocks.*"}, "'vace_blocks.*' matches no linear layer"),
        ({"lora_ranks": {"ffn.*": 4}}, "model.lora_ranks: 'ffn.*' matches no layer of"),
        ({"lora_ranks": {"to_q": 0}}, "model.lora_ranks: to_q is 0"),
        ({"lora_alphas": {"to_q": -1.0}}, "model.lora_alphas: to_q is -1.0"),
    ],
)
def test_a_pattern_without_a_layer_is_the_users_mistake(model, line):
    with pytest.raises(UserError, match="config: ") as caught:
        lora_layers.configured(ModelConfig(**model), wan_1_3b())
    assert line in str(caught.value)


def test_layers_have_one_name_in_every_layout():
    """Also where `.` is written as `_`."""
    for config in (vace_1_3b(), TINY):
        for layer in lora_names.layers(config):
            for column in range(3):
                name = layer.spelled(column)
                assert lora_names.find(name) == lora_names.find(name.replace(".", "_")) == layer
    for name in ("blocks.01.attn1.to_q", "blocks.0.attn1", "patch_embedding", "blocks.0.norm2"):
        assert lora_names.find(name) is None
    kernels = {rule.jax for rule in wan.rules(TINY) if rule.jax.endswith(".kernel")}
    assert {f"{row[0]}.kernel" for row in lora_names.ROWS} == kernels - {
        "patch_embedding.kernel",
        "vace_patch_embedding.kernel",
    }


def test_the_plan_and_the_checkpoint_hold_the_chosen_layers():
    wanted = configuration.load(CONFIGS / "quickstart.py", [("model.lora_targets", "ffn.*")])
    wanted = configuration.override(wanted, [("model.lora_ranks", '{"blocks.0.*": 3}')])
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    described = setup.build(wanted, mesh, abstract=True)
    shapes = {name: leaf.shape for name, leaf in rules.leaves(described.state.params).items()}
    assert set(shapes) == {
        f"{stack}.ffn.linear_{number}.lora_{part}"
        for stack in ("blocks", "vace_blocks")
        for number in (1, 2)
        for part in "ab"
    }
    assert {shape[-1] for name, shape in shapes.items() if name.endswith("a")} == {
        wanted.model.rank
    }
