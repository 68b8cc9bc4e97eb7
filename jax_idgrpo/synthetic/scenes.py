"""The cast: drawn people with recognisable identities, and short clips of them whose truth is known.

A person is a pure function of an integer id. A picture is a stack of soft shapes painted back to front: every shape is
an implicit function d(u, v), negative inside, in the person's own head coordinates, and covers a pixel by
`alpha = clip(1/2 - d * pixels_per_unit, 0, 1)`, which is the area of a pixel under a straight edge. Everything is one
elementwise JAX program in float32, mapped over people, frames and samples, so drawing runs on any device inside `jit`.

Head coordinates: u to the right, v down, origin at the face's centre, the unit is about half a face height.
Lengths of a scene are in points: the picture is 64 points high and wide whatever its size in pixels.
Times are in seconds; a clip has 8 frames per second.
"""

import csv
import dataclasses
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray
from PIL import Image

from jax_idgrpo import rng
from jax_idgrpo.data import folders
from jax_idgrpo.errors import UserError

FRAMES_PER_SECOND = 8
MAX_PEOPLE = 3
POINTS = 64.0

SPLITS = {"train": (0, 1_000_000), "rl": (1_000_000, 1_001_000), "eval": (2_000_000, 2_001_000)}
_IDENTITY_SEED = 20250
_COUNT_SHARES = (0.3, 0.5, 0.2)

# ---------------------------------------------------------------------------------------------------------------------
# Words and palettes. Colours are sRGB in [0, 1].

_SKIN = np.array(
    [
        [0.99, 0.87, 0.79],
        [0.96, 0.79, 0.66],
        [0.90, 0.69, 0.53],
        [0.79, 0.56, 0.39],
        [0.62, 0.41, 0.27],
        [0.42, 0.27, 0.19],
    ],
    np.float32,
)
_HAIR = {
    "black": (0.09, 0.08, 0.10),
    "brown": (0.36, 0.21, 0.11),
    "auburn": (0.56, 0.20, 0.09),
    "ginger": (0.84, 0.42, 0.12),
    "blond": (0.93, 0.78, 0.38),
    "grey": (0.56, 0.56, 0.58),
    "white": (0.82, 0.82, 0.80),
    "pink": (0.90, 0.38, 0.62),
    "teal": (0.10, 0.50, 0.55),
}
_HAIR_SHARES = (0.20, 0.20, 0.12, 0.12, 0.14, 0.08, 0.05, 0.05, 0.04)
_EYE = np.array(
    [[0.24, 0.13, 0.07], [0.42, 0.27, 0.12], [0.18, 0.42, 0.24], [0.16, 0.40, 0.72], [0.42, 0.50, 0.56]], np.float32
)
_COLOURS = {
    "red": (0.80, 0.14, 0.14),
    "orange": (0.93, 0.52, 0.12),
    "yellow": (0.94, 0.82, 0.22),
    "green": (0.18, 0.56, 0.25),
    "teal": (0.10, 0.58, 0.58),
    "blue": (0.16, 0.33, 0.76),
    "purple": (0.48, 0.22, 0.64),
    "pink": (0.93, 0.52, 0.68),
    "brown": (0.46, 0.30, 0.17),
    "grey": (0.52, 0.53, 0.55),
    "black": (0.13, 0.13, 0.15),
    "white": (0.93, 0.93, 0.92),
}
_HAIR_NAMES, _COLOUR_NAMES = tuple(_HAIR), tuple(_COLOURS)
_HAIR_TABLE = np.array(list(_HAIR.values()), np.float32)
_COLOUR_TABLE = np.array(list(_COLOURS.values()), np.float32)

# Hair styles differ only in numbers, so one drawing serves them all and every style varies continuously:
# share, thickness over the skull, hairline (v), fringe slope, sides end at (v), back: half width, bottom (v);
# curl, knot: offset from the middle, height (v), radius.
_STYLES = {
    "bald": (0.10, -0.30, -1.60, 0.00, -1.00, 0.00, -1.0, 0.00, 0.00, 0.00, 0.00),
    "short": (0.20, 0.10, -0.52, 0.10, -0.05, 0.00, -1.0, 0.03, 0.00, 0.00, 0.00),
    "flat": (0.08, 0.24, -0.58, 0.00, -0.20, 0.00, -1.0, 0.00, 0.00, 0.00, 0.00),
    "curly": (0.12, 0.24, -0.46, 0.00, 0.25, 0.08, 0.2, 0.11, 0.00, 0.00, 0.00),
    "afro": (0.10, 0.42, -0.54, 0.00, 0.30, 0.42, 0.3, 0.06, 0.00, 0.00, 0.00),
    "bob": (0.14, 0.17, -0.34, 0.15, 0.75, 0.16, 0.8, 0.00, 0.00, 0.00, 0.00),
    "long": (0.14, 0.14, -0.54, 0.25, 0.85, 0.20, 1.9, 0.02, 0.00, 0.00, 0.00),
    "tied": (0.07, 0.08, -0.56, 0.00, 0.00, 0.00, -1.0, 0.00, 0.00, -1.28, 0.32),
    "braided": (0.05, 0.10, -0.50, 0.00, 0.15, 0.00, -1.0, 0.00, 0.98, 0.55, 0.27),
}
_STYLE_NAMES = tuple(_STYLES)
_STYLE_TABLE = np.array(list(_STYLES.values()), np.float32)

# share, crown height, brim half width, brim thickness, brim offset, height at which it sits (v)
_HATS = {
    "none": (0.70, 0.00, 0.00, 0.00, 0.00, -0.50),
    "cap": (0.10, 0.72, 0.75, 0.13, 0.55, -0.50),
    "beanie": (0.12, 0.86, 0.95, 0.17, 0.00, -0.48),
    "hat": (0.08, 0.85, 1.55, 0.13, 0.00, -0.56),
}
_HAT_NAMES = tuple(_HATS)
_HAT_TABLE = np.array(list(_HATS.values()), np.float32)
_GLASSES_NAMES, _GLASSES_SHARES = ("none", "round", "square"), (0.68, 0.18, 0.14)
_BEARD_NAMES, _BEARD_SHARES = ("none", "stubble", "goatee", "beard"), (0.64, 0.10, 0.10, 0.16)
_MOUSTACHE_SHARE = 0.5
_CLOTHES_NAMES, _CLOTHES_SHARES = ("shirt", "striped shirt", "jacket", "sweater"), (0.35, 0.25, 0.2, 0.2)

_BACKGROUNDS = ("wall", "sky", "stripes", "tiles", "hills", "room", "beach", "lights")
_ACTIONS = (
    "walks to the left",
    "walks to the right",
    "turns around slowly",
    "nods",
    "talks",
    "dances",
    "comes closer",
    "steps back",
    "waves a hand",
    "smiles",
)
_LIGHTS = ("soft", "bright", "dim", "warm", "cold")
_COUNTS = ("one", "two", "three", "four")


@flax.struct.dataclass
class Identity:
    """Who a person is; every leaf may carry leading batch axes. Colours are RGB in [0, 1], lengths in head units."""

    skin: Float[Array, "*n 3"]
    hair: Float[Array, "*n 3"]
    eye: Float[Array, "*n 3"]
    lips: Float[Array, "*n 3"]
    clothes: Float[Array, "*n 3"]
    trim: Float[Array, "*n 3"]  # second colour of the clothes
    hat: Float[Array, "*n 3"]
    frame: Float[Array, "*n 3"]  # colour of the glasses
    shape: Float[Array, "*n 24"]  # continuous measures, see `_Shape`
    style: Float[Array, "*n 10"]  # hair, see `_STYLES` without the share
    headwear: Float[Array, "*n 5"]  # see `_HATS` without the share
    labels: Int[Array, "*n 8"]  # indices of words, see `_Labels`


class _Shape(NamedTuple):
    """Continuous measures of a head, in the order of `Identity.shape`: lowest and highest value."""

    width: tuple = (0.66, 0.90)
    height: tuple = (0.94, 1.08)
    taper: tuple = (0.00, 0.34)
    square: tuple = (0.00, 0.75)
    eye_spacing: tuple = (0.30, 0.43)
    eye_height: tuple = (-0.16, 0.06)
    eye_width: tuple = (0.145, 0.235)
    eye_open: tuple = (0.10, 0.18)
    brow_thickness: tuple = (0.025, 0.085)
    brow_tilt: tuple = (-0.32, 0.32)
    brow_lift: tuple = (0.20, 0.33)
    nose_width: tuple = (0.08, 0.20)
    nose_height: tuple = (0.22, 0.40)
    mouth_width: tuple = (0.19, 0.40)
    mouth_full: tuple = (0.05, 0.125)
    mouth_height: tuple = (0.54, 0.70)
    ear: tuple = (0.09, 0.21)
    blush: tuple = (-0.20, 0.35)
    neck: tuple = (0.30, 0.52)
    shoulders: tuple = (1.15, 1.65)
    glasses: tuple = (0.0, 0.0)  # the last four are switches, set by the labels
    beard: tuple = (0.0, 0.0)
    beard_width: tuple = (0.0, 0.0)
    moustache: tuple = (0.0, 0.0)


class _Labels(NamedTuple):
    """Indices of the words of a person, in the order of `Identity.labels`."""

    hair_style: Array
    hair: Array
    clothes: Array
    garment: Array
    hat: Array
    hat_colour: Array
    glasses: Array
    beard: Array


_MEASURES = np.array(_Shape(), np.float32)


def _pick(u: Float[Array, ""], shares) -> Int[Array, ""]:
    """Index drawn with the given shares from a uniform number."""
    edges = np.cumsum(np.asarray(shares, np.float32)) / np.sum(shares)
    return jnp.sum(u >= jnp.asarray(edges[:-1], jnp.float32)).astype(jnp.int32)


def _one_identity(number: Int[Array, ""]) -> Identity:
    key = rng.fold(rng.key(_IDENTITY_SEED, "data"), number)
    u = jax.random.uniform(key, (80,), jnp.float32)
    jitter = lambda k, spread: (u[k : k + 3] - 0.5) * spread  # noqa: E731
    shape = _MEASURES[:, 0] + u[: len(_MEASURES)] * (_MEASURES[:, 1] - _MEASURES[:, 0])

    tone = u[24] * (len(_SKIN) - 1)
    low = jnp.minimum(tone.astype(jnp.int32), len(_SKIN) - 2)
    skin = jnp.asarray(_SKIN)[low] + (tone - low) * (jnp.asarray(_SKIN)[low + 1] - jnp.asarray(_SKIN)[low])
    skin = skin + jitter(25, 0.06)

    hair_style, hair = _pick(u[28], _STYLE_TABLE[:, 0]), _pick(u[29], _HAIR_SHARES)
    style = jnp.asarray(_STYLE_TABLE)[hair_style, 1:]
    style = style + (u[30:40] - 0.5) * jnp.array([0.08, 0.18, 0.5, 0.2, 0.1, 0.3, 0.03, 0.1, 0.1, 0.08]) * (style != 0)
    hair_colour = jnp.asarray(_HAIR_TABLE)[hair] * (0.8 + 0.4 * u[43]) + jitter(40, 0.08)

    garment = _pick(u[44], _CLOTHES_SHARES)
    clothes = _pick(u[45], np.ones(len(_COLOURS)))
    trim = (clothes + 1 + (u[46] * (len(_COLOURS) - 1)).astype(jnp.int32)) % len(_COLOURS)
    hat, hat_colour = _pick(u[47], _HAT_TABLE[:, 0]), _pick(u[48], np.ones(len(_COLOURS)))
    headwear = jnp.asarray(_HAT_TABLE)[hat, 1:] * (1 + 0.16 * (u[49:54] - 0.5))
    headwear = headwear.at[3].multiply(jnp.where(u[54] < 0.5, -1.0, 1.0))
    glasses, beard = _pick(u[55], _GLASSES_SHARES), _pick(u[56], _BEARD_SHARES)
    amount = jnp.array([0.0, 0.38, 0.9, 0.95])[beard]
    moustache = jnp.where((beard > 0) & (u[57] < _MOUSTACHE_SHARE), 0.9, 0.0)
    width = jnp.where(beard == 2, 0.30 + 0.1 * u[58], 2.0)
    shape = shape.at[20:24].set(jnp.stack([glasses.astype(jnp.float32), amount, width, moustache]))

    lips = skin * jnp.array([0.86, 0.58, 0.58]) + u[59] * jnp.array([0.12, -0.12, -0.06])
    colours = jnp.asarray(_COLOUR_TABLE)
    frame = jnp.stack([jnp.full(3, 0.10), jnp.array([0.55, 0.12, 0.12]), jnp.array([0.75, 0.60, 0.25])])
    clip = lambda c: jnp.clip(c, 0.02, 1.0)  # noqa: E731
    return Identity(
        skin=clip(skin),
        hair=clip(hair_colour),
        eye=clip(jnp.asarray(_EYE)[_pick(u[60], np.ones(len(_EYE)))] + jitter(61, 0.08)),
        lips=clip(lips),
        clothes=clip(colours[clothes] + jitter(64, 0.10)),
        trim=clip(colours[trim] + jitter(67, 0.10)),
        hat=clip(colours[hat_colour] + jitter(70, 0.10)),
        frame=frame[_pick(u[73], np.ones(3))],
        shape=shape,
        style=style,
        headwear=headwear,
        labels=jnp.stack(_Labels(hair_style, hair, clothes, garment, hat, hat_colour, glasses, beard)),
    )


@jax.jit
def identity(ids: Int[Array, "*n"]) -> Identity:
    """The people of the given ids: a pure function of each integer, the same on every machine."""
    ids = jnp.asarray(ids)
    flat = jax.vmap(_one_identity)(ids.reshape(-1))
    return jax.tree.map(lambda leaf: leaf.reshape(*ids.shape, *leaf.shape[1:]), flat)


def dressed(heads: Identity, people: Identity) -> Identity:
    """The heads on the bodies of the people, in their clothes."""
    garments = np.array([_Labels._fields.index(name) for name in ("clothes", "garment")])
    labels = jnp.asarray(heads.labels).at[..., garments].set(people.labels[..., garments])
    shoulders = _Shape._fields.index("shoulders")
    shape = jnp.asarray(heads.shape).at[..., shoulders].set(people.shape[..., shoulders])
    return dataclasses.replace(heads, clothes=people.clothes, trim=people.trim, labels=labels, shape=shape)


# ---------------------------------------------------------------------------------------------------------------------
# Painting


class Pose(NamedTuple):
    """Where a head is and what it does at one moment. Leaves may carry leading axes."""

    x: Array  # centre of the face, points
    y: Array
    scale: Array  # points per head unit
    yaw: Array  # radians, positive turns to the right of the picture
    roll: Array  # radians, positive leans to the right of the picture
    pitch: Array  # head units by which the features move down
    open: Array  # mouth, 0 closed to 1 wide open
    smile: Array  # -1 to 1
    blink: Array  # 0 open eyes to 1 closed
    hand: Array  # 0 no hand to 1 raised
    swing: Array  # head units by which the raised hand is moved sideways


@flax.struct.dataclass
class Light:
    """Light of a scene; colour multiplies RGB, direction is the side (-1 left, 1 right) times its strength."""

    colour: Float[Array, "*n 3"]
    direction: Float[Array, "*n"]


def _ellipse(u, v, rx, ry):
    """First-order distance to the ellipse u^2/rx^2 + v^2/ry^2 = 1."""
    unit = jnp.sqrt(0.5 * jnp.sqrt(rx * ry))  # folded into the radii: a pixel costs multiplications only
    return jnp.square(u * (unit / rx)) + jnp.square(v * (unit / ry)) - unit * unit


def _ripple(t):
    """A smooth wave between -1 and 1 with period 2, cheaper than a sine."""
    saw = t - 2.0 * jnp.floor(0.5 * t) - 1.0
    return 4.0 * saw * (1.0 - jnp.abs(saw))


def _features(shape: _Shape, pose: Pose) -> dict[str, tuple]:
    """Positions (u, v) of what moves with the turn of the head: points nearer to the viewer move more."""
    turn, narrow = jnp.sin(pose.yaw), jnp.cos(pose.yaw)
    middle = turn * shape.width * 0.52
    return {
        "eyes": (middle, shape.eye_height + pose.pitch, shape.eye_spacing * narrow),
        "nose": (turn * shape.width * 0.74, shape.nose_height + 1.3 * pose.pitch),
        "mouth": (turn * shape.width * 0.55, shape.mouth_height + 0.9 * pose.pitch, shape.mouth_width * narrow),
    }


def _paint_person(canvas, person: Identity, pose: Pose, light: Light, present, x, y):
    """Paint one person over planes `canvas` [3,H,W]; x, y are the pixel centres in points.

    Returns the canvas, the coverage of the face oval and the coverage of the whole person, both [H,W].
    """
    shape = _Shape(*person.shape)
    thickness, hairline, slope, sides, back_width, back_end, curl, knot_x, knot_y, knot_r = person.style
    crown, brim_width, brim_thickness, brim_offset, hat_height = person.headwear
    garment, hat = person.labels[3], person.labels[4]
    per_unit = pose.scale * (x.shape[1] / POINTS)  # pixels per head unit

    per_point = 1.0 / pose.scale
    dx, dy = (x - pose.x) * per_point, (y - pose.y) * per_point
    cos, sin = jnp.cos(pose.roll), jnp.sin(pose.roll)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx  # head
    bu, bv = dx - 0.25 * sin, dy  # body: stays upright

    def cover(distance):
        return jnp.clip(0.5 - distance * per_unit, 0.0, 1.0)

    def paint(canvas, colour, alpha):
        return canvas + (present * alpha) * (colour[:, None, None] * shade - canvas)

    turn = jnp.sin(pose.yaw)
    tone = 1.0 + light.direction * jnp.clip(dx, -1.2, 1.2) - 0.06 * jnp.clip(dy, -1.0, 2.0)
    shade = light.colour[:, None, None] * tone
    place = _features(shape, pose)
    eye_u, eye_v, eye_apart = place["eyes"]
    nose_u, nose_v = place["nose"]
    mouth_u, mouth_v, mouth_w = place["mouth"]
    wave = curl * _ripple(3.5 * u + 0.3) * _ripple(3.2 * v)
    hatless = 1.0 - (hat > 0)

    # Body
    body = _ellipse(bu, bv - 2.6, shape.shoulders, 1.4)
    body = jnp.where(bv > 2.6, jnp.abs(bu) - shape.shoulders, body)
    body_alpha = cover(body)
    canvas = paint(canvas, person.clothes, body_alpha)
    stripes = jnp.clip(_ripple(bv * 2.6 + shape.ear * 6) * per_unit * 0.2 + 0.5, 0, 1)
    opening = cover(jnp.abs(bu) - 0.42 + 0.18 * (bv - 1.2))
    collar = cover(jnp.abs(_ellipse(bu, bv - 1.25, shape.neck + 0.20, 0.42)) - 0.10)
    pattern = jnp.where(garment == 1, stripes, jnp.where(garment == 2, opening, jnp.where(garment == 3, collar, 0.0)))
    canvas = paint(canvas, person.trim, body_alpha * pattern)

    # Hair behind the head, ears, neck
    long = _ellipse(u, v - 0.5 * (back_end - 1.0), shape.width + back_width, 0.5 * (back_end + 1.0) + 0.35)
    throat = jnp.maximum(jnp.abs(bu) - shape.neck - 0.06, 0.9 - bv)  # long hair parts over the shoulders
    back = jnp.where(back_width > 0.01, cover(jnp.maximum(long + wave, -throat)), 0.0)
    knot = jnp.where(
        knot_r > 0.01,
        cover(_ellipse(jnp.abs(u + 0.3 * turn) - knot_x, v - knot_y, knot_r, knot_r * (1 + 0.7 * knot_x)) + wave),
        0.0,
    )
    back = jnp.maximum(back, knot * jnp.where(knot_y < -0.8, hatless, 1.0))
    canvas = paint(canvas, person.hair * 0.78, back)
    neck = cover(jnp.maximum(jnp.abs(bu) - shape.neck, jnp.maximum(-bv, bv - 1.45 + 0.5 * jnp.abs(bu))))
    canvas = paint(canvas, person.skin * 0.80, neck)
    ears = cover(_ellipse(jnp.abs(u + 0.10 * turn) - shape.width * 0.98, v - eye_v - 0.12, shape.ear, shape.ear * 1.5))
    canvas = paint(canvas, person.skin * 0.90, ears)

    # Face: an ellipse whose lower half is narrowed toward the chin and squared
    w = v * (1.0 / shape.height)
    lower = jnp.clip(w, 0.0, 1.2)
    half = 1.0 - shape.taper * lower * lower
    squared = w * w * (1.0 + shape.square * (w * w - 1.0) * (w > 0))
    face = (jnp.square(u * (1.0 / shape.width) / half) + squared - 1.0) * (0.5 * jnp.sqrt(shape.width * shape.height))
    face_alpha = cover(face)
    canvas = paint(canvas, person.skin, face_alpha)
    rim = jnp.clip(1.0 + face * 2.2, 0.0, 1.0) * 0.22  # a little darker toward the outline
    canvas = paint(canvas, person.skin * 0.72, face_alpha * rim)
    cheeks = jnp.clip(-_ellipse(jnp.abs(u - eye_u) - eye_apart * 1.15, v - eye_v - 0.38, 0.2, 0.15) * 8.0, 0, 1)
    canvas = paint(canvas, person.lips, face_alpha * cheeks * jnp.maximum(shape.blush, 0.0))

    # Beard, mouth, moustache
    across = (u - mouth_u) * (1.0 / shape.width)
    edge = 0.16 + pose.pitch + 0.42 * (1.0 - across * across) - v
    beard = cover(jnp.maximum(jnp.maximum(edge, jnp.abs(u - mouth_u) - shape.beard_width), face - 0.05))
    canvas = paint(canvas, person.hair * 0.9, beard * shape.beard)
    along = (u - mouth_u) * (1.0 / mouth_w)
    bend = mouth_v - 0.13 * pose.smile * (along * along - 0.3)
    taper_m = jnp.clip(1.0 - 0.75 * along * along, 0.2, 1.0)
    opened = 0.16 * pose.open
    lips = cover(
        jnp.maximum(jnp.abs(v - bend) - (shape.mouth_full + opened) * taper_m, (jnp.abs(along) - 1.0) * mouth_w)
    )
    canvas = paint(canvas, person.lips, lips)
    gap = cover(jnp.maximum(jnp.abs(v - bend) - (0.015 + opened) * taper_m, (jnp.abs(along) - 0.9) * mouth_w))
    canvas = paint(canvas, person.lips * 0.30, gap * 0.9)
    fur = cover(_ellipse(u - mouth_u, v - bend + 0.06 + shape.mouth_full + opened * 0.5, mouth_w * 1.05, 0.085))
    canvas = paint(canvas, person.hair * 0.85, fur * shape.moustache)

    # Nose
    canvas = paint(canvas, person.skin * 0.66, cover(_ellipse(u - nose_u, v - nose_v, shape.nose_width, 0.065)) * 0.85)
    ridge = cover(
        _ellipse(u - 0.55 * nose_u - 0.45 * eye_u - 0.05, v - 0.5 * (nose_v + eye_v), 0.05, 0.5 * (nose_v - eye_v))
    )
    canvas = paint(canvas, person.skin * 0.78, ridge * 0.6)

    # Eyes and brows; both of a pair at once, mirrored about their middle
    side = jnp.where(u < eye_u, -1.0, 1.0)
    pair = jnp.abs(u - eye_u) - eye_apart
    narrow = jnp.cos(pose.yaw)
    lid = shape.eye_open * (1.0 - 0.88 * pose.blink)
    white = cover(_ellipse(pair, v - eye_v, shape.eye_width * narrow, lid))
    canvas = paint(canvas, jnp.array([0.97, 0.97, 0.98]), white)
    look = pair - side * 0.05 * turn
    iris = cover(_ellipse(look, v - eye_v, shape.eye_open * 0.85, shape.eye_open * 0.85))
    canvas = paint(canvas, person.eye, white * iris)
    pupil = cover(_ellipse(look, v - eye_v, 0.055, 0.055))
    canvas = paint(canvas, jnp.full(3, 0.05), white * pupil)
    lash = cover(
        jnp.abs(_ellipse(pair, v - eye_v, shape.eye_width * narrow, lid)) - 0.02 + 0.3 * jnp.clip(v - eye_v, 0, 1)
    )
    canvas = paint(canvas, person.skin * 0.35, lash * 0.7)
    brow_v = eye_v - shape.brow_lift + shape.brow_tilt * pair - 0.05 * pose.smile
    brow = cover(jnp.maximum(jnp.abs(v - brow_v) - shape.brow_thickness, jnp.abs(pair) - shape.eye_width * 1.25))
    canvas = paint(canvas, person.hair * 0.7, brow)

    # Glasses
    gw, gh = shape.eye_width * 1.35 * narrow, shape.eye_width * 1.2
    a, b = jnp.square(pair * (1.0 / gw)), jnp.square((v - eye_v - 0.02) * (1.0 / gh))
    lens = 0.5 * jnp.where(shape.glasses > 1.5, a * a + 1.3 * b * b - 1.0, a + b - 1.0) * gh
    lens = jnp.where(shape.glasses > 1.5, lens * 0.5, lens)
    bridge = jnp.maximum(jnp.abs(v - eye_v) - 0.03, pair + gw)
    frames = cover(jnp.minimum(jnp.abs(lens) - 0.035, bridge))
    worn = jnp.where(shape.glasses > 0.5, 1.0, 0.0)
    canvas = paint(canvas, jnp.array([0.85, 0.92, 0.97]), cover(lens) * 0.22 * worn)
    canvas = paint(canvas, person.frame, frames * worn)

    # Hair in front: the skull's cap without a window for the face
    cap = _ellipse(
        u, v + 0.10 + 0.4 * thickness, shape.width + 0.04 + thickness, shape.height - 0.02 + 0.65 * thickness
    )
    window_h = 0.75 - hairline
    window = _ellipse(u - 0.35 * nose_u, v - 0.75 - slope * (u - 0.3), shape.width * 0.94 - 0.04 * curl, window_h)
    front = cover(cap + wave) * (1.0 - cover(window - wave)) * cover(v - sides - 0.3 * jnp.abs(u))
    front = front * jnp.where(hairline > -1.2, 1.0, 0.0)
    front = front * jnp.where(hat > 0, cover(-v + hat_height - 0.02), 1.0)
    canvas = paint(canvas, person.hair, front)
    gloss = jnp.clip(1.0 - 5.0 * jnp.abs(v + 0.78 + 0.3 * thickness - 0.25 * u * u), 0, 1) * 0.25
    canvas = paint(canvas, person.hair * 0.5 + 0.5, front * gloss)

    # Hat
    dome = cover(jnp.maximum(_ellipse(u, v - hat_height, shape.width + 0.13, jnp.maximum(crown, 0.1)), v - hat_height))
    brim = cover(
        _ellipse(
            u - brim_offset - 0.2 * turn,
            v - hat_height,
            jnp.maximum(brim_width, 0.1),
            jnp.maximum(brim_thickness, 0.05),
        )
    )
    band = dome * cover(jnp.abs(v - hat_height + 0.16) - 0.09)
    wearing = jnp.where(hat > 0, 1.0, 0.0)
    canvas = paint(canvas, person.hat, dome * wearing)
    canvas = paint(canvas, person.hat * 0.65, band * jnp.where(hat == 3, 1.0, 0.0))
    canvas = paint(canvas, person.hat * 0.82, brim * wearing)

    # Raised hand
    raised = jnp.clip(pose.hand, 0.0, 1.0)
    hand_u, hand_v = shape.shoulders + 0.15 + pose.swing, 2.4 - 1.6 * raised
    t = jnp.clip((bv - hand_v) * (1.0 / (2.7 - hand_v)), 0.0, 1.0)
    sleeve = cover(jnp.maximum(jnp.abs(bu - hand_u - t * (shape.shoulders - 0.25 - hand_u)) - 0.22, hand_v + 0.15 - bv))
    palm = cover(_ellipse(bu - hand_u, bv - hand_v, 0.25, 0.29))
    canvas = paint(canvas, person.clothes * 0.9, sleeve * raised)
    canvas = paint(canvas, person.skin * 0.97, palm * raised)

    whole = functools.reduce(
        jnp.maximum, (body_alpha, back, neck, face_alpha, front, dome * wearing, brim * wearing, palm * raised)
    )
    return canvas, present * face_alpha, present * whole


def _truth(person: Identity, pose: Pose) -> tuple[Float[Array, "4"], Float[Array, "5 2"]]:
    """Face box (x0, y0, x1, y1) and the five landmarks, in points."""
    shape = _Shape(*person.shape)
    cos, sin = jnp.cos(pose.roll), jnp.sin(pose.roll)
    half_x = jnp.hypot(shape.width * cos, shape.height * sin)
    half_y = jnp.hypot(shape.width * sin, shape.height * cos)
    box = jnp.stack(
        [
            pose.x - half_x * pose.scale,
            pose.y - half_y * pose.scale,
            pose.x + half_x * pose.scale,
            pose.y + half_y * pose.scale,
        ]
    )
    place = _features(shape, pose)
    (eye_u, eye_v, apart), nose, (mouth_u, mouth_v, wide) = place["eyes"], place["nose"], place["mouth"]
    corner = mouth_v - 0.13 * 0.7 * pose.smile
    local = jnp.array(
        [[eye_u - apart, eye_v], [eye_u + apart, eye_v], nose, [mouth_u - wide, corner], [mouth_u + wide, corner]]
    )
    turned = jnp.stack([cos * local[:, 0] - sin * local[:, 1], sin * local[:, 0] + cos * local[:, 1]], axis=1)
    return box, turned * pose.scale + jnp.stack([pose.x, pose.y])


def _grid(size: tuple[int, int]):
    """Pixel centres (x, y) in points, each [H,W]."""
    height, width = size
    x = (jnp.arange(width, dtype=jnp.float32) + 0.5) * (POINTS / width)
    y = (jnp.arange(height, dtype=jnp.float32) + 0.5) * (POINTS / height)
    return jnp.meshgrid(x, y)


def _portrait_pose(u: Float[Array, "12"]) -> Pose:
    """Pose of a portrait from numbers in [-1, 1]."""
    return Pose(
        x=32.0 + u[0],
        y=34.0 + u[1],
        scale=20.5 + 1.0 * u[2],
        yaw=0.22 * u[3],
        roll=0.07 * u[4],
        pitch=0.03 * u[5],
        open=jnp.maximum(0.35 * u[6], 0.0),
        smile=0.4 + 0.6 * u[7],
        blink=jnp.float32(0.0),
        hand=jnp.float32(0.0),
        swing=jnp.float32(0.0),
    )


def portrait_truth(
    person: Identity, key: PRNGKeyArray, size: tuple[int, int] = (64, 64)
) -> tuple[Float[Array, "4"], Float[Array, "5 2"]]:
    """Face box and landmarks, as in a `Clip`, of the portrait that `render_portrait` draws from the same arguments."""
    pose = _portrait_pose(jax.random.uniform(key, (12,), jnp.float32, -1.0, 1.0))
    box, landmarks = _truth(person, pose)
    ratio = jnp.array([size[1] / POINTS, size[0] / POINTS])
    return box * jnp.tile(ratio, 2), landmarks * ratio


def render_portrait(person: Identity, key: PRNGKeyArray, size: tuple[int, int] = (64, 64)) -> Float[Array, "H W 3"]:
    """Reference photo of one person (no batch axis) on pure white, in [-1, 1]; the key varies pose, mouth and light."""
    u = jax.random.uniform(key, (12,), jnp.float32, -1.0, 1.0)
    pose = _portrait_pose(u)
    light = Light(colour=jnp.ones(3) * (1.0 + 0.06 * u[8]), direction=0.07 * u[9])
    x, y = _grid(size)
    canvas, _, _ = _paint_person(jnp.ones((3, *size), jnp.float32), person, pose, light, 1.0, x, y)
    return jnp.clip(jnp.moveaxis(canvas, 0, -1), 0.0, 1.0) * 2.0 - 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Scenes


@flax.struct.dataclass
class Scene:
    """Everything of a clip but who is in it.

    Each field of a pose at time t is base + slope (t - 1/2) + amplitude sin(2 pi (rate t + phase)).
    """


    base: Float[Array, "*n M P"]  # P = fields of Pose, in its order
    slope: Float[Array, "*n M P"]
    amplitude: Float[Array, "*n M P"]
    rate: Float[Array, "*n M P"]  # turns per second
    phase: Float[Array, "*n M P"]
    depth: Float[Array, "*n M"]  # larger is nearer: painted later
    action: Int[Array, "*n M"]
    light: Light
    light_kind: Int[Array, "*n"]
    background: Int[Array, "*n"]
    colours: Int[Array, "*n 2"]  # indices of the background's colours
    decor: Float[Array, "*n 4"]  # free numbers in [0, 1] of the background


_TOLD_OF_ALL = (3, 8, 9, 10)  # numbers of a scene that its prompt tells: colours, light and background


def pose_at(scene: Scene, time: Float[Array, ""]) -> Pose:
    """Poses [M] of one scene (no batch axis) at a time in seconds."""
    wave = jnp.sin(2 * jnp.pi * (scene.rate * time + scene.phase))
    pose = Pose(*jnp.moveaxis(scene.base + scene.slope * (time - 0.5) + scene.amplitude * wave, -1, 0))
    return pose._replace(
        open=jnp.clip(pose.open, 0.0, 1.0),
        blink=jnp.clip((pose.blink - 0.8) * 5.0, 0.0, 1.0),
        hand=jnp.clip(pose.hand, 0.0, 1.0),
    )


def sample_scene(key: PRNGKeyArray, mask: Bool[Array, "M"], take: int | Int[Array, ""] = 0) -> Scene:
    """Draw a scene for the people of `mask`: places left to right in random order, actions, light, background.

    take: further takes of a scene share what its prompt tells and who stands where; the rest is drawn anew.
    """
    people = mask.shape[0]
    count = jnp.maximum(jnp.sum(mask), 1)
    fields = len(Pose._fields)
    shape = (people * (25 + fields) + 16,)
    numbers, anew = (jax.random.uniform(k, shape, jnp.float32) for k in (key, rng.fold(key, take)))
    told = np.concatenate([np.isin(np.arange(16), _TOLD_OF_ALL), np.tile(np.isin(np.arange(25 + fields), (fields, fields + 24)), people)])
    numbers = jnp.where(told | (jnp.asarray(take) == 0), numbers, anew)
    w, per_person = numbers[:16], numbers[16:].reshape(people, -1)
    phase, place, u = per_person[:, :fields], per_person[:, fields], 2.0 * per_person[:, fields + 1 :] - 1.0
    index = lambda number, count: jnp.minimum((number * count).astype(jnp.int32), count - 1)  # noqa: E731
    at = {name: k for k, name in enumerate(Pose._fields)}

    # Absent people rank last, so the present ones share the width evenly.
    rank = jnp.argsort(jnp.argsort(jnp.where(mask, place, 2.0)))
    centre = POINTS * (rank + 0.5) / count + u[:, 0] * jnp.where(count > 1, 2.5, 7.0)
    scale = jnp.where(count > 2, 10.6, jnp.where(count > 1, 12.4, 13.4)) * (1.0 + 0.09 * u[:, 1])
    top = jnp.where(count > 2, 27.0, 28.0) + 4.0 * u[:, 2]

    action = index(0.5 * (u[:, 23] + 1.0), len(_ACTIONS))
    action = jnp.where((action == 0) & (centre < 20), 1, jnp.where((action == 1) & (centre > 44), 0, action))
    does = lambda k: (action == k).astype(jnp.float32)  # noqa: E731
    walk, turn, nod, talk, dance = does(1) - does(0), does(2), does(3), does(4), does(5)
    grow, wave, smile = does(6) - does(7), does(8), does(9)

    def table(**columns):
        out = jnp.zeros((people, fields), jnp.float32)
        for name, column in columns.items():
            out = out.at[:, at[name]].set(column)
        return out

    speed = 14.0 + 4.0 * u[:, 3]
    base = table(
        x=centre, y=top, scale=scale, yaw=0.28 * u[:, 4] + 0.3 * walk, roll=0.05 * u[:, 5], pitch=0.02 * u[:, 6],
        open=0.25 * u[:, 7] + 0.35 * talk, smile=0.35 + 0.5 * u[:, 8] + 0.1 * smile, hand=wave,
    )  # fmt: skip
    slope = table(
        x=walk * speed + 3.0 * u[:, 9], y=2.0 * u[:, 10],
        scale=scale * (jnp.where(count > 2, 0.22, 0.34) * grow + 0.04 * u[:, 11]),
        yaw=0.2 * u[:, 12], smile=1.2 * smile,
    )  # fmt: skip
    amplitude = table(
        x=1.6 + 0.6 * u[:, 13] + 3.6 * dance, y=0.9 + 0.5 * u[:, 14] + 1.6 * dance + 0.8 * jnp.abs(walk),
        yaw=0.16 + 0.08 * u[:, 15] + 0.5 * turn, roll=0.04 + 0.02 * u[:, 16] + 0.14 * dance,
        pitch=0.015 + 0.16 * nod, open=0.06 + 0.55 * talk, smile=jnp.full(people, 0.12), blink=jnp.full(people, 1.0),
        swing=0.38 * wave,
    )  # fmt: skip
    rate = table(
        x=0.8 + 0.3 * u[:, 17] + 0.5 * dance, y=1.4 + 0.4 * u[:, 18] + 0.4 * dance,
        yaw=0.6 + 0.2 * u[:, 19] + 0.1 * turn,
        roll=0.9 + 0.5 * dance, pitch=1.0 + 0.5 * nod, open=1.4 + 0.5 * u[:, 20] + 0.6 * talk,
        smile=jnp.full(people, 0.7), blink=0.7 + 0.2 * u[:, 21], swing=2.0 + 0.4 * u[:, 22],
    )  # fmt: skip

    light_kind = index(w[8], len(_LIGHTS))
    gain = jnp.array([1.0, 1.12, 0.68, 0.98, 0.96])[light_kind] * (0.97 + 0.06 * w[0])
    tint = jnp.array([[1, 1, 1], [1, 1, 1], [1, 1, 1.02], [1.08, 0.98, 0.82], [0.86, 0.97, 1.1]], jnp.float32)[
        light_kind
    ]
    side = jnp.array([0.03, 0.10, 0.08, 0.07, 0.07])[light_kind] * jnp.where(w[1] < 0.5, -1.0, 1.0) * (0.6 + 0.8 * w[2])
    first = index(w[9], len(_COLOURS))
    other = (first + 1 + index(w[3], len(_COLOURS) - 1)) % len(_COLOURS)
    return Scene(
        base=base,
        slope=slope,
        amplitude=amplitude,
        rate=rate,
        phase=phase,
        depth=scale + 3.0 * (w[12] - 0.5) * jnp.where(rank == 0, 1.0, -1.0),
        action=action,
        light=Light(colour=tint * gain, direction=side),
        light_kind=light_kind,
        background=index(w[10], len(_BACKGROUNDS)),
        colours=jnp.stack([first, other]),
        decor=w[4:8],
    )


def _paint_background(scene: Scene, x, y) -> Float[Array, "3 H W"]:
    """Background planes in [0, 1]; all kinds are computed and one is kept, once per clip."""
    a, b, c, d = scene.decor
    per_point = 1.0 / (x[0, 1] - x[0, 0])
    soft = lambda distance: jnp.clip(0.5 - distance * per_point, 0.0, 1.0)  # noqa: E731
    one, two = (jnp.asarray(_COLOUR_TABLE)[k] * 0.62 + 0.30 for k in scene.colours)
    plain = jnp.broadcast_to(one[:, None, None], (3, *x.shape))

    def mix(base, colour, alpha):
        return base + alpha * (jnp.asarray(colour, jnp.float32)[:, None, None] - base)

    def sky(top, low):
        return mix(jnp.broadcast_to(top[:, None, None], plain.shape), low, y / POINTS)

    blue, pale = jnp.array([0.42, 0.66, 0.92]), jnp.array([0.86, 0.92, 0.96])
    angle = a * jnp.pi
    band = soft(jnp.abs((x * jnp.cos(angle) + y * jnp.sin(angle)) % (10 + 8 * b) - 5 - 4 * b) - 2.5 - 2 * b)
    cell = 8.0 + 6.0 * b
    tile_x, tile_y = (jnp.abs((p / cell) % 2 - 1) - 0.5 for p in (x + 20 * a, y + 20 * c))
    tiles = jnp.clip(0.5 + 4 * cell * tile_x * tile_y, 0, 1)
    ridge = lambda level, k, shift: soft(level + 5 * jnp.sin(x * k + shift * 6.28) - y)  # noqa: E731
    hills = mix(mix(sky(blue, pale), one * 0.8, ridge(30 + 8 * a, 0.11, b)), one, ridge(42 + 6 * c, 0.08, d))
    room = mix(plain, two * 0.7, soft(50.0 - y))
    pane = soft(jnp.maximum(jnp.abs(x - 10 - 44 * a) - 9, jnp.abs(y - 16) - 10))
    cross = soft(jnp.minimum(jnp.abs(x - 10 - 44 * a), jnp.abs(y - 16)) - 0.7)
    room = mix(mix(room, blue * 0.5 + 0.45, pane), (0.95, 0.95, 0.93), pane * cross)
    sun = soft(jnp.hypot(x - 8 - 48 * a, y - 12) - 5)
    beach = mix(mix(sky(blue, pale), (0.99, 0.90, 0.55), sun), (0.16, 0.45, 0.66), soft(34 + 4 * b - y))
    beach = mix(beach, (0.90, 0.82, 0.60), soft(46 + 4 * c + 1.5 * jnp.sin(x * 0.2 + d * 6) - y))
    grid_x, grid_y = ((p % (13 + 6 * d)) - 6.5 - 3 * d for p in (x + 20 * a, y + 20 * b))
    lights = mix(plain * 0.35, two * 0.6 + 0.4, jnp.clip(1.3 - jnp.hypot(grid_x, grid_y) / (3 + 2 * c), 0, 1))
    kinds = jnp.stack(
        [
            plain,
            sky(one * 0.9, two * 0.5 + 0.5),
            mix(plain, two, band),
            mix(plain, two, tiles),
            hills,
            room,
            beach,
            lights,
        ]
    )
    return kinds[scene.background] * scene.light.colour[:, None, None]


@flax.struct.dataclass
class Clip:
    """A drawn clip and its truth, people in reference order; boxes, landmarks, visibility of absent people are zero."""

    video: Float[Array, "*n F H W 3"]  # [-1, 1]
    boxes: Float[Array, "*n F M 4"]  # face oval: x0, y0, x1, y1 in pixels, may reach outside the picture
    landmarks: Float[
        Array, "*n F M 5 2"
    ]  # x, y in pixels: left eye, right eye, nose, left and right mouth corner in the picture
    visible: Float[Array, "*n F M"]  # share of the face oval inside the picture and not covered by another person


def render_clip(
    people: Identity, mask: Bool[Array, "M"], scene: Scene, frames: int = 9, size: tuple[int, int] = (64, 64)
) -> Clip:
    """Draw one clip of the people [M] of `mask` (no batch axis; vmap it)."""
    x, y = _grid(size)
    background = _paint_background(scene, x, y)
    order = jnp.argsort(scene.depth)
    sort = lambda tree: jax.tree.map(lambda leaf: leaf[order], tree)  # noqa: E731
    present = mask.astype(jnp.float32)

    def frame(time):
        poses = pose_at(scene, time)

        def paint_next(carry, one):
            canvas, faces = carry
            person, pose, here, slot = one
            canvas, face, body = _paint_person(canvas, person, pose, scene.light, here, x, y)
            return (canvas, faces * (1.0 - body) + slot[:, None, None] * face), None

        start = (background, jnp.zeros((*present.shape, *size), jnp.float32))
        slots = jnp.eye(present.shape[0])[order]
        (canvas, faces), _ = jax.lax.scan(paint_next, start, (sort(people), sort(poses), present[order], slots))
        boxes, landmarks = jax.vmap(_truth)(people, poses)
        # The oval's area at this size, from the box: what lies outside the picture counts as hidden.
        shapes = people.shape
        ratio = jnp.array([size[1] / POINTS, size[0] / POINTS])
        area = _oval_area(shapes) * poses.scale**2 * ratio[0] * ratio[1]
        visible = jnp.clip(jnp.sum(faces, axis=(1, 2)) / area, 0.0, 1.0)
        return canvas, boxes * jnp.tile(ratio, 2), landmarks * ratio, visible

    video, boxes, landmarks, visible = jax.vmap(frame)(jnp.arange(frames, dtype=jnp.float32) / FRAMES_PER_SECOND)
    return Clip(
        video=jnp.clip(jnp.moveaxis(video, 1, -1), 0.0, 1.0) * 2.0 - 1.0,
        boxes=boxes * present[:, None],
        landmarks=landmarks * present[:, None, None],
        visible=visible * present,
    )


def _oval_area(shape: Float[Array, "M 24"]) -> Float[Array, "M"]:
    """Area of the face oval in square head units, by the trapezoid rule over its height."""
    width, height, taper, square = (shape[:, k, None] for k in range(4))
    w = jnp.linspace(-1.0, 1.0, 65)
    squared = w * w * (1.0 + square * (w * w - 1.0) * (w > 0))
    half = width * (1.0 - taper * jnp.clip(w, 0.0, 1.2) ** 2) * jnp.sqrt(jnp.maximum(1.0 - squared, 0.0))
    return jnp.sum(half, axis=1) * 2.0 * height[:, 0] * (2.0 / 64)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@flax.struct.dataclass
class Batch:
    """Clips with the reference photos of their people. Absent people: id -1, white portrait, mask False."""

    video: Float[Array, "B F H W 3"]
    portraits: Float[Array, "B M H W 3"]  # [-1, 1], reference order
    portrait_boxes: Float[Array, "B M 4"]
    mask: Bool[Array, "B M"]
    ids: Int[Array, "B M"]
    boxes: Float[Array, "B F M 4"]
    landmarks: Float[Array, "B F M 5 2"]
    visible: Float[Array, "B F M"]
    scene: Scene
    people: Identity


def draw(
    key: PRNGKeyArray,
    ids: Int[Array, "B M"],
    mask: Bool[Array, "B M"],
    frames: int = 9,
    size: tuple[int, int] = (64, 64),
    take: int | Int[Array, ""] = 0,
) -> Batch:
    """Clips and portraits of the given people; scenes and portraits are drawn from the key. Trace it inside `jit`."""
    people = identity(ids)
    scene_key, portrait_key = jax.random.split(key)
    scene = jax.vmap(lambda k, m: sample_scene(k, m, take))(jax.random.split(scene_key, ids.shape[0]), mask)
    clip = jax.vmap(lambda p, m, s: render_clip(p, m, s, frames, size))(people, mask, scene)
    portrait_keys = jax.random.split(portrait_key, ids.shape)
    portraits = jax.vmap(jax.vmap(lambda p, k: render_portrait(p, k, size)))(people, portrait_keys)
    portrait_boxes, _ = jax.vmap(jax.vmap(lambda p, k: portrait_truth(p, k, size)))(people, portrait_keys)
    return Batch(
        video=clip.video,
        portraits=jnp.where(mask[..., None, None, None], portraits, 1.0),
        portrait_boxes=portrait_boxes * mask[..., None],
        mask=mask,
        ids=jnp.where(mask, ids, -1),
        boxes=clip.boxes,
        landmarks=clip.landmarks,
        visible=clip.visible,
        scene=scene,
        people=people,
    )


def sample_ids(key: PRNGKeyArray, count: int, split: str, people: int = MAX_PEOPLE) -> Int[Array, "count people"]:
    """Ids from a split's range, distinct within a row: one from each of `people` equal parts of it, shuffled."""
    first, last = SPLITS[split]
    part = (last - first) // people
    drawn, order = jax.random.uniform(key, (2, count, people), jnp.float32)
    ids = first + jnp.minimum((drawn * part).astype(jnp.int32), part - 1) + part * jnp.arange(people)
    return jnp.take_along_axis(ids, jnp.argsort(order, axis=1), axis=1)


def sample_mask(key: PRNGKeyArray, count: int, people: int = MAX_PEOPLE) -> Bool[Array, "count people"]:
    """How many people: one 30 %, two 50 %, three 20 %; the first slots are the filled ones."""
    number = 1 + jax.vmap(lambda u: _pick(u, _COUNT_SHARES[:people]))(jax.random.uniform(key, (count,), jnp.float32))
    return jnp.arange(people) < number[:, None]


@functools.partial(jax.jit, static_argnames=("size", "split", "frames", "resolution"))
def batch(
    seed: int | Int[Array, ""],
    step: int | Int[Array, ""],
    size: int,
    split: str,
    frames: int = 9,
    resolution: tuple[int, int] = (64, 64),
    take: int | Int[Array, ""] = 0,
) -> Batch:
    """The step-th batch of `size` clips of a split ("train", "rl" or "eval"): a pure function of its arguments.

    take: further takes are other clips of the same people, photos and prompts (see `sample_scene`).
    """
    key = rng.fold(rng.key(seed, "data"), step)
    id_key, mask_key, draw_key = jax.random.split(key, 3)
    return draw(draw_key, sample_ids(id_key, size, split), sample_mask(mask_key, size), frames, resolution, take)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts

_LIGHT_PHRASES = ("in soft light", "in bright light", "in dim light", "in warm light", "in cold light")


def _background_phrase(kind: int, one: str, two: str) -> str:
    return (
        f"in front of a plain {one} wall",
        f"in front of a {one} sky that fades to {two}",
        f"in front of {one} and {two} stripes",
        f"in front of {one} and {two} tiles",
        f"in front of {one} hills",
        f"in a {one} room with a window and a {two} floor",
        "on a beach by the sea",
        f"in front of {two} lights in a dark {one} night",
    )[kind]


def _person_phrase(labels: np.ndarray) -> str:
    """Noun phrase of a person without the article: hair, hat, glasses, beard, clothes."""
    label = _Labels(*(int(k) for k in labels))
    style = _STYLE_NAMES[label.hair_style]
    parts = ["a bald head" if style == "bald" else f"{style} {_HAIR_NAMES[label.hair]} hair"]
    if _HAT_NAMES[label.hat] != "none":
        parts.append(f"a {_COLOUR_NAMES[label.hat_colour]} {_HAT_NAMES[label.hat]}")
    if _GLASSES_NAMES[label.glasses] != "none":
        parts.append(f"{_GLASSES_NAMES[label.glasses]} glasses")
    if _BEARD_NAMES[label.beard] != "none":
        beard = _BEARD_NAMES[label.beard]
        parts.append("stubble" if beard == "stubble" else f"a {beard}")
    parts.append(f"a {_COLOUR_NAMES[label.clothes]} {_CLOTHES_NAMES[label.garment]}")
    return "with " + ", ".join(parts[:-1]) + " and " + parts[-1]


def prompt(scene: Scene, people: Identity, mask: Bool[Array | np.ndarray, "M"]) -> str:
    """English description of one clip (no batch axis), on the host: people in reference order, then place and light."""
    labels, actions, mask = np.asarray(people.labels), np.asarray(scene.action), np.asarray(mask)
    phrases = [f"person {_person_phrase(labels[k])} {_ACTIONS[int(actions[k])]}" for k in np.flatnonzero(mask)]
    one, two = (_COLOUR_NAMES[int(k)] for k in np.asarray(scene.colours))
    place = f"{_background_phrase(int(scene.background), one, two)} {_LIGHT_PHRASES[int(scene.light_kind)]}"
    if len(phrases) == 1:
        return f"one person {place}: a {phrases[0]}."
    listed = ", ".join(f"{'a' if k == 0 else 'another'} {phrase}" for k, phrase in enumerate(phrases))
    return f"{_COUNTS[len(phrases) - 1]} people {place}: {listed}."


def prompts(drawn: Batch) -> list[str]:
    """One description per clip of a batch."""
    return describe(drawn.scene, drawn.people, drawn.mask)


def describe(scene: Scene, people: Identity, mask: Bool[ArrayLike, "B M"]) -> list[str]:
    """`prompt` of every row."""
    host = jax.device_get((scene, people, mask))
    row = lambda k: jax.tree.map(lambda leaf: leaf[k], host)  # noqa: E731
    return [prompt(*row(k)) for k in range(len(host[2]))]


def vocabulary() -> list[str]:
    """Every word a prompt can hold, sorted, without punctuation."""
    texts = [*_ACTIONS, *_LIGHT_PHRASES, *_STYLE_NAMES, *_HAIR_NAMES, *_COLOUR_NAMES, *_HAT_NAMES[1:]]
    texts += [*_GLASSES_NAMES[1:], *_BEARD_NAMES[1:], *_CLOTHES_NAMES, *_COUNTS[:MAX_PEOPLE]]
    texts += [_background_phrase(k, "", "") for k in range(len(_BACKGROUNDS))]
    texts += ["a bald head hair glasses with and another person people"]
    return sorted({word for text in texts for word in text.split()})


@functools.partial(jax.jit, static_argnames=("count", "split"))
def _asked(seed, count: int, split: str):
    """Portraits [count,M,64,64,3], scenes, people and mask of prompts: a batch without its clips."""
    id_key, mask_key, scene_key, portrait_key = jax.random.split(rng.key(seed, "data"), 4)
    ids, mask = sample_ids(id_key, count, split), sample_mask(mask_key, count)
    people = identity(ids)
    photos = jax.vmap(jax.vmap(render_portrait))(people, jax.random.split(portrait_key, ids.shape))
    scene_keys = jax.random.split(rng.fold(scene_key, SPLITS[split][0]), count)  # splits share no scenes either
    return photos, jax.vmap(sample_scene)(scene_keys, mask), people, mask


def write_prompts(out: Path, split: str, count: int, seed: int = 0) -> None:
    """Write `out`: prompts.csv of `count` rows and, as PNG, one portrait of each person they ask for.

    Raises:
      UserError: `out` exists already or cannot be made, or there is no such split.
    """
    check_asked(split, count)
    with folders.new_folder(out) as folder:
        photos, scenes, people, mask = jax.device_get(_asked(seed, count, split))
        pixels = np.rint((photos + 1.0) * 127.5).astype(np.uint8)
        with (folder / "prompts.csv").open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("ref_paths", "prompt"))
            for k in range(count):
                names = [f"{k:04d}-{slot}.png" for slot in np.flatnonzero(mask[k])]
                for slot, name in enumerate(names):
                    Image.fromarray(pixels[k, slot]).save(folder / name, optimize=True)
                scene, who = jax.tree.map(lambda leaf: leaf[k], (scenes, people))  # noqa: B023
                rows.writerow((";".join(names), prompt(scene, who, mask[k])))


def check_asked(split: str, count: int) -> None:
    """Whether that can be drawn.

    Raises:
      UserError: there is no such split, or nothing is asked for.
    """
    if split not in SPLITS:
        raise UserError(f"--split {split}: no such split; use one of {', '.join(SPLITS)}")
    if count < 1:
        raise UserError(f"--count {count}: nothing to write; use 1 or more")


def main(arguments: list[str] | None = None) -> int:
    """`python -m jax_idgrpo.synthetic.scenes --out DIR --split rl --count N`; returns the exit status."""
    parser = folders.options("Write prompts and reference photos of drawn people.", "prompts.csv and PNG portraits", "rows of prompts.csv",
                             ", ".join(SPLITS))
    return folders.run(write_prompts, vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
