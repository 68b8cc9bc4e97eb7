"""Corruptions of a clip with known faces: distortions, among them reward hacks, and nuisances.

A distortion maps an annotated clip and a strength in [0, 1] to new frames; strength 0 changes
nothing. Frames are numpy float32 in [-1, 1]; face boxes are (left, top, right, bottom) in pixels.
Absent people (`mask` False) are ignored. The clip implements face swaps
(`AnnotatedClip.swap_faces`); `pasted` is the implementation for real videos: ovals with soft edges,
scaled from box to box.

A nuisance maps frames, a strength and a direction of four numbers in [-1, 1] to new frames and
preserves every person's identity. All functions are deterministic: random numbers are arguments.
"""

import math
from collections.abc import Callable, Mapping

import flax.struct
import numpy as np
from jaxtyping import Bool, Float

from jax_idgrpo.data.video import recoded

DISTRACTOR = -1  # index of a person who is not in the clip
EDGE = 0.15  # width of a pasted face's soft edge, as a share of the oval's radius

# Largest changes by nuisances, at strength 1.
GAIN, TINT = 0.25, 0.08  # relative change of the light, and of one colour channel in addition
QUALITY = (14, 26)  # h264 quality factor at strength 0 and 1
MARGIN = 0.06  # share of a side that is cropped
ROLL = math.radians(6)


@flax.struct.dataclass
class AnnotatedClip:
    """A clip with the face boxes and photos of its people, in the same order.

    photo_boxes: faces in the photos. swap_faces: maps {person: other person} to the frames of the
    same clip in which each person has the other's face; `DISTRACTOR` is a person of another clip.
    """

    video: Float[np.ndarray, "F H W 3"]
    boxes: Float[np.ndarray, "F M 4"]
    mask: Bool[np.ndarray, " M"]
    photos: Float[np.ndarray, "M h w 3"]
    photo_boxes: Float[np.ndarray, "M 4"]
    swap_faces: Callable[[Mapping[int, int]], Float[np.ndarray, "F H W 3"]] = flax.struct.field(
        pytree_node=False
    )

    @property
    def people(self) -> list[int]:
        """Indices of the people who are present."""
        return np.flatnonzero(self.mask).tolist()


def grown(box: Float[np.ndarray, "4"], factor: float) -> Float[np.ndarray, "4"]:
    """Scale a box about its centre."""
    half, middle = (box[2:] - box[:2]) / 2 * factor, (box[2:] + box[:2]) / 2
    return np.concatenate([middle - half, middle + half])


def sampled(
    pictures: Float[np.ndarray, "*n H W 3"],
    x: Float[np.ndarray, "h w"],
    y: Float[np.ndarray, "h w"],
) -> Float[np.ndarray, "*n h w 3"]:
    """Sample pictures bilinearly, repeating the edge outside.

    Args:
      pictures: any number of pictures.
      x, y: positions in pixels; the centre of the first pixel is 0.5.
    """
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
    """Return x and y of the pixel centres of a rectangle."""
    x, y = np.meshgrid(np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5)
    return x, y


def _inside(box: Float[np.ndarray, "4"], height: int, width: int) -> tuple[int, int, int, int]:
    """Return the pixels of a picture that a box touches: left, top, right, bottom."""
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
    """Paint a face over another one in place, as an oval with a soft edge.

    Args:
      frame: frame to change.
      box: face in the frame; a box without area changes nothing.
      picture: picture with the new face.
      source: face in the picture.
      strength: opacity in [0, 1].
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
    """Paste other faces over those of a clip: `AnnotatedClip.swap_faces` for real videos.

    Args:
      video: the clip.
      boxes: faces in the clip.
      distractor: for every frame a picture of a person who is not in the clip.
      distractor_boxes: face in each of these pictures.
      faces: {person: other person or `DISTRACTOR`}.
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
    """Blur with a Gaussian of `sigma` pixels, repeating the edge outside."""
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
    """Apply `change(frame, number)` to the last `share` of a copy of the frames."""
    video = np.array(clip.video, np.float32)
    for t in np.flatnonzero(_last(len(video), share)).tolist():
        change(video[t], t)
    return video


def _last(frames: int, share: float) -> Float[np.ndarray, " F"]:
    """Return 1 for the last `share` of the frames, rounded up, and 0 for the others."""
    return (np.arange(frames) >= frames - math.ceil(round(share * frames, 6))).astype(np.float32)


def _with_swapped_faces(
    clip: AnnotatedClip, faces: Mapping[int, int], opacity: Float[np.ndarray, " F"]
) -> Float[np.ndarray, "F H W 3"]:
    """Swap faces with a given opacity for every frame."""
    video = np.array(clip.video, np.float32)
    if faces and opacity.any():
        video += opacity[:, None, None, None] * (clip.swap_faces(faces) - video)
    return video


def _round(clip: AnnotatedClip) -> dict[int, int]:
    """Map each person to the next one, the last to the first; empty for a single person."""
    people = clip.people
    return dict(zip(people, people[1:] + people[:1], strict=True)) if len(people) > 1 else {}


# ---- distortions ---------------------------------------------------------------------------------


def paste(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Paste the face of each person's photo; strength: opacity."""

    def change(frame: np.ndarray, t: int) -> None:
        for i in clip.people:
            put(frame, clip.boxes[t, i], clip.photos[i], clip.photo_boxes[i], strength)

    return _changed(clip, change)


def freeze(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Freeze the end of the clip; strength: share of the frozen frames."""
    last = len(clip.video) - 1
    return np.asarray(clip.video, np.float32)[
        np.minimum(np.arange(last + 1), round((1 - strength) * last))
    ]


def enlarge(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Enlarge the first person's face by the factor 1 + strength about its centre."""

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
    """Give all people the first person's face at the end; strength: share of the clip."""
    return _with_swapped_faces(
        clip,
        dict.fromkeys(clip.people[1:], clip.people[0]),
        _last(len(clip.video), strength),
    )


def drop(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Cover the last person's face with the mean colour at the end; strength: share of the clip."""

    def change(frame: np.ndarray, t: int) -> None:
        plain = np.broadcast_to(clip.video[t].mean((0, 1)), (2, 2, 3))
        for i in clip.people[-1:]:
            put(frame, grown(clip.boxes[t, i], 1.4), plain, np.array([0.0, 0.0, 2.0, 2.0]))

    return _changed(clip, change, strength)


def blend(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Mix each face with the next person's, in equal parts at strength 1."""
    return _with_swapped_faces(
        clip, _round(clip), np.full(len(clip.video), 0.5 * strength, np.float32)
    )


def swap(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Give each person the next person's face at the end.

    Strength 1 affects half of the clip: a swap throughout would only rename the people.
    """
    return _with_swapped_faces(clip, _round(clip), _last(len(clip.video), strength / 2))


def replace(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Replace the last person's face by the distractor's; strength: opacity."""
    return _with_swapped_faces(
        clip,
        dict.fromkeys(clip.people[-1:], DISTRACTOR),
        np.full(len(clip.video), strength, np.float32),
    )


def drift(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Turn the last person gradually into the distractor; strength: opacity in the last frame."""
    return _with_swapped_faces(
        clip,
        dict.fromkeys(clip.people[-1:], DISTRACTOR),
        np.linspace(0, strength, len(clip.video), dtype=np.float32),
    )


def blur(clip: AnnotatedClip, strength: float = 1.0) -> Float[np.ndarray, "F H W 3"]:
    """Blur all faces, at strength 1 by a Gaussian of an eighth of the face's width."""

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


# ---- nuisances -----------------------------------------------------------------------------------


def light(
    video: Float[np.ndarray, "F H W 3"], strength: float, direction: Float[np.ndarray, "4"]
) -> Float[np.ndarray, "F H W 3"]:
    """Change brightness and colour.

    Args:
      video: frames in [-1, 1].
      strength: in [0, 1].
      direction: sign and size of the gain, then of each colour channel in addition.
    """
    gain = 1 + strength * (GAIN * direction[0] + TINT * direction[1:])
    return np.clip((video + 1) * gain.astype(np.float32) - 1, -1, 1)


def codec(
    video: Float[np.ndarray, "F H W 3"], strength: float, direction: Float[np.ndarray, "4"]
) -> Float[np.ndarray, "F H W 3"]:
    """Encode and decode with h264, at a quality that decreases with the strength.

    Args:
      video: frames in [-1, 1].
      strength: in [0, 1].
      direction: unused.
    """
    return recoded(video, QUALITY[0] + round(strength * (QUALITY[1] - QUALITY[0])))


def crop(
    video: Float[np.ndarray, "F H W 3"], strength: float, direction: Float[np.ndarray, "4"]
) -> Float[np.ndarray, "F H W 3"]:
    """Crop a margin and scale the rest to the size of the picture.

    Args:
      video: frames in [-1, 1].
      strength: in [0, 1].
      direction: horizontal and vertical position of the remaining window; -1 is left or top.
    """
    height, width = video.shape[1:3]
    cut = strength * MARGIN
    x, y = _pixels(0, 0, width, height)
    start = (direction[:2] + 1) / 2 * cut * np.array([width, height])
    return sampled(video, x * (1 - cut) + start[0], y * (1 - cut) + start[1]).astype(np.float32)


def pose(
    video: Float[np.ndarray, "F H W 3"], strength: float, direction: Float[np.ndarray, "4"]
) -> Float[np.ndarray, "F H W 3"]:
    """Roll the camera about the centre of the picture.

    Mirroring is no nuisance: faces are asymmetric, so a mirror image shows another identity.

    Args:
      video: frames in [-1, 1].
      strength: in [0, 1].
      direction: the first number is the angle's sign and size; the others are unused.
    """
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
# Reward hacks that a policy might find.
TRICKS = ("paste", "freeze", "enlarge", "duplicate", "drop", "blend", "swap")
# Distortions that change the appearance of a face or a clip, not the identities.
LOOKS = ("blur", "enlarge", "freeze", "paste")
# Distortions that require two people.
TOGETHER = ("swap", "duplicate", "blend")
NUISANCES: dict[str, Callable[..., Float[np.ndarray, "F H W 3"]]] = {
    "light": light,
    "codec": codec,
    "crop": crop,
    "pose": pose,
}
