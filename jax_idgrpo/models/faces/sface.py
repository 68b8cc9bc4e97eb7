"""SFace: a face embedder on MobileNet v1, E = 128. Computed in float32.

    stem    conv 3x3, batch norm, PReLU
    block   depthwise 3x3 of stride s, batch norm, PReLU, conv 1x1, batch norm, PReLU
    tail    batch norm, flatten, dense, batch norm over the embedding

Every batch norm uses running statistics: the network is never trained here. The published dense
kernel expects channels first when flattening; the conversion reorders it.

Sources: SFace (arXiv 2205.12010), MobileNets (arXiv 1704.04861); opencv/opencv_zoo
`face_recognition_sface_2021dec.onnx`.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_idgrpo.models.faces.arcface import PReLU
from jax_idgrpo.models.layers import depthwise_conv

EPSILON, TAIL_EPSILON = 0.0010000000474974513, 1.9999999494757503e-05


@dataclasses.dataclass(frozen=True)
class SFaceConfig:
    """Sizes of the network.

    Attributes:
      stem: channels of the stem.
      widths: channels of each block.
      halved: numbers of the blocks of stride 2.
      input_size: side of the square crop, pixels, a multiple of 2 ** len(halved).
      embedding_size: E.
    """

    stem: int = 32
    widths: tuple[int, ...] = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    halved: tuple[int, ...] = (1, 3, 5, 11)
    input_size: int = 112
    embedding_size: int = 128

    @property
    def grid(self) -> int:
        """Side of the last feature map, pixels."""
        return self.input_size // 2 ** len(self.halved)


def _norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(width, epsilon=epsilon, use_running_average=True, rngs=rngs)


class Block(nnx.Module):
    """Depthwise 3x3 convolution, then 1x1 convolution."""

    def __init__(self, inputs: int, width: int, stride: int, rngs: nnx.Rngs):
        self.stride = stride
        init = nnx.initializers.lecun_normal()
        self.depth_kernel = nnx.Param(init(rngs.params(), (3, 3, 1, inputs), jnp.float32))
        self.depth_norm = _norm(inputs, EPSILON, rngs)
        self.depth_prelu = PReLU(inputs)
        self.point = nnx.Linear(inputs, width, use_bias=False, precision="highest", rngs=rngs)
        self.point_norm = _norm(width, EPSILON, rngs)
        self.point_prelu = PReLU(width)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        x = depthwise_conv(x, self.depth_kernel[...], self.stride)
        x = self.depth_prelu(self.depth_norm(x))
        return self.point_prelu(self.point_norm(self.point(x)))


class SFace(nnx.Module):
    """Map crops to embeddings of any norm; divide by the norm before taking cosines."""

    def __init__(self, config: SFaceConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.conv = nnx.Conv(
            3,
            config.stem,
            (3, 3),
            padding=((1, 1), (1, 1)),
            use_bias=False,
            precision="highest",
            rngs=rngs,
        )
        self.norm = _norm(config.stem, EPSILON, rngs)
        self.prelu = PReLU(config.stem)
        blocks, inputs = [], config.stem
        for number, width in enumerate(config.widths):
            blocks.append(Block(inputs, width, 2 if number in config.halved else 1, rngs))
            inputs = width
        self.blocks = nnx.List(blocks)
        self.tail_norm = _norm(inputs, TAIL_EPSILON, rngs)
        size = config.embedding_size
        self.dense = nnx.Linear(config.grid**2 * inputs, size, precision="highest", rngs=rngs)
        self.embedding_norm = _norm(size, TAIL_EPSILON, rngs)

    def __call__(self, crops: Float[Array, "B side side 3"]) -> Float[Array, "B E"]:
        """Embed crops, RGB in [-1, 1]; the network's input is (pixel - 127.5) / 128."""
        x = self.prelu(self.norm(self.conv(crops * (127.5 / 128))))
        for block in self.blocks:
            x = block(x)
        x = self.tail_norm(x)
        return self.embedding_norm(self.dense(x.reshape(x.shape[0], -1)))
