"""The UMT5 text encoder: token ids [B,L] to embeddings [B,L,D].

    h = rms(x);  x = x + O softmax(Q h (K h)^T + bias[bucket(key - query)] + padding) V h
    h = rms(x);  x = x + W_down (gelu_tanh(W_gate h) * (W_up h))

and a final rms. Logits are not scaled by the head size. Each layer has its own table of relative
biases. No linear layer has a bias vector.

Sources: T5, arXiv 1910.10683; UMT5, arXiv 2304.09151; transformers `modeling_umt5.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import Dtypes, Linear, RMSNorm, precision


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Sizes of the network.

    Attributes:
      vocab_size: number of token ids.
      d_model: D, width of the stream.
      d_kv: channels of a head; num_heads * d_kv need not equal d_model.
      num_heads: attention heads.
      d_ff: inner width of the feed-forward layers.
      num_layers: number of blocks.
      num_buckets: of relative positions, a multiple of 4.
      max_distance: distance in tokens from which all keys share a bucket.
      eps: of all norms.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    num_heads: int
    d_ff: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise UserError(
                    f"text encoder: {field.name} is {getattr(self, field.name)}; "
                    "it must be positive"
                )
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 4:
            raise UserError(
                f"text encoder: num_buckets {self.num_buckets} must be a multiple of 4, "
                f"and a quarter of it less than max_distance {self.max_distance}"
            )


def umt5_xxl(**changes) -> UMT5Config:
    """Return the configuration of google/umt5-xxl, the encoder of every Wan 2.1 model."""
    sizes = {
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "num_heads": 64,
        "d_ff": 10240,
        "num_layers": 24,
    }
    return UMT5Config(**(sizes | changes))


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of key - query, int [query, key].

    Keys after the query use the upper half of the buckets. Within a half of h buckets, each
    distance below h / 2 has its own bucket. Longer distances up to `max_distance` share the others
    evenly in the logarithm, and the last bucket contains all distances beyond.

    Args:
      length: tokens.
      num_buckets: a multiple of 4.
      max_distance: in tokens.
    """
    half = num_buckets // 2
    exact = half // 2
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(relative)
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact)) / np.log(
        max_distance / exact
    )
    far = np.minimum(exact + (ratio * (half - exact)).astype(np.int64), half - 1)
    return np.where(relative > 0, half, 0) + np.where(distance < exact, distance, far)


class Attention(nnx.Module):
    """Unscaled multi-head self-attention with a learned bias per head and position bucket."""

    def __init__(self, config: UMT5Config, *, dtypes: Dtypes, rngs: nnx.Rngs):
        inner = config.num_heads * config.d_kv

        def project(features: int, width: int, deviation: float) -> Linear:
            init = nnx.initializers.normal(deviation)
            return Linear(
                features, width, use_bias=False, kernel_init=init, dtypes=dtypes, rngs=rngs
            )

        # The initialisation of q contains the factor by which the logits are not scaled.
        self.q = project(config.d_model, inner, (config.d_model * config.d_kv) ** -0.5)
        self.k = project(config.d_model, inner, config.d_model**-0.5)
        self.v = project(config.d_model, inner, config.d_model**-0.5)
        self.o = project(inner, config.d_model, inner**-0.5)
        table = jax.random.normal(
            rngs.params(), (config.num_buckets, config.num_heads), jnp.float32
        )
        self.relative_bias = nnx.Param(table * config.d_model**-0.5)
        self.num_heads = config.num_heads

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], buckets: Int[Array, "L L"]
    ) -> Float[Array, "B L D"]:
        q, k, v = (
            rearrange(layer(x), "b n (heads d) -> b n heads d", heads=self.num_heads)
            for layer in (self.q, self.k, self.v)
        )
        logits = jnp.einsum(
            "bqhd,bkhd->bhqk", q, k, precision=precision(q, k), preferred_element_type=jnp.float32
        )
        logits = logits + jnp.moveaxis(self.relative_bias[...].astype(jnp.float32)[buckets], -1, 0)
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=precision(weights, v))
        return self.o(rearrange(out, "b n heads d -> b n (heads d)"))


class FeedForward(nnx.Module):
    """W_down (gelu(W_gate x) * (W_up x)) with the tanh form of gelu."""

    def __init__(self, config: UMT5Config, *, dtypes: Dtypes, rngs: nnx.Rngs):
        def project(features: int, width: int) -> Linear:
            init = nnx.initializers.normal(features**-0.5)
            return Linear(
                features, width, use_bias=False, kernel_init=init, dtypes=dtypes, rngs=rngs
            )

        self.gate = project(config.d_model, config.d_ff)
        self.up = project(config.d_model, config.d_ff)
        self.down = project(config.d_ff, config.d_model)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class Block(nnx.Module):
    """Pre-norm attention and feed-forward; the stream keeps its dtype."""

    def __init__(self, config: UMT5Config, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.d_model, eps=config.eps)
        self.attention = Attention(config, dtypes=dtypes, rngs=rngs)
        self.norm2 = RMSNorm(config.d_model, eps=config.eps)
        self.ffn = FeedForward(config, dtypes=dtypes, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], buckets: Int[Array, "L L"]
    ) -> Float[Array, "B L D"]:
        x = x + self.attention(self.norm1(x), mask, buckets).astype(x.dtype)
        return x + self.ffn(self.norm2(x)).astype(x.dtype)


class UMT5Encoder(nnx.Module):
    """The encoder; its blocks are one module with a leading layer axis, which is scanned."""

    def __init__(self, config: UMT5Config, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.config, self.dtypes = config, dtypes
        shape = (config.vocab_size, config.d_model)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape, dtypes.parameters))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, dtypes=dtypes, rngs=rngs)

        self.blocks = stack(rngs)
        self.norm = RMSNorm(config.d_model, eps=config.eps)

    def __call__(self, ids: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Encode tokens to embeddings in `dtypes.residual`, zero in the padding.

        Args:
          ids: 0 <= id < vocab_size.
          mask: 1 on tokens, 0 on padding, which is not attended to.

        Raises:
          UserError: the shapes differ.
        """
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise UserError(
                f"text encoder: ids {ids.shape} and mask {mask.shape} must both be [B, L]"
            )
        config, mask = self.config, mask != 0
        buckets = jnp.asarray(
            relative_buckets(ids.shape[1], config.num_buckets, config.max_distance)
        )
        graph, blocks = nnx.split(self.blocks)
        x = jnp.take(self.embedding[...], ids, axis=0, mode="fill")  # NaN for ids out of range
        x = x.astype(self.dtypes.residual)
        x, _ = jax.lax.scan(
            lambda x, block: (nnx.merge(graph, block)(x, mask, buckets), None), x, blocks
        )
        return jnp.where(mask[..., None], self.norm(x), 0).astype(self.dtypes.residual)
