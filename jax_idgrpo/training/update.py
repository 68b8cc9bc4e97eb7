"""Update the adapter: accumulate gradients over micro-batches and noise levels, step the optimizer.

The update is one program. `config.objectives.OBJECTIVES` assigns each objective one of three kinds:

    replay   recomputes the trained steps of the rollout, by the same velocity function at the same
             dtypes and batch shape. The ratio of the first update after a rollout is exactly 1.
    latents  adds noise to the final latents. The noise is a function of row and optimizer step.
    reward   recomputes the last denoising steps, decodes and scores the video, and differentiates
             through all of it.

The devices store a rollout only once. Chunks are written in place as they are sampled (`store`),
and an update reads its share in place. If only some rows are trained, only those are moved
(`select_rows`).

With two experts, the rows of a call are in the steps of the same expert at each step of their
windows, and only this expert gets a gradient. An update changes the experts that the windows
reach. The other one, its average and its moments stay as they are.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
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
from jax_idgrpo.config.objectives import LATENTS, REPLAY, REWARD
from jax_idgrpo.models import experts
from jax_idgrpo.parallel import sharding
from jax_idgrpo.sampling.conditioning import Conditioning
from jax_idgrpo.sampling.policy import Policy, PolicyInputs
from jax_idgrpo.sampling.rollout import Schedule, Trajectory
from jax_idgrpo.training.state import TrainState, apply_gradients, join_experts, of_experts

Rows = dict[str, Float[Array, " R"]]


@flax.struct.dataclass
class Rollout:
    """Data of an update: C chunks of R rows, one program call each. Leaves are [C,R,...].

    Attributes:
      trajectory: sampled latents and velocities.
      conditioning: conditioning of the rows.
      start: first denoising step of the row's window.
      noise: random key for adding noise to the row's latents. Both rows of a pair have the same.
      people: encoded references, if the reward is differentiated; else None.
      advantage: advantage of the row; None before all rows are scored.
      weight: 1, or 0 to exclude the row; None before all rows are scored.
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
    """Write a chunk into a rollout without copying the rollout; `stored` is donated.

    Args:
      stored: the rollout so far; None allocates it.
      chunk: sampled rows, [R,...].
      number: index of the chunk, in [0, chunks).
      chunks: number of chunks of the rollout.
    """
    return _room(chunk, chunks) if stored is None else _write(stored, chunk, number)


@functools.partial(jax.jit, static_argnums=2)
def select_rows(rollout: Rollout, rows: Int[Array, " n"], mesh: Mesh) -> Rollout:
    """Select rows of a rollout; the result is sharded over the devices like the rollout.

    On several devices, rows are exchanged one at a time by all-to-all. Plain indexing would gather
    the whole rollout on every device first. Large leaves are exchanged one frame or denoising step
    at a time.

    Args:
      rollout: C chunks of R rows.
      rows: indices in [0, C R). Their number is a multiple of R.
      mesh: devices of the rollout.

    Returns:
      The selected rows as chunks of R rows.
    """
    shards, count = sharding.batch_shards(mesh), rollout.start.shape[1]
    if shards == 1:
        return jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[rows].reshape(-1, *leaf.shape[1:]),
            rollout,
        )
    own = count // shards

    def exchange(leaf: Array, places: tuple[Array, ...]) -> Array:
        """Exchange rows of a sharded leaf [C,R/shards,...]; a place has one row per device."""
        here = jax.lax.axis_index(sharding.ROWS)

        def one(place: tuple[Array, ...]) -> Array:
            chunk, owner, row = place

            def piece(*position: Array) -> Array:
                sent = leaf[(chunk, row, *position)]
                return jax.lax.all_to_all(sent, sharding.ROWS, 0, 0, tiled=True)[owner[here]]

            return jax.lax.map(piece, jnp.arange(leaf.shape[2])) if leaf.ndim >= LARGE else piece()

        return jax.lax.map(one, places)

    def local(tree: Rollout, rows: Array) -> Rollout:
        # [places of one device, devices]
        place = rows.reshape(-1, shards, own).swapaxes(1, 2).reshape(-1, shards)
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
"""Number of axes of large leaves: chunks, rows, frames or denoising steps, and three or more."""


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """Static part of an update, fixed for a run. Hashable: one program is compiled per value.

    Attributes:
      policy: structure of the transformer, or of both experts.
      grpo: settings of the objective.
      optimizer: as made by `make_optimizer`, one per expert.
      ema_decay: decay of the moving average after its warm-up, in [0, 1).
      score: (Networks.scorer, latents, conditioning, people) -> reward [R]; None unless the reward
        is differentiated.
    """

    policy: Policy
    grpo: GrpoConfig
    optimizer: optax.GradientTransformation | experts.Pair[optax.GradientTransformation]
    ema_decay: float
    score: Callable[..., Float[Array, " R"]] | None = None

    def of(self, expert: int) -> "UpdateRule":
        """Return the rule of one expert."""
        return dataclasses.replace(
            self, policy=self.policy.of(expert), optimizer=experts.each(self.optimizer)[expert]
        )

    def noise_levels(self, rollout: Rollout) -> int:
        """Return the number of steps or noise levels at which each row is trained."""
        velocity = rollout.trajectory.velocity
        if velocity is not None:
            return velocity.shape[2]
        return 1 if self.grpo.through_reward else self.grpo.times


@flax.struct.dataclass
class Networks:
    """Arrays that an update does not change.

    Attributes:
      base: frozen weights of the transformer, or of both experts; None for an expert that the
        update does not run.
      negative: encoded negative prompt.
      reference: trained parameters of the base, with which the objective compares; None for an
        adapter, whose base is the network without it, and if the objective does not compare.
      old: parameters that sampled the rollout; None if they equal the trained ones, or if the
        rollout stores its velocities.
      scorer: the VAE, and the state of the reward's networks; None unless the reward is
        differentiated.
    """

    base: nnx.State | experts.Pair[nnx.State | None]
    negative: Float[Array, "L D"]
    reference: nnx.State | None = None
    old: nnx.State | None = None
    scorer: Any = None

    def of(self, expert: int) -> "Networks":
        """Return the arrays of one expert."""
        return dataclasses.replace(self, base=experts.each(self.base)[expert])


@flax.struct.dataclass
class LossInputs:
    """Everything that the loss of one chunk at one noise level depends on besides the adapter.

    Attributes:
      networks: arrays that do not change.
      chunk: R rows of the rollout.
      schedule: noise schedule of the rollout.
      number: step within the window, or index of the noise level in [0, times); from 0.
      optimizer_step: optimizer steps done before this one; varies the noise of new noise levels.
    """

    networks: Networks
    chunk: Rollout
    schedule: Schedule
    number: Int[Array, ""]
    optimizer_step: Int[Array, ""]

    def policy_inputs(self, lora: nnx.State | None) -> PolicyInputs:
        """Return the inputs of the policy with an adapter, or without one."""
        networks = self.networks
        return PolicyInputs(lora, networks.base, self.chunk.conditioning, networks.negative)


def replayed_loss(rule: UpdateRule, lora: nnx.State, given: LossInputs) -> Rows:
    """Compute the objective of kind "replay" at one step of the rows' windows.

    Args:
      rule: static part of the update.
      lora: adapter to differentiate.
      given: the other inputs.

    Returns:
      `policy_loss`, `ratio` and other logged values, per row.
    """
    chunk, schedule, number = given.chunk, given.schedule, given.number
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
        inputs = given.policy_inputs(adapter)
        return rule.policy.velocity(inputs, x, schedule.timestep[index])

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
        reference = jax.lax.stop_gradient(velocity(given.networks.reference))
        in_std = wanted.kl_units == "std"
        rows["kl"] = (
            flow.divergence(transition, v, reference, mask)
            if in_std
            else grpo.matching_error(v, reference, mask)
        )
    return rows


def noise_level(
    levels: str, u: Float[Array, " R"], schedule: Schedule
) -> tuple[Float[Array, " R"], Int[Array, " R"]]:
    """Map a number in [0, 1) per row to sigma and timestep.

    Args:
      levels: `grpo.levels`.
      u: the numbers.
      schedule: noise schedule of the rollout.
    """
    if levels == "grid":
        noisiest = int(0.9 * schedule.timestep.shape[0])
        index = (u * noisiest).astype(jnp.int32)
        return schedule.sigma[index], schedule.timestep[index]
    middle = jax.nn.sigmoid(jax.scipy.special.ndtri(jnp.clip(u, 1e-6, 1 - 1e-6)))
    sigma = flow.shifted(middle, schedule.shift)
    return sigma, flow.timestep(sigma)


def matched_loss(rule: UpdateRule, lora: nnx.State, given: LossInputs) -> Rows:
    """Compute the objective of kind "latents" at one noise level of the rows' final latents.

    Args:
      rule: static part of the update.
      lora: adapter to differentiate.
      given: the other inputs.

    Returns:
      `policy_loss` and other logged values, per row.
    """
    networks, chunk, wanted = given.networks, given.chunk, rule.grpo
    mask, x0 = chunk.conditioning.frame_mask, chunk.trajectory.latents
    draw = given.optimizer_step * wanted.times + given.number
    u = (given.number + rng.step_uniform(chunk.noise, draw)) / wanted.times
    sigma, timestep = noise_level(wanted.levels, u, given.schedule)
    noise = rng.step_noise(chunk.noise, draw, x0.shape[1:])
    along = sigma[:, None, None, None, None]
    x, target = (1 - along) * x0 + along * noise, noise - x0

    def velocity(adapter: nnx.State | None) -> Array:
        return rule.policy.velocity(given.policy_inputs(adapter), x, timestep)

    v = velocity(lora)
    v_old = jax.lax.stop_gradient(v if networks.old is None else velocity(networks.old))
    base = (
        jax.lax.stop_gradient(velocity(networks.reference)) if wanted.compares_with_base else None
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


def rewarded_loss(rule: UpdateRule, lora: nnx.State, given: LossInputs) -> Rows:
    """Compute the objective of kind "reward": minus the reward after `gradient_steps` Euler steps.

    The distance from the base is summed over these steps, weighted by `grpo.kl_weights`. The method
    is DRaFT-K (arXiv 2309.17400),
    and IPRO with the distance from the base. The backward pass rematerialises the denoising steps,
    the chunks of the decoder and the reward one at a time. The activations of one decoder chunk
    dominate the memory.

    Args:
      rule: static part of the update.
      lora: adapter to differentiate.
      given: the other inputs.

    Returns:
      `policy_loss` and other logged values, per row.
    """
    wanted, chunk, conditioning = rule.grpo, given.chunk, given.chunk.conditioning
    steps = given.schedule.timestep.shape[0]
    last = given.schedule.part(steps - wanted.gradient_steps, steps)

    @jax.checkpoint
    def body(x: Array, step: tuple[Array, ...]) -> tuple[Array, Array]:
        timestep, sigma, sigma_next = step

        def velocity(adapter: nnx.State | None) -> Array:
            return rule.policy.velocity(given.policy_inputs(adapter), x, timestep)

        v = velocity(lora)
        reference = (
            jax.lax.stop_gradient(velocity(given.networks.reference)) if wanted.kl > 0 else v
        )
        return flow.ode_step(x, v, sigma, sigma_next), grpo.matching_error(
            v, reference, conditioning.frame_mask
        )

    begin = jnp.squeeze(chunk.trajectory.x, axis=1)
    latents, away = jax.lax.scan(body, begin, (last.timestep, last.sigma[:-1], last.sigma[1:]))
    assert rule.score is not None
    reward = jax.checkpoint(rule.score)(given.networks.scorer, latents, conditioning, chunk.people)
    rows = wanted.definition.function(reward, wanted)
    if wanted.kl_weights == "sigma":
        away = away * (last.sigma[:-1] / jnp.mean(last.sigma[:-1]))[:, None]
    return rows | ({"kl": jnp.sum(away, axis=0)} if wanted.kl > 0 else {})


LOSSES = {REPLAY: replayed_loss, LATENTS: matched_loss, REWARD: rewarded_loss}
"""Loss of each kind of objective."""


def gradients(
    rule: UpdateRule,
    lora: nnx.State | experts.Pair[nnx.State],
    networks: Networks,
    rollout: Rollout,
    schedule: Schedule,
    optimizer_step: Int[Array, ""],
    trained: tuple[int, ...] = (0,),
) -> tuple[nnx.State | experts.Pair[nnx.State], dict[str, Float[Array, "C K R"]]]:
    """Compute the gradient of the mean loss over all rows with weight 1 and their K noise levels.

    If no row has weight 1, the mean is 0 / 0. Such an update is not finite and changes nothing.

    Args:
      rule: static part of the update.
      lora: adapter to differentiate.
      networks: arrays that do not change.
      rollout: C chunks of R rows, with advantages and weights.
      schedule: noise schedule of the rollout.
      optimizer_step: optimizer steps done before this one.
      trained: experts that the windows of the rollout reach.

    Returns:
      The gradient of the trained experts, and the logged values per row and noise level.
    """
    chunks = jnp.arange(len(rollout.start))
    gradient, rows = _gradients(
        rule, lora, networks, rollout, chunks, schedule, optimizer_step, trained
    )
    return experts.together(gradient), rows


def _gradients(
    rule: UpdateRule,
    lora: nnx.State | experts.Pair[nnx.State],
    networks: Networks,
    rollout: Rollout,
    chunks: Int[Array, " c"],
    schedule: Schedule,
    optimizer_step: Int[Array, ""],
    trained: tuple[int, ...],
) -> tuple[tuple[nnx.State, ...], dict[str, Float[Array, "c K R"]]]:
    """Compute `gradients` over some chunks of a rollout, which are read in place.

    The gradients of several experts are computed by branches of a `switch` around the whole
    forward and backward pass, so that the activations of one expert are in memory at a time.
    """
    wanted, levels = rule.grpo, rule.noise_levels(rollout)
    weight = rollout.weight[chunks]
    weight = jnp.broadcast_to(weight[:, None], (len(chunks), levels, weight.shape[1]))
    count = jnp.sum(weight)
    scale = jnp.ones_like(weight)
    if wanted.time_weights:
        steps = rollout.start[chunks][:, None] + jnp.arange(levels)[:, None]
        scale = grpo.time_weights(schedule.transition.at(steps).weight, weight)

    parts = [experts.each(lora)[expert] for expert in trained]
    zeros = tuple(
        rule.of(expert).policy.shard_gradient(jax.tree.map(jnp.zeros_like, part))
        for expert, part in zip(trained, parts, strict=True)
    )

    def gradient_of(place: int) -> Callable[..., tuple[tuple[nnx.State, ...], Rows]]:
        """Return the function of a chunk that differentiates one of the trained experts."""
        own, arrays = rule.of(trained[place]), networks.of(trained[place])

        def loss(
            lora: nnx.State, chunk: Rollout, number: Array, weight: Array, scale: Array
        ) -> tuple[Array, Rows]:
            given = LossInputs(arrays, chunk, schedule, number, optimizer_step)
            rows = LOSSES[wanted.definition.kind](own, lora, given)
            total = scale * rows["policy_loss"] + wanted.kl * rows.get("kl", 0.0)
            return jnp.sum(jnp.where(weight > 0, weight * total, 0.0)), rows

        def gradient(*position: Any) -> tuple[tuple[nnx.State, ...], Rows]:
            found, rows = jax.grad(loss, has_aux=True)(parts[place], *position)
            found = own.policy.shard_gradient(found)
            return (*zeros[:place], found, *zeros[place + 1 :]), rows

        return gradient

    branches = [gradient_of(place) for place in range(len(trained))]

    def body(
        total: tuple[nnx.State, ...], position: tuple[Array, ...]
    ) -> tuple[tuple[nnx.State, ...], Rows]:
        c, number, weight, scale = position
        chunk = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, c, keepdims=False), rollout
        )
        # The experts share the steps in order, and all rows are on one side of the boundary.
        place = (chunk.start[0] + number >= schedule.counts[0]).astype(jnp.int32)
        given = (chunk, number, weight, scale)
        gradient, rows = (
            branches[0](*given) if len(branches) == 1 else jax.lax.switch(place, branches, *given)
        )
        return jax.tree.map(lambda sum_, leaf: sum_ + leaf / count, total, gradient), rows

    positions = (
        jnp.repeat(chunks, levels),
        jnp.tile(jnp.arange(levels), len(chunks)),
        weight.reshape(len(chunks) * levels, -1),
        scale.reshape(len(chunks) * levels, -1),
    )
    total, rows = jax.lax.scan(body, zeros, positions)
    return total, {name: value.reshape(len(chunks), levels, -1) for name, value in rows.items()}


def share(optimizer_step: int | Int[Array, ""], chunks: int, shares: int) -> Int[Array, " c"]:
    """Return the indices of the chunks of an update; updates cycle through equal shares.

    Args:
      optimizer_step: optimizer steps done before this one; selects the share.
      chunks: number of chunks of the rollout.
      shares: number of equal shares.
    """
    size = chunks // shares
    return optimizer_step % shares * size + jnp.arange(size)


@functools.partial(jax.jit, static_argnums=0, static_argnames="trained", donate_argnums=1)
def update(
    rule: UpdateRule,
    state: TrainState,
    networks: Networks,
    rollout: Rollout,
    schedule: Schedule,
    optimizer_step: Int[Array, ""],
    trained: tuple[int, ...] = (0,),
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Take one optimizer step on one of the `grpo.updates` equal shares of a rollout.

    A non-finite gradient of a transformer leaves it as it is and is logged as `skipped`. The caller
    increments `state.step`.

    Args:
      rule: static part of the update.
      state: state before the step, donated.
      networks: arrays that do not change.
      rollout: C chunks of R rows, with advantages and weights.
      schedule: noise schedule of the rollout.
      optimizer_step: optimizer steps done before this one; selects the share.
      trained: experts that the windows of the rollout reach.

    Returns:
      The new state, and the values to log.
    """
    chunks = share(optimizer_step, len(rollout.start), rule.grpo.updates)
    gradients, rows = _gradients(
        rule, state.params, networks, rollout, chunks, schedule, optimizer_step, trained
    )
    states, norms = of_experts(state), {}
    for expert, gradient in zip(trained, gradients, strict=True):
        states[expert], norms[expert] = apply_gradients(
            states[expert],
            gradient,
            rule.of(expert).optimizer,
            optimizer_step,
            rule.ema_decay,
        )
    counted = rollout.weight[chunks][:, None] > 0
    ratio = rows.pop("ratio", None)
    scalars = {name: jnp.mean(value, where=counted) for name, value in rows.items()}
    if ratio is not None:
        scalars |= {
            "ratio_min": jnp.min(ratio, where=counted, initial=jnp.inf),
            "ratio_max": jnp.max(ratio, where=counted, initial=0.0),
        }
    return join_experts(states), {**scalars, **_norms(norms, len(states))}


def _norms(
    found: Mapping[int, dict[str, Float[Array, ""]]], count: int
) -> dict[str, Float[Array, ""]]:
    """Return the logged values of `apply_gradients` over the trained experts.

    Args:
      found: values of each trained expert.
      count: number of experts; the norm of each is logged too if there are two.
    """
    if count == 1:
        return found[0]
    norms = {
        f"gradient_norm_{experts.NAMES[expert]}": values["gradient_norm"]
        for expert, values in found.items()
    }
    return {
        "gradient_norm": jnp.sqrt(sum(jnp.square(norm) for norm in norms.values())),
        "skipped": jnp.max(jnp.stack([values["skipped"] for values in found.values()])),
        **norms,
    }
