"""Facenet: the face embedder Inception-ResNet-v1, E = 128 or 512. Computed in float32.

Modules have the names of deepface's PyTorch files, so that the conversion table only renames
leaves. Every batch norm uses running statistics and the scale of the file (all ones): the network
is never trained here.

Sources: FaceNet (arXiv 1503.03832), Inception-v4 (arXiv 1602.07261); deepface 0.0.103
`models/facial_recognition/pytorch/Facenet.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

EPSILON = 1e-3
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class FacenetConfig:
    """Sizes of the network.

    Attributes:
      embedding_size: E, 128 or 512.
      blocks: residual blocks of the three stages.
      divide: divisor of all channels, 1 as published.
      input_size: side of the square crop, pixels.
      channel_order: of the network's input, "rgb" or "bgr".
      input_range: of the network's input.
    """

    embedding_size: int = 512
    blocks: tuple[int, int, int] = (5, 10, 6)
    divide: int = 1
    input_size: int = 160
    channel_order: str = "bgr"
    input_range: tuple[float, float] = (0.0, 1.0)


class ConvBn(nnx.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        inputs: int,
        width: int,
        size: Size,
        rngs: nnx.Rngs,
        stride: int = 1,
        pad: Size = (0, 0),
    ):
        padding = tuple((side, side) for side in pad)
        self.conv = nnx.Conv(
            inputs,
            width,
            size,
            (stride, stride),
            padding=padding,
            use_bias=False,
            precision="highest",
            rngs=rngs,
        )
        self.bn = nnx.BatchNorm(width, epsilon=EPSILON, use_running_average=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        return jax.nn.relu(self.bn(self.conv(x)))


class Mixed(nnx.Module):
    """Parallel branches, concatenated.

    A branch is a chain of (channels, kernel, stride, padding). A chain of one layer is the layer
    itself and not a list, as in the published file.
    """

    def __init__(
        self,
        inputs: int,
        chains: list[list[tuple[int, Size, int, Size]]],
        pool: bool,
        rngs: nnx.Rngs,
    ):
        self.branches, self.pool = len(chains), pool
        for number, chain in enumerate(chains):
            widths = [inputs] + [layer[0] for layer in chain]
            layers = [
                ConvBn(widths[k], w, size, rngs, stride, pad)
                for k, (w, size, stride, pad) in enumerate(chain)
            ]
            setattr(self, f"branch_{number}", layers[0] if len(layers) == 1 else nnx.List(layers))
        self.width = sum(chain[-1][0] for chain in chains) + (inputs if pool else 0)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        outputs = []
        for number in range(self.branches):
            branch, y = getattr(self, f"branch_{number}"), x
            for layer in [branch] if isinstance(branch, ConvBn) else branch:
                y = layer(y)
            outputs.append(y)
        if self.pool:
            outputs.append(nnx.max_pool(x, (3, 3), (2, 2), "VALID"))
        return jnp.concatenate(outputs, -1)


class Block(Mixed):
    """relu(x + scale up(branches of x)); the last block of the network has no ReLU."""

    def __init__(
        self,
        inputs: int,
        chains: list[list[tuple[int, Size, int, Size]]],
        scale: float,
        last: bool,
        rngs: nnx.Rngs,
    ):
        super().__init__(inputs, chains, False, rngs)
        self.scale, self.last = scale, last
        self.up = nnx.Conv(self.width, inputs, (1, 1), precision="highest", rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = x + self.scale * self.up(super().__call__(x))
        return x if self.last else jax.nn.relu(x)


def _one(width: int) -> tuple[int, Size, int, Size]:
    return width, (1, 1), 1, (0, 0)


def _three(width: int) -> tuple[int, Size, int, Size]:
    return width, (3, 3), 1, (1, 1)


def _halve(width: int) -> tuple[int, Size, int, Size]:
    return width, (3, 3), 2, (0, 0)


def _cross(width: int, length: int) -> list[tuple[int, Size, int, Size]]:
    """Return the chain of a 1x1, a 1 x length and a length x 1 convolution."""
    side = length // 2
    return [_one(width), (width, (1, length), 1, (0, side)), (width, (length, 1), 1, (side, 0))]


class Facenet(nnx.Module):
    """Map crops to embeddings of any norm; divide by the norm before taking cosines."""

    def __init__(self, config: FacenetConfig, *, rngs: nnx.Rngs):
        self.config = config

        def c(channels: int) -> int:
            return channels // config.divide

        self.conv2d_1a_3x3 = ConvBn(3, c(32), (3, 3), rngs, stride=2)
        self.conv2d_2a_3x3 = ConvBn(c(32), c(32), (3, 3), rngs)
        self.conv2d_2b_3x3 = ConvBn(c(32), c(64), (3, 3), rngs, pad=(1, 1))
        self.conv2d_3b_1x1 = ConvBn(c(64), c(80), (1, 1), rngs)
        self.conv2d_4a_3x3 = ConvBn(c(80), c(192), (3, 3), rngs)
        self.conv2d_4b_3x3 = ConvBn(c(192), c(256), (3, 3), rngs, stride=2)
        three, seven, eight = config.blocks
        small = [
            [_one(c(32))],
            [_one(c(32)), _three(c(32))],
            [_one(c(32)), _three(c(32)), _three(c(32))],
        ]
        self.block35 = nnx.List([Block(c(256), small, 0.17, False, rngs) for _ in range(three)])
        self.mixed_6a = Mixed(
            c(256), [[_halve(c(384))], [_one(c(192)), _three(c(192)), _halve(c(256))]], True, rngs
        )
        width = self.mixed_6a.width
        middle = [[_one(c(128))], _cross(c(128), 7)]
        self.block17 = nnx.List([Block(width, middle, 0.1, False, rngs) for _ in range(seven)])
        ends = [
            [_one(c(256)), _halve(c(384))],
            [_one(c(256)), _halve(c(256))],
            [_one(c(256)), _three(c(256)), _halve(c(256))],
        ]
        self.mixed_7a = Mixed(width, ends, True, rngs)
        width = self.mixed_7a.width
        large = [[_one(c(192))], _cross(c(192), 3)]
        lasts = [k == eight - 1 for k in range(eight)]
        self.block8 = nnx.List(
            [Block(width, large, 1.0 if last else 0.2, last, rngs) for last in lasts]
        )
        self.bottleneck = nnx.Linear(
            width, config.embedding_size, use_bias=False, precision="highest", rngs=rngs
        )
        self.bottleneck_bn = nnx.BatchNorm(
            config.embedding_size, epsilon=EPSILON, use_running_average=True, rngs=rngs
        )

    def __call__(self, crops: Float[Array, "B side side 3"]) -> Float[Array, "B E"]:
        """Embed crops, RGB in [-1, 1]."""
        low, high = self.config.input_range
        x = (crops + 1.0) * (0.5 * (high - low)) + low
        if self.config.channel_order == "bgr":
            x = x[..., ::-1]
        x = self.conv2d_2b_3x3(self.conv2d_2a_3x3(self.conv2d_1a_3x3(x)))
        x = nnx.max_pool(x, (3, 3), (2, 2), "VALID")
        x = self.conv2d_4b_3x3(self.conv2d_4a_3x3(self.conv2d_3b_1x1(x)))
        for part in (self.block35, [self.mixed_6a], self.block17, [self.mixed_7a], self.block8):
            for block in part:
                x = block(x)
        return self.bottleneck_bn(self.bottleneck(jnp.mean(x, (1, 2))))
