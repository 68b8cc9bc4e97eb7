"""Define the settings of the weakened branch of guidance (`rollout.weakened`, `evaluate.weakened`)."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from jax_idgrpo.config.options import require

PHOTOS = ("kept", "blank", "none")
SOURCES = ("guided", "prompt", "negative")
KEYS = ("scale", "blocks", "photos", "from", "steps")
HELP = (
    "branch with skipped blocks or without photos, from which samples are pushed away, as JSON such "
    'as {"scale": 0.5, "blocks": [9], "photos": "none"}; see docs/guidance.md; {} = none'
)


@dataclasses.dataclass(frozen=True)
class WeakBranch:
    """A branch that sees less than the others.

        from "guided"     v = v_guided + scale (v_guided - v_weak)
        from "prompt"     v = v_guided + scale (v_prompt - v_weak)
        from "negative"   no further branch: the negative one skips the blocks

    Attributes:
      scale: strength; unused with "negative".
      blocks: numbers of the transformer's main blocks that the branch skips.
      photos: "kept", "blank" (their control is zero) or "none" (text to video).
      source: what the branch is subtracted from, the key "from".
      steps: first and last share of the denoising steps on which it acts, [first, last).
    """

    scale: float = 0.0
    blocks: tuple[int, ...] = ()
    photos: str = "kept"
    source: str = "guided"
    steps: tuple[float, float] = (0.0, 1.0)


def weak_branch(name: str, values: Mapping[str, Any]) -> WeakBranch | None:
    """Read the JSON of a field; None if it is empty.

    Args:
      name: name of the field, for messages.
      values: the JSON object.

    Raises:
      UserError: a key is unknown, a value is of another kind, or nothing is weakened.
    """
    if not values:
        return None
    for key in values:
        require(key in KEYS, f"{name} has no {key!r}; use {', '.join(KEYS)}")
    blocks, steps = values.get("blocks", []), values.get("steps", [0.0, 1.0])
    photos, source = values.get("photos", "kept"), values.get("from", "guided")
    whole = isinstance(blocks, list) and all(type(block) is int and block >= 0 for block in blocks)
    require(
        whole and len(set(blocks)) == len(blocks),
        f"{name}: blocks is {json.dumps(blocks)}; use a list of numbers of blocks, such as [9]",
    )
    require(photos in PHOTOS, f"{name}: photos is {photos!r}; use {', '.join(PHOTOS)}")
    require(source in SOURCES, f"{name}: from is {source!r}; use {', '.join(SOURCES)}")
    shares = isinstance(steps, list) and len(steps) == 2 and all(map(_is_number, steps))
    require(
        shares and 0 <= steps[0] < steps[1] <= 1,
        f"{name}: steps is {json.dumps(steps)}; use two shares of the schedule, such as [0.1, 0.9]",
    )
    scale = values.get("scale", 0.0)
    if source == "negative":
        require(
            "scale" not in values and photos == "kept",
            f"{name}: from negative changes the negative branch alone; leave out scale and photos",
        )
        require(bool(blocks), f"{name}: from negative needs blocks, such as [9]")
    else:
        require(
            _is_number(scale) and scale > 0,
            f"{name}: scale is {scale!r}; use a positive number, such as 0.5",
        )
        require(
            bool(blocks) or photos != "kept",
            f"{name}: nothing is weakened; give blocks to skip, or photos blank or none",
        )
    return WeakBranch(
        float(scale), tuple(sorted(blocks)), photos, source, (float(steps[0]), float(steps[1]))
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
