"""Sources of clip pairs: two clips of one prompt, with the location of every person's face.

    from_synthetic  people and scenes of `synthetic.scenes`, with exact annotations
    from_videos     videos and photos of `video_clips`, annotated by the face reward's detector,
                    embedder and tracks

The two clips of a pair differ as two videos that a model generates for one prompt: the people, the
actions and the place are the same; motion, poses, sizes and light are not.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float
from PIL import Image

from jax_idgrpo import rng
from jax_idgrpo.config import RewardConfig
from jax_idgrpo.data.prompts import load_reference
from jax_idgrpo.data.video import read_frames, to_uint8
from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import progress
from jax_idgrpo.preferences import video_clips
from jax_idgrpo.preferences.corruptions import AnnotatedClip, pasted
from jax_idgrpo.preferences.video_clips import Clip
from jax_idgrpo.rewards.faces import FaceStack, load_settings, load_stack
from jax_idgrpo.rewards.tracks import TrackConfig, tracks
from jax_idgrpo.sampling import conditioning
from jax_idgrpo.synthetic import captions, scenes
from jax_idgrpo.synthetic.people import FRAMES_PER_SECOND, Identity, with_body_of

BATCH = 32
SEEN = 0.8  # smallest visible share of every face in an uncorrupted clip


@dataclasses.dataclass(frozen=True)
class ClipPair:
    """Two clips of one prompt, and the photos of its people at their stored size."""

    clips: tuple[AnnotatedClip, AnnotatedClip]
    prompt: str
    photos: tuple[Image.Image, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Length and size of clips: frames, (height, width) in pixels, frames per second."""

    frames: int = 9
    size: tuple[int, int] = (64, 64)
    fps: int = FRAMES_PER_SECOND

    def __post_init__(self) -> None:
        if self.frames < 1 or self.fps < 1:
            raise UserError(f"--frames {self.frames} --fps {self.fps}: use 1 or more")
        if any(side < 32 or side % 8 for side in self.size):
            raise UserError(
                f"--size {self.size[0]} {self.size[1]}: "
                "use height and width of 32 or more that are multiples of 8"
            )


# ---- synthetic people ----------------------------------------------------------------------------


def from_synthetic(seed: int, split: str, shape: Shape = Shape()) -> Iterator[ClipPair]:
    """Yield clip pairs of synthetic people without end.

    Every face is visible in every frame, and the detector finds it in the person's photo. The
    distractor of a clip is the first person of the previous clip in the batch. Swapped faces are
    rendered, not pasted: another head and hair in the same pose and light, above the same clothes.

    Args:
      seed: seed of people and scenes.
      split: "train", "rl" or "eval".
      shape: length and size of the clips.
    """
    stack = load_stack(RewardConfig().folder(), "embedder")
    best = jax.jit(lambda photos: stack.best(photos))
    step = 0
    while True:
        both = [
            jax.device_get(
                scenes.batch(seed, step, BATCH, split, shape.frames, shape.size, variant)
            )
            for variant in (0, 1)
        ]
        first = both[0]
        flat = first.portraits.reshape(-1, *first.portraits.shape[2:])
        found = np.asarray(best(flat)[1]).reshape(first.mask.shape)
        seen = np.all([(batch.visible > SEEN).all(1) for batch in both], 0)
        for n in np.flatnonzero((seen & found | ~first.mask).all(1)).tolist():
            one, other = (_synthetic_clip(batch, n) for batch in both)
            scene, people = jax.tree.map(lambda leaf: leaf[n], (first.scene, first.people))
            photos = tuple(Image.fromarray(to_uint8(one.photos[m])) for m in one.people)
            yield ClipPair((one, other), captions.prompt(scene, people, first.mask[n]), photos)
        step += 1


def _synthetic_clip(batch: scenes.Batch, n: int) -> AnnotatedClip:
    """Return the n-th clip of a batch."""
    video, mask = batch.video[n], batch.mask[n]
    people, scene = jax.tree.map(lambda leaf: leaf[n], (batch.people, batch.scene))
    known = jax.tree.map(
        lambda own, others: np.concatenate([own, others[(n - 1) % BATCH, :1]]), people, batch.people
    )

    def swap_faces(faces: Mapping[int, int]) -> Float[np.ndarray, "F H W 3"]:
        # DISTRACTOR (-1) indexes the last of the known people.
        whose = np.asarray([faces.get(m, m) for m in range(len(mask))])
        heads = jax.tree.map(lambda leaf: leaf[whose], known)
        return np.asarray(
            _render(with_body_of(heads, people), mask, scene, len(video), video.shape[1:3])
        )

    return AnnotatedClip(
        video, batch.boxes[n], mask, batch.portraits[n], batch.portrait_boxes[n], swap_faces
    )


@functools.partial(jax.jit, static_argnums=(3, 4))
def _render(
    people: Identity,
    mask: Bool[Array, " M"],
    scene: scenes.Scene,
    frames: int,
    size: tuple[int, int],
) -> Float[Array, "F H W 3"]:
    return scenes.render_clip(people, mask, scene, frames, size).video


# ---- videos of a folder --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Located:
    """A clip in which every person is found in every frame.

    boxes: faces in the video. photo_boxes: faces in the photos at the size of the video.
    """

    clip: Clip
    boxes: Float[np.ndarray, "F M 4"]
    photo_boxes: Float[np.ndarray, "M 4"]


def locate(stack: FaceStack, missing: float) -> Callable[..., tuple[Array, Array, Array]]:
    """Compile a program that locates the people of photos in a video.

    The program maps a video [F,H,W,3], photos [M,H,W,3] and the mask of real photos [M] to face
    boxes in the video [F,M,4], face boxes in the photos [M,4], and a mask [M] of the people who are
    found in their photo and in every frame. A person's faces form the track that is most similar to
    their photo over the whole video (`rewards.tracks`).

    Args:
      stack: face detector and embedder.
      missing: cosine below which a face matches nobody.
    """
    graph, state = nnx.split(stack)

    @jax.jit
    def program(
        state: nnx.State,
        video: Float[Array, "F H W 3"],
        photos: Float[Array, "M H W 3"],
        present: Bool[Array, " M"],
    ) -> tuple[Float[Array, "F M 4"], Float[Array, "M 4"], Bool[Array, " M"]]:
        stack = nnx.merge(graph, state)
        of_photos = jax.tree.map(lambda leaf: leaf[0, :, 0], stack(photos[None]))
        faces = stack(video[None])
        sought = present & of_photos.mask
        followed = tracks(
            faces.boxes,
            faces.embeddings,
            faces.mask,
            of_photos.embeddings[None],
            sought[None],
            missing,
            TrackConfig(),
        )
        theirs = (followed.track[0][:, None] == followed.of_reference[0][:, None]) & faces.mask[0][
            :, None
        ]  # [F,M,K]
        boxes = jnp.einsum(
            "tmk,tkc->tmc", theirs.astype(jnp.float32), faces.boxes[0], precision="highest"
        )
        return boxes, of_photos.boxes, sought & jnp.all(jnp.any(theirs, -1), 0)

    return lambda *given: program(state, *given)


def _canvases(
    clip: Clip, shape: Shape
) -> tuple[Float[np.ndarray, "M H W 3"], Bool[np.ndarray, " M"]]:
    """Return the photos at the video's size, padded with white, and the mask of real photos."""
    photos = np.ones((video_clips.MOST, *shape.size, 3), np.float32)
    for m, path in enumerate(clip.references):
        photos[m] = conditioning.canvas(load_reference(path), *shape.size)
    return photos, np.arange(video_clips.MOST) < len(clip.references)


def located(folder: Path, split: str, shape: Shape, faces: Path) -> list[Located]:
    """Locate the people of a split's clips.

    Prints how many clips are left out because they are too short or do not show every person in
    every frame.

    Args:
      folder: folder with clips.csv.
      split: "train", "rl" or "eval".
      shape: length and size of the clips.
      faces: folder of face networks.

    Raises:
      UserError: as `video_clips.load_clips`, a video cannot be read, or no clip is left.
    """
    program = locate(load_stack(faces, "embedder"), load_settings(faces, "embedder").missing)
    listed, found, short = video_clips.load_clips(folder, split), [], 0
    with progress("finding faces", len(listed)) as update:
        for done, clip in enumerate(listed, 1):
            video = read_frames(clip.video, shape.frames, shape.size, shape.fps)
            if len(video) < shape.frames:
                short += 1
            else:
                photos, present = _canvases(clip, shape)
                boxes, photo_boxes, seen = jax.device_get(program(video, photos, present))
                if (seen | ~present).all():
                    found.append(Located(clip, boxes, photo_boxes))
            update(done)
    lost = len(listed) - short - len(found)
    left = (
        f"{len(listed)} clips of the split {split}: {short} too short, "
        f"{lost} that do not show every person in every frame"
    )
    print(f"--clips {folder}: left out of {left}")
    if not found:
        raise UserError(
            f"--clips {folder}: left out of {left}; none remains, "
            "so add clips that show every face large and clear"
        )
    return found


def from_videos(
    folder: Path, split: str, shape: Shape, faces: Path, seed: int = 0
) -> Iterator[ClipPair]:
    """Yield pairs of a folder's clips without end, each prompt with its people in turn.

    Two rows with the same prompt and photos form a pair; a clip without such a partner forms a pair
    with itself. The distractor of a clip is the first person of a clip of another identity cluster.

    Args:
      folder: folder with clips.csv.
      split: "train", "rl" or "eval".
      shape: length and size of the clips.
      faces: folder of face networks.
      seed: seed of the selection.

    Raises:
      UserError: as `located`, or all clips belong to one identity cluster.
    """
    found = located(folder, split, shape, faces)
    alike: dict[tuple, list[Located]] = {}
    for this in found:
        alike.setdefault((this.clip.prompt, this.clip.people), []).append(this)
    if len({this.clip.cluster for this in found}) < 2:
        raise UserError(
            f"--clips {folder}: the usable clips of the split {split} all belong to "
            "one identity cluster; add clips of other people"
        )
    groups, root, number = list(alike.values()), rng.key(seed, "data"), 0
    while True:
        u = np.asarray(jax.random.uniform(rng.fold(root, number), (4,)), np.float64)
        group = groups[number % len(groups)]
        first = among(group, u[0])
        second = among([this for this in group if this is not first] or group, u[1])
        others = [this for this in found if this.clip.cluster != first.clip.cluster]
        one, other = (
            _video_clip(clip, among(others, v), shape)
            for clip, v in ((first, u[2]), (second, u[3]))
        )
        yield ClipPair(
            (one, other),
            first.clip.prompt,
            tuple(load_reference(path) for path in first.clip.references),
        )
        number += 1


def _video_clip(one: Located, distractor: Located, shape: Shape) -> AnnotatedClip:
    photos, present = _canvases(one.clip, shape)
    video, other = (
        read_frames(clip.video, shape.frames, shape.size, shape.fps)
        for clip in (one.clip, distractor.clip)
    )
    swap_faces = functools.partial(pasted, video, one.boxes, other, distractor.boxes[:, 0])
    return AnnotatedClip(video, one.boxes, present, photos, one.photo_boxes, swap_faces)


def among(values: list, u: float):
    """Select one of the values by a number in [0, 1)."""
    return values[min(int(u * len(values)), len(values) - 1)]
