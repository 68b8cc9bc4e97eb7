"""Detect faces that are pasted copies of the reference photo.

The photo is registered onto the face, and the residual displacement of its parts is measured.

The photo's face is a small crop P in which the landmarks coincide with a template. The frame is
sampled on the same grid g through a similarity that starts from its landmarks, F(g) = frame(a g +
t). Gauss-Newton steps refine a, t on

    e = F - fit,   fit = b0 + b1 P + b2 (P - blur P) per colour channel
    d, s = argmin |e - grad(fit) . (d g + s)|^2,   a -= a d,   t -= a s

inside an ellipse, with points as complex numbers. b0 and b1 model the light, and b2 models the
change of sharpness by scaling and compression. The residual is then evaluated in small windows,
each with its own displacement (Lucas-Kanade).

In a genuine video the head turns, speaks and blinks, so that eyes, nose and mouth are displaced
from the photo by one percent of the crop or more. In a copy they are displaced by a few tenths of a
percent. Correlation separates the two less well, because a codec lowers it more than an expression
does.

The registration carries no gradient; the final measurement does.

Sources: B. Lucas and T. Kanade, IJCAI 1981; S. Baker and I. Matthews, IJCV 2004; the measure is
ours.
Two calibrations set what counts as a copy. A drawn face has about 20 pixels and hard edges. A face
in a video has 50 to 200: a crop's pixel is the mean over many samples, and only the middle of the
crop is compared, because the edge of a pasted face shows what was there before. On photographs and
clips of real people, copies are displaced by up to 1.1 percent, other photos of the person by at
least 2 percent (`benchmarks/photographs.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_idgrpo.rewards.faces import ARCFACE_TEMPLATE, multiply, similarity, warp

SIDE = 28  # S, side of a crop in pixels
FAR = 0.05  # maximum displacement; beyond it the faces differ in pose and the value is arbitrary
ALIKE = 0.8  # minimum share of the face's variance that a copy explains
_STEPS = 8
_PHOTO_SAMPLES = 8  # samples of a photo per pixel of the crop and axis
# Widths of Gaussians in pixels: of the blur in the fit, and of the windows.
_SHARP, _WINDOW = (1.0, 2.0)
# Centre and half side of the crop in ARCFACE_TEMPLATE's coordinates: hairline to chin.
_MIDDLE, _HALF = ((56.0, 55.0), 50.0)
# Half width of the ellipse, whose height is the crop's, and the share over which its edge fades.
_WIDTH, _EDGE = (0.72, 0.1)

# Side of a photo's face in pixels; the finer details of a larger face do not change its crop.
PHOTO_SIDE = SIDE * _PHOTO_SAMPLES // 2
PHOTO_TEMPLATE = ((np.asarray(ARCFACE_TEMPLATE) - _MIDDLE) / _HALF + 1) * PHOTO_SIDE / 2


def _grid(samples: int) -> Float[np.ndarray, "S S n 2"]:
    """Return x, y of the samples of every pixel of the crop, in [-1, 1]."""
    centres, parts = ((np.arange(count) + 0.5) * 2 / count - 1 for count in (SIDE, samples))
    x, y = np.meshgrid(centres, centres)
    dx, dy = np.meshgrid(parts / SIDE, parts / SIDE)
    return np.stack([x[..., None] + dx.ravel(), y[..., None] + dy.ravel()], -1).astype(np.float32)


def _gaussian(width: float) -> Float[np.ndarray, "S S"]:
    """Return the matrix that blurs along an axis; weights are normalised at the edge."""
    distance = np.subtract.outer(np.arange(SIDE), np.arange(SIDE))
    weights = np.exp(-0.5 * (distance / width) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


_POINTS = _grid(1)[:, :, 0]
_RADIUS = np.hypot(_POINTS[..., 0] / _WIDTH, _POINTS[..., 1])


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What counts as a copy.

    Attributes:
      copy: displacement up to which a face is a copy, as a share of the crop's side.
      other: displacement from which on it is none.
      ellipse: radius of the compared ellipse, as a share of the largest.
      samples: samples of a frame per pixel of the crop and axis.
    """

    copy: float
    other: float
    ellipse: float
    samples: int

    @property
    def weights(self) -> Float[np.ndarray, "S S"]:
        """Weights of the crop's pixels, with sum 1; the ellipse fades at its edge."""
        weights = np.clip((1 - _RADIUS / self.ellipse) / _EDGE, 0, 1)
        return (weights / weights.sum()).astype(np.float32)


DRAWN = Calibration(copy=0.004, other=0.005, ellipse=1.0, samples=1)
PHOTOGRAPHS = Calibration(copy=0.008, other=0.014, ellipse=0.75, samples=4)
_WHOLE = DRAWN.weights


def _blurred(values: Float[Array, "S S *c"], width: float) -> Float[Array, "S S *c"]:
    matrix = jnp.asarray(_gaussian(width))
    return jnp.einsum("ij,kl,jl...->ik...", matrix, matrix, values, precision="highest")


def _weighted(
    values: Float[Array, "S S *c"], weights: Float[np.ndarray, "S S"]
) -> Float[Array, "*c"]:
    """Average over the ellipse."""
    return jnp.einsum("ij,ij...->...", weights, values, precision="highest")


def start(landmarks: Float[Array, "*n 5 2"]) -> tuple[Float[Array, "*n 2"], Float[Array, "*n 2"]]:
    """Compute the similarity a g + t, from crop to picture, that maps template to landmarks."""
    template = (np.asarray(ARCFACE_TEMPLATE, np.float32) - _MIDDLE) / _HALF
    a, t = similarity(landmarks, jnp.asarray(template, jnp.float32))
    inverse = a * jnp.array([1.0, -1.0]) / jnp.maximum(jnp.sum(a * a, -1, keepdims=True), 1e-6)
    return inverse, -multiply(inverse, t)


def sampled(
    picture: Float[Array, "H W 3"], a: Float[Array, "2"], t: Float[Array, "2"], samples: int
) -> Float[Array, "S S 3"]:
    """Sample the crop of a picture under a g + t.

    Args:
      picture: values in [-1, 1].
      a: real and imaginary part of the scaled rotation, in pixels.
      t: translation, in pixels.
      samples: samples per pixel of the crop and axis.
    """
    return jnp.mean(warp(picture, multiply(a, jnp.asarray(_grid(samples))) + t), axis=2)


def photo_crops(
    photos: Float[Array, "N h w 3"], landmarks: Float[Array, "N 5 2"]
) -> Float[Array, "N S S 3"]:
    """Crop the faces of photos, for `apart`."""
    return jax.vmap(lambda photo, a, t: sampled(photo, a, t, _PHOTO_SAMPLES))(
        photos, *start(landmarks)
    )


def _shapes(
    photo: Float[Array, "S S 3"], weights: Float[np.ndarray, "S S"]
) -> Float[Array, "2 S S 3"]:
    """Compute the basis of the fit: the photo's face and its details.

    Both have mean 0 and norm 1 and are orthogonal over the ellipse.
    """
    plain = photo - _weighted(photo, weights)
    plain = plain * jax.lax.rsqrt(_weighted(plain * plain, weights) + 1e-6)
    sharp = photo - _blurred(photo, _SHARP)
    sharp = sharp - _weighted(sharp, weights)
    sharp = sharp - plain * _weighted(plain * sharp, weights)
    return jnp.stack([plain, sharp * jax.lax.rsqrt(_weighted(sharp * sharp, weights) + 1e-6)])


def _fitted(
    crop: Float[Array, "S S 3"], shapes: Float[Array, "2 S S 3"], weights: Float[np.ndarray, "S S"]
) -> tuple[Float[Array, "S S 3"], Float[Array, "S S 3"]]:
    """Return the fit without its mean, and the residual of the crop."""
    crop = crop - _weighted(crop, weights)
    fit = sum(shape * _weighted(shape * crop, weights) for shape in shapes)
    return fit, crop - fit


def _register(
    frame: Float[Array, "H W 3"],
    shapes: Float[Array, "2 S S 3"],
    a: Float[Array, "2"],
    t: Float[Array, "2"],
    calibration: Calibration,
) -> tuple[Float[Array, "2"], Float[Array, "2"]]:
    """Refine a, t."""
    weights = calibration.weights
    x, y = _POINTS[..., None, 0], _POINTS[..., None, 1]

    def step(place: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        a, t = place
        fit, left = _fitted(sampled(frame, a, t, calibration.samples), shapes, weights)
        down, right, _ = jnp.gradient(fit * (SIDE / 2))
        moves = jnp.stack([right * x + down * y, down * x - right * y, right, down])
        power = jnp.einsum("ij,mijc,nijc->mn", weights, moves, moves, precision="highest")
        power = power + (1e-4 * jnp.trace(power) + 1e-6) * jnp.eye(4)
        change = jnp.linalg.solve(
            power, jnp.einsum("ij,mijc,ijc->m", weights, moves, left, precision="highest")
        )
        change = jnp.clip(change, -0.15, 0.15)
        return (a - multiply(a, change[:2]), t - multiply(a, change[2:])), None

    return jax.lax.scan(step, (a, t), length=_STEPS)[0]


def apart(
    frame: Float[Array, "H W 3"],
    landmarks: Float[Array, "5 2"],
    photo: Float[Array, "S S 3"],
    calibration: Calibration = DRAWN,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Measure the displacement of a face in a frame from a photo's crop.

    Args:
      frame: values in [-1, 1].
      landmarks: x, y of the face's landmarks in pixels.
      photo: crop of the photo, from `photo_crops`.
      calibration: of the people.

    Returns:
      The root mean square displacement as a share of the crop's side, and the share of the face's
        variance that the photo explains, at most 1.
    """
    weights = calibration.weights
    shapes = _shapes(photo, weights)
    still, basis, a, t = jax.lax.stop_gradient((frame, shapes, *start(landmarks)))
    place = _register(still, basis, a, t, calibration)
    fit, left = _fitted(sampled(frame, *place, calibration.samples), shapes, weights)
    down, right, _ = jnp.gradient(fit)
    products = jnp.stack([right * right, right * down, down * down, right * left, down * left])
    xx, xy, yy, xe, ye = jnp.moveaxis(
        _blurred(jnp.moveaxis(jnp.sum(products, -1) * weights, 0, -1), _WINDOW), -1, 0
    )
    ridge = 0.05 * jnp.mean(xx + yy) + 1e-9
    xx, yy = xx + ridge, yy + ridge
    determinant = xx * yy - xy * xy
    u, v = (yy * xe - xy * ye) / determinant, (xx * ye - xy * xe) / determinant
    moved = jnp.sqrt(_weighted(u * u + v * v, weights) + 1e-12) / SIDE
    power, lost = (
        jnp.sum(_weighted((fit + left) ** 2, weights)),
        jnp.sum(_weighted(left**2, weights)),
    )
    return moved, 1 - (lost + 1e-6) / (power + 1e-6)


def copies(
    videos: Float[Array, "B T H W 3"],
    landmarks: Float[Array, "B T M 5 2"],
    photos: Float[Array, "B M S S 3"],
    calibration: Calibration = DRAWN,
) -> tuple[Float[Array, "B T M"], Float[Array, "B T M"]]:
    """Compute the photo-copy score and the displacement of every person's face.

    Args:
      videos: values in [-1, 1].
      landmarks: x, y in pixels of the face of every person.
      photos: crops of the persons' photos.
      calibration: of the people.

    Returns:
      The score, from 0 (no copy) to 1 (copy), and the displacement as a share of the crop's side,
        at most `FAR`.
    """
    of_people = jax.vmap(functools.partial(apart, calibration=calibration), (None, 0, 0))
    of_frames = jax.vmap(of_people, (0, 0, None))
    moved, alike = jax.vmap(of_frames)(videos, jax.lax.stop_gradient(landmarks), photos)
    low, high = calibration.copy, calibration.other
    return jnp.where(
        alike > ALIKE, jnp.clip((high - moved) / (high - low), 0, 1), 0.0
    ), jnp.minimum(moved, FAR)


def _texture(crop: Float[Array, "S S 3"]) -> Float[Array, ""]:
    """Compute the share of a crop's variance over the ellipse that is detail.

    A blur by `_SHARP` pixels removes the detail.
    """
    plain, fine = crop - _weighted(crop, _WHOLE), crop - _blurred(crop, _SHARP)
    return (jnp.sum(_weighted(fine * fine, _WHOLE)) + 1e-6) / (
        jnp.sum(_weighted(plain * plain, _WHOLE)) + 1e-4
    )


def detail(
    videos: Float[Array, "B T H W 3"],
    landmarks: Float[Array, "B T M 5 2"],
    photos: Float[Array, "B M S S 3"],
    samples: int = 1,
) -> Float[Array, "B T M"]:
    """Compute the sharpness of every person's face relative to their photo.

    The sharpness is the amplitude that a blur by one pixel of the crop removes, relative to the
    contrast.

    Args:
      videos: values in [-1, 1].
      landmarks: x, y in pixels of the face of every person.
      photos: crops of the persons' photos.
      samples: samples of a frame per pixel of the crop and axis.

    Returns:
      0 for no detail, 1 for as much as the photo; at most 2.
    """
    of_frame = jax.vmap(
        lambda frame, places: _texture(
            sampled(frame, *start(jax.lax.stop_gradient(places)), samples)
        ),
        (None, 0),
    )
    of_photos = jax.vmap(jax.vmap(_texture))(photos)
    return jnp.minimum(
        jnp.sqrt(jax.vmap(jax.vmap(of_frame))(videos, landmarks) / of_photos[:, None]), 2.0
    )
