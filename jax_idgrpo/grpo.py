"""Group-relative advantages and the clipped objective of Identity-GRPO (arXiv 2510.14256; github.com/alibaba/identity-grpo).

Pure functions, float32, independent of the rest of the project. Losses come per row, so that a trainer can sum them over
micro-batches and divide by one count: accumulation is then exact.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float, Int


def advantages(
    rewards: Float[ArrayLike, "B"],
    groups: Int[ArrayLike, "B"],
    *,
    eps: float = 1e-4,
    clip: float = 5.0,
    global_std: bool = False,
) -> Float[ArrayLike, "B"]:
    """How much better each video is than its group: (r - mean) / (std + eps), clipped to [-clip, clip].

    The standard deviation is the population one (ddof 0), of the group or, with `global_std`, of all rewards. One member of the
    group is subtracted before the mean is taken, so a constant group gives exactly 0 in float32, whatever its level.

    Args:
      rewards: [B] finite.
      groups: [B] integers; equal numbers belong together. Any order, any sizes.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    groups = jnp.asarray(groups)
    same = (groups[:, None] == groups[None, :]).astype(jnp.float32)
    first = jnp.argmax(same, axis=1)
    shifted = rewards[None, :] - rewards[first][:, None]  # [i, j]: reward j seen from the first member of i's group
    size = jnp.sum(same, axis=1)
    group_mean = jnp.sum(same * shifted, axis=1) / size
    deviation = jnp.diagonal(shifted) - group_mean
    if global_std:
        spread = jnp.std(rewards - rewards[0])
    else:
        spread = jnp.sqrt(jnp.sum(same * (shifted - group_mean[:, None]) ** 2, axis=1) / size)
    return jnp.clip(deviation / (spread + eps), -clip, clip)


@flax.struct.dataclass
class Clipped:
    """The clipped objective per row: loss [B], ratio [B]."""

    loss: Float[ArrayLike, "B"]
    ratio: Float[ArrayLike, "B"]


def clipped_loss(
    log_ratio: Float[ArrayLike, "B"],
    advantage: Float[ArrayLike, "B"],
    *,
    clip: float,
) -> Clipped:
    """max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)) with ratio = exp(log_ratio), per row."""
    ratio = jnp.exp(log_ratio)
    loss = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip))
    return Clipped(loss=loss, ratio=ratio)
