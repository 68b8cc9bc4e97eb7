"""The Wan2.1 video diffusion transformer, with an optional VACE control branch.

velocity = f(noisy latents, timestep, text, control), velocity = noise - clean latents. Tokens are
2 x 2 patches of latent frames. Each block is self-attention with three-axis rotary positions,
cross-attention to the text, and a feed-forward layer, modulated by the timestep. VACE runs a
second, shorter stack on the control latents. The output of its block g, through a linear layer, is
the hint added to the stream after main block `vace.layers[g]`.

All blocks of a stack are one module whose leaves have a leading layer axis, and which is scanned. A
hint depends only on the control stream, so it is computed immediately before the main block that
uses it. The scan runs over groups of one VACE block and the main blocks up to the next one, so one
hint is in memory at a time.

Sources: Wan, arXiv 2503.20314, github.com/Wan-Video/Wan2.1 wan/modules/model.py; VACE, arXiv
2503.07598.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from jax_idgrpo.errors import UserError
from jax_idgrpo.models.attention import attention, attention_remat_policy
from jax_idgrpo.models.layers import (
    FLOAT32,
    XAVIER,
    Dtypes,
    LayerNorm,
    Linear,
    RMSNorm,
    apply_rotary,
    layer_norm,
    rotary_tables,
    timestep_embedding,
)
from jax_idgrpo.models.lora import LayerLoRA
from jax_idgrpo.parallel import sharding

PATCH = 2  # rows and columns of latents in one token, which covers one latent frame
STACKS = ("blocks", "vace_blocks")
PROJECTIONS = tuple(
    f"{attn}.to_{part}" for attn in ("attn1", "attn2") for part in ["q", "k", "v", "out"]
)

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": attention_remat_policy,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class VaceConfig:
    """Sizes of the control branch.

    Attributes:
      layers: main blocks that receive a hint, in rising order from 0.
      in_channels: channels of the control.
    """

    layers: tuple[int, ...]
    in_channels: int = 96

    def __post_init__(self):
        layers = self.layers
        _require(
            isinstance(layers, tuple), f"vace_layers is a {type(layers).__name__}; make it a tuple"
        )
        _require(len(layers) > 0, "vace_layers is empty; a model without control has none")
        _require(
            layers[0] == 0,
            f"vace_layers starts at {layers[0]}; the first hint belongs to block 0",
        )
        _require(
            all(a < b for a, b in itertools.pairwise(layers)), f"vace_layers {layers} must rise"
        )
        _require(
            self.in_channels >= 1,
            f"vace_in_channels is {self.in_channels}; it must be at least 1",
        )


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes of the network and the execution of its blocks.

    Attributes:
      num_layers: main blocks.
      num_heads: attention heads.
      head_dim: channels of a head, even.
      ffn_dim: inner width of the feed-forward layers.
      text_dim: width of the text embeddings.
      freq_dim: channels of the sinusoidal timestep embedding, even.
      eps: of all norms.
      in_channels: latent channels.
      out_channels: velocity channels.
      rope_max_seq_len: largest extent of the token grid on any axis.
      vace: sizes of the control branch; None is plain Wan.
      rank: of the LoRA on the attention projections of all blocks; 0 is no LoRA.
      alpha: the LoRA is scaled by alpha / rank.
      lora: layers with LoRA if they are others, or if ranks or alphas differ; `rank` and `alpha`
        are then only the most frequent ones. None is the attention projections of all blocks.
      remat: what a block saves for the backward pass. "none" recomputes nothing, "full" saves only
        its input, "attention" its input and the outputs of its attentions, "dots" its input and the
        outputs of its linear layers.
      unroll: unroll the blocks instead of scanning; faster for a few small blocks.
      mesh: devices of the arrays; None is a single device. Results do not depend on it.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    text_dim: int
    freq_dim: int = 256
    eps: float = 1e-6
    in_channels: int = 16
    out_channels: int = 16
    rope_max_seq_len: int = 1024
    vace: VaceConfig | None = None
    rank: int = 0
    alpha: float = 0.0
    lora: tuple[LayerLoRA, ...] | None = None
    remat: str = "none"
    unroll: bool = False
    mesh: Mesh | None = None

    def __post_init__(self):
        sizes = (
            "num_layers",
            "num_heads",
            "head_dim",
            "ffn_dim",
            "text_dim",
            "freq_dim",
            "in_channels",
            "out_channels",
        )
        for name in (*sizes, "rope_max_seq_len"):
            _require(
                getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1"
            )
        _require(
            self.head_dim % 2 == 0,
            f"head_dim is {self.head_dim}; it must be even (rotary embedding rotates pairs)",
        )
        _require(
            self.head_dim >= 6, f"head_dim is {self.head_dim}; three position axes need at least 6"
        )
        _require(
            self.freq_dim % 2 == 0,
            f"freq_dim is {self.freq_dim}; it must be even (half cosines, half sines)",
        )
        _require(self.eps > 0, f"eps is {self.eps}; it must be positive")
        _require(self.rank >= 0, f"rank is {self.rank}; it must be 0 (no adapter) or more")
        _require(
            self.rank == 0 or self.alpha > 0,
            f"alpha is {self.alpha} with rank {self.rank}; it must be positive",
        )
        for layer in self.lora or ():
            count = len(layer.ranks)
            _require(
                count == len(layer.alphas) == (self.depth(layer.name) or 1) and layer.rank > 0,
                f"lora {layer.name} has ranks {layer.ranks} and alphas {layer.alphas}; give one of "
                "each per block",
            )
        _require(self.remat in REMAT, f"remat is {self.remat!r}; choose one of {', '.join(REMAT)}")
        if self.mesh is not None:
            sharding.check_heads(self.mesh, self.num_heads, self.ffn_dim)
        last = max(self.vace_layers, default=-1)
        _require(
            last < self.num_layers,
            f"vace_layers reaches block {last} but num_layers is {self.num_layers}; "
            "blocks count from 0",
        )

    @property
    def width(self) -> int:
        """D, the width of the stream."""
        return self.num_heads * self.head_dim

    @property
    def vace_layers(self) -> tuple[int, ...]:
        """Main blocks that receive a hint; none in plain Wan."""
        return () if self.vace is None else self.vace.layers

    def depth(self, name: str) -> int:
        """Return the number of blocks of the stack that a layer is in; 0 outside the stacks."""
        depths = dict(zip(STACKS, (self.num_layers, len(self.vace_layers)), strict=True))
        return depths.get(name.split(".")[0], 0)

    @property
    def lora_layers(self) -> tuple[LayerLoRA, ...]:
        """The layers with LoRA."""
        if self.rank == 0:
            return ()
        if self.lora is not None:
            return self.lora
        return tuple(
            LayerLoRA(f"{stack}.{name}", (self.rank,) * depth, (self.alpha,) * depth)
            for stack in STACKS
            if (depth := self.depth(stack))
            for name in PROJECTIONS
        )

    def lora_of(self, name: str) -> LayerLoRA | None:
        """Return the LoRA of a layer, by its path without the number of the block."""
        return next((layer for layer in self.lora_layers if layer.name == name), None)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"transformer: {message}")


def wan_1_3b(**changes) -> WanConfig:
    """Return the configuration of Wan2.1-T2V-1.3B, Phantom-Wan-1.3B and RefAlign-1.3B."""
    sizes = {"num_layers": 30, "num_heads": 12, "head_dim": 128, "ffn_dim": 8960, "text_dim": 4096}
    return WanConfig(**(sizes | changes))


def vace_1_3b(**changes) -> WanConfig:
    """Return the configuration of Wan2.1-VACE-1.3B."""
    return wan_1_3b(**({"vace": VaceConfig(tuple(range(0, 30, 2)))} | changes))


def wan_14b(**changes) -> WanConfig:
    """Return the configuration of Wan2.1-T2V-14B and the 14B reference models without control."""
    sizes = {"num_layers": 40, "num_heads": 40, "head_dim": 128, "ffn_dim": 13824, "text_dim": 4096}
    return WanConfig(**(sizes | changes))


def vace_14b(**changes) -> WanConfig:
    """Return the configuration of Wan2.1-VACE-14B."""
    return wan_14b(**({"vace": VaceConfig(tuple(range(0, 40, 5)))} | changes))


class Conditions(NamedTuple):
    """Inputs of every block of both stacks besides its stream and the text.

    Attributes:
      modulation: of the timestep, for shift, scale and gate of attention and feed-forward.
      rotary: cosines and sines of the tokens' rotary angles.
      lengths: tokens per row that are attended to; None attends to all.
      reads_text: True on the tokens that attend to the text; None is all.
    """

    modulation: Float[Array, "B 6 D"]
    rotary: tuple[Float[Array, "N half"], Float[Array, "N half"]]
    lengths: Int[Array, " B"] | None
    reads_text: Bool[Array, " N"] | None = None


KeyValue = tuple[Float[Array, "B keys heads d"], Float[Array, "B keys heads d"]]
"""Keys and values of an attention, in the compute dtype."""


class Skipped(NamedTuple):
    """Main blocks that some rows skip, each with the hint that it would receive.

    Attributes:
      blocks: numbers of the blocks.
      rows: the rows that skip them.
    """

    blocks: tuple[int, ...]
    rows: Bool[Array, " B"]

    def keep(self, block: int | Array, before: Array, after: Array) -> Array:
        """Return the stream after a block: that before it where it is skipped.

        Args:
          block: number of the block.
          before: stream before the block.
          after: stream after the block and its hint.
        """
        rows = self.rows[:, None, None]
        if isinstance(block, int):
            return jnp.where(rows, before, after) if block in self.blocks else after
        chosen = jnp.any(block == jnp.asarray(self.blocks, jnp.int32))
        return jnp.where(rows & chosen, before, after)


class PromptCache(NamedTuple):
    """Activations that depend only on text and control, computed once for all noise levels.

    Attributes:
      main: keys and values of the text for every main block, stacked, or a tuple if the blocks are
        unrolled.
      vace: the same for every VACE block; None for plain Wan.
      control: tokens of the control; None for plain Wan.
    """

    main: PyTree
    vace: PyTree = None
    control: Float[Array, "B N D"] | None = None


def _linear(
    config: WanConfig,
    name: str,
    in_features: int,
    out_features: int,
    *,
    kernel_init: nnx.Initializer = XAVIER,
    dtypes: Dtypes,
    rngs: nnx.Rngs,
) -> Linear:
    """Make a linear layer with the LoRA that the configuration gives it.

    Args:
      config: of the transformer.
      name: path of the layer without the number of the block.
      in_features: width of the input.
      out_features: width of the output.
      kernel_init: of the kernel.
      dtypes: dtype policy.
      rngs: random numbers.
    """
    layer = config.lora_of(name)
    rank, alpha = (0, 0.0) if layer is None else (layer.rank, layer.alpha)
    return Linear(
        in_features,
        out_features,
        rank=rank,
        alpha=alpha,
        kernel_init=kernel_init,
        dtypes=dtypes,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Multi-head attention whose queries and keys are RMS-normalised over the whole width."""

    def __init__(self, config: WanConfig, name: str, *, dtypes: Dtypes, rngs: nnx.Rngs):
        def project(part: str) -> Linear:
            return _linear(
                config, f"{name}.{part}", config.width, config.width, dtypes=dtypes, rngs=rngs
            )

        self.to_q, self.to_k = project("to_q"), project("to_k")
        self.to_v, self.to_out = project("to_v"), project("to_out")
        self.norm_q = RMSNorm(config.width, eps=config.eps)
        self.norm_k = RMSNorm(config.width, eps=config.eps)
        self.num_heads, self.compute, self.mesh = config.num_heads, dtypes.compute, config.mesh

    def key_value(
        self, context: Float[Array, "B keys D"], rotary: tuple[Array, Array] | None = None
    ) -> KeyValue:
        """Project the context to keys and values; `rotary`, if given, is applied to the keys."""
        k, v = self._heads(self.norm_k(self.to_k(context))), self._heads(self.to_v(context))
        return (k if rotary is None else apply_rotary(k, *rotary)).astype(self.compute), v

    def __call__(
        self,
        x: Float[Array, "B N D"],
        key_value: KeyValue,
        rotary: tuple[Array, Array] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Attend from the tokens x to keys and values.

        Args:
          x: queries before their projection.
          key_value: of `key_value`.
          rotary: cosines and sines for self-attention, whose keys are sharded like its queries;
            None for cross-attention.
          lengths: keys per row; None attends to all.
        """
        q = self._heads(self.norm_q(self.to_q(x)))
        q = q if rotary is None else apply_rotary(q, *rotary)
        out = attention(q, *key_value, lengths, mesh=self.mesh, split_keys=rotary is not None)
        return self.to_out(rearrange(out, "b n heads d -> b n (heads d)"))

    def _heads(self, x: Array) -> Array:
        return rearrange(x, "b n (heads d) -> b n heads d", heads=self.num_heads)


class FeedForward(nnx.Module):
    """W2 gelu(W1 x) with the tanh form of gelu."""

    def __init__(self, config: WanConfig, name: str, *, dtypes: Dtypes, rngs: nnx.Rngs):
        inner, width = config.ffn_dim, config.width
        self.linear_1 = _linear(config, f"{name}.linear_1", width, inner, dtypes=dtypes, rngs=rngs)
        self.linear_2 = _linear(config, f"{name}.linear_2", inner, width, dtypes=dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        return self.linear_2(gelu(self.linear_1(x)))


class Block(nnx.Module):
    """Gated self-attention, cross-attention to the text, gated feed-forward; keeps x's dtype."""

    def __init__(self, config: WanConfig, name: str, *, dtypes: Dtypes, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (6, config.width), jnp.float32) / config.width**0.5
        self.scale_shift_table = nnx.Param(table)
        self.attn1 = Attention(config, f"{name}.attn1", dtypes=dtypes, rngs=rngs)
        self.norm2 = LayerNorm(config.width, eps=config.eps)
        self.attn2 = Attention(config, f"{name}.attn2", dtypes=dtypes, rngs=rngs)
        self.ffn = FeedForward(config, f"{name}.ffn", dtypes=dtypes, rngs=rngs)
        self.eps = config.eps

    def __call__(
        self, x: Float[Array, "B N D"], text: KeyValue, conditions: Conditions
    ) -> Float[Array, "B N D"]:
        rows = self.scale_shift_table[...] + conditions.modulation
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (rows[:, i, None, :] for i in range(6))
        h = layer_norm(x, self.eps) * (1 + scale_a) + shift_a
        rotary = conditions.rotary
        key_value = self.attn1.key_value(h, rotary)
        attended = self.attn1(h, key_value, rotary, conditions.lengths)
        x = _add(x, gate_a * attended.astype(jnp.float32))
        from_text = self.attn2(self.norm2(x), text)
        if conditions.reads_text is not None:
            from_text = jnp.where(conditions.reads_text[:, None], from_text, 0)
        x = _add(x, from_text)
        h = layer_norm(x, self.eps) * (1 + scale_f) + shift_f
        return _add(x, gate_f * self.ffn(h).astype(jnp.float32))


class ControlBlock(Block):
    """A VACE block: a block with a linear layer that maps its output to a hint."""

    def __init__(self, config: WanConfig, name: str, *, dtypes: Dtypes, rngs: nnx.Rngs):
        super().__init__(config, name, dtypes=dtypes, rngs=rngs)
        self.proj_out = _linear(
            config,
            f"{name}.proj_out",
            config.width,
            config.width,
            kernel_init=SMALL,
            dtypes=dtypes,
            rngs=rngs,
        )

    def hint(self, c: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Map the control stream after this block to the hint."""
        return self.proj_out(c).astype(c.dtype)


def _add(x: Array, update: Array) -> Array:
    """Add in float32 and cast to x's dtype."""
    return (x.astype(jnp.float32) + update.astype(jnp.float32)).astype(x.dtype)


# Layers that add to a stream start small instead of at zero, so that all layers before them receive
# a gradient from the first step.
SMALL = nnx.initializers.normal(0.02)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """Compute the tanh form of gelu in float32; the backward pass saves only x."""
    return (x.astype(jnp.float32) * _gate(x)[0]).astype(x.dtype)


def _gate(x: Array) -> tuple[Array, Array]:
    """Compute the gate (1 + tanh u) / 2 and du/dx, u = sqrt(2 / pi) (x + 0.044715 x^3); float32."""
    x = x.astype(jnp.float32)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    return (1 + jnp.tanh(scale * (x + cubic * x**3))) / 2, scale * (1 + 3 * cubic * x**2)


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    # Without the barrier XLA would save the forward pass's tanh.
    gate, slope = _gate(jax.lax.optimization_barrier(x))
    dx = dy.astype(jnp.float32) * (gate + 2 * x.astype(jnp.float32) * gate * (1 - gate) * slope)
    return (dx.astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class Embedder(nnx.Module):
    """Linear, activation, linear."""

    def __init__(
        self,
        config: WanConfig,
        name: str,
        features: int,
        activation: Callable,
        *,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
    ):
        def linear(part: str, inputs: int) -> Linear:
            return _linear(
                config,
                f"{name}.{part}",
                inputs,
                config.width,
                kernel_init=SMALL,
                dtypes=dtypes,
                rngs=rngs,
            )

        self.linear_1 = linear("linear_1", features)
        self.linear_2 = linear("linear_2", config.width)
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch D"]:
        return self.linear_2(self.activation(self.linear_1(x)))


class ConditionEmbedder(nnx.Module):
    """Embed the timestep, in float32, and the text for the blocks."""

    def __init__(self, config: WanConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        name, width = "condition_embedder", config.width
        self.time_embedder = Embedder(
            config,
            f"{name}.time_embedder",
            config.freq_dim,
            jax.nn.silu,
            dtypes=FLOAT32,
            rngs=rngs,
        )
        self.time_proj = _linear(
            config, f"{name}.time_proj", width, 6 * width, dtypes=FLOAT32, rngs=rngs
        )
        self.text_embedder = Embedder(
            config, f"{name}.text_embedder", config.text_dim, gelu, dtypes=dtypes, rngs=rngs
        )
        self.freq_dim = config.freq_dim

    def __call__(
        self, timesteps: Int[Array, " B"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B 6 D"]]:
        """Return the modulations of the head and of the blocks."""
        time = self.time_embedder(timestep_embedding(timesteps, self.freq_dim))
        rows = self.time_proj(jax.nn.silu(time))
        return time, rearrange(rows, "b (part d) -> b part d", part=6)


class WanTransformer(nnx.Module):
    """The network of the module's docstring.

    `WanTransformer(replace(config, rank=0))` is the same network without the adapter.
    """

    def __init__(self, config: WanConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        width, patch = config.width, PATCH * PATCH
        self.config, self.dtypes = config, dtypes
        self.patch_embedding = Linear(patch * config.in_channels, width, dtypes=dtypes, rngs=rngs)
        self.condition_embedder = ConditionEmbedder(config, dtypes=dtypes, rngs=rngs)
        self.blocks = _stack(Block, "blocks", config, dtypes, rngs)
        if config.vace is not None:
            self.vace_patch_embedding = Linear(
                patch * config.vace.in_channels, width, dtypes=dtypes, rngs=rngs
            )
            self.vace_proj_in = _linear(
                config, "vace_proj_in", width, width, dtypes=dtypes, rngs=rngs
            )
            self.vace_blocks = _stack(ControlBlock, "vace_blocks", config, dtypes, rngs)
        self.scale_shift_table = nnx.Param(
            jax.random.normal(rngs.params(), (2, width), jnp.float32) / width**0.5
        )
        self.proj_out = _linear(
            config,
            "proj_out",
            width,
            patch * config.out_channels,
            kernel_init=SMALL,
            dtypes=FLOAT32,
            rngs=rngs,
        )

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        text: Array,
        control: Array | None = None,
        control_scale: float | Array = 1.0,
        frame_mask: Array | None = None,
    ) -> Float[Array, "B T H W C"]:
        """Compute the velocity, float32.

        Args:
          latents: [B,T,H,W,16], normalised, H and W even.
          timesteps: [B], integers 0 .. 999.
          text: [B,L,text_dim], zero after the prompt's end. All L tokens are attended to, as in the
            published models.
          control: [B,T,H,W,96], for VACE only.
          control_scale: one number, or one per VACE block.
          frame_mask: [B,T], True on a row's first frames. The frames after them are not attended
            to, and their velocity is undefined. None is all True.

        Raises:
          UserError: shapes do not fit.
        """
        return self.velocity(
            latents, timesteps, self.prefill(text, control), control_scale, frame_mask
        )

    def prefill(self, text: Array, control: Array | None = None) -> PromptCache:
        """Compute the cache of `velocity` from text and control, which are as in `__call__`.

        Text and control may have different numbers of rows: guidance branches share their control,
        and its tokens are repeated afterwards.
        """
        config = self.config
        self._check_prompt(text, control)
        context = sharding.shard_batch(
            config.mesh, self.condition_embedder.text_embedder(text.astype(self.dtypes.compute))
        )
        if control is None:
            return PromptCache(self._key_values("blocks", context))
        tokens = self.vace_proj_in(self.vace_patch_embedding(self._shard_patches(control)))
        return PromptCache(
            self._key_values("blocks", context),
            self._key_values("vace_blocks", context),
            tokens,
        )

    def velocity(
        self,
        latents: Array,
        timesteps: Array,
        cache: PromptCache,
        control_scale: float | Array = 1.0,
        frame_mask: Array | None = None,
        text_frames: int | None = None,
        skipped: Skipped | None = None,
    ) -> Float[Array, "B T H W C"]:
        """Compute the velocity as `__call__` does, from the cache of the prompt.

        Args:
          latents: as in `__call__`.
          timesteps: as in `__call__`.
          cache: of `prefill`, by this network with its present adapter.
          control_scale: as in `__call__`.
          frame_mask: as in `__call__`.
          text_frames: only the tokens of the first `text_frames` frames attend to the text; None is
            all.
          skipped: blocks that some rows skip.

        Raises:
          UserError: shapes do not fit.
        """
        config = self.config
        self._check(latents, timesteps, cache, frame_mask)
        last = config.num_layers - 1
        _require(
            skipped is None or max(skipped.blocks, default=0) <= last,
            f"weakened: blocks {list(skipped.blocks if skipped else ())} are to be skipped, and the "
            f"transformer has blocks 0 to {last}",
        )
        b, frames, height, width, _ = latents.shape
        grid = (frames, height // PATCH, width // PATCH)
        tokens = frames * grid[1] * grid[2]
        time, modulation = (
            sharding.shard_batch(config.mesh, a) for a in self.condition_embedder(timesteps)
        )
        x = self.patch_embedding(self._shard_patches(latents)).astype(self.dtypes.residual)
        padding = x.shape[1] - tokens
        lengths = None if frame_mask is None else jnp.sum(frame_mask, axis=1) * (grid[1] * grid[2])
        if padding and lengths is None:
            lengths = jnp.full(b, tokens, jnp.int32)
        cos, sin = (
            jnp.pad(table, ((0, padding), (0, 0)))
            for table in rotary_tables(config.head_dim, *grid)
        )
        reads_text = (
            None
            if text_frames is None
            else jnp.arange(x.shape[1]) < text_frames * (grid[1] * grid[2])
        )
        conditions = Conditions(modulation, (cos, sin), lengths, reads_text)
        if cache.control is None:
            x = self._run_plain(x, cache, conditions, skipped)
        else:
            x = self._run_groups(
                x, _add(x, cache.control), self._scale(control_scale), cache, conditions, skipped
            )

        rows = self.scale_shift_table[...] + time[:, None, :]
        shift, scale = rows[:, :, None, :].swapaxes(0, 1)
        y = self.proj_out(layer_norm(x, config.eps) * (1 + scale) + shift)
        y = sharding.shard_batch(config.mesh, y)[:, :tokens]
        t, h, w = grid
        return rearrange(
            y, "b (t h w) (p q c) -> b t (h p) (w q) c", t=t, h=h, w=w, p=PATCH, q=PATCH
        )

    def _shard_patches(self, x: Array) -> Float[Array, "B N features"]:
        """Cut x into patches, append zero tokens if the mesh needs them, and shard the tokens."""
        mesh, tokens = self.config.mesh, _patches(x)
        padding = sharding.padded(mesh, tokens.shape[1]) - tokens.shape[1]
        return sharding.shard_tokens(mesh, jnp.pad(tokens, ((0, 0), (0, padding), (0, 0))))

    def _key_values(self, stack: str, context: Float[Array, "B L D"]) -> PyTree:
        """Compute keys and values of the text for every block, in the layout of `PromptCache`."""
        graph, parameters = self._split(stack)
        mesh = self.config.mesh

        def key_value(block: nnx.State) -> KeyValue:
            attn2 = nnx.merge(graph, sharding.unshard_fsdp(mesh, block)).attn2
            return tuple(sharding.shard_heads(mesh, x) for x in attn2.key_value(context))

        key_value = self._remat(key_value)
        if self.config.unroll:
            return tuple(key_value(block) for block in _unstack(parameters))
        return jax.lax.map(key_value, parameters)

    def _run_plain(
        self, x: Array, cache: PromptCache, conditions: Conditions, skipped: Skipped | None
    ) -> Array:
        apply, blocks = self._applied("blocks", conditions)
        if self.config.unroll:
            for number, (block, text) in enumerate(zip(_unstack(blocks), cache.main, strict=True)):
                y = apply(block, x, text)
                x = y if skipped is None else skipped.keep(number, x, y)
            return x
        if skipped is None:
            return jax.lax.scan(
                lambda x, part: (apply(part[0], x, part[1]), None), x, (blocks, cache.main)
            )[0]
        numbers = jnp.arange(self.config.num_layers)
        return jax.lax.scan(
            lambda x, part: (skipped.keep(part[2], x, apply(part[0], x, part[1])), None),
            x,
            (blocks, cache.main, numbers),
        )[0]

    def _run_groups(
        self,
        x: Array,
        c: Array,
        scale: Array,
        cache: PromptCache,
        conditions: Conditions,
        skipped: Skipped | None,
    ) -> Array:
        apply, blocks = self._applied("blocks", conditions)
        apply_control, controls = self._applied("vace_blocks", conditions)
        control_graph = nnx.graphdef(self.vace_blocks)

        def control(
            c: Array, parameters: nnx.State, text: KeyValue, scale: Array
        ) -> tuple[Array, Array]:
            c = apply_control(parameters, c, text)
            return c, scale * nnx.merge(control_graph, parameters).hint(c)

        if self.config.unroll:
            mains = enumerate(zip(_unstack(blocks), cache.main, strict=True))
            for parameters, key_value, s, size in zip(
                _unstack(controls), cache.vace, scale, group_sizes(self.config), strict=True
            ):
                c, hint = control(c, parameters, key_value, s)
                for place, (number, (block, text)) in enumerate(itertools.islice(mains, size)):
                    y = apply(block, x, text)
                    if place == 0:
                        y = y + hint
                    x = y if skipped is None else skipped.keep(number, x, y)
            return x

        def group(carry: tuple[Array, Array], parts: tuple) -> tuple[tuple[Array, Array], None]:
            x, c = carry
            (parameters, text), scale, mains, first, *numbers = parts
            c, hint = control(c, parameters, text, scale)

            def main(x: Array, part: tuple) -> tuple[Array, None]:
                (block, text), first, *number = part
                # One body for first and later blocks halves the program.
                y = apply(block, x, text) + jnp.where(first, hint, 0)
                return y if skipped is None else skipped.keep(number[0], x, y), None

            return (jax.lax.scan(main, x, (mains, first, *numbers))[0], c), None

        at = done = 0
        for size, run in itertools.groupby(group_sizes(self.config)):
            count = len(list(run))
            mains = _rows((blocks, cache.main), at, count * size, (count, size))
            first = jnp.broadcast_to(jnp.arange(size) == 0, (count, size))
            parts = (
                _rows((controls, cache.vace), done, count, (count,)),
                scale[done : done + count],
                mains,
                first,
                *(() if skipped is None else (at + jnp.arange(count * size).reshape(count, size),)),
            )
            (x, c), _ = jax.lax.scan(group, (x, c), parts)
            at, done = at + count * size, done + count
        return x

    def _split(self, stack: str) -> tuple[nnx.GraphDef, nnx.State]:
        """Split a stack of blocks; B of every block is multiplied by its own scale if they differ."""
        graph, parameters = nnx.split(getattr(self, stack))
        scales = {
            f"{layer.name.partition('.')[2].replace('.', '/')}/lora_b": layer.scales
            for layer in self.config.lora_layers
            if layer.name.startswith(f"{stack}.") and not layer.uniform
        }

        def scale(path: tuple, leaf: Array) -> Array:
            name = sharding.leaf_name(path)
            return leaf * scales[name] if name in scales else leaf

        return graph, jax.tree_util.tree_map_with_path(scale, parameters) if scales else parameters

    def _applied(self, stack: str, conditions: Conditions) -> tuple[Callable, nnx.State]:
        """Return a function that applies one block under the remat policy, and stacked parameters.

        The function maps (parameters of a block, stream, the text's keys and values) to a stream.
        """
        graph, parameters = self._split(stack)
        mesh = self.config.mesh

        def apply(block: nnx.State, x: Array, text: KeyValue) -> Array:
            return sharding.shard_tokens(
                mesh, nnx.merge(graph, sharding.unshard_fsdp(mesh, block))(x, text, conditions)
            )

        return self._remat(apply), parameters

    def _remat(self, function: Callable) -> Callable:
        policy = REMAT[self.config.remat]
        return function if policy is None else jax.checkpoint(function, policy=policy)

    def _scale(self, control_scale: float | Array) -> Float[Array, " blocks"]:
        """Broadcast to one scale per VACE block, in the stream's dtype so that hints keep it."""
        scale = jnp.asarray(control_scale, self.dtypes.residual)
        count = len(self.config.vace_layers)
        _require(
            scale.shape in ((), (count,)),
            f"control_scale has shape {scale.shape}; give a number or {count} of them",
        )
        return jnp.broadcast_to(scale, (count,))

    def _check_prompt(self, text: Array, control: Array | None) -> None:
        config = self.config
        _require(
            text.ndim == 3 and text.shape[2] == config.text_dim,
            f"text has shape {text.shape}; expected [B,L,{config.text_dim}]",
        )
        _require(
            control is None or config.vace is not None,
            "control was given, but this model has no VACE blocks",
        )
        _require(control is not None or config.vace is None, "this is a VACE model; give control")
        if control is not None and config.vace is not None:
            channels = config.vace.in_channels
            _require(
                control.ndim == 5 and control.shape[-1] == channels,
                f"control has shape {control.shape}; expected [B,T,H,W,{channels}]",
            )

    def _check(
        self, latents: Array, timesteps: Array, cache: PromptCache, frame_mask: Array | None
    ) -> None:
        config, shape = self.config, latents.shape
        _require(
            len(shape) == 5 and shape[-1] == config.in_channels,
            f"latents have shape {shape}; expected [B,T,H,W,{config.in_channels}]",
        )
        _require(
            shape[2] % PATCH == 0 and shape[3] % PATCH == 0,
            f"latents are {shape[2]}x{shape[3]}; make both even",
        )
        _require(
            max(shape[1], shape[2] // PATCH, shape[3] // PATCH) <= config.rope_max_seq_len,
            f"latents {shape} reach beyond rope_max_seq_len {config.rope_max_seq_len}",
        )
        _require(
            timesteps.shape == shape[:1],
            f"timesteps have shape {timesteps.shape}; expected [{shape[0]}]",
        )
        _require(
            jnp.issubdtype(timesteps.dtype, jnp.integer),
            f"timesteps are {timesteps.dtype}; give integers 0 .. 999",
        )
        rows = jax.tree.leaves(cache.main)[0].shape[-4]
        _require(rows == shape[0], f"text has {rows} rows; expected the {shape[0]} of the latents")
        if cache.control is not None:
            tokens = sharding.padded(
                config.mesh, shape[1] * (shape[2] // PATCH) * (shape[3] // PATCH)
            )
            _require(
                cache.control.shape[:2] == (shape[0], tokens),
                f"control has {cache.control.shape[:2]} rows and tokens; "
                f"expected the {(shape[0], tokens)} of the latents",
            )
        if frame_mask is not None:
            _require(
                frame_mask.shape == shape[:2],
                f"frame_mask has shape {frame_mask.shape}; expected {shape[:2]}",
            )


def group_sizes(config: WanConfig) -> list[int]:
    """Return the number of main blocks in each group; the first of a group receives its hint."""
    return [b - a for a, b in itertools.pairwise((*config.vace_layers, config.num_layers))]


def _stack(
    block: type[Block], name: str, config: WanConfig, dtypes: Dtypes, rngs: nnx.Rngs
) -> Block:
    """Initialise the blocks of a stack as one module whose leaves have a leading axis.

    Args:
      block: class of the blocks.
      name: of the stack.
      config: of the network.
      dtypes: dtype policy.
      rngs: split over the blocks.
    """

    @nnx.split_rngs(splits=config.depth(name))
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> Block:
        return block(config, name, dtypes=dtypes, rngs=rngs)

    stack = make(rngs)
    for layer in config.lora_layers:
        if layer.name.startswith(f"{name}.") and not layer.uniform:
            linear = functools.reduce(getattr, layer.name.split(".")[1:], stack)
            linear.lora_a[...] = linear.lora_a[...] * layer.initial
    return stack


def _rows(stacked: PyTree, start: int, count: int, shape: tuple[int, ...]) -> PyTree:
    """Slice `count` layers from `start` on and reshape their axis to `shape`.

    Args:
      stacked: pytree of arrays with a leading layer axis.
      start: first layer.
      count: number of layers, the product of `shape`.
      shape: new leading axes.
    """
    return jax.tree.map(
        lambda leaf: leaf[start : start + count].reshape(*shape, *leaf.shape[1:]), stacked
    )


def unstack_blocks(parameters: nnx.State) -> nnx.State:
    """Split the stacked arrays of the blocks into tuples, which an unrolled network uses directly.

    XLA has no views: an unrolled program would copy every layer out of its stack at each call.
    """

    def split(path: tuple, leaf: Array) -> Array | tuple[Array, ...]:
        return _layers(leaf) if path[0].key in ("blocks", "vace_blocks") else leaf

    return jax.jit(lambda tree: jax.tree_util.tree_map_with_path(split, tree))(parameters)


def _layers(leaf: Array | tuple[Array, ...]) -> tuple[Array, ...]:
    """Split into one array per layer.

    `lax.split`, unlike slices, has a gradient that concatenates instead of adding padded arrays.
    """
    return (
        leaf
        if isinstance(leaf, tuple)
        else tuple(part[0] for part in jax.lax.split(leaf, (1,) * len(leaf)))
    )


def _unstack(parameters: nnx.State) -> list[nnx.State]:
    """Split a stacked state into one state per layer."""
    leaves, treedef = jax.tree.flatten(parameters, is_leaf=lambda node: isinstance(node, tuple))
    return [jax.tree.unflatten(treedef, layer) for layer in zip(*map(_layers, leaves), strict=True)]


def _patches(x: Float[Array, "B T H W C"]) -> Float[Array, "B N features"]:
    """Cut latents into patches: tokens ordered (frame, row, column).

    Features are ordered (row in patch, column in patch, channel).
    """
    return rearrange(x, "b t (h p) (w q) c -> b (t h w) (p q c)", p=PATCH, q=PATCH)
