"""The update: sum the gradients of an objective over micro-batches and noise levels, take one optimizer step. One program.

Objectives on replayed steps (clip, guard, divergence) run the trained steps of the rollout again. The velocity is the function that
sampled them, at the same dtypes and the same batch shape, so the ratio of the first update after a rollout is exactly 1. Objectives on
the final latents (nft, awm, dpo, sft) noise them again, with noise that is a function of the row and of the optimizer step. The
gradient of the reward runs the last denoising steps again, decodes the video and scores it, all under the gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int, Key

from jax_idgrpo import flow, grpo, rng
from jax_idgrpo.config import GrpoConfig
from jax_idgrpo.sampling.conditioning import Conditioning
from jax_idgrpo.sampling.policy import Policy
from jax_idgrpo.sampling.rollout import Schedule, Trajectory
from jax_idgrpo.training.state import TrainState, apply_gradients

Rows = dict[str, Float[Array, "R"]]


@flax.struct.dataclass
class Rollout:
    """What an update trains on, in C chunks of R rows, one program call each when they were sampled; every leaf is [C,R,...].

    trajectory, conditioning: as sampled. start: first denoising step of the row's window. advantage: of the row. weight: 0 leaves the
    row out. noise: the row's key, for noising its latents; the rows of a pair have one. people: what the reward compares videos with.
    """

    trajectory: Trajectory
    conditioning: Conditioning
    start: Int[Array, "C R"]
    advantage: Float[Array, "C R"]
    weight: Float[Array, "C R"]
    noise: Key[Array, "C R"]
    people: Any = None


@jax.jit
def gather(
    chunks: Sequence[tuple[Trajectory, Conditioning, Int[Array, "R"], Key[Array, "R"], Any]],
    advantage: Float[ArrayLike, "C R"],
    weight: Float[ArrayLike, "C R"],
    picks: Int[ArrayLike, "n"] | None = None,
) -> Rollout:
    """The chunks of a rollout (trajectory, conditioning, start, noise, people) as one; of it the rows `picks`, counted through them."""
    trajectory, conditioning, start, noise, people = jax.tree.map(lambda *leaves: jnp.stack(leaves), *chunks)
    whole = Rollout(
        trajectory=trajectory, conditioning=conditioning, start=start, advantage=advantage, weight=weight, noise=noise, people=people
    )
    if picks is None:
        return whole
    rows = advantage.shape[1]
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[picks].reshape(-1, rows, *leaf.shape[2:]), whole)


def share(rollout: Rollout, number: int, shares: int) -> Rollout:
    """The `number`-th of equal shares of a rollout's chunks."""
    size = len(rollout.advantage) // shares
    return jax.tree.map(lambda leaf: leaf[number * size : (number + 1) * size], rollout)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Everything about an update that is fixed for a run (hashable: one program per value).

    score: (Networks.scorer, latents, conditioning, people) -> reward [R], for the gradient of the reward.
    """

    policy: Policy
    grpo: GrpoConfig
    optimizer: optax.GradientTransformation
    ema_decay: float
    score: Callable[..., Float[Array, "R"]] | None = None

    def noise_levels(self, rollout: Rollout) -> int:
        """Steps or noise levels that each row is trained at."""
        velocity = rollout.trajectory.velocity
        if velocity is not None:
            return velocity.shape[2]
        return 1 if self.grpo.objective == "reward_gradient" else self.grpo.times


@flax.struct.dataclass
class Networks:
    """What does not change in an update: the frozen base, the encoded negative prompt, the adapter that sampled the rollout, and the
    arrays that the reward runs on.

    old is None where it is the trained adapter itself, or where the rollout kept its velocities; scorer where no gradient runs through it.
    """

    base: nnx.State
    negative: Float[Array, "L D"]
    old: nnx.State | None = None
    scorer: Any = None


def _surrogate_rows(surrogate: grpo.Surrogate) -> Rows:
    return {
        "ratio": surrogate.ratio,
        "policy_loss": surrogate.loss,
        "approx_kl": 0.5 * jnp.log(surrogate.ratio) ** 2,
        "clip_fraction": surrogate.stopped.astype(jnp.float32),
    }


def replayed_loss(
    objective: Objective, lora: nnx.State, networks: Networks, chunk: Rollout, schedule: Schedule, number: Int[Array, ""]
) -> Rows:
    """The objective at step `number` of the rows' windows: policy_loss, ratio and what else is logged, per row."""
    wanted, trajectory, mask = objective.grpo, chunk.trajectory, chunk.conditioning.frame_mask
    x, x_next, v_old = (
        jax.lax.dynamic_index_in_dim(array, n, axis=1, keepdims=False)
        for array, n in ((trajectory.x, number), (trajectory.x, number + 1), (trajectory.velocity, number))
    )
    index = chunk.start + number
    transition = schedule.transition.at(index)

    def velocity(adapter: nnx.State | None) -> Array:
        return objective.policy.velocity(adapter, networks.base, x, schedule.timestep[index], chunk.conditioning, networks.negative)

    v = velocity(lora)
    change = flow.change(transition, x, v, v_old, x_next, mask)
    if wanted.objective == "guard":
        dt = schedule.sigma[index + 1] - schedule.sigma[index]
        surrogate = grpo.guarded_loss(change.guarded, chunk.advantage, dt, clip=wanted.clip)
    elif wanted.objective == "divergence":
        distance = jax.lax.stop_gradient(flow.divergence(transition, v, v_old, mask))
        surrogate = grpo.masked_loss(change.log_ratio, distance, chunk.advantage, limit=wanted.divergence)
    else:
        surrogate = grpo.clipped_loss(change.log_ratio, chunk.advantage, clip=wanted.clip)
    rows = _surrogate_rows(surrogate)
    if wanted.kl > 0:
        reference = jax.lax.stop_gradient(velocity(None))
        in_std = wanted.kl_units == "std"
        rows["kl"] = flow.divergence(transition, v, reference, mask) if in_std else grpo.matching_error(v, reference, mask)
    return rows


def _noise_level(
    levels: str, u: Float[Array, "R"], schedule: Schedule
) -> tuple[Float[Array, "R"], Int[Array, "R"]]:
    """sigma and timestep of each row from a number in [0, 1)."""
    if levels == "grid":
        noisiest = int(0.9 * schedule.timestep.shape[0])
        index = (u * noisiest).astype(jnp.int32)
        return schedule.sigma[index], schedule.timestep[index]
    middle = jax.nn.sigmoid(jax.scipy.special.ndtri(jnp.clip(u, 1e-6, 1 - 1e-6)))
    sigma = schedule.shift * middle / (1 + (schedule.shift - 1) * middle)
    return sigma, (1000 * sigma).astype(jnp.int32)


def matched_loss(
    objective: Objective,
    lora: nnx.State,
    networks: Networks,
    chunk: Rollout,
    schedule: Schedule,
    number: Int[Array, ""],
    optimizer_step: Int[Array, ""],
) -> Rows:
    """The objective at the `number`-th of `times` noise levels of the rows' final latents: policy_loss and what else is logged."""
    wanted, mask, x0 = objective.grpo, chunk.conditioning.frame_mask, chunk.trajectory.latents
    draw = optimizer_step * wanted.times + number
    sigma, timestep = _noise_level(wanted.levels, (number + rng.step_uniform(chunk.noise, draw)) / wanted.times, schedule)
    noise = rng.step_noise(chunk.noise, draw, x0.shape[1:])
    along = sigma[:, None, None, None, None]
    x, target = (1 - along) * x0 + along * noise, noise - x0

    def velocity(adapter: nnx.State | None) -> Array:
        return objective.policy.velocity(adapter, networks.base, x, timestep, chunk.conditioning, networks.negative)

    v = velocity(lora)
    v_old = jax.lax.stop_gradient(v if networks.old is None else velocity(networks.old))
    reference = jax.lax.stop_gradient(velocity(None)) if wanted.kl > 0 or wanted.objective == "dpo" else None
    rows: Rows = {}
    if wanted.objective == "nft":
        rows["policy_loss"] = grpo.nft_loss(
            v, v_old, target, sigma, chunk.advantage,
            beta=wanted.nft_beta, advantage_clip=wanted.advantage_clip, normalise=wanted.nft_normalise, mask=mask,
        )
    elif wanted.objective == "awm":
        rows = _surrogate_rows(
            grpo.awm_loss(v, v_old, target, sigma, chunk.advantage, clip=wanted.clip, weighting=wanted.awm_weighting, mask=mask)
        )
    elif wanted.objective == "dpo":
        rows["policy_loss"] = grpo.dpo_loss(v, reference, target, beta=wanted.dpo_beta, mask=mask)
    else:
        rows["policy_loss"] = grpo.matching_error(v, target, mask)
    if wanted.kl > 0:
        rows["kl"] = grpo.matching_error(v, reference, mask)
    return rows


def rewarded_loss(objective: Objective, lora: nnx.State, networks: Networks, chunk: Rollout, schedule: Schedule) -> Rows:
    """Minus the reward of the video that the last `gradient_steps` Euler steps lead to, and the distance from the base summed over them.

    DRaFT-K (arXiv 2309.17400); with the distance from the base, IPRO. Memory is that of one denoising step and one decode.
    """
    wanted, conditioning = objective.grpo, chunk.conditioning
    steps = schedule.timestep.shape[0]
    last = schedule.part(steps - wanted.gradient_steps, steps)

    @jax.checkpoint
    def body(x: Array, step: tuple[Array, ...]) -> tuple[Array, Array]:
        timestep, sigma, sigma_next = step

        def velocity(adapter: nnx.State | None) -> Array:
            return objective.policy.velocity(adapter, networks.base, x, timestep, conditioning, networks.negative)

        v = velocity(lora)
        reference = jax.lax.stop_gradient(velocity(None)) if wanted.kl > 0 else v
        return flow.ode_step(x, v, sigma, sigma_next), grpo.matching_error(v, reference, conditioning.frame_mask)

    begin = jnp.squeeze(chunk.trajectory.x, axis=1)
    latents, away = jax.lax.scan(body, begin, (last.timestep, last.sigma[:-1], last.sigma[1:]))
    assert objective.score is not None
    reward = jax.checkpoint(objective.score)(networks.scorer, latents, conditioning, chunk.people)
    return {"policy_loss": -reward} | ({"kl": jnp.sum(away, axis=0)} if wanted.kl > 0 else {})


def gradients(
    objective: Objective,
    lora: nnx.State,
    networks: Networks,
    rollout: Rollout,
    schedule: Schedule,
    optimizer_step: Int[Array, ""],
) -> tuple[nnx.State, dict[str, Float[Array, "C K R"]]]:
    """Gradient of the mean loss over all rows that count and their K noise levels, and the rows' values to log.

    With no row left to count the mean is 0 / 0: such an update is not finite, and changes nothing.
    """
    wanted, (chunks, _), levels = objective.grpo, rollout.advantage.shape, objective.noise_levels(rollout)
    weight = jnp.broadcast_to(rollout.weight[:, None], (chunks, levels, rollout.weight.shape[1]))
    count = jnp.sum(weight)
    scale = jnp.ones_like(weight)
    if wanted.time_weights:
        steps = rollout.start[:, None] + jnp.arange(levels)[:, None]
        scale = grpo.time_weights(schedule.transition.at(steps).weight, weight)

    def loss(lora: nnx.State, chunk: Rollout, number: Array, weight: Array, scale: Array) -> tuple[Array, Rows]:
        if wanted.replays:
            rows = replayed_loss(objective, lora, networks, chunk, schedule, number)
        elif wanted.objective == "reward_gradient":
            rows = rewarded_loss(objective, lora, networks, chunk, schedule)
        else:
            rows = matched_loss(objective, lora, networks, chunk, schedule, number, optimizer_step)
        total = scale * rows["policy_loss"] + wanted.kl * rows.get("kl", 0.0)
        return jnp.sum(jnp.where(weight > 0, weight * total, 0.0)), rows

    def body(total: nnx.State, position: tuple[Array, ...]) -> tuple[nnx.State, Rows]:
        c, number, weight, scale = position
        chunk = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, c, keepdims=False), rollout)
        gradient, rows = jax.grad(loss, has_aux=True)(lora, chunk, number, weight, scale)
        return jax.tree.map(lambda sum_, leaf: sum_ + leaf / count, total, gradient), rows

    positions = (
        jnp.repeat(jnp.arange(chunks), levels),
        jnp.tile(jnp.arange(levels), chunks),
        weight.reshape(chunks * levels, -1),
        scale.reshape(chunks * levels, -1),
    )
    total, rows = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, lora), positions)
    return total, {name: value.reshape(chunks, levels, -1) for name, value in rows.items()}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def update(
    objective: Objective,
    state: TrainState,
    networks: Networks,
    rollout: Rollout,
    schedule: Schedule,
    optimizer_step: Int[Array, ""],
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimizer step on one rollout, or on one share of it; a gradient that is not finite changes nothing and is counted.

    optimizer_step: optimizer steps done before this one. `state.step` is the caller's.
    """
    gradient, rows = gradients(objective, state.params, networks, rollout, schedule, optimizer_step)
    state, norms = apply_gradients(state, gradient, objective.optimizer, optimizer_step, objective.ema_decay)
    counted = rollout.weight[:, None] > 0
    ratio = rows.pop("ratio", None)
    scalars = {name: jnp.mean(value, where=counted) for name, value in rows.items()}
    if ratio is not None:
        scalars |= {"ratio_min": jnp.min(ratio, where=counted, initial=jnp.inf), "ratio_max": jnp.max(ratio, where=counted, initial=0.0)}
    return state, {**scalars, **norms}
