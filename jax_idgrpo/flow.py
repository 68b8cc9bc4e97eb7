"""Schedule and steps of the flow-matching sampler: sigmas, SDE step with its log-probability, ODE step, KL.

The model predicts the velocity v = noise - x0 along x = (1 - sigma) x0 + sigma noise; sigma falls from about 1 to 0. The SDE step
and its log-probability are those of Identity-GRPO (arXiv 2510.14256; github.com/alibaba/identity-grpo, sde_step_with_logprob); the
schedule is that of Wan2.1 (github.com/Wan-Video/Wan2.1, FlowUniPCMultistepScheduler) and of diffusers 0.33 to 0.36.

Pure functions, float32, independent of the rest of the project.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Float


def _sigmas64(num_steps: int, shift: float) -> np.ndarray:
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a schedule needs 1 or more")
    if shift <= 0:
        raise ValueError(f"shift is {shift}; use a positive number")
    unshifted = np.flip(1 - np.linspace(1, 1 / 1000, num_steps + 1))[:-1]
    return shift * unshifted / (1 + (shift - 1) * unshifted)


def sigmas(num_steps: int, shift: float) -> np.ndarray:
    """Noise levels, float32 [S+1], falling from about 1; the last is 0.

    With u = 0.999 (1 - i/S), sigma = shift u / (1 + (shift - 1) u), computed in float64.

    Raises:
      ValueError: fewer than one step, or a shift that is not positive.
    """
    return np.append(_sigmas64(num_steps, shift), 0.0).astype(np.float32)


def timesteps(num_steps: int, shift: float) -> np.ndarray:
    """What the model is told: int32 [S], 1000 sigma truncated from float64. Values can repeat: index steps by position."""
    return (_sigmas64(num_steps, shift) * 1000).astype(np.int32)


@flax.struct.dataclass
class Step:
    """One SDE step.

    x_next: [B,T,H,W,C] the next sample. log_prob: [B] its log-probability, mean over the valid elements of a row.
    mean: [B,T,H,W,C] and std: [] (or broadcast as sigma), its Gaussian.
    """

    x_next: Float[ArrayLike, "B *shape"]
    log_prob: Float[ArrayLike, "B"]
    mean: Float[ArrayLike, "B *shape"]
    std: Float[ArrayLike, "..."]


def row_mean(values: Float[ArrayLike, "B *shape"], mask: Bool[ArrayLike, "B T"] | None = None) -> Float[ArrayLike, "B"]:
    """Mean over everything but the batch; with `mask` [B,T] over the frames it marks."""
    axes = tuple(range(1, values.ndim))
    if mask is None:
        return jnp.mean(values, axis=axes)
    weights = mask.astype(values.dtype).reshape(mask.shape + (1,) * (values.ndim - 2))
    per_frame = math.prod(values.shape[2:])
    return jnp.sum(values * weights, axis=axes) / (jnp.sum(weights, axis=axes) * per_frame)


def _gaussian(
    sigma: Float[ArrayLike, "..."] | float, sigma_next: Float[ArrayLike, "..."] | float, sigma_max: Float[ArrayLike, "..."] | float
) -> tuple[ArrayLike, ArrayLike, ArrayLike]:
    """(a, b, s) of one SDE step x_next ~ N(a x + b v, s^2)."""
    sigma, sigma_next, sigma_max = (jnp.asarray(value, jnp.float32) for value in (sigma, sigma_next, sigma_max))
    dt = sigma_next - sigma
    diffusion = sigma_max * sigma
    a = 1 + diffusion**2 / (2 * sigma) * dt
    b = (1 + diffusion**2 * (1 - sigma) / (2 * sigma)) * dt
    return a, b, diffusion * jnp.sqrt(-dt)


def sde_step(
    x: Float[ArrayLike, "B *shape"],
    v: Float[ArrayLike, "B *shape"],
    sigma: Float[ArrayLike, "..."] | float,
    sigma_next: Float[ArrayLike, "..."] | float,
    sigma_max: Float[ArrayLike, "..."] | float,
    noise: Float[ArrayLike, "B *shape"] | None = None,
    x_next: Float[ArrayLike, "B *shape"] | None = None,
    mask: Bool[ArrayLike, "B T"] | None = None,
) -> Step:
    """The stochastic step from `sigma` to `sigma_next`, drawn from `noise` or scored at a given `x_next`.

        std    = sigma_max sigma                                (sigma_max is the second entry of the schedule)
        mean   = x (1 + std^2 / (2 sigma) dt) + v (1 + std^2 (1 - sigma) / (2 sigma)) dt,     dt = sigma_next - sigma < 0
        x_next = mean + s noise,                                s = std sqrt(-dt)
        log_prob = mean over the row of  -(x_next - mean)^2 / (2 s^2) - log s - log(2 pi) / 2

    Gradients flow through `mean`; `x_next` is a constant. Sigmas are scalars, or broadcast against x. `mask` [B,T] says which
    frames count in the log-probability.

    Raises:
      ValueError: neither or both of `noise` and `x_next` are given.
    """
    if (noise is None) == (x_next is None):
        raise ValueError("sde_step takes either noise (to draw) or x_next (to score)")
    x, v = x.astype(jnp.float32), v.astype(jnp.float32)
    a, b, std = _gaussian(sigma, sigma_next, sigma_max)
    mean = x * a + v * b
    if x_next is None:
        x_next = mean + std * noise
    x_next = jax.lax.stop_gradient(x_next)
    log_density = -((x_next - mean) ** 2) / (2 * std**2) - jnp.log(std) - 0.5 * math.log(2 * math.pi)
    return Step(x_next=x_next, log_prob=row_mean(log_density, mask), mean=mean, std=std)


def log_ratio(
    x: Float[ArrayLike, "B *shape"],
    v: Float[ArrayLike, "B *shape"],
    v_old: Float[ArrayLike, "B *shape"],
    sigma: Float[ArrayLike, "..."] | float,
    sigma_next: Float[ArrayLike, "..."] | float,
    sigma_max: Float[ArrayLike, "..."] | float,
    x_next: Float[ArrayLike, "B *shape"],
    mask: Bool[ArrayLike, "B T"] | None = None,
) -> Float[ArrayLike, "B"]:
    """log_prob(x_next; v) - log_prob(x_next; v_old) of `sde_step`, from the difference of the velocities.

        mean over the row of  b (v - v_old) (x_next - (mean + mean_old) / 2) / s^2,      mean = a x + b v

    Two log-probabilities near 1 that are subtracted leave their rounding, which depends on how the compiler ordered each sum; this
    form has none: it is exactly 0 where the velocities are equal. Gradients flow through `v`.
    """
    x, v, v_old = (value.astype(jnp.float32) for value in (x, v, v_old))
    a, b, std = _gaussian(sigma, sigma_next, sigma_max)
    middle = x * a + (v + v_old) * (0.5 * b)
    return row_mean(b * (v - v_old) * (jax.lax.stop_gradient(x_next) - middle) / std**2, mask)


def ode_step(
    x: Float[ArrayLike, "B *shape"],
    v: Float[ArrayLike, "B *shape"],
    sigma: Float[ArrayLike, "..."] | float,
    sigma_next: Float[ArrayLike, "..."] | float,
) -> Float[ArrayLike, "B *shape"]:
    """The deterministic Euler step x + v (sigma_next - sigma); the step to sigma_next = 0 gives the prediction of x0."""
    return x.astype(jnp.float32) + v.astype(jnp.float32) * (jnp.asarray(sigma_next, jnp.float32) - sigma)


def kl(
    mean: Float[ArrayLike, "B *shape"],
    mean_reference: Float[ArrayLike, "B *shape"],
    std: Float[ArrayLike, "..."],
    mask: Bool[ArrayLike, "B T"] | None = None,
) -> Float[ArrayLike, "B"]:
    """KL divergence of two Gaussian steps with one std, per row: mean of (mean - mean_reference)^2 / (2 std^2)."""
    return row_mean((mean - mean_reference) ** 2 / (2 * std**2), mask)
