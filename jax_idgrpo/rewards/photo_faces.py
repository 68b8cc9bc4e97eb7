"""Find and embed the faces of reference photos at the photo's own size, each photo once in a run.

A photo whose shorter side exceeds `SHORT` pixels is shrunk to it, with smoothing. To limit the
number of compiled programs, a photo is extended at its right and lower border to the next of
`SIDES`, and its face is cropped in a window of fixed size. If the face is larger than the network's
crop, the window is taken from a photo shrunk by powers of two, so that no pixel is skipped.

Of several faces the largest is used, as in insightface and deepface, and a warning names the photo.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards.base import Photo, ReferenceFaces, References
from jax_idgrpo.rewards.people import ReferencePeople
from jax_idgrpo.rewards.photo_copy import PHOTO_SIDE, PHOTO_TEMPLATE, photo_crops
from jax_idgrpo.rewards.placed import PlaceTargets

SHORT = 1024  # maximum of the shorter side in pixels; more does not improve an embedding
SIDES = (64, 128, 256, 512, SHORT)  # shorter sides of a padded picture, in pixels
CLOSER = 1.8  # side of a portrait, in units of its face
RATIOS = (1.0, 1.5, 2.0)  # ratios of the longer to the shorter side of a padded picture


class PhotoPerson(NamedTuple):
    """The person of the largest face of a photo (see `people.ReferencePeople`)."""

    features: Float[np.ndarray, " D"]
    reach: Float[np.ndarray, "4"]
    counts: bool


class PhotoFace(NamedTuple):
    """The largest face of a photo.

    Attributes:
      embedding: unit vector.
      crop: crop of the face for `photo_copy`.
      faces: number of faces in the photo.
      person: the whole person; None if it is not read.
    """

    embedding: Float[np.ndarray, " E"]
    crop: Float[np.ndarray, "S S 3"]
    faces: int
    person: PhotoPerson | None = None


class Level(NamedTuple):
    """A photo, or a part of it, at one size.

    Attributes:
      pixels: RGB in 0 .. 255.
      scale: pixels per pixel of the photo, along x and y.
      corner: x, y of the part's corner in the photo.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    scale: Float[np.ndarray, "2"]
    corner: Float[np.ndarray, "2"] = np.zeros(2)

    def place(self, points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
        """Map points of the photo to this size; integers are pixel centres."""
        return ((points - self.corner + 0.5) * self.scale - 0.5).astype(np.float32)

    def photo(self, points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
        """Map points of this size back to the photo."""
        return (points + 0.5) / self.scale - 0.5 + self.corner


def shrunk(image: Image.Image, short: int, long: int = 10**6) -> Level:
    """Shrink a photo, with smoothing, to the given sides; a photo is never enlarged.

    Args:
      image: the photo.
      short: maximum of the shorter side in pixels.
      long: maximum of the longer side in pixels.
    """
    factor = min(short / min(image.size), long / max(image.size), 1.0)
    size = max(round(image.width * factor), 1), max(round(image.height * factor), 1)
    small = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
    return Level(np.asarray(small), np.divide(size, image.size))


def levels(image: Image.Image, pyramid: bool) -> list[Level]:
    """Resize a photo to the sizes at which it is searched.

    These are the photo's own size and, for a pyramid, each of `SIDES` below it.
    """
    most = int(max(RATIOS))
    own = shrunk(image, SHORT, most * SHORT)
    short = min(own.pixels.shape[:2])
    return [
        own,
        *(shrunk(image, side, most * side) for side in reversed(SIDES) if pyramid and side < short),
    ]


def closer(image: Image.Image, box: Float[np.ndarray, "4"]) -> Level:
    """Crop the square around a face that fills it as in a portrait, within the photo.

    The crop is `SIDES[0]` pixels wide.
    """
    size = np.array(image.size, float)
    side = min(CLOSER * math.sqrt(float(np.prod(np.maximum(box[2:] - box[:2], 1)))), *image.size)
    corner = np.clip((box[:2] + box[2:] + 1) / 2 - side / 2, 0, size - side)
    small = image.resize(
        (SIDES[0], SIDES[0]),
        Image.Resampling.LANCZOS,
        box=(*corner.tolist(), *(corner + side).tolist()),
    )
    return Level(np.asarray(small), np.full(2, SIDES[0] / side), corner)


def padded(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Extend a picture right and below to one of a few sizes, by repeating the edge."""
    short, long = sorted(pixels.shape[:2])
    side, other = next(
        (side, round(side * ratio))
        for side in SIDES
        for ratio in RATIOS
        if side >= short and round(side * ratio) >= long
    )
    height, width = (side, other) if pixels.shape[0] <= pixels.shape[1] else (other, side)
    return np.pad(
        pixels, ((0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0)), "edge"
    )


def values(pixels: UInt8[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """Map pixels from 0 .. 255 to [-1, 1]."""
    return pixels.astype(np.float32) / np.float32(255) * 2 - 1


def window(
    image: Image.Image,
    landmarks: Float[np.ndarray, "5 2"],
    template: Float[np.ndarray, "5 2"],
    side: int,
) -> tuple[Float[np.ndarray, "side side 3"], Float[np.ndarray, "5 2"]]:
    """Crop a square of a photo around its face; black beyond the border.

    One pixel of the embedder's crop covers at most 2 pixels of the square along each axis; a larger
    photo is smoothed and shrunk first.

    Args:
      image: the photo.
      landmarks: x, y of the face's landmarks in pixels of the photo.
      template: x, y of the landmarks in the embedder's crop, in its pixels.
      side: side of the square in pixels; four times that of the crop covers any rotation.

    Returns:
      The square, and the landmarks in it.
    """
    p, q = (points - points.mean(0) for points in (template, landmarks))
    growth = math.sqrt(float((q**2).sum() / (p**2).sum()))  # photo pixels per pixel of the crop
    halvings = max(math.floor(math.log2(max(growth, 1.0))), 0)
    level = shrunk(image, max(min(image.size) >> halvings, 1))
    points, size = level.place(landmarks), level.pixels.shape[1::-1]
    corner = [
        0
        if size[axis] <= side
        else int(np.clip(round(points[:, axis].mean()) - side // 2, 0, size[axis] - side))
        for axis in (0, 1)
    ]
    part = level.pixels[corner[1] : corner[1] + side, corner[0] : corner[0] + side]
    picture = np.full((side, side, 3), -1, np.float32)
    picture[: part.shape[0], : part.shape[1]] = values(part)
    return picture, points - np.asarray(corner, np.float32)


@jax.jit
def _crop(picture: Float[Array, "h w 3"], landmarks: Float[Array, "5 2"]) -> Float[Array, "S S 3"]:
    return photo_crops(picture[None], landmarks[None])[0]


def photo_crop(
    image: Image.Image, landmarks: Float[np.ndarray, "5 2"]
) -> Float[np.ndarray, "S S 3"]:
    """Crop a photo's face for `photo_copy`; one program serves photos of all sizes."""
    return np.asarray(_crop(*window(image, landmarks, PHOTO_TEMPLATE, 4 * PHOTO_SIDE)))


class PhotoEncoder:
    """Encode photos as `Reward.encode_references` does; each photo is encoded once."""

    def __init__(self, look: Callable[[Image.Image], PhotoFace | None], least: float | None = None):
        """Start with an empty cache.

        Args:
          look: finds the largest face of a photo; returns None if the photo shows none.
          least: smallest cosine of a photo with the person's other photos, with which the embedding
            of a person is the direction of the mean over all photos; None takes the photo of
            `References.photos` alone.
        """
        self._look, self._least = look, least
        self._found: dict[Hashable, PhotoFace] = {}

    def __call__(
        self,
        references: References,
        prompts: Sequence[str],
        video: tuple[int, int, int] | None = None,
    ) -> ReferenceFaces:
        """Encode the largest face of each photo, once per photo, for videos of any size.

        Args:
          references: the photos of the prompts.
          prompts: the texts of the prompts.
          video: unused.

        Raises:
          UserError: a photo shows no face; the message names the photo.
        """
        rows = [
            [
                self._face(photo, f"reference photo {m} of the prompt {text!r}")
                for m, photo in enumerate(row, 1)
            ]
            for row, text in zip(references.photos, prompts, strict=True)
        ]
        if self.pooled and references.more:
            rows = [
                [self._pool(face, group, text) for face, group in zip(row, groups, strict=True)]
                for row, groups, text in zip(rows, references.more, prompts, strict=True)
            ]
        first = next(face for row in rows for face in row)
        shape = (len(rows), references.people)
        embeddings, crops = (np.zeros((*shape, *leaf.shape), np.float32) for leaf in first[:2])
        for n, row in enumerate(rows):
            for m, face in enumerate(row):
                embeddings[n, m], crops[n, m] = face.embedding, face.crop
        whole = _whole_people(rows, shape[1])
        places = references.places
        targets = PlaceTargets.make(places, references.people) if places else None
        return ReferenceFaces(embeddings, crops, references.mask, whole, targets)

    @property
    def pooled(self) -> bool:
        """Whether the further photos of a person are read."""
        return self._least is not None

    def _pool(self, face: PhotoFace, group: Sequence[Photo], text: str) -> PhotoFace:
        """Return a face with the direction of the mean embedding of all photos of its person.

        The inner product with this unit vector is, up to a factor of the person, the mean cosine
        with all photos (IPRO, arXiv 2510.14255).

        Args:
          face: of the photo that conditions the model.
          group: further photos of the person.
          text: of the prompt, for messages.

        Raises:
          UserError: a further photo shows no face, or somebody else.
        """
        assert self._least is not None
        found = [self._face(photo, f"a further photo of the prompt {text!r}") for photo in group]
        every = np.stack([face.embedding, *(other.embedding for other in found)])
        for number, photo in enumerate(group, 1):
            rest = np.delete(every, number, axis=0).mean(axis=0)
            cosine = float(every[number] @ rest / np.linalg.norm(rest))
            if cosine < self._least:
                raise UserError(
                    f"{photo.name or text}: is unlike the other photos of its person (cosine "
                    f"{cosine:.2f}, at least {self._least:g}); take it out of more_paths"
                )
        mean = every.mean(axis=0)
        return face._replace(embedding=mean / np.linalg.norm(mean)) if found else face

    def _face(self, photo: Photo, otherwise: str) -> PhotoFace:
        """Return the face of a photo; `otherwise` names a photo without a name in messages."""
        if photo.key not in self._found:
            face, name = self._look(photo.open()), photo.name or otherwise
            if face is None:
                raise UserError(
                    f"{name}: no face is found; use a photo that shows one face, large and clear"
                )
            if face.faces > 1:
                warnings.warn(
                    f"{name}: shows {face.faces} faces; the largest is taken", stacklevel=2
                )
            if face.person is not None and not face.person.counts:
                warnings.warn(
                    f"{name}: shows hardly more than a face; person_similarity leaves the person "
                    "out",
                    stacklevel=2,
                )
            self._found[photo.key] = face
        return self._found[photo.key]


def _whole_people(rows: Sequence[Sequence[PhotoFace]], slots: int) -> ReferencePeople | None:
    """Stack the people of photos, padded to `slots` per row; None if they are not read."""
    first = next(face for row in rows for face in row).person
    if first is None:
        return None
    shape = len(rows), slots
    stacked = ReferencePeople(
        np.zeros((*shape, len(first.features)), np.float32),
        np.zeros((*shape, len(first.reach)), np.float32),
        np.zeros(shape, bool),
    )
    for n, row in enumerate(rows):
        for m, face in enumerate(row):
            assert face.person is not None
            stacked.features[n, m], stacked.reach[n, m], stacked.counts[n, m] = face.person
    return stacked


def largest(
    boxes: Float[np.ndarray, "K 4"], scores: Float[np.ndarray, " K"], overlap: float = 0.4
) -> list[int]:
    """Return the indices of distinct faces, largest first.

    Of overlapping faces, the one with the highest score is kept.

    Args:
      boxes: x0 y0 x1 y1 in pixels.
      scores: detector scores, in [0, 1].
      overlap: share of the smaller box, in [0, 1], from which on two boxes are one face.
    """
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    kept: list[int] = []
    for number in np.argsort(-scores, kind="stable"):
        both = [
            np.maximum(
                np.minimum(boxes[number, 2:], boxes[k, 2:])
                - np.maximum(boxes[number, :2], boxes[k, :2]),
                0,
            )
            for k in kept
        ]
        if all(
            np.prod(common) < overlap * min(areas[number], areas[k])
            for common, k in zip(both, kept, strict=True)
        ):
            kept.append(int(number))
    return sorted(kept, key=lambda number: -areas[number])
