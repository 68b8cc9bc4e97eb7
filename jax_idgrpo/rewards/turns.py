"""Measure how far heads are turned, and how alike faces are when they are.

Anybody can raise the similarity of faces by keeping heads still and frontal. These terms show it.

The turn of a face is the place of the nose between the eyes, along the line through the eyes, in
distances of the eyes: 0 from the front, positive towards the right of the picture. A nose that
stands out by d in front of eyes at a distance e turns as tan(yaw) d / e, so that

    yaw = a arctan(b turn),   a = 1 and b = e / d for an exact detector

The constants of the bundled detector are fitted to rendered heads and stored with it. For other
detectors they are those of an average head, and not calibrated.

    turning              mean over people of (largest - smallest yaw over frames) / 90 degrees,
                         at most 1; 0 for a person who is shown in fewer than two frames
    faces_frontal        share of the matched faces with a yaw below 20 degrees
    faces_half           share from 20 to 45 degrees
    faces_side           share of 45 degrees and more
    similarity_frontal   mean cosine of the matched faces of that bin, and so on

A share is NaN for a video without matched faces, and a similarity for a video without such faces.

Source: the curation by head turn of MoFE (arXiv 2508.09476), whose thresholds are not published;
these are ours.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

BINS = {"frontal": (0.0, 20.0), "half": (20.0, 45.0), "side": (45.0, 90.0)}
"""Name -> smallest and largest yaw in degrees; the largest belongs to the next bin."""


@dataclasses.dataclass(frozen=True)
class YawCalibration:
    """Constants of the yaw.

    Attributes:
      a: factor of the angle.
      b: factor of the turn.
    """

    a: float
    b: float


AVERAGE_HEAD = YawCalibration(a=1.0, b=1.6)
"""Eyes 63 mm apart, and a nose that stands out by 40 mm: an average, not a calibration."""


def head_turn(landmarks: Float[ArrayLike, "*n 5 2"]) -> Float[Array, "*n"]:
    """Compute the place of the nose between the eyes in eye distances, clipped to [-2, 2].

    Args:
      landmarks: x, y of left eye, right eye, nose and both mouth corners in pixels.
    """
    landmarks = jnp.asarray(landmarks, jnp.float32)
    left, right, nose = (landmarks[..., k, :] for k in range(3))
    line, off = right - left, nose - (left + right) / 2
    square = jnp.maximum(jnp.sum(line * line, -1), 1e-6)
    return jnp.clip(jnp.sum(off * line, -1) / square, -2.0, 2.0)


def yaw(turn: Float[ArrayLike, "*n"], calibration: YawCalibration) -> Float[Array, "*n"]:
    """Compute the yaw in degrees.

    Args:
      turn: as `head_turn` computes it.
      calibration: constants of the detector.
    """
    return jnp.degrees(calibration.a * jnp.arctan(calibration.b * jnp.asarray(turn)))


def fit_yaw(turn: Float[np.ndarray, " N"], truth: Float[np.ndarray, " N"]) -> YawCalibration:
    """Fit the constants by least squares over a grid of b.

    Args:
      turn: as `head_turn` computes it.
      truth: yaw in degrees.
    """

    def error(b: float) -> tuple[float, float]:
        angle = np.degrees(np.arctan(b * turn))
        a = float(angle @ truth / max(float(angle @ angle), 1e-12))
        return float(np.mean((a * angle - truth) ** 2)), a

    best = min((float(b) for b in np.linspace(0.2, 8.0, 79)), key=lambda b: error(b)[0])
    return YawCalibration(a=round(error(best)[1], 3), b=round(best, 1))


def turn_terms(
    turn: Float[Array, "B T M"],
    similarity: Float[Array, "B T M"],
    matched: Bool[Array, "B T M"],
    reference_mask: Bool[Array, "B M"],
    calibration: YawCalibration,
) -> dict[str, Float[Array, " B"]]:
    """Compute the terms of the module's docstring.

    Args:
      turn: of the face that is matched to each person.
      similarity: cosine of that face with the photo.
      matched: whether the person has a face in the frame.
      reference_mask: False on padding.
      calibration: constants of the detector.
    """
    shown = matched & reference_mask[:, None]
    angle = yaw(turn, calibration)
    largest = jnp.max(jnp.where(shown, angle, -jnp.inf), 1)
    smallest = jnp.min(jnp.where(shown, angle, jnp.inf), 1)
    span = jnp.where(jnp.sum(shown, 1) > 1, largest - smallest, 0.0)
    people = jnp.maximum(jnp.sum(reference_mask, -1), 1)
    terms = {"turning": jnp.sum(jnp.clip(span / 90.0, 0.0, 1.0), -1) / people}
    faces = jnp.sum(shown, (1, 2))
    for name, (low, high) in BINS.items():
        # Nothing is beyond the last bin.
        inside = shown & (jnp.abs(angle) >= low)
        if name != "side":
            inside &= jnp.abs(angle) < high
        count = jnp.sum(inside, (1, 2))
        total = jnp.sum(jnp.where(inside, similarity, 0.0), (1, 2))
        terms[f"faces_{name}"] = jnp.where(faces > 0, count / jnp.maximum(faces, 1), jnp.nan)
        terms[f"similarity_{name}"] = jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)
    return terms
