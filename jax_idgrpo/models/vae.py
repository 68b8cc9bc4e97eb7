"""The Wan2.1 video autoencoder: 9 frames of 64x64 pixels to 3 latent frames of 8x8x16, and back.

Time shrinks by 4, height and width by 8. Frame 0 has its own latent frame, so a picture is a video
of one frame. Every convolution over time is causal: its input is the current frame and the frames
before it, with two zero frames before frame 0.

Frame 0 is treated separately at each change of the frame rate (F = 1 + 4n frames, T = 1 + n latent
frames):

    halving    y = [x_0, w * (x_0, x_1, x_2), w * (x_2, x_3, x_4), ...]
    doubling   y = [x_0, a_1, b_1, a_2, b_2, ...],  (a_i, b_i) = w * (x_{i-2}, x_{i-1}, x_i)

Halving copies frame 0, which is also an input of the next one. Doubling does not double frame 0 and
replaces it by zero in the convolution.

Architecture: Wan2.1, `wan/modules/vae.py`, and diffusers, `autoencoder_kl_wan.py`. Weights and
activations are float32. Encoding asks for products of full float32 precision, as it runs once per
photo. Decoding takes the machine's default: bfloat16 operands on TPU and TF32 on GPU.

Long videos run in chunks (`chunk=`), for which each convolution stores its last input frames in a
`Memory`. The result is the same for every chunk size and for the whole video at once; only the peak
memory differs.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from jax_idgrpo import flow
from jax_idgrpo.flow import FRAMES_PER_LATENT

PIXELS_PER_LATENT = 8
LARGEST_ACTIVATION = 2**28  # bytes of a full-resolution activation; longer videos run in chunks
ATTENTION_LOGITS = 2**25  # largest number of float32 attention logits in memory, 128 MiB


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder and the statistics that normalise its latents.

    Attributes:
      base_dim: level i has base_dim * dim_mult[i] channels.
      dim_mult: one factor per level; level 0 is at full resolution.
      num_res_blocks: residual blocks of a level of the encoder; the decoder has one more.
      temporal_downsample: whether the step from level i to i + 1 also halves the frame rate.
      latents_mean: mean of each latent channel.
      latents_std: standard deviation of each latent channel.
      z_dim: latent channels.
    """

    base_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    z_dim: int = 16

    def __post_init__(self):
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries, "
                f"the {len(self.dim_mult)} levels of dim_mult have {len(self.dim_mult) - 1} steps "
                "between them"
            )
        if 2 ** len(self.temporal_downsample) != PIXELS_PER_LATENT:
            raise ValueError(
                "dim_mult needs 4 levels, so that 8 pixels become one latent; "
                f"it has {len(self.dim_mult)}"
            )
        if 2 ** sum(self.temporal_downsample) != FRAMES_PER_LATENT:
            raise ValueError(
                f"temporal_downsample must hold two True entries: {self.temporal_downsample}"
            )
        if len(self.latents_mean) != self.z_dim or len(self.latents_std) != self.z_dim:
            raise ValueError(f"latents_mean and latents_std need z_dim = {self.z_dim} entries each")
        if any(self.base_dim * multiple % 2 for multiple in self.dim_mult[1:]):
            raise ValueError(
                "every level above the first needs an even width: "
                f"{self.base_dim} * {self.dim_mult}"
            )


class Memory:
    """Frames that the causal convolutions carry from one chunk of a video to the next.

    The entries are in the order in which the convolutions run.

    Attributes:
      first: whether the chunk begins with frame 0.
      stored: frames for the next chunk, filled by `before`.
    """

    def __init__(self, previous: list[Float[Array, "B n h w C"]] | None = None):
        self.first = previous is None
        self.stored: list[Float[Array, "B n h w C"]] = []
        self._previous = previous or []

    def before(self, x: Float[Array, "B t h w C"], count: int) -> Float[Array, "B count h w C"]:
        """Return the `count` frames before x, and store the last `count` frames for the next chunk.

        In the first chunk they are zeros.
        """
        shape = (x.shape[0], count, *x.shape[2:])
        past = jnp.zeros(shape, x.dtype) if self.first else self._previous[len(self.stored)]
        self.stored.append(jnp.concatenate([past, x], axis=1)[:, -count:])
        return past


def _fan_in_normal(key: Array, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    return jax.random.normal(key, shape, jnp.float32) / fan_in**0.5


class RMSNorm(nnx.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over the channels.

    Near zero input the result differs from the RMSNorm that adds an epsilon to the mean square.
    """

    def __init__(self, channels: int):
        self.gamma = nnx.Param(jnp.ones(channels, jnp.float32))

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        square = jnp.sum(x * x, axis=-1, keepdims=True)
        # The maximum is of the square, so that a gradient exists at x = 0.
        inverse = jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        return x * inverse * (x.shape[-1] ** 0.5 * self.gamma[...])


class Dense(nnx.Module):
    """A 1x1x1 convolution: kernel [in, out]."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(
            _fan_in_normal(rngs.params(), (in_channels, out_channels), in_channels)
        )
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32))

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch out"]:
        flat = x.reshape(-1, x.shape[-1]) @ self.kernel[...]
        return (flat + self.bias[...]).reshape(*x.shape[:-1], -1)


class FrameConv(nnx.Module):
    """A 3x3 convolution of each frame: kernel [3, 3, in, out]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        padding: tuple[int, int],
        rngs: nnx.Rngs,
    ):
        shape = (3, 3, in_channels, out_channels)
        self.kernel = nnx.Param(_fan_in_normal(rngs.params(), shape, 9 * in_channels))
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32))
        self.stride, self.padding = stride, padding

    def __call__(self, x: Float[Array, "B t h w C"]) -> Float[Array, "B t H W out"]:
        frames = x.reshape(-1, *x.shape[2:])
        y = _conv2d(frames, self.kernel[...], self.stride, self.padding) + self.bias[...]
        return y.reshape(*x.shape[:2], *y.shape[1:])


class CausalConv(nnx.Module):
    """A 3x3x3 convolution over a frame and the two before it: kernel [3 (time), 3, 3, in, out].

    At initialisation the taps of the two earlier frames are zero.
    """

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        last = _fan_in_normal(rngs.params(), (1, 3, 3, in_channels, out_channels), 9 * in_channels)
        self.kernel = nnx.Param(jnp.pad(last, ((2, 0), (0, 0), (0, 0), (0, 0), (0, 0))))
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32))

    def __call__(self, x: Float[Array, "B t h w C"], memory: Memory) -> Float[Array, "B t h w out"]:
        past = memory.before(x, 2)
        if memory.first and x.shape[1] == 1:  # the earlier taps multiply zeros
            y = _conv2d(x[:, 0], self.kernel[2], 1, (1, 1))[:, None]
        else:
            y = jax.lax.platform_dependent(
                jnp.concatenate([past, x], axis=1),
                self.kernel[...],
                cpu=_stacked_conv3d,
                default=_conv3d,
            )
        return y + self.bias[...]


class TimeConv(nnx.Module):
    """A convolution over three frames at one pixel: kernel [3, in, out].

    At initialisation the output channels are copies of the newest frame.
    """

    def __init__(self, in_channels: int, out_channels: int):
        newest = jnp.tile(jnp.eye(in_channels, dtype=jnp.float32), (1, out_channels // in_channels))
        self.kernel = nnx.Param(jnp.stack([jnp.zeros_like(newest), jnp.zeros_like(newest), newest]))
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32))

    def __call__(self, x: Float[Array, "B t h w C"], stride: int) -> Float[Array, "B s h w out"]:
        """Convolve windows of three frames, `stride` apart, without padding."""
        count = (x.shape[1] - 3) // stride + 1
        taps = [x[:, k : k + stride * (count - 1) + 1 : stride] for k in range(3)]
        stacked = jnp.concatenate(taps, axis=-1)
        y = stacked.reshape(-1, stacked.shape[-1]) @ self.kernel[...].reshape(
            -1, self.kernel.shape[-1]
        )
        return (y + self.bias[...]).reshape(*stacked.shape[:-1], -1)


def _conv2d(x, kernel, stride, padding):
    """Convolve x [images,h,w,C] with kernel [3,3,C,out].

    Args:
      x: images.
      kernel: of the convolution.
      stride: of height and width.
      padding: (before, after), of height and width.
    """
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _conv3d(x, kernel):
    """Convolve x [B,t+2,h,w,C] with kernel [3,3,3,C,out] to [B,t,h,w,out], padded in space."""
    padding = ((0, 0), (1, 1), (1, 1))
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1, 1), padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _stacked_conv3d(x, kernel):
    """Compute `_conv3d` as a 2-D convolution of stacked frames, which is 6x faster on the CPU."""
    frames = x.shape[1] - 2
    stacked = jnp.concatenate([x[:, k : k + frames] for k in range(3)], axis=-1)
    flat = kernel.transpose(1, 2, 0, 3, 4).reshape(3, 3, -1, kernel.shape[-1])
    y = _conv2d(stacked.reshape(-1, *stacked.shape[2:]), flat, 1, (1, 1))
    return y.reshape(*x.shape[:1], frames, *y.shape[1:])


class ResBlock(nnx.Module):
    """x' + conv2(silu(norm2(conv1(silu(norm1(x)))))); x' = x or a Dense of x."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(in_channels)
        self.conv1 = CausalConv(in_channels, out_channels, rngs=rngs)
        self.norm2 = RMSNorm(out_channels)
        self.conv2 = CausalConv(out_channels, out_channels, rngs=rngs)
        self.conv_shortcut = (
            None if in_channels == out_channels else Dense(in_channels, out_channels, rngs=rngs)
        )

    def __call__(self, x: Float[Array, "B t h w C"], memory: Memory) -> Float[Array, "B t h w out"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)), memory)
        h = self.conv2(jax.nn.silu(self.norm2(h)), memory)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nnx.Module):
    """x + proj(attention(norm(x))) within each frame, with one head."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = RMSNorm(channels)
        self.to_qkv = Dense(channels, 3 * channels, rngs=rngs)
        self.proj = Dense(channels, channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w C"]) -> Float[Array, "B t h w C"]:
        _, _, height, width, channels = x.shape
        positions = height * width
        qkv = rearrange(
            self.to_qkv(self.norm(x)), "b t h w (part c) -> t b (h w) part c", part=3, c=channels
        )

        # Maps over frames, not rows, so that the rows may be sharded.
        def attend(qkv):  # [B, positions, 3, C] of one frame
            q, k, v = jnp.moveaxis(qkv, 2, 0)
            return jax.nn.softmax(q @ k.mT * channels**-0.5, axis=-1) @ v

        attended = jax.lax.map(attend, qkv, batch_size=max(1, ATTENTION_LOGITS // positions**2))
        return x + self.proj(rearrange(attended, "t b (h w) c -> b t h w c", h=height))


class Downsample(nnx.Module):
    """Halve height and width, and with `time` the frame rate; the channels are unchanged."""

    def __init__(self, channels: int, time: bool, *, rngs: nnx.Rngs):
        self.resample = FrameConv(channels, channels, stride=2, padding=(0, 1), rngs=rngs)
        self.time_conv = TimeConv(channels, channels) if time else None

    def __call__(
        self, x: Float[Array, "B t h w C"], memory: Memory
    ) -> Float[Array, "B s h/2 w/2 C"]:
        x = self.resample(x)
        if self.time_conv is None:
            return x
        past = memory.before(x, 1)
        if not memory.first:
            return self.time_conv(jnp.concatenate([past, x], axis=1), stride=2)
        if x.shape[1] == 1:
            return x
        return jnp.concatenate([x[:, :1], self.time_conv(x, stride=2)], axis=1)


class Upsample(nnx.Module):
    """Double height and width, and with `time` the frame rate; halve the channels."""

    def __init__(self, channels: int, time: bool, *, rngs: nnx.Rngs):
        self.time_conv = TimeConv(channels, 2 * channels) if time else None
        self.resample = FrameConv(channels, channels // 2, stride=1, padding=(1, 1), rngs=rngs)

    def __call__(
        self, x: Float[Array, "B t h w C"], memory: Memory
    ) -> Float[Array, "B s 2*h 2*w C/2"]:
        if self.time_conv is not None:
            frame_0, rest = (x[:, :1], x[:, 1:]) if memory.first else (x[:, :0], x)
            past = memory.before(rest, 2)
            if rest.shape[1]:
                rest = _double_frames(
                    self.time_conv(jnp.concatenate([past, rest], axis=1), stride=1)
                )
                x = jnp.concatenate([frame_0, rest], axis=1)
        return self.resample(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))


def _double_frames(x: Float[Array, "B t h w C"]) -> Float[Array, "B 2*t h w C/2"]:
    """Split each frame into two by its channels; the first half is the earlier frame."""
    return rearrange(x, "b t h w (half c) -> b (t half) h w c", half=2)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResBlock(channels, channels, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(channels, rngs=rngs)])

    def __call__(self, x: Float[Array, "B t h w C"], memory: Memory) -> Float[Array, "B t h w C"]:
        x = self.attentions[0](self.resnets[0](x, memory))
        return self.resnets[1](x, memory)


class UpBlock(nnx.Module):
    """num_res_blocks + 1 residual blocks, and an upsampling except in the last level."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_res_blocks: int,
        up: Upsample | None,
        *,
        rngs: nnx.Rngs,
    ):
        widths = [in_channels] + [out_channels] * num_res_blocks
        self.resnets = nnx.List([ResBlock(width, out_channels, rngs=rngs) for width in widths])
        self.upsamplers = nnx.List([] if up is None else [up])

    def __call__(self, x: Float[Array, "B t h w C"], memory: Memory) -> Float[Array, "B s H W out"]:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x, memory)
        return x


class Encoder(nnx.Module):
    """Map a video to mean and log-variance, before the last 1x1x1 convolution."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = [config.base_dim * multiple for multiple in config.dim_mult]
        self.conv_in = CausalConv(3, config.base_dim, rngs=rngs)
        blocks, channels = [], config.base_dim
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                blocks.append(ResBlock(channels, width, rngs=rngs))
                channels = width
            if level < len(config.temporal_downsample):
                blocks.append(Downsample(width, config.temporal_downsample[level], rngs=rngs))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(channels, rngs=rngs)
        self.norm_out = RMSNorm(channels)
        self.conv_out = CausalConv(channels, 2 * config.z_dim, rngs=rngs)

    def __call__(
        self, video: Float[Array, "B F H W 3"], memory: Memory
    ) -> Float[Array, "B T H/8 W/8 C"]:
        x = self.conv_in(video, memory)
        for block in self.down_blocks:
            x = block(x, memory)
        x = self.mid_block(x, memory)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), memory)


class Decoder(nnx.Module):
    """Map latents, after the first 1x1x1 convolution, to a video that is not clamped."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = [config.base_dim * multiple for multiple in config.dim_mult[::-1]]
        doubles = config.temporal_downsample[::-1]
        self.conv_in = CausalConv(config.z_dim, widths[0], rngs=rngs)
        self.mid_block = MidBlock(widths[0], rngs=rngs)
        blocks, channels = [], widths[0]
        for level, width in enumerate(widths):
            up = Upsample(width, doubles[level], rngs=rngs) if level < len(doubles) else None
            blocks.append(UpBlock(channels, width, config.num_res_blocks, up, rngs=rngs))
            channels = width // 2
        self.up_blocks = nnx.List(blocks)
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 3, rngs=rngs)

    def __call__(
        self, latents: Float[Array, "B T h w z"], memory: Memory
    ) -> Float[Array, "B F 8*h 8*w 3"]:
        x = self.mid_block(self.conv_in(latents, memory), memory)
        for block in self.up_blocks:
            x = block(x, memory)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), memory)


class WanVAE(nnx.Module):
    """The autoencoder.

    Videos are float32 in [-1, 1], with F = 1 + 4n frames, and height and width multiples of 8.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = Dense(2 * config.z_dim, 2 * config.z_dim, rngs=rngs)
        self.post_quant_conv = Dense(config.z_dim, config.z_dim, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(
        self,
        video: Float[ArrayLike, "B F H W 3"],
        chunk: int | Literal["auto"] | None = "auto",
        noise: Float[ArrayLike, "B T H/8 W/8 z"] | None = None,
    ) -> Float[Array, "B T H/8 W/8 z"]:
        """Encode to normalised latents, (posterior mean - latents_mean) / latents_std.

        Args:
          video: in [-1, 1].
          chunk: latent frames (of 4 video frames) per chunk; None runs the whole video at once,
            "auto" decides by its size (see `chunk`).
          noise: standard normal noise, which makes the result a sample of the posterior; None takes
            its mean.

        Raises:
          ValueError: F is not 1 + 4n, or height or width is not a multiple of 8.
        """
        if chunk == "auto":
            frames, height, width = jnp.shape(video)[1:4]
            cells = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
            chunk = self.chunk(flow.latent_frames(frames), *cells)
        raw, logvar = self.posterior(video, chunk)
        if noise is not None:
            raw = raw + jnp.exp(logvar / 2) * noise
        return (raw - jnp.asarray(self.config.latents_mean)) / jnp.asarray(self.config.latents_std)

    def decode(
        self, latents: Float[ArrayLike, "B T h w z"], chunk: int | Literal["auto"] | None = "auto"
    ) -> Float[Array, "B F 8*h 8*w 3"]:
        """Decode normalised latents to a video, clamped to [-1, 1].

        `chunk` is the number of latent frames per part: None decodes the whole video at once, "auto"
        decides by its size (see `chunk`).
        """
        if chunk == "auto":
            chunk = self.chunk(*jnp.shape(latents)[1:4])
        raw = latents * jnp.asarray(self.config.latents_std) + jnp.asarray(self.config.latents_mean)
        return jnp.clip(self.pixels(raw, chunk), -1.0, 1.0)

    def chunk(self, frames: int, height: int, width: int) -> int | None:
        """Choose the `chunk` that bounds memory for a video; None if the whole video fits.

        Args:
          frames: latent frames.
          height: of the latent grid.
          width: of the latent grid.
        """
        pixels = FRAMES_PER_LATENT * height * width * PIXELS_PER_LATENT**2
        size = 4 * self.config.base_dim * pixels
        return None if frames * size <= LARGEST_ACTIVATION else max(1, LARGEST_ACTIVATION // size)

    def posterior(
        self, video: Float[ArrayLike, "B F H W 3"], chunk: int | None = None
    ) -> tuple[Float[Array, "B T H/8 W/8 z"], Float[Array, "B T H/8 W/8 z"]]:
        """Return mean and log-variance, in [-30, 20], of the latents, not normalised."""
        video = jnp.asarray(video)
        frames, height, width = video.shape[1:4]
        if frames % FRAMES_PER_LATENT != 1:
            raise ValueError(
                f"a video needs 1 + {FRAMES_PER_LATENT}n frames, this one has {frames}"
            )
        if height % PIXELS_PER_LATENT or width % PIXELS_PER_LATENT:
            raise ValueError(
                f"height and width must be multiples of {PIXELS_PER_LATENT}, not {height}x{width}"
            )
        with jax.default_matmul_precision("highest"):
            moments = self.quant_conv(
                _in_chunks(self.encoder, video, chunk and chunk * FRAMES_PER_LATENT)
            )
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def pixels(
        self, raw: Float[ArrayLike, "B T h w z"], chunk: int | None = None
    ) -> Float[Array, "B F 8*h 8*w 3"]:
        """Decode latents that are not normalised to a video that is not clamped, as in training."""
        return _in_chunks(self.decoder, self.post_quant_conv(jnp.asarray(raw)), chunk)


def _in_chunks(
    network: Encoder | Decoder, x: Float[Array, "B n h w C"], size: int | None
) -> Float[Array, "B m H W out"]:
    """Apply the network in chunks: frame 0 with the remainder, then a scan over full chunks.

    The backward pass saves the memory between chunks and recomputes the activations of each chunk.

    Args:
      network: encoder or decoder.
      x: its input.
      size: frames of a chunk; None is the whole video.
    """
    if size is None:
        return network(x, Memory())
    head = 1 + (x.shape[1] - 1) % size

    @jax.checkpoint
    def step(previous, frames):
        memory = Memory(previous)
        y = network(frames, memory)
        return memory.stored, y

    previous, start = step(None, x[:, :head])
    if head == x.shape[1]:
        return start
    chunks = rearrange(x[:, head:], "b (chunk t) h w c -> chunk b t h w c", t=size)
    _, rest = jax.lax.scan(step, previous, chunks)
    rest = rearrange(rest, "chunk b t h w c -> b (chunk t) h w c")
    return jnp.concatenate([start, rest], axis=1)
