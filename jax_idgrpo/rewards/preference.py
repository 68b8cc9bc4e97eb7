"""Bradley-Terry with ties (Rao-Kupper): the loss that reward models are trained with on preference pairs.

With d = score_a - score_b:

    P(A) = sigmoid(d - log theta),   P(B) = sigmoid(-d - log theta),   P(tie) = (theta^2 - 1) P(A) P(B)

Source: KwaiVGI/VideoAlign, `loss_type = "btt"`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def btt_losses(
    score_a: Float[Array, "B"],
    score_b: Float[Array, "B"],
    label: Int[Array, "B"],
    theta: float = 5.0,
) -> Float[Array, "B"]:
    """Negative log-likelihood of each pair. label: 1 A wins, -1 B wins, 0 tie; any other label is invalid and costs 0."""
    difference = score_a.astype(jnp.float32) - score_b.astype(jnp.float32)
    win_a, win_b = (-jax.nn.log_sigmoid(d - jnp.log(theta)) for d in (difference, -difference))
    tie = win_a + win_b - jnp.log(theta**2 - 1)
    return jnp.select([label == 1, label == -1, label == 0], [win_a, win_b, tie], 0.0)


def btt_loss(
    score_a: Float[Array, "B"],
    score_b: Float[Array, "B"],
    label: Int[Array, "B"],
    theta: float = 5.0,
) -> Float[Array, ""]:
    """Mean of `btt_losses` over all pairs; invalid ones stay in the denominator, as published."""
    return jnp.mean(btt_losses(score_a, score_b, label, theta))
