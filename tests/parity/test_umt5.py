"""The text encoder against transformers, random weights, every relative position bucket."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from checkpoints_convert import rules
from checkpoints_convert import umt5 as table
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.umt5 import UMT5Encoder
from tests.helpers import torch_models
from tests.helpers.comparison import relative_error

BOUND = 1e-5


def converted(torch_model) -> UMT5Encoder:
    config = table.config_from_json(torch_model.config.to_dict())
    model = nnx.eval_shape(
        lambda: UMT5Encoder(config, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0))
    )
    graph, abstract = nnx.split(model)
    return nnx.merge(
        graph, rules.to_jax(table.rules(config), torch_models.tensors(torch_model), abstract)
    )


@nnx.jit
def apply(model: UMT5Encoder, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return model(ids, mask)


@pytest.mark.parametrize(
    "changes", [{}, {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 40}]
)
def test_hidden_states_agree(changes):
    torch_model = torch_models.umt5(seed=3, **changes)
    ids = np.random.default_rng(4).integers(1, 97, (2, 300)).astype(np.int32)
    mask = (np.arange(300) < np.array([[300], [117]])).astype(np.int32)
    want = torch_model(
        torch.from_numpy(ids).long(), torch.from_numpy(mask)
    ).last_hidden_state.numpy()
    want = want * mask[..., None]
    model = converted(torch_model)
    ids, mask = jnp.asarray(ids), jnp.asarray(mask)
    got = apply(model, ids, mask)
    assert relative_error(got, want) < BOUND
    np.testing.assert_array_equal(got[1, 117:], 0)
    # What the bound would catch: one mask for both rows, one bias table for all layers.
    assert (
        relative_error(apply(model, ids, jnp.ones_like(mask))[1, :117], want[1, :117]) > 1e3 * BOUND
    )
    bias = model.blocks.attention.relative_bias
    bias[...] = jnp.broadcast_to(bias[:1], bias.shape)
    assert relative_error(apply(model, ids, mask), want) > 1e3 * BOUND


def test_export_loads_strictly():
    torch_model = torch_models.umt5(seed=5)
    model = converted(torch_model)
    exported = rules.to_torch(table.rules(model.config), nnx.state(model))
    fresh = torch_models.umt5(seed=6)
    loaded = fresh.load_state_dict(
        {name: torch.tensor(value) for name, value in exported.items()}, strict=False
    )
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= {table.TIED}  # the second name of shared.weight
    for name, value in torch_model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
