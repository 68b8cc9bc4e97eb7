"""Follow every person of a prompt through a video: similarity, state and track, frame by frame.

The faces of the judge's detector are embedded by both networks of a face folder, the embedder and
the judge. The embedder matches people to faces in every frame and follows the faces
(`rewards.tracks`); the judge matches on its own, as for its metrics. A person is in one of three
states in a frame:

    missing    no face reaches the smallest cosine of a match
    ambiguous  the match is doubtful: another face of the frame, or another person of the prompt,
               comes within `MARGIN` of its cosine, or the face is on the track of another person
    matched    otherwise
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from jax_idgrpo.evaluation.streaming import Seen
from jax_idgrpo.rewards.base import ReferenceFaces
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.faces import align, normalise
from jax_idgrpo.rewards.identity import IdentityConfig, match_videos
from jax_idgrpo.rewards.matching import cosines
from jax_idgrpo.rewards.tracks import tracks

MARGIN = 0.1  # difference of cosines below which a match is doubtful
FACES = 32  # faces that the embedder gets at once
FRAMES = 64  # a video is matched in a multiple of so many frames
STATES = ("missing", "ambiguous", "matched")


@flax.struct.dataclass
class Sightings:
    """The faces of a video of T frames, and the M people of its prompt.

    Attributes:
      boxes: x0 y0 x1 y1 in pixels.
      mask: False where a frame has fewer than K faces.
      cosine: cosine of every person and face by the embedder.
      face: index of the face that the embedder matches to a person, K for none.
      track: track of every face, 2 K for no face.
      of_person: track of every person, 2 K for none.
      judge_cosine: cosine of every person and face by the judge.
      judge_face: index of the face that the judge matches to a person, K for none.
    """

    boxes: Float[np.ndarray, "T K 4"]
    mask: Bool[np.ndarray, "T K"]
    cosine: Float[np.ndarray, "T M K"]
    face: Int[np.ndarray, "T M"]
    track: Int[np.ndarray, "T K"]
    of_person: Int[np.ndarray, " M"]
    judge_cosine: Float[np.ndarray, "T M K"]
    judge_face: Int[np.ndarray, "T M"]


@functools.partial(jax.jit, static_argnums=0)
def _embed(
    graph: nnx.GraphDef,
    state: nnx.State,
    frames: UInt8[Array, "t H W 3"],
    numbers: Int[Array, " n"],
    landmarks: Float[Array, "n 5 2"],
) -> Float[Array, "n E"]:
    """Embed faces by the embedder of a face reward, each from the frame of its number."""
    stack = nnx.merge(graph, state)[0]
    size = stack.embedder.config.input_size

    def crop(face: tuple[Int[Array, ""], Float[Array, "5 2"]]) -> Float[Array, "s s 3"]:
        frame = jax.lax.dynamic_index_in_dim(frames, face[0], keepdims=False)
        picture = frame.astype(jnp.float32) / 127.5 - 1
        return align(picture[None], face[1][None, None], stack.template, size)[0, 0]

    return normalise(stack.embedder(jax.lax.map(crop, (numbers, landmarks))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _follow(
    config: IdentityConfig,
    judge_missing: float,
    seen: tuple[Array, Array, Array, Array],
    people: ReferenceFaces,
    judged: ReferenceFaces,
) -> tuple[Array, ...]:
    boxes, mask, embeddings, judge_embeddings = seen
    named = people.embeddings, people.mask
    own = match_videos(embeddings, mask, *named, config.null_similarity)
    others = match_videos(judge_embeddings, mask, judged.embeddings, judged.mask, judge_missing)
    followed = tracks(boxes, embeddings, mask, *named, config.null_similarity, config.tracks)
    return (
        cosines(embeddings, people.embeddings),
        own.face,
        followed.track,
        followed.of_reference,
        cosines(judge_embeddings, judged.embeddings),
        others.face,
    )


class Follower:
    """Collect the faces of a video block by block, and follow the people of its prompt."""

    def __init__(
        self,
        embedder: FaceReward,
        judge: IdentityConfig,
        people: ReferenceFaces,
        judged: ReferenceFaces,
    ):
        """Start a video.

        Args:
          embedder: the face reward with the embedder; its detector is not used.
          judge: constants of the judge.
          people: the people of the prompt, encoded by the embedder.
          judged: the same people, encoded by the judge.
        """
        self._embedder, self._judge = embedder, judge
        self._people, self._judged = people, judged
        self._seen: list[tuple[np.ndarray, ...]] = []
        self._room = 0

    def show(self, frames: UInt8[np.ndarray, "t H W 3"], seen: Seen) -> None:
        """Process the next frames and what the judge found in them; the first block is largest."""
        mask = np.asarray(seen.mask[0])
        self._room = max(self._room, len(frames))
        # Blocks and faces are padded, so that only one program is compiled.
        filled = jnp.asarray(frames[np.minimum(np.arange(self._room), len(frames) - 1)])
        numbers, slots = np.nonzero(mask)
        landmarks = np.asarray(seen.landmarks[0])[numbers, slots]
        width = self._people.embeddings.shape[-1]
        embeddings = np.zeros((*mask.shape, width), np.float32)
        for first in range(0, len(numbers), FACES):
            part = np.arange(first, first + FACES).clip(max=len(numbers) - 1)
            given = filled, jnp.asarray(numbers[part]), jnp.asarray(landmarks[part])
            found = np.asarray(_embed(self._embedder.graph, self._embedder.state, *given))
            embeddings[numbers[part], slots[part]] = found
        self._seen.append((np.asarray(seen.boxes[0]), mask, embeddings, seen.embeddings[0]))

    def sightings(self) -> Sightings:
        """Match and follow the people in all frames that were shown."""
        boxes, mask, *embeddings = (np.concatenate(leaf) for leaf in zip(*self._seen, strict=True))
        total = len(mask)
        # Empty frames change nothing, and videos of many lengths share few programs.
        empty = -total % FRAMES
        seen = tuple(
            jnp.asarray(np.pad(leaf, [(0, empty), *[(0, 0)] * (leaf.ndim - 1)]))[None]
            for leaf in (boxes, mask, *embeddings)
        )
        config, missing = self._embedder.config, self._judge.null_similarity
        found = jax.device_get(_follow(config, missing, seen, self._people, self._judged))
        count = int(np.sum(self._people.mask[0]))
        cosine, face, track, of_person, judge_cosine, judge_face = (leaf[0] for leaf in found)
        return Sightings(
            boxes=boxes,
            mask=mask,
            cosine=cosine[:total, :count],
            face=face[:total, :count],
            track=track[:total],
            of_person=of_person[:count],
            judge_cosine=judge_cosine[:total, :count],
            judge_face=judge_face[:total, :count],
        )


def _taken(values: np.ndarray, face: Int[np.ndarray, "T M"], empty: float | int) -> np.ndarray:
    """Select the value of each person's face along the last axis; `empty` without a face."""
    room = np.full((*values.shape[:-1], 1), empty, values.dtype)
    padded = np.concatenate([values, room], axis=-1)
    if values.ndim == 2:
        return np.take_along_axis(padded, face, axis=-1)
    return np.take_along_axis(padded, face[..., None], axis=-1)[..., 0]


def similarities(found: Sightings, judge: bool = False) -> Float[np.ndarray, "T M"]:
    """Return the cosine of each person's face by the embedder or the judge; NaN if missing."""
    if judge:
        return _taken(found.judge_cosine, found.judge_face, np.nan)
    return _taken(found.cosine, found.face, np.nan)


def tracks_of_faces(found: Sightings) -> Int[np.ndarray, "T M"]:
    """Return the number of the track of each person's face, from 1 by appearance; 0 if missing."""
    return _taken(_numbered(found)[found.track], found.face, 0)


def _numbered(found: Sightings) -> Int[np.ndarray, " N"]:
    """Number the tracks from 1 in the order in which they appear; 0 for no face."""
    numbers = np.zeros(2 * found.mask.shape[1] + 1, int)
    appeared = dict.fromkeys(found.track[found.mask].tolist())
    for number, track in enumerate(appeared, 1):
        numbers[track] = number
    return numbers


def states(found: Sightings) -> Int[np.ndarray, "T M"]:
    """Return the state of every person in every frame, as an index of `STATES`."""
    frames, people, faces = found.cosine.shape
    out = np.zeros((frames, people), int)
    for t, m in zip(*np.nonzero(found.face < faces), strict=True):
        face = found.face[t, m]
        own = found.cosine[t, m, face]
        rivals = np.where(found.mask[t] & (np.arange(faces) != face), found.cosine[t, m], -1.0)
        others = np.delete(found.cosine[t, :, face], m)
        foreign = found.track[t, face] in np.delete(found.of_person, m)
        nearest = max(rivals.max(initial=-1.0), others.max(initial=-1.0))
        out[t, m] = 1 if foreign or own - nearest < MARGIN else 2
    return out


def runs(values: np.ndarray) -> list[tuple[int, int, int]]:
    """Return runs of equal integers as value, first and last index."""
    edges = np.flatnonzero(np.diff(values)) + 1
    starts, stops = [0, *edges.tolist()], [*edges.tolist(), len(values)]
    return [
        (int(values[start]), start, stop - 1)
        for start, stop in zip(starts, stops, strict=True)
        if stop > start
    ]


def _spread(values: Float[np.ndarray, " T"], prefix: str) -> dict[str, float | None]:
    """Return mean, with missing frames as 0, and minimum and maximum of the other frames."""
    shown = values[~np.isnan(values)]
    return {
        f"{prefix}_mean": float(np.nan_to_num(values).mean()),
        f"{prefix}_min": float(shown.min()) if len(shown) else None,
        f"{prefix}_max": float(shown.max()) if len(shown) else None,
    }


def people_rows(found: Sightings) -> list[dict[str, Any]]:
    """Summarise every person of a video.

    found, ambiguous: share of frames in which the person is found, or the match is doubtful.
    similarity_mean: cosine of photo and face by the embedder, mean over frames, missing = 0.
    similarity_min, similarity_max: over the frames in which the person is found; None without.
    judge_mean, judge_min, judge_max: the same by the judge, which matches on its own.
    track: number of the person's track, None without; tracks count from 1 by appearance.
    track_share: share of frames in which the person's face is on this track.
    track_changes: changes of track between frames in which the person is found.
    frames_found: ranges of frames in which the person is found, such as "0-40;44-80".

    """
    own, judged, state = similarities(found), similarities(found, judge=True), states(found)
    followed, numbers = tracks_of_faces(found), _numbered(found)
    rows = []
    for m in range(own.shape[1]):
        track = int(numbers[found.of_person[m]])
        shown = followed[:, m][followed[:, m] > 0]
        ranges = [
            f"{first}-{last}" if last > first else f"{first}"
            for value, first, last in runs((state[:, m] > 0).astype(int))
            if value
        ]
        rows.append(
            {
                "found": float((state[:, m] > 0).mean()),
                "ambiguous": float((state[:, m] == 1).mean()),
                **_spread(own[:, m], "similarity"),
                **_spread(judged[:, m], "judge"),
                "track": track or None,
                "track_share": float((followed[:, m] == track).mean()) if track else 0.0,
                "track_changes": int((np.diff(shown) != 0).sum()),
                "frames_found": ";".join(ranges),
            }
        )
    return rows
