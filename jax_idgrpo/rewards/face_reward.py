"""Detect, align, embed, match and score faces as one program on the device.

Reference people are matched to faces frame by frame. Their similarity is the reward (`identity`),
or a trained network (`head`) or
weighted sum (`linear`) scores the matched and tracked faces. Optionally whole people are compared
as well (`people`). Each reference photo is encoded once, at its own size (`photo_faces`).
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, PyTree
from PIL import Image

from jax_idgrpo.config.scoring import PERSON_TERMS
from jax_idgrpo.models.dino import Dino
from jax_idgrpo.models.faces.bundled_detector import Detections, Detector
from jax_idgrpo.rewards.base import ReferenceFaces, Terms, frame_numbers
from jax_idgrpo.rewards.faces import FaceStack, align, normalise
from jax_idgrpo.rewards.head import Head, Tokens, tokens
from jax_idgrpo.rewards.identity import IdentityConfig, reward_terms, term_names
from jax_idgrpo.rewards.linear import LinearReward
from jax_idgrpo.rewards.people import (
    ReferencePeople,
    describe,
    person_terms,
    photo_picture,
    photo_region,
)
from jax_idgrpo.rewards.photo_copy import SIDE
from jax_idgrpo.rewards.photo_faces import (
    RATIOS,
    SHORT,
    Level,
    PhotoEncoder,
    PhotoFace,
    PhotoPerson,
    closer,
    largest,
    levels,
    padded,
    photo_crop,
    values,
    window,
)


def _look(networks, config, frames, videos, people) -> tuple[Terms, Callable[[], Tokens]]:
    """Return the terms, and a function that makes the tokens of the same faces."""
    numbers = frame_numbers(videos.shape[1], frames)
    chosen = (videos if len(numbers) == videos.shape[1] else videos[:, numbers]).astype(jnp.float32)
    stack, _, distractors, whole = networks
    faces = stack(chosen)
    found = (faces.boxes, faces.landmarks, faces.embeddings, faces.mask)
    known = people.embeddings, people.crops, people.mask
    among = None if distractors is None else distractors[...]
    terms = reward_terms(chosen, *found, *known, config, among, people.places)
    if whole is not None:
        seen = faces.boxes, faces.embeddings, faces.mask
        named = people.embeddings, people.mask, people.people
        terms |= person_terms(whole, chosen, *seen, *named, config.null_similarity, config.tracks)
    return terms, lambda: tokens(
        terms, faces, people.embeddings, people.mask, chosen.shape[2:4], config
    )


def _read(graph, config, frames, state, *given) -> tuple[Terms, Tokens]:
    terms, said = _look(nnx.merge(graph, state), config, frames, *given)
    return terms, said()


def _score(graph, config, frames, state, *given) -> Terms:
    networks = nnx.merge(graph, state)
    terms, said = _look(networks, config, frames, *given)
    head = networks[1]
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
) -> Float[Array, " E"]:
    stack = nnx.merge(graph, state)[0]
    crop = align(
        picture[None], landmarks[None, None], stack.template, stack.embedder.config.input_size
    )
    return normalise(stack.embedder(crop[0]))[0]


def _describe(graph, state, picture: Float[Array, "S S 3"]) -> Float[Array, " D"]:
    return describe(nnx.merge(graph, state)[3], picture[None])[0]


# Minimum score of a face in a close-up for the small detector; hair and ears reach 0.79.
SURE = 0.8


class FaceReward:
    """A face stack with an identity reward, as a `DifferentiableReward`.

    Attributes:
      find: jitted; the faces of a reference photo.
      embed: jitted; the embedding of a face, from a window of a reference photo and the landmarks
        in it.
      describe: jitted; the features of a whole person, from the resized region of a reference
        photo; only with a network of whole people.
      read: jitted; from the arguments of `apply`, the terms without the head's and the tokens for a
        head.
      graph: graph of the face stack, the head, the distractors and the network of whole people.
      state: arrays of the same.
      frames: number of evenly spaced frames that are scored; 0 means all.
    """

    motion_of_all_frames = False

    def __init__(
        self,
        stack: FaceStack,
        config: IdentityConfig,
        frames: int = 0,
        head: Head | LinearReward | None = None,
        pool: bool = False,
        people: Dino | None = None,
    ):
        """Split the networks and compile the programs lazily.

        Args:
          stack: detector, alignment and embedder.
          config: constants of the identity reward.
          frames: number of evenly spaced frames to score; 0 means all.
          head: optional learned reward; if given, reward = its score - penalties.
          pool: whether a person is compared with the mean of all their photos.
          people: optional network that compares whole people, which adds the terms of `people`.
        """
        self.config, self.frames, self.has_head = config, frames, head is not None
        self._people = None if people is None else people.config
        self._set(stack, head, people)
        # The small detector finds only faces of 8 to 64 pixels; the others resize by themselves.
        self._pyramid = isinstance(stack.detector, Detector)
        self._template, self._crop_side = (
            np.asarray(stack.template, np.float32),
            stack.embedder.config.input_size,
        )
        self.encode_references = PhotoEncoder(
            self._photo_face, config.null_similarity if pool else None
        )

    def _set(
        self,
        stack: FaceStack,
        head: Head | LinearReward | None,
        people: Dino | None,
        distractors: nnx.Variable | None = None,
    ) -> None:
        graph, self.state = nnx.split((stack, head, distractors, people))
        self.graph, self.contrasted = graph, distractors is not None
        self.read = jax.jit(functools.partial(_read, graph, self.config, self.frames))
        self._apply = jax.jit(functools.partial(_score, graph, self.config, self.frames))
        self.find, self.embed, self.describe = (
            jax.jit(functools.partial(function, graph)) for function in (_find, _embed, _describe)
        )

    def contrast(self, distractors: Float[ArrayLike, "R E"] | jax.ShapeDtypeStruct) -> None:
        """Compare people with distractors from now on, which adds the terms of `distractors`.

        Args:
          distractors: unit vectors of the references of all prompts, in the embedding of the stack.
        """
        stack, head, _, people = nnx.merge(self.graph, self.state)
        self._set(stack, head, people, nnx.Variable(distractors))

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms of every video."""
        names = term_names(self.config, self.contrasted)
        return (*names, *self._whole, *(["head"] if self.has_head else []))

    @property
    def reported(self) -> tuple[str, ...]:
        """Names of the terms that an evaluation reports beside the reward."""
        return ("similarity", *self._whole)

    @property
    def _whole(self) -> tuple[str, ...]:
        return () if self._people is None else PERSON_TERMS

    def photo_shapes(
        self,
    ) -> tuple[jax.ShapeDtypeStruct, tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
        """Return the shapes of the largest photo for `find`, and of the arguments of `embed`."""
        side, places = 4 * self._crop_side, jax.ShapeDtypeStruct((5, 2), jnp.float32)
        largest = jax.ShapeDtypeStruct((SHORT, int(max(RATIOS) * SHORT), 3), jnp.float32)
        return largest, (jax.ShapeDtypeStruct((side, side, 3), jnp.float32), places)

    def person_shape(self) -> jax.ShapeDtypeStruct | None:
        """Return the shape of the argument of `describe`; None without the network."""
        if self._people is None:
            return None
        side = self._people.image_size
        return jax.ShapeDtypeStruct((side, side, 3), jnp.float32)

    def shapes(self, rows: int, people: int) -> ReferenceFaces:
        """Return the shapes of encoded references for `rows` videos with `people` slots each."""
        one = jax.eval_shape(self.embed, self.state, *self.photo_shapes()[1])
        whole = None
        if self._people is not None:
            whole = ReferencePeople(
                features=jax.ShapeDtypeStruct((rows, people, self._people.width), jnp.float32),
                reach=jax.ShapeDtypeStruct((rows, people, 4), jnp.float32),
                counts=jax.ShapeDtypeStruct((rows, people), jnp.bool),
            )
        return ReferenceFaces(
            embeddings=jax.ShapeDtypeStruct((rows, people, *one.shape), jnp.float32),
            crops=jax.ShapeDtypeStruct((rows, people, SIDE, SIDE, 3), jnp.float32),
            mask=jax.ShapeDtypeStruct((rows, people), jnp.bool),
            people=whole,
        )

    def _photo_face(self, image: Image.Image) -> PhotoFace | None:
        """Return the largest face of a photo; None if the photo shows none."""
        sizes = levels(image, self._pyramid)
        boxes, landmarks = self._search(sizes)
        if len(sizes) > 1:
            # The small detector is accurate and confident on close-ups.
            for _ in range(2):
                boxes, landmarks = self._search([closer(image, box) for box in boxes], SURE)
        if not len(boxes):
            return None
        picture, points = window(image, landmarks[0], self._template, 4 * self._crop_side)
        embedding = np.asarray(self.embed(self.state, picture, points))
        crop = photo_crop(image, landmarks[0])
        return PhotoFace(embedding, crop, len(boxes), self._photo_person(image, boxes))

    def _photo_person(
        self, image: Image.Image, boxes: Float[np.ndarray, "N 4"]
    ) -> PhotoPerson | None:
        """Describe the whole person of the first face of a photo; None without the network."""
        if self._people is None:
            return None
        found = photo_region(boxes, (image.height, image.width))
        if found is None:
            return PhotoPerson(np.zeros(self._people.width), np.zeros(4), False)
        region, reach = found
        picture = photo_picture(image, region, self._people.image_size)
        return PhotoPerson(np.asarray(self.describe(self.state, picture)), reach, True)

    def _search(
        self, pictures: Sequence[Level], least: float = 0.0
    ) -> tuple[Float[np.ndarray, "N 4"], Float[np.ndarray, "N 5 2"]]:
        """Find the faces in several pictures of one photo.

        Args:
          pictures: the photo or parts of it, at several sizes.
          least: minimum detector score, in [0, 1].

        Returns:
          Boxes and landmarks in pixels of the photo, largest face first.
        """
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
        """Return the indices of the scored frames of a video of `total` frames; None for all."""
        return frame_numbers(total, self.frames) if self.frames else None

    def apply(
        self, state: PyTree, videos: Float[ArrayLike, "B T H W 3"], encoded: ReferenceFaces
    ) -> Terms:
        """Score videos with the networks' arrays as an argument, for differentiation.

        Args:
          state: arrays of the face stack and the head.
          videos: pixels in [-1, 1].
          encoded: encoded references, one row per video.
        """
        return self._apply(state, videos, encoded)

    def score(self, videos: Float[ArrayLike, "B T H W 3"], encoded: ReferenceFaces) -> Terms:
        """Compute every term (see `identity.reward_terms`); the result stays on the device."""
        return self._apply(self.state, videos, encoded)
