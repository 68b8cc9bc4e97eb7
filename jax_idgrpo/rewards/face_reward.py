"""The face reward: detect, align, embed, match and score, as one program on the device.

Every face is detected, aligned and embedded; reference people are matched to faces frame by frame, and their similarity is scored
(`identity`), or a trained network scores what was found (`head`). Only the check that every photo shows a face runs on the host, once
per photo.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float

from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards.base import Known, References, Terms, frame_numbers
from jax_idgrpo.rewards.faces import FaceStack, load_stack
from jax_idgrpo.rewards.head import Head, Tokens, tokens
from jax_idgrpo.rewards.identity import IdentityConfig, reward_terms, term_names
from jax_idgrpo.rewards.photo_copy import photo_crops


def _look(stack, config, frames, videos, known, mask) -> tuple[Terms, Callable[[], Tokens]]:
    """The terms, and what makes the tokens of the same faces."""
    chosen = videos[:, frame_numbers(videos.shape[1], frames)].astype(jnp.float32)
    faces = stack(chosen)
    found = (faces.boxes, faces.landmarks, faces.embeddings, faces.mask)
    terms = reward_terms(chosen, *found, known.embeddings, known.crops, mask, config)
    return terms, lambda: tokens(terms, faces, known.embeddings, mask, chosen.shape[2:4], config)


def _read(graph, config, frames, state, *given) -> tuple[Terms, Tokens]:
    terms, said = _look(nnx.merge(graph, state)[0], config, frames, *given)
    return terms, said()


def _score(graph, config, frames, state, *given) -> Terms:
    stack, head = nnx.merge(graph, state)
    terms, said = _look(stack, config, frames, *given)
    if head is None:
        return terms
    score = head(said())
    return terms | {"head": score, "reward": score - terms["costs"]}


def _best(graph, state, pictures) -> tuple[Known, Bool[Array, "B"]]:
    embeddings, found, landmarks = nnx.merge(graph, state)[0].best(pictures)
    return Known(embeddings[:, None], photo_crops(pictures, landmarks)[:, None]), found


class FaceReward:
    """A face stack with an identity reward on top. After a call, `terms` holds every named term of it, each [B].

    function(state, videos, known, mask) -> terms is the reward as a function of arrays alone, for programs that differentiate it;
    read, of the same arguments, -> (terms without a head's, the tokens that a head looks at).
    """

    def __init__(self, stack: FaceStack, config: IdentityConfig, frames: int = 0, head: Head | None = None):
        """frames: how many evenly spaced frames are looked at; 0 means all. head: what it says, less the costs, is the reward."""
        graph, self.state = nnx.split((stack, head))
        self.config, self.has_head = config, head is not None
        self.read = jax.jit(functools.partial(_read, graph, config, frames))
        self.function = jax.jit(functools.partial(_score, graph, config, frames))
        self._best = jax.jit(functools.partial(_best, graph))
        self._cache: dict[bytes, Known] = {}
        self.terms: Terms = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the terms."""
        return (*term_names(self.config), *(["head"] if self.has_head else []))

    def shapes(self, rows: int, people: int) -> Known:
        """Shapes of what `embed_references` makes of `rows` prompts with room for so many people."""
        one, _ = jax.eval_shape(self._best, self.state, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, people, *leaf.shape[2:]), leaf.dtype), one)

    def embed_references(self, references: References, prompts: Sequence[str] | None = None) -> Known:
        """What the best face in each reference photo says; each photo is looked at once.

        Raises:
          UserError: no face is found in a photo.
        """
        images, mask = np.asarray(references.images, np.float32), np.asarray(references.mask)
        names = [[hashlib.sha256(photo.tobytes()).digest() for photo in row] for row in images]
        unknown = {names[b][m]: (b, m) for b, m in np.argwhere(mask) if names[b][m] not in self._cache}
        if unknown:
            places = list(unknown.values())
            seen, found = jax.device_get(self._best(self.state, np.stack([images[place] for place in places])))
            for (b, m), face in zip(places, found, strict=True):
                if not face:
                    of = f"prompt {b + 1}" if prompts is None else f"the prompt {prompts[b]!r}"
                    raise UserError(f"reference photo {m + 1} of {of}: no face is found; use a photo that shows one face, large and clear")
            self._cache |= {name: jax.tree.map(lambda leaf: leaf[n, 0], seen) for n, name in enumerate(unknown)}  # noqa: B023
        nobody = jax.tree.map(np.zeros_like, next(iter(self._cache.values())))
        rows = [[self._cache[name] if keep else nobody for name, keep in zip(*row, strict=True)] for row in zip(names, mask, strict=True)]
        return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves).reshape(*mask.shape, *leaves[0].shape)), *itertools.chain(*rows))

    def score_terms(
        self, videos: Float[ArrayLike, "B T H W 3"], known: Known, mask: Bool[ArrayLike, "B M"]
    ) -> Terms:
        """Every term (see `identity.reward_terms`), the reward among them; stays on the device."""
        return self.function(self.state, videos, known, mask)

    def __call__(
        self, videos: Float[ArrayLike, "B T H W 3"], references: References, prompts: Sequence[str] | None = None
    ) -> Float[Array, "B"]:
        """The reward of videos in [-1, 1].

        Raises:
          UserError: no face is found in a reference photo.
        """
        self.terms = self.score_terms(videos, self.embed_references(references, prompts), jnp.asarray(references.mask))
        return self.terms["reward"]

    score = __call__


def load_reward(folder: str | Path, name: str = "embedder", frames: int = 0, config: IdentityConfig | None = None) -> FaceReward:
    """The reward of a folder with `detector` and the embedder `name`; "judge" is the one that only measures.

    Raises:
      UserError: a file is missing or damaged.
    """
    return FaceReward(load_stack(Path(folder), name), config or IdentityConfig(), frames)
