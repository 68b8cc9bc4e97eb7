"""Score video files of any length, with only one block of frames in memory.

The judge processes every frame, block by block. It keeps the faces of a frame and a few pixel
statistics (`identity.Pixels`), and computes the terms of the video from these at the end. The
training reward gets only the frames that it reads (`frames_read`). A reward that does not define
these frames gets the whole video in memory.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import Clip, from_uint8
from jax_idgrpo.evaluation.scoring import values
from jax_idgrpo.rewards.base import ReferenceFaces, References, Reward, Terms, check_references
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.factory import make_judge, make_reward
from jax_idgrpo.rewards.host import Pending, collect
from jax_idgrpo.rewards.identity import (
    IdentityConfig,
    Pixels,
    match_videos,
    read_pixels,
    terms_of_faces,
)

BLOCK = 32  # maximum number of frames of a block
BLOCK_PIXELS = 2**23  # maximum number of pixels of a block; 100 MB as float32

FileScorer = Callable[[Clip, Prompt], dict[str, float]]


@flax.struct.dataclass
class Seen:
    """Faces and pixel statistics of the frames of a block."""

    boxes: Float[Array, "B T K 4"]
    embeddings: Float[Array, "B T K E"]
    mask: Bool[Array, "B T K"]
    pixels: Pixels


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(
    graph: nnx.GraphDef,
    config: IdentityConfig,
    state: nnx.State,
    frames: UInt8[Array, "t H W 3"],
    people: ReferenceFaces,
) -> Seen:
    """Detect the faces of frames of one video, and compute their pixel statistics."""
    videos = (frames.astype(jnp.float32) / 127.5 - 1)[None]
    faces = nnx.merge(graph, state)[0](videos)
    references = people.embeddings, people.mask
    matches = match_videos(faces.embeddings, faces.mask, *references, config.null_similarity)
    found = faces.boxes, faces.landmarks, faces.mask
    pixels = read_pixels(videos, *found, matches, people.crops, config.copies)
    return Seen(faces.boxes, faces.embeddings, faces.mask, pixels)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _conclude(
    config: IdentityConfig, size: tuple[int, int], seen: Seen, people: ReferenceFaces
) -> dict[str, Float[Array, " B"]]:
    """Compute the terms of a video from the faces and pixel statistics of all its frames."""
    faces = seen.embeddings, seen.mask, people.embeddings, people.mask
    matches = match_videos(*faces, config.null_similarity)
    return terms_of_faces(seen.pixels, matches, seen.boxes, *faces, size, config)


class Stream:
    """Score one video block by block by a face reward without a learned head."""

    def __init__(self, reward: FaceReward, people: ReferenceFaces, block: int, total: int):
        """Start a video.

        Args:
          reward: the face reward. It processes all frames, regardless of its own frame count.
          people: encoded references of one prompt.
          block: maximum number of frames per call of `show`.
          total: number of frames of the video.
        """
        self._reward, self._people = reward, people
        self._room = block + (total > block)  # one more frame: the last of the previous block
        self._seen: list[Seen] = []
        self._last: list[UInt8[np.ndarray, "1 H W 3"]] = []

    def show(self, frames: UInt8[np.ndarray, "t H W 3"]) -> None:
        """Process the next frames, at most one block."""
        again = len(self._last)
        shown = np.concatenate([*self._last, frames])
        # Blocks are padded, so that only one program is compiled.
        filled = shown[np.minimum(np.arange(self._room), len(shown) - 1)]
        given = self._reward.state, filled, self._people
        seen = jax.device_get(_look(self._reward.graph, self._reward.config, *given))
        self._seen.append(jax.tree.map(lambda leaf: leaf[:, again : len(shown)], seen))
        self._last = [frames[-1:]]

    def terms(self) -> dict[str, float]:
        """Compute the terms of all processed frames."""
        seen = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *self._seen)
        height, width = self._last[0].shape[1:3]
        return first_row(_conclude(self._reward.config, (height, width), seen, self._people))


def first_row(terms: Terms | Pending) -> dict[str, float]:
    """Return the terms of the first video of a batch."""
    return {name: float(value[0]) for name, value in collect(terms).items()}


class ClipScorer:
    """Score video files by the reward and the judge of a configuration."""

    def __init__(self, config: Config, prompts: Sequence[Prompt]):
        """Load the networks, and check the photos of the prompts.

        Raises:
          UserError: a network or a photo cannot be used.
        """
        self.reward, self.judge = make_reward(config), make_judge(config)
        check_references(self.reward, prompts, self.judge)
        self.people = config.data.max_people

    def __call__(self, clip: Clip, prompt: Prompt) -> dict[str, float]:
        """Score one video (see `scoring.values`).

        Raises:
          UserError: the video or a photo cannot be used.
        """
        total = len(clip.numbers)
        block = max(1, min(BLOCK, BLOCK_PIXELS // (clip.height * clip.width), total))
        rewarded = self._encoded(self.reward, clip, prompt)
        stream = None
        if self.judge is not None:
            stream = Stream(self.judge, self._encoded(self.judge, clip, prompt), block, total)
        chosen = self.reward.frames_read(total)
        wanted = set(range(total) if chosen is None else chosen.tolist())
        changes = Changes()
        held: list[np.ndarray] = []
        for number, frames in enumerate(clip.blocks(block)):
            held += [frame for n, frame in enumerate(frames, number * block) if n in wanted]
            if stream is not None:
                stream.show(frames)
            else:
                changes.show(frames)
        found = first_row(
            self.reward.score(jnp.asarray(from_uint8(np.stack(held))[None]), rewarded)
        )
        if self.reward.motion_of_all_frames:
            found["motion"] = changes.mean()
        return values(self.reward, found, None if stream is None else stream.terms())

    def _encoded(self, reward: Reward, clip: Clip, prompt: Prompt) -> Any:
        references = References.of_prompts([prompt], self.people)
        size = len(clip.numbers), clip.height, clip.width
        return jax.tree.map(jnp.asarray, reward.encode_references(references, [prompt.text], size))


class Changes:
    """Mean absolute difference of neighbouring frames of a video, computed block by block.

    Pixel values are in [-1, 1].
    """

    def __init__(self) -> None:
        self._last: list[np.ndarray] = []
        self._sum, self._count = 0.0, 0

    def show(self, frames: UInt8[np.ndarray, "t H W 3"]) -> None:
        """Process the next frames."""
        for frame in frames:
            for last in self._last:
                self._sum += float(np.abs(frame.astype(np.float32) - last).mean()) / 127.5
                self._count += 1
            self._last = [frame]

    def mean(self) -> float:
        """Return the mean over the processed frames, or 0 if there is only one."""
        return self._sum / max(self._count, 1)


def make_clip_scorer(config: Config, prompts: Sequence[Prompt] = ()) -> FileScorer:
    """Make the scorer of a configuration. Arguments and errors are those of `ClipScorer`."""
    return ClipScorer(config, prompts)
