"""Sampling: one jitted scan over denoising steps, stochastic inside a window and deterministic outside.

The trajectory keeps every state, velocity and log-probability in float32: the update replays the states and forms its ratio from the
velocities.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jax_idgrpo import flow, keys
from jax_idgrpo.conditioning import Conditioning, video_latents
from jax_idgrpo.config import RolloutConfig
from jax_idgrpo.policy import Policy


@flax.struct.dataclass
class Schedule:
    """sigma [S+1] float32 with a final 0, timestep [S] int32; steps are indexed by position, never looked up by value."""

    sigma: Float[Array, "S+1"]
    timestep: Int[Array, "S"]

    @classmethod
    def make(cls, steps: int, shift: float) -> "Schedule":
        """The schedule of `flow.sigmas` and `flow.timesteps`."""
        return cls(sigma=jnp.asarray(flow.sigmas(steps, shift)), timestep=jnp.asarray(flow.timesteps(steps, shift)))


@flax.struct.dataclass
class Trajectory:
    """x: [S+1,B,N,H,W,16] states from noise to latents. velocity: [S,B,N,H,W,16] of the policy that sampled them.

    log_prob: [S,B], meaningful at stochastic steps only. All float32.
    """

    x: Float[Array, "S+1 B N H W C"]
    velocity: Float[Array, "S B N H W C"]
    log_prob: Float[Array, "S B"]


def window(config: RolloutConfig, seed: int, step: int) -> np.ndarray:
    """Which denoising steps are trained in training step `step`: ascending int32 [K_t]."""
    if config.window == "all":
        return np.arange(config.steps - 1, dtype=np.int32)
    start = config.window_start
    if config.window == "random":
        last = config.steps // 2 - config.window_size
        start = int(jax.random.randint(keys.fold(keys.key(seed, "window"), step), (), 0, last + 1))
    return np.arange(start, start + config.window_size, dtype=np.int32)


def stochastic(config: RolloutConfig, trained: np.ndarray) -> np.ndarray:
    """Which denoising steps draw noise: bool [S], the trained ones and, if the configuration says so, the last."""
    mask = np.zeros(config.steps, bool)
    mask[trained] = True
    mask[-1] = config.final_step == "sde"
    return mask


def _start(rows: Key[Array, "B"], conditioning: Conditioning) -> Float[Array, "B N H W C"]:
    return keys.step_noise(rows, -1, conditioning.latent_shape)


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
    is_stochastic: Bool[Array, "S"],
) -> Trajectory:
    """Sample one batch and keep its trajectory. `rows` are the videos' keys (`keys.row_keys`), `starts` those of their start noise."""
    start = _start(starts, conditioning)
    sigma_max = schedule.sigma[1]

    def body(x: Array, step: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array, Array]]:
        index, timestep, sigma, sigma_next, draws = step
        v = policy.velocity(lora, base, x, timestep, conditioning, negative)
        noise = keys.step_noise(rows, index, x.shape[1:])
        drawn = flow.sde_step(x, v, sigma, sigma_next, sigma_max, noise=noise, mask=conditioning.frame_mask).x_next
        x_next = jnp.where(draws, drawn, flow.ode_step(x, v, sigma, sigma_next))
        log_prob = flow.sde_step(x, v, sigma, sigma_next, sigma_max, x_next=x_next, mask=conditioning.frame_mask).log_prob
        return x_next, (x_next, v, log_prob)

    index = jnp.arange(schedule.timestep.shape[0])
    steps = (index, schedule.timestep, schedule.sigma[:-1], schedule.sigma[1:], is_stochastic)
    _, (x, velocity, log_prob) = jax.lax.scan(body, start, steps)
    return Trajectory(x=jnp.concatenate([start[None], x]), velocity=velocity, log_prob=log_prob)


@functools.partial(jax.jit, static_argnums=0)
def generate(
    policy: Policy,
    lora: nnx.State | None,
    base: nnx.State,
    conditioning: Conditioning,
    negative: Float[Array, "L D"],
    schedule: Schedule,
    rows: Key[Array, "B"],
) -> Float[Array, "B N H W C"]:
    """Sample one batch without noise along the way (Euler) and return the latents alone, as evaluation does."""

    def body(x: Array, step: tuple[Array, ...]) -> tuple[Array, None]:
        timestep, sigma, sigma_next = step
        return flow.ode_step(x, policy.velocity(lora, base, x, timestep, conditioning, negative), sigma, sigma_next), None

    return jax.lax.scan(body, _start(rows, conditioning), (schedule.timestep, schedule.sigma[:-1], schedule.sigma[1:]))[0]


@functools.partial(jax.jit, static_argnames="frames")
def decode(
    vae: tuple[nnx.GraphDef, nnx.State], latents: Float[Array, "B N h w C"], people: Int[Array, "B"], frames: int
) -> Float[Array, "B F H W 3"]:
    """The videos in [-1, 1] of final latents: references dropped, `frames` latent frames decoded."""
    return nnx.merge(*vae).decode(video_latents(latents, people, frames))
