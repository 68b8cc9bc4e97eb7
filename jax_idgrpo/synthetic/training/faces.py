"""Annotated pictures of synthetic people, and their degradation, for training face networks.

Face networks see portraits and frames of clips. The clips of a video model are blurred, noisy and
tinted: `degrade` applies these faults to clean renderings.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jax_idgrpo.synthetic import renderer, scenes
from jax_idgrpo.synthetic.people import identity


@flax.struct.dataclass
class FacePictures:
    """Pictures in [-1, 1] with M annotated faces.

    Absent faces have id -1 and visible 0. Integer coordinates are pixel centres.
    """

    pictures: Float[Array, "N H W 3"]
    boxes: Float[Array, "N M 4"]
    landmarks: Float[Array, "N M 5 2"]
    visible: Float[Array, "N M"]
    ids: Int[Array, "N M"]


def draw_frames(
    key: PRNGKeyArray,
    ids: Int[Array, "N M"],
    mask: Bool[Array, "N M"],
    size: tuple[int, int],
) -> FacePictures:
    """Render one frame per row, at a random moment of a clip.

    Args:
      key: key of scenes and moments.
      ids: ids of the people.
      mask: people who are present.
      size: (height, width) in pixels.
    """
    scene_key, time_key = jax.random.split(key)
    people = identity(ids)
    scene = jax.vmap(lambda k, m: scenes.sample_scene(k, m, size=size))(
        jax.random.split(scene_key, ids.shape[0]), mask
    )
    moment = jax.random.uniform(time_key, (ids.shape[0], 1, 1))
    scene = dataclasses.replace(
        scene, base=scene.base + scene.slope * moment, phase=scene.phase + scene.rate * moment
    )
    clip = jax.vmap(lambda p, m, s: scenes.render_clip(p, m, s, 1, size))(people, mask, scene)
    return FacePictures(
        pictures=clip.video[:, 0],
        boxes=clip.boxes[:, 0] - 0.5,
        landmarks=clip.landmarks[:, 0] - 0.5,
        visible=clip.visible[:, 0],
        ids=jnp.where(mask, ids, -1),
    )


def draw_portraits(key: PRNGKeyArray, ids: Int[Array, " N"], size: tuple[int, int]) -> FacePictures:
    """Render the reference photo of each person; M = 1.

    Args:
      key: key of the poses.
      ids: ids of the people.
      size: (height, width) in pixels.
    """
    people, keys = identity(ids), jax.random.split(key, ids.shape[0])
    boxes, landmarks = jax.vmap(lambda p, k: renderer.portrait_truth(p, k, size))(people, keys)
    return FacePictures(
        pictures=jax.vmap(lambda p, k: renderer.render_portrait(p, k, size))(people, keys),
        boxes=boxes[:, None] - 0.5,
        landmarks=landmarks[:, None] - 0.5,
        visible=jnp.ones((ids.shape[0], 1)),
        ids=ids[:, None],
    )


def join(a: FacePictures, b: FacePictures) -> FacePictures:
    """Concatenate pictures, padded to the same number of faces."""
    slots = max(a.ids.shape[1], b.ids.shape[1])

    def padded(leaf: Array, value: float) -> Array:
        return jnp.pad(
            leaf,
            [(0, 0), (0, slots - leaf.shape[1])] + [(0, 0)] * (leaf.ndim - 2),
            constant_values=value,
        )

    return FacePictures(
        pictures=jnp.concatenate([a.pictures, b.pictures]),
        boxes=jnp.concatenate([padded(a.boxes, 0), padded(b.boxes, 0)]),
        landmarks=jnp.concatenate([padded(a.landmarks, 0), padded(b.landmarks, 0)]),
        visible=jnp.concatenate([padded(a.visible, 0), padded(b.visible, 0)]),
        ids=jnp.concatenate([padded(a.ids, -1), padded(b.ids, -1)]),
    )


def _blur(pictures: Float[Array, "N H W 3"], sigma: Float[Array, " N"]) -> Float[Array, "N H W 3"]:
    """Blur every picture with a 7-tap Gaussian of its own width in pixels."""
    reach = 3
    weights = jnp.exp(
        -0.5 * (jnp.arange(-reach, reach + 1) / jnp.maximum(sigma[:, None], 0.05)) ** 2
    )
    weights = (weights / jnp.sum(weights, 1, keepdims=True))[:, :, None, None, None]
    for axis in (1, 2):
        size = pictures.shape[axis]
        padded = jnp.pad(
            pictures, [(reach, reach) if k == axis else (0, 0) for k in range(4)], mode="edge"
        )
        shifted = [
            jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(2 * reach + 1)
        ]
        pictures = sum(weights[:, k] * shifted[k] for k in range(2 * reach + 1))
    return pictures


def degrade(
    key: PRNGKeyArray, pictures: Float[Array, "N H W 3"], blur: float
) -> Float[Array, "N H W 3"]:
    """Change blur, noise at two scales, brightness, contrast and tint by random strengths.

    A quarter of the pictures stays clean.

    Args:
      key: key of the strengths and the noise.
      pictures: pictures in [-1, 1].
      blur: largest width of the Gaussian in pixels.
    """
    keys = jax.random.split(key, 8)
    count, height, width = pictures.shape[:3]
    strength = jax.random.uniform(keys[0], (count,)) * (
        jax.random.uniform(keys[1], (count,)) > 0.25
    )
    s = strength[:, None, None, None]
    spoiled = _blur(pictures, blur * strength * jax.random.uniform(keys[2], (count,)))
    coarse = jax.random.normal(keys[3], (count, height // 4, width // 4, 3))
    coarse = jax.image.resize(coarse, pictures.shape, "linear")
    amounts = jax.random.uniform(keys[4], (2, count, 1, 1, 1))
    spoiled = spoiled + s * (
        0.25 * amounts[0] * coarse + 0.15 * amounts[1] * jax.random.normal(keys[5], pictures.shape)
    )
    gain = 1.0 + s * jax.random.uniform(keys[6], (count, 1, 1, 3), minval=-0.15, maxval=0.15)
    lift = s * jax.random.uniform(keys[7], (count, 1, 1, 1), minval=-0.2, maxval=0.2)
    return jnp.clip(spoiled * gain + lift, -1.0, 1.0)
