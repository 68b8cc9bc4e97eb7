"""Sample videos: one jitted scan over the denoising steps, stochastic inside a window.

The states and velocities of the window are stored in float32; updates compute ratios from them.

A model with two experts runs the first steps with one and the last steps with the other. Noise
levels fall from step to step, so this is one scan per expert, each a program of its own that
continues from the state of the other. A program reads the weights of one expert only, so those of
the other may be in host memory.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jax_idgrpo import flow, rng
from jax_idgrpo.config import RolloutConfig
from jax_idgrpo.parallel import sharding
from jax_idgrpo.sampling.conditioning import Conditioning, video_latents
from jax_idgrpo.sampling.policy import Policy, PolicyInputs

Result = TypeVar("Result")

TRAIN_TIMESTEPS = 1000
"""Timesteps of the training of Wan; a boundary between experts is a share of them."""


@flax.struct.dataclass
class Schedule:
    """Denoising steps, indexed by position and never looked up by value.

    Attributes:
      sigma: noise levels, descending, the last is 0.
      timestep: integers 0 .. 999.
      shift: of the flow.
      transition: coefficients of the stochastic step, every leaf [S,...].
      solver: coefficients of the deterministic step, every leaf [S,...].
      counts: steps of each expert, in the order of the steps.
    """

    sigma: Float[Array, " S+1"]
    timestep: Int[Array, " S"]
    shift: Float[Array, ""]
    transition: flow.Transition
    solver: flow.Solver
    counts: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def make(
        cls,
        steps: int,
        shift: float,
        sampler: str = "identity",
        noise_level: float = 0.0,
        solver: str = "euler",
        boundary: float | None = None,
    ) -> "Schedule":
        """Build the schedule of `flow.sigmas`.

        Args:
          steps: S, denoising steps.
          shift: of the flow.
          sampler: name in `flow.SAMPLERS`.
          noise_level: of the sampler; 0 is the sampler's default.
          solver: name in `flow.SOLVERS`.
          boundary: share of the timesteps from which the high-noise expert runs; None for one
            transformer.
        """
        sigma, timestep = flow.sigmas(steps, shift), flow.timesteps(steps, shift)
        high = steps if boundary is None else int(np.sum(timestep >= boundary * TRAIN_TIMESTEPS))
        level = {"noise_level": noise_level} if noise_level else {}
        made = cls(
            sigma=sigma,
            timestep=timestep,
            shift=np.float32(shift),
            transition=flow.SAMPLERS[sampler](sigma[:-1], sigma[1:], sigma[1], **level),
            solver=flow.SOLVERS[solver](sigma),
            counts=(steps,) if boundary is None else (high, steps - high),
        )
        return jax.tree.map(jnp.asarray, made)

    def steps_of(self, expert: int) -> slice:
        """Return the steps of an expert."""
        first = sum(self.counts[:expert])
        return slice(first, first + self.counts[expert])

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts that have steps, in their order."""
        return tuple(expert for expert, count in enumerate(self.counts) if count)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def part(self, first: int, last: int) -> "Schedule":
        """Return the steps from `first` to before `last`.

        Jitted, so that slicing transfers nothing from the host.
        """
        steps = slice(first, last)
        cut = jax.tree.map(lambda leaf: leaf[steps], (self.timestep, self.transition, self.solver))
        timestep, transition, solver = cut
        own = (self.steps_of(expert) for expert in range(len(self.counts)))
        return Schedule(
            sigma=self.sigma[first : last + 1],
            timestep=timestep,
            shift=self.shift,
            transition=transition,
            solver=solver,
            counts=tuple(len(range(max(first, on.start), min(last, on.stop))) for on in own),
        )


@flax.struct.dataclass
class Window:
    """Denoising steps that draw noise and are trained.

    Attributes:
      start: first step of the window, per row.
      size: K, steps of the window.
      final_noise: whether the last step of the schedule draws noise too; it is never trained.
    """

    start: Int[Array, " B"]
    size: int = flax.struct.field(pytree_node=False)
    final_noise: bool = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Trajectory:
    """Stored part of a rollout, float32, rows first.

    Attributes:
      latents: final latents.
      x: states before and after the K steps of the window. For reward gradients one state: the one
        from which the last steps are run again.
      velocity: velocities of the sampling policy in the window; None without a window.
      log_prob: log-probabilities of the steps of the window; None without a window.
    """

    latents: Float[Array, "B frames H W C"]
    x: Float[Array, "B K+1 frames H W C"] | None = None
    velocity: Float[Array, "B K frames H W C"] | None = None
    log_prob: Float[Array, "B K"] | None = None


def window_starts(
    config: RolloutConfig, seed: int, step: int, counts: Sequence[int] = ()
) -> Int[np.ndarray, " P"]:
    """Return the first denoising step of the window, per prompt.

    With two experts, a random window has steps of one expert only: the low-noise expert's in a
    share of `rollout.window_low_noise` of the training steps, evenly spaced, else the other's.

    Args:
      config: kind and size of the window.
      seed: seed of the run.
      step: number of the training step.
      counts: denoising steps of each expert; one transformer needs none.
    """
    root = rng.fold(rng.key(seed, "window"), step)
    start: Any
    if config.window in ("random", "per_prompt"):
        low, high = 0, config.steps // 2 - config.window_size
        if len(counts) > 1:
            low, high = random_starts(config, counts, expert_of_step(config, step))
        shape = (config.prompts,) if config.window == "per_prompt" else ()
        start = jax.random.randint(root, shape, low, high + 1)
    else:
        start = _planned_start(config, step)
    return np.broadcast_to(np.asarray(start, np.int32), config.prompts)


def _planned_start(config: RolloutConfig, step: int) -> int:
    """Return the first denoising step of a window that is not random."""
    if config.window == "progressive":
        last = config.steps - 1 - config.window_size
        moved = step // config.window_every
        return config.window_start + moved % (last - config.window_start + 1)
    return config.window_start if config.window == "fixed" else 0


def trained_levels(config: RolloutConfig, step: int, counts: Sequence[int]) -> tuple[int, ...]:
    """Count the denoising steps of each expert in the windows of a training step.

    Args:
      config: kind and size of the window.
      step: number of the training step.
      counts: denoising steps of each expert.
    """
    size = config.trained_steps
    if len(counts) == 1:
        return (size,)
    if config.window in ("random", "per_prompt"):
        chosen = expert_of_step(config, step)
        return tuple(size if expert == chosen else 0 for expert in range(len(counts)))
    start = _planned_start(config, step)
    firsts = [sum(counts[:expert]) for expert in range(len(counts))]
    return tuple(
        max(0, min(start + size, first + count) - max(start, first))
        for first, count in zip(firsts, counts, strict=True)
    )


def expert_of_step(config: RolloutConfig, step: int) -> int:
    """Return the expert whose steps a random window of a training step has, with two experts."""
    share = config.window_low_noise
    return math.floor((step + 1) * share) - math.floor(step * share)


def random_starts(config: RolloutConfig, counts: Sequence[int], expert: int) -> tuple[int, int]:
    """Return the first and the last start of a random window inside the steps of an expert.

    The last step of the schedule is never trained.

    Args:
      config: size of the window.
      counts: denoising steps of each expert.
      expert: number of the expert.
    """
    first = sum(counts[:expert])
    end = min(first + counts[expert], config.steps - 1)
    return first, end - config.window_size


@jax.jit
def _start(rows: Key[Array, " B"], conditioning: Conditioning) -> Float[Array, "B frames H W C"]:
    return rng.step_noise(rows, -1, conditioning.latent_shape)


def _write(
    record: Float[Array, "B n *shape"], index: Int[Array, " B"], value: Float[Array, " B *shape"]
) -> Float[Array, "B n *shape"]:
    """Write each row's value at the row's index; an index out of range writes nothing."""
    here = index[:, None] == jnp.arange(record.shape[1])
    return jnp.where(here.reshape(here.shape + (1,) * (value.ndim - 1)), value[:, None], record)


Record = tuple[
    Float[Array, "B states frames H W C"], Float[Array, "B K frames H W C"], Float[Array, "B K"]
]


@functools.partial(jax.jit, static_argnums=0, static_argnames="expert", donate_argnames="so_far")
def sample(
    policy: Policy,
    inputs: PolicyInputs,
    schedule: Schedule,
    starts: Key[Array, " B"],
    rows: Key[Array, " B"],
    window: Window,
    so_far: Trajectory | None = None,
    expert: int = 0,
) -> Trajectory:
    """Sample one batch with one expert and store the steps of its window.

    Args:
      policy: structure of the expert's transformer.
      inputs: adapter and weights of the expert, and prompts of the B rows.
      schedule: the denoising steps of all experts.
      starts: keys of the videos' start noise.
      rows: keys of the videos (`rng.row_keys`).
      window: the stochastic steps.
      so_far: result of the expert before, donated; None for the first one.
      expert: number of the expert.
    """
    if so_far is None:
        x = _start(starts, inputs.conditioning)
        count, size = x.shape[0], window.size
        record = (
            jnp.zeros((count, size + 1, *x.shape[1:])),
            jnp.zeros((count, size, *x.shape[1:])),
            jnp.zeros((count, size)),
        )
    else:
        x, record = so_far.latents, (so_far.x, so_far.velocity, so_far.log_prob)
    cache = policy.prefill(inputs)
    last = schedule.timestep.shape[0] - 1

    def body(
        carry: tuple[Array, Record], step: tuple[Any, ...]
    ) -> tuple[tuple[Array, Record], None]:
        x, record = carry
        index, timestep, sigma, sigma_next, transition = step
        v = policy.velocity(inputs, x, timestep, cache)
        drawn = flow.step(
            transition,
            x,
            v,
            noise=rng.step_noise(rows, index, x.shape[1:]),
            mask=inputs.conditioning.frame_mask,
        )
        position = index - window.start
        draws = (position >= 0) & (position < window.size) | (window.final_noise & (index == last))
        record = jax.tree.map(
            lambda record, value: _write(record, position, value), record, (x, v, drawn.log_prob)
        )
        return (
            jnp.where(
                draws[:, None, None, None, None],
                drawn.x_next,
                flow.ode_step(x, v, sigma, sigma_next),
            ),
            record,
        ), None

    steps = (
        jnp.arange(last + 1),
        schedule.timestep,
        schedule.sigma[:-1],
        schedule.sigma[1:],
        schedule.transition,
    )
    steps = jax.tree.map(lambda leaf: leaf[schedule.steps_of(expert)], steps)
    latents, (states, velocity, log_prob) = jax.lax.scan(body, (x, record), steps)[0]
    return Trajectory(latents=latents, x=states, velocity=velocity, log_prob=log_prob)


def sample_experts(
    policy: Policy,
    inputs: PolicyInputs,
    schedule: Schedule,
    starts: Key[Array, " B"],
    rows: Key[Array, " B"],
    window: Window,
) -> Trajectory:
    """Sample one batch with all experts in turn; the arguments are those of `sample`."""
    trajectory = None
    for expert in schedule.experts:
        result = sample(
            policy.of(expert),
            inputs.of(expert),
            schedule,
            starts,
            rows,
            window,
            so_far=trajectory,
            expert=expert,
        )
        trajectory = _finished(inputs, result)
    assert trajectory is not None
    return trajectory


@functools.partial(jax.jit, static_argnums=0, static_argnames="expert")
def denoise(
    policy: Policy,
    inputs: PolicyInputs,
    schedule: Schedule,
    x: Float[Array, "B frames H W C"] | flow.SolverState,
    expert: int = 0,
) -> Float[Array, "B frames H W C"] | flow.SolverState:
    """Integrate the ODE from x with the schedule's solver over the steps of one expert.

    Args:
      policy: structure of the expert's transformer.
      inputs: adapter and weights of the expert, and prompts of the B rows.
      schedule: the denoising steps of all experts.
      x: latents at the schedule's first noise level, or the result of the expert before.
      expert: number of the expert.

    Returns:
      Latents at the schedule's last noise level; before another expert, the solver's state.
    """
    cache = policy.prefill(inputs)

    def body(state: flow.SolverState, step: tuple[Any, ...]) -> tuple[flow.SolverState, None]:
        timestep, sigma, solver = step
        v = policy.velocity(inputs, state.x, timestep, cache)
        return flow.solver_step(solver, state, v, sigma), None

    start = x if isinstance(x, flow.SolverState) else flow.SolverState.start(x)
    steps = (schedule.timestep, schedule.sigma[:-1], schedule.solver)
    steps = jax.tree.map(lambda leaf: leaf[schedule.steps_of(expert)], steps)
    state = jax.lax.scan(body, start, steps)[0]
    return state.x if expert == schedule.experts[-1] else state


def denoise_experts(
    policy: Policy,
    inputs: PolicyInputs,
    schedule: Schedule,
    x: Float[Array, "B frames H W C"],
) -> Float[Array, "B frames H W C"]:
    """Integrate the ODE from x with all experts in turn; the arguments are those of `denoise`."""
    for expert in schedule.experts:
        result = denoise(policy.of(expert), inputs.of(expert), schedule, x, expert=expert)
        x = _finished(inputs, result)
    return x


def _finished(inputs: PolicyInputs, result: Result) -> Result:
    """Wait for the result of an expert if the next expert takes its place on the devices."""
    if sharding.is_in_host_memory(inputs.base):
        jax.block_until_ready(result)
    return result


def generate(
    policy: Policy,
    inputs: PolicyInputs,
    schedule: Schedule,
    rows: Key[Array, " B"],
) -> Float[Array, "B frames H W C"]:
    """Sample one batch deterministically, as evaluation does; return the final latents.

    Args:
      policy: structure of the transformers.
      inputs: adapters, weights and prompts of the B rows.
      schedule: the denoising steps.
      rows: keys of the videos' start noise.
    """
    return denoise_experts(policy, inputs, schedule, _start(rows, inputs.conditioning))


@functools.partial(jax.jit, static_argnames="frames")
def decode(
    vae: tuple[nnx.GraphDef, nnx.State],
    latents: Float[Array, "B frames h w C"],
    start: Int[Array, " B"],
    frames: int,
) -> Float[Array, "B F H W 3"]:
    """Decode the video frames of final latents, without the references, to videos in [-1, 1].

    Args:
      vae: graph definition and state of the VAE.
      latents: final latents.
      start: first video frame, per row.
      frames: T, latent frames of the video.
    """
    network, video = nnx.merge(*vae), video_latents(latents, start, frames)
    return network.decode(video, network.chunk(*video.shape[1:4]))
