"""The bundled face detector, small and without anchors, and the decoding that all detectors share.

Maps of stride 4 contain for every cell the logit of a face centred in it, the distances to the four
sides of its box, and its five landmarks. Peaks are decoded, overlaps suppressed, and the best K
returned, with static shapes. Coordinates are pixels, with integers at the pixel centres.

Source: CenterNet (arXiv 1904.07850).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

STRIDE = 4


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """Sizes of the detector.

    Attributes:
      width: channels at stride 4.
      blocks: residual blocks at stride 4.
      dilations: of the blocks' first convolutions, repeated cyclically.
      scale: pixels per unit of the regressed distances.
    """

    width: int = 48
    blocks: int = 4
    dilations: tuple[int, ...] = (1, 2, 1, 3)
    scale: float = 12.0


class DetectorOutput(NamedTuple):
    """Maps of the detector.

    Attributes:
      logits: of a face centred in the cell.
      sides: distances of left, top, right and bottom side, pixels.
      points: x, y offsets of the landmarks, pixels.
    """

    logits: Float[Array, "B h w"]
    sides: Float[Array, "B h w 4"]
    points: Float[Array, "B h w 5 2"]


class Detections(NamedTuple):
    """The best K faces of each picture, best first.

    Attributes:
      boxes: x0 y0 x1 y1, pixels.
      landmarks: x, y, pixels.
      scores: in [0, 1].
      mask: False where the picture has fewer faces.
    """

    boxes: Float[Array, "B K 4"]
    landmarks: Float[Array, "B K 5 2"]
    scores: Float[Array, "B K"]
    mask: Bool[Array, "B K"]


def _conv(
    inputs: int, width: int, size: int, stride: int, dilation: int, rngs: nnx.Rngs
) -> nnx.Conv:
    pad = dilation * (size // 2)
    return nnx.Conv(
        inputs,
        width,
        (size, size),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        kernel_dilation=(dilation, dilation),
        precision="highest",
        rngs=rngs,
    )


class Block(nnx.Module):
    """x + conv(silu(conv(silu(group norm(x)))))."""

    def __init__(self, width: int, dilation: int, rngs: nnx.Rngs):
        self.norm = nnx.GroupNorm(width, num_groups=8, use_fast_variance=False, rngs=rngs)
        self.conv1 = _conv(width, width, 3, 1, dilation, rngs)
        self.conv2 = _conv(width, width, 3, 1, 1, rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        return x + self.conv2(jax.nn.silu(self.conv1(jax.nn.silu(self.norm(x)))))


class Detector(nnx.Module):
    """Map pictures in [-1, 1], H and W multiples of 4, to maps of stride 4."""

    def __init__(self, config: DetectorConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.stem = _conv(3, config.width // 2, 5, 2, 1, rngs)
        self.down = _conv(config.width // 2, config.width, 3, 2, 1, rngs)
        dilations = [config.dilations[k % len(config.dilations)] for k in range(config.blocks)]
        self.blocks = nnx.List([Block(config.width, dilation, rngs) for dilation in dilations])
        self.norm = nnx.GroupNorm(config.width, num_groups=8, use_fast_variance=False, rngs=rngs)
        self.head = _conv(config.width, 15, 1, 1, 1, rngs)

    def __call__(self, pictures: Float[Array, "B H W 3"]) -> DetectorOutput:
        x = self.down(jax.nn.silu(self.stem(pictures)))
        for block in self.blocks:
            x = block(x)
        out = self.head(jax.nn.silu(self.norm(x)))
        logits, sides, points = out[..., 0] - 4.0, out[..., 1:5], out[..., 5:]
        scale = self.config.scale
        return DetectorOutput(
            logits, scale * jax.nn.softplus(sides), scale * points.reshape(*points.shape[:-1], 5, 2)
        )

    def find(self, pictures: Float[Array, "B H W 3"], faces: int, threshold: float) -> Detections:
        """Find the best `faces` faces with a score of at least `threshold`.

        Args:
          pictures: in [-1, 1].
          faces: number of faces to return.
          threshold: in [0, 1].
        """
        return decode(self(pictures), faces, threshold)


def cell_centres(height: int, width: int) -> Float[Array, "h w 2"]:
    """Return x, y of the cell centres of a map, in pixels."""
    x, y = jnp.meshgrid(jnp.arange(width), jnp.arange(height))
    return jnp.stack([x, y], -1) * float(STRIDE) + (STRIDE - 1) / 2


def intersection_over_union(a: Float[Array, "*m 4"], b: Float[Array, "*n 4"]) -> Float[Array, "*k"]:
    """Compute the IoU of boxes x0 y0 x1 y1, whose leading axes broadcast; 0 for empty boxes."""
    overlap = jnp.maximum(
        jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2]), 0.0
    )
    inside = overlap[..., 0] * overlap[..., 1]
    area_a, area_b = (jnp.prod(jnp.maximum(box[..., 2:] - box[..., :2], 0.0), -1) for box in (a, b))
    return inside / jnp.maximum(area_a + area_b - inside, 1e-6)


def suppress(
    boxes: Float[Array, "boxes 4"], mask: Bool[Array, " boxes"], overlap: float
) -> Bool[Array, " boxes"]:
    """Suppress overlapping boxes greedily: a box survives if no better survivor overlaps it.

    Args:
      boxes: x0 y0 x1 y1, best first.
      mask: candidates.
      overlap: smallest intersection over union that counts as overlap.
    """
    close = intersection_over_union(boxes[:, None], boxes[None]) >= overlap
    number = jnp.arange(boxes.shape[0])

    def visit(k, keep):
        return keep & ~(keep[k] & close[k] & (number > k))

    return jax.lax.fori_loop(0, boxes.shape[0], visit, mask)


def decode(
    output: DetectorOutput, faces: int, threshold: float, overlap: float = 0.4
) -> Detections:
    """Decode the best `faces` faces with a score of at least `threshold` in each picture.

    The candidates are the best 3 * faces peaks of the map.

    Args:
      output: maps of the detector.
      faces: number of faces to return; missing ones have mask False.
      threshold: in [0, 1].
      overlap: intersection over union from which the worse face is suppressed.
    """
    height, width = output.logits.shape[1:]
    scores = jax.nn.sigmoid(output.logits)
    neighbourhood = jax.lax.reduce_window(
        scores, -jnp.inf, jax.lax.max, (1, 3, 3), (1, 1, 1), "SAME"
    )
    peaks = jnp.where(scores >= neighbourhood, scores, 0.0).reshape(scores.shape[0], -1)
    candidates = min(3 * faces, height * width)
    best, cell = jax.lax.top_k(peaks, candidates)

    def picture(best, cell, sides, points):
        centre = cell_centres(height, width).reshape(-1, 2)[cell]
        sides = sides.reshape(-1, 4)[cell]
        boxes = jnp.concatenate([centre - sides[:, :2], centre + sides[:, 2:]], -1)
        landmarks = centre[:, None] + points.reshape(-1, 5, 2)[cell]
        keep = suppress(boxes, best >= threshold, overlap)
        order = jnp.argsort(~keep, stable=True)[:faces]
        return Detections(boxes[order], landmarks[order], best[order], keep[order])

    detections = jax.vmap(picture)(best, cell, output.sides, output.points)
    missing = max(faces - candidates, 0)
    return jax.tree.map(
        lambda leaf: jnp.pad(leaf, [(0, 0), (0, missing)] + [(0, 0)] * (leaf.ndim - 2)), detections
    )
