"""A small training state, and whether two are equal."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_idgrpo.config import OptimizerConfig
from jax_idgrpo.training.state import TrainState, make_optimizer, start

WIDE = 20_000
"""Wide enough for orbax to store numbers in files of their own."""


def make_state(seed: int, width: int = 3) -> TrainState:
    """A state of a small network, of other numbers for every seed."""
    random = np.random.default_rng(seed)
    params = {
        "blocks": {"kernel": nnx.Param(jnp.asarray(random.normal(size=(2, width)), jnp.float32))},
        "scale": jnp.float32(seed),
    }
    state = start(
        make_optimizer(OptimizerConfig(), 10),
        nnx.State(params),
        {"key": jax.random.key(seed), "count": jnp.uint32(seed)},
    )
    return state.replace(step=jnp.int32(seed), ema=jax.tree.map(lambda x: x + 1, state.ema))


def same(a: TrainState, b: TrainState) -> bool:
    """Return whether two states are equal in dtypes and bits."""

    def bits(x):
        return np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )

    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(bits(x), bits(y)), a, b)
    return all(jax.tree.leaves(equal))
