"""A face stack of small networks with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_idgrpo.models.faces import bundled_detector
from jax_idgrpo.models.faces.arcface import ArcFace, ArcFaceConfig
from jax_idgrpo.rewards import faces

SMALL_ARCFACE = ArcFaceConfig(units=(1, 2), widths=(8, 12), stem=8, input_size=16, embedding_size=6)
SMALL_DETECTOR = bundled_detector.DetectorConfig(width=16, blocks=1)


def randomise(network, seed=0):
    """The network with all variables away from their defaults; variances positive."""
    rng = np.random.default_rng(seed)
    state = nnx.state(network)
    noisy = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.abs(jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)),
        state,
    )
    nnx.update(network, noisy)
    return network


def small_stack(threshold=0.0):
    """Return a detector and an embedder with random weights."""
    embedder = randomise(ArcFace(SMALL_ARCFACE, rngs=nnx.Rngs(0)))
    template = tuple((x / 7, y / 7) for x, y in faces.ARCFACE_TEMPLATE)
    return faces.FaceStack(
        randomise(bundled_detector.Detector(SMALL_DETECTOR, rngs=nnx.Rngs(1))),
        embedder,
        template,
        3,
        threshold,
    )
