"""Building blocks of the networks: dtype policy, linear layer with LoRA, norms, position tables.

Arrays are channels-last. Operations that are sensitive to rounding (norms, rotary products) run in
float32 for every compute dtype.

Sources: LoRA, arXiv 2106.09685; rotary positions, arXiv 2104.09864; RMSNorm, arXiv 1910.07467.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from jax_idgrpo.errors import UserError


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """The dtype policy of one network.

    Attributes:
      parameters: of the large kernels; small sensitive ones and adapters are always float32.
      compute: of the operands of matrix products, which accumulate in float32.
      residual: of the stream between blocks.
    """

    parameters: jnp.dtype
    compute: jnp.dtype
    residual: jnp.dtype

    @classmethod
    def named(cls, name: str) -> "Dtypes":
        """Return the policy "float32", or "bfloat16" for weights, products and stream."""
        if name not in ("float32", "bfloat16"):
            raise UserError(f"dtype is {name!r}; choose float32 or bfloat16")
        dtype = jnp.dtype(name)
        return cls(parameters=dtype, compute=dtype, residual=dtype)


FLOAT32 = Dtypes.named("float32")
XAVIER = nnx.initializers.xavier_uniform()


class LoRAParam(nnx.Param):
    """A leaf of a LoRA adapter; reinforcement learning trains these leaves and no others."""


def precision(*operands: Array) -> jax.lax.Precision:
    """Return the highest precision for float32 operands, the default precision otherwise.

    By default a TPU rounds float32 operands to bfloat16, and a GPU to TF32.
    """
    wide = any(operand.dtype == jnp.float32 for operand in operands)
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT


def product(x: Array, y: Array, axes: int | tuple = 1) -> Array:
    """Compute `jnp.tensordot` at the full precision of its operands.

    Args:
      x: left operand.
      y: right operand.
      axes: axes to sum over, as in `jnp.tensordot`.

    Returns:
      The product in float32.
    """
    return jnp.tensordot(x, y, axes, precision=precision(x, y), preferred_element_type=jnp.float32)


@jax.custom_vjp
def matmul(
    x: Float[Array, "*batch in"], kernel: Float[Array, "in out"]
) -> Float[Array, "*batch out"]:
    """Compute x W, accumulated and returned in float32.

    The backward products have operands of the same dtypes. The gradient of W sums over all tokens:
    on the CPU as one product over flattened tokens, which is twice as fast; elsewhere without
    flattening, because flattening two sharded axes would gather them.
    """
    return product(x, kernel)


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    # `product`, not `matmul`: rematerialisation policies do not see inside a custom_vjp.
    return product(x, kernel), (x, kernel)


def _matmul_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    dy = dy.astype(x.dtype)
    dx = product(dy, kernel.T).astype(x.dtype)
    dkernel = jax.lax.platform_dependent(x, dy, cpu=_kernel_gradient_flat, default=_kernel_gradient)
    return dx, dkernel.astype(kernel.dtype)


def _kernel_gradient(x: Array, dy: Array) -> Array:
    tokens = tuple(range(x.ndim - 1))
    return product(x, dy, (tokens, tokens))


def _kernel_gradient_flat(x: Array, dy: Array) -> Array:
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if x.shape[1] > dy.shape[1]:  # faster with the wider operand on the right
        return _kernel_gradient(dy, x).T
    return _kernel_gradient(x, dy)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """y = x W + b + (alpha / R) (x A) B; rank 0 has no adapter.

    W [in, out] and b [out] are stored in `dtypes.parameters`, A [in, R] and B [R, out] in float32.
    Operands of the products are in `dtypes.compute`, sums in float32. A ~ N(0, 1/R^2) and B = 0, so
    a new adapter leaves the layer bitwise unchanged.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        rank: int = 0,
        alpha: float = 0.0,
        kernel_init: nnx.Initializer = XAVIER,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), (in_features, out_features), dtypes.parameters)
        )
        self.bias = nnx.Param(jnp.zeros((out_features,), dtypes.parameters)) if use_bias else None
        self.rank, self.alpha, self.compute = rank, alpha, dtypes.compute
        if rank:
            self.lora_a = LoRAParam(
                jax.random.normal(rngs.params(), (in_features, rank), jnp.float32) / rank
            )
            self.lora_b = LoRAParam(jnp.zeros((rank, out_features), jnp.float32))

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        x = x.astype(self.compute)
        y = matmul(x, self.kernel[...].astype(self.compute))
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        if self.rank:
            a, b = (factor[...].astype(self.compute) for factor in (self.lora_a, self.lora_b))
            y = y + (self.alpha / self.rank) * matmul(matmul(x, a).astype(self.compute), b)
        return y.astype(self.compute)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis; computed and returned in float32."""

    def __init__(self, features: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x = x.astype(jnp.float32)
        return (
            x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.scale[...]
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def layer_norm(x: Float[Array, "*batch D"], eps: float) -> Float[Array, "*batch D"]:
    """Compute (x - mean) / sqrt(var + eps) over the last axis in float32, with the biased variance.

    The variance is computed in a second pass. The backward pass saves x and two numbers per token.
    """
    return _layer_norm_forward(x, eps)[0]


def _layer_norm_forward(x: Array, eps: float) -> tuple[Array, tuple[Array, Array, Array]]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return centred * scale, (x, mean, scale)


def _layer_norm_backward(eps: float, saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array]:
    # The barrier and this form prevent XLA from saving another array of the size of x in the
    # forward pass, and from computing one before dy exists.
    x, mean, scale = jax.lax.optimization_barrier(saved)
    wide = x.astype(jnp.float32)
    slope = scale**3 * jnp.mean(dy * (wide - mean), axis=-1, keepdims=True)
    offset = slope * mean - scale * jnp.mean(dy, axis=-1, keepdims=True)
    return ((scale * dy - slope * wide + offset).astype(x.dtype),)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nnx.Module):
    """`layer_norm` with scale and bias."""

    def __init__(self, features: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return layer_norm(x, self.eps) * self.scale[...] + self.bias[...]


def stack_blocks(build: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """Initialise `count` blocks as one module whose leaves have a leading axis.

    Args:
      build: maps random streams to a block.
      count: number of blocks.
      rngs: split over the blocks.
    """
    return nnx.split_rngs(splits=count)(nnx.vmap(build))(rngs)


def scan_blocks(
    stack: nnx.Module,
    run: Callable[..., Array],
    x: Array,
    per_block: PyTree = None,
    remat: bool = False,
) -> Array:
    """Apply the blocks of a stack to x with one scan.

    Args:
      stack: of `stack_blocks`.
      run: maps (block, x, entry of `per_block`) to x.
      x: the stream.
      per_block: pytree of arrays with a leading layer axis.
      remat: whether the backward pass recomputes each block.
    """
    graph, parameters = nnx.split(stack)

    def body(x: Array, layer: tuple[nnx.State, PyTree]) -> tuple[Array, None]:
        block, extra = layer
        return run(nnx.merge(graph, block), x, extra), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, (parameters, per_block))[0]


@functools.lru_cache(maxsize=16)
def _rotary_axis(size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin [length, size / 2] of position / 10000^(2i / size).

    Computed in float64 and rounded once to float32.
    """
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotary_tables(
    head_dim: int, frames: int, height: int, width: int
) -> tuple[Float[Array, "N half"], Float[Array, "N half"]]:
    """Compute cos and sin of the rotary angles of a token grid ordered (frame, row, column).

    Of the d channels of a head, d - 4 (d // 6) encode the frame, 2 (d // 6) each row and column.

    Args:
      head_dim: d, even.
      frames: extent of the grid.
      height: extent of the grid, tokens.
      width: extent of the grid, tokens.
    """
    part = 2 * (head_dim // 6)
    grid = (frames, height, width)
    tables: tuple[list[Array], list[Array]] = ([], [])
    for axis, size in enumerate((head_dim - 2 * part, part, part)):
        shape = [grid[axis] if i == axis else 1 for i in range(3)] + [size // 2]
        for table, values in zip(tables, _rotary_axis(size, grid[axis]), strict=True):
            table.append(jnp.broadcast_to(jnp.asarray(values).reshape(shape), (*grid, size // 2)))
    cos, sin = (jnp.concatenate(table, axis=-1).reshape(-1, head_dim // 2) for table in tables)
    return cos, sin


def apply_rotary(
    x: Float[Array, "B N heads d"], cos: Float[Array, "N half"], sin: Float[Array, "N half"]
) -> Float[Array, "B N heads d"]:
    """Rotate the adjacent pairs (2i, 2i + 1) of every head by their angle, in float32.

    In the result the first members of all pairs precede the second members. This permutation of the
    head dimension saves interleaving the pairs again. It does not change q k^T if q and k are both
    rotated by this function.

    Args:
      x: queries or keys.
      cos: cosines of `rotary_tables`.
      sin: sines of `rotary_tables`.
    """
    x = x.astype(jnp.float32)
    first, second = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def timestep_embedding(timesteps: Int[Array, " B"], features: int) -> Float[Array, "B features"]:
    """Compute [cos(t f), sin(t f)], float32, with f_i = 10000^(-i / half), half = features / 2.

    `timesteps` are integers 0 .. 999.
    """
    half = features // 2
    frequencies = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def depthwise_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 1 C"], stride: int = 1
) -> Float[Array, "B h w C"]:
    """Convolve every channel with its own 3x3 kernel, padded by one zero pixel, in full float32.

    On the CPU the nine taps are summed explicitly; XLA's grouped convolution is 3 to 80 times
    slower.

    Args:
      x: images, float32.
      kernel: one 3x3 kernel per channel.
      stride: of height and width.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_depthwise_taps, stride=stride),
        default=functools.partial(_depthwise_grouped, stride=stride),
    )


def _depthwise_grouped(x: Array, kernel: Array, *, stride: int) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=jax.lax.Precision.HIGHEST,
    )


def _depthwise_taps(x: Array, kernel: Array, *, stride: int) -> Array:
    height, width = ((size - 1) // stride + 1 for size in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = jnp.zeros((x.shape[0], height, width, x.shape[-1]), x.dtype)
    for row in range(3):
        for column in range(3):
            rows = slice(row, row + stride * (height - 1) + 1, stride)
            columns = slice(column, column + stride * (width - 1) + 1, stride)
            out = out + padded[:, rows, columns] * kernel[row, column, 0]
    return out
