"""Parts of a training run: what is trained and what it is trained with, the rollout of an objective, and its cost."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from jax_idgrpo.config import Config
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel import sharding
from jax_idgrpo.rewards.base import differentiable
from jax_idgrpo.rewards.factory import make_reward
from jax_idgrpo.rewards.planned import planned_reward
from jax_idgrpo.sampling import conditioning, policy, rollout
from jax_idgrpo.sampling.pipeline import (
    Architecture,
    Pipeline,
    load_pipeline,
    pipeline_shapes,
    read_architecture,
)
from jax_idgrpo.training.selection import check_mixture
from jax_idgrpo.training.state import make_optimizer, start
from jax_idgrpo.training.update import UpdateRule


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run trains, on what, and by what rule; arrays, or shapes with shardings where a run is planned.

    mesh: where everything lies. pipe: the networks of the video model. policy: structure of the transformer, without arrays.
    state: `TrainState` before the first step; None once training has taken it over. base: the frozen weights.
    negative: [L,D] the encoded negative prompt. vae: graph and state. reward: what scores videos, or, where a run is planned, what stands
    for it (`rewards.planned`). schedule: of the rollout. rule: of the update. passes: transformer passes of a step, to log.
    """

    config: Config
    mesh: Mesh
    pipe: Pipeline
    policy: policy.Policy
    state: Any
    base: nnx.State
    negative: Any
    vae: tuple[nnx.GraphDef, nnx.State]
    reward: Any
    schedule: rollout.Schedule
    rule: UpdateRule
    passes: Mapping[str, float]


def build(
    config: Config, mesh: Mesh, abstract: bool = False, architecture: Architecture | None = None
) -> Run:
    """Read or describe everything that a run needs before its first step.

    Args:
      config: the run.
      mesh: its devices; with `abstract` they need not exist here.
      abstract: make shapes with shardings in place of arrays; of the checkpoint its configuration alone is read.
      architecture: with `abstract`, the networks to describe in place of the checkpoint's.

    Raises:
      UserError: the checkpoint, the adapter or the reward cannot be used.
    """
    sampling, model, whole = config.rollout, config.model, sharding.replicated(mesh)
    place: Callable[[Any, Any], Any] = sharding.shapes if abstract else sharding.device_put_global
    if abstract:
        found = architecture or read_architecture(model.folder())
        running: dict[str, Any] = dict(
            rank=model.rank, alpha=model.alpha, remat=model.remat, unroll=model.unroll
        )
        found = dataclasses.replace(
            found, transformer=dataclasses.replace(found.transformer, **running)
        )
        pipe = pipeline_shapes(
            found, model.dtype, model.kind, mesh=mesh, text_memory=model.text_memory
        )
        negative = jax.ShapeDtypeStruct(
            (config.data.text_length, found.text_encoder.d_model), jnp.float32
        )
    else:
        pipe = load(config, mesh)
        negative = conditioning.encode_negative(pipe, config.data)
    actor, lora, base = policy.split(pipe.transformer, sampling.guidance, config.image_guidance())
    optimizer = make_optimizer(config.optimizer, config.run.steps * config.grpo.optimizer_steps)
    first = functools.partial(start, optimizer)
    state = jax.eval_shape(first, lora) if abstract else first(lora)
    reward = _reward(config, mesh, abstract)
    through = config.grpo.through_reward
    schedule = rollout.Schedule.make(
        sampling.steps, sampling.shift or pipe.shift, sampling.sampler, sampling.noise_level
    )
    return Run(
        config=config,
        mesh=mesh,
        pipe=pipe,
        policy=actor,
        state=place(state, sharding.state_shardings(mesh, state)),
        base=place(base, sharding.state_shardings(mesh, base)),
        negative=place(negative, whole),
        vae=nnx.split(pipe.vae),
        reward=reward,
        schedule=place(schedule, whole),
        rule=UpdateRule(
            policy=actor if config.grpo.replays or through else actor.unguided(),
            grpo=config.grpo,
            optimizer=optimizer,
            ema_decay=config.optimizer.ema_decay,
            score=functools.partial(
                score_latents, differentiable(reward).apply, config.data.max_people
            )
            if through
            else None,
        ),
        passes=forward_passes(config, actor.branches),
    )


def _reward(config: Config, mesh: Mesh, abstract: bool) -> Any:
    """The reward, on the mesh or with shapes as its state."""
    if abstract:
        return planned_reward(config, mesh)
    reward = make_reward(config, mesh)
    check_mixture(config.reward.mixture, reward.term_names)
    return reward


def score_latents(
    function: Callable[..., dict[str, Array]],
    max_people: int,
    scorer: tuple[Any, nnx.State],
    latents: Float[Array, "B N h w C"],
    condition: conditioning.Conditioning,
    people: Any,
) -> Float[Array, "B"]:
    """The reward of final latents as a function of arrays: `scorer` holds the VAE and the state of the reward's networks,
    `people` the encoded references."""
    vae, state = scorer
    video = rollout.decode(vae, latents, condition.video_start, condition.video_frames(max_people))
    return function(state, video, people)["reward"]


Given = tuple[policy.Policy, nnx.State, nnx.State, conditioning.Conditioning, Float[Array, "L D"]]
"""What a velocity depends on beside its latents: policy, adapter, base, conditioning, negative prompt."""


def sample(
    config: Config,
    given: Given,
    schedule: rollout.Schedule,
    start_keys: Key[Array, "B"],
    noise_keys: Key[Array, "B"],
    window: rollout.Window,
) -> rollout.Trajectory:
    """What the objective trains on, of one chunk: trained steps, or where reward gradients begin, or final latents alone."""
    if config.grpo.replays:
        return rollout.sample(*given, schedule, start_keys, noise_keys, window)
    if config.grpo.through_reward:
        before = config.rollout.steps - config.grpo.gradient_steps
        x = rollout.generate(*given, schedule.part(0, before), start_keys)
        latents = rollout.denoise(*given, schedule.part(before, config.rollout.steps), x)
        return rollout.Trajectory(latents=latents, x=x[:, None])
    return rollout.Trajectory(latents=rollout.generate(*given, schedule, start_keys))


def forward_passes(config: Config, branches: int) -> dict[str, float]:
    """Transformer passes of one training step by phase, each of one video at one noise level: a measure of cost that no machine changes.

    branches: passes per guided velocity. update: every velocity that an update evaluates, those of the frozen base and of the old
    policy among them. backward: those of them that a gradient runs back through.
    """
    sampling, wanted = config.rollout, config.grpo
    if wanted.through_reward:
        levels, trained = wanted.gradient_steps, branches
    elif wanted.replays:
        levels, trained = sampling.trained_steps, branches
    else:
        levels, trained = wanted.times, 1
    base = wanted.kl > 0 or "base" in wanted.needs
    old = not (wanted.replays or wanted.on_policy)
    backward = config.trained_rows * wanted.epochs * levels * trained
    return {
        "forward_passes_rollout": float(sampling.rows * sampling.steps * branches),
        "forward_passes_update": float(backward * (1 + base + old)),
        "backward_passes": float(backward),
    }


def load(config: Config, mesh: Mesh | None = None) -> Pipeline:
    """The pipeline of `config.model` on a mesh, with a fresh adapter or the one it names."""
    model = config.model
    pipe = load_pipeline(
        model.folder(),
        model.dtype,
        model.kind,
        model.rank,
        model.alpha,
        seed=config.run.seed,
        remat=model.remat,
        unroll=model.unroll,
        mesh=mesh,
        text_memory=model.text_memory,
    )
    if model.adapter:
        pipe.load_lora(model.adapter)
        found = pipe.transformer.config
        if (found.rank, found.alpha) != (model.rank, model.alpha):
            raise UserError(
                f"model.adapter {model.adapter}: rank {found.rank}, alpha {found.alpha:g}; set --model.rank and --model.alpha to these"
            )
    return pipe
