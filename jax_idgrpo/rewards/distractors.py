"""Contrast the people of a video with the reference people of all prompts of a run.

Person i of a video has the mean m_i of the embeddings of its face over frames. The candidates are
the references of the video's own prompt and the distractors, which are the references of all
prompts of `data.prompts`. With C candidates,

    p_i            = softmax over candidates j of cos(m_i, r_j) / temperature, at j = i
    recognised_log = mean over people of f_i log p_i - (1 - f_i) log C
    unrecognised   = -recognised_log / log C

where f_i is the share of frames in which the person has a face, so that a missing person counts as
somebody who could be anybody. `unrecognised` is about 0 for people who resemble their own photos
alone. It is 1 for average faces, which are equally similar to everybody, and greater than 1 for
people who resemble others more than themselves.

A distractor that shows a person of the video's prompt is left out: the embedder does not tell it
from that person's reference. The distractors are the same in every step, and the terms of a video
depend on no other video.

The definition is ours. It takes the place of the group term of DisCo (arXiv 2510.01399), which
rewards different people within a group of videos and therefore contradicts fixed references.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Float

from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.rewards.base import References, Reward
from jax_idgrpo.rewards.matching import Matches, masked_mean

TEMPERATURE = 0.1  # cosine that counts as one logit


def encode_distractors(reward: Reward, prompts: Sequence[Prompt]) -> Float[np.ndarray, "R E"]:
    """Return the embeddings of the photos of all prompts; equal embeddings are listed once.

    Args:
      reward: a reward that encodes photos as `ReferenceFaces`.
      prompts: all prompts of a run.

    Raises:
      UserError: a photo cannot be used.
    """
    photos = References.of_prompts(prompts, max(len(prompt.references) for prompt in prompts))
    encoded = reward.encode_references(photos, [prompt.text for prompt in prompts])
    return np.unique(np.asarray(encoded.embeddings)[photos.mask], axis=0)


def recognition(
    embeddings: Float[ArrayLike, "B T K E"],
    matches: Matches,
    references: Float[ArrayLike, "B M E"],
    reference_mask: Bool[ArrayLike, "B M"],
    distractors: Float[ArrayLike, "R E"],
    same: float,
) -> dict[str, Float[ArrayLike, " B"]]:
    """Compute `recognised_log` and `unrecognised` (see the module's docstring).

    Gradients reach the embeddings of the matched faces. The assignment has none.

    Args:
      embeddings: unit vectors of the faces.
      matches: references matched to the faces.
      references: unit vectors of the references.
      reference_mask: False on padding.
      distractors: unit vectors of the references of all prompts, in any order.
      same: cosine above which a distractor shows a person of the prompt.
    """
    picked = jax.nn.one_hot(matches.face, embeddings.shape[2])
    total = jnp.einsum("btmk,btke->bme", picked, embeddings, precision="highest")
    shown = jnp.any(matches.matched, axis=1)[..., None]
    mean = jnp.where(shown, total, 1.0)
    mean = mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)

    def logits(candidates: ArrayLike, allowed: ArrayLike, letters: str) -> jax.Array:
        cosine = jnp.einsum(letters, mean, candidates, precision="highest")
        return jnp.where(allowed[:, None], cosine / TEMPERATURE, -jnp.inf)

    alike = jnp.einsum("bme,re->bmr", references, distractors, precision="highest")
    others = ~jnp.any((alike > same) & reference_mask[..., None], axis=1)
    own = logits(references, reference_mask, "bme,bje->bmj")
    every = jnp.concatenate([own, logits(distractors, others, "bme,re->bmr")], -1)
    chosen = jnp.diagonal(own, axis1=1, axis2=2)
    log = jnp.where(reference_mask, chosen, 0.0) - jax.nn.logsumexp(every, axis=-1)
    anybody = jnp.log(jnp.sum(reference_mask, -1) + jnp.sum(others, -1))
    frames = jnp.mean(matches.matched, axis=1)
    log = masked_mean(frames * log - (1 - frames) * anybody[:, None], reference_mask)
    return {"recognised_log": log, "unrecognised": -log / jnp.maximum(anybody, 1e-6)}
