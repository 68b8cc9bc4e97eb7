"""Score video files of any length, with only one block of frames in memory.

The judge processes every frame, block by block. It keeps the faces of a frame and a few pixel
statistics (`identity.Pixels`), and computes the terms of the video from these at the end. The
training reward gets only the frames that it reads (`frames_read`). A reward that does not define
these frames gets the whole video in memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PyTree, UInt8

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import Clip, from_uint8
from jax_idgrpo.evaluation.recognition import Gallery, summarised
from jax_idgrpo.evaluation.scoring import FURTHER, values
from jax_idgrpo.rewards.base import ReferenceFaces, References, Reward, Terms, check_references
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.factory import make_assigner, make_judge, make_reward
from jax_idgrpo.rewards.host import Pending, collect
from jax_idgrpo.rewards.identity import (
    IdentityConfig,
    Pixels,
    match_videos,
    read_pixels,
    terms_of_faces,
)
from jax_idgrpo.rewards.recognition import Assigner, PeopleShown, people_shown

BLOCK = 32  # maximum number of frames of a block
BLOCK_PIXELS = 2**23  # maximum number of pixels of a block; 100 MB as float32

FileScorer = Callable[[Clip, Prompt], dict[str, float]]
Observer = Callable[[int, UInt8[np.ndarray, "t H W 3"], "Seen"], None]
"""Gets the number of the first frame of a block, the frames, and what the judge found in them."""


@flax.struct.dataclass
class Seen:
    """Faces and pixel statistics of the frames of a block."""

    boxes: Float[Array, "B T K 4"]
    landmarks: Float[Array, "B T K 5 2"]
    embeddings: Float[Array, "B T K E"]
    mask: Bool[Array, "B T K"]
    pixels: Pixels


@dataclasses.dataclass(frozen=True)
class Looked:
    """Terms of a video, and the faces of its people if they were collected."""

    terms: dict[str, float]
    people: PeopleShown | None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(
    graph: nnx.GraphDef,
    config: IdentityConfig,
    state: nnx.State,
    frames: UInt8[Array, "t H W 3"],
    people: ReferenceFaces,
    assigner: Assigner | None,
    counted: Bool[Array, " t"],
) -> tuple[Seen, PeopleShown | None]:
    """Detect the faces of frames of one video, and compute their pixel statistics.

    With an assigner, the faces of people are summed over the frames that count.
    """
    videos = (frames.astype(jnp.float32) / 127.5 - 1)[None]
    faces = nnx.merge(graph, state)[0](videos)
    references = people.embeddings, people.mask
    matches = match_videos(faces.embeddings, faces.mask, *references, config.null_similarity)
    found = faces.boxes, faces.landmarks, faces.mask
    pixels = read_pixels(videos, *found, matches, people.crops, config.copies)
    seen = Seen(faces.boxes, faces.landmarks, faces.embeddings, faces.mask, pixels)
    if assigner is None:
        return seen, None
    return seen, people_shown(faces, videos, people.mask, assigner, counted)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _conclude(
    config: IdentityConfig, size: tuple[int, int], seen: Seen, people: ReferenceFaces
) -> dict[str, Float[Array, " B"]]:
    """Compute the terms of a video from the faces and pixel statistics of all its frames."""
    faces = seen.embeddings, seen.mask, people.embeddings, people.mask
    matches = match_videos(*faces, config.null_similarity)
    given = seen.pixels, matches, seen.boxes, *faces, size, config
    return terms_of_faces(*given, places=people.places)


class Stream:
    """Score one video block by block by a face reward without a learned head."""

    def __init__(
        self,
        reward: FaceReward,
        people: ReferenceFaces,
        block: int,
        total: int,
        assigner: Assigner | None = None,
    ):
        """Start a video.

        Args:
          reward: the face reward. It processes all frames, regardless of its own frame count.
          people: encoded references of one prompt.
          block: maximum number of frames per call of `show`.
          total: number of frames of the video.
          assigner: with it, the faces of people are summed over frames, block by block.
        """
        self._reward, self._people, self._assigner = reward, people, assigner
        self._room = block + (total > block)  # one more frame: the last of the previous block
        self._seen: list[Seen] = []
        self._shown: PeopleShown | None = None
        self._last: list[UInt8[np.ndarray, "1 H W 3"]] = []

    def show(self, frames: UInt8[np.ndarray, "t H W 3"]) -> Seen:
        """Process the next frames, at most one block, and return what was found in them."""
        again = len(self._last)
        shown = np.concatenate([*self._last, frames])
        # Blocks are padded, so that only one program is compiled.
        filled = shown[np.minimum(np.arange(self._room), len(shown) - 1)]
        place = np.arange(self._room)
        counted = (place >= again) & (place < len(shown))
        given = self._reward.state, filled, self._people, self._assigner, counted
        seen, people = jax.device_get(_look(self._reward.graph, self._reward.config, *given))
        self._seen.append(jax.tree.map(lambda leaf: leaf[:, again : len(shown)], seen))
        self._shown = people if self._shown is None else self._shown + people
        self._last = [frames[-1:]]
        return self._seen[-1]

    def finish(self) -> Looked:
        """Compute the terms of all processed frames, and return the faces of people."""
        seen = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *self._seen)
        height, width = self._last[0].shape[1:3]
        terms = _conclude(self._reward.config, (height, width), seen, self._people)
        return Looked(first_row(terms), self._shown)


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
        self.people = config.data.max_people
        self.gallery = self.assigner = None
        if self.judge is None or not prompts:
            check_references(self.reward, prompts)
        else:
            self.assigner = make_assigner(config, self.reward)
            check_references(self.reward, prompts, [self.judge, self.assigner])
            self.gallery = Gallery.make(
                self.judge,
                prompts,
                self.people,
                self.judge.config.high,
                config.evaluate.same,
            )

    def __call__(
        self, clip: Clip, prompt: Prompt, observer: Observer | None = None
    ) -> dict[str, float]:
        """Score one video (see `scoring.values`).

        Args:
          clip: the video.
          prompt: its prompt.
          observer: is shown every block of frames; needs a judge, and adds the judge's other terms.

        Raises:
          UserError: the video or a photo cannot be used.
        """
        total = len(clip.numbers)
        block = max(1, min(BLOCK, BLOCK_PIXELS // (clip.height * clip.width), total))
        rewarded = self.encoded(self.reward, clip, prompt)
        stream = None
        if self.judge is not None:
            people = self.encoded(self.judge, clip, prompt)
            stream = Stream(self.judge, people, block, total, self._assigned(clip, prompt))
        chosen = self.reward.frames_read(total)
        wanted = set(range(total) if chosen is None else chosen.tolist())
        changes = Changes()
        held: list[np.ndarray] = []
        for number, frames in enumerate(clip.blocks(block)):
            held += [frame for n, frame in enumerate(frames, number * block) if n in wanted]
            if stream is not None:
                seen = stream.show(frames)
                if observer is not None:
                    observer(number * block, frames, seen)
            else:
                changes.show(frames)
        found = first_row(
            self.reward.score(jnp.asarray(from_uint8(np.stack(held))[None]), rewarded)
        )
        if self.reward.motion_of_all_frames:
            found["motion"] = changes.mean()
        if stream is None:
            return values(self.reward, found, None)
        looked = stream.finish()
        scored = values(self.reward, found, looked.terms)
        if observer is not None:
            scored = {name: looked.terms[name] for name in FURTHER} | scored
        if self.gallery is None or looked.people is None:
            return scored
        columns = self.gallery.columns([prompt], looked.people)
        recognised = summarised(columns, whole=False)
        return scored | {name: float(value[0]) for name, value in recognised.items()}

    def _assigned(self, clip: Clip, prompt: Prompt) -> Assigner | None:
        if self.assigner is None:
            return None
        return Assigner.make(self.assigner, self.encoded(self.assigner, clip, prompt).embeddings)

    def encoded(self, reward: Reward, clip: Clip, prompt: Prompt) -> PyTree:
        """Encode the photos of a prompt for one video.

        Args:
          reward: the reward or the judge.
          clip: the video.
          prompt: its prompt.
        """
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


def make_clip_scorer(config: Config, prompts: Sequence[Prompt] = ()) -> ClipScorer:
    """Make the scorer of a configuration. Arguments and errors are those of `ClipScorer`."""
    return ClipScorer(config, prompts)
