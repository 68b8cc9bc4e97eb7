"""Values of a video file of any length: frames are read in blocks, and one block is held at a time.

The judge looks at every frame. It finds the faces of a block and measures its pixels; what is kept
of a frame are its faces and a few numbers (`identity.Pixels`), from which the terms of the whole video
follow. The training reward gets the frames that it looks at, and no others. Only a reward that does
not say which frames it looks at gets the whole video in memory.
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
from jax_idgrpo.evaluation.scoring import check_photos, values
from jax_idgrpo.rewards.base import ReferenceFaces, References, Reward, Terms
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

BLOCK = 32  # frames of a block, at most
BLOCK_PIXELS = 2**23  # of all frames of a block: 100 MB as float32

FileScorer = Callable[[Clip, Prompt], dict[str, float]]


@flax.struct.dataclass
class Seen:
    """What is kept of the frames of a block."""

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
    """Find the faces of some frames of one video, and measure their pixels."""
    videos = (frames.astype(jnp.float32) / 127.5 - 1)[None]
    faces = nnx.merge(graph, state)[0](videos)
    references = people.embeddings, people.mask
    matches = match_videos(faces.embeddings, faces.mask, *references, config.null_similarity)
    found = faces.boxes, faces.landmarks, faces.mask
    pixels = read_pixels(videos, *found, matches, people.crops)
    return Seen(faces.boxes, faces.embeddings, faces.mask, pixels)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _conclude(
    config: IdentityConfig, size: tuple[int, int], seen: Seen, people: ReferenceFaces
) -> dict[str, Float[Array, "B"]]:
    """Compute the terms of a video from what was seen of all its frames."""
    faces = seen.embeddings, seen.mask, people.embeddings, people.mask
    matches = match_videos(*faces, config.null_similarity)
    return terms_of_faces(seen.pixels, matches, seen.boxes, *faces, size, config)


class Stream:
    """A face reward without a head that is shown a video block by block."""

    def __init__(self, reward: FaceReward, people: ReferenceFaces, block: int, total: int):
        """Begin a video.

        Args:
          reward: looks at all frames, whatever its own number of them is.
          people: encoded references of one prompt.
          block: frames that are shown at a time.
          total: frames of the video.
        """
        self._reward, self._people = reward, people
        self._room = block + (total > block)  # a block begins with the last frame of the one before
        self._seen: list[Seen] = []
        self._last: list[UInt8[np.ndarray, "1 H W 3"]] = []

    def show(self, frames: UInt8[np.ndarray, "t H W 3"]) -> None:
        """Look at the next frames, at most as many as a block has."""
        again = len(self._last)
        shown = np.concatenate([*self._last, frames])
        filled = shown[
            np.minimum(np.arange(self._room), len(shown) - 1)
        ]  # one program for all blocks
        given = self._reward.state, filled, self._people
        seen = jax.device_get(_look(self._reward.graph, self._reward.config, *given))
        self._seen.append(jax.tree.map(lambda leaf: leaf[:, again : len(shown)], seen))
        self._last = [frames[-1:]]

    def terms(self) -> dict[str, float]:
        """Compute every term of the frames that were shown."""
        seen = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *self._seen)
        height, width = self._last[0].shape[1:3]
        return first_row(_conclude(self._reward.config, (height, width), seen, self._people))


def first_row(terms: Terms | Pending) -> dict[str, float]:
    """The terms of the first video."""
    return {name: float(value[0]) for name, value in collect(terms).items()}


class ClipScorer:
    """Scores video files by the reward and the judge of a configuration."""

    def __init__(self, config: Config, prompts: Sequence[Prompt]):
        """Load the networks, and look at the photos of the prompts of the videos.

        Raises:
          UserError: a network or a photo cannot be used.
        """
        self.reward, self.judge = make_reward(config), make_judge(config)
        check_photos((self.reward, self.judge), prompts)
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
    """Mean absolute difference of neighbouring frames of a video that is shown block by block.

    In units of [-1, 1].
    """

    def __init__(self) -> None:
        self._last: list[np.ndarray] = []
        self._sum, self._count = 0.0, 0

    def show(self, frames: UInt8[np.ndarray, "t H W 3"]) -> None:
        """Look at the next frames."""
        for frame in frames:
            for last in self._last:
                self._sum += float(np.abs(frame.astype(np.float32) - last).mean()) / 127.5
                self._count += 1
            self._last = [frame]

    def mean(self) -> float:
        """The mean so far; 0 for one frame."""
        return self._sum / max(self._count, 1)


def make_clip_scorer(config: Config, prompts: Sequence[Prompt] = ()) -> FileScorer:
    """Make the scorer of a configuration; arguments and errors are those of `ClipScorer`."""
    return ClipScorer(config, prompts)
