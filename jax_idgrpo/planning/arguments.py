"""Describe the arguments of a run's programs by shapes, and compute their memory per chip."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from jax_idgrpo import flow, rng
from jax_idgrpo.config import Config, VideoConfig
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.models.vae import PIXELS_PER_LATENT
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.sharding import shapes
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.planned import Planned
from jax_idgrpo.rewards.vlm.reward import VlmReward
from jax_idgrpo.sampling.conditioning import MASK_CHANNELS, Conditioning
from jax_idgrpo.training import update
from jax_idgrpo.training.setup import Run

Tree = TypeVar("Tree")

LATENT_CHANNELS = 16


def chip_bytes(*trees: PyTree) -> float:
    """Return the bytes in the memory of a chip of shapes with shardings.

    Shapes in host memory take none.
    """

    def one(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
        if sharding.is_in_host_memory(leaf):
            return 0
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return float(sum(map(one, jax.tree.leaves(trees))))


def rows_of(run: Run, tree: Tree) -> Tree:
    """Return the shapes of a tree whose rows are sharded over the mesh."""
    return shapes(tree, sharding.batch_sharding(run.mesh))


def whole(run: Run, *shape: int, dtype: type = jnp.float32) -> jax.ShapeDtypeStruct:
    """Return the shape of an array that is replicated over the mesh.

    Args:
      run: the run.
      *shape: sizes of the axes.
      dtype: data type.
    """
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(run.mesh))


def video_of(run: Run, size: VideoConfig, rows: int) -> jax.ShapeDtypeStruct:
    """Return the shape of videos, [B,F,H,W,3].

    Args:
      run: the run.
      size: frames, height and width.
      rows: number of videos.
    """
    shape = (rows, size.frames, size.height, size.width, 3)
    return rows_of(run, jax.ShapeDtypeStruct(shape, jnp.float32))


def keys_of(run: Run, rows: int) -> jax.ShapeDtypeStruct:
    """Return the shape of the random keys of `rows` rows."""
    number = jnp.zeros(rows, int)
    return rows_of(run, jax.eval_shape(lambda: rng.row_keys(rng.key(0, "noise"), number, number)))


def conditioning_of(run: Run, config: Config, rows: int) -> Conditioning:
    """Return the shapes of the conditioning of some rows.

    Args:
      run: the run.
      config: configuration with the video size.
      rows: number of rows.
    """
    video, people, vace = config.video, config.reference_frames, config.model.kind == "vace"
    frames = flow.latent_frames(video.frames) + (people if vace else 0)

    def latents(frames: int, channels: int) -> jax.ShapeDtypeStruct:
        cells = video.height // PIXELS_PER_LATENT, video.width // PIXELS_PER_LATENT
        return jax.ShapeDtypeStruct((rows, frames, *cells, channels), jnp.float32)

    asked = Conditioning(
        text=jax.ShapeDtypeStruct((rows, *run.negative.shape), jnp.float32),
        control=latents(frames, 2 * LATENT_CHANNELS + MASK_CHANNELS) if vace else None,
        frame_mask=jax.ShapeDtypeStruct((rows, frames), jnp.bool),
        references=jax.ShapeDtypeStruct((rows,), jnp.int32),
        reference_latents=None if vace else latents(people, LATENT_CHANNELS),
        padding_attended=config.kind.slots > 0,
        photos_read_text=config.kind.photos_read_text,
    )
    return rows_of(run, asked)


def stacked(run: Run, chunk: update.Rollout, number: int) -> update.Rollout:
    """Return the shapes of the stored chunks of a rollout.

    Args:
      run: the run.
      chunk: shapes of one chunk, [R,...].
      number: number of chunks.
    """
    many = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((number, *leaf.shape), leaf.dtype), chunk)
    return shapes(many, sharding.batch_sharding(run.mesh, 1))


def scored(run: Run, chunk: update.Rollout, number: int) -> update.Rollout:
    """Return the shapes of the stored chunks of a rollout with advantages and weights.

    Args:
      run: the run.
      chunk: shapes of one chunk, [R,...].
      number: number of chunks.
    """
    values = jax.ShapeDtypeStruct((number, run.config.rows_per_call), jnp.float32)
    values = shapes(values, sharding.batch_sharding(run.mesh, 1))
    return dataclasses.replace(stacked(run, chunk, number), advantage=values, weight=values)


def resident(run: Run, further: Sequence[FaceReward] = ()) -> float:
    """Return the bytes per chip in memory during a whole training run.

    These are all networks, the trained parameters with their moving average and optimizer, the
    reference, and an adapter as it was read.

    Args:
      run: the run.
      further: networks of an evaluation besides the reward, such as the judge's. They are included
        if `run.watch_every` is set.
    """
    read = [nnx.state(transformer, LoRAParam) for transformer in run.pipe.transformers]
    own = (run.state, run.base, run.reference, read, run.vae, run.negative, run.schedule)
    encoder = (
        nnx.split(run.pipe.text_encoder)[1] if run.config.model.text_memory == "device" else ()
    )
    scorers = [run.reward] if shares_devices(run, run.reward) else []
    if run.config.run.watch_every:
        scorers += further
    return chip_bytes(own, encoder, *(scorer.state for scorer in scorers))


def shares_devices(run: Run, reward: Planned) -> bool:
    """Return whether a reward is on the devices of the video model."""
    return not isinstance(reward, VlmReward) or not run.config.reward.vlm_devices
