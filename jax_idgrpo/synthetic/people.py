"""Synthetic people: identities, appearance, and disjoint splits for training and evaluation."""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_idgrpo import rng

FRAMES_PER_SECOND = 8
MAX_PEOPLE = 3

SPLITS = {"train": (0, 1_000_000), "rl": (1_000_000, 1_001_000), "eval": (2_000_000, 2_001_000)}
_IDENTITY_SEED = 20250
_COUNT_SHARES = (0.3, 0.5, 0.2)

# ---- words and palettes; colours are sRGB in [0, 1] ----------------------------------------------

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
    [
        [0.24, 0.13, 0.07],
        [0.42, 0.27, 0.12],
        [0.18, 0.42, 0.24],
        [0.16, 0.40, 0.72],
        [0.42, 0.50, 0.56],
    ],
    np.float32,
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

# One drawing renders all hair styles, which differ in these numbers only and vary continuously:
# share, thickness over the skull, hairline (v), fringe slope, lower end of the sides (v),
# back: half width, bottom (v); curl; knot: offset from the middle, height (v), radius.
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

# share, crown height, brim half width, brim thickness, brim offset, height of the brim (v)
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
_CLOTHES_NAMES, _CLOTHES_SHARES = (
    ("shirt", "striped shirt", "jacket", "sweater"),
    (0.35, 0.25, 0.2, 0.2),
)

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
    """Appearance of a person. Colours are RGB in [0, 1], lengths are in head units.

    Every leaf may have leading batch axes.
    """

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
    """Measures of a head, in the order of `Identity.shape`."""

    width: Array
    height: Array
    taper: Array
    square: Array
    eye_spacing: Array
    eye_height: Array
    eye_width: Array
    eye_open: Array
    brow_thickness: Array
    brow_tilt: Array
    brow_lift: Array
    nose_width: Array
    nose_height: Array
    mouth_width: Array
    mouth_full: Array
    mouth_height: Array
    ear: Array
    blush: Array
    neck: Array
    shoulders: Array
    glasses: Array  # the last four are switches, set by the labels
    beard: Array
    beard_width: Array
    moustache: Array


class _Labels(NamedTuple):
    """Indices of the words that describe a person, in the order of `Identity.labels`."""

    hair_style: Array
    hair: Array
    clothes: Array
    garment: Array
    hat: Array
    hat_colour: Array
    glasses: Array
    beard: Array


_RANGES = _Shape(  # (lowest, highest) value of each measure
    width=(0.66, 0.90),
    height=(0.94, 1.08),
    taper=(0.00, 0.34),
    square=(0.00, 0.75),
    eye_spacing=(0.30, 0.43),
    eye_height=(-0.16, 0.06),
    eye_width=(0.145, 0.235),
    eye_open=(0.10, 0.18),
    brow_thickness=(0.025, 0.085),
    brow_tilt=(-0.32, 0.32),
    brow_lift=(0.20, 0.33),
    nose_width=(0.08, 0.20),
    nose_height=(0.22, 0.40),
    mouth_width=(0.19, 0.40),
    mouth_full=(0.05, 0.125),
    mouth_height=(0.54, 0.70),
    ear=(0.09, 0.21),
    blush=(-0.20, 0.35),
    neck=(0.30, 0.52),
    shoulders=(1.15, 1.65),
    glasses=(0.0, 0.0),
    beard=(0.0, 0.0),
    beard_width=(0.0, 0.0),
    moustache=(0.0, 0.0),
)
_MEASURES = np.array(_RANGES, np.float32)


def _pick(u: Float[Array, ""], shares) -> Int[Array, ""]:
    """Sample an index with the given shares from a uniform number in [0, 1)."""
    edges = np.cumsum(np.asarray(shares, np.float32)) / np.sum(shares)
    return jnp.sum(u >= jnp.asarray(edges[:-1], jnp.float32)).astype(jnp.int32)


def _one_identity(number: Int[Array, ""]) -> Identity:
    key = rng.fold(rng.key(_IDENTITY_SEED, "data"), number)
    u = jax.random.uniform(key, (80,), jnp.float32)
    jitter = lambda k, spread: (u[k : k + 3] - 0.5) * spread  # noqa: E731
    shape = _MEASURES[:, 0] + u[: len(_MEASURES)] * (_MEASURES[:, 1] - _MEASURES[:, 0])

    tone = u[24] * (len(_SKIN) - 1)
    low = jnp.minimum(tone.astype(jnp.int32), len(_SKIN) - 2)
    skin = jnp.asarray(_SKIN)[low] + (tone - low) * (
        jnp.asarray(_SKIN)[low + 1] - jnp.asarray(_SKIN)[low]
    )
    skin = skin + jitter(25, 0.06)

    hair_style, hair = _pick(u[28], _STYLE_TABLE[:, 0]), _pick(u[29], _HAIR_SHARES)
    style = jnp.asarray(_STYLE_TABLE)[hair_style, 1:]
    style = style + (u[30:40] - 0.5) * jnp.array(
        [0.08, 0.18, 0.5, 0.2, 0.1, 0.3, 0.03, 0.1, 0.1, 0.08]
    ) * (style != 0)
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
    frame = jnp.stack(
        [jnp.full(3, 0.10), jnp.array([0.55, 0.12, 0.12]), jnp.array([0.75, 0.60, 0.25])]
    )
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
        labels=jnp.stack(
            _Labels(hair_style, hair, clothes, garment, hat, hat_colour, glasses, beard)
        ),
    )


@jax.jit
def identity(ids: Int[Array, "*n"]) -> Identity:
    """Return the people of some ids: a pure function of each id, equal on every machine."""
    ids = jnp.asarray(ids)
    flat = jax.vmap(_one_identity)(ids.reshape(-1))
    return jax.tree.map(lambda leaf: leaf.reshape(*ids.shape, *leaf.shape[1:]), flat)


def with_body_of(heads: Identity, people: Identity) -> Identity:
    """Combine the heads with the bodies and clothes of `people`."""
    garments = np.array([_Labels._fields.index(name) for name in ("clothes", "garment")])
    labels = jnp.asarray(heads.labels).at[..., garments].set(people.labels[..., garments])
    shoulders = _Shape._fields.index("shoulders")
    shape = jnp.asarray(heads.shape).at[..., shoulders].set(people.shape[..., shoulders])
    return dataclasses.replace(
        heads, clothes=people.clothes, trim=people.trim, labels=labels, shape=shape
    )
