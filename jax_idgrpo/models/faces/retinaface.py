"""RetinaFace on ResNet-50: a detector of faces with five landmarks. Computed in float32.

    trunk     pre-activation ResNet-50; maps of stride 8 and 16 come from inside the first unit of
              stages 3 and 4, that of stride 32 from the end
    pyramid   1x1 to one width, coarse maps doubled, cropped and added to the finer ones
    context   three receptive fields of 3x3 convolutions per map, concatenated
    heads     per cell two anchors: background or face, four numbers of a box, ten of the landmarks

Modules have the names of the published PyTorch file, so that the conversion table only renames
leaves. Every batch norm uses running statistics: the network is never trained here. Coordinates are
pixels, with integers at the pixel centres.

Sources: RetinaFace (arXiv 1905.00641); PyPI retina-face 0.0.19, `model/retinaface_pth_model.py`,
`RetinaFace.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_idgrpo.models.faces.bundled_detector import Detections, suppress

EPSILON = 1.9999999494757503e-05
STRIDES = (32, 16, 8)
ANCHORS = (
    ((-248.0, -248.0, 263.0, 263.0), (-120.0, -120.0, 135.0, 135.0)),
    ((-56.0, -56.0, 71.0, 71.0), (-24.0, -24.0, 39.0, 39.0)),
    ((-8.0, -8.0, 23.0, 23.0), (0.0, 0.0, 15.0, 15.0)),
)
Maps = tuple[Float[Array, "B _ _ 4"], Float[Array, "B _ _ 8"], Float[Array, "B _ _ 20"]]


@dataclasses.dataclass(frozen=True)
class RetinaFaceConfig:
    """Sizes of the network, and its detection settings.

    Attributes:
      units: of each stage.
      width: channels of the stem; all others are multiples.
      short_side: to which the short side of a picture is resized, pixels.
      long_side: upper bound of the resized long side, pixels; it overrides `short_side`.
      candidates: best anchors of a picture that enter the suppression of overlaps.
      overlap: intersection over union from which the worse face is suppressed.
    """

    units: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    short_side: int = 1024
    long_side: int = 1980
    candidates: int = 256
    overlap: float = 0.4


def _norm(width: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(width, epsilon=EPSILON, use_running_average=True, rngs=rngs)


def _conv(
    inputs: int, width: int, size: int, rngs: nnx.Rngs, stride: int = 1, bias: bool = True
) -> nnx.Conv:
    pad = (size // 2, size // 2)
    return nnx.Conv(
        inputs,
        width,
        (size, size),
        (stride, stride),
        padding=(pad, pad),
        use_bias=bias,
        precision="highest",
        rngs=rngs,
    )


class Unit(nnx.Module):
    """Pre-activation bottleneck; returns its output and the activation before the 3x3 kernel."""

    def __init__(self, inputs: int, middle: int, stride: int, first: bool, rngs: nnx.Rngs):
        self.bn1 = _norm(inputs, rngs)
        self.conv1 = _conv(inputs, middle, 1, rngs, bias=False)
        self.bn2 = _norm(middle, rngs)
        self.conv2 = _conv(middle, middle, 3, rngs, stride, bias=False)
        self.bn3 = _norm(middle, rngs)
        self.conv3 = _conv(middle, 4 * middle, 1, rngs, bias=False)
        self.sc = _conv(inputs, 4 * middle, 1, rngs, stride, bias=False) if first else None

    def __call__(
        self, x: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B h w out"], Float[Array, "B H W middle"]]:
        entered = jax.nn.relu(self.bn1(x))
        inner = jax.nn.relu(self.bn2(self.conv1(entered)))
        out = self.conv3(jax.nn.relu(self.bn3(self.conv2(inner))))
        return out + (x if self.sc is None else self.sc(entered)), inner


class Stage(nnx.Module):
    """Units unit1, unit2, ...; returns their output and the inner activation of the first."""

    def __init__(self, inputs: int, middle: int, units: int, stride: int, rngs: nnx.Rngs):
        self.units = units
        for k in range(units):
            setattr(
                self,
                f"unit{k + 1}",
                Unit(4 * middle if k else inputs, middle, 1 if k else stride, k == 0, rngs),
            )

    def __call__(
        self, x: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B h w out"], Float[Array, "B H W middle"]]:
        x, inner = self.unit1(x)
        for k in range(1, self.units):
            x, _ = getattr(self, f"unit{k + 1}")(x)
        return x, inner


class Context(nnx.Module):
    """Concatenated outputs of one, two and three 3x3 convolutions."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        half = width // 2
        for name, inputs, outputs in (
            ("conv1", width, width),
            ("context_conv1", width, half),
            ("context_conv2", half, half),
            ("context_conv3_1", half, half),
            ("context_conv3_2", half, half),
        ):
            setattr(self, name, _conv(inputs, outputs, 3, rngs))
            setattr(self, f"{name}_bn", _norm(outputs, rngs))

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w out"]:
        one = self.conv1_bn(self.conv1(x))
        shared = jax.nn.relu(self.context_conv1_bn(self.context_conv1(x)))
        two = self.context_conv2_bn(self.context_conv2(shared))
        three = jax.nn.relu(self.context_conv3_1_bn(self.context_conv3_1(shared)))
        three = self.context_conv3_2_bn(self.context_conv3_2(three))
        return jax.nn.relu(jnp.concatenate([one, two, three], -1))


class Head(nnx.Module):
    """Map features to probabilities (background, face), boxes and landmarks of both anchors."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        self.cls_score = _conv(inputs, 4, 1, rngs)
        self.bbox_pred = _conv(inputs, 8, 1, rngs)
        self.landmark_pred = _conv(inputs, 20, 1, rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Maps:
        logits = self.cls_score(x)
        shares = jax.nn.softmax(logits.reshape(*logits.shape[:-1], 2, 2), -2)
        return shares.reshape(logits.shape), self.bbox_pred(x), self.landmark_pred(x)


def _doubled(x: Float[Array, "B h w C"], height: int, width: int) -> Float[Array, "B H W C"]:
    """Double height and width by repetition, then crop the centre of the given size."""
    x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]


class RetinaFace(nnx.Module):
    """Map pictures (RGB, 0 to 255, of any size) to maps of every stride, coarsest first."""

    def __init__(self, config: RetinaFaceConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, pyramid = config.width, 4 * config.width
        self.bn_data = _norm(3, rngs)
        self.conv0 = _conv(3, width, 7, rngs, 2, bias=False)
        self.bn0 = _norm(width, rngs)
        inputs = width
        for stage, units in enumerate(config.units):
            middle = width * 2**stage
            setattr(
                self, f"stage{stage + 1}", Stage(inputs, middle, units, 2 if stage else 1, rngs)
            )
            inputs = 4 * middle
        self.bn1 = _norm(inputs, rngs)
        for name, channels, size in (
            ("ssh_c3_lateral", inputs, 1),
            ("ssh_c2_lateral", 8 * width, 1),
            ("ssh_m1_red_conv", 4 * width, 1),
            ("ssh_c2_aggr", pyramid, 3),
            ("ssh_c1_aggr", pyramid, 3),
        ):
            setattr(self, name, _conv(channels, pyramid, size, rngs))
            setattr(self, f"{name}_bn", _norm(pyramid, rngs))
        for level, stride in zip((3, 2, 1), STRIDES, strict=True):
            setattr(self, f"ssh_m{level}_det", Context(pyramid, rngs))
            setattr(self, f"face_rpn_stride{stride}", Head(2 * pyramid, rngs))

    def _lateral(self, name: str, x: Float[Array, "B h w C"]) -> Float[Array, "B h w out"]:
        return jax.nn.relu(getattr(self, f"{name}_bn")(getattr(self, name)(x)))

    def __call__(self, pictures: Float[Array, "B H W 3"]) -> tuple[Maps, Maps, Maps]:
        x = jax.nn.relu(self.bn0(self.conv0(self.bn_data(pictures))))
        # x is not negative, so the padding of max_pool has no effect.
        x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        x, _ = self.stage1(x)
        x, _ = self.stage2(x)
        x, fine = self.stage3(x)
        x, middle = self.stage4(x)
        c3 = self._lateral("ssh_c3_lateral", jax.nn.relu(self.bn1(x)))
        c2 = self._lateral("ssh_c2_lateral", middle)
        c1 = self._lateral("ssh_m1_red_conv", fine)
        c2 = self._lateral("ssh_c2_aggr", c2 + _doubled(c3, *c2.shape[1:3]))
        c1 = self._lateral("ssh_c1_aggr", c1 + _doubled(c2, *c1.shape[1:3]))
        return (
            self.face_rpn_stride32(self.ssh_m3_det(c3)),
            self.face_rpn_stride16(self.ssh_m2_det(c2)),
            self.face_rpn_stride8(self.ssh_m1_det(c1)),
        )

    def find(self, pictures: Float[Array, "B H W 3"], faces: int, threshold: float) -> Detections:
        """Find the best `faces` faces with a score of at least `threshold`.

        Pictures are resized as by the published detector: bilinearly, without antialiasing, by the
        scale itself and not by the ratio of the rounded sizes. They are not rounded to integers.

        Args:
          pictures: in [-1, 1].
          faces: number of faces to return.
          threshold: in [0, 1].
        """
        height, width = pictures.shape[1:3]
        scale = resize_scale(height, width, self.config)
        size = round(height * scale), round(width * scale)
        resized_faces = decode(
            self(resized((pictures + 1.0) * 127.5, size, scale)),
            size,
            faces,
            threshold,
            self.config,
        )
        return resized_faces._replace(
            boxes=resized_faces.boxes / scale, landmarks=resized_faces.landmarks / scale
        )


def resized(
    pictures: Float[Array, "B H W 3"], size: tuple[int, int], scale: float
) -> Float[Array, "B h w 3"]:
    """Scale pictures and crop them to `size`; their border is repeated outside, as in OpenCV.

    Args:
      pictures: of any range.
      size: height and width of the result, pixels.
      scale: of both axes.
    """
    pictures = jnp.pad(pictures, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    return jax.image.scale_and_translate(
        pictures,
        (pictures.shape[0], *size, 3),
        (1, 2),
        jnp.full(2, scale),
        jnp.zeros(2),
        "linear",
        antialias=False,
        precision="highest",
    )


def resize_scale(height: int, width: int, config: RetinaFaceConfig) -> float:
    """Return the scale of a picture before detection.

    Args:
      height: of the picture, pixels.
      width: of the picture, pixels.
      config: of the network.
    """
    scale = config.short_side / min(height, width)
    return (
        config.long_side / max(height, width)
        if round(scale * max(height, width)) > config.long_side
        else scale
    )


def _candidates(maps: Maps, stride: int, anchors: tuple[tuple[float, ...], ...]):
    """Decode every anchor of one map.

    Args:
      maps: of one stride.
      stride: pixels per cell.
      anchors: boxes x0 y0 x1 y1 of a cell at the origin, pixels.

    Returns:
      Scores [B,anchors], boxes [B,anchors,4], landmarks [B,anchors,5,2].
    """
    shares, sides, points = maps
    batch, height, width = shares.shape[:3]
    x, y = jnp.meshgrid(jnp.arange(width) * float(stride), jnp.arange(height) * float(stride))
    corners = (jnp.stack([x, y, x, y], -1)[:, :, None] + jnp.array(anchors)).reshape(-1, 4)
    size = corners[:, 2:] - corners[:, :2] + 1.0
    centre = corners[:, :2] + 0.5 * (size - 1.0)
    sides, points = sides.reshape(batch, -1, 4), points.reshape(batch, -1, 5, 2)
    middle, half = sides[..., :2] * size + centre, 0.5 * (jnp.exp(sides[..., 2:]) * size - 1.0)
    landmarks = points * size[:, None] + centre[:, None]
    return (
        shares[..., 2:].reshape(batch, -1),
        jnp.concatenate([middle - half, middle + half], -1),
        landmarks,
    )


def decode(
    maps: tuple[Maps, Maps, Maps],
    size: tuple[int, int],
    faces: int,
    threshold: float,
    config: RetinaFaceConfig,
) -> Detections:
    """Decode the best `faces` faces of each picture; overlaps are suppressed across maps.

    Boxes are clipped at the border, landmarks are not. Areas include the border pixels.

    Args:
      maps: of the network, coarsest first.
      size: height and width of the pictures, pixels.
      faces: number of faces to return; missing ones have mask False.
      threshold: smallest score, in [0, 1].
      config: of the network.
    """
    levels = [
        _candidates(level, stride, anchors)
        for level, stride, anchors in zip(maps, STRIDES, ANCHORS, strict=True)
    ]
    scores, boxes, landmarks = (jnp.concatenate(parts, 1) for parts in zip(*levels, strict=True))
    count = min(config.candidates, scores.shape[1])
    best, number = jax.lax.top_k(scores, count)
    limit = jnp.array([size[1], size[0], size[1], size[0]], jnp.float32) - 1.0

    def picture(best, number, boxes, landmarks):
        boxes, landmarks = jnp.clip(boxes[number], 0.0, limit), landmarks[number]
        keep = suppress(boxes + jnp.array([0.0, 0.0, 1.0, 1.0]), best >= threshold, config.overlap)
        order = jnp.argsort(~keep, stable=True)[:faces]
        return Detections(boxes[order], landmarks[order], best[order], keep[order])

    detections = jax.vmap(picture)(best, number, boxes, landmarks)
    missing = max(faces - count, 0)
    return jax.tree.map(
        lambda leaf: jnp.pad(leaf, [(0, 0), (0, missing)] + [(0, 0)] * (leaf.ndim - 2)), detections
    )
