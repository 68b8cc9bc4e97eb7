"""Compute the Bradley-Terry loss with ties (Rao-Kupper) of reward models on preference pairs.

With d = score_a - score_b:

    P(A) = sigmoid(d - log theta)
    P(B) = sigmoid(-d - log theta)
    P(tie) = (theta^2 - 1) P(A) P(B)

Source: KwaiVGI/VideoAlign, `loss_type = "btt"`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def btt_losses(
    score_a: Float[Array, " B"],
    score_b: Float[Array, " B"],
    label: Int[Array, " B"],
    theta: float = 5.0,
) -> Float[Array, " B"]:
    """Compute the negative log-likelihood of each pair.

    Args:
      score_a: scores of the videos A.
      score_b: scores of the videos B.
      label: 1 if A wins, -1 if B wins, 0 for a tie; any other label is invalid and has loss 0.
      theta: tie parameter, greater than 1; a larger value makes ties more likely.
    """
    difference = score_a.astype(jnp.float32) - score_b.astype(jnp.float32)
    win_a, win_b = (-jax.nn.log_sigmoid(d - jnp.log(theta)) for d in (difference, -difference))
    tie = win_a + win_b - jnp.log(theta**2 - 1)
    return jnp.select([label == 1, label == -1, label == 0], [win_a, win_b, tie], 0.0)


def btt_loss(
    score_a: Float[Array, " B"],
    score_b: Float[Array, " B"],
    label: Int[Array, " B"],
    theta: float = 5.0,
) -> Float[Array, ""]:
    """Average `btt_losses` over all pairs; invalid pairs stay in the denominator, as published.

    Args:
      score_a: scores of the videos A.
      score_b: scores of the videos B.
      label: as for `btt_losses`.
      theta: tie parameter, greater than 1.
    """
    return jnp.mean(btt_losses(score_a, score_b, label, theta))
