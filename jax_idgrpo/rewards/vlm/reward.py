"""Score the likeness of people in photos and video with a Qwen2.5-VL and a reward head.

The score is the state after the last norm at the reward token times a linear head. If the reward's
folder has statistics, scores are normalised per dimension and summed; otherwise they are raw.
Photos and text are prepared on the host and cached by prompt within a memory limit. Frames are
selected, resized and cut into patches on the device, in the scoring program. One program serves all
prompts of one bucket: most photos in a row, their largest size, and the length of the sequence in
steps of 128 tokens.

Sources: `alibaba/identity-grpo` `vace_reward`; `KwaiVGI/VideoAlign`.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, PyTree

from jax_idgrpo.config import RewardConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.qwen_vl import Grids, VisionConfig
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.hosts import memory_share
from jax_idgrpo.rewards.base import Photo, References, Terms
from jax_idgrpo.rewards.vlm import inputs
from jax_idgrpo.rewards.vlm.files import PROMPT, RewardModel, load
from jax_idgrpo.rewards.vlm.inputs import Asked, Picture, Prompting, Question
from jax_idgrpo.rewards.vlm.settings import Settings
from jax_idgrpo.sampling.cache import ROOM, BoundedCache


def dimension_scores(scores: Float[Array, "B K O"], settings: Settings) -> Float[Array, "B O"]:
    """Return the normalised score of every dimension.

    With special tokens, dimension n is the n-th output at the n-th token.
    """
    values = (
        jnp.diagonal(scores, axis1=1, axis2=2) if settings.pooling == "special" else scores[:, 0]
    )
    return (values - jnp.asarray(settings.mean)) / jnp.asarray(settings.deviation)


def _score(
    graph: nnx.GraphDef,
    settings: Settings,
    fps: float,
    state: nnx.State,
    videos: Array,
    asked: Asked,
) -> Terms:
    network = nnx.merge(graph, state)
    frames = scored_frames(videos, settings, network.config.vision, fps)
    values = dimension_scores(
        network(asked.sequences(), asked.pictures(), frames, settings.pooling), settings
    )
    named = {name: values[:, n] for n, name in enumerate(settings.dimensions)}
    return common_terms({"reward": jnp.sum(values, axis=1), **named}, videos, asked)


def scored_frames(
    videos: Float[Array, "B T H W 3"], settings: Settings, vision: VisionConfig, fps: float
) -> Grids:
    """Cut the frames that the model sees into patches.

    Args:
      videos: values in [-1, 1].
      settings: number and size of the frames.
      vision: sizes of the patches.
      fps: frame rate reported to the model.
    """
    chosen = inputs.frame_indices(videos.shape[1], settings.frames, settings.fps, fps)
    return inputs.frames_of(videos.astype(jnp.float32), chosen, vision, settings.pixels)


def common_terms(scores: Terms, videos: Float[Array, "B T H W 3"], asked: Asked) -> Terms:
    """Add motion and the number of photos to the scores, in float32.

    Args:
      scores: the reward and its dimensions.
      videos: the scored videos.
      asked: their inputs.
    """
    videos = videos.astype(jnp.float32)
    motion = jnp.mean(jnp.abs(videos[:, 1:] - videos[:, :-1]), axis=(1, 2, 3, 4))
    terms = {**scores, "motion": motion, "faces_asked": asked.people()}
    return {name: value.astype(jnp.float32) for name, value in terms.items()}


Made = TypeVar("Made")


class VlmReward:
    """Score videos with a vision-language model.

    The terms are the reward, every dimension, and the motion of the video.
    """

    motion_of_all_frames = True

    def __init__(
        self,
        model: RewardModel,
        text: str,
        *,
        fps: float = 10.0,
        video: tuple[int, int, int] | None = None,
        rows: int = 0,
        mesh: Mesh | None = None,
    ):
        """Set up the scoring program.

        Args:
          model: network, tokenizer and settings.
          text: text of the prompt.
          fps: frame rate reported to the model; the published scores use 10.
          video: frames, height and width of the videos that `encode_references` prepares for.
          rows: videos per program call; 0 means all.
          mesh: devices of the computation, which hold the weights already.
        """
        graph, self.state = nnx.split(model.network)
        self.settings, self.vision = model.settings, model.network.config.vision
        self.fps, self.video, self.rows, self.mesh = fps, video, rows, mesh
        self._cache = BoundedCache(memory_share(ROOM))
        self._ask_for(
            model.settings.dimensions,
            [Prompting(model.tokenizer, text, model.settings.tokens)],
            functools.partial(_score, graph, model.settings, fps),
        )

    def _ask_for(
        self,
        dimensions: tuple[str, ...],
        promptings: Sequence[Prompting],
        program: Callable[[nnx.State, Array, Asked], Terms],
    ) -> None:
        """Set the questions, and the program that computes the terms of their answers.

        Args:
          dimensions: names of the terms beside the common ones.
          promptings: texts of the questions.
          program: (state, videos, inputs of the rows) -> terms.
        """
        self.term_names = ("reward", *dimensions, "motion", "faces_asked")
        self.reported = dimensions if len(dimensions) > 1 else ()
        self.promptings = tuple(promptings)
        self._apply = jax.jit(program)

    def encode_references(
        self,
        references: References,
        prompts: Sequence[str],
        video: tuple[int, int, int] | None = None,
    ) -> Asked:
        """Build the inputs of the rows on the host.

        Args:
          references: the photos of the prompts.
          prompts: the texts of the prompts.
          video: frames, height and width of the scored videos, if they differ from the
            configuration.

        Raises:
          UserError: a video has too few frames, or the aspect ratio of a photo exceeds 200.
        """
        total, height, width = video or self._video()
        count = len(inputs.frame_indices(total, self.settings.frames, self.settings.fps, self.fps))
        grid = inputs.video_grid(count, height, width, self.vision, self.settings.pixels)
        seconds = inputs.seconds_per_grid(total, self.fps, count)
        photos = [[self._picture(photo) for photo in row] for row in references.photos]
        questions = []
        for row, shown, text in zip(references.photos, photos, prompts, strict=True):
            common = (text, tuple(photo.key for photo in row), grid, seconds)
            questions.append(
                [
                    self._kept(
                        (number, *common),
                        lambda: inputs.question(shown, text, grid, seconds, prompting, self.vision),
                    )
                    for number, prompting in enumerate(self.promptings)
                ]
            )
        return self.padded(photos, questions)

    def padded(
        self, photos: Sequence[Sequence[Picture]], questions: Sequence[Sequence[Question]]
    ) -> Asked:
        """Pad the inputs of the rows; every row has one question."""
        return inputs.ask(photos, [asked for (asked,) in questions], self.vision)

    def _picture(self, photo: Photo) -> Picture:
        """Cut a photo into patches."""

        def read() -> Picture:
            try:
                return inputs.picture(photo.open(), self.vision, self.settings.pixels)
            except UserError as error:
                raise UserError(
                    f"{photo.name}: {error}"
                    if photo.name and not str(error).startswith("image")
                    else str(error)
                ) from None

        return self._kept(photo.key, read)

    def _kept(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """Return a value from the cache, or make it."""
        if name in self._cache:
            return self._cache[name]
        made = make()
        self._cache.keep(name, made)
        return made

    def _video(self) -> tuple[int, int, int]:
        if self.video is None:
            raise ValueError("no size of videos was given")
        return self.video

    def frames_read(self, total: int) -> np.ndarray | None:
        """Return the indices of the scored frames of a video of `total` frames.

        Returns None if a video of these frames would be subsampled again.

        Raises:
          UserError: the video has too few frames.
        """
        rates = self.settings.frames, self.settings.fps, self.fps
        chosen = inputs.frame_indices(total, *rates)
        return chosen if len(inputs.frame_indices(len(chosen), *rates)) == len(chosen) else None

    def apply(self, state: PyTree, videos: Float[ArrayLike, "B T H W 3"], encoded: Asked) -> Terms:
        """Score videos with the network's arrays as an argument.

        Args:
          state: arrays of the network.
          videos: values in [-1, 1].
          encoded: encoded references, one row per video.
        """
        return self._apply(state, videos, encoded)

    def score(self, videos: Float[ArrayLike, "B T H W 3"], encoded: Asked) -> Terms:
        """Compute every term without waiting; the result stays on the device."""
        rows = np.shape(videos)[0]
        step = self.rows or rows
        parts = [
            self._placed(jax.tree.map(lambda leaf: leaf[first : first + step], (videos, encoded)))
            for first in range(0, rows, step)
        ]
        found = [
            {name: value[:count] for name, value in self._apply(self.state, *part).items()}
            for count, part in parts
        ]
        return {name: jnp.concatenate([terms[name] for terms in found]) for name in found[0]}

    def _placed(self, tree: PyTree) -> tuple[int, PyTree]:
        """Put rows on the reward's devices, and return their number.

        The last row is repeated until the number of rows divides evenly.
        """
        count = np.shape(tree[0])[0]
        if self.mesh is None:
            return count, tree
        filled = sharding.rows_for(self.mesh, count)
        if filled > count:
            tree = jax.tree.map(lambda leaf: leaf[np.minimum(np.arange(filled), count - 1)], tree)
        return count, sharding.device_put_global(tree, sharding.batch_sharding(self.mesh))


def load_vlm(
    config: RewardConfig, video: tuple[int, int, int] | None = None, mesh: Mesh | None = None
) -> VlmReward:
    """Load the reward of the folder `config.vlm`.

    Args:
      config: configuration of the reward.
      video: frames, height and width of the videos to prepare for.
      mesh: devices of the weights and the computation.

    Raises:
      UserError: a file is missing or damaged, or does not fit the others.
    """
    model = load(config.vlm, config.vlm_base or None, config.vlm_dtype, mesh=mesh)
    path = Path(config.vlm_prompt) if config.vlm_prompt else Path(config.vlm) / PROMPT
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; pass the text that the reward was trained with, such as the release's vace_reward/prompt_template.py, "
            "in reward.vlm_prompt"
        )
    text = inputs.read_text(path, model.settings.template)
    return VlmReward(model, text, fps=config.vlm_fps, video=video, rows=config.vlm_rows, mesh=mesh)
