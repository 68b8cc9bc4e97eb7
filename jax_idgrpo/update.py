"""The GRPO update: replay the trained steps of a rollout, sum gradients over micro-batches and steps, take one optimizer step.

One program. The velocity is the function that sampled the trajectory, at the same dtypes and the same batch shape, so the ratio of
the first update after a rollout is exactly 1.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_idgrpo import flow, grpo
from jax_idgrpo.conditioning import Conditioning
from jax_idgrpo.config import GrpoConfig
from jax_idgrpo.optimizer import apply_gradients
from jax_idgrpo.policy import Policy
from jax_idgrpo.rollout import Schedule, Trajectory
from jax_idgrpo.state import TrainState


@flax.struct.dataclass
class Rollout:
    """What an update replays, in C chunks of R rows, one program call each when they were sampled.

    trajectory: x [C,S+1,R,N,H,W,16], velocity [C,S,R,N,H,W,16], log_prob [C,S,R]. conditioning: every leaf [C,R,...]. advantage: [C,R].
    """

    trajectory: Trajectory
    conditioning: Conditioning
    advantage: Float[Array, "C R"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Everything about an update that is fixed for a run (hashable: one program per value)."""

    policy: Policy
    grpo: GrpoConfig
    optimizer: optax.GradientTransformation
    ema_decay: float


def step_loss(
    objective: Objective,
    lora: nnx.State,
    base: nnx.State,
    negative: Float[Array, "L D"],
    chunk: Rollout,
    schedule: Schedule,
    index: Int[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Float[Array, "R"]]]:
    """Sum over the rows of one chunk of the loss at denoising step `index`; and per-row values to log."""
    x, x_next, v_old = (
        jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
        for array, i in ((chunk.trajectory.x, index), (chunk.trajectory.x, index + 1), (chunk.trajectory.velocity, index))
    )
    sigmas, mask = (schedule.sigma[index], schedule.sigma[index + 1], schedule.sigma[1]), chunk.conditioning.frame_mask

    def velocity(adapter: nnx.State | None) -> Array:
        return objective.policy.velocity(adapter, base, x, schedule.timestep[index], chunk.conditioning, negative)

    v = velocity(lora)
    log_ratio = flow.log_ratio(x, v, v_old, *sigmas, x_next, mask)
    clipped = grpo.clipped_loss(log_ratio, chunk.advantage, clip=objective.grpo.clip)
    rows = {
        "ratio": clipped.ratio,
        "policy_loss": clipped.loss,
        "approx_kl": 0.5 * log_ratio**2,
        "clip_fraction": (jnp.abs(clipped.ratio - 1) > objective.grpo.clip).astype(jnp.float32),
    }
    loss = clipped.loss
    if objective.grpo.kl > 0:
        new, reference = (flow.sde_step(x, value, *sigmas, x_next=x_next) for value in (v, jax.lax.stop_gradient(velocity(None))))
        rows["kl"] = flow.kl(new.mean, reference.mean, new.std, mask)
        loss = loss + objective.grpo.kl * rows["kl"]
    return jnp.sum(loss), rows


def gradients(
    objective: Objective,
    lora: nnx.State,
    base: nnx.State,
    negative: Float[Array, "L D"],
    rollout: Rollout,
    schedule: Schedule,
    trained: Int[Array, "K"],
) -> tuple[nnx.State, dict[str, Float[Array, "C K R"]]]:
    """Gradient of the mean loss over all rows and trained steps, and the rows' values to log."""
    count = rollout.advantage.size * trained.size
    chunks = rollout.advantage.shape[0]

    def body(total: nnx.State, position: tuple[Array, Array]) -> tuple[nnx.State, dict[str, Array]]:
        c, index = position
        chunk = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, c, keepdims=False), rollout)
        gradient, rows = jax.grad(
            lambda adapter: step_loss(objective, adapter, base, negative, chunk, schedule, index), has_aux=True
        )(lora)
        return jax.tree.map(lambda sum_, leaf: sum_ + leaf / count, total, gradient), rows

    positions = jnp.repeat(jnp.arange(chunks), trained.size), jnp.tile(trained, chunks)
    total, rows = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, lora), positions)
    return total, {name: value.reshape(chunks, trained.size, -1) for name, value in rows.items()}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def update(
    objective: Objective,
    state: TrainState,
    base: nnx.State,
    negative: Float[Array, "L D"],
    rollout: Rollout,
    schedule: Schedule,
    trained: Int[Array, "K"],
    optimizer_step: Int[Array, ""],
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimizer step on one rollout, or on one share of it; a gradient that is not finite changes nothing and is counted.

    trained: denoising steps to replay. optimizer_step: optimizer steps done before this one. `state.step` is the caller's.
    """
    gradient, rows = gradients(objective, state.params, base, negative, rollout, schedule, trained)
    state, norms = apply_gradients(state, gradient, objective.optimizer, optimizer_step, objective.ema_decay)
    means = {name: jnp.mean(value) for name, value in rows.items() if name != "ratio"}
    return state, {**means, **norms, "ratio_min": jnp.min(rows["ratio"]), "ratio_max": jnp.max(rows["ratio"])}
