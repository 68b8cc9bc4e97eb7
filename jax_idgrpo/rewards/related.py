"""Rewards of other work on several people in a picture, as terms beside ours: to be compared, or mixed in by `reward.mixture`.

All take cosines or unit embeddings, and masks, are static in shape, score frame by frame and average over frames. Pairwise
subject consistency (PSR, arXiv 2512.01236), with faces in the place of its crops, is the term `similarity`; the count terms of
DisCo and of MultiHuman-TestBench are `count_accuracy`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_idgrpo.rewards.matching import masked_mean, match, most_alike

ALWAYS = -50.0  # worth of a reference without a face: far less than any exchange of cosines among a dozen people can win


def multi_identity_matching(
    cosine: Float[Array, "B T M K"], face_mask: Bool[Array, "B T K"], reference_mask: Bool[Array, "B M"]
) -> Float[Array, "B"]:
    """MIMR: the mean over all pairs of reference and face of their cosine, counted +1 for the pairs of the best assignment and -1 for
    the others; 0 for a frame without a face. In [-1, 1].

    As many pairs are assigned as there can be, however unlike. It pushes identities apart; a missing person enters through the mean alone.
    Source: UMO, arXiv 2509.06818 (bytedance/UMO).
    """
    people = jnp.broadcast_to(reference_mask[:, None], cosine.shape[:-1])
    face = match(cosine, people, face_mask, ALWAYS)
    sign = jnp.where(face[..., None] == jnp.arange(cosine.shape[-1]), 1.0, -1.0)
    pair = people[..., None] & face_mask[..., None, :]
    total = jnp.sum(jnp.where(pair, sign * cosine, 0.0), (2, 3))
    return jnp.mean(total / jnp.maximum(jnp.sum(pair, (2, 3)), 1), axis=1)


def identity_confidence(
    cosine: Float[Array, "B T M K"], face_mask: Bool[Array, "B T K"], reference_mask: Bool[Array, "B M"]
) -> Float[Array, "B"]:
    """ID-Conf: clip(1 - second / first, 0, 1) of the two largest cosines of a reference to the faces of a frame, mean over people.

    With one face the second is 0; where the first is not positive nobody is found, and the confidence is 0. Source: UMO, arXiv 2509.06818.
    """
    cosine = jnp.where(face_mask[:, :, None], cosine, 0.0)
    ranked = jnp.sort(jnp.pad(cosine, ((0, 0), (0, 0), (0, 0), (0, 2))), axis=-1)
    first, second = ranked[..., -1], ranked[..., -2]
    found = first > 0
    confidence = jnp.where(found, jnp.clip(1 - second / jnp.where(found, first, 1.0), 0.0, 1.0), 0.0)
    return masked_mean(jnp.mean(confidence, axis=1), reference_mask)


def unique_faces(embeddings: Float[Array, "B T K E"], face_mask: Bool[Array, "B T K"]) -> Float[Array, "B"]:
    """1 - the greatest cosine of two faces of a frame, 0.5 for a frame with fewer than two. In [0, 2]; no reference is looked at.

    Source: the term within one image of DisCo, arXiv 2510.01399; its terms across images are about diversity, which references forbid.
    """
    several = jnp.sum(face_mask, -1) > 1
    return jnp.mean(jnp.where(several, 1 - most_alike(embeddings, face_mask), 0.5), axis=1)
