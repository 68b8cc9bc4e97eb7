"""DINO ViT: a vision transformer whose class token describes a picture, such as ViT-S/16.

    token   linear map of each patch of p x p pixels, after the class token; plus learned positions
    block   x + attention(norm x), then x + linear(gelu(linear(norm x)))
    output  class token after the last norm

Computed in float32. The table of positions belongs to one size of pictures and is not interpolated.

Sources: DINO (arXiv 2104.14294), ViT (arXiv 2010.11929); transformers `models/vit`;
`facebook/dino-vits16`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import FLOAT32, LayerNorm, Linear, scan_blocks, stack_blocks

# Mean and standard deviation of ImageNet's pixels in [0, 1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class DinoConfig:
    """Sizes of the network; by default those of ViT-S/16.

    Attributes:
      depth: number of blocks.
      width: D, of the stream.
      heads: attention heads.
      ffn: inner width of the feed-forward layers.
      patch: side of a patch, pixels.
      image_size: side of the square pictures, pixels.
      eps: of all norms.
    """

    depth: int = 12
    width: int = 384
    heads: int = 6
    ffn: int = 1536
    patch: int = 16
    image_size: int = 224
    eps: float = 1e-12

    def __post_init__(self) -> None:
        sizes = self.depth, self.width, self.heads, self.ffn, self.patch, self.image_size
        if min(sizes) < 1:
            raise UserError(f"a size is below 1 among {sizes}")
        if self.width % self.heads:
            raise UserError(f"width {self.width} does not divide into {self.heads} heads")
        if self.image_size % self.patch:
            raise UserError(
                f"pictures of {self.image_size} pixels do not divide into patches of {self.patch}"
            )

    @property
    def tokens(self) -> int:
        """Number of patches of a picture, plus the class token."""
        return (self.image_size // self.patch) ** 2 + 1


class Attention(nnx.Module):
    """Attention of all tokens to all tokens."""

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.query, self.key, self.value, self.output = (
            Linear(config.width, config.width, dtypes=FLOAT32, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        q, k, v = (
            rearrange(project(x), "b n (heads d) -> b heads n d", heads=self.heads)
            for project in (self.query, self.key, self.value)
        )
        logits = jnp.einsum("bhnd,bhmd->bhnm", q * q.shape[-1] ** -0.5, k, precision="highest")
        weights = jax.nn.softmax(logits, axis=-1)
        mixed = jnp.einsum("bhnm,bhmd->bhnd", weights, v, precision="highest")
        return self.output(rearrange(mixed, "b heads n d -> b n (heads d)"))


class Block(nnx.Module):
    """Attention and feed-forward layers, each after a norm."""

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.width, eps=config.eps)
        self.attention = Attention(config, rngs=rngs)
        self.norm2 = LayerNorm(config.width, eps=config.eps)
        self.up = Linear(config.width, config.ffn, dtypes=FLOAT32, rngs=rngs)
        self.down = Linear(config.ffn, config.width, dtypes=FLOAT32, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x)), approximate=False))


class Dino(nnx.Module):
    """Map pictures to features of any norm; divide by the norm before taking cosines."""

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(0.02)
        self.class_token = nnx.Param(normal(rngs.params(), (config.width,)))
        self.positions = nnx.Param(normal(rngs.params(), (config.tokens, config.width)))
        self.patches = Linear(3 * config.patch**2, config.width, dtypes=FLOAT32, rngs=rngs)
        self.blocks = stack_blocks(lambda rngs: Block(config, rngs=rngs), config.depth, rngs)
        self.norm = LayerNorm(config.width, eps=config.eps)

    def __call__(self, pictures: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Return the class token after the last norm.

        Args:
          pictures: RGB in [-1, 1], of the side `image_size`.

        Raises:
          UserError: the pictures have another size.
        """
        side, patch = self.config.image_size, self.config.patch
        if pictures.shape[1:3] != (side, side):
            height, width = pictures.shape[1:3]
            raise UserError(
                f"the network takes pictures of {side} x {side} pixels, not {height} x {width}; "
                "resize them"
            )
        x = ((pictures + 1) / 2 - np.asarray(MEAN, np.float32)) / np.asarray(DEVIATION, np.float32)
        x = rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)
        first = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, self.config.width))
        x = jnp.concatenate([first, self.patches(x)], axis=1) + self.positions[...]
        x = scan_blocks(self.blocks, lambda block, x, _: block(x), x)
        return self.norm(x[:, 0])
