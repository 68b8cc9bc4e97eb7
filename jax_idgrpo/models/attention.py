"""softmax(q k^T / sqrt(d)) v, by the kernel that fits the machine. The only place that attends over tokens of a video.

    cpu              exact: logits and softmax in float32, worked through in parts that fit the cache
    gpu, bfloat16    cuDNN flash attention, through `jax.nn.dot_product_attention`
    tpu, bfloat16    splash attention, a Pallas kernel that comes with JAX
    else             exact: the kernels of GPU and TPU have no float32 that is worth its name

Keys are hidden from a row's length on, a right tail: padding always stands behind what counts. All of them keep logits and softmax in
float32, and none holds more logits at once than a bound.

Sources: FlashAttention, arXiv 2205.14135 and 2307.08691 (the backward pass from the log-sum-exp of each row).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jax_idgrpo.models.layers import precision
from jax_idgrpo.parallel import sharding

# Largest number of float32 logits of the heads that are worked on together: on the CPU what stays in its cache.
MAX_LOGITS = {"cpu": 1 << 20}
DEFAULT_MAX_LOGITS = 1 << 28

# So many times that number exist at once in a forward pass, where whole heads fit it: a CPU loses by dividing one small product between its
# cores what it gains, and works on independent ones side by side. Not in a backward pass: those that do not wait for each other do not
# wait for the gradient either, and all blocks' weights would be made early and kept.
ABREAST = {"cpu": 4}

KEPT = "attention"  # name of what the backward pass needs of an attention beside its operands
CUDNN = "dot_product_attention_fwd_wrapper"  # JAX's primitive of cuDNN's forward pass, whose outputs cannot be named from outside

_named = jax.checkpoint_policies.save_only_these_names(KEPT)

LANES = 128  # of a TPU: blocks of a kernel are multiples of it
LARGEST_BLOCK = 1024


def kept(primitive: Any, *values: Any, **parameters: Any) -> Any:
    """The rematerialisation policy (of `jax.checkpoint`) that keeps what attention's backward pass needs, whichever kernel it is."""
    return primitive.name == CUDNN or _named(primitive, *values, **parameters)


def attention(
    q: Float[Array, "B N K d"],
    k: Float[Array, "B M K d"],
    v: Float[Array, "B M K d"],
    lengths: Int[Array, "B"] | None = None,
    *,
    mesh: Mesh | None = None,
    split_keys: bool = False,
    max_logits: int | None = None,
) -> Float[Array, "B N K d"]:
    """Attention per head, in v's dtype; row b attends to the first `lengths[b]` keys, at least one, or to all.

    q is scaled in float32 and then takes k's dtype. split_keys: see `parallel.attend`. max_logits: of the exact kernel; None is what
    suits the platform.
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
            abreast=ABREAST.get(platform, 1),
        )
    return sharding.attend(mesh, kernel, q, k, v, lengths, split_keys)


def fused(
    q: Float[Array, "B N K d"],
    k: Float[Array, "B M K d"],
    v: Float[Array, "B M K d"],
    lengths: Int[Array, "B"] | None,
    implementation: str,
) -> Float[Array, "B N K d"]:
    """JAX's own attention of a scaled q; "cudnn" is the flash kernel of NVIDIA's library.

    That one takes an even number of tokens and heads of a multiple of 8: what is not is padded, and the padding is hidden. Its log-sum-exp,
    which the backward pass needs, is asked for always, so that a rollout runs the same kernel as its replay.
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


# ---- exact ---------------------------------------------------------------------------------------------------------------


def exact(
    q: Float[Array, "B N K d"],
    k: Float[Array, "B M K d"],
    v: Float[Array, "B M K d"],
    lengths: Int[Array, "B"] | None,
    max_logits: int,
    abreast: int = 1,
) -> Float[Array, "B N K d"]:
    """Attention of a scaled q in plain XLA, some heads or some queries at a time; the backward pass computes the weights again.

    max_logits: of the heads, or the queries of one head, that are worked on together. abreast: so many groups of heads at once, forwards.
    """
    b, n, heads, d = q.shape
    tiling = Tiling.of(b * heads, n, k.shape[1], max_logits, abreast)
    q, k, v = (x.swapaxes(1, 2).reshape(b * heads, -1, d) for x in (q, k, v))
    q = jnp.pad(q, ((0, 0), (0, -n % tiling.parts), (0, 0)))  # queries of zeros, dropped below
    hidden = (
        None
        if lengths is None
        else jnp.repeat(jnp.arange(k.shape[1]) >= lengths[:, None], heads, axis=0)
    )
    out = _exact(q, k, v, hidden, tiling)[:, :n]
    return out.reshape(b, heads, n, d).swapaxes(1, 2)


class Tiling(NamedTuple):
    """How an attention is worked through: `together` heads as one product, `abreast` such products at once, queries in `parts`."""

    together: int
    abreast: int
    parts: int

    @classmethod
    def of(cls, groups: int, queries: int, keys: int, max_logits: int, abreast: int) -> "Tiling":
        """That of `groups` heads, whose number `together` times `abreast` divides."""
        together = _largest_divisor(groups, max_logits // (queries * keys))
        parts = min(queries, -(-queries * keys * together // max_logits))
        return cls(
            together, _largest_divisor(groups // together, abreast) if parts == 1 else 1, parts
        )


def _largest_divisor(number: int, bound: int) -> int:
    """The largest one up to the bound; 1 where there is none."""
    return max(
        size for size in range(1, number + 1) if number % size == 0 and size <= max(1, bound)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _exact(q: Array, k: Array, v: Array, hidden: Array | None, tiling: Tiling) -> Array:
    """q [G,N,d], k and v [G,M,d], hidden [G,M] -> [G,N,d]; the tiling is one of G heads, its parts divide N."""
    return _exact_forward(q, k, v, hidden, tiling)[0]


def _product(axes: str, x: Array, y: Array) -> Array:
    """`jnp.einsum`, with all the bits of its operands, in float32."""
    return jnp.einsum(axes, x, y, precision=precision(x, y), preferred_element_type=jnp.float32)


def _weights(q: Array, k: Array, hidden: Array | None) -> Array:
    logits = _product("gnd,gmd->gnm", q, k)
    return (
        logits
        if hidden is None
        else jnp.where(hidden[:, None, :], jnp.finfo(jnp.float32).min, logits)
    )


def _abreast(function: Callable, size: int) -> Callable:
    """`function` of arrays, over their leading axis `size` rows at a time, none waiting for another."""

    def whole(arrays: Any) -> Any:
        count = len(jax.tree.leaves(arrays)[0]) // size
        pieces = [
            function(jax.tree.map(lambda x: x[i * size : (i + 1) * size], arrays))
            for i in range(count)
        ]
        return (
            pieces[0]
            if count == 1
            else jax.tree.map(lambda *found: jnp.concatenate(found), *pieces)
        )

    return whole


def _map(function: Callable, arrays: Any, size: int) -> Any:
    """`function` over the leading axis of the arrays, `size` rows after `size` rows."""
    count = len(jax.tree.leaves(arrays)[0]) // size
    if count == 1:
        return function(arrays)
    split = jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), arrays)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(function, split))


def _map_in_place(function: Callable, arrays: Any, others: Any, size: int) -> Any:
    """`_map` of a function of arrays and others that returns new arrays, each of which takes the place of the one it comes from.

    A map's own output is zeros before the loop, which on a CPU wait in memory from the program's start.
    """
    count = len(jax.tree.leaves(arrays)[0]) // size
    if count == 1:
        return function(arrays, others)

    def body(i: Array, arrays: Any) -> Any:
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
    """[G,N,...] -> [parts,G,N/parts,...]"""
    return jnp.moveaxis(x.reshape(x.shape[0], parts, -1, *x.shape[2:]), 1, 0)


def _join(x: Array) -> Array:
    """The inverse of `_cut`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


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
        _map(_abreast(heads, tiling.together), (q, k, v, hidden), tiling.together * tiling.abreast),
        KEPT,
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


# ---- splash --------------------------------------------------------------------------------------------------------------


def splash(
    q: Float[Array, "B N K d"],
    k: Float[Array, "B M K d"],
    v: Float[Array, "B M K d"],
    lengths: Int[Array, "B"] | None,
    interpret: bool = False,
) -> Float[Array, "B N K d"]:
    """Attention of a scaled q by the TPU kernel; lengths that are no multiple of its blocks are padded, and the padding is hidden.

    interpret: run the kernel's instructions on any machine, slowly, for tests.
    """
    _, n, heads, d = q.shape
    m = k.shape[1]
    block_q, block_kv = block(n), block(m)
    size_q, size_kv = -(-n // block_q) * block_q, -(-m // block_kv) * block_kv

    def fit(x: Array, size: int) -> Array:
        """[B,N,K,d] -> [B,K,size,d'], zeros behind; d' fills the lanes."""
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
        residual_checkpoint_name=KEPT,
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
    """Rows of a kernel's block for `length` tokens: a multiple of the lanes, large, that leaves little padding."""

    def cost(size: int) -> float:
        return -(-length // size) * (
            size + LANES / 2
        )  # the second term stands for what each block costs by itself

    return min(range(LANES, LARGEST_BLOCK + 1, LANES), key=cost)
