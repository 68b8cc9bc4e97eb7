"""dlib's face recognition ResNet, E = 128, a judge. Computed in float32.

    stem    conv 7x7 of stride 2, affine, ReLU, max pooling 3x3 of stride 2; no padding
    block   ReLU(affine(conv 3x3(ReLU(affine(conv 3x3 of stride s)))) + shortcut)
    tail    mean over the map, dense; the published network has no bias

The first block of a later stage has stride 2 without padding, and its shortcut averages 2x2 pixels.
If the two summands differ in size or channels, the smaller one is padded with zeros at the end.
Sources: `dlib/dnn/layers.h`, `dlib/dnn/core.h`; `examples/dnn_face_recognition_ex.cpp` of
davisking/dlib.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

MEAN = (122.782, 117.001, 104.298)  # of red, green, blue; subtracted before dividing by 256


@dataclasses.dataclass(frozen=True)
class DlibResNetConfig:
    """Sizes of the network.

    Attributes:
      stem: channels of the stem.
      widths: channels of each stage.
      blocks: residual blocks of each stage.
      halved: whether the first block of the stage halves the map.
      input_size: side of the square crop, pixels.
      embedding_size: E.
    """

    stem: int = 32
    widths: tuple[int, ...] = (32, 64, 128, 256, 256)
    blocks: tuple[int, ...] = (3, 4, 3, 3, 1)
    halved: tuple[bool, ...] = (False, True, True, True, True)
    input_size: int = 150
    embedding_size: int = 128


class ConvAffine(nnx.Module):
    """Convolution with bias, then scale and shift of each channel."""

    def __init__(self, inputs: int, width: int, size: int, stride: int, rngs: nnx.Rngs):
        pad = size // 2 if stride == 1 else 0
        self.conv = nnx.Conv(
            inputs,
            width,
            (size, size),
            (stride, stride),
            padding=((pad, pad), (pad, pad)),
            precision="highest",
            rngs=rngs,
        )
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.shift = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        return self.conv(x) * self.scale[...] + self.shift[...]


def _grown(x: Float[Array, "B h w C"], shape: tuple[int, ...]) -> Float[Array, "B H W out"]:
    """Pad every axis with zeros at its end, up to `shape`."""
    return jnp.pad(x, [(0, target - size) for size, target in zip(x.shape, shape, strict=True)])


class Block(nnx.Module):
    """Residual block of two convolutions."""

    def __init__(self, inputs: int, width: int, stride: int, rngs: nnx.Rngs):
        self.stride = stride
        self.conv1 = ConvAffine(inputs, width, 3, stride, rngs)
        self.conv2 = ConvAffine(width, width, 3, 1, rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        inner = self.conv2(jax.nn.relu(self.conv1(x)))
        skip = x if self.stride == 1 else nnx.avg_pool(x, (2, 2), (2, 2))
        shape = tuple(max(sides) for sides in zip(inner.shape, skip.shape, strict=True))
        return jax.nn.relu(_grown(inner, shape) + _grown(skip, shape))


class DlibResNet(nnx.Module):
    """Map crops to embeddings of any norm; divide by the norm before taking cosines."""

    def __init__(self, config: DlibResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.stem = ConvAffine(3, config.stem, 7, 2, rngs)
        blocks, inputs = [], config.stem
        for width, count, halved in zip(config.widths, config.blocks, config.halved, strict=True):
            for number in range(count):
                blocks.append(Block(inputs, width, 2 if halved and number == 0 else 1, rngs))
                inputs = max(inputs, width)
        self.blocks = nnx.List(blocks)
        self.dense = nnx.Linear(inputs, config.embedding_size, precision="highest", rngs=rngs)

    def __call__(self, crops: Float[Array, "B side side 3"]) -> Float[Array, "B E"]:
        """Embed crops, RGB in [-1, 1]."""
        x = ((crops + 1.0) * 127.5 - jnp.asarray(MEAN)) / 256.0
        x = nnx.max_pool(jax.nn.relu(self.stem(x)), (3, 3), (2, 2))
        for block in self.blocks:
            x = block(x)
        return self.dense(jnp.mean(x, (1, 2)))
