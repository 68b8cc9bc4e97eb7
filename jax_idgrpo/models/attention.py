"""Compute softmax(q k^T / sqrt(d)) v over the tokens of a video, with the platform's kernel.

    cpu              exact: logits and softmax in float32, in parts that fit the cache
    gpu, bfloat16    cuDNN flash attention, through `jax.nn.dot_product_attention`
    tpu, bfloat16    splash attention, a Pallas kernel that comes with JAX
    otherwise        exact: flash kernels do not run in full float32 precision

Padding is always on the right: each row attends to its first `lengths[b]` keys. All kernels compute
logits and softmax in float32 and bound the number of logits in memory.

Sources: FlashAttention, arXiv 2205.14135 and 2307.08691 (the backward pass from the log-sum-exp of
each row).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.extend.core import Primitive
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from jax_idgrpo.models.layers import precision
from jax_idgrpo.parallel import sharding

# Largest number of float32 logits computed together. On the CPU they stay in its cache.
MAX_LOGITS = {"cpu": 1 << 20}
DEFAULT_MAX_LOGITS = 1 << 28

# Head groups evaluated concurrently in the forward pass. On the CPU several small products in
# parallel are faster than one product split across cores. The backward pass evaluates one group at
# a time: independent groups would not wait for the gradient, and the softmax weights of all blocks
# would be in memory at once.
CONCURRENT_GROUPS = {"cpu": 4}

RESIDUALS = "attention"  # checkpoint name of the residuals of the backward pass
# JAX's primitive for cuDNN's forward pass. Its outputs cannot be given a checkpoint name.
CUDNN = "dot_product_attention_fwd_wrapper"

_named = jax.checkpoint_policies.save_only_these_names(RESIDUALS)

LANES = 128  # lanes of a TPU; block sizes are multiples of it
LARGEST_BLOCK = 1024


def attention_remat_policy(primitive: Primitive, *values: object, **parameters: object) -> bool:
    """Save the residuals of attention's backward pass (a `jax.checkpoint` policy)."""
    return primitive.name == CUDNN or _named(primitive, *values, **parameters)


def attention(
    q: Float[Array, "B N heads d"],
    k: Float[Array, "B keys heads d"],
    v: Float[Array, "B keys heads d"],
    lengths: Int[Array, " B"] | None = None,
    *,
    mesh: Mesh | None = None,
    split_keys: bool = False,
    max_logits: int | None = None,
) -> Float[Array, "B N heads d"]:
    """Compute attention per head.

    Args:
      q: queries, not scaled. They are scaled in float32 and cast to k's dtype.
      k: keys.
      v: values.
      lengths: row b attends to its first `lengths[b]` keys, at least one; None attends to all.
      mesh: the mesh of the devices; None is a single device.
      split_keys: see `sharding.attend`.
      max_logits: bound of the exact kernel; None is the platform's default.

    Returns:
      The output, in v's dtype.
    """
    platform = sharding.platform(mesh)
    q = (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(k.dtype)
    narrow = k.dtype == jnp.bfloat16
    if narrow and platform == "tpu":
        kernel = splash
    elif narrow and platform == "gpu":
        kernel = functools.partial(fused, implementation="cudnn")
    else:
        kernel = functools.partial(
            exact,
            max_logits=max_logits or MAX_LOGITS.get(platform, DEFAULT_MAX_LOGITS),
            concurrent=CONCURRENT_GROUPS.get(platform, 1),
        )
    return sharding.attend(mesh, kernel, q, k, v, lengths, split_keys)


def fused(
    q: Float[Array, "B N heads d"],
    k: Float[Array, "B keys heads d"],
    v: Float[Array, "B keys heads d"],
    lengths: Int[Array, " B"] | None,
    implementation: str,
) -> Float[Array, "B N heads d"]:
    """Compute attention with JAX's own function; "cudnn" is the flash kernel of NVIDIA's library.

    cuDNN requires an even number of tokens and a head size that is a multiple of 8; inputs are
    padded to that, and the padding is masked. The log-sum-exp is always returned, although only the
    backward pass needs it, so that rollout and replay run the same kernel.

    Args:
      q: scaled queries.
      k: keys.
      v: values.
      lengths: keys per row; None attends to all.
      implementation: "cudnn" or "xla".
    """
    n, m, d = q.shape[1], k.shape[1], q.shape[-1]

    def fit(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, -d % 8)))

    if lengths is None and m % 2:
        lengths = jnp.full(len(q), m, jnp.int32)
    out, _ = jax.nn.dot_product_attention(
        fit(q),
        fit(k),
        fit(v),
        scale=1.0,
        key_value_seq_lengths=lengths,
        implementation=implementation,
        return_residual=True,
    )
    return out[:, :n, :, :d]


# ---- exact ---------------------------------------------------------------------------------------


def exact(
    q: Float[Array, "B N heads d"],
    k: Float[Array, "B keys heads d"],
    v: Float[Array, "B keys heads d"],
    lengths: Int[Array, " B"] | None,
    max_logits: int,
    concurrent: int = 1,
) -> Float[Array, "B N heads d"]:
    """Compute attention in plain XLA in tiles; the backward pass recomputes the softmax weights.

    Args:
      q: scaled queries.
      k: keys.
      v: values.
      lengths: keys per row; None attends to all.
      max_logits: largest number of logits of one tile, which is a group of heads or, where one head
        exceeds it, some queries of that head.
      concurrent: groups of heads evaluated concurrently in the forward pass.
    """
    b, n, heads, _ = q.shape
    tiling = Tiling.of(b * heads, n, k.shape[1], max_logits, concurrent)
    q, k, v = (rearrange(x, "b n heads d -> (b heads) n d") for x in (q, k, v))
    q = jnp.pad(q, ((0, 0), (0, -n % tiling.parts), (0, 0)))  # zero queries, dropped below
    hidden = (
        None
        if lengths is None
        else jnp.repeat(jnp.arange(k.shape[1]) >= lengths[:, None], heads, axis=0)
    )
    out = _exact(q, k, v, hidden, tiling)[:, :n]
    return rearrange(out, "(b heads) n d -> b n heads d", b=b)


class Tiling(NamedTuple):
    """How an attention is split into tiles.

    Attributes:
      together: heads of one product (a head group).
      concurrent: head groups evaluated concurrently in the forward pass.
      parts: parts of the queries, evaluated one after another.
    """

    together: int
    concurrent: int
    parts: int

    @classmethod
    def of(cls, heads: int, queries: int, keys: int, max_logits: int, concurrent: int) -> "Tiling":
        """Choose the tiles of an attention.

        Args:
          heads: number of heads, counted over all rows.
          queries: number of queries per head.
          keys: number of keys per head.
          max_logits: largest number of logits of one tile.
          concurrent: largest number of head groups evaluated at once.
        """
        together = _largest_divisor(heads, max_logits // (queries * keys))
        parts = min(queries, -(-queries * keys * together // max_logits))
        return cls(
            together, _largest_divisor(heads // together, concurrent) if parts == 1 else 1, parts
        )


def _largest_divisor(number: int, bound: int) -> int:
    """Return the largest divisor of `number` up to the bound, at least 1."""
    return max(
        size for size in range(1, number + 1) if number % size == 0 and size <= max(1, bound)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _exact(q: Array, k: Array, v: Array, hidden: Array | None, tiling: Tiling) -> Array:
    """Compute attention [heads,N,d] of q [heads,N,d], k and v [heads,keys,d], hidden [heads,keys].

    `heads` are the heads of all rows. N must be a multiple of the tiling's parts.
    """
    return _exact_forward(q, k, v, hidden, tiling)[0]


def _product(axes: str, x: Array, y: Array) -> Array:
    """Compute `jnp.einsum` at the full precision of its operands, in float32."""
    return jnp.einsum(axes, x, y, precision=precision(x, y), preferred_element_type=jnp.float32)


def _weights(q: Array, k: Array, hidden: Array | None) -> Array:
    logits = _product("gnd,gmd->gnm", q, k)
    return (
        logits
        if hidden is None
        else jnp.where(hidden[:, None, :], jnp.finfo(jnp.float32).min, logits)
    )


def _concurrently(function: Callable, size: int) -> Callable:
    """Apply `function` to groups of `size` leading rows, with no dependency between groups."""

    def apply(arrays: PyTree) -> PyTree:
        count = len(jax.tree.leaves(arrays)[0]) // size
        pieces = [
            function(jax.tree.map(lambda x: x[i * size : (i + 1) * size], arrays))
            for i in range(count)
        ]
        return (
            pieces[0]
            if count == 1
            else jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
        )

    return apply


def _map(function: Callable, arrays: PyTree, size: int) -> PyTree:
    """Apply `function` over the leading axis of the arrays, `size` rows at a time, in sequence."""
    count = len(jax.tree.leaves(arrays)[0]) // size
    if count == 1:
        return function(arrays)
    split = jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), arrays)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(function, split))


def _map_in_place(function: Callable, arrays: PyTree, others: PyTree, size: int) -> PyTree:
    """Apply `function(arrays, others)` like `_map`, writing each result over its input array.

    `lax.map` would allocate zeros for its output, which on a CPU are in memory from the program's
    start.

    Args:
      function: returns new values for `arrays`.
      arrays: pytree of arrays that are replaced.
      others: pytree of arrays that are only read.
      size: rows per call.
    """
    count = len(jax.tree.leaves(arrays)[0]) // size
    if count == 1:
        return function(arrays, others)

    def body(i: Array, arrays: PyTree) -> PyTree:
        rows, beside = (
            jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size), tree)
            for tree in (arrays, others)
        )
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, i * size, 0),
            arrays,
            function(rows, beside),
        )

    return jax.lax.fori_loop(0, count, body, arrays)


def _cut(x: Array, parts: int) -> Array:
    """Split the tokens of every head."""
    return rearrange(x, "heads (parts n) ... -> parts heads n ...", parts=parts)


def _join(x: Array) -> Array:
    """Invert `_cut`."""
    return rearrange(x, "parts heads n ... -> heads (parts n) ...")


def _exact_forward(
    q: Array, k: Array, v: Array, hidden: Array | None, tiling: Tiling
) -> tuple[Array, tuple]:
    def heads(arrays: tuple) -> tuple[Array, Array]:
        q, k, v, hidden = arrays

        def queries(q: Array) -> tuple[Array, Array]:
            logits = _weights(q, k, hidden)
            top = jnp.max(logits, axis=-1, keepdims=True)
            weights = jnp.exp(logits - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = _product("gnm,gmd->gnd", weights.astype(v.dtype), v) / total
            return out.astype(v.dtype), top + jnp.log(total)

        if tiling.parts == 1:
            return queries(q)
        return jax.tree.map(_join, jax.lax.map(queries, _cut(q, tiling.parts)))

    out, log_total = checkpoint_name(
        _map(
            _concurrently(heads, tiling.together),
            (q, k, v, hidden),
            tiling.together * tiling.concurrent,
        ),
        RESIDUALS,
    )
    return out, (q, k, v, hidden, out, log_total)


def _exact_backward(tiling: Tiling, saved: tuple, gradient: Array) -> tuple:
    def heads(operands: tuple[Array, Array, Array], others: tuple) -> tuple[Array, Array, Array]:
        (q, k, v), (hidden, out, log_total, gradient) = operands, others

        def queries(sums: tuple[Array, Array], part: tuple) -> tuple[tuple[Array, Array], Array]:
            q, out, log_total, gradient = part
            weights = jnp.exp(_weights(q, k, hidden) - log_total)
            dv = _product("gnm,gnd->gmd", weights.astype(v.dtype), gradient)
            dweights = _product("gnd,gmd->gnm", gradient, v)
            delta = jnp.sum(
                gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True
            )
            dlogits = (weights * (dweights - delta)).astype(q.dtype)
            dq = _product("gnm,gmd->gnd", dlogits, k)
            dk = _product("gnm,gnd->gmd", dlogits, q)
            return (sums[0] + dk, sums[1] + dv), dq

        nothing = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        over = (q, out, log_total, gradient)
        if tiling.parts == 1:
            (dk, dv), dq = queries(nothing, over)
        else:
            (dk, dv), dq = jax.lax.scan(
                queries, nothing, jax.tree.map(lambda x: _cut(x, tiling.parts), over)
            )
            dq = _join(dq)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    return *_map_in_place(heads, saved[:3], (*saved[3:], gradient), tiling.together), None


_exact.defvjp(_exact_forward, _exact_backward)


# ---- splash --------------------------------------------------------------------------------------


def splash(
    q: Float[Array, "B N heads d"],
    k: Float[Array, "B keys heads d"],
    v: Float[Array, "B keys heads d"],
    lengths: Int[Array, " B"] | None,
    interpret: bool = False,
) -> Float[Array, "B N heads d"]:
    """Compute attention with the TPU kernel; tokens are padded to whole blocks and masked.

    Args:
      q: scaled queries.
      k: keys.
      v: values.
      lengths: keys per row; None attends to all.
      interpret: emulate the kernel on any machine, slowly, for tests.
    """
    _, n, heads, d = q.shape
    m = k.shape[1]
    block_q, block_kv = block(n), block(m)
    size_q, size_kv = -(-n // block_q) * block_q, -(-m // block_kv) * block_kv

    def fit(x: Array, size: int) -> Array:
        """Transpose [B,N,heads,d] to [B,heads,size,d'], zero-padded; d' is a multiple of LANES."""
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, size - x.shape[1]), (0, -d % LANES)))

    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask(
            [splash_attention_mask.FullMask((size_q, size_kv))] * heads
        ),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )

    def row(q: Array, k: Array, v: Array, length: Array | None) -> Array:
        if length is None:
            return kernel(q, k, v)
        ids = splash_attention_kernel.SegmentIds(
            q=jnp.zeros(size_q, jnp.int32), kv=(jnp.arange(size_kv) >= length).astype(jnp.int32)
        )
        return kernel(q, k, v, segment_ids=ids)

    if lengths is None and size_kv > m:
        lengths = jnp.full(len(q), m, jnp.int32)
    out = jax.vmap(row)(fit(q, size_q), fit(k, size_kv), fit(v, size_kv), lengths)
    return out[:, :, :n, :d].swapaxes(1, 2)


def block(length: int) -> int:
    """Choose the block size for `length` tokens: a large multiple of LANES with little padding."""

    def cost(size: int) -> float:
        return -(-length // size) * (size + LANES / 2)  # LANES / 2 is the overhead of a block

    return min(range(LANES, LARGEST_BLOCK + 1, LANES), key=cost)
