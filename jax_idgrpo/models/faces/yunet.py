"""YuNet: a small face detector without anchors, for faces of 10 to 300 pixels. Computed in float32.

    unit      1x1 convolution, depthwise 3x3 convolution
    trunk     stem of stride 2, then units with ReLU; maps of stride 8, 16 and 32
    pyramid   a unit with ReLU per map; coarse maps are doubled and added to the finer ones
    heads     per cell the class, the objectness, four numbers of the box, ten of the landmarks

    score = sqrt(sigmoid(class) sigmoid(objectness))
    centre = (cell + b[:2]) s,  size = exp(b[2:]) s,  landmark = (cell + p) s

Coordinates are pixels, with integers at the pixel centres, as OpenCV uses the published file.

Sources: YuNet (Machine Intelligence Research, 2023); opencv/opencv_zoo
`face_detection_yunet_2023mar.onnx`; opencv `modules/objdetect/src/face_detect.cpp`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_idgrpo.models.faces.bundled_detector import Detections, suppress
from jax_idgrpo.models.layers import depthwise_conv

STRIDES = (8, 16, 32)
HEADS = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}  # numbers per cell
Maps = tuple[dict[str, Float[Array, "B _ _ _"]], ...]


@dataclasses.dataclass(frozen=True)
class YuNetConfig:
    """Sizes of the network, and its detection settings.

    Attributes:
      width: channels of the stem; all others are multiples.
      long_side: larger pictures are shrunk to it, pixels.
      candidates: best cells of a picture that enter the suppression of overlaps.
      overlap: intersection over union from which the worse face is suppressed.
    """

    width: int = 16
    long_side: int = 640
    candidates: int = 256
    overlap: float = 0.3


class Unit(nnx.Module):
    """1x1 convolution, then depthwise 3x3 convolution, both with a bias."""

    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs):
        self.point = nnx.Linear(inputs, width, precision="highest", rngs=rngs)
        init = nnx.initializers.lecun_normal()
        self.depth_kernel = nnx.Param(init(rngs.params(), (3, 3, 1, width), jnp.float32))
        self.depth_bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w out"]:
        return depthwise_conv(self.point(x), self.depth_kernel[...]) + self.depth_bias[...]


def _halve(x: Float[Array, "B h w C"]) -> Float[Array, "B _ _ C"]:
    """Take the maximum of 2x2 pixels.

    On the CPU, XLA's pooling would compute the convolution before it four times.
    """
    x = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])


def _double(x: Float[Array, "B h w C"]) -> Float[Array, "B _ _ C"]:
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


class YuNet(nnx.Module):
    """Map pictures (BGR, 0 to 255, sides multiples of 32) to maps of every stride, finest first."""

    def __init__(self, config: YuNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        one, two, four = config.width, 2 * config.width, 4 * config.width
        self.stem = nnx.Conv(
            3, one, (3, 3), (2, 2), padding=((1, 1), (1, 1)), precision="highest", rngs=rngs
        )
        pairs = [(one, two), (two, four), (four, four), (four, four), (four, four)]
        self.first = Unit(one, one, rngs)
        self.stages = nnx.List([nnx.List([Unit(a, a, rngs), Unit(a, b, rngs)]) for a, b in pairs])
        self.laterals = nnx.List([Unit(four, four, rngs) for _ in STRIDES])
        for name, size in HEADS.items():
            setattr(self, name, nnx.List([Unit(four, size, rngs) for _ in STRIDES]))

    def __call__(self, pictures: Float[Array, "B H W 3"]) -> Maps:
        x = _halve(jax.nn.relu(self.first(jax.nn.relu(self.stem(pictures)))))
        maps = []
        for number, stage in enumerate(self.stages):
            for unit in stage:
                x = jax.nn.relu(unit(x))
            if number >= 2:
                maps.append(x)
            if number in (1, 2, 3):
                x = _halve(x)
        for level in (2, 1, 0):
            x = maps[level] if level == 2 else maps[level] + _double(maps[level + 1])
            maps[level] = jax.nn.relu(self.laterals[level](x))
        return tuple(
            {name: getattr(self, name)[level](x) for name in HEADS} for level, x in enumerate(maps)
        )

    def find(self, pictures: Float[Array, "B H W 3"], faces: int, threshold: float) -> Detections:
        """Find the best `faces` faces with a score of at least `threshold`.

        Pictures longer than `long_side` are shrunk to it, with antialiasing. Black pixels pad the
        sides to multiples of 32.

        Args:
          pictures: in [-1, 1].
          faces: number of faces to return.
          threshold: in [0, 1].
        """
        height, width = pictures.shape[1:3]
        scale = min(1.0, self.config.long_side / max(height, width))
        pixels = (pictures[..., ::-1] + 1.0) * 127.5
        if scale < 1.0:
            size = max(round(height * scale), 1), max(round(width * scale), 1)
            pixels = jax.image.scale_and_translate(
                pixels,
                (pixels.shape[0], *size, 3),
                (1, 2),
                jnp.full(2, scale),
                jnp.zeros(2),
                "linear",
                precision="highest",
            )
        pads = [(0, -side % STRIDES[-1]) for side in pixels.shape[1:3]]
        maps = self(jnp.pad(pixels, ((0, 0), *pads, (0, 0))))
        shrunk = decode(maps, faces, threshold, self.config)
        return shrunk._replace(
            boxes=_enlarged(shrunk.boxes, scale), landmarks=_enlarged(shrunk.landmarks, scale)
        )


def _enlarged(points: Float[Array, "*n"], scale: float) -> Float[Array, "*n"]:
    """Map coordinates of the shrunk picture to the original, which was scaled by `scale`."""
    return points if scale == 1.0 else (points + 0.5) / scale - 0.5


def decode(maps: Maps, faces: int, threshold: float, config: YuNetConfig) -> Detections:
    """Decode the best `faces` faces of each picture; overlaps are suppressed across maps.

    Args:
      maps: of the network, finest first.
      faces: number of faces to return; missing ones have mask False.
      threshold: smallest score, in [0, 1].
      config: of the network.
    """
    levels = []
    for level, stride in zip(maps, STRIDES, strict=True):
        height, width = level["cls"].shape[1:3]
        x, y = jnp.meshgrid(
            jnp.arange(width, dtype=jnp.float32), jnp.arange(height, dtype=jnp.float32)
        )
        cell = jnp.stack([x, y], -1)
        chances = jax.nn.sigmoid(level["cls"]) * jax.nn.sigmoid(level["obj"])
        centre = (cell + level["bbox"][..., :2]) * stride
        half = jnp.exp(level["bbox"][..., 2:]) * (0.5 * stride)
        points = level["kps"].reshape(*level["kps"].shape[:3], 5, 2)
        landmarks = (cell[:, :, None] + points) * stride
        boxes = jnp.concatenate([centre - half, centre + half], -1)
        parts = jnp.sqrt(chances), boxes, landmarks
        sizes = (), (4,), (5, 2)
        levels.append([part.reshape(part.shape[0], -1, *size) for part, size in zip(parts, sizes)])
    scores, boxes, landmarks = (jnp.concatenate(parts, 1) for parts in zip(*levels, strict=True))
    count = min(config.candidates, scores.shape[1])
    best, number = jax.lax.top_k(scores, count)

    def picture(best, number, boxes, landmarks):
        boxes, landmarks = boxes[number], landmarks[number]
        keep = suppress(boxes, best >= threshold, config.overlap)
        order = jnp.argsort(~keep, stable=True)[:faces]
        return Detections(boxes[order], landmarks[order], best[order], keep[order])

    detections = jax.vmap(picture)(best, number, boxes, landmarks)
    missing = max(faces - count, 0)
    return jax.tree.map(
        lambda leaf: jnp.pad(leaf, [(0, 0), (0, missing)] + [(0, 0)] * (leaf.ndim - 2)), detections
    )
