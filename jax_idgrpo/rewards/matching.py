"""Exact assignment of references to faces, of static shape: by dynamic programming over sets of faces, with a way to stay without one.

Source: optimal assignment as in UMO (bytedance/UMO).
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int


def match(
    similarity: Float[ArrayLike, "*batch M K"],
    reference_mask: Bool[ArrayLike, "*batch M"],
    face_mask: Bool[ArrayLike, "*batch K"],
    null_similarity: float,
) -> Int[ArrayLike, "*batch M"]:
    """Exact assignment: for each reference the index of its face, or K when it has none. Carries no gradient.

    value[i, S] = max(value[i-1, S] + null, max over faces k in S of value[i-1, S without k] + similarity[i, k]) for every
    set S of faces, then the choices are read back from the full set. Work grows as M K 2^K: meant for K up to about 12.
    """
    people, faces = similarity.shape[-2:]
    batch = similarity.shape[:-2]
    allowed = reference_mask[..., :, None] & face_mask[..., None, :]
    utility = jax.lax.stop_gradient(jnp.where(allowed, similarity, -jnp.inf))
    sets, bits = np.arange(2**faces), 2 ** np.arange(faces)
    member = (sets[:, None] & bits) > 0
    without = sets[:, None] & ~bits
    value = jnp.zeros((*batch, 2**faces), utility.dtype)
    choices = []
    for i in range(people):
        with_face = jnp.where(member, value[..., without] + utility[..., i, None, :], -jnp.inf)
        options = jnp.concatenate([with_face, value[..., None] + null_similarity], -1)
        choices.append(jnp.argmax(options, -1))
        value = jnp.max(options, -1)
    free = jnp.full(batch, 2**faces - 1)
    drop = jnp.asarray([*bits, 0])
    found = []
    for choice in reversed(choices):
        face = jnp.take_along_axis(choice, free[..., None], -1)[..., 0]
        free = free & ~drop[face]
        found.append(face)
    return jnp.stack(found[::-1], -1)


@flax.struct.dataclass
class Matches:
    """References matched to faces. face: index, K for none; similarity: raw cosine, 0 where nothing is matched."""

    face: Int[ArrayLike, "B T M"]
    matched: Bool[ArrayLike, "B T M"]
    similarity: Float[ArrayLike, "B T M"]


def cosines(
    embeddings: Float[ArrayLike, "B T K E"], references: Float[ArrayLike, "B M E"]
) -> Float[ArrayLike, "B T M K"]:
    """Cosine of every reference and every face of a frame; both are unit vectors."""
    return jnp.einsum("btke,bme->btmk", embeddings, references, precision="highest")


def most_alike(
    embeddings: Float[ArrayLike, "B T K E"], face_mask: Bool[ArrayLike, "B T K"]
) -> Float[ArrayLike, "B T"]:
    """The greatest cosine of two faces of a frame; -1 for a frame with fewer than two."""
    alike = jnp.einsum("btke,btle->btkl", embeddings, embeddings, precision="highest")
    pair = (
        face_mask[..., :, None]
        & face_mask[..., None, :]
        & ~jnp.eye(embeddings.shape[2], dtype=bool)
    )
    return jnp.max(jnp.where(pair, alike, -1.0), axis=(-2, -1), initial=-1.0)


def match_videos(
    embeddings: Float[ArrayLike, "B T K E"],
    face_mask: Bool[ArrayLike, "B T K"],
    references: Float[ArrayLike, "B M E"],
    reference_mask: Bool[ArrayLike, "B M"],
    null_similarity: float,
) -> Matches:
    """Match every frame by itself. Embeddings and references are unit vectors."""
    similarity = cosines(embeddings, references)
    people = jnp.broadcast_to(reference_mask[:, None], similarity.shape[:-1])
    face = match(similarity, people, face_mask, null_similarity)
    padded = jnp.pad(similarity, ((0, 0), (0, 0), (0, 0), (0, 1)))
    chosen = jnp.take_along_axis(padded, face[..., None], -1)[..., 0]
    return Matches(face=face, matched=face < embeddings.shape[2], similarity=chosen)


def masked_mean(
    values: Float[ArrayLike, "B M"], mask: Bool[ArrayLike, "B M"]
) -> Float[ArrayLike, " B"]:
    """Mean over the people asked for."""
    return jnp.sum(jnp.where(mask, values, 0.0), -1) / jnp.maximum(jnp.sum(mask, -1), 1)
