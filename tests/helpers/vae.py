"""The smallest autoencoder, every weight random."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_idgrpo.models.vae import VAEConfig, WanVAE

COMPILER = {"xla_backend_optimization_level": 0}  # compiling is what takes the time here
TINY = VAEConfig(4, (1, 2, 2, 3), 1, (False, True, True), (0.0,) * 16, (1.0,) * 16)


@cache
def tiny_vae():
    """Every weight random, the earlier taps in time too."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: WanVAE(TINY, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    fan_in = lambda shape: np.prod(shape[:-1]) if len(shape) > 1 else 4.0  # noqa: E731

    def random(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) / fan_in(leaf.shape) ** 0.5, jnp.float32)

    return graph, jax.tree.map(random, shapes)
