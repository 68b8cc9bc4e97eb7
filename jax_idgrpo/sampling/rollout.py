"""Sampling: one jitted scan over denoising steps, stochastic inside a window and deterministic outside.

What an update replays is kept in float32: the states and velocities of the window, from which it forms its ratio.
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
from jax_idgrpo.sampling.policy import Policy


@flax.struct.dataclass
class Schedule:
    """Denoising steps, indexed by position and never looked up by value.

    sigma: [S+1] float32 with a final 0. timestep: [S] int32. shift: [] of the flow. transition, solver: the stochastic and the
    deterministic step, every leaf [S,...].
    """

    sigma: Float[Array, "S+1"]
    timestep: Int[Array, "S"]
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
        """The schedule of `flow.sigmas` with a sampler of `flow.SAMPLERS` (noise level 0 = its own) and a solver of `flow.SOLVERS`."""
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
        """The steps from `first` to before `last`; a program, so that cutting reads nothing from the host."""
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
    """Which denoising steps draw noise and are trained: `size` of them from `start` [B] on, a start for each row.

    final_noise: the last step of the schedule draws noise too; it is never trained.
    """

    start: Int[Array, "B"]
    size: int = flax.struct.field(pytree_node=False)
    final_noise: bool = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Trajectory:
    """What is kept of a rollout, all float32; every leaf has its rows first.

    latents: [B,N,H,W,16] at the end. For the K steps of the window, None without one: x [B,K+1,N,H,W,16] the states before and after,
    velocity [B,K,N,H,W,16] of the policy that sampled them, log_prob [B,K]. For the gradient of the reward: x [B,1,N,H,W,16] alone,
    the state from which the last steps are run again.
    """

    latents: Float[Array, "B N H W C"]
    x: Float[Array, "B K+1 N H W C"] | None = None
    velocity: Float[Array, "B K N H W C"] | None = None
    log_prob: Float[Array, "B K"] | None = None


def window_starts(config: RolloutConfig, seed: int, step: int) -> Int[np.ndarray, "P"]:
    """The first denoising step that is trained in training step `step`, for each of its prompts."""
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
def _start(rows: Key[Array, "B"], conditioning: Conditioning) -> Float[Array, "B N H W C"]:
    return rng.step_noise(rows, -1, conditioning.latent_shape)


def _put(
    kept: Float[Array, "B n *shape"], place: Int[Array, "B"], value: Float[Array, "B *shape"]
) -> Float[Array, "B n *shape"]:
    """`kept` with each row's value at its place; a place outside keeps nothing."""
    here = place[:, None] == jnp.arange(kept.shape[1])
    return jnp.where(here.reshape(here.shape + (1,) * (value.ndim - 1)), value[:, None], kept)


Kept = tuple[Float[Array, "B states N H W C"], Float[Array, "B K N H W C"], Float[Array, "B K"]]


@functools.partial(jax.jit, static_argnums=0)
def sample(
    policy: Policy,
    lora: nnx.State | None,
    base: nnx.State,
    conditioning: Conditioning,
    negative: Float[Array, "L D"],
    schedule: Schedule,
    starts: Key[Array, "B"],
    rows: Key[Array, "B"],
    window: Window,
) -> Trajectory:
    """Sample one batch and keep its window. `rows` are the videos' keys (`rng.row_keys`), `starts` those of their start noise."""
    x = _start(starts, conditioning)
    cache = policy.prefill(lora, base, conditioning, negative)
    last = schedule.timestep.shape[0] - 1

    def body(carry: tuple[Array, Kept], step: tuple[Any, ...]) -> tuple[tuple[Array, Kept], None]:
        x, kept = carry
        index, timestep, sigma, sigma_next, transition = step
        v = policy.velocity(lora, base, x, timestep, conditioning, negative, cache)
        drawn = flow.step(
            transition,
            x,
            v,
            noise=rng.step_noise(rows, index, x.shape[1:]),
            mask=conditioning.frame_mask,
        )
        place = index - window.start
        draws = (place >= 0) & (place < window.size) | (window.final_noise & (index == last))
        kept = jax.tree.map(
            lambda kept, value: _put(kept, place, value), kept, (x, v, drawn.log_prob)
        )
        return (
            jnp.where(
                draws[:, None, None, None, None],
                drawn.x_next,
                flow.ode_step(x, v, sigma, sigma_next),
            ),
            kept,
        ), None

    count, size = x.shape[0], window.size
    kept = (
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
    latents, (states, velocity, log_prob) = jax.lax.scan(body, (x, kept), steps)[0]
    return Trajectory(latents=latents, x=states, velocity=velocity, log_prob=log_prob)


@functools.partial(jax.jit, static_argnums=0)
def denoise(
    policy: Policy,
    lora: nnx.State | None,
    base: nnx.State,
    conditioning: Conditioning,
    negative: Float[Array, "L D"],
    schedule: Schedule,
    x: Float[Array, "B N H W C"],
) -> Float[Array, "B N H W C"]:
    """Follow the ODE from x, at the schedule's first noise level, to its last, by the schedule's solver."""
    cache = policy.prefill(lora, base, conditioning, negative)

    def body(state: flow.SolverState, step: tuple[Any, ...]) -> tuple[flow.SolverState, None]:
        timestep, sigma, solver = step
        v = policy.velocity(lora, base, state.x, timestep, conditioning, negative, cache)
        return flow.solver_step(solver, state, v, sigma), None

    return jax.lax.scan(
        body, flow.SolverState.start(x), (schedule.timestep, schedule.sigma[:-1], schedule.solver)
    )[0].x


def generate(
    policy: Policy,
    lora: nnx.State | None,
    base: nnx.State,
    conditioning: Conditioning,
    negative: Float[Array, "L D"],
    schedule: Schedule,
    rows: Key[Array, "B"],
) -> Float[Array, "B N H W C"]:
    """Sample one batch without noise along the way and return the latents alone, as evaluation does."""
    return denoise(policy, lora, base, conditioning, negative, schedule, _start(rows, conditioning))


@functools.partial(jax.jit, static_argnames="frames")
def decode(
    vae: tuple[nnx.GraphDef, nnx.State],
    latents: Float[Array, "B N h w C"],
    start: Int[Array, "B"],
    frames: int,
) -> Float[Array, "B F H W 3"]:
    """The videos in [-1, 1] of final latents: `frames` latent frames from each row's `start` on, references dropped."""
    network, video = nnx.merge(*vae), video_latents(latents, start, frames)
    return network.decode(video, network.chunk(*video.shape[1:4]))
