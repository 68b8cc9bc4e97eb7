"""What training changes, and all that a checkpoint holds."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jax_idgrpo.config import OptimizerConfig

Parameters = Any
"""A nested state of arrays, as `flax.nnx.split` gives it; also of shapes or shardings, where a state describes one."""


@flax.struct.dataclass
class TrainState:
    """Everything else of a run (prompts, batches, noise, keys) is a function of the seed and of `step`.

    step: int32 [], training steps done; the number of the step that comes next.
    params: what is trained: the adapter in reinforcement learning, the whole network in supervised training.
    ema: float32 moving average of `params`, the weights that are evaluated, exported and released.
    optimizer: the optimizer's moments and counters.
    rest: variables of the network that are not parameters but change with it, such as running means; an adapter has none.
    """

    step: Any
    params: Parameters
    ema: Parameters
    optimizer: optax.OptState
    rest: Parameters = ()


def start(
    optimizer: optax.GradientTransformation, params: Parameters, rest: Parameters = ()
) -> TrainState:
    """The state before the first step; it shares no buffer with its arguments, so that it can be donated."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.copy, params),
        ema=jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params),
        optimizer=optimizer.init(params),
        rest=jax.tree.map(jnp.copy, rest),
    )


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: `warmup` linear steps up to the peak, then constant, or a cosine that is 0 at `total_steps`."""
    peak = config.learning_rate
    warm = optax.linear_schedule(peak / (config.warmup + 1), peak, config.warmup)
    rest = max(total_steps - config.warmup, 1)
    then = (
        optax.cosine_decay_schedule(peak, rest)
        if config.schedule == "cosine"
        else optax.constant_schedule(peak)
    )
    return optax.join_schedules([warm, then], [config.warmup]) if config.warmup else then


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clipping to a global norm of `max_norm`, then AdamW (eps outside the root, decay decoupled and scaled by the learning rate)."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_norm),
        optax.adamw(
            learning_rate(config, total_steps),
            config.beta1,
            config.beta2,
            config.eps,
            mu_dtype=jnp.float32,
            weight_decay=config.weight_decay,
        ),
    )


def ema_decay(step: int | Int[Array, ""], decay: float) -> Float[Array, ""]:
    """Share of the old average that is kept, when `step` optimizer steps were done before this one."""
    return jnp.minimum((1.0 + step) / (10.0 + step), decay).astype(jnp.float32)


def ema_update(
    ema: Parameters, params: Parameters, step: int | Int[Array, ""], decay: float
) -> Parameters:
    """The average after optimizer step number `step` (0, 1, ...), float32."""
    share = 1.0 - ema_decay(step, decay)
    return jax.tree.map(
        lambda average, value: average + share * (value.astype(jnp.float32) - average), ema, params
    )


def apply_gradients(
    state: TrainState,
    gradients: Parameters,
    optimizer: optax.GradientTransformation,
    optimizer_step: int | Int[Array, ""],
    decay: float,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimizer step and one step of the average; gradients that are not finite change neither. `state.step` is the caller's.

    Args:
      optimizer_step: optimizer steps done before this one.
      decay: the average's decay after its warm-up.

    Returns:
      The state, and `gradient_norm` (global, before clipping) and `skipped` (1 if nothing was changed) to log.
    """
    norm = optax.global_norm(gradients)
    finite = jnp.isfinite(norm)
    updates, moments = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    stepped = dataclasses.replace(
        state,
        params=params,
        ema=ema_update(state.ema, params, optimizer_step, decay),
        optimizer=moments,
    )
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
    return state, {"gradient_norm": norm, "skipped": 1.0 - finite}
