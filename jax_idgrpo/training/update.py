"""The update: sum the gradients of an objective over micro-batches and noise levels, take one optimizer step. One program.

An objective's entry in `config.objectives.OBJECTIVES` says which of three kinds it is. "replay" runs the trained steps of the rollout
again; the velocity is the function that sampled them, at the same dtypes and the same batch shape, so the ratio of the first update after a
rollout is exactly 1. "latents" noises the final latents again, with noise that is a function of the row and of the optimizer step.
"reward" runs the last denoising steps again, decodes the video and scores it, all under the gradient.

A rollout lies on the devices once: its chunks are written into place as they are sampled (`store`), an update reads its share of them
there, and of a rollout that is trained in part the trained rows alone are moved (`select_rows`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from jax_idgrpo import flow, grpo, rng
from jax_idgrpo.config import GrpoConfig
from jax_idgrpo.parallel import sharding
from jax_idgrpo.sampling.conditioning import Conditioning
from jax_idgrpo.sampling.policy import Policy
from jax_idgrpo.sampling.rollout import Schedule, Trajectory
from jax_idgrpo.training.state import TrainState, apply_gradients

Rows = dict[str, Float[Array, "R"]]


@flax.struct.dataclass
class Rollout:
    """What an update trains on: C chunks of R rows, as they were sampled by one program call each; every leaf is [C,R,...].

    trajectory, conditioning: as sampled. start: first denoising step of the row's window. noise: the row's key, for noising its
    latents; the rows of a pair have one. people: what the reward compares videos with, where its gradient is trained. advantage: of
    the row. weight: 0 leaves the row out. The last two are known when all rows are scored, and None before.
    """

    trajectory: Trajectory
    conditioning: Conditioning
    start: Int[Array, "C R"]
    noise: Key[Array, "C R"]
    people: Any = None
    advantage: Float[Array, "C R"] = None
    weight: Float[Array, "C R"] = None


@functools.partial(jax.jit, static_argnums=1)
def _room(chunk: Rollout, chunks: int) -> Rollout:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (chunks, *leaf.shape)), chunk)


@functools.partial(jax.jit, donate_argnums=0)
def _write(stored: Rollout, chunk: Rollout, number: Int[Array, ""]) -> Rollout:
    def one(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(whole, part, number, axis=0)

    return jax.tree.map(one, stored, chunk)


def store(stored: Rollout | None, chunk: Rollout, number: Int[Array, ""], chunks: int) -> Rollout:
    """Write a chunk into its place of a rollout; no second copy of the rollout is made, and `stored` is donated.

    Args:
      stored: the rollout so far; None makes room for all of it.
      chunk: rows [R,...] as sampled.
      number: place of the chunk.
      chunks: how many the rollout has.
    """
    return _room(chunk, chunks) if stored is None else _write(stored, chunk, number)


@functools.partial(jax.jit, static_argnums=2)
def select_rows(rollout: Rollout, rows: Int[Array, "n"], mesh: Mesh) -> Rollout:
    """Take some rows of a rollout, counted through its chunks, as chunks of as many rows; every device ends with its share of them.

    Where rows lie on several devices, each sends one row at a time to every other, which keeps those that are its own: a plain index
    would first gather the whole rollout on every device. Of large leaves one frame or denoising step travels at a time.
    """
    shards, count = sharding.batch_shards(mesh), rollout.start.shape[1]
    if shards == 1:
        return jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[rows].reshape(-1, *leaf.shape[1:]),
            rollout,
        )
    own = count // shards

    def exchange(leaf: Array, places: tuple[Array, ...]) -> Array:
        """Rows [places,...] of a leaf [C,R/shards,...] that is divided over the devices; each place names a row for every device."""
        here = jax.lax.axis_index(sharding.ROWS)

        def one(place: tuple[Array, ...]) -> Array:
            chunk, owner, row = place

            def piece(*position: Array) -> Array:
                sent = leaf[(chunk, row, *position)]
                return jax.lax.all_to_all(sent, sharding.ROWS, 0, 0, tiled=True)[owner[here]]

            return jax.lax.map(piece, jnp.arange(leaf.shape[2])) if leaf.ndim >= LARGE else piece()

        return jax.lax.map(one, places)

    def local(tree: Rollout, rows: Array) -> Rollout:
        place = (
            rows.reshape(-1, shards, own).swapaxes(1, 2).reshape(-1, shards)
        )  # [places of one device, devices]
        places = place // count, place % count // own, place % own
        return jax.tree.map(lambda leaf: exchange(leaf, places).reshape(-1, *leaf.shape[1:]), tree)

    bits = dataclasses.replace(rollout, noise=jax.random.key_data(rollout.noise))
    spec = PartitionSpec(None, sharding.ROWS)
    taken = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False
    )(bits, rows)
    return dataclasses.replace(
        taken, noise=jax.random.wrap_key_data(taken.noise, impl=jax.random.key_impl(rollout.noise))
    )


LARGE = 6
"""Axes of the leaves of a rollout that are large: chunks, rows, frames or denoising steps, and the latents of one of them."""


@dataclasses.dataclass(frozen=True)
class UpdateRule:
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
        return 1 if self.grpo.through_reward else self.grpo.times


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


def replayed_loss(
    rule: UpdateRule,
    lora: nnx.State,
    networks: Networks,
    chunk: Rollout,
    schedule: Schedule,
    number: Int[Array, ""],
) -> Rows:
    """The objective at step `number` of the rows' windows: policy_loss, ratio and what else is logged, per row."""
    wanted, trajectory, mask = rule.grpo, chunk.trajectory, chunk.conditioning.frame_mask
    x, x_next, v_old = (
        jax.lax.dynamic_index_in_dim(array, n, axis=1, keepdims=False)
        for array, n in (
            (trajectory.x, number),
            (trajectory.x, number + 1),
            (trajectory.velocity, number),
        )
    )
    index = chunk.start + number
    transition = schedule.transition.at(index)

    def velocity(adapter: nnx.State | None) -> Array:
        return rule.policy.velocity(
            adapter,
            networks.base,
            x,
            schedule.timestep[index],
            chunk.conditioning,
            networks.negative,
        )

    v = velocity(lora)
    step = grpo.Replayed(
        transition=transition,
        dt=schedule.sigma[index + 1] - schedule.sigma[index],
        v=v,
        v_old=v_old,
        change=flow.change(transition, x, v, v_old, x_next, mask),
        advantage=chunk.advantage,
        mask=mask,
    )
    rows = wanted.definition.function(step, wanted)
    if wanted.kl > 0:
        reference = jax.lax.stop_gradient(velocity(None))
        in_std = wanted.kl_units == "std"
        rows["kl"] = (
            flow.divergence(transition, v, reference, mask)
            if in_std
            else grpo.matching_error(v, reference, mask)
        )
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
    sigma = flow.shifted(middle, schedule.shift)
    return sigma, flow.timestep(sigma)


def matched_loss(
    rule: UpdateRule,
    lora: nnx.State,
    networks: Networks,
    chunk: Rollout,
    schedule: Schedule,
    number: Int[Array, ""],
    optimizer_step: Int[Array, ""],
) -> Rows:
    """The objective at the `number`-th of `times` noise levels of the rows' final latents: policy_loss and what else is logged."""
    wanted, mask, x0 = rule.grpo, chunk.conditioning.frame_mask, chunk.trajectory.latents
    draw = optimizer_step * wanted.times + number
    sigma, timestep = _noise_level(
        wanted.levels, (number + rng.step_uniform(chunk.noise, draw)) / wanted.times, schedule
    )
    noise = rng.step_noise(chunk.noise, draw, x0.shape[1:])
    along = sigma[:, None, None, None, None]
    x, target = (1 - along) * x0 + along * noise, noise - x0

    def velocity(adapter: nnx.State | None) -> Array:
        return rule.policy.velocity(
            adapter, networks.base, x, timestep, chunk.conditioning, networks.negative
        )

    v = velocity(lora)
    v_old = jax.lax.stop_gradient(v if networks.old is None else velocity(networks.old))
    base = (
        jax.lax.stop_gradient(velocity(None)) if wanted.kl > 0 or "base" in wanted.needs else None
    )
    level = grpo.Noised(
        v=v,
        v_old=v_old,
        base=base,
        target=target,
        sigma=sigma,
        advantage=chunk.advantage,
        mask=mask,
    )
    rows = wanted.definition.function(level, wanted)
    if wanted.kl > 0:
        rows["kl"] = grpo.matching_error(v, base, mask)
    return rows


def rewarded_loss(
    rule: UpdateRule, lora: nnx.State, networks: Networks, chunk: Rollout, schedule: Schedule
) -> Rows:
    """Minus the reward of the video that the last `gradient_steps` Euler steps lead to, and the distance from the base summed over them.

    DRaFT-K (arXiv 2309.17400); with the distance from the base, IPRO. The backward pass computes denoising steps, the chunks of the
    decode and the reward again, one at a time; the most memory goes to the activations of one chunk of the decode.
    """
    wanted, conditioning = rule.grpo, chunk.conditioning
    steps = schedule.timestep.shape[0]
    last = schedule.part(steps - wanted.gradient_steps, steps)

    @jax.checkpoint
    def body(x: Array, step: tuple[Array, ...]) -> tuple[Array, Array]:
        timestep, sigma, sigma_next = step

        def velocity(adapter: nnx.State | None) -> Array:
            return rule.policy.velocity(
                adapter, networks.base, x, timestep, conditioning, networks.negative
            )

        v = velocity(lora)
        reference = jax.lax.stop_gradient(velocity(None)) if wanted.kl > 0 else v
        return flow.ode_step(x, v, sigma, sigma_next), grpo.matching_error(
            v, reference, conditioning.frame_mask
        )

    begin = jnp.squeeze(chunk.trajectory.x, axis=1)
    latents, away = jax.lax.scan(body, begin, (last.timestep, last.sigma[:-1], last.sigma[1:]))
    assert rule.score is not None
    reward = jax.checkpoint(rule.score)(networks.scorer, latents, conditioning, chunk.people)
    rows = wanted.definition.function(reward, wanted)
    return rows | ({"kl": jnp.sum(away, axis=0)} if wanted.kl > 0 else {})


def gradients(
    rule: UpdateRule,
    lora: nnx.State,
    networks: Networks,
    rollout: Rollout,
    schedule: Schedule,
    optimizer_step: Int[Array, ""],
) -> tuple[nnx.State, dict[str, Float[Array, "C K R"]]]:
    """Gradient of the mean loss over all rows that count and their K noise levels, and the rows' values to log.

    With no row left to count the mean is 0 / 0: such an update is not finite, and changes nothing.
    """
    return _gradients(
        rule, lora, networks, rollout, jnp.arange(len(rollout.start)), schedule, optimizer_step
    )


def _gradients(
    rule: UpdateRule,
    lora: nnx.State,
    networks: Networks,
    rollout: Rollout,
    chunks: Int[Array, "c"],
    schedule: Schedule,
    optimizer_step: Int[Array, ""],
) -> tuple[nnx.State, dict[str, Float[Array, "c K R"]]]:
    """`gradients` over some chunks of a rollout, which are read where they lie."""
    wanted, levels = rule.grpo, rule.noise_levels(rollout)
    weight = rollout.weight[chunks]
    weight = jnp.broadcast_to(weight[:, None], (len(chunks), levels, weight.shape[1]))
    count = jnp.sum(weight)
    scale = jnp.ones_like(weight)
    if wanted.time_weights:
        steps = rollout.start[chunks][:, None] + jnp.arange(levels)[:, None]
        scale = grpo.time_weights(schedule.transition.at(steps).weight, weight)

    def loss(
        lora: nnx.State, chunk: Rollout, number: Array, weight: Array, scale: Array
    ) -> tuple[Array, Rows]:
        if wanted.replays:
            rows = replayed_loss(rule, lora, networks, chunk, schedule, number)
        elif wanted.through_reward:
            rows = rewarded_loss(rule, lora, networks, chunk, schedule)
        else:
            rows = matched_loss(rule, lora, networks, chunk, schedule, number, optimizer_step)
        total = scale * rows["policy_loss"] + wanted.kl * rows.get("kl", 0.0)
        return jnp.sum(jnp.where(weight > 0, weight * total, 0.0)), rows

    def body(total: nnx.State, position: tuple[Array, ...]) -> tuple[nnx.State, Rows]:
        c, number, weight, scale = position
        chunk = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, c, keepdims=False), rollout
        )
        gradient, rows = jax.grad(loss, has_aux=True)(lora, chunk, number, weight, scale)
        return jax.tree.map(lambda sum_, leaf: sum_ + leaf / count, total, gradient), rows

    positions = (
        jnp.repeat(chunks, levels),
        jnp.tile(jnp.arange(levels), len(chunks)),
        weight.reshape(len(chunks) * levels, -1),
        scale.reshape(len(chunks) * levels, -1),
    )
    total, rows = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, lora), positions)
    return total, {name: value.reshape(len(chunks), levels, -1) for name, value in rows.items()}


def share(optimizer_step: int | Int[Array, ""], chunks: int, shares: int) -> Int[Array, "c"]:
    """Numbers of the chunks of an update: of `shares` equal parts of the `chunks` of a rollout, the one whose turn it is."""
    size = chunks // shares
    return optimizer_step % shares * size + jnp.arange(size)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def update(
    rule: UpdateRule,
    state: TrainState,
    networks: Networks,
    rollout: Rollout,
    schedule: Schedule,
    optimizer_step: Int[Array, ""],
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimizer step on a rollout, or on one of its `grpo.updates` equal shares; a gradient that is not finite changes nothing and
    is counted.

    optimizer_step: optimizer steps done before this one; it says whose turn it is among the shares. `state.step` is the caller's.
    """
    chunks = share(optimizer_step, len(rollout.start), rule.grpo.updates)
    gradient, rows = _gradients(
        rule, state.params, networks, rollout, chunks, schedule, optimizer_step
    )
    state, norms = apply_gradients(state, gradient, rule.optimizer, optimizer_step, rule.ema_decay)
    counted = rollout.weight[chunks][:, None] > 0
    ratio = rows.pop("ratio", None)
    scalars = {name: jnp.mean(value, where=counted) for name, value in rows.items()}
    if ratio is not None:
        scalars |= {
            "ratio_min": jnp.min(ratio, where=counted, initial=jnp.inf),
            "ratio_max": jnp.max(ratio, where=counted, initial=0.0),
        }
    return state, {**scalars, **norms}
