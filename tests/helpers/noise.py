"""Random numbers for all of a network's parameters: constants such as a zero adapter would hide faults."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def add_noise(network: nnx.Module) -> None:
    """Add 0.1 N(0, 1) to every parameter, in place."""
    leaves, tree = jax.tree.flatten(nnx.state(network))
    rng = np.random.default_rng(1)
    noisy = [leaf + 0.1 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    nnx.update(network, jax.tree.unflatten(tree, noisy))
