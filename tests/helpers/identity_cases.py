"""Random faces of known people, as inputs of the identity reward."""

import functools

import jax
import numpy as np

from jax_idgrpo.rewards import identity
from jax_idgrpo.rewards.photo_copy import SIDE

CONFIG = identity.IdentityConfig()


@functools.partial(jax.jit, static_argnames="config")
def terms(inputs, config=CONFIG):
    """Return the terms of the identity reward for inputs such as those of `case`."""
    return identity.reward_terms(**inputs, config=config)


def unit(rng, *shape):
    """Return random vectors of length 1."""
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def case(seed=0, batch=3, frames=4, faces=5, people=3, size=16, noise=0.3):
    """Faces that are noisy copies of the references, with a few faces and one reference masked out."""
    rng = np.random.default_rng(seed)
    references = unit(rng, batch, people, size)
    embeddings = unit(rng, batch, frames, faces, size)
    embeddings[:, :, :people] = references[:, None] + noise * embeddings[:, :, :people]
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    face_mask = rng.random((batch, frames, faces)) < 0.8
    reference_mask = np.ones((batch, people), bool)
    reference_mask[-1, -1] = False
    corner = rng.uniform(0, 10, (batch, frames, faces, 2))
    return {
        "videos": rng.uniform(-1, 1, (batch, frames, 16, 16, 3)).astype(np.float32),
        "boxes": np.concatenate([corner, corner + rng.uniform(2, 5, corner.shape)], -1).astype(
            np.float32
        ),
        "embeddings": embeddings.astype(np.float32),
        "landmarks": (corner[..., None, :] + rng.uniform(0, 5, (*corner.shape[:-1], 5, 2))).astype(
            np.float32
        ),
        "face_mask": face_mask,
        "references": references,
        "photos": rng.uniform(-1, 1, (batch, people, SIDE, SIDE, 3)).astype(np.float32),
        "reference_mask": reference_mask,
    }
