"""Compute the loss of the people's identity in clips that are denoised from little noise.

    x0' = x_sigma - sigma v,    loss = 1 - reward of decode(x0'),    for sigma < LIMIT

The reward is that of the configuration, differentiated as by `grpo.objective reward_gradient`. At
higher noise x0' is too blurred to show a face, so those rows have the loss 0. So have rows without
photos, which ask for nobody.

A decode and its gradient cost more than the velocity of a row. sigma = shift u / (1 + (shift - 1) u)
with u spread evenly over the batch, so sigma rises from row to row, and only the first
ceil(rows u(LIMIT)) rows can be below `LIMIT`. Only they are decoded: 1 or 2 of 16 at shift 5. A
mesh decodes as many more as divide evenly by its batch shards.

Source: ID-Animator (arXiv 2404.15275), whose weight is not published.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from jax_idgrpo.parallel import sharding
from jax_idgrpo.sampling.conditioning import Conditioning

LIMIT = 0.3
"""Noise level from which on a row has no identity loss."""


@dataclasses.dataclass(frozen=True)
class IdentityLoss:
    """Static part of the loss.

    Attributes:
      weight: factor in the loss of the run.
      score: (scorer, latents, conditioning, people) -> reward of every row; see
        `setup.score_latents`.
    """

    weight: float
    score: Callable[..., Float[Array, " B"]]

    def rows(
        self,
        scorer: PyTree,
        predicted: Float[Array, "B N h w C"],
        clean: Float[Array, "B N h w C"],
        sigma: Float[Array, " B"],
        shown: Float[Array, " B"],
        given: tuple[Conditioning, PyTree],
        decoded: int,
        mesh: Mesh | None,
    ) -> dict[str, Float[Array, " B"]]:
        """Compute the loss of every row, and whether it has one.

        Args:
          scorer: the VAE, and the state of the reward's networks.
          predicted: x0' of the rows.
          clean: x0 of the rows, which takes the place of x0' where it is not scored.
          sigma: noise level of the rows, rising.
          shown: 1 for rows with photos, else 0.
          given: conditioning and encoded references of the rows.
          decoded: number of rows, from the first, that are decoded; see `decoded_rows`.
          mesh: devices of the rows.
        """
        counts = jnp.where(sigma < LIMIT, shown, 0.0)[:decoded]
        here = counts[:, None, None, None, None] > 0
        # A gradient that is multiplied by 0 must be finite, so other rows score the clip itself.
        latents = jnp.where(here, predicted[:decoded], jax.lax.stop_gradient(clean[:decoded]))
        first = jax.tree.map(lambda leaf: leaf[:decoded], given)
        latents, first = jax.tree.map(
            lambda leaf: sharding.shard_batch(mesh, leaf), (latents, first)
        )
        reward = jax.checkpoint(self.score)(scorer, latents, *first)
        loss = jnp.where(counts > 0, 1.0 - reward, 0.0)
        rest = (0, len(sigma) - decoded)
        return {"identity_loss": jnp.pad(loss, rest), "identity_rows": jnp.pad(counts, rest)}


def decoded_rows(rows: int, shift: float, mesh: Mesh | None = None) -> int:
    """Return the number of first rows of a batch that include all with sigma below `LIMIT`.

    Args:
      rows: of the batch, a multiple of the mesh's batch shards.
      shift: of the noise schedule.
      mesh: devices of the rows.
    """
    share = LIMIT / (shift * (1 - LIMIT) + LIMIT)  # u at which sigma is LIMIT
    return sharding.rows_for(mesh, min(math.ceil(rows * share), rows))
