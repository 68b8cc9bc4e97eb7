"""Measure whether the people of a video are where the column `places` of their prompt puts them.

    boxes   placed = mean over people and frames of [centre of the person's face lies in their box]
    order   placed = share of pairs of people whose mean centres have the wanted order from the left

The order term is Kendall's tau, mapped from [-1, 1] to [0, 1]. A missing face counts 0, and so does a
pair with a person who has no face. A pair with equal centres counts one half. Rows without places
are NaN, and are left out of means and mixtures. Boxes that move are between their first and last
position in proportion to the number of the scored frame.

The definition is ours. The order is after the position reward of PSR (arXiv 2512.01236).
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, ArrayLike, Bool, Float

from jax_idgrpo.config.scoring import PLACED
from jax_idgrpo.data.places import Places
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards.matching import Matches, masked_mean


@struct.dataclass
class PlaceTargets:
    """Places of the people of P prompts; NaN where a row has no such places, and in the padding.

    Attributes:
      boxes: x0 y0 x1 y1 in the first and in the last frame, in shares of the picture.
      order: rank from the left, from 1.
    """

    boxes: Float[ArrayLike, "P M 2 4"]
    order: Float[ArrayLike, "P M"]

    @classmethod
    def make(cls, places: Sequence[Places], people: int) -> "PlaceTargets":
        """Store the places of prompts as arrays with `people` slots per prompt."""
        boxes = np.full((len(places), people, 2, 4), np.nan, np.float32)
        order = np.full((len(places), people), np.nan, np.float32)
        for row, one in enumerate(places):
            boxes[row, : len(one.boxes)] = np.asarray(one.boxes).reshape(-1, 2, 4)
            order[row, : len(one.order)] = one.order
        return cls(boxes, order)


def placed(
    matches: Matches,
    boxes: Float[ArrayLike, "B T K 4"],
    reference_mask: Bool[ArrayLike, "B M"],
    size: tuple[int, int],
    targets: PlaceTargets,
) -> Float[Array, " B"]:
    """Compute the term, in [0, 1]; NaN for rows without places. No gradient flows through.

    Args:
      matches: references matched to the faces.
      boxes: x0 y0 x1 y1 of the faces in pixels.
      reference_mask: False on padding.
      size: height and width of the frames in pixels.
      targets: places of each row.
    """
    height, width = size
    corners = boxes.reshape(*boxes.shape[:-1], 2, 2)
    centres = jnp.mean(corners, axis=-2) / jnp.asarray([width, height])
    padded = jnp.pad(centres, ((0, 0), (0, 0), (0, 1), (0, 0)))
    centre = jnp.take_along_axis(padded, matches.face[..., None], axis=2)  # [B,T,M,2]
    shown = matches.matched & reference_mask[:, None]
    in_order = _order_agreement(centre[..., 0], shown, reference_mask, targets.order)
    inside = _share_inside(centre, shown, reference_mask, targets.boxes)
    has_boxes, has_order = (
        ~jnp.isnan(first) for first in (targets.boxes[:, 0, 0, 0], targets.order[:, 0])
    )
    return jnp.where(has_boxes, inside, jnp.where(has_order, in_order, jnp.nan))


def _share_inside(
    centre: Float[ArrayLike, "B T M 2"],
    shown: Bool[ArrayLike, "B T M"],
    reference_mask: Bool[ArrayLike, "B M"],
    boxes: Float[ArrayLike, "B M 2 4"],
) -> Float[Array, " B"]:
    """Average over people and frames whether a face's centre lies in the person's box."""
    share = jnp.linspace(0.0, 1.0, centre.shape[1])[:, None, None]
    at = boxes[:, None, :, 0] * (1 - share) + boxes[:, None, :, 1] * share  # [B,T,M,4]
    inside = jnp.all((at[..., :2] <= centre) & (centre <= at[..., 2:]), axis=-1)
    return masked_mean(jnp.mean(inside & shown, axis=1), reference_mask)


def _order_agreement(
    x: Float[ArrayLike, "B T M"],
    shown: Bool[ArrayLike, "B T M"],
    reference_mask: Bool[ArrayLike, "B M"],
    order: Float[ArrayLike, "B M"],
) -> Float[Array, " B"]:
    """Compute the share of pairs of people in the wanted order from the left."""
    count = jnp.sum(shown, axis=1)
    mean = jnp.sum(jnp.where(shown, x, 0.0), axis=1) / jnp.maximum(count, 1)
    agreement = jnp.sign((mean[:, :, None] - mean[:, None]) * (order[:, :, None] - order[:, None]))
    both = (count > 0)[:, :, None] & (count > 0)[:, None]
    people = reference_mask.shape[1]
    pair = reference_mask[:, :, None] & reference_mask[:, None] & ~jnp.eye(people, dtype=bool)
    right = jnp.where(pair & both, (1 + agreement) / 2, 0.0)
    return jnp.sum(right, (1, 2)) / jnp.maximum(jnp.sum(pair, (1, 2)), 1)


def require_places(
    weights: Mapping[str, Mapping[str, int | float]], prompts: Sequence[Prompt]
) -> None:
    """Refuse the term `placed` for training prompts of which none has places.

    Args:
      weights: weights of terms by name of the configuration field.
      prompts: the training prompts.

    Raises:
      UserError: a field weighs `placed`, and no row has places.
    """
    for field, terms in weights.items():
        if PLACED in terms and not any(prompt.places for prompt in prompts):
            raise UserError(
                f"{field} placed: no row of data.prompts has places; add the column places, or leave "
                "placed out"
            )
