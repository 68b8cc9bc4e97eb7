"""Train the vision-language reward on preference pairs by Bradley-Terry with ties.

As published, one learning rate trains an adapter on every linear layer of the language model, the
vision tower with its merger, the head, and the reward tokens' rows of the embedding table; the rest
is frozen. Trained parameters are float32. The published dropout of 0.05 inside the adapter is
omitted.

Options (`finetune.options`): those of `batches.PairOptions`, rank, alpha, frames, pixels, pooling
("special", "last" or "mean"), text (file of the question, "" for the project's own), remat.
`reward.vlm_base` is the base model; alternatively `finetune.start` is a reward folder to continue
from. `reward.vlm_fps` is the frame rate of videos whose row has none.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from jax_idgrpo import rng
from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import load_reference
from jax_idgrpo.data.video import File, read_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.models.qwen_vl import Grids, QwenReward, VisionConfig
from jax_idgrpo.parallel import sharding
from jax_idgrpo.preferences.batches import (
    Differences,
    PairOptions,
    filter_automatic,
    pair_loss,
    read_options,
    step_pairs,
    write_accuracy,
)
from jax_idgrpo.preferences.csv_source import Pair, by_source, pair_digests
from jax_idgrpo.preferences.tfds_source import open_pairs
from jax_idgrpo.rewards.vlm import files, inputs
from jax_idgrpo.rewards.vlm.files import RewardModel
from jax_idgrpo.rewards.vlm.inputs import Asked, Prompting
from jax_idgrpo.rewards.vlm.reward import dimension_scores
from jax_idgrpo.rewards.vlm.settings import POOLINGS, Settings
from jax_idgrpo.training.task import Task


@dataclasses.dataclass(frozen=True)
class Options(PairOptions):
    """Options of `finetune.options`; see the module's docstring."""

    rank: int = 64
    alpha: float = 128.0
    frames: float = 5.0
    pixels: int = 399_360
    pooling: str = "special"
    text: str = ""
    remat: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.pooling not in POOLINGS:
            raise UserError("finetune.options: rank is 1 or more, pooling special, last or mean")


@struct.dataclass
class PairBatch:
    """B pairs: questions and frames of the A videos, then of the B videos, and the labels."""

    asked: Asked
    frames: Grids
    labels: Int[Array, "B O"]


class Trainee(nnx.Module):
    """A reward network whose reward-token embeddings are a separate, trainable parameter.

    `rows` replaces the last rows of the embedding table.
    """

    def __init__(self, network: QwenReward, tokens: int, settings: Settings):
        self.network, self.settings = network, settings
        table = network.embed_tokens[...]
        self.rows = nnx.Param(table[table.shape[0] - tokens :].astype(jnp.float32))

    def __call__(self, asked: Asked, frames: Grids) -> Float[Array, "B O"]:
        """Score every row in float32."""
        self.fill()
        scores = self.network(asked.sequences(), asked.pictures(), frames, self.settings.pooling)
        return dimension_scores(scores, self.settings)

    def fill(self) -> None:
        """Write the rows to the embedding table."""
        table, rows = self.network.embed_tokens[...], self.rows[...]
        self.network.embed_tokens[...] = table.at[table.shape[0] - rows.shape[0] :].set(
            rows.astype(table.dtype)
        )


def trained(path: tuple[str | int, ...], value: object) -> bool:
    """Return whether a variable of a `Trainee` is trained."""
    return isinstance(value, LoRAParam) or path[0] == "rows" or path[1] in ("visual", "rm_head")


def make_trainee(model: RewardModel, remat: bool) -> Trainee:
    """Prepare a model for training: trained parameters in float32.

    remat: recompute the blocks in the backward pass.
    """
    network = model.network
    network.config = dataclasses.replace(network.config, remat=remat)
    network.visual.remat = remat
    trainee = Trainee(network, len(model.settings.tokens), model.settings)
    graph, moving, still = nnx.split(trainee, trained, ...)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moving), still)


# ---- pairs -> arrays -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _picture(path: File, vision: VisionConfig, pixels: int) -> inputs.Picture:
    return inputs.picture(load_reference(path), vision, pixels)


@functools.lru_cache(maxsize=256)
def _frames(path: File, frames: float) -> tuple[Float[np.ndarray, "T H W 3"], int]:
    """Read the sampled frames of a video, and its number of frames."""
    video = read_video(path)
    return video[inputs.frame_indices(len(video), frames)], len(video)


@dataclasses.dataclass(frozen=True)
class Reading:
    """Conversion of pairs to arrays. fps: frame rate of videos whose row has none."""

    settings: Settings
    vision: VisionConfig
    prompting: Prompting
    fps: float

    def batch(self, pairs: Sequence[Pair]) -> PairBatch:
        """Read the photos and videos of pairs.

        Raises:
          UserError: a file cannot be read, or a video has too few frames.
        """
        pixels, vision = self.settings.pixels, self.vision
        rows = [(pair, side) for side in (0, 1) for pair in pairs]
        found = [_frames(pair.videos[side], self.settings.frames) for pair, side in rows]
        grids = [
            inputs.video_grid(len(video), video.shape[1], video.shape[2], vision, pixels)
            for video, _ in found
        ]
        seconds = [
            inputs.seconds_per_grid(total, pair.fps[side] or self.fps, len(video))
            for (pair, side), (video, total) in zip(rows, found, strict=True)
        ]
        photos = [[_picture(path, vision, pixels) for path in pair.references] for pair, _ in rows]
        questions = [
            inputs.question(shown, pair.prompt, grid, apart, self.prompting, vision)
            for shown, (pair, _), grid, apart in zip(photos, rows, grids, seconds, strict=True)
        ]
        asked = inputs.ask(photos, questions, vision)
        frames = inputs.frame_grids([video for video, _ in found], vision, pixels)
        return PairBatch(asked, frames, np.asarray([pair.labels for pair in pairs], np.int32))


def read_with(model: RewardModel, text: str, fps: float) -> Reading:
    """Make the `Reading` of a model.

    Args:
      model: reward model.
      text: question to the model.
      fps: frame rate of videos whose row has none.
    """
    prompting = Prompting(model.tokenizer, text, model.settings.tokens)
    return Reading(model.settings, model.network.config.vision, prompting, fps)


def differences(
    trainee: Trainee, pairs: Sequence[Pair], reading: Reading, size: int
) -> Float[np.ndarray, "N O"]:
    """Compute the score of A minus the score of B of every pair.

    Args:
      trainee: reward network.
      pairs: N pairs.
      reading: conversion of pairs to arrays.
      size: pairs per batch.
    """
    graph, state = nnx.split(trainee)

    @jax.jit
    def scores(state: nnx.State, batch: PairBatch) -> Array:
        return nnx.merge(graph, state)(batch.asked, batch.frames)

    parts = []
    for first in range(0, len(pairs), size):
        chosen = [pairs[min(first + n, len(pairs) - 1)] for n in range(size)]
        a, b = np.split(np.asarray(scores(state, reading.batch(chosen))), 2)
        parts.append(a - b)
    return np.concatenate(parts)[: len(pairs)]


# ---- the task ------------------------------------------------------------------------------------


def read_teacher(config: Config, options: Options) -> Differences:
    """Load the teacher and make the function that scores pairs with it.

    Raises:
      UserError: the teacher cannot be read, or its dimensions are not those of the pairs.
    """
    reward = config.reward
    model = files.load(options.teacher, reward.vlm_base or None, reward.vlm_dtype)
    if model.settings.dimensions != options.dimensions:
        raise UserError(
            f"finetune.options: teacher {options.teacher} "
            f"scores {', '.join(model.settings.dimensions)}, "
            f"the pairs are labelled in {', '.join(options.dimensions)}"
        )
    text = inputs.read_text(Path(options.teacher) / files.PROMPT, model.settings.template)
    trainee = Trainee(model.network, len(model.settings.tokens), model.settings)
    return lambda pairs: differences(
        trainee, pairs, read_with(model, text, reward.vlm_fps), config.finetune.batch
    )


def open_model(config: Config, options: Options, key: jax.Array) -> tuple[RewardModel, str]:
    """Open the model that training starts from, with an adapter, and the text of its question.

    Args:
      config: configuration of the run.
      options: options of the task.
      key: key of new parameters.

    Raises:
      UserError: a file is missing or does not fit.
    """
    base, dtype, begun = config.reward.vlm_base, config.reward.vlm_dtype, config.finetune.start
    mesh = sharding.make_mesh(config.mesh)
    if begun:
        model = files.load(begun, base or None, dtype, merge=False, mesh=mesh)
        if model.network.config.rank == 0:
            raise UserError(
                f"finetune.start {begun}: its adapter is merged already; "
                f"start from a folder that holds {files.ADAPTER}"
            )
    else:
        if not base:
            raise UserError(
                "reward.vlm_base is empty; "
                "name the folder of the Qwen2.5-VL model that training starts from"
            )
        size = len(options.dimensions)
        settings = Settings(
            dimensions=options.dimensions,
            pooling=options.pooling,
            frames=options.frames,
            pixels=options.pixels,
            template="own",
            mean=(0.0,) * size,
            deviation=(1.0,) * size,
            rank=options.rank,
            alpha=options.alpha,
        )
        model = files.start(base, settings, key, dtype, mesh)
    file = options.text or (str(Path(begun) / files.PROMPT) if begun else "")
    text = (
        inputs.read_text(Path(file), model.settings.template)
        if file
        else inputs.own_text(model.settings.tokens)
    )
    return model, text


def make(config: Config) -> Task:
    """Make the task of `configs/reward_vlm.py`."""
    options = read_options(Options, config.finetune.options)
    pairs = open_pairs(options.pairs, options.dimensions)
    held_out = open_pairs(options.held_out, options.dimensions) if options.held_out else []
    mixed = by_source(filter_automatic(pairs, options, lambda: read_teacher(config, options)))
    model, text = open_model(config, options, rng.key(config.run.seed, "init"))
    reading = read_with(model, text, config.reward.vlm_fps)

    def init(key: jax.Array) -> nnx.Module:
        return make_trainee(model, options.remat)

    def batch(seed: int, step: int) -> PairBatch:
        return reading.batch(step_pairs(mixed, options, config, seed, step))

    def loss(
        trainee: nnx.Module, given: PairBatch, key: jax.Array
    ) -> tuple[Array, dict[str, Array]]:
        a, b = jnp.split(trainee(given.asked, given.frames), 2)
        return pair_loss(a, b, given.labels, options.theta)

    def save(trainee: nnx.Module, folder: Path) -> None:
        size = config.finetune.batch
        write_accuracy(
            folder.parent,
            held_out,
            lambda pairs: differences(trainee, pairs, reading, size),
            options,
            config.run.seed,
        )
        trainee.fill()
        files.save(
            dataclasses.replace(model, network=trainee.network), folder, config.run.steps, text
        )

    return Task(
        init=init,
        batch=batch,
        loss=loss,
        save=save,
        trained=trained,
        frozen=nnx.Param,
        rows=pair_digests(mixed.pairs),
    )
