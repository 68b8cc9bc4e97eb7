"""The bundled judge: a face embedder that measures results and is never a reward.

Its architecture differs from the reward's, so that an image that exploits one embedder need not
exploit the other: VGG-style convolutions with group norm and SiLU after a strided 5x5 stem, average
pooling between stages, one dense layer at the end. It has no residuals and no batch norm, and its
crops are different.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Sizes of the judge.

    Attributes:
      widths: channels of each stage of two convolutions. The stem and every stage but the first
        halve the picture.
      input_size: side of the square crop, pixels.
      embedding_size: E.
    """

    widths: tuple[int, ...] = (24, 48, 96)
    input_size: int = 40
    embedding_size: int = 96


class ConvNorm(nnx.Module):
    """silu(group norm(conv))."""

    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs, size: int = 3, stride: int = 1):
        pad = size // 2
        self.conv = nnx.Conv(
            inputs,
            width,
            (size, size),
            (stride, stride),
            padding=((pad, pad), (pad, pad)),
            use_bias=False,
            precision="highest",
            rngs=rngs,
        )
        self.norm = nnx.GroupNorm(width, num_groups=8, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        return jax.nn.silu(self.norm(self.conv(x)))


class Judge(nnx.Module):
    """Map crops to embeddings of any norm; divide by the norm before taking cosines."""

    def __init__(self, config: JudgeConfig, *, rngs: nnx.Rngs):
        self.config = config
        inputs, stages = config.widths[0], []
        self.stem = ConvNorm(3, inputs, rngs, size=5, stride=2)
        for width in config.widths:
            stages.append(nnx.List([ConvNorm(inputs, width, rngs), ConvNorm(width, width, rngs)]))
            inputs = width
        self.stages = nnx.List(stages)
        side = config.input_size // 2 ** len(config.widths)
        self.dense = nnx.Linear(
            side * side * inputs, config.embedding_size, precision="highest", rngs=rngs
        )

    def __call__(
        self, crops: Float[Array, "B side side 3"], *, train: bool = False
    ) -> Float[Array, "B E"]:
        """Embed crops, RGB in [-1, 1]; `train` changes nothing."""
        x = self.stem(crops)
        for number, stage in enumerate(self.stages):
            if number:
                batch, height, width, channels = x.shape
                x = jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), (2, 4))
            for conv in stage:
                x = conv(x)
        return self.dense(x.reshape(x.shape[0], -1))
