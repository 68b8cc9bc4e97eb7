"""Which weights full fine-tuning trains: patterns of diffusers' names, and the network that trained and frozen parts make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert import rules, wan
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.wan import VaceConfig, WanConfig, WanTransformer
from jax_idgrpo.sampling.weights import select_weights

CONFIG = WanConfig(
    num_layers=5,
    num_heads=2,
    head_dim=12,
    ffn_dim=32,
    text_dim=16,
    freq_dim=16,
    vace=VaceConfig((0, 2)),
)


@pytest.fixture(scope="module")
def transformer():
    """A network in bfloat16 whose every number is drawn."""
    graph, abstract = nnx.split(
        nnx.eval_shape(
            lambda: WanTransformer(CONFIG, dtypes=Dtypes.named("bfloat16"), rngs=nnx.Rngs(0))
        )
    )
    rng = np.random.default_rng(0)
    return nnx.merge(
        graph,
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), abstract),
    )


def names(weights, transformer):
    """Return diffusers' names of the weights that a selection trains."""
    _, state = nnx.split(transformer)
    ones, zeros = (
        jax.tree.map(lambda leaf, value=value: jnp.full(leaf.shape, value), state)
        for value in (1, 0)
    )
    marked = weights.merge(weights.split(ones)[0], weights.split(zeros)[1])
    torch = rules.to_torch(wan.rules(CONFIG), marked)
    assert all(value.min() == value.max() for value in torch.values())
    return {name for name, value in torch.items() if value.max() == 1}


def every(transformer):
    """Return all names."""
    return set(rules.to_torch(wan.rules(CONFIG), nnx.state(transformer)))


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ("", lambda name: True),
        ("blocks.3", lambda name: name.startswith("blocks.3.")),
        (
            "blocks.[13],vace_blocks.1",
            lambda name: name.startswith(("blocks.1.", "blocks.3.", "vace_blocks.1.")),
        ),
        (
            "blocks.4, *.attn1.to_[qk].weight",
            lambda name: (
                name.startswith("blocks.4.")
                or name.endswith(("attn1.to_q.weight", "attn1.to_k.weight"))
            ),
        ),
        (
            "attn1.to_[qk].weight,patch_embedding.bias",
            lambda name: (
                name.endswith(("attn1.to_q.weight", "attn1.to_k.weight"))
                or name == "patch_embedding.bias"
            ),
        ),
        ("ffn", lambda name: ".ffn." in name),
        ("blocks.*.norm?", lambda name: name.startswith("blocks.") and ".norm2." in name),
    ],
)
def test_patterns_select_weights_and_modules_by_diffusers_names(transformer, patterns, chosen):
    weights = select_weights(transformer, patterns)
    assert names(weights, transformer) == set(filter(chosen, every(transformer)))


@pytest.mark.parametrize("patterns", ["", "blocks.[13]", "blocks.0,blocks.4", "attn1"])
def test_trained_and_frozen_parts_make_the_same_network(transformer, patterns):
    """In the dtypes of the network, bit for bit, though the trained part is kept in float32; nothing is in both parts."""
    _, state = nnx.split(transformer)
    weights = select_weights(transformer, patterns)
    trained, frozen = weights.split(state)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained)
    merged = weights.merge(wide, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(state)
    for leaf, want in zip(jax.tree.leaves(merged), jax.tree.leaves(state), strict=True):
        assert leaf.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(want))
    count = sum(leaf.size for leaf in jax.tree.leaves((trained, frozen)))
    assert count == sum(leaf.size for leaf in jax.tree.leaves(state))
    shapes = weights.split(jax.eval_shape(lambda: state))
    for leaf, shape in zip(
        jax.tree.leaves((trained, frozen)), jax.tree.leaves(shapes), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    assert hash(weights) == hash(select_weights(transformer, patterns))


@pytest.mark.parametrize("patterns", ["blocks.5", "blocks.1,block.2", "attn", " "])
def test_a_pattern_that_selects_nothing_is_named(transformer, patterns):
    wrong = patterns.split(",")[-1].strip()
    with pytest.raises(
        UserError, match=rf"model.train_layers {wrong!r}: selects no weight"
    ) as refused:
        select_weights(transformer, patterns)
    assert "\n" not in str(refused.value)
    assert "blocks.0.attn1.to_q.weight" in str(refused.value)


def test_the_order_of_names_does_not_matter(transformer):
    one, other = (
        select_weights(transformer, text) for text in ("blocks.1,blocks.3", "blocks.3,blocks.1")
    )
    assert one == other
