"""What can be done to a clip with known faces: faults of known kind and strength, the tricks among them, and changes that harm nobody.

A distortion takes a clip of numpy float32 frames in [-1, 1] with the boxes of its people's faces (left, top, right, bottom in pixels) and a
strength in [0, 1], and returns a new clip; 0 changes nothing. People who are absent (`mask` False) are left alone. Who has whose face is up
to the clip (`AnnotatedClip.swap_faces`): where faces can only be moved they are ovals with soft edges, scaled from box to box (`pasted`). A nuisance
takes frames, a strength and a direction of four numbers in [-1, 1], and leaves everybody who they are. Neither draws anything: what is
random comes in from outside.
"""

import math
from collections.abc import Callable, Mapping

import flax.struct
import numpy as np
from jaxtyping import Bool, Float

from jax_idgrpo.data.video import recoded

DISTRACTOR = -1  # the number of somebody who is not in a clip
EDGE = 0.15  # of the oval's radius, over which a pasted face fades

# What a nuisance changes at strength 1, at most
GAIN, TINT = 0.25, 0.08  # of the light, and of one colour channel beyond it
QUALITY = (14, 26)  # h264 quality factor at strength 0 and 1
MARGIN = 0.06  # of a side, that is cut away
ROLL = math.radians(6)


@flax.struct.dataclass
class AnnotatedClip:
    """A clip, its people and their photos, people in the same order. photo_boxes: of the faces in the photos.

    swap_faces: the same clip in which people have other faces: whose, by number, and `DISTRACTOR` for somebody who is not in the clip.
    """

    video: Float[np.ndarray, "F H W 3"]
    boxes: Float[np.ndarray, "F M 4"]
    mask: Bool[np.ndarray, "M"]
    photos: Float[np.ndarray, "M h w 3"]
    photo_boxes: Float[np.ndarray, "M 4"]
    swap_faces: Callable[[Mapping[int, int]], Float[np.ndarray, "F H W 3"]] = flax.struct.field(
        pytree_node=False
    )

    @property
    def people(self) -> list[int]:
        """Indices of those who are asked for."""
        return np.flatnonzero(self.mask).tolist()


def grown(box: Float[np.ndarray, "4"], factor: float) -> Float[np.ndarray, "4"]:
    """The box with its sides times `factor`, about its middle."""
    half, middle = (box[2:] - box[:2]) / 2 * factor, (box[2:] + box[:2]) / 2
    return np.concatenate([middle - half, middle + half])


def sampled(
    pictures: Float[np.ndarray, "*n H W 3"],
    x: Float[np.ndarray, "h w"],
    y: Float[np.ndarray, "h w"],
) -> Float[np.ndarray, "*n h w 3"]:
    """Bilinear samples at x, y in pixels (the first pixel's middle is 0.5); the edge is repeated outside."""
    height, width = pictures.shape[-3:-1]
    column, row = np.clip(x - 0.5, 0, width - 1.0), np.clip(y - 0.5, 0, height - 1.0)
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    right, below = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    a, b = (column - left)[..., None], (row - top)[..., None]
    upper, lower = (
        pictures[..., line, left, :] * (1 - a) + pictures[..., line, right, :] * a
        for line in (top, below)
    )
    return upper * (1 - b) + lower * b


def _pixels(
    left: int, top: int, right: int, bottom: int
) -> tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """x and y of the middles of the pixels of a rectangle."""
    x, y = np.meshgrid(np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5)
    return x, y


def _inside(box: Float[np.ndarray, "4"], height: int, width: int) -> tuple[int, int, int, int]:
    """The pixels that a box touches in a picture: left, top, right, bottom."""
    low = np.clip(np.floor(box[:2]), 0, (width, height)).astype(int)
    high = np.clip(np.ceil(box[2:]), 0, (width, height)).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


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
    size, middle = box[2:] - box[:2], (box[:2] + box[2:]) / 2
    left, top, right, bottom = _inside(box, *frame.shape[:2])
    if (size <= 0).any() or right <= left or bottom <= top:
        return
    x, y = _pixels(left, top, right, bottom)
    radius = np.hypot((x - middle[0]) / (size[0] / 2), (y - middle[1]) / (size[1] / 2))
    opacity = strength * np.clip((1 - radius) / EDGE, 0, 1)[..., None]
    scale = (source[2:] - source[:2]) / size
    face = sampled(
        picture, (x - box[0]) * scale[0] + source[0], (y - box[1]) * scale[1] + source[1]
    )
    part = frame[top:bottom, left:right]
    part += opacity * (face - part)


def pasted(
    video: Float[np.ndarray, "F H W 3"],
    boxes: Float[np.ndarray, "F M 4"],
    distractor: Float[np.ndarray, "F y x 3"],
    distractor_boxes: Float[np.ndarray, "F 4"],
    faces: Mapping[int, int],
) -> Float[np.ndarray, "F H W 3"]:
    """A clip with other faces painted over those in it: `AnnotatedClip.swap_faces` where all there is are pictures.

    distractor: a picture, for every frame, of somebody who is not in the clip; distractor_boxes: of the face in it.
    """
    changed = np.array(video, np.float32)
    for i, other in faces.items():
        for t, frame in enumerate(changed):
            source = (
                (distractor[t], distractor_boxes[t])
                if other == DISTRACTOR
                else (video[t], boxes[t, other])
            )
            put(frame, boxes[t, i], *source)
    return changed


def _blurred(picture: Float[np.ndarray, "H W 3"], sigma: float) -> Float[np.ndarray, "H W 3"]:
    """Gaussian blur by `sigma` pixels; the edge is repeated outside."""
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-6)) ** 2)
    for axis in (0, 1):
        around = np.pad(
            picture, [(reach, reach) if k == axis else (0, 0) for k in range(3)], mode="edge"
        )
        length = picture.shape[axis]
        parts = (
            weight * around.take(range(k, k + length), axis)
            for k, weight in enumerate(kernel / kernel.sum())
        )
        picture = sum(parts, np.zeros_like(picture))
    return picture


def _changed(
    clip: AnnotatedClip, change: Callable[[np.ndarray, int], None], share: float = 1.0
) -> Float[np.ndarray, "F H W 3"]:
    """A new clip: `change(frame, its number)` on the last frames, a share of all."""
    video = np.array(clip.video, np.float32)
    for t in np.flatnonzero(_last(len(video), share)).tolist():
        change(video[t], t)
    return video


def _last(frames: int, share: float) -> Float[np.ndarray, "F"]:
    """1 for the last frames, a share of all rounded up, 0 for the others."""
    return (np.arange(frames) >= frames - math.ceil(round(share * frames, 6))).astype(np.float32)


def _with_swapped_faces(
    clip: AnnotatedClip, faces: Mapping[int, int], opacity: Float[np.ndarray, "F"]
) -> Float[np.ndarray, "F H W 3"]:
    """A new clip in which some have other faces, by number; opacity: of these, for every frame."""
    video = np.array(clip.video, np.float32)
    if faces and opacity.any():
        video += opacity[:, None, None, None] * (clip.swap_faces(faces) - video)
    return video


def _round(clip: AnnotatedClip) -> dict[int, int]:
    """Each has the next one's face, the last the first's; nobody for one person alone."""
    people = clip.people
    return dict(zip(people, people[1:] + people[:1], strict=True)) if len(people) > 1 else {}


# ---- distortions -----------------------------------------------------------------------------------------------------------


def paste(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Everybody's face is the one in their photo; strength: its opacity."""

    def change(frame: np.ndarray, t: int) -> None:
        for i in clip.people:
            put(frame, clip.boxes[t, i], clip.photos[i], clip.photo_boxes[i], strength)

    return _changed(clip, change)


def freeze(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """The clip comes to a standstill; strength: for which share of it."""
    last = len(clip.video) - 1
    return np.asarray(clip.video, np.float32)[
        np.minimum(np.arange(last + 1), round((1 - strength) * last))
    ]


def enlarge(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """The first person's face grows about its middle, by 1 + strength."""

    def change(frame: np.ndarray, t: int) -> None:
        for i in clip.people[:1]:
            put(
                frame,
                grown(clip.boxes[t, i], 1 + strength),
                clip.video[t],
                clip.boxes[t, i],
                float(strength > 0),
            )

    return _changed(clip, change)


def duplicate(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """In the end everybody has the first person's face; strength: for which share of the clip."""
    return _with_swapped_faces(
        clip,
        dict.fromkeys(clip.people[1:], clip.people[0]),
        _last(len(clip.video), strength),
    )


def drop(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """In the end the last person's face is gone, under the frame's mean colour; strength: for which share of the clip."""

    def change(frame: np.ndarray, t: int) -> None:
        plain = np.broadcast_to(clip.video[t].mean((0, 1)), (2, 2, 3))
        for i in clip.people[-1:]:
            put(frame, grown(clip.boxes[t, i], 1.4), plain, np.array([0.0, 0.0, 2.0, 2.0]))

    return _changed(clip, change, strength)


def blend(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Each face is mixed with the next person's, half and half at strength 1."""
    return _with_swapped_faces(
        clip, _round(clip), np.full(len(clip.video), 0.5 * strength, np.float32)
    )


def swap(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """In the end each has the next person's face; at strength 1 for half of the clip, since exchanged throughout is not exchanged."""
    return _with_swapped_faces(clip, _round(clip), _last(len(clip.video), strength / 2))


def replace(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """The last person has the distractor's face; strength: its opacity."""
    return _with_swapped_faces(
        clip,
        dict.fromkeys(clip.people[-1:], DISTRACTOR),
        np.full(len(clip.video), strength, np.float32),
    )


def drift(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """The last person turns into the distractor little by little; strength: opacity of the distractor's face in the last frame."""
    return _with_swapped_faces(
        clip,
        dict.fromkeys(clip.people[-1:], DISTRACTOR),
        np.linspace(0, strength, len(clip.video), dtype=np.float32),
    )


def blur(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Everybody's face loses its details, by a Gaussian of an eighth of its width at strength 1."""

    def change(frame: np.ndarray, t: int) -> None:
        for i in clip.people:
            box = clip.boxes[t, i]
            sigma = strength * float(box[2] - box[0]) / 8
            left, top, right, bottom = _inside(grown(box, 1.5), *frame.shape[:2])
            if right > left and bottom > top:
                corner = np.array([left, top, left, top], box.dtype)
                put(
                    frame,
                    box,
                    _blurred(clip.video[t, top:bottom, left:right], sigma),
                    box - corner,
                    float(strength > 0),
                )

    return _changed(clip, change)


# ---- nuisances -------------------------------------------------------------------------------------------------------------


def light(
    video: Float[np.ndarray, "F H W 3"], strength: float, direction: Float[np.ndarray, "4"]
) -> Float[np.ndarray, "F H W 3"]:
    """Brighter or darker, warmer or colder. direction: of the gain, and of each channel beyond it."""
    gain = 1 + strength * (GAIN * direction[0] + TINT * direction[1:])
    return np.clip((video + 1) * gain.astype(np.float32) - 1, -1, 1)


def codec(
    video: Float[np.ndarray, "F H W 3"], strength: float, direction: Float[np.ndarray, "4"]
) -> Float[np.ndarray, "F H W 3"]:
    """Through h264 and back, at a quality that falls with the strength."""
    return recoded(video, QUALITY[0] + round(strength * (QUALITY[1] - QUALITY[0])))


def crop(
    video: Float[np.ndarray, "F H W 3"], strength: float, direction: Float[np.ndarray, "4"]
) -> Float[np.ndarray, "F H W 3"]:
    """A margin is cut away and the rest fills the picture. direction: of the rest's place, across and down."""
    height, width = video.shape[1:3]
    cut = strength * MARGIN
    x, y = _pixels(0, 0, width, height)
    start = (direction[:2] + 1) / 2 * cut * np.array([width, height])
    return sampled(video, x * (1 - cut) + start[0], y * (1 - cut) + start[1]).astype(np.float32)


def pose(
    video: Float[np.ndarray, "F H W 3"], strength: float, direction: Float[np.ndarray, "4"]
) -> Float[np.ndarray, "F H W 3"]:
    """The camera leans, about the picture's middle. A mirror image would be somebody else: no face is symmetric."""
    height, width = video.shape[1:3]
    angle = strength * ROLL * float(direction[0])
    x, y = _pixels(0, 0, width, height)
    dx, dy = x - width / 2, y - height / 2
    cos, sin = math.cos(angle), math.sin(angle)
    return sampled(video, width / 2 + cos * dx - sin * dy, height / 2 + sin * dx + cos * dy).astype(
        np.float32
    )


DISTORTIONS: dict[str, Callable[..., Float[np.ndarray, "F H W 3"]]] = {
    "swap": swap,
    "replace": replace,
    "drop": drop,
    "duplicate": duplicate,
    "blend": blend,
    "drift": drift,
    "blur": blur,
    "enlarge": enlarge,
    "freeze": freeze,
    "paste": paste,
}
TRICKS = (
    "paste",
    "freeze",
    "enlarge",
    "duplicate",
    "drop",
    "blend",
    "swap",
)  # what a policy might do to please a face reward
LOOKS = (
    "blur",
    "enlarge",
    "freeze",
    "paste",
)  # these change how a face or the clip looks, not who is there
TOGETHER = ("swap", "duplicate", "blend")  # these need two people
NUISANCES: dict[str, Callable[..., Float[np.ndarray, "F H W 3"]]] = {
    "light": light,
    "codec": codec,
    "crop": crop,
    "pose": pose,
}
