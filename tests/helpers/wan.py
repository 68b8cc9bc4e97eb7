"""The smallest transformer, with inputs, a loss and gradients."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.wan import (
    VaceConfig,
    WanConfig,
    WanTransformer,
)
from tests.helpers.comparison import relative_error

TINY = WanConfig(
    num_layers=5,
    num_heads=2,
    head_dim=12,
    ffn_dim=40,
    text_dim=8,
    freq_dim=16,
    vace=VaceConfig((0, 2, 4)),
)
SCALE = jnp.array([0.7, 1.0, 1.3])


def abstract(config: WanConfig, dtype: str = "float32") -> WanTransformer:
    """Return a transformer of shapes, without memory."""
    return nnx.eval_shape(
        lambda: WanTransformer(config, dtypes=Dtypes.named(dtype), rngs=nnx.Rngs(0))
    )


@functools.cache
def random_state(config: WanConfig, dtype: str = "float32") -> nnx.State:
    """Every leaf random, adapters too; equal names get equal numbers whatever the configuration."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        value = np.random.default_rng(list(name.encode())).standard_normal(leaf.shape)
        if name.count("norm") and name.count("scale"):
            value = 1 + 0.3 * value
        elif name.count("kernel") or name.count("lora"):
            value = value / np.sqrt(leaf.shape[-2])
        else:
            value = 0.3 * value
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, nnx.state(abstract(config, dtype)))


def inputs(batch: int = 2, frames: int = 3) -> tuple:
    """Return latents, timesteps, text and control."""
    rng = np.random.default_rng(0)
    sizes = ((batch, frames, 4, 6, 16), (batch, 5, 8), (batch, frames, 4, 6, 96))
    latents, text, control = (jnp.asarray(rng.standard_normal(size), jnp.float32) for size in sizes)
    return latents, jnp.array([999, 111, 500], jnp.int32)[:batch], text, control


def loss_and_gradients(config: WanConfig):
    """A loss that weighs every output differently, and its gradient for every parameter."""
    graph = nnx.graphdef(abstract(config))
    arrays = inputs()
    weight = np.random.default_rng(1).standard_normal(arrays[0].shape).astype(np.float32)
    loss = jax.jit(
        jax.value_and_grad(lambda state: jnp.sum(nnx.merge(graph, state)(*arrays, SCALE) * weight))
    )
    return loss(random_state(config))


@functools.cache
def reference():
    """Return loss and gradients of TINY."""
    return loss_and_gradients(TINY)


def assert_agrees_with_scan(change):
    """The loss and every gradient of the same weights, run with `change`, are those of a scan without remat."""
    value, gradients = reference()
    other_value, other = loss_and_gradients(dataclasses.replace(TINY, **change))
    assert relative_error(other_value, value) < 1e-5
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max() + 1e-6))
