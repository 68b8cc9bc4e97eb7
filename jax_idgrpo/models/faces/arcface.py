"""Face embedders of the IR residual family: ArcFace-R34, IResNet, IR-101 and small ones.

    stem   conv 3x3, batch norm, PReLU
    unit   batch norm, conv 3x3, batch norm, PReLU, conv 3x3 of stride s, batch norm; plus shortcut
    tail   batch norm, flatten, dense, batch norm over the embedding

No activation follows the sum of a unit. The first unit of every stage has stride 2. Every padding
is 1 on each side, as in PyTorch. Computed in float32. Published dense kernels expect channels first
when flattening; the conversion reorders them.

Sources: ArcFace (arXiv 1801.07698), deepface `models/facial_recognition/pytorch/ArcFace.py`,
insightface `iresnet.py`, CurricularFace `model_irse.py`.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class ArcFaceConfig:
    """A member of the family.

    Attributes:
      units: residual units of each stage.
      widths: channels of each stage.
      stem: channels of the stem.
      input_size: side of the square crop, pixels.
      embedding_size: E.
      epsilon: of every batch norm.
      first_shortcut: of stage 1, "conv" (1x1 and batch norm, as in the other stages) or "subsample"
        (every second pixel).
      embedding_norm: last batch norm, "affine", "bias" (scale fixed at 1) or "plain" (neither).
      channel_order: of the network's input, "rgb" or "bgr".
      input_range: of the network's input.
    """

    units: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: int = 64
    input_size: int = 112
    embedding_size: int = 512
    epsilon: float = 1e-5
    first_shortcut: str = "conv"
    embedding_norm: str = "affine"
    channel_order: str = "rgb"
    input_range: tuple[float, float] = (-1.0, 1.0)

    @property
    def grid(self) -> int:
        """Side of the last feature map, pixels."""
        size = self.input_size
        for _ in self.units:
            size = (size + 1) // 2
        return size


ARCFACE_R34 = ArcFaceConfig(
    units=(3, 4, 6, 3), epsilon=2e-5, channel_order="bgr", input_range=(0.0, 1.0)
)
IRESNET_34 = ArcFaceConfig(units=(3, 4, 6, 3), embedding_norm="bias")
IRESNET_50 = ArcFaceConfig(units=(3, 4, 14, 3), embedding_norm="bias")
IRESNET_100 = ArcFaceConfig(units=(3, 13, 30, 3), embedding_norm="bias")
IR_101 = ArcFaceConfig(units=(3, 13, 30, 3), first_shortcut="subsample", embedding_norm="plain")


def _batch_norm(width: int, epsilon: float, rngs: nnx.Rngs, norm: str = "affine") -> nnx.BatchNorm:
    return nnx.BatchNorm(
        width,
        epsilon=epsilon,
        momentum=0.95,
        use_fast_variance=False,
        use_scale=norm == "affine",
        use_bias=norm != "plain",
        rngs=rngs,
    )


def _conv(inputs: int, width: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    pad = size // 2
    return nnx.Conv(
        inputs,
        width,
        (size, size),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        precision="highest",
        rngs=rngs,
    )


class PReLU(nnx.Module):
    """max(x, 0) + slope min(x, 0) with one slope per channel."""

    def __init__(self, width: int):
        self.slope = nnx.Param(jnp.full(width, 0.25))

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        return jnp.maximum(x, 0) + self.slope[...] * jnp.minimum(x, 0)


class Shortcut(nnx.Module):
    """1x1 convolution of stride 2 and batch norm."""

    def __init__(self, inputs: int, width: int, epsilon: float, rngs: nnx.Rngs):
        self.conv = _conv(inputs, width, 1, 2, rngs)
        self.norm = _batch_norm(width, epsilon, rngs)

    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w out"]:
        return self.norm(self.conv(x), use_running_average=not train)


class Unit(nnx.Module):
    """A residual unit with shortcut "conv", "subsample" or "identity"."""

    def __init__(self, inputs: int, width: int, shortcut: str, epsilon: float, rngs: nnx.Rngs):
        stride = 1 if shortcut == "identity" else 2
        self.stride = stride
        self.norm1 = _batch_norm(inputs, epsilon, rngs)
        self.conv1 = _conv(inputs, width, 3, 1, rngs)
        self.norm2 = _batch_norm(width, epsilon, rngs)
        self.prelu = PReLU(width)
        self.conv2 = _conv(width, width, 3, stride, rngs)
        self.norm3 = _batch_norm(width, epsilon, rngs)
        self.shortcut = Shortcut(inputs, width, epsilon, rngs) if shortcut == "conv" else None

    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w out"]:
        if self.shortcut is not None:
            skip = self.shortcut(x, train)
        else:
            skip = x[:, :: self.stride, :: self.stride]
        x = self.conv1(self.norm1(x, use_running_average=not train))
        x = self.prelu(self.norm2(x, use_running_average=not train))
        return skip + self.norm3(self.conv2(x), use_running_average=not train)


class ArcFace(nnx.Module):
    """Map crops to embeddings of any norm; divide by the norm before taking cosines."""

    def __init__(self, config: ArcFaceConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.conv = _conv(3, config.stem, 3, 1, rngs)
        self.norm = _batch_norm(config.stem, config.epsilon, rngs)
        self.prelu = PReLU(config.stem)
        stages, inputs = [], config.stem
        for stage, (units, width) in enumerate(zip(config.units, config.widths, strict=True)):
            first = config.first_shortcut if stage == 0 else "conv"
            shortcuts = [first] + ["identity"] * (units - 1)
            stages.append(
                nnx.List(
                    [
                        Unit(width if k else inputs, width, s, config.epsilon, rngs)
                        for k, s in enumerate(shortcuts)
                    ]
                )
            )
            inputs = width
        self.stages = nnx.List(stages)
        self.tail_norm = _batch_norm(inputs, config.epsilon, rngs)
        self.dense = nnx.Linear(
            config.grid**2 * inputs, config.embedding_size, precision="highest", rngs=rngs
        )
        self.embedding_norm = _batch_norm(
            config.embedding_size, config.epsilon, rngs, config.embedding_norm
        )

    def __call__(
        self, crops: Float[Array, "B side side 3"], *, train: bool = False
    ) -> Float[Array, "B E"]:
        """Embed crops, RGB in [-1, 1].

        With `train`, batch norms use the statistics of the batch and update the running ones.
        """
        low, high = self.config.input_range
        x = (crops + 1.0) * (0.5 * (high - low)) + low
        if self.config.channel_order == "bgr":
            x = x[..., ::-1]
        x = self.prelu(self.norm(self.conv(x), use_running_average=not train))
        for stage in self.stages:
            for unit in stage:
                x = unit(x, train)
        x = self.tail_norm(x, use_running_average=not train)
        x = self.dense(x.reshape(x.shape[0], -1))
        return self.embedding_norm(x, use_running_average=not train)
