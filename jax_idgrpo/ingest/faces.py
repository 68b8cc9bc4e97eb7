"""Find the people of a clip, and choose photos of them.

Faces are found in a few frames per second and linked to tracks (`rewards.tracks`). A track that is
in most frames is a person; a clip is left out if it does not show the asked number of people, each
large enough and the same person throughout.
"""

import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from jax_idgrpo.data.video import from_uint8
from jax_idgrpo.ingest.frames import laplacian_variance
from jax_idgrpo.rewards.faces import Faces, load_stack
from jax_idgrpo.rewards.tracks import TrackConfig, link

BLOCK = 8  # frames per call of the networks
SHORT = 720  # pixels of the shorter side that the networks see, at most
STEP = 32  # padded sides are multiples of it
PHOTO = 512  # pixels of a photo's side, at most
REACH = 2.2  # side of a photo as a multiple of the face's
POOL = 5  # photos of a person and clip
PRESENCE = 0.8  # share of frames that show a person
OTHERS = 0.1  # share of frames that may show another face
COHERENT = 0.4  # cosine with the mean of its track that nine in ten faces exceed
PARTS = 0.5  # cosine of two parts of a track that are one person
TWIN = 0.6  # cosine of two tracks above which they are one person


@dataclasses.dataclass(frozen=True)
class FaceLimits:
    """What the people of a clip must be like.

    Attributes:
      people: smallest and largest number of people.
      face: least side of a face in pixels.
      share: least area of a face as a share of the picture.
      turn: least range of a person's yaw in degrees; 0 asks for none.
    """

    people: tuple[int, int] = (1, 4)
    face: float = 48.0
    share: float = 0.005
    turn: float = 0.0


@dataclasses.dataclass(frozen=True)
class Shot:
    """A photo of a person, cut from a frame.

    Attributes:
      png: the file's bytes.
      quality: detector score x sharpness x cosine of the yaw.
      yaw: degrees, positive to the right of the picture.
    """

    png: bytes
    quality: float
    yaw: float


@dataclasses.dataclass(frozen=True)
class Person:
    """A person of a clip.

    Attributes:
      embedding: mean of the track's faces, of unit length.
      shots: photos, best first.
      side: median side of the face in pixels.
      yaws: smallest and largest yaw in degrees.
    """

    embedding: Float[np.ndarray, " E"]
    shots: tuple[Shot, ...]
    side: float
    yaws: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Found:
    """The people of a clip, from left to right, or why it is left out."""

    people: tuple[Person, ...] = ()
    reason: str = ""
    value: float = 0.0


def yaw(landmarks: Float[np.ndarray, "5 2"]) -> float:
    """Estimate the turn of a head in degrees from the nose's place between the eyes."""
    left, right, nose = landmarks[0], landmarks[1], landmarks[2]
    span = float(np.hypot(*(right - left)))
    offset = float((nose - (left + right) / 2) @ (right - left)) / max(span, 1e-6) ** 2
    return math.degrees(math.asin(min(max(offset, -1.0), 1.0)))


class ClipReader:
    """Find the faces of one clip after the other; frames of a clip are added one by one."""

    def __init__(self, networks: Path, most: int):
        """Load the networks.

        Args:
          networks: folder of face networks.
          most: largest number of frames of a clip.

        Raises:
          UserError: a network is missing or damaged.
        """
        graph, self._state = nnx.split(load_stack(networks, "embedder"))
        self._find = jax.jit(lambda state, videos: nnx.merge(graph, state)(videos))
        self._link = jax.jit(
            lambda boxes, embeddings, mask: link(boxes, embeddings, mask, TrackConfig().link)
        )
        self._most = most
        self._frames: list[UInt8[np.ndarray, "H W 3"]] = []
        self._faces: list[Faces] = []
        self._crops: list[list[bytes]] = []
        self._scale = 1.0

    def add(self, frame: UInt8[np.ndarray, "H W 3"]) -> None:
        """Add the next frame of the clip."""
        self._frames.append(frame)
        if len(self._frames) == BLOCK:
            self._look()

    def _look(self) -> None:
        """Find the faces of the frames that are held, and cut out their photos."""
        height, width = self._frames[0].shape[:2]
        self._scale = min(SHORT / min(height, width), 1.0)
        size = round(width * self._scale), round(height * self._scale)
        padded = [STEP * math.ceil(side / STEP) for side in (size[1], size[0])]
        videos = np.zeros((1, BLOCK, *padded, 3), np.float32)
        for number, frame in enumerate(self._frames):
            picture = Image.fromarray(frame)
            reduced = picture if size == picture.size else picture.resize(size)
            videos[0, number, : size[1], : size[0]] = from_uint8(np.asarray(reduced))
        found = jax.device_get(self._find(self._state, jnp.asarray(videos)))
        found = dataclasses.replace(
            found, boxes=found.boxes / self._scale, landmarks=found.landmarks / self._scale
        )
        for number, frame in enumerate(self._frames):
            shown = np.flatnonzero(found.mask[0, number])
            pictures = [b""] * found.mask.shape[-1]
            for face in shown:
                pictures[face] = cut_photo(frame, found.boxes[0, number, face])
            self._crops.append(pictures)
        self._faces.append(jax.tree.map(lambda leaf: leaf[0, : len(self._frames)], found))
        self._frames = []

    def finish(self, limits: FaceLimits, size: tuple[int, int]) -> Found:
        """Return the people of the clip, and begin the next clip.

        Args:
          limits: what they must be like.
          size: height and width of the frames in pixels.
        """
        if self._frames:
            self._look()
        faces = jax.tree.map(lambda *leaves: np.concatenate(leaves), *self._faces)
        crops, self._faces, self._crops = self._crops, [], []
        return people(faces, self._tracks(faces), crops, limits, size)

    def _tracks(self, faces: Faces) -> np.ndarray:
        """Return the track of every face [T, K]; padded to one length, for one program."""
        missing = self._most - len(faces.mask)

        def filled(leaf: np.ndarray) -> Array:
            return jnp.asarray(np.pad(leaf, ((0, missing), *((0, 0),) * (leaf.ndim - 1)))[None])

        given = filled(faces.boxes), filled(faces.embeddings), filled(faces.mask)
        return np.asarray(self._link(*given))[0, : len(faces.mask)]


def cut_photo(frame: UInt8[np.ndarray, "H W 3"], box: Float[np.ndarray, "4"]) -> bytes:
    """Cut a square around a face, with the face in its middle; returns a PNG.

    At the edge of the frame the square is moved inwards, and made smaller where it does not fit.
    """
    height, width = frame.shape[:2]
    side = min(REACH * float(max(box[2] - box[0], box[3] - box[1])), height, width)
    half = max(1, int(side / 2))
    x = int(np.clip((box[0] + box[2]) / 2, half, max(width - half, half)))
    y = int(np.clip((box[1] + box[3]) / 2, half, max(height - half, half)))
    picture = Image.fromarray(frame[y - half : y + half, x - half : x + half])
    if picture.width > PHOTO:
        picture = picture.resize((PHOTO, PHOTO), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def people(
    faces: Faces,
    tracks: np.ndarray,
    crops: Sequence[Sequence[bytes]],
    limits: FaceLimits,
    size: tuple[int, int],
) -> Found:
    """Decide which tracks are people, and whether the clip can be used.

    Args:
      faces: faces of T frames, without a batch axis.
      tracks: track of every face [T, K].
      crops: a photo of every face.
      limits: what the people must be like.
      size: height and width of the frames in pixels.
    """
    frames = len(faces.mask)
    members = joined_tracks(faces, tracks)
    shown = [places for places in members if len(places) >= PRESENCE * frames]
    known = {place for places in shown for place in places}
    others = np.mean(
        [any((t, k) not in known for k in np.flatnonzero(faces.mask[t])) for t in range(frames)]
    )
    if not shown:
        return Found(reason="nobody")
    shown.sort(key=lambda places: np.mean([faces.boxes[p][[0, 2]].sum() for p in places]))
    found = [_person(faces, places, crops) for places in shown]
    embeddings = [np.stack([faces.embeddings[place] for place in places]) for places in shown]
    alike = [person.embedding @ other.embedding for person, other in _pairs(found)]
    coherent = min(
        float(np.percentile(e @ person.embedding, 10))
        for e, person in zip(embeddings, found, strict=True)
    )
    halves = min(map(least_split, embeddings))
    side = min(person.side for person in found)
    share = min(
        float(np.median([_area(faces.boxes[place]) for place in places])) for places in shown
    ) / (size[0] * size[1])
    turned = min(person.yaws[1] - person.yaws[0] for person in found)
    faults = (
        ("other faces", float(others), others > OTHERS),
        ("people", float(len(found)), not limits.people[0] <= len(found) <= limits.people[1]),
        ("small faces", side, side < limits.face),
        ("small faces", share, share < limits.share),
        ("exchanged", coherent, coherent < COHERENT),
        ("exchanged", halves, halves < PARTS),
        ("the same person twice", max(alike, default=-1.0), max(alike, default=-1.0) > TWIN),
        ("little turn", turned, turned < limits.turn),
    )
    for reason, value, applies in faults:
        if applies:
            return Found(reason=reason, value=float(value))
    return Found(tuple(found))


Places = list[tuple[int, int]]
"""Frame and slot of the faces of a track, in order."""


def joined_tracks(faces: Faces, tracks: Int[np.ndarray, "T K"]) -> list[Places]:
    """Return the faces of every track; parts of a track that was interrupted are joined.

    Two tracks are parts of one if no frame shows both and their mean faces are alike.

    Args:
      faces: faces of T frames, without a batch axis.
      tracks: track of every face.
    """
    of: dict[int, Places] = {}
    for t, k in zip(*np.nonzero(faces.mask), strict=True):
        of.setdefault(int(tracks[t, k]), []).append((int(t), int(k)))
    found: list[Places] = []
    for places in sorted(of.values(), key=lambda places: -len(places)):
        mean = _unit(np.sum([faces.embeddings[place] for place in places], axis=0))
        for other in found:
            apart = {t for t, _ in places}.isdisjoint(t for t, _ in other)
            theirs = _unit(np.sum([faces.embeddings[place] for place in other], axis=0))
            if apart and mean @ theirs >= PARTS:
                other += places
                other.sort()
                break
        else:
            found.append(list(places))
    return found


def least_split(embeddings: Float[np.ndarray, "N E"]) -> float:
    """Return the least cosine of the means before and after any frame, two frames at least each.

    A person who is exchanged for another has a low value, wherever it happens. One blurred or
    turned face does not.
    """
    sums = np.cumsum(embeddings, axis=0)
    found = [
        float(_unit(sums[end - 1]) @ _unit(sums[-1] - sums[end - 1]))
        for end in range(2, len(embeddings) - 1)
    ]
    return min(found, default=1.0)


def _unit(vector: Float[np.ndarray, " E"]) -> Float[np.ndarray, " E"]:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _pairs(found: Sequence[Person]) -> list[tuple[Person, Person]]:
    return [(a, b) for number, a in enumerate(found) for b in found[number + 1 :]]


def _area(box: Float[np.ndarray, "4"]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _person(
    faces: Faces, places: Sequence[tuple[int, int]], crops: Sequence[Sequence[bytes]]
) -> Person:
    """Summarise a track.

    Args:
      faces: faces of a clip.
      places: frame and slot of every face of the track.
      crops: a photo of every face.
    """
    embedding = _unit(np.sum([faces.embeddings[place] for place in places], axis=0))
    yaws = [yaw(faces.landmarks[place]) for place in places]
    shots = []
    for place, angle in zip(places, yaws, strict=True):
        png = crops[place[0]][place[1]]
        sharp = laplacian_variance(Image.open(io.BytesIO(png)))
        quality = float(faces.scores[place]) * sharp * math.cos(math.radians(angle))
        shots.append(Shot(png, quality, angle))
    sides = [min(b[2] - b[0], b[3] - b[1]) for b in (faces.boxes[place] for place in places)]
    return Person(embedding, choose_shots(shots), float(np.median(sides)), (min(yaws), max(yaws)))


def choose_shots(shots: Sequence[Shot], count: int = POOL) -> tuple[Shot, ...]:
    """Choose the best photo, then photos that are good and differ in yaw from those chosen."""
    left = sorted(shots, key=lambda shot: -shot.quality)
    chosen = left[:1]
    while len(chosen) < min(count, len(shots)):
        rest = [shot for shot in left if all(shot is not other for other in chosen)]
        best = chosen[0].quality or 1.0
        chosen.append(
            max(
                rest,
                key=lambda shot: (
                    (shot.quality / best)
                    * (1 + min(abs(shot.yaw - other.yaw) for other in chosen) / 10)
                ),
            )
        )
    return tuple(chosen)
