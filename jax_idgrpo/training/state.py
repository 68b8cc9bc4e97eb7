"""What training changes, and all that a checkpoint holds."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

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


def start(optimizer: optax.GradientTransformation, params: Parameters, rest: Parameters = ()) -> TrainState:
    """The state before the first step; it shares no buffer with its arguments, so that it can be donated."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.copy, params),
        ema=jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params),
        optimizer=optimizer.init(params),
        rest=jax.tree.map(jnp.copy, rest),
    )
