"""Attention: every kernel against the formula in float64, whole and in parts, with hidden tails, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo.models.attention import (
    LANES,
    LARGEST_BLOCK,
    attention,
    attention_remat_policy,
    block,
    exact,
    fused,
    splash,
)
from jax_idgrpo.planning.cost_model import flops

CUDNN_VERSION = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def reference(q, k, v, lengths=None):
    """The formula in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    logits = np.einsum("bnkd,bmkd->bknm", q, k) / np.sqrt(q.shape[-1])
    if lengths is not None:
        logits = np.where(
            (np.arange(k.shape[1]) < np.asarray(lengths)[:, None])[:, None, None, :],
            logits,
            -np.inf,
        )
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bknm,bmkd->bnkd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("queries", [1, 7, 13])
def test_parts_and_hidden_tails(queries):
    """4 queries of a head at a time (the last part ragged), groups of one head or two, several groups concurrently, all at once."""
    q, k, v = normal(0, 2, queries, 6, 8), normal(1, 2, 5, 6, 8), normal(2, 2, 5, 6, 8)
    lengths = jnp.array([3, 5])
    want = reference(q, k, v, lengths)

    def loss(q, k, v, max_logits):
        return jnp.sum(attention(q, k, v, lengths, max_logits=max_logits) ** 2)

    whole = jax.grad(loss, (0, 1, 2))(q, k, v, 1 << 20)
    for max_logits in (5 * 4, queries * 5, 2 * queries * 5, 1 << 20):
        np.testing.assert_allclose(
            attention(q, k, v, lengths, max_logits=max_logits), want, atol=1e-6
        )
        for got, expected in zip(
            jax.grad(loss, (0, 1, 2))(q, k, v, max_logits), whole, strict=True
        ):
            np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(np.asarray(attention(q, k, v)) - want).max() > 1e-2
    np.testing.assert_allclose(attention(q, k, v), reference(q, k, v), atol=1e-6)


def test_gradient_is_that_of_the_formula():
    q, k, v = normal(0, 2, 6, 3, 8), normal(1, 2, 5, 3, 8), normal(2, 2, 5, 3, 8)
    lengths = jnp.array([2, 5])

    def plain(q, k, v):
        logits = jnp.einsum("bnkd,bmkd->bknm", q, k) / 8**0.5
        weights = jax.nn.softmax(
            jnp.where((jnp.arange(5) < lengths[:, None])[:, None, None], logits, -jnp.inf)
        )
        return jnp.sum(jnp.sin(jnp.einsum("bknm,bmkd->bnkd", weights, v)))

    got = jax.grad(lambda q, k, v: jnp.sum(jnp.sin(attention(q, k, v, lengths))), (0, 1, 2))(
        q, k, v
    )
    for a, b in zip(got, jax.grad(plain, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_bfloat16_with_large_logits_has_a_float32_softmax():
    q, k, v = (jnp.asarray(normal(i, 1, 9, 2, 16), jnp.bfloat16) for i in range(3))
    q = 20 * q  # logits of about 80
    got = attention(q, k, v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), reference(q, k, v), atol=5e-2)


def test_memory_is_bounded():
    """2 heads of 2,048 x 2,048 logits would be 32 MiB; in parts of 1 MiB the program, gradient and all, needs a fraction of that."""
    q = jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.float32)

    @jax.jit
    def gradient(q, k, v):
        return jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, max_logits=1 << 18)), (0, 1, 2))(
            q, k, v
        )

    assert gradient.lower(q, q, q).compile().memory_analysis().temp_size_in_bytes < 12 << 20


@pytest.mark.parametrize(("keys", "lengths"), [(130, None), (77, [5, 77])])
def test_the_kernels_agree(keys, lengths):
    """cuDNN's call in its plain form, and the TPU kernel's instructions run one by one: no multiple of a block, short heads."""
    q, k, v = (
        normal(0, 2, 129, 2, 20) / 20**0.5,
        normal(1, 2, keys, 2, 20),
        normal(2, 2, keys, 2, 20),
    )
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    want = reference(q * 20**0.5, k, v, lengths)
    kernels = {
        "exact": functools.partial(exact, max_logits=1 << 12),
        "fused": functools.partial(fused, implementation="xla"),
        "splash": functools.partial(splash, interpret=True),
    }
    gradients = {}
    for name, kernel in kernels.items():
        np.testing.assert_allclose(jax.jit(kernel)(q, k, v, lengths), want, atol=3e-6, err_msg=name)
        gradients[name] = jax.jit(
            jax.grad(lambda q, k, v: jnp.sum(jnp.sin(kernel(q, k, v, lengths))), (0, 1, 2))
        )(q, k, v)
    for name in ("fused", "splash"):
        for got, want in zip(gradients[name], gradients["exact"], strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("tokens", "keys", "lengths", "d"),
    [(5, 4, None, 8), (4, 5, None, 8), (5, 5, [2, 5], 12), (4, 4, None, 128)],
)
def test_cudnn_takes_every_shape(tokens, keys, lengths, d, monkeypatch):
    """Its gradient is refused by JAX for odd numbers of tokens, and all of it for heads of no multiple of 8."""
    monkeypatch.setattr(CUDNN_VERSION, lambda: 91000)  # for the trace alone
    shapes = [
        jax.ShapeDtypeStruct((2, count, 3, d), jnp.bfloat16) for count in (tokens, keys, keys)
    ]
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    kernel = functools.partial(fused, lengths=lengths, implementation="cudnn")
    found = jax.eval_shape(jax.grad(lambda q, k, v: jnp.sum(kernel(q, k, v)), (0, 1, 2)), *shapes)
    assert [x.shape for x in found] == [x.shape for x in shapes]


@pytest.mark.parametrize("length", [1, 127, 128, 129, 512, 4290, 5070, 35_880])
def test_blocks_of_the_kernel_leave_little_padding(length):
    size = block(length)
    assert size % LANES == 0
    assert LANES <= size <= LARGEST_BLOCK
    assert -(-length // size) * size < max(1.06 * length, length + LANES)


@pytest.mark.parametrize(
    "kernel", [attention, functools.partial(fused, lengths=None, implementation="cudnn")]
)
def test_rematerialisation_can_keep_the_output(kernel, monkeypatch):
    """With the policy the forward pass of attention is not run again: 5 products of the gradient, and 2 of the forward pass."""
    monkeypatch.setattr(CUDNN_VERSION, lambda: 91000)  # for the trace alone

    def products(policy):
        def loss(q, k, v):
            return jnp.sum(jax.checkpoint(lambda *a: jnp.sin(kernel(*a)), policy=policy)(q, k, v))

        x = normal(0, 1, 4, 2, 8).astype(jnp.bfloat16)
        return flops(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(x, x, x)) / (
            2 * 2 * 4 * 4 * 8
        )

    assert products(attention_remat_policy) == 7
    assert products(jax.checkpoint_policies.nothing_saveable) == 9
