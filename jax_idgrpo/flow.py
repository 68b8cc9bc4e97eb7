"""Define the flow-matching sampler: noise schedule, stochastic steps and ODE solvers.

The model predicts the velocity v = noise - x0 along x = (1 - sigma) x0 + sigma noise; sigma falls
from about 1 to 0. Every stochastic sampler is a `Transition`: the next sample is drawn around
a x + b v, with coefficients that depend only on sigma.

    identity   Identity-GRPO (arXiv 2510.14256; github.com/alibaba/identity-grpo,
               sde_step_with_logprob)
    flow       Flow-GRPO (arXiv 2505.05470; github.com/yifan123/flow_grpo)
    dance      DanceGRPO (arXiv 2505.07818; github.com/XueZeyue/DanceGRPO)
    cps        coefficient-preserving sampling (arXiv 2509.05952, FlowCPS; also in flow_grpo and
               X-GenGroup/Flow-Factory)

The schedule is that of Wan2.1 (github.com/Wan-Video/Wan2.1, FlowUniPCMultistepScheduler) and of
diffusers 0.33 to 0.36. The ODE is solved by Euler steps or by UniPC of order 2 (arXiv 2302.04867,
B(h) = e^h - 1; diffusers, UniPCMultistepScheduler).

All functions are pure, compute in float32, and use nothing else of the project.
"""

import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int

Sigma = Float[ArrayLike, "..."] | float

FRAMES_PER_LATENT = 4
"""Video frames per latent frame. The first latent frame holds a single video frame."""


def latent_frames(frames: int) -> int:
    """Return the number of latent frames T of a video of F = 1 + 4n frames."""
    return (frames - 1) // FRAMES_PER_LATENT + 1


def shifted(u: Float[ArrayLike, "..."], shift: Sigma) -> Float[ArrayLike, "..."]:
    """Return the noise levels sigma = shift u / (1 + (shift - 1) u).

    Arrays keep their dtype and library.

    Args:
      u: unshifted noise levels in [0, 1].
      shift: positive flow shift.
    """
    return shift * u / (1 + (shift - 1) * u)


def timestep(sigma: Float[ArrayLike, "..."]) -> Int[ArrayLike, "..."]:
    """Return the model's timestep at a noise level: int32, 1000 sigma truncated, at most 999."""
    return (1000 * sigma).clip(max=999).astype(np.int32)


def _sigmas64(num_steps: int, shift: float) -> np.ndarray:
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a schedule needs 1 or more")
    if shift <= 0:
        raise ValueError(f"shift is {shift}; use a positive number")
    unshifted = np.flip(1 - np.linspace(1, 1 / 1000, num_steps + 1))[:-1]
    return shifted(unshifted, shift)


def sigmas(num_steps: int, shift: float) -> np.ndarray:
    """Return the noise levels of a schedule, falling from about 1; the last is 0.

    With u = 0.999 (1 - i/S), sigma = shift u / (1 + (shift - 1) u), computed in float64.

    Args:
      num_steps: denoising steps S.
      shift: positive flow shift.

    Returns:
      float32 [S+1].

    Raises:
      ValueError: fewer than one step, or a shift that is not positive.
    """
    return np.append(_sigmas64(num_steps, shift), 0.0).astype(np.float32)


def timesteps(num_steps: int, shift: float) -> np.ndarray:
    """Return the timesteps of a schedule, computed from float64 noise levels.

    Values can repeat, so index steps by position.

    Args:
      num_steps: denoising steps S.
      shift: positive flow shift.

    Returns:
      int32 [S].

    Raises:
      ValueError: fewer than one step, or a shift that is not positive.
    """
    return timestep(_sigmas64(num_steps, shift))


def row_mean(
    values: Float[ArrayLike, " B *shape"], mask: Bool[ArrayLike, "B T"] | None = None
) -> Float[ArrayLike, " B"]:
    """Average each row over all its elements, or over the frames that `mask` [B,T] marks."""
    axes = tuple(range(1, values.ndim))
    if mask is None:
        return jnp.mean(values, axis=axes)
    weights = mask.astype(values.dtype).reshape(mask.shape + (1,) * (values.ndim - 2))
    per_frame = math.prod(values.shape[2:])
    return jnp.sum(values * weights, axis=axes) / (jnp.sum(weights, axis=axes) * per_frame)


# ---- stochastic samplers -------------------------------------------------------------------------


@flax.struct.dataclass
class Transition:
    """One stochastic step x_next = a x + b v + std noise, with the terms of its log-probability.

    log_prob = mean over the row of  -precision (x_next - a x - b v)^2 / 2 - constant. A Gaussian
    has precision 1 / std^2 and constant log std + log(2 pi) / 2. All fields have one shape: [] for
    one step, [S] for a schedule, [B] for a step per row.
    """

    a: Float[ArrayLike, "*steps"]
    b: Float[ArrayLike, "*steps"]
    std: Float[ArrayLike, "*steps"]
    precision: Float[ArrayLike, "*steps"]
    constant: Float[ArrayLike, "*steps"]

    def at(self, index: Int[ArrayLike, "..."] | int) -> "Transition":
        """Return the steps `index` of a schedule."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    @property
    def weight(self) -> Float[ArrayLike, "..."]:
        """Weight c(t): up to its sign, the gradient of log_prob by the velocity is c(t) noise / D.

        D is the number of elements in a row.
        """
        return self.precision * jnp.abs(self.b) * self.std


def _gaussian(a: Sigma, b: Sigma, std: Sigma) -> Transition:
    return Transition(
        a=a, b=b, std=std, precision=1 / std**2, constant=jnp.log(std) + 0.5 * math.log(2 * math.pi)
    )


def _sde(sigma: Sigma, sigma_next: Sigma, diffusion: Sigma) -> Transition:
    """Return the Euler step of the SDE that has the ODE's marginals.

        mean = x (1 + diffusion^2 / (2 sigma) dt) + v (1 + diffusion^2 (1 - sigma) / (2 sigma)) dt
        std  = diffusion sqrt(-dt)

    Args:
      sigma: noise level at the start of the step.
      sigma_next: noise level at the end of the step.
      diffusion: diffusion coefficient.
    """
    dt = sigma_next - sigma
    a = 1 + diffusion**2 / (2 * sigma) * dt
    b = (1 + diffusion**2 * (1 - sigma) / (2 * sigma)) * dt
    return _gaussian(a, b, diffusion * jnp.sqrt(-dt))


def _float32(*values: Sigma) -> tuple[Float[ArrayLike, "..."], ...]:
    return tuple(jnp.asarray(value, jnp.float32) for value in values)


def identity_sde(
    sigma: Sigma, sigma_next: Sigma, sigma_max: Sigma, noise_level: float = 1.0
) -> Transition:
    """Return the Identity-GRPO step, with diffusion noise_level sigma_max sigma.

    Args:
      sigma: noise levels at the start of the steps.
      sigma_next: noise levels at the end of the steps.
      sigma_max: second entry of the schedule.
      noise_level: scale of the diffusion.
    """
    sigma, sigma_next, sigma_max = _float32(sigma, sigma_next, sigma_max)
    return _sde(sigma, sigma_next, noise_level * sigma_max * sigma)


def flow_sde(
    sigma: Sigma, sigma_next: Sigma, sigma_max: Sigma, noise_level: float = 0.7
) -> Transition:
    """Return the Flow-GRPO step, with diffusion noise_level sqrt(sigma / (1 - sigma)).

    Where sigma is within 1e-3 of 1, sigma_max replaces sigma in the denominator. The public codes
    test for sigma = 1 exactly, which a schedule that starts at 0.9997 never meets: its first step
    would have a standard deviation of 4.5.

    Args:
      sigma: noise levels at the start of the steps.
      sigma_next: noise levels at the end of the steps.
      sigma_max: second entry of the schedule.
      noise_level: scale of the diffusion.
    """
    sigma, sigma_next, sigma_max = _float32(sigma, sigma_next, sigma_max)
    return _sde(
        sigma,
        sigma_next,
        noise_level * jnp.sqrt(sigma / (1 - jnp.where(sigma >= 1 - 1e-3, sigma_max, sigma))),
    )


def dance_sde(
    sigma: Sigma, sigma_next: Sigma, sigma_max: Sigma, noise_level: float = 0.3
) -> Transition:
    """Return the DanceGRPO step, with diffusion noise_level at every noise level.

    Args:
      sigma: noise levels at the start of the steps.
      sigma_next: noise levels at the end of the steps.
      sigma_max: not used; all samplers have one signature.
      noise_level: diffusion coefficient.
    """
    sigma, sigma_next, _ = _float32(sigma, sigma_next, sigma_max)
    return _sde(sigma, sigma_next, jnp.full_like(sigma, noise_level))


def cps(sigma: Sigma, sigma_next: Sigma, sigma_max: Sigma, noise_level: float = 0.7) -> Transition:
    """Return the step that replaces part of the predicted noise n by fresh noise.

    The noise level after the step is sigma_next exactly.

        mean = (1 - sigma_next) x0 + sigma_next cos(noise_level pi / 2) n
        std  = sigma_next sin(noise_level pi / 2)
        x0   = x - sigma v,    n = x + (1 - sigma) v

    Its log-probability is -(x_next - mean)^2 without 1 / (2 std^2) and constants: the step to 0 has
    no noise to divide by.

    Args:
      sigma: noise levels at the start of the steps.
      sigma_next: noise levels at the end of the steps.
      sigma_max: not used; all samplers have one signature.
      noise_level: share of fresh noise, in [0, 1].
    """
    sigma, sigma_next, _ = _float32(sigma, sigma_next, sigma_max)
    kept = sigma_next * math.cos(noise_level * math.pi / 2)
    return Transition(
        a=(1 - sigma_next) + kept,
        b=kept * (1 - sigma) - (1 - sigma_next) * sigma,
        std=sigma_next * math.sin(noise_level * math.pi / 2),
        precision=jnp.full_like(sigma, 2.0),
        constant=jnp.zeros_like(sigma),
    )


SAMPLERS: dict[str, Callable[..., Transition]] = {
    "identity": identity_sde,
    "flow": flow_sde,
    "dance": dance_sde,
    "cps": cps,
}
"""Stochastic samplers by name, called with (sigma, sigma_next, sigma_max[, noise_level])."""


def _along(
    value: Float[ArrayLike, "..."], x: Float[ArrayLike, " B *shape"]
) -> Float[ArrayLike, "..."]:
    """Reshape a scalar or a value per row [B] to broadcast against x [B,...].

    Values of higher rank broadcast already and pass unchanged.
    """
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim <= 1 else value


@flax.struct.dataclass
class Step:
    """One stochastic step.

    Attributes:
      x_next: [B,T,H,W,C] next sample.
      log_prob: [B] log-probability of `x_next`, a mean over the valid elements of a row.
      mean: [B,T,H,W,C] mean of the step's Gaussian.
      std: standard deviation of the step's Gaussian; [] or the shape of the transition.
    """

    x_next: Float[ArrayLike, " B *shape"]
    log_prob: Float[ArrayLike, " B"]
    mean: Float[ArrayLike, " B *shape"]
    std: Float[ArrayLike, "..."]


def step(
    transition: Transition,
    x: Float[ArrayLike, " B *shape"],
    v: Float[ArrayLike, " B *shape"],
    noise: Float[ArrayLike, " B *shape"] | None = None,
    x_next: Float[ArrayLike, " B *shape"] | None = None,
    mask: Bool[ArrayLike, "B T"] | None = None,
) -> Step:
    """Take one step of any sampler, drawn from `noise` or scored at a given `x_next`.

    Gradients flow through `mean`; `x_next` is a constant.

    Args:
      transition: the step; its fields broadcast against the rows of `x`.
      x: [B,T,H,W,C] current sample.
      v: [B,T,H,W,C] velocity at `x`.
      noise: [B,T,H,W,C] standard normal noise, to draw the next sample.
      x_next: [B,T,H,W,C] next sample, to score.
      mask: [B,T] frames that count in the log-probability; None for all.

    Raises:
      ValueError: neither or both of `noise` and `x_next` are given.
    """
    if (noise is None) == (x_next is None):
        raise ValueError("a step takes either noise (to draw) or x_next (to score)")
    x, v = x.astype(jnp.float32), v.astype(jnp.float32)
    a, b, std, precision, constant = (
        _along(value, x)
        for value in (
            transition.a,
            transition.b,
            transition.std,
            transition.precision,
            transition.constant,
        )
    )
    mean = x * a + v * b
    if x_next is None:
        x_next = mean + std * noise
    x_next = jax.lax.stop_gradient(x_next)
    log_density = -((x_next - mean) ** 2) * (precision / 2) - constant
    return Step(x_next=x_next, log_prob=row_mean(log_density, mask), mean=mean, std=transition.std)


def sde_step(
    x: Float[ArrayLike, " B *shape"],
    v: Float[ArrayLike, " B *shape"],
    sigma: Sigma,
    sigma_next: Sigma,
    sigma_max: Sigma,
    noise: Float[ArrayLike, " B *shape"] | None = None,
    x_next: Float[ArrayLike, " B *shape"] | None = None,
    mask: Bool[ArrayLike, "B T"] | None = None,
) -> Step:
    """Take one step of the Identity SDE, drawn from `noise` or scored at a given `x_next`.

        dt     = sigma_next - sigma < 0
        std    = sigma_max sigma
        mean   = x (1 + std^2 / (2 sigma) dt) + v (1 + std^2 (1 - sigma) / (2 sigma)) dt
        x_next = mean + s noise,    s = std sqrt(-dt)
        log_prob = mean over the row of  -(x_next - mean)^2 / (2 s^2) - log s - log(2 pi) / 2

    Args:
      x: [B,T,H,W,C] current sample.
      v: [B,T,H,W,C] velocity at `x`.
      sigma: noise level at the start of the step; a scalar, [B], or an array that broadcasts
        against x, as the other two.
      sigma_next: noise level at the end of the step.
      sigma_max: second entry of the schedule.
      noise: [B,T,H,W,C] standard normal noise, to draw the next sample.
      x_next: [B,T,H,W,C] next sample, to score.
      mask: [B,T] frames that count in the log-probability; None for all.

    Raises:
      ValueError: neither or both of `noise` and `x_next` are given.
    """
    return step(identity_sde(sigma, sigma_next, sigma_max), x, v, noise, x_next, mask)


@flax.struct.dataclass
class Change:
    """Difference between a policy's step and the sampled step, per row.

    Both fields are exactly 0 where the velocities are equal.

    Attributes:
      log_ratio: log_prob(x_next; v) - log_prob(x_next; v_old).
      guarded: mean of noise (mean - mean_old), which is std times the log-ratio without its bias
        -mean((mean - mean_old)^2) / (2 std^2).
    """

    log_ratio: Float[ArrayLike, " B"]
    guarded: Float[ArrayLike, " B"]


def change(
    transition: Transition,
    x: Float[ArrayLike, " B *shape"],
    v: Float[ArrayLike, " B *shape"],
    v_old: Float[ArrayLike, " B *shape"],
    x_next: Float[ArrayLike, " B *shape"],
    mask: Bool[ArrayLike, "B T"] | None = None,
) -> Change:
    """Compare two velocities at a step from x to x_next by the difference d = b (v - v_old).

        log_ratio  = mean over the row of  precision d (x_next - mean_old - d / 2)
        guarded    = mean over the row of  d (x_next - mean_old) / std

    Subtracting two log-probabilities near 1 would leave rounding errors that depend on how the
    compiler ordered each sum. This form has none. Gradients flow through `v`.

    Args:
      transition: the step.
      x: [B,T,H,W,C] sample at the start of the step.
      v: [B,T,H,W,C] velocity of the trained policy at `x`.
      v_old: [B,T,H,W,C] velocity of the policy that sampled, a constant.
      x_next: [B,T,H,W,C] sample at the end of the step, a constant.
      mask: [B,T] frames that count; None for all.
    """
    x, v, v_old = (value.astype(jnp.float32) for value in (x, v, v_old))
    x_next, v_old = jax.lax.stop_gradient((x_next, v_old))
    a, b, std, precision = (
        _along(value, x)
        for value in (transition.a, transition.b, transition.std, transition.precision)
    )
    moved = b * (v - v_old)
    off = x_next - (x * a + v_old * b)
    return Change(
        log_ratio=row_mean(precision * moved * (off - 0.5 * moved), mask),
        guarded=row_mean(moved * off / std, mask),
    )


def divergence(
    transition: Transition,
    v: Float[ArrayLike, " B *shape"],
    v_other: Float[ArrayLike, " B *shape"],
    mask: Bool[ArrayLike, "B T"] | None = None,
) -> Float[ArrayLike, " B"]:
    """Return the KL divergence of two steps from one x, per row.

    For Gaussians of one std, it is exactly the mean of (mean - mean_other)^2 / (2 std^2). Where the
    log-probability is not a Gaussian's (`cps`), it has the units of that log-probability: mean of
    precision (mean - mean_other)^2 / 2.

    Args:
      transition: the step.
      v: [B,T,H,W,C] velocity of one policy.
      v_other: [B,T,H,W,C] velocity of the other policy.
      mask: [B,T] frames that count; None for all.
    """
    b, precision = (_along(value, v) for value in (transition.b, transition.precision))
    return row_mean(
        0.5 * precision * (b * (v.astype(jnp.float32) - v_other.astype(jnp.float32))) ** 2, mask
    )


# ---- the ODE -------------------------------------------------------------------------------------


def ode_step(
    x: Float[ArrayLike, " B *shape"],
    v: Float[ArrayLike, " B *shape"],
    sigma: Sigma,
    sigma_next: Sigma,
) -> Float[ArrayLike, " B *shape"]:
    """Take the deterministic Euler step x + v (sigma_next - sigma).

    The step to sigma_next = 0 gives the prediction of x0.

    Args:
      x: [B,T,H,W,C] current sample.
      v: [B,T,H,W,C] velocity at `x`.
      sigma: noise level at the start of the step; broadcasts against x, as `sigma_next`.
      sigma_next: noise level at the end of the step.
    """
    return x.astype(jnp.float32) + v.astype(jnp.float32) * (
        jnp.asarray(sigma_next, jnp.float32) - sigma
    )


@flax.struct.dataclass
class Solver:
    """Coefficients of a linear multistep method for the ODE.

    With the predictions m = x - sigma v of x0, step i computes

        corrected = corrector[i] . (x, corrected_{i-1}, m_{i-2}, m_{i-1}, m_i)
        x_next    = predictor[i] . (corrected, m_{i-1}, m_i)
    """

    corrector: Float[ArrayLike, "*steps 5"]
    predictor: Float[ArrayLike, "*steps 3"]


def euler(sigma: Float[ArrayLike, " levels"]) -> Solver:
    """Return Euler's method, x + v (sigma_next - sigma): first order, one evaluation per step."""
    sigma = np.asarray(sigma, np.float64)
    slope = np.diff(sigma) / sigma[:-1]
    steps = len(slope)
    corrector = np.tile([1.0, 0, 0, 0, 0], (steps, 1))
    predictor = np.stack([1 + slope, np.zeros(steps), -slope], axis=1)
    return Solver(corrector=corrector.astype(np.float32), predictor=predictor.astype(np.float32))


def unipc(sigma: Float[ArrayLike, " levels"]) -> Solver:
    """Return UniPC of order 2 with B(h) = e^h - 1 on predictions of x0.

    The first and the last step are of first order. With l = log((1 - sigma) / sigma),
    h = l_next - l, p = 1 - e^-h and D a difference of predictions over its distance in l,

        predictor   x_next = sigma_next / sigma x + (1 - sigma_next) p (m_i + D(m_{i-1}, m_i) h / 2)
        corrector   repeats the step once the prediction at its end is known, with weights that
                    raise its order by one
    """
    sigma = np.asarray(sigma, np.float64)
    with np.errstate(divide="ignore"):
        log_snr = np.log(1 - sigma) - np.log(sigma)
    steps = len(sigma) - 1
    corrector, predictor = np.zeros((steps, 5)), np.zeros((steps, 3))
    corrector[0, 0] = 1
    for i in range(steps):
        scale, p = (
            sigma[i + 1] / sigma[i],
            (1 - sigma[i + 1]) * -np.expm1(log_snr[i] - log_snr[i + 1]),
        )
        predictor[i] = scale, 0, p
        if i == 0 or i == steps - 1:
            continue
        # The position of m_{i-1}, in units of the step.
        r = (log_snr[i - 1] - log_snr[i]) / (log_snr[i + 1] - log_snr[i])
        predictor[i] += 0, 0.5 * p / r, -0.5 * p / r
    for i in range(1, steps):
        h = log_snr[i] - log_snr[i - 1]
        scale, p = sigma[i] / sigma[i - 1], (1 - sigma[i]) * -np.expm1(-h)
        if i == 1:
            corrector[i] = 0, scale, 0, 0.5 * p, 0.5 * p
            continue
        r = (log_snr[i - 2] - log_snr[i - 1]) / h
        phi_2 = -np.expm1(-h) / h - 1  # moments of the exponential integrator over the step
        phi_3 = -phi_2 / h - 0.5
        old, new = np.linalg.solve([[1, 1], [r, 1]], np.array([phi_2, 2 * phi_3]) / np.expm1(-h))
        corrector[i] = 0, scale, p * old / r, p * (1 - old / r - new), p * new
    return Solver(corrector=corrector.astype(np.float32), predictor=predictor.astype(np.float32))


SOLVERS: dict[str, Callable[[Float[ArrayLike, " levels"]], Solver]] = {
    "euler": euler,
    "unipc": unipc,
}
"""ODE solvers by name; each computes its coefficients from the schedule."""


@flax.struct.dataclass
class SolverState:
    """State that a multistep method carries from step to step.

    Attributes:
      x: [B,T,H,W,C] current sample.
      corrected: last corrected sample.
      older: prediction of x0 two steps ago.
      newer: prediction of x0 one step ago.
    """

    x: Float[ArrayLike, " B *shape"]
    corrected: Float[ArrayLike, " B *shape"]
    older: Float[ArrayLike, " B *shape"]
    newer: Float[ArrayLike, " B *shape"]

    @classmethod
    def start(cls, x: Float[ArrayLike, " B *shape"]) -> "SolverState":
        """Return the state before the first step."""
        zero = jnp.zeros_like(x)
        return cls(x=x, corrected=zero, older=zero, newer=zero)


def solver_step(
    solver: Solver, state: SolverState, v: Float[ArrayLike, " B *shape"], sigma: Sigma
) -> SolverState:
    """Take one step of the ODE.

    Args:
      solver: coefficients of this step.
      state: state at the start of the step.
      v: [B,T,H,W,C] velocity at `state.x`.
      sigma: noise level at the start of the step.
    """
    m = state.x - sigma * v.astype(jnp.float32)

    def combine(
        weights: Float[ArrayLike, " terms"], *terms: Float[ArrayLike, " B *shape"]
    ) -> Float[ArrayLike, " B *shape"]:
        return sum(weights[n] * term for n, term in enumerate(terms))

    corrected = combine(solver.corrector, state.x, state.corrected, state.older, state.newer, m)
    return SolverState(
        x=combine(solver.predictor, corrected, state.newer, m),
        corrected=corrected,
        older=state.newer,
        newer=m,
    )
