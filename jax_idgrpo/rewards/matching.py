"""Assign references to faces exactly, with static shapes and an option to stay unmatched.

The assignment uses dynamic programming over sets of faces. Source: optimal assignment as in UMO
(bytedance/UMO).
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
    """Compute the exact assignment of references to faces; carries no gradient.

    For every set S of faces,

        value[i, S] = max(value[i-1, S] + null,
                          max over k in S of value[i-1, S without k] + similarity[i, k])

    and the choices are then read back from the full set. Work grows as M K 2^K, so K should not
    exceed about 12.

    Args:
      similarity: similarity of every reference and face.
      reference_mask: False on padding.
      face_mask: False on padding.
      null_similarity: value of an unmatched reference, in the units of `similarity`.

    Returns:
      The index of each reference's face, or K if it has none.
    """
    people, faces = similarity.shape[-2:]
    batch = similarity.shape[:-2]
    allowed = reference_mask[..., :, None] & face_mask[..., None, :]
    utility = jax.lax.stop_gradient(jnp.where(allowed, similarity, -jnp.inf))
    # Computed by the program: XLA would fold a table of 2^K K elements for seconds when compiling.
    sets, bits = jnp.arange(2**faces, dtype=jnp.int32), 2 ** np.arange(faces, dtype=np.int32)
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
    """References matched to faces.

    Attributes:
      face: index of the face, K for none.
      matched: whether the reference has a face.
      similarity: raw cosine, 0 without a match.
    """

    face: Int[ArrayLike, "B T M"]
    matched: Bool[ArrayLike, "B T M"]
    similarity: Float[ArrayLike, "B T M"]


def cosines(
    embeddings: Float[ArrayLike, "B T K E"], references: Float[ArrayLike, "B M E"]
) -> Float[ArrayLike, "B T M K"]:
    """Compute the cosine of every reference and every face of a frame; both are unit vectors."""
    return jnp.einsum("btke,bme->btmk", embeddings, references, precision="highest")


def most_alike(
    embeddings: Float[ArrayLike, "B T K E"], face_mask: Bool[ArrayLike, "B T K"]
) -> Float[ArrayLike, "B T"]:
    """Return the maximum cosine of two faces of a frame; -1 for fewer than two faces."""
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
    """Match references to faces in every frame independently.

    Args:
      embeddings: unit vectors of the faces.
      face_mask: False on padding.
      references: unit vectors of the references.
      reference_mask: False on padding.
      null_similarity: minimum cosine of a match.
    """
    similarity = cosines(embeddings, references)
    people = jnp.broadcast_to(reference_mask[:, None], similarity.shape[:-1])
    face = match(similarity, people, face_mask, null_similarity)
    padded = jnp.pad(similarity, ((0, 0), (0, 0), (0, 0), (0, 1)))
    chosen = jnp.take_along_axis(padded, face[..., None], -1)[..., 0]
    return Matches(face=face, matched=face < embeddings.shape[2], similarity=chosen)


def confusion(
    cosine: Float[ArrayLike, "B T M K"],
    matches: Matches,
    reference_mask: Bool[ArrayLike, "B M"],
    temperature: float = 0.1,
) -> Float[ArrayLike, " B"]:
    """Compute how far faces resemble the other people of their prompt, in [0, 1].

    The cosines of a face with all references of its prompt, divided by the temperature, are the
    logits of who it is. The term is the probability of the other people, mean over people and
    frames: 0 for faces that resemble their own reference alone, and 1 - 1 / M if every face
    resembles all references alike, as the average face does. A missing person counts as such a
    face. With one person the term is 0. It is smooth in the embeddings.

    The definition is ours. DisCo (arXiv 2510.01399) compares faces with one another.

    Args:
      cosine: cosines of references and faces.
      matches: references matched to the faces.
      reference_mask: False on padding.
      temperature: cosine that counts as one logit.
    """
    padded = jnp.pad(cosine, ((0, 0), (0, 0), (0, 0), (0, 1)))
    # [B,T,j,i]: cosine of the face matched to i with reference j; 0 for all j without a match
    of_face = jnp.take_along_axis(padded, matches.face[:, :, None], axis=-1)
    logits = jnp.where(reference_mask[:, None, :, None], of_face / temperature, -1e9)
    probability = jax.nn.softmax(logits, axis=2)
    own = jnp.diagonal(probability, axis1=2, axis2=3)
    return masked_mean(jnp.mean(1.0 - own, axis=1), reference_mask)


def masked_mean(
    values: Float[ArrayLike, "B M"], mask: Bool[ArrayLike, "B M"]
) -> Float[ArrayLike, " B"]:
    """Average over the people of a row, without padding."""
    return jnp.sum(jnp.where(mask, values, 0.0), -1) / jnp.maximum(jnp.sum(mask, -1), 1)
