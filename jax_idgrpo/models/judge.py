"""The judge: a face embedder of another architecture than the reward's, so that what fools one need not fool the other.

Plain convolutions in VGG style with group norm and SiLU, average pooling between stages, and per-position dense features at
the end; no residuals, no batch norm, another crop. It measures results and never serves as a reward.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """widths: channels of each stage of two convolutions; every stage but the last halves the picture."""

    widths: tuple[int, ...] = (24, 48, 96, 128)
    input_size: int = 40
    embedding_size: int = 96


class ConvNorm(nnx.Module):
    """silu(group norm(conv 3x3))."""

    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(inputs, width, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, precision="highest", rngs=rngs)
        self.norm = nnx.GroupNorm(width, num_groups=8, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        return jax.nn.silu(self.norm(self.conv(x)))


class Judge(nnx.Module):
    """Crops to raw embeddings; divide by their length before taking cosines."""

    def __init__(self, config: JudgeConfig, *, rngs: nnx.Rngs):
        self.config = config
        inputs, stages = 3, []
        for width in config.widths:
            stages.append(nnx.List([ConvNorm(inputs, width, rngs), ConvNorm(width, width, rngs)]))
            inputs = width
        self.stages = nnx.List(stages)
        side = config.input_size // 2 ** (len(config.widths) - 1)
        self.dense = nnx.Linear(side * side * inputs, config.embedding_size, precision="highest", rngs=rngs)

    def __call__(self, crops: Float[Array, "B S S 3"], *, train: bool = False) -> Float[Array, "B E"]:
        """crops: RGB in [-1, 1]. Training and inference compute the same thing."""
        x = crops
        for number, stage in enumerate(self.stages):
            if number:
                batch, height, width, channels = x.shape
                x = jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), (2, 4))
            for conv in stage:
                x = conv(x)
        return self.dense(x.reshape(x.shape[0], -1))
