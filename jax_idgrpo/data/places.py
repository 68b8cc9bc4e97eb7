"""Parse the column `places` of a prompts CSV, and draw places as a layout control of VACE.

The column has one entry per person, joined by `;`, in one of two forms:

    0 0.1 0.4 1 ; 0.6 0.1 1 1          a box x0 y0 x1 y1 per person, in shares of the picture
    0 0 0.3 1 > 0.7 0 1 1 ; ...        a box that moves linearly from the first frame to the last
    left;right  or  2;1;3              only the order of the people, 1 for the leftmost

Boxes are drawn as 2 pixels wide outlines on white, as VACE's `LayoutBboxAnnotator` does (ali-vilab/
VACE), which draws one box in black or in the colour of a class. Several boxes per frame and a colour
per person are ours. An order is not drawn: it is read by the reward's term `placed` alone.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from jax_idgrpo.errors import UserError

COLUMN = "places"
OUTLINE = 2  # pixels
COLOURS = (
    (255, 0, 0),
    (0, 0, 255),
    (0, 160, 0),
    (255, 128, 0),
    (160, 0, 255),
    (0, 190, 190),
    (255, 0, 160),
    (128, 80, 0),
)
"""RGB colours of the boxes by the number of the person."""
BLACK = (0, 0, 0)
WORDS = {"left": 1, "right": 2}
"""Ranks from the left that words stand for, for two people."""

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the people of a prompt stand; an empty cell of the column has neither form.

    Attributes:
      boxes: x0 y0 x1 y1 of each person in the first and in the last frame, in shares of the picture;
        () without boxes.
      order: rank of each person from the left, from 1; () without an order.
    """

    boxes: tuple[tuple[Box, Box], ...] = ()
    order: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        """Return whether the people have places."""
        return bool(self.boxes or self.order)


def parse_places(row: dict, people: int) -> Places | None:
    """Parse the places of the people of a row.

    Args:
      row: fields of the row by name.
      people: number of people of the row.

    Returns:
      The places, or None if the CSV has no such column.

    Raises:
      UserError: the column is not as the module's docstring describes, or the row has a control
        video as well.
    """
    if COLUMN not in row:
        return None
    text = (row[COLUMN] or "").strip()
    if not text:
        return Places()
    if (row.get("control") or "").strip():
        raise UserError(
            "control and places in one row; VACE follows one of them, so leave one of them empty"
        )
    entries = [entry.strip() for entry in text.split(";")]
    if len(entries) != people:
        raise UserError(
            f"places has {len(entries)} entries and ref_paths {people} people; write one entry per "
            "person, joined by ;"
        )
    if all(entry.lower() in WORDS or entry.isdecimal() for entry in entries):
        return Places(order=_parse_order(text, entries))
    return Places(boxes=tuple(_parse_move(entry, n) for n, entry in enumerate(entries, 1)))


def _parse_order(text: str, entries: list[str]) -> tuple[int, ...]:
    """Parse ranks from the left, which must be 1, 2, ... in any order."""
    ranks = tuple(WORDS.get(entry.lower(), 0) or int(entry) for entry in entries)
    words = any(entry.lower() in WORDS for entry in entries)
    if len(ranks) < 2 or (words and len(ranks) > 2) or sorted(ranks) != [*range(1, len(ranks) + 1)]:
        raise UserError(
            f"places {text!r} is no order of {len(ranks)} people; use left;right for two, the ranks "
            "from the left such as 2;1;3 for more, and a box for one"
        )
    return ranks


def _parse_move(entry: str, person: int) -> tuple[Box, Box]:
    """Parse a person's box, or two boxes joined by `>`."""
    boxes = [_parse_box(part, person) for part in entry.split(">")]
    if len(boxes) > 2:
        raise UserError(
            f"places of person {person}: {entry!r} has {len(boxes)} boxes; use one, or two joined by >"
        )
    return boxes[0], boxes[-1]


def _parse_box(text: str, person: int) -> Box:
    """Parse four numbers with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1."""
    where = f"places of person {person}: {text.strip()!r}"
    try:
        numbers = [float(word) for word in text.split()]
    except ValueError:
        numbers = []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise UserError(
            f"{where} is no box; write four numbers x0 y0 x1 y1 in shares of the picture, such as "
            "0 0.1 0.5 1"
        )
    x0, y0, x1, y1 = numbers
    if min(numbers) < 0 or max(numbers) > 1:
        raise UserError(
            f"{where} leaves the picture; use shares from 0 to 1 of its width and height, not pixels"
        )
    if x0 >= x1 or y0 >= y1:
        raise UserError(
            f"{where} is reversed or empty; write left, top, right, bottom with x0 < x1 and y0 < y1"
        )
    return x0, y0, x1, y1


def boxes_of_frames(places: Places, frames: int) -> Float[np.ndarray, "F M 4"]:
    """Return the boxes of every frame, in shares of the picture.

    Args:
      places: with boxes.
      frames: F, number of frames.
    """
    first, last = np.moveaxis(np.asarray(places.boxes, np.float64), 1, 0)
    share = np.linspace(0, 1, frames)[:, None, None]
    return first * (1 - share) + last * share


def draw_places(
    places: Places, frames: int, size: tuple[int, int], coloured: bool
) -> Float[np.ndarray, "F H W 3"]:
    """Draw the boxes of people as outlines on white, later people over earlier ones.

    Args:
      places: with boxes.
      frames: F, number of frames.
      size: height and width in pixels.
      coloured: whether each person has an own colour; otherwise all are black.

    Returns:
      A video in [-1, 1].
    """
    height, width = size
    video = np.full((frames, height, width, 3), 255, np.uint8)
    scaled = np.floor(boxes_of_frames(places, frames) * [width, height, width, height] + 0.5)
    for picture, boxes in zip(video, scaled.astype(int), strict=True):
        for person, (x0, y0, x1, y1) in enumerate(boxes):
            left, top = min(x0, width - 1), min(y0, height - 1)
            right, bottom = max(x1, left + 1), max(y1, top + 1)
            box = picture[top:bottom, left:right]
            colour = COLOURS[person % len(COLOURS)] if coloured else BLACK
            box[:OUTLINE] = box[-OUTLINE:] = colour
            box[:, :OUTLINE] = box[:, -OUTLINE:] = colour
    return video.astype(np.float32) / 127.5 - 1
