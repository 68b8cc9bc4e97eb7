"""Define the training state (the content of a checkpoint), optimizer and moving average."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Int, PyTree

from jax_idgrpo.config import OptimizerConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.models import experts

Parameters: TypeAlias = PyTree
"""A nested state of arrays, as returned by `flax.nnx.split`; or of their shapes or shardings."""


@flax.struct.dataclass
class TrainState:
    """Complete state of a run. Prompts, batches, noise and keys are functions of seed and `step`.

    Attributes:
      step: int32 [], training steps done, which is the number of the next step.
      params: trained parameters: in reinforcement learning the adapter, or trained weights in
        float32; in supervised training the whole network. With two experts, params, ema and
        optimizer are an `experts.Pair`.
      ema: float32 moving average of `params`; these weights are evaluated and exported.
      optimizer: moments and counters of the optimizer.
      rest: variables of the network that change but are not parameters, such as running means.
        Empty for an adapter.
    """

    step: Any
    params: Parameters
    ema: Parameters
    optimizer: optax.OptState
    rest: Parameters = ()


def start(
    optimizer: optax.GradientTransformation | experts.Pair[optax.GradientTransformation],
    params: Parameters,
    rest: Parameters = (),
) -> TrainState:
    """Make the state before the first step.

    It shares no buffer with the arguments, so that it can be donated.

    Args:
      optimizer: as made by `make_optimizer`, one per expert.
      params: initial trained parameters.
      rest: variables that change but are not parameters.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.copy, params),
        ema=jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params),
        optimizer=experts.together(
            [
                own.init(part)
                for own, part in zip(experts.each(optimizer), experts.each(params), strict=True)
            ]
        ),
        rest=jax.tree.map(jnp.copy, rest),
    )


def of_experts(state: TrainState) -> list[TrainState]:
    """Split a state into those of the experts; the state of one transformer is the only one."""
    parts = zip(*map(experts.each, (state.params, state.ema, state.optimizer)), strict=True)
    return [
        dataclasses.replace(state, params=params, ema=ema, optimizer=optimizer)
        for params, ema, optimizer in parts
    ]


def join_experts(states: Sequence[TrainState]) -> TrainState:
    """Join the states of the experts; inverse of `of_experts`."""
    parts = {
        name: experts.together([getattr(state, name) for state in states])
        for name in ("params", "ema", "optimizer")
    }
    return dataclasses.replace(states[0], **parts)


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Make the schedule of the learning rate by optimizer step.

    The rate rises linearly for `warmup` steps. Then it is constant, or decays as a cosine to 0 at
    `total_steps`.
    """
    peak = config.learning_rate
    warm = optax.linear_schedule(peak / (config.warmup + 1), peak, config.warmup)
    rest = max(total_steps - config.warmup, 1)
    then = (
        optax.cosine_decay_schedule(peak, rest)
        if config.schedule == "cosine"
        else optax.constant_schedule(peak)
    )
    return optax.join_schedules([warm, then], [config.warmup]) if config.warmup else then


MUON_RMS = 0.2
"""Root mean square of Muon's updates relative to the learning rate, as measured for AdamW.

Source: arXiv 2502.16982. One learning rate then serves both optimizers.
"""


def matrices(params: Parameters) -> PyTree:
    """Mark the parameters that Muon trains, for `optax.contrib.muon`.

    They are the kernels of stacked layers, [layers, in, out]. Muon orthogonalises the update of
    each layer. Kernels outside the layers (embeddings, output) are left to AdamW, as published.

    Raises:
      UserError: there is no such kernel.
    """

    def mark(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        stacked = leaf.ndim == 3 and "kernel" in jax.tree_util.keystr(path)
        return optax.contrib.MuonDimensionNumbers(1, 2) if stacked else None

    marked = jax.tree_util.tree_map_with_path(mark, params)
    if not jax.tree.leaves(marked):
        raise UserError(
            "optimizer.name is muon, and the trained network has no stacked weight matrices; use "
            "adamw"
        )
    return marked


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Make AdamW or Muon with gradient clipping to a global norm of `max_norm`.

    AdamW adds `eps` outside the square root. Weight decay is decoupled and scaled by the learning
    rate. With Muon, all momentum is Nesterov's, also that of the parameters that AdamW trains.
    """
    rate = learning_rate(config, total_steps)
    if config.name == "muon":
        update = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            mu_dtype=jnp.float32,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=config.weight_decay,
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=MUON_RMS,
        )
    else:
        update = optax.adamw(
            rate,
            config.beta1,
            config.beta2,
            config.eps,
            mu_dtype=jnp.float32,
            weight_decay=config.weight_decay,
        )
    return optax.chain(optax.clip_by_global_norm(config.max_norm), update)


def ema_decay(step: int | Int[Array, ""], decay: float) -> Float[Array, ""]:
    """Return the decay of the moving average after `step` optimizer steps, with warm-up."""
    return jnp.minimum((1.0 + step) / (10.0 + step), decay).astype(jnp.float32)


def ema_update(
    ema: Parameters, params: Parameters, step: int | Int[Array, ""], decay: float
) -> Parameters:
    """Update the moving average in float32.

    Args:
      ema: average before the step.
      params: parameters after the step.
      step: number of the optimizer step, from 0.
      decay: decay after the warm-up, in [0, 1).
    """
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
    """Update parameters and moving average by one optimizer step.

    Non-finite gradients change nothing. The caller increments `state.step`.

    Args:
      state: state before the step.
      gradients: gradients of `state.params`.
      optimizer: as made by `make_optimizer`.
      optimizer_step: optimizer steps done before this one.
      decay: decay of the moving average after its warm-up, in [0, 1).

    Returns:
      The new state, and values to log: `gradient_norm` (global, before clipping) and `skipped` (1
      if the gradients were not finite, else 0).
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
