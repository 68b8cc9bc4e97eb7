"""Small networks of whole people with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_idgrpo.models.dino import Dino, DinoConfig

SMALL = DinoConfig(depth=1, width=8, heads=2, ffn=12, patch=8, image_size=16, eps=1e-6)


def small_network(seed=0):
    """Return a network of 5 tokens with every parameter away from its default."""
    network, rng = Dino(SMALL, rngs=nnx.Rngs(0)), np.random.default_rng(seed)
    nnx.update(
        network,
        jax.tree.map(
            lambda leaf: leaf + 0.3 * jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
            nnx.state(network),
        ),
    )
    return network
