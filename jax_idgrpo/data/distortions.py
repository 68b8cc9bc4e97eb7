"""What can be done to a clip with known faces: the tricks of a policy that games a face reward, and faults of known kind.

Each takes a clip of numpy float32 frames in [-1, 1] with the boxes of its people's faces (left, top, right, bottom in pixels) and returns
a new clip. Faces are moved as ovals with soft edges, scaled from box to box; people who are absent (`mask` False) are left alone.
"""

from collections.abc import Callable

import flax.struct
import numpy as np
from jaxtyping import Bool, Float

EDGE = 0.15  # of the oval's radius, over which a pasted face fades


@flax.struct.dataclass
class Subject:
    """A clip, its people and their photos, people in the same order. photo_boxes: of the faces in the photos."""

    video: Float[np.ndarray, "F H W 3"]
    boxes: Float[np.ndarray, "F M 4"]
    mask: Bool[np.ndarray, "M"]
    photos: Float[np.ndarray, "M h w 3"]
    photo_boxes: Float[np.ndarray, "M 4"]

    @property
    def people(self) -> list[int]:
        """Indices of those who are asked for."""
        return np.flatnonzero(self.mask).tolist()

    @property
    def neighbours(self) -> list[tuple[int, int]]:
        """Each with the next in a round; nobody for one person alone."""
        people = self.people
        return list(zip(people, people[1:] + people[:1], strict=True)) if len(people) > 1 else []


def grown(box: Float[np.ndarray, "4"], factor: float) -> Float[np.ndarray, "4"]:
    """The box with its sides times `factor`, about its middle."""
    half, middle = (box[2:] - box[:2]) / 2 * factor, (box[2:] + box[:2]) / 2
    return np.concatenate([middle - half, middle + half])


def put(
    frame: Float[np.ndarray, "H W 3"],
    box: Float[np.ndarray, "4"],
    picture: Float[np.ndarray, "h w 3"],
    source: Float[np.ndarray, "4"],
    strength: float = 1.0,
) -> None:
    """Paint the face in the box `source` of a picture over that in `box` of the frame, in place; bilinear, as an oval.

    strength: opacity. A box without area changes nothing.
    """
    height, width = frame.shape[:2]
    size, middle = box[2:] - box[:2], (box[:2] + box[2:]) / 2
    low = np.clip(np.floor(box[:2]), 0, (width, height)).astype(int)
    high = np.clip(np.ceil(box[2:]), 0, (width, height)).astype(int)
    if (size <= 0).any() or (high <= low).any():
        return
    x, y = np.meshgrid(np.arange(low[0], high[0]) + 0.5, np.arange(low[1], high[1]) + 0.5)
    radius = np.hypot((x - middle[0]) / (size[0] / 2), (y - middle[1]) / (size[1] / 2))
    opacity = strength * np.clip((1 - radius) / EDGE, 0, 1)[..., None]
    scale = (source[2:] - source[:2]) / size
    column = np.clip((x - box[0]) * scale[0] + source[0] - 0.5, 0, picture.shape[1] - 1.0)
    row = np.clip((y - box[1]) * scale[1] + source[1] - 0.5, 0, picture.shape[0] - 1.0)
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    right, below = np.minimum(left + 1, picture.shape[1] - 1), np.minimum(top + 1, picture.shape[0] - 1)
    a, b = (column - left)[..., None], (row - top)[..., None]
    upper, lower = (picture[line, left] * (1 - a) + picture[line, right] * a for line in (top, below))
    face = upper * (1 - b) + lower * b
    part = frame[low[1] : high[1], low[0] : high[0]]
    part += opacity * (face - part)


def _frames(subject: Subject, change: Callable[[np.ndarray, np.ndarray, np.ndarray], None]) -> Float[np.ndarray, "F H W 3"]:
    """A new clip: `change(new frame, old frame, boxes)` on each."""
    video = np.array(subject.video, np.float32)
    for new, old, boxes in zip(video, subject.video, subject.boxes, strict=True):
        change(new, old, boxes)
    return video


def paste(subject: Subject, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Everybody's face is the one in their photo."""

    def change(new: np.ndarray, old: np.ndarray, boxes: np.ndarray) -> None:
        for i in subject.people:
            put(new, boxes[i], subject.photos[i], subject.photo_boxes[i], strength)

    return _frames(subject, change)


def freeze(subject: Subject, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """The first frame stays; with strength below 1 the others shine through."""
    video = np.asarray(subject.video, np.float32)
    return np.float32(strength) * video[:1] + np.float32(1 - strength) * video


def enlarge(subject: Subject, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """The first person's face grows about its middle, by 1 + strength."""

    def change(new: np.ndarray, old: np.ndarray, boxes: np.ndarray) -> None:
        for i in subject.people[:1]:
            put(new, grown(boxes[i], 1 + strength), old, boxes[i])

    return _frames(subject, change)


def duplicate(subject: Subject, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Everybody gets the first person's face."""

    def change(new: np.ndarray, old: np.ndarray, boxes: np.ndarray) -> None:
        for i in subject.people[1:]:
            put(new, boxes[i], old, boxes[subject.people[0]], strength)

    return _frames(subject, change)


def hide(subject: Subject, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """The last person's face is painted over with the frame's mean colour."""

    def change(new: np.ndarray, old: np.ndarray, boxes: np.ndarray) -> None:
        for i in subject.people[-1:]:
            plain = np.broadcast_to(old.mean((0, 1)), (2, 2, 3))
            put(new, grown(boxes[i], 1.4), plain, np.array([0.0, 0.0, 2.0, 2.0]), strength)

    return _frames(subject, change)


def average(subject: Subject, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Each face is mixed half and half with the next person's."""

    def change(new: np.ndarray, old: np.ndarray, boxes: np.ndarray) -> None:
        for i, other in subject.neighbours:
            put(new, boxes[i], old, boxes[other], 0.5 * strength)

    return _frames(subject, change)


def swap(subject: Subject, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """From the middle of the clip on, each has the next person's face."""
    video = np.array(subject.video, np.float32)
    for number in range(len(video) // 2, len(video)):
        for i, other in subject.neighbours:
            put(video[number], subject.boxes[number, i], subject.video[number], subject.boxes[number, other], strength)
    return video


DISTORTIONS: dict[str, Callable[..., Float[np.ndarray, "F H W 3"]]] = {
    "paste": paste,
    "freeze": freeze,
    "enlarge": enlarge,
    "duplicate": duplicate,
    "hide": hide,
    "average": average,
    "swap": swap,
}
