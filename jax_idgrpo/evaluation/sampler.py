"""Sample the videos of an evaluation deterministically.

The noise is a pure function of (seed, prompt, member). Every model starts a video from the same
noise, so differences between models are paired.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt8

from checkpoints_convert.experts import expert_places
from checkpoints_convert.places import LoRASum
from jax_idgrpo import rng
from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.errors import Failure, UserError
from jax_idgrpo.metrics import progress
from jax_idgrpo.models import experts
from jax_idgrpo.models.wan import WanTransformer
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.hosts import to_host
from jax_idgrpo.rewards.base import Consumer
from jax_idgrpo.rewards.factory import policy_devices
from jax_idgrpo.sampling import conditioning, lora_sum, policy, rollout
from jax_idgrpo.sampling.adapters import add_adapter, lora_config
from jax_idgrpo.sampling.pipeline import Pipeline, load_pipeline, load_transformer
from jax_idgrpo.sampling.policy import PolicyInputs


@dataclasses.dataclass(frozen=True)
class Row:
    """A video to sample: its prompt, and its number among the videos of the prompt."""

    prompt: Prompt
    member: int

    @property
    def name(self) -> str:
        """File name without suffix: NUMBER-MEMBER."""
        return f"{self.prompt.id:04d}-{self.member}"


def all_rows(prompts: Sequence[Prompt], videos: int) -> list[Row]:
    """List `videos` rows per prompt; the rows of a prompt are consecutive."""
    return [Row(prompt, member) for prompt in prompts for member in range(videos)]


# ---- sampling ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the compared models: the policy, and the arrays of its adapter and its base."""

    policy: policy.Policy
    lora: nnx.State | experts.Pair[nnx.State]
    base: nnx.State | experts.Pair[nnx.State]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Makes videos from prompts.

    Attributes:
      config: configuration with the video size to sample.
      pipe: networks of the video model.
      batch: rows per program call: `evaluate.batch`, rounded up to a multiple of the mesh.
      schedule: noise schedule.
      negative: encoded negative prompt.
      cache: encoded prompts.
    """

    config: Config
    pipe: Pipeline
    batch: int
    schedule: rollout.Schedule
    negative: Float[Array, "L D"]
    cache: conditioning.Cache

    def photo_encoder(self, prompts: Sequence[Prompt]) -> Consumer:
        """Return a function that encodes decoded photos, so that `videos` opens no file."""
        return conditioning.photo_encoder(self.pipe, self.config, self.cache, prompts)

    def videos(self, model: Model, rows: Sequence[Row]) -> Float[Array, "B F H W 3"]:
        """Make one video in [-1, 1] per row. The videos are sharded over the devices by rows.

        Rows are padded to `batch`, so that only one program is compiled.
        """
        filled = [rows[min(n, len(rows) - 1)] for n in range(self.batch)]
        asked = conditioning.encode(
            self.pipe, [row.prompt for row in filled], self.config, self.cache
        )
        ids = jnp.asarray([row.prompt.id for row in filled], jnp.int32)
        members = jnp.asarray([row.member for row in filled], jnp.int32)
        noise = rng.row_keys(rng.key(self.config.run.seed, "evaluate"), ids, members)
        mesh = self.pipe.transformer.config.mesh
        if mesh is not None:
            asked, noise = sharding.device_put_global((asked, noise), sharding.batch_sharding(mesh))
        inputs = PolicyInputs(model.lora, model.base, asked, self.negative)
        latents = rollout.generate(model.policy, inputs, self.schedule, noise)
        frames = asked.video_frames(self.config.data.max_people)
        return rollout.decode(nnx.split(self.pipe.vae), latents, asked.video_start, frames)

    def batches(
        self, model: Model, rows: Sequence[Row], label: str
    ) -> Iterator[tuple[Sequence[Row], Float[Array, "B F H W 3"]]]:
        """Make videos of many rows, batch by batch, with a progress bar.

        Args:
          model: the model to sample from.
          rows: the videos to make.
          label: text of the progress bar and prefix of errors.

        Yields:
          The rows of a batch, and their videos in [-1, 1]. Padding follows the rows' videos.

        Raises:
          Failure: a video has values that are NaN or infinite.
        """
        with progress(label, len(rows)) as update:
            for start in range(0, len(rows), self.batch):
                batch = rows[start : start + self.batch]
                videos = self.videos(model, batch)
                require_finite(videos, batch, label)
                yield batch, videos
                update(start + len(batch), {})


@jax.jit
def _finite(videos: Float[Array, "B F H W 3"]) -> Bool[Array, " B"]:
    return jnp.all(jnp.isfinite(videos), axis=(1, 2, 3, 4))


def require_finite(videos: Float[Array, "B F H W 3"], rows: Sequence[Row], label: str) -> None:
    """Check that all values of videos are finite (collective).

    Args:
      videos: a padded batch of videos.
      rows: rows of the videos, without padding.
      label: prefix of the error.

    Raises:
      Failure: a video has values that are NaN or infinite.
    """
    # Padding has no row.
    for row, finite in zip(rows, to_host(_finite(videos)), strict=False):
        if not finite:
            raise Failure(
                f"{label}: video {row.name} is not finite (NaN or infinity), so it is not written; "
                "try --model.dtype float32, and look at the adapter with idgrpo-convert inspect"
            )


@functools.lru_cache(maxsize=8)
def _pixels(where: NamedSharding | None) -> Callable[[Array, int], Array]:
    """Compile a program that extracts one video of a batch as bytes."""

    def one(videos: Float[Array, "B F H W 3"], number: Int[Array, ""]) -> UInt8[Array, "F H W 3"]:
        clipped = jnp.clip(videos.astype(jnp.float32), -1, 1)
        levels = jnp.round((clipped + 1) * 127.5).astype(jnp.uint8)
        # A sum over rows moves one video between devices; an index would move all of them.
        mine = jnp.arange(videos.shape[0])[:, None, None, None, None] == number
        return jnp.sum(jnp.where(mine, levels, jnp.uint8(0)), 0, dtype=jnp.uint8)

    return jax.jit(one) if where is None else jax.jit(one, out_shardings=where)


def fetch(videos: Float[Array, "B F H W 3"], number: int) -> UInt8[np.ndarray, "F H W 3"]:
    """Copy one video of a batch to the host as bytes (collective)."""
    mesh = getattr(videos.sharding, "mesh", None)
    return to_host(_pixels(None if mesh is None else sharding.replicated(mesh))(videos, number))


def best_videos(
    sampler: Sampler,
    model: Model,
    rows: Sequence[Row],
    count: int,
    scorer: Callable[[Array, Sequence[Prompt]], Float[np.ndarray, " n"]] | None,
    label: str,
) -> Iterator[tuple[Row, UInt8[np.ndarray, "F H W 3"], list[float | None]]]:
    """Make `count` videos for each row, and yield the one with the highest reward (collective).

    Video k of a prompt is chosen among the members k count to (k + 1) count - 1. A reward that is no
    number loses. Only the best video so far of one row is held.

    Args:
      sampler: makes the videos.
      model: the model to sample from.
      rows: the videos to yield.
      count: number of videos to choose from; 1 needs no scorer.
      scorer: returns the rewards of a batch; None with a count of 1.
      label: text of the progress bar and prefix of errors.

    Yields:
      The row, its video as bytes, and the rewards of all its candidates, None for one that is no
      number; an empty list without a scorer.
    """
    tried = [Row(row.prompt, row.member * count + n) for row in rows for n in range(count)]
    rewards: list[float] = []
    best, place = None, 0
    for batch, videos in sampler.batches(model, tried, label):
        prompts = [row.prompt for row in batch]
        scored = [0.0] * len(batch) if scorer is None else scorer(videos, prompts).tolist()
        for number, reward in enumerate(scored):
            value = reward if math.isfinite(reward) else -math.inf
            if not rewards or value > max(rewards):
                best = fetch(videos, number)
            rewards.append(value)
            if len(rewards) == count:
                assert best is not None
                told = [value if math.isfinite(value) else None for value in rewards]
                yield rows[place], best, [] if scorer is None else told
                rewards, place = [], place + 1


def evaluated(config: Config) -> Config:
    """Return the configuration with the video size of the evaluation."""
    chosen = {
        name: value
        for name in ("frames", "height", "width")
        if (value := getattr(config.evaluate, name))
    }
    return dataclasses.replace(config, video=dataclasses.replace(config.video, **chosen))


def make_sampler(config: Config, pipe: Pipeline | None = None) -> Sampler:
    """Make the sampler of a configuration; loads the checkpoint unless `pipe` is given."""
    model = config.model
    if pipe is None:
        mesh = sharding.make_mesh(config.mesh, policy_devices(config))
        pipe = load_pipeline(
            model.folder(),
            model.dtype,
            model.kind,
            remat=model.remat,
            unroll=model.unroll,
            mesh=mesh,
            text_memory=model.text_memory,
            experts_idle=model.experts_idle,
        )
        lora_sum.merge_base(pipe.transformers, model)
    config.require_experts(len(pipe.transformers))
    schedule = rollout.Schedule.make(
        config.evaluate.steps,
        config.rollout.shift or pipe.shift,
        solver=config.evaluate.solver,
        boundary=pipe.boundary,
    )
    given = schedule, conditioning.encode_negative(pipe, config.data)
    mesh = pipe.transformer.config.mesh
    schedule, negative = (
        jax.device_put(given)
        if mesh is None
        else sharding.device_put_global(given, sharding.replicated(mesh))
    )
    batch = sharding.rows_for(mesh, config.evaluate.batch)
    return Sampler(
        config=config,
        pipe=pipe,
        batch=batch,
        schedule=schedule,
        negative=negative,
        cache=conditioning.Cache(),
    )


def _load_checkpoint(sampler: Sampler, name: str, folder: Path) -> WanTransformer:
    """Load the transformer of a checkpoint that has the sizes of the base.

    Args:
      sampler: holds the base.
      name: name of the checkpoint, for messages.
      folder: folder of the checkpoint.

    Raises:
      UserError: the model has two transformers, or other sizes.
    """
    config, base = sampler.config, sampler.pipe.transformer.config
    if len(sampler.pipe.transformers) > 1:
        raise UserError(
            f"--checkpoint {name}={folder}: {config.model.path} has two transformers; compare "
            "adapters with --lora"
        )
    running = dict(remat=base.remat, unroll=base.unroll, mesh=base.mesh)
    other = load_transformer(folder, config.model.dtype, **running)
    if other.config != base:
        raise UserError(
            f"--checkpoint {name}={folder}: its transformer has other sizes than that of "
            f"model.path {config.model.path}; pass a checkpoint of the same model"
        )
    return other


def make_models(
    sampler: Sampler,
    loras: Mapping[str, Path | LoRASum],
    checkpoints: Mapping[str, Path] | None = None,
) -> dict[str, Model]:
    """Load the base, adapters and checkpoints by name; the base has the name "base".

    Base and checkpoints get an adapter whose output is zero, so that one program runs all models.

    Args:
      sampler: holds the base.
      loras: adapters.
      checkpoints: folders whose transformers have the sizes of the base.

    Raises:
      UserError: an adapter or a checkpoint does not fit the base.
    """
    config, mesh = sampler.config, sampler.pipe.transformer.config.mesh
    bare = sampler.pipe.transformers

    def model(transformers: Sequence[WanTransformer]) -> Model:
        actor, lora, base = policy.split_experts(
            transformers, config.guidance(evaluation=True), config.image_guidance(evaluation=True)
        )
        actor = actor.configured(config, sampler.pipe.shift, evaluation=True)
        return Model(actor, lora if mesh is None else sharding.shard_params(mesh, lora), base)

    zero: list[WanTransformer] = []
    first = next(iter(loras.values()), None)
    places = [None] * len(bare) if first is None else expert_places(first, len(bare))
    for transformer, place in zip(bare, places, strict=True):
        rank, alpha, layers = 1, 1.0, None
        if place is not None:
            found = lora_config(place, transformer.config)
            rank, alpha, layers = found.rank, found.alpha, found.lora
        zero.append(add_adapter(transformer, rank, alpha, rng.key(0, "init"), layers))
    models = {"base": model(zero)}
    for name, folder in (checkpoints or {}).items():
        other = _load_checkpoint(sampler, name, folder)
        lora = zero[0].config
        models[name] = model(
            [add_adapter(other, lora.rank, lora.alpha, rng.key(0, "init"), lora.lora)]
        )
    for name, path in loras.items():
        sampler.pipe.load_lora(path)
        models[name] = dataclasses.replace(
            model(sampler.pipe.transformers), base=models["base"].base
        )
    return models
