"""Render short clips of synthetic people with exact annotations.

A person is a pure function of an integer id. A picture is a stack of soft shapes, painted back to
front. Every shape is an implicit function d(u, v), negative inside, in the person's head
coordinates, and covers a pixel by `alpha = clip(1/2 - d * pixels_per_unit, 0, 1)`: the area of a
pixel under a straight edge. Rendering is one elementwise float32 JAX program, mapped over people,
frames and samples, so it runs on any device inside `jit`.

Head coordinates: u to the right, v down, origin at the face's centre; the unit is about half a face
height. Lengths of a scene are in points: a picture is 64 points high and wide at any size in
pixels. Times are in seconds; a clip has 8 frames per second.
"""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jax_idgrpo import rng
from jax_idgrpo.synthetic.people import (
    _ACTIONS,
    _BACKGROUNDS,
    _COLOUR_TABLE,
    _COLOURS,
    _COUNT_SHARES,
    _LIGHTS,
    FRAMES_PER_SECOND,
    MAX_PEOPLE,
    SPLITS,
    Identity,
    _pick,
    identity,
)
from jax_idgrpo.synthetic.renderer import (
    POINTS,
    Light,
    Pose,
    _grid,
    _paint_person,
    _truth,
    points_wide,
    portrait_truth,
    render_portrait,
)

# ---- scenes --------------------------------------------------------------------------------------


@flax.struct.dataclass
class Scene:
    """Content of a clip except for its people.

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
    decor: Float[Array, "*n 4"]  # numbers in [0, 1] that vary the background


class Framing(NamedTuple):
    """How close the people of a clip are and how fast they move.

    Attributes:
      scales: points per head unit with one, two and three people.
      spread: largest relative deviation of a person's scale.
      pace: speed of all movements, 1 for that of square clips.
    """

    scales: tuple[float, float, float]
    spread: float
    pace: float


def framing_of(size: tuple[int, int]) -> Framing:
    """Return the framing of pictures of (height, width): wide pictures are closer and calmer."""
    if size[1] > size[0]:
        return Framing(scales=(17.0, 16.0, 15.0), spread=0.05, pace=0.5)
    return Framing(scales=(13.4, 12.4, 10.6), spread=0.09, pace=1.0)


# Random numbers of a scene that its prompt describes: colours, light and background.
_DESCRIBED_NUMBERS = (3, 8, 9, 10)


def pose_at(scene: Scene, time: Float[Array, ""]) -> Pose:
    """Compute the poses [M] of one scene (no batch axis) at a time in seconds."""
    wave = jnp.sin(2 * jnp.pi * (scene.rate * time + scene.phase))
    pose = Pose(
        *jnp.moveaxis(scene.base + scene.slope * (time - 0.5) + scene.amplitude * wave, -1, 0)
    )
    return pose._replace(
        open=jnp.clip(pose.open, 0.0, 1.0),
        blink=jnp.clip((pose.blink - 0.8) * 5.0, 0.0, 1.0),
        hand=jnp.clip(pose.hand, 0.0, 1.0),
    )


def sample_scene(
    key: PRNGKeyArray,
    mask: Bool[Array, " M"],
    variant: int | Int[Array, ""] = 0,
    size: tuple[int, int] = (64, 64),
) -> Scene:
    """Sample a scene: positions in random order, actions, light and background.

    Args:
      key: key of the scene.
      mask: people who are present.
      variant: variants of a scene share everything in the prompt and the order of the people; all
        other numbers are sampled independently.
      size: (height, width) of the pictures in pixels, which decides the framing.
    """
    width, framing = points_wide(size), framing_of(size)
    people = mask.shape[0]
    count = jnp.maximum(jnp.sum(mask), 1)
    fields = len(Pose._fields)
    shape = (people * (25 + fields) + 16,)
    numbers, anew = (
        jax.random.uniform(k, shape, jnp.float32) for k in (key, rng.fold(key, variant))
    )
    described = np.concatenate(
        [
            np.isin(np.arange(16), _DESCRIBED_NUMBERS),
            np.tile(np.isin(np.arange(25 + fields), (fields, fields + 24)), people),
        ]
    )
    numbers = jnp.where(described | (jnp.asarray(variant) == 0), numbers, anew)
    w, per_person = numbers[:16], numbers[16:].reshape(people, -1)
    phase, place, u = (
        per_person[:, :fields],
        per_person[:, fields],
        2.0 * per_person[:, fields + 1 :] - 1.0,
    )
    index = lambda number, count: jnp.minimum((number * count).astype(jnp.int32), count - 1)  # noqa: E731
    at = {name: k for k, name in enumerate(Pose._fields)}

    # Absent people rank last, so the present ones share the width evenly.
    rank = jnp.argsort(jnp.argsort(jnp.where(mask, place, 2.0)))
    centre = width * (rank + 0.5) / count + u[:, 0] * jnp.where(count > 1, 2.5, 7.0)
    scale = jnp.asarray(framing.scales)[jnp.minimum(count, 3) - 1]
    scale = scale * (1.0 + framing.spread * u[:, 1])
    top = jnp.where(count > 2, 27.0, 28.0) + 4.0 * u[:, 2]

    action = index(0.5 * (u[:, 23] + 1.0), len(_ACTIONS))
    action = jnp.where(
        (action == 0) & (centre < 20),
        1,
        jnp.where((action == 1) & (centre > width - 20), 0, action),
    )
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
        x=centre, y=top, scale=scale,
        yaw=0.28 * u[:, 4] + 0.3 * walk, roll=0.05 * u[:, 5], pitch=0.02 * u[:, 6],
        open=0.25 * u[:, 7] + 0.35 * talk, smile=0.35 + 0.5 * u[:, 8] + 0.1 * smile, hand=wave,
    )  # fmt: skip
    slope = table(
        x=walk * speed + 3.0 * u[:, 9], y=2.0 * u[:, 10],
        scale=scale * (jnp.where(count > 2, 0.22, 0.34) * grow + 0.04 * u[:, 11]),
        yaw=0.2 * u[:, 12], smile=1.2 * smile,
    )  # fmt: skip
    amplitude = table(
        x=1.6 + 0.6 * u[:, 13] + 3.6 * dance,
        y=0.9 + 0.5 * u[:, 14] + 1.6 * dance + 0.8 * jnp.abs(walk),
        yaw=0.16 + 0.08 * u[:, 15] + 0.5 * turn, roll=0.04 + 0.02 * u[:, 16] + 0.14 * dance,
        pitch=0.015 + 0.16 * nod, open=0.06 + 0.55 * talk,
        smile=jnp.full(people, 0.12), blink=jnp.full(people, 1.0), swing=0.38 * wave,
    )  # fmt: skip
    rate = table(
        x=0.8 + 0.3 * u[:, 17] + 0.5 * dance, y=1.4 + 0.4 * u[:, 18] + 0.4 * dance,
        yaw=0.6 + 0.2 * u[:, 19] + 0.1 * turn,
        roll=0.9 + 0.5 * dance, pitch=1.0 + 0.5 * nod, open=1.4 + 0.5 * u[:, 20] + 0.6 * talk,
        smile=jnp.full(people, 0.7), blink=0.7 + 0.2 * u[:, 21], swing=2.0 + 0.4 * u[:, 22],
    )  # fmt: skip

    light_kind = index(w[8], len(_LIGHTS))
    gain = jnp.array([1.0, 1.12, 0.68, 0.98, 0.96])[light_kind] * (0.97 + 0.06 * w[0])
    tint = jnp.array(
        [[1, 1, 1], [1, 1, 1], [1, 1, 1.02], [1.08, 0.98, 0.82], [0.86, 0.97, 1.1]], jnp.float32
    )[light_kind]
    side = (
        jnp.array([0.03, 0.10, 0.08, 0.07, 0.07])[light_kind]
        * jnp.where(w[1] < 0.5, -1.0, 1.0)
        * (0.6 + 0.8 * w[2])
    )
    first = index(w[9], len(_COLOURS))
    other = (first + 1 + index(w[3], len(_COLOURS) - 1)) % len(_COLOURS)
    return Scene(
        base=base,
        slope=framing.pace * slope,
        amplitude=amplitude,
        rate=framing.pace * rate,
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
    """Paint the background in [0, 1]; computes all kinds and selects one, once per clip."""
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
    band = soft(
        jnp.abs((x * jnp.cos(angle) + y * jnp.sin(angle)) % (10 + 8 * b) - 5 - 4 * b) - 2.5 - 2 * b
    )
    cell = 8.0 + 6.0 * b
    tile_x, tile_y = (jnp.abs((p / cell) % 2 - 1) - 0.5 for p in (x + 20 * a, y + 20 * c))
    tiles = jnp.clip(0.5 + 4 * cell * tile_x * tile_y, 0, 1)
    ridge = lambda level, k, shift: soft(level + 5 * jnp.sin(x * k + shift * 6.28) - y)  # noqa: E731
    hills = mix(
        mix(sky(blue, pale), one * 0.8, ridge(30 + 8 * a, 0.11, b)), one, ridge(42 + 6 * c, 0.08, d)
    )
    room = mix(plain, two * 0.7, soft(50.0 - y))
    pane = soft(jnp.maximum(jnp.abs(x - 10 - 44 * a) - 9, jnp.abs(y - 16) - 10))
    cross = soft(jnp.minimum(jnp.abs(x - 10 - 44 * a), jnp.abs(y - 16)) - 0.7)
    room = mix(mix(room, blue * 0.5 + 0.45, pane), (0.95, 0.95, 0.93), pane * cross)
    sun = soft(jnp.hypot(x - 8 - 48 * a, y - 12) - 5)
    beach = mix(
        mix(sky(blue, pale), (0.99, 0.90, 0.55), sun), (0.16, 0.45, 0.66), soft(34 + 4 * b - y)
    )
    beach = mix(beach, (0.90, 0.82, 0.60), soft(46 + 4 * c + 1.5 * jnp.sin(x * 0.2 + d * 6) - y))
    grid_x, grid_y = ((p % (13 + 6 * d)) - 6.5 - 3 * d for p in (x + 20 * a, y + 20 * b))
    lights = mix(
        plain * 0.35, two * 0.6 + 0.4, jnp.clip(1.3 - jnp.hypot(grid_x, grid_y) / (3 + 2 * c), 0, 1)
    )
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
    """A rendered clip and its annotations, with people in the order of the references.

    Boxes, landmarks and visibility of absent people are zero.

    Attributes:
      video: frames in [-1, 1].
      boxes: x0, y0, x1, y1 of the face oval in pixels; may extend beyond the picture.
      landmarks: x, y in pixels of the left eye, right eye, nose, left and right mouth corner, as
        seen in the picture.
      visible: share of the face oval that is inside the picture and not covered by another person.
    """

    video: Float[Array, "*n F H W 3"]
    boxes: Float[Array, "*n F M 4"]
    landmarks: Float[Array, "*n F M 5 2"]
    visible: Float[Array, "*n F M"]


def render_clip(
    people: Identity,
    mask: Bool[Array, " M"],
    scene: Scene,
    frames: int = 9,
    size: tuple[int, int] = (64, 64),
) -> Clip:
    """Render one clip.

    Takes no batch axis; use `vmap`.

    Args:
      people: people [M].
      mask: people who are present.
      scene: poses, light and background.
      frames: number of frames.
      size: (height, width) in pixels.
    """
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
        (canvas, faces), _ = jax.lax.scan(
            paint_next, start, (sort(people), sort(poses), present[order], slots)
        )
        boxes, landmarks = jax.vmap(_truth)(people, poses)
        # Divide by the area of the whole oval, so that parts outside the picture count as hidden.
        shapes = people.shape
        ratio = size[0] / POINTS
        area = _oval_area(shapes) * poses.scale**2 * ratio**2
        visible = jnp.clip(jnp.sum(faces, axis=(1, 2)) / area, 0.0, 1.0)
        return canvas, boxes * ratio, landmarks * ratio, visible

    video, boxes, landmarks, visible = jax.vmap(frame)(
        jnp.arange(frames, dtype=jnp.float32) / FRAMES_PER_SECOND
    )
    return Clip(
        video=jnp.clip(jnp.moveaxis(video, 1, -1), 0.0, 1.0) * 2.0 - 1.0,
        boxes=boxes * present[:, None],
        landmarks=landmarks * present[:, None, None],
        visible=visible * present,
    )


def _oval_area(shape: Float[Array, "M 24"]) -> Float[Array, " M"]:
    """Integrate the area of the face oval in square head units by the trapezoid rule."""
    width, height, taper, square = (shape[:, k, None] for k in range(4))
    w = jnp.linspace(-1.0, 1.0, 65)
    squared = w * w * (1.0 + square * (w * w - 1.0) * (w > 0))
    half = (
        width
        * (1.0 - taper * jnp.clip(w, 0.0, 1.2) ** 2)
        * jnp.sqrt(jnp.maximum(1.0 - squared, 0.0))
    )
    return jnp.sum(half, axis=1) * 2.0 * height[:, 0] * (2.0 / 64)


# ---- batches -------------------------------------------------------------------------------------


@flax.struct.dataclass
class Batch:
    """Clips with the reference photos of their people.

    Absent people have id -1, a white portrait and mask False.
    """

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
    variant: int | Int[Array, ""] = 0,
) -> Batch:
    """Render clips and portraits of people; call inside `jit`.

    Args:
      key: key of scenes and portraits.
      ids: ids of the people.
      mask: people who are present.
      frames: frames per clip.
      size: (height, width) in pixels.
      variant: see `sample_scene`.
    """
    people = identity(ids)
    scene_key, portrait_key = jax.random.split(key)
    scene = jax.vmap(lambda k, m: sample_scene(k, m, variant, size))(
        jax.random.split(scene_key, ids.shape[0]), mask
    )
    clip = jax.vmap(lambda p, m, s: render_clip(p, m, s, frames, size))(people, mask, scene)
    portrait_keys = jax.random.split(portrait_key, ids.shape)
    portraits = jax.vmap(jax.vmap(lambda p, k: render_portrait(p, k, size)))(people, portrait_keys)
    portrait_boxes, _ = jax.vmap(jax.vmap(lambda p, k: portrait_truth(p, k, size)))(
        people, portrait_keys
    )
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


def sample_ids(
    key: PRNGKeyArray, count: int, split: str, people: int = MAX_PEOPLE
) -> Int[Array, "count people"]:
    """Sample ids of a split, distinct within a row.

    Each row has one id from each of `people` equal parts of the split's range, shuffled.

    Args:
      key: random key.
      count: number of rows.
      split: "train", "rl" or "eval".
      people: ids per row.
    """
    first, last = SPLITS[split]
    part = (last - first) // people
    position, order = jax.random.uniform(key, (2, count, people), jnp.float32)
    ids = (
        first
        + jnp.minimum((position * part).astype(jnp.int32), part - 1)
        + part * jnp.arange(people)
    )
    return jnp.take_along_axis(ids, jnp.argsort(order, axis=1), axis=1)


def sample_mask(
    key: PRNGKeyArray, count: int, people: int = MAX_PEOPLE
) -> Bool[Array, "count people"]:
    """Sample masks of one (30 %), two (50 %) or three (20 %) people, who occupy the first slots.

    Args:
      key: random key.
      count: number of rows.
      people: slots per row.
    """
    number = 1 + jax.vmap(lambda u: _pick(u, _COUNT_SHARES[:people]))(
        jax.random.uniform(key, (count,), jnp.float32)
    )
    return jnp.arange(people) < number[:, None]


@functools.partial(jax.jit, static_argnames=("size", "split", "frames", "resolution"))
def batch(
    seed: int | Int[Array, ""],
    step: int | Int[Array, ""],
    size: int,
    split: str,
    frames: int = 9,
    resolution: tuple[int, int] = (64, 64),
    variant: int | Int[Array, ""] = 0,
) -> Batch:
    """Render the clips of a step: a pure function of the arguments.

    Args:
      seed: seed of people and scenes.
      step: number of the batch.
      size: number of clips.
      split: "train", "rl" or "eval".
      frames: frames per clip.
      resolution: (height, width) in pixels.
      variant: variants are other clips of the same people, photos and prompts (`sample_scene`).
    """
    key = rng.fold(rng.key(seed, "data"), step)
    id_key, mask_key, draw_key = jax.random.split(key, 3)
    return draw(
        draw_key,
        sample_ids(id_key, size, split),
        sample_mask(mask_key, size),
        frames,
        resolution,
        variant,
    )
