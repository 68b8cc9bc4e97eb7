"""Qwen2.5-VL with a reward head: vision tower, causal language model, scores at special tokens.

The vision tower encodes pictures and video frames. The language model reads one sequence of text
and vision tokens. Every picture, and every pair of frames of a video, is a separate grid of
patches: attention in the tower is within a grid. Patches are in 2 x 2 merge order. Tables that
depend on the grid's shape are inputs (`Grids`), so one program serves all shapes of one capacity.
Blocks of both stacks are scanned. `qwen_decoding` writes text with a key/value cache.

Sources: Qwen2.5-VL, arXiv 2502.13923, transformers `models/qwen2_5_vl`; the reward head as in
`alibaba/identity-grpo` and `KwaiVGI/VideoAlign`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import (
    FLOAT32,
    Dtypes,
    Linear,
    RMSNorm,
    precision,
    scan_blocks,
    stack_blocks,
)

QUERIES = 512  # queries whose logits are in memory at once


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"vision-language model: {message}")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower.

    Attributes:
      depth: number of blocks.
      width: of the stream.
      heads: attention heads.
      ffn: inner width of the feed-forward layers.
      full_blocks: blocks that attend to the whole grid; the others attend within windows.
      window: side of a window, pixels.
      patch: side of a patch, pixels.
      frames: video frames of a patch.
      merge: side of a merged cell, patches.
      eps: of all norms.
    """

    depth: int = 32
    width: int = 1280
    heads: int = 16
    ffn: int = 3420
    full_blocks: tuple[int, ...] = (7, 15, 23, 31)
    window: int = 112
    patch: int = 14
    frames: int = 2
    merge: int = 2
    eps: float = 1e-6

    @property
    def features(self) -> int:
        """Number of values of a patch: channels x frames x rows x columns."""
        return 3 * self.frames * self.patch**2

    @property
    def cells(self) -> int:
        """Merged cells along one side of a window."""
        return self.window // self.merge // self.patch

    def __post_init__(self):
        _require(
            self.width % self.heads == 0 and self.width // self.heads % 4 == 0,
            f"width {self.width} is not 4n x {self.heads} heads",
        )
        _require(
            all(0 <= block < self.depth for block in self.full_blocks),
            f"full_blocks {self.full_blocks} reach beyond {self.depth}",
        )
        _require(
            self.cells >= 1,
            f"window {self.window} is smaller than a merged cell of "
            f"{self.merge * self.patch} pixels",
        )


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """Sizes of the vision tower, the language model and the head; by default those of the 3B model.

    Attributes:
      vision: sizes of the vision tower.
      layers: blocks of the language model.
      width: D, of its stream.
      heads: query heads.
      kv_heads: key and value heads.
      ffn: inner width of the feed-forward layers.
      vocabulary: number of token ids.
      sections: how many of the head_dim / 2 rotary frequencies encode time, row and column.
      theta: base of the rotary frequencies.
      eps: of all norms.
      outputs: scores per reward token.
      rank: of the LoRA on every linear layer of the language model; 0 is none.
      alpha: the LoRA is scaled by alpha / rank.
      remat: whether the backward pass recomputes each block.
    """

    vision: VisionConfig = VisionConfig()
    layers: int = 36
    width: int = 2048
    heads: int = 16
    kv_heads: int = 2
    ffn: int = 11008
    vocabulary: int = 151936
    sections: tuple[int, int, int] = (16, 24, 24)
    theta: float = 1e6
    eps: float = 1e-6
    outputs: int = 1
    rank: int = 0
    alpha: float = 0.0
    remat: bool = False

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    def __post_init__(self):
        _require(
            self.width % self.heads == 0,
            f"width {self.width} does not divide into {self.heads} heads",
        )
        _require(
            self.heads % self.kv_heads == 0,
            f"{self.heads} heads do not share {self.kv_heads} key heads evenly",
        )
        _require(
            2 * sum(self.sections) == self.head_dim,
            f"sections {self.sections} do not add up to half of head_dim {self.head_dim}",
        )
        _require(
            self.rank == 0 or self.alpha > 0,
            f"alpha is {self.alpha} with rank {self.rank}; it must be positive",
        )


@struct.dataclass
class Grids:
    """Grids of patches, padded to one capacity of patches and of windows.

    Attributes:
      patches: normalised pixels, (channel, frame, row, column) within a patch; patches are in 2 x 2
        merge order.
      place: row and column of each patch.
      mask: False in the padding.
      window: number of the patch at each position of each window; the capacity if there is none.
      back: position of each patch in the concatenated windows.
    """

    patches: Float[Array, "grids patches features"]
    place: Int[Array, "grids patches 2"]
    mask: Bool[Array, "grids patches"]
    window: Int[Array, "grids windows size"]
    back: Int[Array, "grids patches"]


@struct.dataclass
class Sequences:
    """B sequences of L tokens, padded on the right.

    Attributes:
      ids: token ids; those at vision tokens are ignored.
      vision: number of the row's vision feature at a vision token, -1 at text.
      position: time, row, column.
      token: positions of the reward tokens, in order.
      mask: False in the padding.
    """

    ids: Int[Array, "B L"]
    vision: Int[Array, "B L"]
    position: Int[Array, "3 B L"]
    token: Int[Array, "B scores"]
    mask: Bool[Array, "B L"]


# ---- parts ---------------------------------------------------------------------------------------


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(
        self,
        width: int,
        ffn: int,
        *,
        use_bias: bool,
        rank: int = 0,
        alpha: float = 0.0,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
    ):
        def linear(inside: int, outside: int) -> Linear:
            return Linear(
                inside, outside, use_bias=use_bias, rank=rank, alpha=alpha, dtypes=dtypes, rngs=rngs
            )

        self.gate_proj, self.up_proj, self.down_proj = (
            linear(width, ffn),
            linear(width, ffn),
            linear(ffn, width),
        )

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        gate = jax.nn.silu(self.gate_proj(x).astype(jnp.float32))
        return self.down_proj(gate * self.up_proj(x).astype(jnp.float32))


def rotate(
    x: Float[Array, "*batch heads d"], cos: Float[Array, "*batch d"], sin: Float[Array, "*batch d"]
) -> Float[Array, "*batch heads d"]:
    """Apply rotary positions to the halves of every head: x cos + (-x2, x1) sin, in float32.

    Args:
      x: queries or keys.
      cos: of the angles, repeated for both halves.
      sin: of the angles, repeated for both halves.
    """
    x = x.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos[..., None, :] + jnp.concatenate([-second, first], axis=-1) * sin[..., None, :]


def _twice(angles: Float[Array, "*batch half"]) -> tuple[Array, Array]:
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def vision_rotary(
    place: Int[Array, "*batch 2"], head_dim: int
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d"]]:
    """Compute cos and sin of the rotary angles of patches.

    The first quarter of the d channels encodes the row, with frequencies 10000^(-4i/d), the second
    quarter the column; the second half repeats the first.
    """
    frequency = 10000.0 ** (-np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2))
    angles = place[..., None].astype(jnp.float32) * frequency.astype(np.float32)
    return _twice(angles.reshape(*place.shape[:-1], -1))


def text_rotary(
    position: Int[Array, " 3 *batch"], config: QwenConfig
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d"]]:
    """Compute cos and sin of M-RoPE: consecutive chunks of frequencies for time, row and column."""
    frequency = (
        config.theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim)
    ).astype(np.float32)
    angles = position[..., None].astype(jnp.float32) * frequency
    ends = np.cumsum(config.sections)[:-1]
    chunks = [part[axis] for axis, part in enumerate(jnp.split(angles, ends, axis=-1))]
    return _twice(jnp.concatenate(chunks, axis=-1))


def attend(
    q: Float[Array, "*batch N heads d"],
    k: Float[Array, "*batch keys groups d"],
    v: Float[Array, "*batch keys groups d"],
    mask: Bool[Array, "..."],
) -> Float[Array, "*batch N heads d"]:
    """Compute softmax(q k^T / sqrt(d)) v with the softmax in float32.

    Args:
      q: queries; `heads / groups` query heads share a key head.
      k: keys.
      v: values.
      mask: [*batch, N or 1, keys], False for masked keys.

    Returns:
      The output, in v's dtype.
    """
    *batch, n, heads, d = q.shape
    groups = k.shape[-2]
    q = (
        (q.astype(jnp.float32) * d**-0.5)
        .astype(v.dtype)
        .reshape(*batch, n, groups, heads // groups, d)
    )
    logits = jnp.einsum(
        "...ngqd,...mgd->...gqnm",
        q,
        k.astype(v.dtype),
        precision=precision(v),
        preferred_element_type=jnp.float32,
    )
    logits = jnp.where(mask[..., None, None, :, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum(
        "...gqnm,...mgd->...ngqd",
        weights,
        v,
        precision=precision(v),
        preferred_element_type=jnp.float32,
    )
    return out.reshape(*batch, n, heads, d).astype(v.dtype)


def attend_in_parts(
    q: Float[Array, "B N heads d"],
    k: Float[Array, "B keys groups d"],
    v: Float[Array, "B keys groups d"],
    mask_of: Callable[[Array], Array],
) -> Float[Array, "B N heads d"]:
    """Compute `attend`, `QUERIES` queries at a time.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask_of: maps numbers of queries to their mask, [B, queries or 1, keys] without or with B.
    """
    length = q.shape[1]
    if length <= QUERIES:
        return attend(q, k, v, mask_of(jnp.arange(length)))
    count = -(-length // QUERIES)
    padded = jnp.pad(q, ((0, 0), (0, count * QUERIES - length), (0, 0), (0, 0)))
    parts = rearrange(padded, "b (part n) heads d -> part b n heads d", n=QUERIES)

    @jax.checkpoint
    def attend_part(part: tuple[Array, Array]) -> Array:
        queries, first = part
        return attend(queries, k, v, mask_of(first + jnp.arange(QUERIES)))

    out = jax.lax.map(attend_part, (parts, jnp.arange(count) * QUERIES))
    return rearrange(out, "part b n heads d -> b (part n) heads d")[:, :length]


def causal(
    q: Float[Array, "B N heads d"], k: Float[Array, "B N groups d"], v: Float[Array, "B N groups d"]
) -> Float[Array, "B N heads d"]:
    """Compute causal attention; only padding attends to padding, which is on the right.

    Args:
      q: queries.
      k: keys.
      v: values.
    """
    return attend_in_parts(q, k, v, lambda queries: jnp.arange(q.shape[1]) <= queries[:, None])


# ---- vision tower --------------------------------------------------------------------------------


class VisionAttention(nnx.Module):
    """Attention over a grid's patches, within windows or over the whole grid."""

    def __init__(self, config: VisionConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.qkv = Linear(config.width, 3 * config.width, dtypes=dtypes, rngs=rngs)
        self.proj = Linear(config.width, config.width, dtypes=dtypes, rngs=rngs)
        self.heads = config.heads

    def __call__(
        self,
        x: Float[Array, "grids patches width"],
        rotary: tuple[Array, Array],
        grids: Grids,
        full: Bool[Array, ""],
    ) -> Float[Array, "grids patches width"]:
        q, k, v = (
            rearrange(part, "grids n (heads d) -> grids n heads d", heads=self.heads)
            for part in jnp.split(self.qkv(x), 3, axis=-1)
        )
        q, k = rotate(q, *rotary).astype(v.dtype), rotate(k, *rotary).astype(v.dtype)

        def within_windows() -> Array:
            rows, windows, size = grids.window.shape
            places = grids.window.reshape(rows, -1, 1, 1)

            def cut(array: Array) -> Array:
                padded = jnp.pad(array, ((0, 0), (0, 1), (0, 0), (0, 0)))
                patches = jnp.take_along_axis(padded, places, axis=1)
                return patches.reshape(rows, windows, size, self.heads, -1)

            out = attend(cut(q), cut(k), cut(v), (grids.window < x.shape[1])[:, :, None, :])
            return jnp.take_along_axis(
                out.reshape(rows, windows * size, self.heads, -1),
                grids.back[..., None, None],
                axis=1,
            )

        def whole_grid() -> Array:
            return attend_in_parts(q, k, v, lambda queries: grids.mask[:, None, :])

        out = jax.lax.cond(full, whole_grid, within_windows)
        return self.proj(rearrange(out, "grids n heads d -> grids n (heads d)"))


class VisionBlock(nnx.Module):
    """Attention and SwiGLU, each after an RMSNorm."""

    def __init__(self, config: VisionConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.width, eps=config.eps)
        self.attn = VisionAttention(config, dtypes=dtypes, rngs=rngs)
        self.norm2 = RMSNorm(config.width, eps=config.eps)
        self.mlp = SwiGLU(config.width, config.ffn, use_bias=True, dtypes=dtypes, rngs=rngs)

    def __call__(
        self, x: Array, rotary: tuple[Array, Array], grids: Grids, full: Bool[Array, ""]
    ) -> Array:
        x = x + self.attn(self.norm1(x), rotary, grids, full).astype(x.dtype)
        return x + self.mlp(self.norm2(x)).astype(x.dtype)


class Merger(nnx.Module):
    """RMSNorm, concatenation of the patches of a cell, linear layer, exact GELU, linear layer."""

    def __init__(self, config: VisionConfig, width: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        inside = config.width * config.merge**2
        self.ln_q = RMSNorm(config.width, eps=config.eps)
        self.linear_1 = Linear(inside, inside, dtypes=dtypes, rngs=rngs)
        self.linear_2 = Linear(inside, width, dtypes=dtypes, rngs=rngs)
        self.group = config.merge**2

    def __call__(self, x: Float[Array, "grids patches width"]) -> Float[Array, "grids cells D"]:
        x = rearrange(self.ln_q(x), "grids (cells n) d -> grids cells (n d)", n=self.group)
        return self.linear_2(jax.nn.gelu(self.linear_1(x).astype(jnp.float32), approximate=False))


class VisionTower(nnx.Module):
    """Map grids of patches to one feature per merged cell, in patch order and of width D."""

    def __init__(
        self,
        config: VisionConfig,
        width: int,
        *,
        remat: bool = False,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
    ):
        self.config, self.remat, self.residual = config, remat, dtypes.residual
        self.patch_embed = Linear(
            config.features, config.width, use_bias=False, dtypes=dtypes, rngs=rngs
        )
        self.blocks = stack_blocks(
            lambda rngs: VisionBlock(config, dtypes=dtypes, rngs=rngs), config.depth, rngs
        )
        self.merger = Merger(config, width, dtypes=dtypes, rngs=rngs)

    def __call__(self, grids: Grids) -> Float[Array, "grids cells D"]:
        config = self.config
        rotary = vision_rotary(grids.place, config.width // config.heads)
        full = jnp.isin(jnp.arange(config.depth), np.asarray(config.full_blocks, np.int32))
        x = self.patch_embed(grids.patches).astype(self.residual)
        x = scan_blocks(
            self.blocks, lambda block, x, full: block(x, rotary, grids, full), x, full, self.remat
        )
        return self.merger(x)


# ---- language model ------------------------------------------------------------------------------


class Attention(nnx.Module):
    """Projections of causal grouped-query attention, with biases on q, k and v."""

    def __init__(self, config: QwenConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        def linear(inside: int, outside: int, bias: bool) -> Linear:
            return Linear(
                inside,
                outside,
                use_bias=bias,
                rank=config.rank,
                alpha=config.alpha,
                dtypes=dtypes,
                rngs=rngs,
            )

        width, keys = config.width, config.kv_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            linear(width, width, True),
            linear(width, keys, True),
            linear(width, keys, True),
        )
        self.o_proj = linear(width, width, False)
        self.head_dim = config.head_dim

    def project(
        self, x: Float[Array, "B L D"], rotary: tuple[Array, Array]
    ) -> tuple[
        Float[Array, "B L heads d"], Float[Array, "B L groups d"], Float[Array, "B L groups d"]
    ]:
        """Compute queries and keys with rotary positions, and values."""
        q, k, v = (
            rearrange(layer(x), "b n (heads d) -> b n heads d", d=self.head_dim)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, *rotary).astype(v.dtype), rotate(k, *rotary).astype(v.dtype), v


class Block(nnx.Module):
    """Attention and SwiGLU, each after an RMSNorm."""

    def __init__(self, config: QwenConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.width, eps=config.eps)
        self.self_attn = Attention(config, dtypes=dtypes, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.width, eps=config.eps)
        self.mlp = SwiGLU(
            config.width,
            config.ffn,
            use_bias=False,
            rank=config.rank,
            alpha=config.alpha,
            dtypes=dtypes,
            rngs=rngs,
        )

    def __call__(self, x: Array, rotary: tuple[Array, Array]) -> Array:
        return self.finish(x, causal(*self.project(x, rotary)))

    def project(self, x: Array, rotary: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Compute queries, keys and values of the stream x."""
        return self.self_attn.project(self.input_layernorm(x), rotary)

    def finish(
        self, x: Float[Array, "B L D"], attended: Float[Array, "B L heads d"]
    ) -> Float[Array, "B L D"]:
        """Add the output of the attention and of the feed-forward layer to the stream x."""
        attended = rearrange(attended, "b n heads d -> b n (heads d)")
        x = x + self.self_attn.o_proj(attended).astype(x.dtype)
        return x + self.mlp(self.post_attention_layernorm(x)).astype(x.dtype)


class QwenReward(nnx.Module):
    """The whole network: vision tower, language model, and a float32 linear head without bias."""

    def __init__(self, config: QwenConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.config, self.dtypes = config, dtypes
        self.visual = VisionTower(
            config.vision, config.width, remat=config.remat, dtypes=dtypes, rngs=rngs
        )
        table = 0.02 * jax.random.normal(
            rngs.params(), (config.vocabulary, config.width), jnp.float32
        )
        self.embed_tokens = nnx.Param(table.astype(dtypes.parameters))
        self.layers = stack_blocks(
            lambda rngs: Block(config, dtypes=dtypes, rngs=rngs), config.layers, rngs
        )
        self.norm = RMSNorm(config.width, eps=config.eps)
        self.rm_head = Linear(
            config.width, config.outputs, use_bias=False, dtypes=FLOAT32, rngs=rngs
        )

    def features(self, grids: Grids, rows: int) -> Float[Array, "B cells D"]:
        """Encode rows * n grids, the n grids of a row adjacent; concatenate the grids of a row."""
        features = self.visual(grids)
        return rearrange(features, "(b grids) cells d -> b (grids cells) d", b=rows)

    def hidden(
        self, sequences: Sequences, vision: Float[Array, "B cells D"]
    ) -> Float[Array, "B L D"]:
        """Compute the language model's states after the last norm, float32.

        `vision` contains the features that `sequences.vision` numbers.
        """
        config = self.config
        x = self.embed(sequences, vision)
        rotary = text_rotary(sequences.position, config)
        x = scan_blocks(
            self.layers,
            lambda block, x, _: block(x, rotary),
            x,
            jnp.arange(config.layers),
            config.remat,
        )
        return self.norm(x)

    def embed(
        self, sequences: Sequences, vision: Float[Array, "B cells D"]
    ) -> Float[Array, "B L D"]:
        """Return the language model's inputs, in the stream's dtype."""
        text = jnp.take(self.embed_tokens[...], sequences.ids, axis=0)
        picture = jnp.take_along_axis(vision, jnp.maximum(sequences.vision, 0)[..., None], axis=1)
        return jnp.where(
            (sequences.vision >= 0)[..., None],
            picture.astype(jnp.float32),
            text.astype(jnp.float32),
        ).astype(self.dtypes.residual)

    def __call__(
        self,
        sequences: Sequences,
        pictures: Grids | None,
        frames: Grids | None,
        pooling: str = "special",
    ) -> Float[Array, "B scores outputs"]:
        """Compute the scores, float32.

        A row's vision features are those of its pictures, with padding, then those of its frames.

        Args:
          sequences: the tokens.
          pictures: grids of the reference pictures, those of a row adjacent.
          frames: grids of the videos, those of a row adjacent.
          pooling: "special" scores each reward token, "last" the last token, "mean" the mean of all
            tokens before the last one, as published.

        Raises:
          UserError: `pooling` is none of these.
        """
        rows = sequences.ids.shape[0]
        parts = [self.features(grids, rows) for grids in (pictures, frames) if grids is not None]
        empty = jnp.zeros((rows, 1, self.config.width), jnp.float32)
        hidden = self.hidden(sequences, jnp.concatenate(parts, axis=1) if parts else empty)
        if pooling == "special":
            return self.rm_head(jnp.take_along_axis(hidden, sequences.token[..., None], axis=1))
        if pooling == "last":
            last = jnp.sum(sequences.mask, axis=1) - 1
            return self.rm_head(jnp.take_along_axis(hidden, last[:, None, None], axis=1))
        _require(pooling == "mean", f"pooling is {pooling!r}; choose special, last or mean")
        before = (
            jnp.arange(sequences.mask.shape[1]) < jnp.sum(sequences.mask, axis=1, keepdims=True) - 1
        )
        weight = before[..., None].astype(jnp.float32)
        return self.rm_head(
            jnp.sum(hidden * weight, axis=1, keepdims=True) / jnp.sum(weight, axis=1, keepdims=True)
        )


# ---- tables of a grid ----------------------------------------------------------------------------


def merge_order(height: int, width: int, merge: int) -> Int[np.ndarray, "patches 2"]:
    """Return row and column of every patch, cells row by row and the patches of a cell adjacent.

    Args:
      height: of the grid, patches.
      width: of the grid, patches.
      merge: side of a cell, patches.
    """
    places = np.indices((height, width))
    return rearrange(places, "place (h m) (w n) -> (h w m n) place", m=merge, n=merge)


def windows(height: int, width: int, config: VisionConfig) -> list[Int[np.ndarray, " n"]]:
    """Return the cells of each window, row by row; windows at the edge have fewer.

    Args:
      height: of the grid, patches.
      width: of the grid, patches.
      config: sizes of the tower.
    """
    cells = np.arange(height // config.merge * (width // config.merge)).reshape(
        height // config.merge, width // config.merge
    )
    side = config.cells
    return [
        cells[y : y + side, x : x + side].ravel()
        for y in range(0, cells.shape[0], side)
        for x in range(0, cells.shape[1], side)
    ]


def grid_tables(
    height: int, width: int, config: VisionConfig, patches: int, count: int
) -> dict[str, np.ndarray]:
    """Return the fields place, mask, window and back of `Grids` for one grid.

    Args:
      height: of the grid, patches.
      width: of the grid, patches.
      config: sizes of the tower.
      patches: capacity of patches.
      count: capacity of windows.

    Raises:
      ValueError: the grid exceeds a capacity.
    """
    size, group = config.cells**2 * config.merge**2, config.merge**2
    used, cells_of = height * width, windows(height, width, config)
    if used > patches or len(cells_of) > count:
        raise ValueError(
            f"a grid of {height} x {width} patches and {len(cells_of)} windows "
            f"does not fit {patches} and {count}"
        )
    place, back = np.zeros((patches, 2), np.int32), np.zeros(patches, np.int32)
    window = np.full((count, size), patches, np.int32)
    place[:used] = merge_order(height, width, config.merge)
    for number, cells in enumerate(cells_of):
        inside = (cells[:, None] * group + np.arange(group)).ravel()
        window[number, : len(inside)] = inside
        back[inside] = number * size + np.arange(len(inside))
    return {"place": place, "mask": np.arange(patches) < used, "window": window, "back": back}


def layout(
    ids: Int[np.ndarray, " L"],
    kinds: Int[np.ndarray, " L"],
    shapes: Sequence[tuple[int, int, int]],
    step: float,
    merge: int,
) -> tuple[Int[np.ndarray, "3 L"], Int[np.ndarray, " L"]]:
    """Return time, row and column of tokens, and their number among vision tokens (-1 for text).

    The positions of text continue after the larger side of the preceding picture or video.

    Args:
      ids: the tokens.
      kinds: 0 for text, 1 for a token of a picture, 2 for a token of a video.
      shapes: (t, h, w) of pictures and video, patches, in order.
      step: rotary positions between two temporal grids of a video; products are rounded down.
      merge: side of a cell, patches.
    """
    position, order = np.zeros((3, len(ids)), np.int64), np.full(len(ids), -1)
    order[kinds > 0] = np.arange(np.sum(kinds > 0))
    at = place = 0
    for shape in shapes:
        first = place + int(np.argmax(kinds[place:] > 0))
        position[:, place:first] = at + np.arange(first - place)
        at += first - place
        t, h, w = shape[0], shape[1] // merge, shape[2] // merge
        times = (np.arange(t) * np.float32(step if kinds[first] == 2 else 1)).astype(np.int64)
        grid = np.stack(np.meshgrid(times, np.arange(h), np.arange(w), indexing="ij")).reshape(
            3, -1
        )
        position[:, first : first + grid.shape[1]] = at + grid
        at += max(h, w)
        place = first + grid.shape[1]
    position[:, place:] = at + np.arange(len(ids) - place)
    return position, order
