"""The face reward: detect, align, embed, match and score, as one program on the device.

Every face is detected, aligned and embedded; reference people are matched to faces frame by frame, and their similarity is scored
(`identity`), or a trained network scores what was found (`head`). Reference photos are looked at once each, at their own size
(`photo_faces`).
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float
from PIL import Image

from jax_idgrpo.models.faces.bundled_detector import Detections, Detector
from jax_idgrpo.rewards.base import ReferenceFaces, References, Terms, frame_numbers
from jax_idgrpo.rewards.faces import FaceStack, align, load_stack, normalise
from jax_idgrpo.rewards.head import Head, Tokens, tokens
from jax_idgrpo.rewards.identity import IdentityConfig, reward_terms, term_names
from jax_idgrpo.rewards.photo_copy import SIDE
from jax_idgrpo.rewards.photo_faces import (
    RATIOS,
    SHORT,
    Level,
    PhotoEncoder,
    PhotoFace,
    closer,
    largest,
    levels,
    padded,
    photo_crop,
    values,
    window,
)


def _look(stack, config, frames, videos, people) -> tuple[Terms, Callable[[], Tokens]]:
    """The terms, and what makes the tokens of the same faces."""
    numbers = frame_numbers(videos.shape[1], frames)
    chosen = (videos if len(numbers) == videos.shape[1] else videos[:, numbers]).astype(jnp.float32)
    faces = stack(chosen)
    found = (faces.boxes, faces.landmarks, faces.embeddings, faces.mask)
    terms = reward_terms(chosen, *found, people.embeddings, people.crops, people.mask, config)
    return terms, lambda: tokens(
        terms, faces, people.embeddings, people.mask, chosen.shape[2:4], config
    )


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


def _find(graph, state, picture: Float[Array, "H W 3"]) -> Detections:
    stack = nnx.merge(graph, state)[0]
    return jax.tree.map(
        lambda leaf: leaf[0], stack.detector.find(picture[None], stack.max_faces, stack.threshold)
    )


def _embed(
    graph, state, picture: Float[Array, "h w 3"], landmarks: Float[Array, "5 2"]
) -> Float[Array, "E"]:
    stack = nnx.merge(graph, state)[0]
    crop = align(
        picture[None], landmarks[None, None], stack.template, stack.embedder.config.input_size
    )
    return normalise(stack.embedder(crop[0]))[0]


SURE = 0.8  # least score of a face that the small detector looks at as large as in a portrait; hair and ears come to 0.79


class FaceReward:
    """A face stack with an identity reward on top, a `DifferentiableReward`.

    find, embed: of a picture, its faces, and of a window of it and the landmarks there, the embedding; for reference photos.
    read: of the arguments of `apply`, the terms without a head's, and the tokens that a head looks at.
    graph, state: the face stack and the head, split.
    frames: evenly spaced frames that are looked at; 0 means all.
    """

    reported = ("similarity",)
    motion_of_all_frames = False

    def __init__(
        self, stack: FaceStack, config: IdentityConfig, frames: int = 0, head: Head | None = None
    ):
        """frames: how many evenly spaced frames are looked at; 0 means all. head: what it says, less the costs, is the reward."""
        self.graph, self.state = nnx.split((stack, head))
        graph = self.graph
        self.config, self.frames, self.has_head = config, frames, head is not None
        self.read = jax.jit(functools.partial(_read, graph, config, frames))
        self._apply = jax.jit(functools.partial(_score, graph, config, frames))
        self.find, self.embed = (
            jax.jit(functools.partial(function, graph)) for function in (_find, _embed)
        )
        self._pyramid = isinstance(
            stack.detector, Detector
        )  # it finds faces of 8 to 64 pixels alone; others resize by themselves
        self._template, self._crop_side = (
            np.asarray(stack.template, np.float32),
            stack.embedder.config.input_size,
        )
        self._encode = PhotoEncoder(self._photo_face)

    @functools.cached_property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms of every video."""
        return (*term_names(self.config), *(["head"] if self.has_head else []))

    def photo_shapes(
        self,
    ) -> tuple[jax.ShapeDtypeStruct, tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
        """Shapes of the largest photo that `find` is given, and of the window and the landmarks that `embed` is given."""
        side, places = 4 * self._crop_side, jax.ShapeDtypeStruct((5, 2), jnp.float32)
        largest = jax.ShapeDtypeStruct((SHORT, int(max(RATIOS) * SHORT), 3), jnp.float32)
        return largest, (jax.ShapeDtypeStruct((side, side, 3), jnp.float32), places)

    def shapes(self, rows: int, people: int) -> ReferenceFaces:
        """Shapes of the encoded references of `rows` videos with room for so many people."""
        one = jax.eval_shape(self.embed, self.state, *self.photo_shapes()[1])
        return ReferenceFaces(
            embeddings=jax.ShapeDtypeStruct((rows, people, *one.shape), jnp.float32),
            crops=jax.ShapeDtypeStruct((rows, people, SIDE, SIDE, 3), jnp.float32),
            mask=jax.ShapeDtypeStruct((rows, people), jnp.bool),
        )

    def encode_references(
        self,
        references: References,
        prompts: Sequence[str],
        video: tuple[int, int, int] | None = None,
    ) -> ReferenceFaces:
        """The largest face of each photo; each photo is looked at once, whatever the size of the videos.

        Raises:
          UserError: a photo shows no face; the message names it.
        """
        return self._encode(references, prompts)

    def _photo_face(self, image: Image.Image) -> PhotoFace | None:
        """The largest face of a photo; None if it shows none."""
        sizes = levels(image, self._pyramid)
        boxes, landmarks = self._search(sizes)
        if len(sizes) > 1:
            for _ in range(
                2
            ):  # the small detector is exact, and sure, where a face is as large as in a portrait
                boxes, landmarks = self._search([closer(image, box) for box in boxes], SURE)
        if not len(boxes):
            return None
        picture, points = window(image, landmarks[0], self._template, 4 * self._crop_side)
        embedding = np.asarray(self.embed(self.state, picture, points))
        return PhotoFace(embedding, photo_crop(image, landmarks[0]), len(boxes))

    def _search(
        self, pictures: Sequence[Level], least: float = 0.0
    ) -> tuple[Float[np.ndarray, "N 4"], Float[np.ndarray, "N 5 2"]]:
        """Boxes and landmarks, in the photo, of the faces that its pictures show together, largest first. least: of their scores."""
        boxes, landmarks, scores = np.zeros((0, 4)), np.zeros((0, 5, 2)), np.zeros(0)
        for level in pictures:
            found = jax.device_get(self.find(self.state, values(padded(level.pixels))))
            shown = found.mask & (found.scores >= least)
            boxes = np.concatenate(
                [boxes, level.photo(found.boxes[shown].reshape(-1, 2, 2)).reshape(-1, 4)]
            )
            landmarks = np.concatenate([landmarks, level.photo(found.landmarks[shown])])
            scores = np.concatenate([scores, found.scores[shown]])
        faces = largest(boxes, scores)
        return boxes[faces], landmarks[faces]

    def frames_read(self, total: int) -> np.ndarray | None:
        """Numbers of the frames, of so many, that are looked at; None for all."""
        return frame_numbers(total, self.frames) if self.frames else None

    def apply(
        self, state: Any, videos: Float[ArrayLike, "B T H W 3"], encoded: ReferenceFaces
    ) -> Terms:
        """Score videos with the networks' arrays as an argument, for programs that differentiate it."""
        return self._apply(state, videos, encoded)

    def score(self, videos: Float[ArrayLike, "B T H W 3"], encoded: ReferenceFaces) -> Terms:
        """Every term (see `identity.reward_terms`), the reward among them; stays on the device."""
        return self._apply(self.state, videos, encoded)


def load_reward(
    folder: str | Path,
    name: str = "embedder",
    frames: int = 0,
    config: IdentityConfig | None = None,
) -> FaceReward:
    """The reward of a folder with `detector` and the embedder `name`; "judge" is the one that only measures.

    Raises:
      UserError: a file is missing or damaged.
    """
    return FaceReward(load_stack(Path(folder), name), config or IdentityConfig(), frames)
