"""Compute group-relative advantages and the objectives that turn them into a loss.

    clip         GRPO's clipped ratio, Identity-GRPO (arXiv 2510.14256;
                 github.com/alibaba/identity-grpo)
    guard        ratio without its bias, GRPO-Guard (arXiv 2510.22319; also in
                 X-GenGroup/Flow-Factory)
    divergence   divergence mask in place of the clip, Flow-DPPO (arXiv 2606.11025;
                 Tencent-Hunyuan/UniRL)
    nft          DiffusionNFT (arXiv 2509.16117)
    awm          advantage-weighted matching (arXiv 2509.25050)
    dpo          diffusion DPO (arXiv 2311.12908)
    sft          supervised flow matching

The first three replay the stochastic steps of a rollout. The others add noise to the rollout's
final latents x0, x = (1 - sigma) x0 + sigma n, and compare velocities with the target n - x0, so
they need no trajectory.

`config.objectives.OBJECTIVES` lists all objectives. Each entry names the function at the end of
this module that evaluates the objective.

All functions are pure and use only `flow` of the project. They compute in float32, but for the
selection of pairs, which runs on the host. Losses are per row: a trainer sums them over
micro-batches and divides by one count, so accumulation is exact.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int

from jax_idgrpo import flow
from jax_idgrpo.flow import row_mean

# ---- advantages ----------------------------------------------------------------------------------


def advantages(
    rewards: Float[ArrayLike, " B"],
    groups: Int[ArrayLike, " B"],
    *,
    eps: float = 1e-4,
    clip: float = 5.0,
    global_std: bool = False,
) -> Float[ArrayLike, " B"]:
    """Compare each reward with its group: (r - mean) / (std + eps), clipped to [-clip, clip].

    The standard deviation is the population one (ddof 0). One member of the group is subtracted
    before the mean is taken, so a constant group gives exactly 0 in float32, whatever its level.

    Args:
      rewards: [B]; a reward that is not finite gets advantage 0 and does not count in its group.
      groups: [B] integers; rows with equal numbers form a group. Any order, any sizes.
      eps: added to the standard deviation.
      clip: largest magnitude of an advantage.
      global_std: divide by the standard deviation of all rewards instead of the group's.

    Returns:
      float32 [B].
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    groups = jnp.asarray(groups)
    counts = jnp.isfinite(rewards)
    rewards = jnp.where(counts, rewards, 0.0)
    same = ((groups[:, None] == groups[None, :]) & counts[None, :]).astype(jnp.float32)
    first = jnp.argmax(same, axis=1)
    # [i, j]: reward j relative to the first member of i's group.
    shifted = rewards[None, :] - rewards[first][:, None]
    size = jnp.maximum(jnp.sum(same, axis=1), 1.0)
    group_mean = jnp.sum(same * shifted, axis=1) / size
    deviation = jnp.where(counts, jnp.diagonal(shifted) - group_mean, 0.0)
    if global_std:
        spread = jnp.std(rewards - rewards[jnp.argmax(counts)], where=counts)
    else:
        spread = jnp.sqrt(jnp.sum(same * (shifted - group_mean[:, None]) ** 2, axis=1) / size)
    return jnp.clip(deviation / (spread + eps), -clip, clip)


def best_and_worst(scores: Float[ArrayLike, "P G"], best: int, worst: int) -> Int[ArrayLike, "P n"]:
    """Select the members of each group to train on, n = best + worst.

    Scores that are not finite are selected only where a group has too few finite ones. The shape of
    the result is fixed, so the function compiles.

    Args:
      scores: [P, G], one row per group.
      best: how many of the highest scores to select.
      worst: how many of the lowest scores to select.

    Returns:
      [P, n] indices: the highest scores in falling order, then the lowest, the lowest last.
    """
    scores = jnp.asarray(scores, jnp.float32)
    counts = jnp.isfinite(scores)
    # A stable sort: ties keep the order of the members.
    order = jnp.argsort(-jnp.where(counts, scores, -jnp.inf), axis=1)
    tail = jnp.maximum(jnp.sum(counts, axis=1) - worst, best)
    places = jnp.concatenate(
        [jnp.tile(jnp.arange(best), (len(scores), 1)), tail[:, None] + jnp.arange(worst)], axis=1
    )
    return jnp.take_along_axis(order, places, axis=1)


def directed(
    values: Float[ArrayLike, "P G K"], weights: Float[ArrayLike, " K"], *, eps: float = 1e-4
) -> Float[np.ndarray, "P G K"]:
    """Scale terms by their spread within the group and turn them so that larger is better.

        z_k = sign(weight_k) value_k / (spread_k + eps)

    The spread is the population standard deviation over the members without a non-finite term. Those
    members are NaN in the result. A weight of 0 has the sign +1.

    Args:
      values: K terms of the G members of P groups.
      weights: of the terms; the sign is the direction.
      eps: added to the spread.
    """
    values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    counts = np.isfinite(values).all(axis=-1, keepdims=True)
    number = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    known = np.where(counts, values, 0)
    centred = np.where(counts, known - known.sum(axis=1, keepdims=True) / number, 0)
    spread = np.sqrt(np.sum(centred**2, axis=1, keepdims=True) / number)
    return np.where(counts, np.where(weights < 0, -1, 1) * known / (spread + eps), np.nan)


def dominant_pairs(
    values: Float[ArrayLike, "P G K"],
    weights: Float[ArrayLike, " K"],
    slack: Float[ArrayLike, " K"],
    *,
    margin: float = 0.0,
    eps: float = 1e-4,
) -> tuple[Int[np.ndarray, "P 2"], Bool[np.ndarray, " P"]]:
    """Select the pair of each group whose winner is at least as good in every term, up to a slack.

    With z of `directed` and d_k = z_ik - z_jk, member i may win against j if d_k >= -slack_k for every
    k, some d_k > 0, and sum_k |weight_k| d_k > margin. Of these pairs the one with the largest sum is
    selected, the first in the order of (i, j) if several have it. Without slack, its winner is on the
    first Pareto front. Members with a non-finite term are in no pair.

    Sources: MagicID, arXiv 2503.12689; VisionReward, arXiv 2412.21059.

    Args:
      values: K terms of the G members of P groups.
      weights: of the terms; the sign is the direction. A weight of 0 has the sign +1: its term must
        not be worse, and does not count in the sum.
      slack: units of a term's spread by which the winner may be worse, 0 or more.
      margin: least sum, exclusive.
      eps: added to the spread.

    Returns:
      Winner and loser of each group, 0 and 1 where there is no pair, and whether there is one.
    """
    z = directed(values, weights, eps=eps)
    difference = z[:, :, None] - z[:, None]
    with np.errstate(invalid="ignore"):
        gap = difference @ np.abs(np.asarray(weights, np.float64))
        allowed = (difference >= -np.asarray(slack, np.float64)).all(axis=-1)
        allowed &= (difference > 0).any(axis=-1) & (gap > margin)
    best = np.where(allowed, gap, -np.inf).reshape(len(z), -1).argmax(axis=1)
    usable = allowed.reshape(len(z), -1).any(axis=1)
    found = np.stack(np.divmod(best, z.shape[1]), axis=1)
    return np.where(usable[:, None], found, np.array([0, 1])), usable


# ---- objectives on replayed steps ----------------------------------------------------------------


@flax.struct.dataclass
class Surrogate:
    """Policy objective per row.

    Attributes:
      loss: [B].
      ratio: [B] probability ratio of the new policy to the old one.
      stopped: [B] whether the loss has no gradient.
    """

    loss: Float[ArrayLike, " B"]
    ratio: Float[ArrayLike, " B"]
    stopped: Bool[ArrayLike, " B"]


def clipped_loss(
    log_ratio: Float[ArrayLike, " B"], advantage: Float[ArrayLike, " B"], *, clip: float
) -> Surrogate:
    """Return max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)) with ratio = exp(log_ratio).

    Args:
      log_ratio: [B] log-probability of the new policy minus that of the old one.
      advantage: [B] advantage A.
      clip: half-width of the clip range.
    """
    ratio = jnp.exp(log_ratio)
    free, held = -advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip)
    return Surrogate(loss=jnp.maximum(free, held), ratio=ratio, stopped=held > free)


def guarded_loss(
    guarded: Float[ArrayLike, " B"],
    advantage: Float[ArrayLike, " B"],
    dt: Float[ArrayLike, "..."],
    *,
    clip: float,
) -> Surrogate:
    """Return the clipped loss with ratio = exp(mean of noise (mean - mean_old)), divided by -dt.

    The log-ratio's bias -mean((mean - mean_old)^2) / (2 std^2) makes almost every ratio fall below
    1. Without the bias, the clip affects both signs of the advantage equally and every step has
    about the same weight.

    Args:
      guarded: [B], `flow.Change.guarded`.
      advantage: [B].
      dt: [B] or [], sigma_next - sigma < 0.
      clip: half-width of the clip range. `guarded` has the scale of the log-ratio times std, so the
        range of `clipped_loss` does not carry over.
    """
    surrogate = clipped_loss(guarded, advantage, clip=clip)
    return dataclasses.replace(surrogate, loss=surrogate.loss / -jnp.asarray(dt))


def masked_loss(
    log_ratio: Float[ArrayLike, " B"],
    divergence: Float[ArrayLike, " B"],
    advantage: Float[ArrayLike, " B"],
    *,
    limit: float,
) -> Surrogate:
    """Return -A ratio, or 0 where the step would move further from an old one already too far.

    Args:
      log_ratio: [B] log-probability of the new policy minus that of the old one.
      divergence: [B] KL divergence of the step from the old policy's (`flow.divergence`).
      advantage: [B] advantage A.
      limit: divergence from which a row has no loss if its advantage increases the divergence.
    """
    ratio = jnp.exp(log_ratio)
    away = ((advantage > 0) & (ratio > 1)) | ((advantage < 0) & (ratio < 1))
    stopped = away & (divergence >= limit)
    return Surrogate(loss=jnp.where(stopped, 0.0, -advantage * ratio), ratio=ratio, stopped=stopped)


def time_weights(
    gradient_weight: Float[ArrayLike, "*rows"], weight: Float[ArrayLike, "*rows"] | None = None
) -> Float[ArrayLike, "*rows"]:
    """Return the weights (1 / c) / mean(1 / c), which make every step's gradient count equally.

    They are those of Flash-GRPO (github.com/Shredded-Pork/Flash-GRPO).

    Args:
      gradient_weight: c(t) of every row and step of an update (`flow.Transition.weight`).
      weight: weight of each row in the mean; None for equal weights.
    """
    inverse = 1 / jnp.asarray(gradient_weight)
    return inverse / jnp.average(inverse, weights=weight)


# ---- objectives on noised latents ----------------------------------------------------------------


def matching_error(
    v: Float[ArrayLike, " B *shape"],
    target: Float[ArrayLike, " B *shape"],
    mask: Bool[ArrayLike, "B T"] | None = None,
) -> Float[ArrayLike, " B"]:
    """Return the error of supervised flow matching per row, the mean of (v - target)^2.

    With the velocity of the base as the target, it is the velocity KL.

    Args:
      v: [B,T,H,W,C] velocity.
      target: [B,T,H,W,C] n - x0.
      mask: [B,T] frames that count; None for all.
    """
    return row_mean((v - target) ** 2, mask)


def _error_change(
    v: Float[ArrayLike, " B *shape"],
    v_other: Float[ArrayLike, " B *shape"],
    target: Float[ArrayLike, " B *shape"],
    mask: Bool[ArrayLike, "B T"] | None,
) -> Float[ArrayLike, " B"]:
    """Return matching_error(v) - matching_error(v_other), exactly 0 for equal velocities."""
    return row_mean((v - v_other) * (v + v_other - 2 * target), mask)


def nft_loss(
    v: Float[ArrayLike, " B *shape"],
    v_old: Float[ArrayLike, " B *shape"],
    target: Float[ArrayLike, " B *shape"],
    sigma: Float[ArrayLike, " B"],
    advantage: Float[ArrayLike, " B"],
    *,
    beta: float,
    advantage_clip: float,
    normalise: bool = True,
    mask: Bool[ArrayLike, "B T"] | None = None,
) -> Float[ArrayLike, " B"]:
    """Return the DiffusionNFT loss per row.

    The loss pulls the velocity towards the sample with weight r, its optimality, and the velocity's
    mirror image with weight 1 - r.

        r = clip(A / (2 advantage_clip) + 1/2, 0, 1)
        v+ = v_old + beta (v - v_old),    v- = v_old - beta (v - v_old)
        loss = advantage_clip (r L(v+) + (1 - r) L(v-)) / beta

    Args:
      v: [B,T,H,W,C] velocity of the trained policy.
      v_old: [B,T,H,W,C] velocity of the policy that sampled, a constant.
      target: [B,T,H,W,C] n - x0.
      sigma: [B] noise level.
      advantage: [B] advantage A.
      beta: step from the old velocity, > 0.
      advantage_clip: advantage at which the optimality reaches 1.
      normalise: L(v) is the error of the predicted x0, mean of (sigma (v - target))^2, divided by
        its mean absolute value (at least 1e-5, a constant for the gradient). Otherwise L(v) is the
        mean of (v - target)^2, whose minimiser for one sample is
        v_old + (2 r - 1) (target - v_old) / beta.
      mask: [B,T] frames that count; None for all.
    """
    optimality = jnp.clip(advantage / (2 * advantage_clip) + 0.5, 0, 1)
    v_old = jax.lax.stop_gradient(v_old)
    moved = beta * (v - v_old)

    def error(velocity: Float[ArrayLike, " B *shape"]) -> Float[ArrayLike, " B"]:
        square = row_mean((velocity - target) ** 2, mask)
        if not normalise:
            return square
        size = sigma * jax.lax.stop_gradient(row_mean(jnp.abs(velocity - target), mask))
        return sigma**2 * square / jnp.maximum(size, 1e-5)

    return (
        advantage_clip
        / beta
        * (optimality * error(v_old + moved) + (1 - optimality) * error(v_old - moved))
    )


AWM_WEIGHTINGS = ("uniform", "sigma", "sigma2", "huber", "ghuber")
"""Names of the functions that weight the velocity's error in `awm_loss`."""


def _matching_log_prob(
    error: Float[ArrayLike, " B"], sigma: Float[ArrayLike, " B"], weighting: str
) -> Float[ArrayLike, " B"]:
    if weighting == "huber":
        return -(jnp.sqrt(error + 1e-10) - 1e-5) * sigma
    if weighting == "ghuber":
        return -((error + 1e-10) ** 0.25 - 1e-10**0.25) * sigma / 0.25
    return -error * {"uniform": 1.0, "sigma": sigma, "sigma2": sigma**2}[weighting]


def awm_loss(
    v: Float[ArrayLike, " B *shape"],
    v_old: Float[ArrayLike, " B *shape"],
    target: Float[ArrayLike, " B *shape"],
    sigma: Float[ArrayLike, " B"],
    advantage: Float[ArrayLike, " B"],
    *,
    clip: float,
    weighting: str = "ghuber",
    mask: Bool[ArrayLike, "B T"] | None = None,
) -> Surrogate:
    """Return the advantage-weighted matching loss: the clipped loss with log_prob = -error.

    On-policy the ratio is exactly 1 and the gradient is that of flow matching, weighted by the
    advantage.

    Args:
      v: [B,T,H,W,C] velocity of the trained policy.
      v_old: [B,T,H,W,C] velocity of the policy that sampled, a constant.
      target: [B,T,H,W,C] n - x0.
      sigma: [B] noise level.
      advantage: [B].
      clip: half-width of the clip range of the ratio.
      weighting: form of the error; with m = mean of (v - target)^2: "uniform" m, "sigma" sigma m,
        "sigma2" sigma^2 m, "huber" sigma m^(1/2), "ghuber" 4 sigma m^(1/4).
      mask: [B,T] frames that count; None for all.
    """
    v_old = jax.lax.stop_gradient(v_old)
    old = matching_error(v_old, target, mask)
    new = jnp.maximum(old + _error_change(v, v_old, target, mask), 0.0)
    log_ratio = _matching_log_prob(new, sigma, weighting) - _matching_log_prob(
        old, sigma, weighting
    )
    return clipped_loss(log_ratio, advantage, clip=clip)


def dpo_loss(
    v: Float[ArrayLike, " B *shape"],
    v_reference: Float[ArrayLike, " B *shape"],
    target: Float[ArrayLike, " B *shape"],
    *,
    beta: float,
    mask: Bool[ArrayLike, "B T"] | None = None,
) -> Float[ArrayLike, " B"]:
    """Return the diffusion DPO loss of pairs: rows 0, 2, ... are preferred to rows 1, 3, ...

        change = error(v) - error(v_reference)
        loss   = -log sigmoid(-beta / 2 (change of the winner - change of the loser))

    Every row gets its pair's loss, so the mean over rows is the mean over pairs.

    Args:
      v: [B,T,H,W,C] velocity of the trained policy. Both rows of a pair share noise and noise
        level.
      v_reference: [B,T,H,W,C] velocity of the frozen base, a constant.
      target: [B,T,H,W,C] n - x0.
      beta: scale of the implicit reward.
      mask: [B,T] frames that count; None for all.
    """
    change = _error_change(v, jax.lax.stop_gradient(v_reference), target, mask).reshape(-1, 2)
    return jnp.repeat(-jax.nn.log_sigmoid(-beta / 2 * (change[:, 0] - change[:, 1])), 2)


# ---- the functions of the table ------------------------------------------------------------------

Rows = dict[str, Float[ArrayLike, " B"]]
"""Values per row by name: `policy_loss` and the other logged values."""


@runtime_checkable
class Settings(Protocol):
    """Settings of the objectives: the section `grpo` of a configuration, which documents them."""

    @property
    def clip(self) -> float: ...

    @property
    def divergence(self) -> float: ...

    @property
    def advantage_clip(self) -> float: ...

    @property
    def nft_beta(self) -> float: ...

    @property
    def nft_normalise(self) -> bool: ...

    @property
    def awm_weighting(self) -> str: ...

    @property
    def dpo_beta(self) -> float: ...


@flax.struct.dataclass
class Replayed:
    """Arguments of an objective of kind "replay": one stochastic step of the rollout, replayed.

    Attributes:
      transition: step of each row.
      dt: [B] sigma_next - sigma.
      v: [B,T,H,W,C] velocity of the trained policy.
      v_old: [B,T,H,W,C] velocity of the policy that sampled.
      change: difference between the two policies' steps.
      advantage: [B].
      mask: [B,T] frames that count; None for all.
    """

    transition: flow.Transition
    dt: Float[ArrayLike, " B"]
    v: Float[ArrayLike, " B *shape"]
    v_old: Float[ArrayLike, " B *shape"]
    change: flow.Change
    advantage: Float[ArrayLike, " B"]
    mask: Bool[ArrayLike, "B T"] | None


@flax.struct.dataclass
class Noised:
    """Arguments of an objective of kind "latents": final latents at one noise level.

    Attributes:
      v: [B,T,H,W,C] velocity of the trained policy.
      v_old: [B,T,H,W,C] velocity of the policy that sampled, a constant.
      base: [B,T,H,W,C] velocity of the frozen base, a constant; None where it is not needed.
      target: [B,T,H,W,C] noise - x0.
      sigma: [B] noise level.
      advantage: [B].
      mask: [B,T] frames that count; None for all.
    """

    v: Float[ArrayLike, " B *shape"]
    v_old: Float[ArrayLike, " B *shape"]
    base: Float[ArrayLike, " B *shape"] | None
    target: Float[ArrayLike, " B *shape"]
    sigma: Float[ArrayLike, " B"]
    advantage: Float[ArrayLike, " B"]
    mask: Bool[ArrayLike, "B T"] | None


def _surrogate_rows(surrogate: Surrogate) -> Rows:
    return {
        "ratio": surrogate.ratio,
        "policy_loss": surrogate.loss,
        "approx_kl": 0.5 * jnp.log(surrogate.ratio) ** 2,
        "clip_fraction": surrogate.stopped.astype(jnp.float32),
    }


def clip_rows(step: Replayed, settings: Settings) -> Rows:
    """Evaluate "clip" (`clipped_loss`)."""
    return _surrogate_rows(clipped_loss(step.change.log_ratio, step.advantage, clip=settings.clip))


def guard_rows(step: Replayed, settings: Settings) -> Rows:
    """Evaluate "guard" (`guarded_loss`)."""
    return _surrogate_rows(
        guarded_loss(step.change.guarded, step.advantage, step.dt, clip=settings.clip)
    )


def divergence_rows(step: Replayed, settings: Settings) -> Rows:
    """Evaluate "divergence" (`masked_loss`)."""
    distance = jax.lax.stop_gradient(
        flow.divergence(step.transition, step.v, step.v_old, step.mask)
    )
    return _surrogate_rows(
        masked_loss(step.change.log_ratio, distance, step.advantage, limit=settings.divergence)
    )


def nft_rows(level: Noised, settings: Settings) -> Rows:
    """Evaluate "nft" (`nft_loss`)."""
    loss = nft_loss(
        level.v,
        level.v_old,
        level.target,
        level.sigma,
        level.advantage,
        beta=settings.nft_beta,
        advantage_clip=settings.advantage_clip,
        normalise=settings.nft_normalise,
        mask=level.mask,
    )
    return {"policy_loss": loss}


def awm_rows(level: Noised, settings: Settings) -> Rows:
    """Evaluate "awm" (`awm_loss`)."""
    return _surrogate_rows(
        awm_loss(
            level.v,
            level.v_old,
            level.target,
            level.sigma,
            level.advantage,
            clip=settings.clip,
            weighting=settings.awm_weighting,
            mask=level.mask,
        )
    )


def dpo_rows(level: Noised, settings: Settings) -> Rows:
    """Evaluate "dpo" (`dpo_loss`)."""
    return {
        "policy_loss": dpo_loss(
            level.v, level.base, level.target, beta=settings.dpo_beta, mask=level.mask
        )
    }


def sft_rows(level: Noised, settings: Settings) -> Rows:
    """Evaluate "sft" (`matching_error`)."""
    return {"policy_loss": matching_error(level.v, level.target, level.mask)}


def reward_rows(reward: Float[ArrayLike, " B"], settings: Settings) -> Rows:
    """Evaluate "reward_gradient"."""
    return {"policy_loss": -reward}
