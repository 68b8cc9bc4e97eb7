"""Render a synthetic person, with face box and landmarks."""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jax_idgrpo.synthetic.people import Identity, _Shape

POINTS = 64.0  # height of a picture in points; points are square


class Pose(NamedTuple):
    """Position and expression of a head at one moment. Leaves may have leading axes."""

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
    """Light of a scene.

    colour: factor of RGB. direction: side (-1 left, 1 right) times strength.
    """

    colour: Float[Array, "*n 3"]
    direction: Float[Array, "*n"]


def _ellipse(u, v, rx, ry):
    """Compute the first-order distance to the ellipse u^2/rx^2 + v^2/ry^2 = 1."""
    # Fold the unit into the radii, so that a pixel costs only multiplications.
    unit = jnp.sqrt(0.5 * jnp.sqrt(rx * ry))
    return jnp.square(u * (unit / rx)) + jnp.square(v * (unit / ry)) - unit * unit


def _ripple(t):
    """Compute a smooth wave between -1 and 1 with period 2; cheaper than a sine."""
    saw = t - 2.0 * jnp.floor(0.5 * t) - 1.0
    return 4.0 * saw * (1.0 - jnp.abs(saw))


def _features(shape: _Shape, pose: Pose) -> dict[str, tuple]:
    """Compute positions (u, v) of facial features; nearer points move more with the head's turn."""
    turn, narrow = jnp.sin(pose.yaw), jnp.cos(pose.yaw)
    middle = turn * shape.width * 0.52
    return {
        "eyes": (middle, shape.eye_height + pose.pitch, shape.eye_spacing * narrow),
        "nose": (turn * shape.width * 0.74, shape.nose_height + 1.3 * pose.pitch),
        "mouth": (
            turn * shape.width * 0.55,
            shape.mouth_height + 0.9 * pose.pitch,
            shape.mouth_width * narrow,
        ),
    }


def _paint_person(canvas, person: Identity, pose: Pose, light: Light, present, x, y):
    """Paint one person over a picture.

    Args:
      canvas: picture [3,H,W].
      person: appearance.
      pose: position and expression.
      light: light of the scene.
      present: opacity, 0 for an absent person.
      x, y: pixel centres in points [H,W].

    Returns:
      The picture, the coverage of the face oval and that of the whole person, both [H,W].
    """
    shape = _Shape(*person.shape)
    thickness, hairline, slope, sides, back_width, back_end, curl, knot_x, knot_y, knot_r = (
        person.style
    )
    crown, brim_width, brim_thickness, brim_offset, hat_height = person.headwear
    garment, hat = person.labels[3], person.labels[4]
    per_unit = pose.scale * (x.shape[0] / POINTS)  # pixels per head unit

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
    pattern = jnp.where(
        garment == 1,
        stripes,
        jnp.where(garment == 2, opening, jnp.where(garment == 3, collar, 0.0)),
    )
    canvas = paint(canvas, person.trim, body_alpha * pattern)

    # Hair behind the head, ears, neck
    long = _ellipse(
        u, v - 0.5 * (back_end - 1.0), shape.width + back_width, 0.5 * (back_end + 1.0) + 0.35
    )
    # Long hair parts over the shoulders.
    throat = jnp.maximum(jnp.abs(bu) - shape.neck - 0.06, 0.9 - bv)
    back = jnp.where(back_width > 0.01, cover(jnp.maximum(long + wave, -throat)), 0.0)
    knot = jnp.where(
        knot_r > 0.01,
        cover(
            _ellipse(
                jnp.abs(u + 0.3 * turn) - knot_x, v - knot_y, knot_r, knot_r * (1 + 0.7 * knot_x)
            )
            + wave
        ),
        0.0,
    )
    back = jnp.maximum(back, knot * jnp.where(knot_y < -0.8, hatless, 1.0))
    canvas = paint(canvas, person.hair * 0.78, back)
    neck = cover(
        jnp.maximum(jnp.abs(bu) - shape.neck, jnp.maximum(-bv, bv - 1.45 + 0.5 * jnp.abs(bu)))
    )
    canvas = paint(canvas, person.skin * 0.80, neck)
    ears = cover(
        _ellipse(
            jnp.abs(u + 0.10 * turn) - shape.width * 0.98,
            v - eye_v - 0.12,
            shape.ear,
            shape.ear * 1.5,
        )
    )
    canvas = paint(canvas, person.skin * 0.90, ears)

    # Face: an ellipse with a narrower, squared lower half
    w = v * (1.0 / shape.height)
    lower = jnp.clip(w, 0.0, 1.2)
    half = 1.0 - shape.taper * lower * lower
    squared = w * w * (1.0 + shape.square * (w * w - 1.0) * (w > 0))
    face = (jnp.square(u * (1.0 / shape.width) / half) + squared - 1.0) * (
        0.5 * jnp.sqrt(shape.width * shape.height)
    )
    face_alpha = cover(face)
    canvas = paint(canvas, person.skin, face_alpha)
    rim = jnp.clip(1.0 + face * 2.2, 0.0, 1.0) * 0.22  # a little darker toward the outline
    canvas = paint(canvas, person.skin * 0.72, face_alpha * rim)
    cheeks = jnp.clip(
        -_ellipse(jnp.abs(u - eye_u) - eye_apart * 1.15, v - eye_v - 0.38, 0.2, 0.15) * 8.0, 0, 1
    )
    canvas = paint(canvas, person.lips, face_alpha * cheeks * jnp.maximum(shape.blush, 0.0))

    # Beard, mouth, moustache
    across = (u - mouth_u) * (1.0 / shape.width)
    edge = 0.16 + pose.pitch + 0.42 * (1.0 - across * across) - v
    beard = cover(
        jnp.maximum(jnp.maximum(edge, jnp.abs(u - mouth_u) - shape.beard_width), face - 0.05)
    )
    canvas = paint(canvas, person.hair * 0.9, beard * shape.beard)
    along = (u - mouth_u) * (1.0 / mouth_w)
    bend = mouth_v - 0.13 * pose.smile * (along * along - 0.3)
    taper_m = jnp.clip(1.0 - 0.75 * along * along, 0.2, 1.0)
    opened = 0.16 * pose.open
    lips = cover(
        jnp.maximum(
            jnp.abs(v - bend) - (shape.mouth_full + opened) * taper_m,
            (jnp.abs(along) - 1.0) * mouth_w,
        )
    )
    canvas = paint(canvas, person.lips, lips)
    gap = cover(
        jnp.maximum(
            jnp.abs(v - bend) - (0.015 + opened) * taper_m, (jnp.abs(along) - 0.9) * mouth_w
        )
    )
    canvas = paint(canvas, person.lips * 0.30, gap * 0.9)
    fur = cover(
        _ellipse(
            u - mouth_u, v - bend + 0.06 + shape.mouth_full + opened * 0.5, mouth_w * 1.05, 0.085
        )
    )
    canvas = paint(canvas, person.hair * 0.85, fur * shape.moustache)

    # Nose
    canvas = paint(
        canvas,
        person.skin * 0.66,
        cover(_ellipse(u - nose_u, v - nose_v, shape.nose_width, 0.065)) * 0.85,
    )
    ridge = cover(
        _ellipse(
            u - 0.55 * nose_u - 0.45 * eye_u - 0.05,
            v - 0.5 * (nose_v + eye_v),
            0.05,
            0.5 * (nose_v - eye_v),
        )
    )
    canvas = paint(canvas, person.skin * 0.78, ridge * 0.6)

    # Eyes and brows: both sides at once, mirrored about the middle
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
        jnp.abs(_ellipse(pair, v - eye_v, shape.eye_width * narrow, lid))
        - 0.02
        + 0.3 * jnp.clip(v - eye_v, 0, 1)
    )
    canvas = paint(canvas, person.skin * 0.35, lash * 0.7)
    brow_v = eye_v - shape.brow_lift + shape.brow_tilt * pair - 0.05 * pose.smile
    brow = cover(
        jnp.maximum(
            jnp.abs(v - brow_v) - shape.brow_thickness, jnp.abs(pair) - shape.eye_width * 1.25
        )
    )
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

    # Hair in front: a cap with a window for the face
    cap = _ellipse(
        u,
        v + 0.10 + 0.4 * thickness,
        shape.width + 0.04 + thickness,
        shape.height - 0.02 + 0.65 * thickness,
    )
    window_h = 0.75 - hairline
    window = _ellipse(
        u - 0.35 * nose_u, v - 0.75 - slope * (u - 0.3), shape.width * 0.94 - 0.04 * curl, window_h
    )
    front = cover(cap + wave) * (1.0 - cover(window - wave)) * cover(v - sides - 0.3 * jnp.abs(u))
    front = front * jnp.where(hairline > -1.2, 1.0, 0.0)
    front = front * jnp.where(hat > 0, cover(-v + hat_height - 0.02), 1.0)
    canvas = paint(canvas, person.hair, front)
    gloss = jnp.clip(1.0 - 5.0 * jnp.abs(v + 0.78 + 0.3 * thickness - 0.25 * u * u), 0, 1) * 0.25
    canvas = paint(canvas, person.hair * 0.5 + 0.5, front * gloss)

    # Hat
    dome = cover(
        jnp.maximum(
            _ellipse(u, v - hat_height, shape.width + 0.13, jnp.maximum(crown, 0.1)), v - hat_height
        )
    )
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
    sleeve = cover(
        jnp.maximum(
            jnp.abs(bu - hand_u - t * (shape.shoulders - 0.25 - hand_u)) - 0.22, hand_v + 0.15 - bv
        )
    )
    palm = cover(_ellipse(bu - hand_u, bv - hand_v, 0.25, 0.29))
    canvas = paint(canvas, person.clothes * 0.9, sleeve * raised)
    canvas = paint(canvas, person.skin * 0.97, palm * raised)

    whole = functools.reduce(
        jnp.maximum,
        (body_alpha, back, neck, face_alpha, front, dome * wearing, brim * wearing, palm * raised),
    )
    return canvas, present * face_alpha, present * whole


def _truth(person: Identity, pose: Pose) -> tuple[Float[Array, "4"], Float[Array, "5 2"]]:
    """Compute the face box (x0, y0, x1, y1) and the five landmarks in points."""
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
    (eye_u, eye_v, apart), nose, (mouth_u, mouth_v, wide) = (
        place["eyes"],
        place["nose"],
        place["mouth"],
    )
    corner = mouth_v - 0.13 * 0.7 * pose.smile
    local = jnp.array(
        [
            [eye_u - apart, eye_v],
            [eye_u + apart, eye_v],
            nose,
            [mouth_u - wide, corner],
            [mouth_u + wide, corner],
        ]
    )
    turned = jnp.stack(
        [cos * local[:, 0] - sin * local[:, 1], sin * local[:, 0] + cos * local[:, 1]], axis=1
    )
    return box, turned * pose.scale + jnp.stack([pose.x, pose.y])


def points_wide(size: tuple[int, int]) -> float:
    """Return the width in points of a picture of (height, width) in pixels."""
    return POINTS * size[1] / size[0]


def _grid(size: tuple[int, int]):
    """Return the pixel centres (x, y) in points, each [H,W]."""
    height, width = size
    x = (jnp.arange(width, dtype=jnp.float32) + 0.5) * (points_wide(size) / width)
    y = (jnp.arange(height, dtype=jnp.float32) + 0.5) * (POINTS / height)
    return jnp.meshgrid(x, y)


def _portrait_pose(u: Float[Array, "12"], width: float) -> Pose:
    """Make the pose of a portrait that is `width` points wide from numbers in [-1, 1]."""
    return Pose(
        x=width / 2 + u[0],
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
    """Compute face box and landmarks of a portrait, in the coordinates of `scenes.Clip`.

    Args: those of `render_portrait`, which renders the portrait.
    """
    u = jax.random.uniform(key, (12,), jnp.float32, -1.0, 1.0)
    pose = _portrait_pose(u, points_wide(size))
    box, landmarks = _truth(person, pose)
    ratio = size[0] / POINTS
    return box * ratio, landmarks * ratio


def render_portrait(
    person: Identity, key: PRNGKeyArray, size: tuple[int, int] = (64, 64)
) -> Float[Array, "H W 3"]:
    """Render the reference photo of one person on pure white, in [-1, 1].

    Args:
      person: person without a batch axis.
      key: varies pose, mouth and light.
      size: (height, width) in pixels.
    """
    u = jax.random.uniform(key, (12,), jnp.float32, -1.0, 1.0)
    pose = _portrait_pose(u, points_wide(size))
    light = Light(colour=jnp.ones(3) * (1.0 + 0.06 * u[8]), direction=0.07 * u[9])
    x, y = _grid(size)
    canvas, _, _ = _paint_person(jnp.ones((3, *size), jnp.float32), person, pose, light, 1.0, x, y)
    return jnp.clip(jnp.moveaxis(canvas, 0, -1), 0.0, 1.0) * 2.0 - 1.0
