"""The programs of a step and of the evaluation, as functions of shapes."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_idgrpo import flow, rng
from jax_idgrpo.config import Config
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation.sampler import evaluated
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.umt5 import UMT5Config, UMT5Encoder
from jax_idgrpo.models.vae import PIXELS_PER_LATENT, VAEConfig, WanVAE
from jax_idgrpo.models.wan import WanConfig, WanTransformer, vace_1_3b, vace_14b, wan_1_3b, wan_14b
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.sharding import shapes
from jax_idgrpo.rewards.factory import make_planned_reward
from jax_idgrpo.sampling import policy, rollout
from jax_idgrpo.sampling.conditioning import MASK_CHANNELS, Conditioning
from jax_idgrpo.sampling.pipeline import Architecture, read_architecture
from jax_idgrpo.training import update
from jax_idgrpo.training.state import make_optimizer, start

SIZES: dict[str, dict[str, Callable[..., WanConfig]]] = {
    "1.3b": {"vace": vace_1_3b, "phantom": wan_1_3b},
    "14b": {"vace": vace_14b, "phantom": wan_14b},
}
PUBLISHED_VAE = VAEConfig(
    base_dim=96, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temporal_downsample=(False, True, True),
    latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16,
)
PUBLISHED_TEXT_ENCODER = UMT5Config(d_model=4096, d_ff=10240, num_heads=64, d_kv=64, num_layers=24, vocab_size=256_384)
LATENT_CHANNELS = 16


# ---- the networks --------------------------------------------------------------------------------------------------------


def networks(config: Config, sizes: str | None) -> Architecture:
    """The networks of the checkpoint that the configuration names, or, where it is not on this machine, of published `sizes`.

    Raises:
      UserError: there is no checkpoint and no sizes, or the sizes are unknown.
    """
    folder, model = config.model.folder(), config.model
    run: dict[str, Any] = {"rank": model.rank, "alpha": model.alpha, "remat": model.remat, "unroll": model.unroll}
    if sizes is not None:
        if sizes not in SIZES:
            raise UserError(f"--sizes {sizes}: unknown; choose {' or '.join(SIZES)}, or leave it out and name a checkpoint in model.path")
        return Architecture(SIZES[sizes][model.kind](**run), PUBLISHED_VAE, PUBLISHED_TEXT_ENCODER)
    if not folder.is_dir():
        raise UserError(f"model.path {folder}: no such folder; pass --sizes {' or '.join(SIZES)} to plan for published sizes without it")
    found = read_architecture(folder)
    return dataclasses.replace(found, transformer=dataclasses.replace(found.transformer, **run))


# ---- the programs --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the shapes that it is called with.

    beside: bytes per chip that lie in memory while it runs. calls: in one training step, 0 for those of the evaluation.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    beside: float
    calls: int


def _on(sharding: Any, tree: Any) -> Any:
    """The shapes of a tree with a sharding, one for all leaves or one each."""
    return shapes(tree, sharding)


def _bytes(*trees: Any) -> float:
    """Bytes per chip of shapes with shardings."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(trees)))


def _conditioning(config: Config, rows: int, text_width: int) -> Conditioning:
    video, people, vace = config.video, config.data.max_people, config.model.kind == "vace"
    frames = flow.latent_frames(video.frames) + (people if vace else 0)

    def latents(frames: int, channels: int) -> jax.ShapeDtypeStruct:
        shape = (rows, frames, video.height // PIXELS_PER_LATENT, video.width // PIXELS_PER_LATENT, channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return Conditioning(
        text=jax.ShapeDtypeStruct((rows, config.data.text_length, text_width), jnp.float32),
        control=latents(frames, 2 * LATENT_CHANNELS + MASK_CHANNELS) if vace else None,
        frame_mask=jax.ShapeDtypeStruct((rows, frames), jnp.bool),
        references=jax.ShapeDtypeStruct((rows,), jnp.int32),
        reference_latents=None if vace else latents(people, LATENT_CHANNELS),
    )


def _trajectory(asked: Conditioning, steps: int) -> rollout.Trajectory:
    rows = len(asked.references)

    def latents(*leading: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *leading, *asked.latent_shape), jnp.float32)

    log_prob = jax.ShapeDtypeStruct((rows, steps), jnp.float32)
    return rollout.Trajectory(latents=latents(), x=latents(steps + 1), velocity=latents(steps), log_prob=log_prob)


def programs(config: Config, parts: Architecture, mesh: Mesh) -> Iterator[Program]:
    """The programs of a training step and of the evaluation, in the order in which they run.

    Raises:
      UserError: the configuration does not fit the mesh, or trains in a way that is not planned.
    """
    if not config.grpo.replays:
        raise UserError(f"plan: grpo.objective {config.grpo.objective} is not planned, only those on replayed steps are; leave it out")
    for name in ("backend", "custom", "vlm"):
        if chosen := getattr(config.reward, name):
            raise UserError(f"plan: reward.{name} {chosen} is not planned, only the face reward is; leave it out")
    count, sampling = config.rows_per_call, config.rollout
    sharding.check_rows(mesh, count, "rows of one program call (rollout.micro_batch)")
    whole, rows, stacked = sharding.replicated(mesh), sharding.batch_sharding(mesh), sharding.batch_sharding(mesh, 1)
    dtypes, people = Dtypes.named(config.model.dtype), config.data.max_people

    # ---- what lies in memory -------------------------------------------------------------------------------------------
    network = dataclasses.replace(parts.transformer, mesh=mesh)
    transformer = nnx.eval_shape(lambda: WanTransformer(network, dtypes=dtypes, rngs=nnx.Rngs(0)))
    actor, lora, base = policy.split(transformer, sampling.guidance, config.image_guidance())
    optimizer = make_optimizer(config.optimizer, config.run.steps * config.grpo.optimizer_steps)
    base = _on(sharding.state_shardings(mesh, base), base)
    state = jax.eval_shape(lambda lora: start(optimizer, lora), lora)
    state = _on(sharding.state_shardings(mesh, state), state)
    vae_graph, decoder = nnx.split(nnx.eval_shape(lambda: WanVAE(parts.vae, rngs=nnx.Rngs(0))))
    decoder = _on(whole, decoder)
    text_graph, encoder = nnx.split(nnx.eval_shape(lambda: UMT5Encoder(parts.text_encoder, dtypes=dtypes, rngs=nnx.Rngs(0))))
    encoder = _on(sharding.fully_shard(mesh, encoder), encoder)
    reward = make_planned_reward(config.reward)
    scorer = _on(whole, reward.state)
    waiting = _bytes(encoder) if config.model.text_memory == "device" else 0.0
    resident = _bytes(base, state, decoder, scorer) + waiting
    width = parts.text_encoder.d_model
    negative = jax.ShapeDtypeStruct((config.data.text_length, width), jnp.float32, sharding=whole)

    def make_schedule(steps: int, *chosen: Any) -> Any:
        return _on(whole, rollout.Schedule.make(steps, sampling.shift or 3.0, *chosen))

    def row_keys(rows: int) -> Any:
        return jax.eval_shape(lambda: rng.row_keys(rng.key(0, "noise"), jnp.zeros(rows, int), jnp.zeros(rows, int)))

    asked = _conditioning(config, count, width)
    trajectory = _trajectory(asked, sampling.trained_steps)
    chunk = (trajectory, asked)
    chunks = sampling.rows // count
    stored = _bytes(_on(rows, chunk)) * chunks
    asked, trajectory = _on(rows, asked), _on(rows, trajectory)

    # ---- what runs -----------------------------------------------------------------------------------------------------
    ids = jax.ShapeDtypeStruct((1, config.data.text_length), jnp.int32, sharding=whole)
    encode = jax.jit(lambda state, ids, mask: nnx.merge(text_graph, state)(ids, mask))
    yield Program("text encoder", encode, (encoder, ids, ids), {}, resident - waiting, sampling.prompts)

    starts = _on(rows, row_keys(count))
    first = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=rows)
    window = rollout.Window(start=first, size=sampling.trained_steps, final_noise=sampling.final_step == "sde")
    schedule = make_schedule(sampling.steps, sampling.sampler, sampling.noise_level)
    given: tuple[Any, ...] = (actor, state.params, base, asked, negative, schedule, starts, starts, window)
    yield Program("rollout", rollout.sample, given, {}, resident - _bytes(state.params, base) + stored, chunks)

    def decoding(name: str, latents: Any, asked: Conditioning, beside: float, calls: int) -> Program:
        given = ((vae_graph, decoder), latents, asked.references)
        return Program(name, rollout.decode, given, {"frames": asked.video_frames(people)}, beside, calls)

    yield decoding("decode", trajectory.latents, asked, resident - _bytes(decoder) + stored, chunks)

    size = config.video
    video = jax.ShapeDtypeStruct((count, size.frames, size.height, size.width, 3), jnp.float32, sharding=rows)
    encoded = _on(rows, reward.shapes(count, people))
    beside = resident - _bytes(scorer) + stored
    yield Program("reward", jax.jit(reward.apply), (scorer, video, encoded), {}, beside, chunks)

    def batch_of(number: int) -> update.Rollout:
        values = jax.ShapeDtypeStruct((number, count), jnp.float32, sharding=stacked)

        def stack(tree: Any) -> Any:
            return _on(stacked, jax.tree.map(lambda x: jax.ShapeDtypeStruct((number, *x.shape), x.dtype), tree))

        return update.Rollout(
            trajectory=stack(trajectory), conditioning=stack(asked), start=stack(first), noise=stack(starts),
            advantage=values, weight=values,
        )

    batch = batch_of(config.trained_rows // count)
    if config.trained_rows < sampling.rows:
        chosen = jax.ShapeDtypeStruct((config.trained_rows,), jnp.int32, sharding=whole)
        yield Program("select", update.select_rows, (batch_of(chunks), chosen, mesh), {}, resident, 1)
    rule = update.UpdateRule(policy=actor, grpo=config.grpo, optimizer=optimizer, ema_decay=config.optimizer.ema_decay)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    trained: tuple[Any, ...] = (rule, state, update.Networks(base=base, negative=negative), batch, schedule, step)
    yield Program("update", update.update, trained, {}, resident - _bytes(state, base), config.grpo.optimizer_steps)

    # ---- evaluation ----------------------------------------------------------------------------------------------------
    count = sharding.rows_for(mesh, config.evaluate.batch)
    asked = _on(rows, _conditioning(evaluated(config), count, width))
    x = jax.ShapeDtypeStruct((count, *asked.latent_shape), jnp.float32, sharding=rows)
    given = (actor, state.params, base, asked, negative, make_schedule(config.evaluate.steps), x)
    yield Program("evaluation: sample", rollout.denoise, given, {}, resident - _bytes(state.params, base), 0)
    yield decoding("evaluation: decode", x, asked, resident - _bytes(decoder), 0)
