"""Set up a training run: networks, state, reward, schedule, rollout and pass counts."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from jax_idgrpo import rng
from jax_idgrpo.config import Config
from jax_idgrpo.config.scoring import PLACED
from jax_idgrpo.data.prompts import Prompt, prompt_batch
from jax_idgrpo.errors import UserError
from jax_idgrpo.models import experts
from jax_idgrpo.models.wan import WanTransformer
from jax_idgrpo.parallel import sharding
from jax_idgrpo.rewards.base import Consumer, Reward, differentiable
from jax_idgrpo.rewards.factory import make_reward
from jax_idgrpo.rewards.planned import Planned, planned_reward
from jax_idgrpo.sampling import conditioning, lora_layers, lora_sum, policy, rollout
from jax_idgrpo.sampling.adapters import add_adapters
from jax_idgrpo.sampling.pipeline import (
    Architecture,
    Pipeline,
    load_pipeline,
    pipeline_shapes,
    read_architecture,
)
from jax_idgrpo.sampling.weights import select_weights
from jax_idgrpo.training.selection import check_terms
from jax_idgrpo.training.state import TrainState, make_optimizer, start
from jax_idgrpo.training.update import UpdateRule


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a training run needs, as arrays, or as shapes with shardings for planning.

    Attributes:
      config: the run's configuration.
      mesh: devices of the video model.
      pipe: networks of the video model.
      policy: structure of the transformer, without arrays.
      state: `TrainState` before the first step; None after training has taken it over.
      base: frozen weights of the transformer, or of both experts.
      reference: the trained weights before training, in the dtypes of the network; None for an
        adapter, and if the objective does not compare with the base.
      negative: [L,D] encoded negative prompt.
      vae: graph and state of the VAE.
      reward: scores videos; for planning, its substitute of `rewards.planned`.
      schedule: noise schedule of the rollout.
      rule: static part of the update.
      passes: transformer passes of a step by phase, to log.
    """

    config: Config
    mesh: Mesh
    pipe: Pipeline
    policy: policy.Policy
    state: Any
    base: nnx.State | experts.Pair[nnx.State]
    reference: nnx.State | None
    negative: Float[Array, "L D"] | jax.ShapeDtypeStruct
    vae: tuple[nnx.GraphDef, nnx.State]
    reward: Any
    schedule: rollout.Schedule
    rule: UpdateRule
    passes: Mapping[str, float]


def build(
    config: Config, mesh: Mesh, abstract: bool = False, architecture: Architecture | None = None
) -> Run:
    """Load, or describe by shapes, everything that a run needs before its first step.

    Args:
      config: the run.
      mesh: devices of the video model. With `abstract` they need not exist on this machine.
      abstract: make shapes with shardings instead of arrays. Only the configuration of the
        checkpoint is read.
      architecture: with `abstract`, networks to describe instead of the checkpoint's.

    Raises:
      UserError: the checkpoint, the adapter or the reward cannot be used.
    """
    sampling, model, whole = config.rollout, config.model, sharding.replicated(mesh)
    place: Callable[[PyTree, PyTree], PyTree] = (
        sharding.shapes if abstract else sharding.device_put_global
    )
    if abstract:
        found = architecture or read_architecture(model.folder())
        running: dict[str, Any] = dict(remat=model.remat, unroll=model.unroll)
        if model.train == "lora":
            running |= lora_layers.configured(model, found.transformer)
        found = dataclasses.replace(
            found, transformer=dataclasses.replace(found.transformer, **running)
        )
        pipe = pipeline_shapes(
            found,
            model.dtype,
            model.kind,
            mesh=mesh,
            text_memory=model.text_memory,
            experts_idle=model.experts_idle,
        )
        negative = jax.ShapeDtypeStruct(
            (config.data.text_length, found.text_encoder.d_model), jnp.float32
        )
    else:
        pipe = load(config, mesh)
        negative = conditioning.encode_negative(pipe, config.data)
    full = model.train == "full"
    if full and len(pipe.transformers) > 1:
        raise UserError(
            f"model.train full: {model.path} has two transformers, which are trained by adapters "
            "only; leave out model.train"
        )
    actor, trained, base = policy.split_experts(
        pipe.transformers,
        config.guidance(),
        config.image_guidance(),
        select_weights(pipe.transformer, model.train_layers) if full else None,
    )
    actor = actor.configured(config, pipe.shift)
    if full:  # else the device would hold the trained weights as they were read
        pipe = dataclasses.replace(pipe, transformer=described(pipe.transformer))
    reference = trained if full and config.grpo.compares_with_base else None
    schedule = rollout.Schedule.make(
        sampling.steps,
        sampling.shift or pipe.shift,
        sampling.sampler,
        sampling.noise_level,
        boundary=pipe.boundary,
    )
    check_experts(config, schedule.counts)
    optimizer = experts.together(
        [
            make_optimizer(config.optimizer, steps * config.grpo.optimizer_steps)
            for steps in steps_of_experts(config, schedule.counts)
        ]
    )

    def first(params: nnx.State | experts.Pair[nnx.State]) -> TrainState:
        return start(optimizer, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))

    shapes = jax.eval_shape(first, trained)
    where = sharding.state_shardings(mesh, shapes)
    state = (
        sharding.shapes(shapes, where)
        if abstract
        else jax.jit(first, out_shardings=where)(sharding.shard_params(mesh, trained))
    )
    reward = _reward(config, mesh, abstract)
    through = config.grpo.through_reward
    base_shardings = sharding.state_shardings(mesh, base)
    if sharding.is_in_host_memory(base):
        base_shardings = sharding.in_host_memory(base_shardings)
    return Run(
        config=config,
        mesh=mesh,
        pipe=pipe,
        policy=actor,
        state=state,
        base=place(base, base_shardings),
        reference=place(reference, sharding.state_shardings(mesh, reference)),
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
        passes=forward_passes(config, [own.branches for own in actor.experts], schedule.counts),
    )


def photo_encoder(run: Run, prompts: Sequence[Prompt], cache: conditioning.Cache) -> Consumer:
    """Return a function that encodes a decoded photo if a step of the run samples it.

    Args:
      run: the run.
      prompts: all prompts of the run.
      cache: encoded prompts of the whole run.
    """
    config = run.config
    drawn = min(config.run.steps * config.rollout.prompts, len(prompts))  # then they repeat
    chosen = prompt_batch(prompts, config.run.seed, 0, drawn)
    sampled = [prompts[index] for index in chosen]
    return conditioning.photo_encoder(run.pipe, config, cache, sampled)


def described(transformer: WanTransformer) -> WanTransformer:
    """Return the transformer with shapes in place of its arrays."""
    graph, state = nnx.split(transformer)
    return nnx.merge(graph, jax.eval_shape(lambda state: state, state))


def check_experts(config: Config, counts: Sequence[int]) -> None:
    """Refuse a run that cannot train the experts of its model.

    Args:
      config: the run.
      counts: denoising steps of each expert.

    Raises:
      UserError: an option does not fit the number of experts, or a window their steps.
    """
    config.require_experts(len(counts))
    if len(counts) == 1:
        return
    sampling, name = config.rollout, config.grpo.objective
    if not config.grpo.replays:
        raise UserError(
            f"grpo.objective {name}: the two transformers of {config.model.path} are trained by "
            "objectives that replay steps; use clip, guard or divergence"
        )
    share = sampling.window_low_noise
    if sampling.window in ("random", "per_prompt"):
        for expert, used in enumerate((share < 1, share > 0)):
            first, last = rollout.random_starts(sampling, counts, expert)
            if used and last < first:
                raise UserError(
                    f"rollout.window_size {sampling.window_size} is more than the "
                    f"{last - first + sampling.window_size} trainable steps of the "
                    f"{experts.NAMES[expert]} expert; use a smaller one, or change "
                    "rollout.window_low_noise"
                )
    elif config.model.experts_idle == "host" and any(
        all(rollout.trained_levels(sampling, step, counts)) for step in range(config.run.steps)
    ):
        raise UserError(
            "model.experts_idle host keeps one expert on the devices, and rollout.window "
            f"{sampling.window} trains both in one update; use rollout.window random or "
            "per_prompt, or experts_idle device"
        )


def steps_of_experts(config: Config, counts: Sequence[int]) -> list[int]:
    """Return the number of training steps of a run that train each expert.

    Args:
      config: the run.
      counts: denoising steps of each expert.
    """
    if len(counts) == 1:
        return [config.run.steps]
    levels = [
        rollout.trained_levels(config.rollout, step, counts) for step in range(config.run.steps)
    ]
    return [sum(own > 0 for own in of_expert) for of_expert in zip(*levels, strict=True)]


def _reward(config: Config, mesh: Mesh, abstract: bool) -> Reward | Planned:
    """Make the reward on the mesh, or with shapes as its state."""
    if abstract:
        return planned_reward(config, mesh)
    reward = make_reward(config, mesh)
    names = (*reward.term_names, *([PLACED] if config.reward.follows_people else []))
    check_terms("reward.mixture", config.reward.mixture, names)
    check_terms("grpo.pair_terms", config.grpo.pair_terms, names, most=5)
    return reward


def score_latents(
    function: Callable[..., dict[str, Array]],
    max_people: int,
    scorer: tuple[tuple[nnx.GraphDef, nnx.State], nnx.State],
    latents: Float[Array, "B N h w C"],
    condition: conditioning.Conditioning,
    people: PyTree,
) -> Float[Array, " B"]:
    """Decode final latents and return their reward, as a pure function of arrays.

    Args:
      function: `apply` of a differentiable reward.
      max_people: maximum number of reference photos per prompt.
      scorer: the VAE, and the state of the reward's networks.
      latents: clean latents.
      condition: conditioning of the rows.
      people: encoded references of the rows.
    """
    vae, state = scorer
    video = rollout.decode(vae, latents, condition.video_start, condition.video_frames(max_people))
    return function(state, video, people)["reward"]


def sample(
    config: Config,
    actor: policy.Policy,
    inputs: policy.PolicyInputs,
    schedule: rollout.Schedule,
    start_keys: Key[Array, " B"],
    noise_keys: Key[Array, " B"],
    window: rollout.Window,
) -> rollout.Trajectory:
    """Sample one chunk of videos and keep what the objective trains on.

    An objective that replays steps gets the trained steps. Reward gradients get the latents before
    the differentiated steps. Every other objective gets the final latents only.

    Args:
      config: the run.
      actor: structure of the transformer.
      inputs: adapter, weights and prompts of the rows.
      schedule: noise schedule of the rollout.
      start_keys: random keys of the start noise.
      noise_keys: random keys of the noise of stochastic steps.
      window: trained steps of each row.
    """
    if config.grpo.replays:
        return rollout.sample_experts(actor, inputs, schedule, start_keys, noise_keys, window)
    if config.grpo.through_reward:
        before = config.rollout.steps - config.grpo.gradient_steps
        x = rollout.generate(actor, inputs, schedule.part(0, before), start_keys)
        last = schedule.part(before, config.rollout.steps)
        latents = rollout.denoise_experts(actor, inputs, last, x)
        return rollout.Trajectory(latents=latents, x=x[:, None])
    return rollout.Trajectory(latents=rollout.generate(actor, inputs, schedule, start_keys))


def forward_passes(
    config: Config, branches: int | Sequence[int], counts: Sequence[int] = ()
) -> dict[str, float]:
    """Count the transformer passes of one training step by phase, independent of the hardware.

    One pass is one video at one noise level. The update counts every velocity that it evaluates,
    including those of the frozen base and of the old policy. The backward count includes only
    velocities with a gradient.

    Args:
      config: the run.
      branches: passes per guided velocity, of the transformer or of each expert.
      counts: denoising steps of each expert; one transformer has all.
    """
    sampling, wanted = config.rollout, config.grpo
    every = [branches] if isinstance(branches, int) else list(branches)
    counts = counts or [sampling.steps]
    sampled = sum(count * own for count, own in zip(counts, every, strict=True))
    if wanted.through_reward:
        trained = wanted.gradient_steps * every[-1]
    elif not wanted.replays:
        trained = wanted.times
    elif len(set(every)) == 1:
        trained = sampling.trained_steps * every[0]
    else:  # the mean over the run's training steps
        levels = [rollout.trained_levels(sampling, n, counts) for n in range(config.run.steps)]
        trained = sum(np.dot(own, every) for own in levels) / len(levels)
    base = wanted.compares_with_base
    old = not (wanted.replays or wanted.on_policy)
    backward = config.trained_rows * wanted.epochs * trained
    return {
        "forward_passes_rollout": float(sampling.rows * sampled),
        "forward_passes_update": float(backward * (1 + base + old)),
        "backward_passes": float(backward),
    }


def load(config: Config, mesh: Mesh | None = None) -> Pipeline:
    """Load the pipeline of `config.model` on a mesh, with the adapter that is trained, if any.

    Raises:
      UserError: the checkpoint or the adapter cannot be used.
    """
    model = config.model
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
    if model.train == "full":
        return pipe
    wanted = lora_layers.configured(model, pipe.transformer.config)
    if not model.adapter:
        pipe.transformers = add_adapters(
            pipe.transformers,
            wanted["rank"],
            wanted["alpha"],
            rng.key(config.run.seed, "init"),
            wanted["lora"],
        )
        return pipe
    pipe.load_lora(model.adapter)
    for found in (transformer.config for transformer in pipe.transformers):
        if (found.rank, found.alpha) != (wanted["rank"], wanted["alpha"]):
            raise UserError(
                f"model.adapter {model.adapter}: rank {found.rank}, alpha {found.alpha:g}; set "
                "--model.rank and --model.alpha to these"
            )
        if found.lora != wanted["lora"]:
            raise UserError(
                f"model.adapter {model.adapter}: its layers, or their ranks and alphas, are not "
                "those of model.lora_targets, lora_ranks and lora_alphas; set these to the adapter's"
            )
    return pipe
