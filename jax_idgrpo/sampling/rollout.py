"""Sample videos: one jitted scan over the denoising steps, stochastic inside a window.

The states and velocities of the window are stored in float32; updates compute ratios from them.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jax_idgrpo import flow, rng
from jax_idgrpo.config import RolloutConfig
from jax_idgrpo.sampling.conditioning import Conditioning, video_latents
from jax_idgrpo.sampling.policy import Policy, PolicyInputs


@flax.struct.dataclass
class Schedule:
    """Denoising steps, indexed by position and never looked up by value.

    Attributes:
      sigma: noise levels, descending, the last is 0.
      timestep: integers 0 .. 999.
      shift: of the flow.
      transition: coefficients of the stochastic step, every leaf [S,...].
      solver: coefficients of the deterministic step, every leaf [S,...].
    """

    sigma: Float[Array, " S+1"]
    timestep: Int[Array, " S"]
    shift: Float[Array, ""]
    transition: flow.Transition
    solver: flow.Solver

    @classmethod
    def make(
        cls,
        steps: int,
        shift: float,
        sampler: str = "identity",
        noise_level: float = 0.0,
        solver: str = "euler",
    ) -> "Schedule":
        """Build the schedule of `flow.sigmas`.

        Args:
          steps: S, denoising steps.
          shift: of the flow.
          sampler: name in `flow.SAMPLERS`.
          noise_level: of the sampler; 0 is the sampler's default.
          solver: name in `flow.SOLVERS`.
        """
        sigma = flow.sigmas(steps, shift)
        level = {"noise_level": noise_level} if noise_level else {}
        made = cls(
            sigma=sigma,
            timestep=flow.timesteps(steps, shift),
            shift=np.float32(shift),
            transition=flow.SAMPLERS[sampler](sigma[:-1], sigma[1:], sigma[1], **level),
            solver=flow.SOLVERS[solver](sigma),
        )
        return jax.tree.map(jnp.asarray, made)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def part(self, first: int, last: int) -> "Schedule":
        """Return the steps from `first` to before `last`.

        Jitted, so that slicing transfers nothing from the host.
        """
        steps = slice(first, last)
        cut = jax.tree.map(lambda leaf: leaf[steps], (self.timestep, self.transition, self.solver))
        timestep, transition, solver = cut
        return Schedule(
            sigma=self.sigma[first : last + 1],
            timestep=timestep,
            shift=self.shift,
            transition=transition,
            solver=solver,
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


def window_starts(config: RolloutConfig, seed: int, step: int) -> Int[np.ndarray, " P"]:
    """Return the first denoising step of the window, per prompt.

    Args:
      config: kind and size of the window.
      seed: seed of the run.
      step: number of the training step.
    """
    first, last = config.window_start, config.steps - 1 - config.window_size
    root = rng.fold(rng.key(seed, "window"), step)
    start: Any = 0
    if config.window == "fixed":
        start = first
    if config.window == "progressive":
        start = first + step // config.window_every % (last - first + 1)
    if config.window == "random":
        start = jax.random.randint(root, (), 0, config.steps // 2 - config.window_size + 1)
    if config.window == "per_prompt":
        start = jax.random.randint(
            root, (config.prompts,), 0, config.steps // 2 - config.window_size + 1
        )
    return np.broadcast_to(np.asarray(start, np.int32), config.prompts)


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


@functools.partial(jax.jit, static_argnums=0)
def sample(
    policy: Policy,
    inputs: PolicyInputs,
    schedule: Schedule,
    starts: Key[Array, " B"],
    rows: Key[Array, " B"],
    window: Window,
) -> Trajectory:
    """Sample one batch and store the steps of its window.

    Args:
      policy: structure of the transformer.
      inputs: adapter, weights and prompts of the B rows.
      schedule: the denoising steps.
      starts: keys of the videos' start noise.
      rows: keys of the videos (`rng.row_keys`).
      window: the stochastic steps.
    """
    x = _start(starts, inputs.conditioning)
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

    count, size = x.shape[0], window.size
    record = (
        jnp.zeros((count, size + 1, *x.shape[1:])),
        jnp.zeros((count, size, *x.shape[1:])),
        jnp.zeros((count, size)),
    )
    steps = (
        jnp.arange(last + 1),
        schedule.timestep,
        schedule.sigma[:-1],
        schedule.sigma[1:],
        schedule.transition,
    )
    latents, (states, velocity, log_prob) = jax.lax.scan(body, (x, record), steps)[0]
    return Trajectory(latents=latents, x=states, velocity=velocity, log_prob=log_prob)


@functools.partial(jax.jit, static_argnums=0)
def denoise(
    policy: Policy,
    inputs: PolicyInputs,
    schedule: Schedule,
    x: Float[Array, "B frames H W C"],
) -> Float[Array, "B frames H W C"]:
    """Integrate the ODE from x with the schedule's solver.

    Args:
      policy: structure of the transformer.
      inputs: adapter, weights and prompts of the B rows.
      schedule: the denoising steps.
      x: latents at the schedule's first noise level.

    Returns:
      Latents at the schedule's last noise level.
    """
    cache = policy.prefill(inputs)

    def body(state: flow.SolverState, step: tuple[Any, ...]) -> tuple[flow.SolverState, None]:
        timestep, sigma, solver = step
        v = policy.velocity(inputs, state.x, timestep, cache)
        return flow.solver_step(solver, state, v, sigma), None

    return jax.lax.scan(
        body, flow.SolverState.start(x), (schedule.timestep, schedule.sigma[:-1], schedule.solver)
    )[0].x


def generate(
    policy: Policy,
    inputs: PolicyInputs,
    schedule: Schedule,
    rows: Key[Array, " B"],
) -> Float[Array, "B frames H W C"]:
    """Sample one batch deterministically, as evaluation does; return the final latents.

    Args:
      policy: structure of the transformer.
      inputs: adapter, weights and prompts of the B rows.
      schedule: the denoising steps.
      rows: keys of the videos' start noise.
    """
    return denoise(policy, inputs, schedule, _start(rows, inputs.conditioning))


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
