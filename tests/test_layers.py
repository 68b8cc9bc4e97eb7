"""Layers: linear with adapter, norms, attention and position tables against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import (
    FLOAT32,
    Dtypes,
    Linear,
    LoRAParam,
    RMSNorm,
    apply_rotary,
    attention,
    layer_norm,
    matmul,
    rotary_tables,
    timestep_embedding,
)

BFLOAT16 = Dtypes.named("bfloat16")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_unknown_dtype_is_the_users_mistake():
    with pytest.raises(UserError, match="float16"):
        Dtypes.named("float16")


# ---- linear ----------------------------------------------------------------------------------------------------------


def test_linear_adds_the_scaled_adapter():
    layer = Linear(6, 5, rank=3, alpha=6.0, dtypes=FLOAT32, rngs=nnx.Rngs(0))
    layer.lora_b[...] = normal(1, 3, 5)
    layer.bias[...] = normal(2, 5)
    x = normal(3, 2, 4, 6)
    want = x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
    want = want + 2.0 * x @ np.asarray(layer.lora_a[...]) @ np.asarray(layer.lora_b[...])
    np.testing.assert_allclose(layer(x), want, atol=1e-5)


def test_fresh_adapter_is_bit_equal_to_none():
    """Same random stream for the kernel, so the same base; B = 0 then adds exactly nothing."""
    x = normal(0, 4, 16)
    for dtypes in (FLOAT32, BFLOAT16):
        plain = Linear(16, 8, dtypes=dtypes, rngs=nnx.Rngs(0))
        adapted = Linear(16, 8, rank=2, alpha=4.0, dtypes=dtypes, rngs=nnx.Rngs(0))
        assert np.array_equal(plain(x), adapted(x))
        assert adapted(x).dtype == dtypes.compute
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(adapted, LoRAParam))} == {jnp.dtype("float32")}


def test_adapter_starts_as_the_recipe_says():
    layer = Linear(400, 8, rank=16, alpha=16.0, dtypes=FLOAT32, rngs=nnx.Rngs(0))
    assert float(jnp.std(layer.lora_a[...])) == pytest.approx(1 / 16, rel=0.05)
    assert not layer.lora_b[...].any()


@pytest.mark.parametrize(("inside", "outside"), [(3, 7), (7, 3)])
def test_matmul_gradients(inside, outside):
    """The hand-written gradients against those JAX derives, for both orders of the flattened product."""
    x, kernel, weight = normal(0, 2, 5, inside), normal(1, inside, outside), normal(2, 2, 5, outside)
    got = jax.grad(lambda x, k: jnp.sum(jnp.sin(matmul(x, k)) * weight), (0, 1))(x, kernel)
    want = jax.grad(lambda x, k: jnp.sum(jnp.sin(x @ k) * weight), (0, 1))(x, kernel)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# ---- norms -----------------------------------------------------------------------------------------------------------


def test_norms_keep_their_digits_far_from_zero():
    """A mean of 1000 and a spread of 1: the one-pass variance would lose half of its digits."""
    x = 1000 + normal(0, 3, 64)
    exact = np.asarray(x, np.float64)
    centred = exact - exact.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(x, 1e-6), want, atol=3e-4)
    norm = RMSNorm(64, eps=1e-2)
    norm.scale[...] = 1 + 0.3 * normal(1, 64)
    small = 0.1 * normal(2, 3, 64)
    exact = np.asarray(small, np.float64)
    want = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(norm(small), want * np.asarray(norm.scale[...]), atol=1e-6)


# ---- attention -------------------------------------------------------------------------------------------------------


def reference_attention(q, k, v, mask=None):
    """The formula in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    logits = np.einsum("bnkd,bmkd->bknm", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        logits = np.where(mask[:, None, None, :], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bknm,bmkd->bnkd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("queries", [1, 7, 13])
def test_attention_in_chunks_and_with_a_mask(queries):
    """Chunks of 4 queries (the last one ragged) and no chunks give the formula, values and gradients."""
    q, k, v = normal(0, 2, queries, 3, 8), normal(1, 2, 5, 3, 8), normal(2, 2, 5, 3, 8)
    mask = jnp.array([[True, True, True, False, False], [True] * 5])
    want = reference_attention(q, k, v, mask)
    chunked = {"max_logits": 2 * 3 * 5 * 4}
    np.testing.assert_allclose(attention(q, k, v, mask), want, atol=1e-6)
    np.testing.assert_allclose(attention(q, k, v, mask, **chunked), want, atol=1e-6)
    assert np.abs(np.asarray(attention(q, k, v)) - want).max() > 1e-2

    def loss(q, k, v, **options):
        return jnp.sum(attention(q, k, v, mask, **options) ** 2)

    whole = jax.grad(loss, (0, 1, 2))(q, k, v)
    parts = jax.grad(lambda *a: loss(*a, **chunked), (0, 1, 2))(q, k, v)
    for a, b in zip(parts, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_attention_of_bfloat16_with_large_logits_has_a_float32_softmax():
    q, k, v = (jnp.asarray(normal(i, 1, 9, 2, 16), jnp.bfloat16) for i in range(3))
    q = 20 * q  # logits of about 80
    got = attention(q, k, v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), reference_attention(q, k, v), atol=5e-2)


def test_attention_memory_is_bounded():
    """2 heads of 2,048 x 2,048 logits would be 32 MiB; in chunks of 1 MiB the program needs a fraction of that."""
    q = jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.float32)
    program = jax.jit(lambda q, k, v: attention(q, k, v, max_logits=1 << 18)).lower(q, q, q).compile()
    assert program.memory_analysis().temp_size_in_bytes < 8 << 20


# ---- positions -------------------------------------------------------------------------------------------------------


def exact_angles(head_dim, frames, height, width):
    part = 2 * (head_dim // 6)
    grid = np.stack(np.meshgrid(*map(np.arange, (frames, height, width)), indexing="ij"), -1).reshape(-1, 3)
    return np.concatenate(
        [
            grid[:, i : i + 1] / 10000.0 ** (np.arange(0, size, 2) / size)
            for i, size in enumerate((head_dim - 2 * part, part, part))
        ],
        axis=1,
    )


@pytest.mark.parametrize("grid", [(1024, 1, 1), (1, 1024, 1), (1, 1, 1024), (3, 4, 5)])
@pytest.mark.parametrize("head_dim", [128, 16, 24])
def test_rotary_tables_are_exact_to_the_last_position(head_dim, grid):
    cos, sin = rotary_tables(head_dim, *grid)
    angles = exact_angles(head_dim, *grid)
    assert cos.dtype == sin.dtype == jnp.float32
    assert cos.shape == (np.prod(grid), head_dim // 2)
    assert np.abs(cos - np.cos(angles)).max() < 1e-7
    assert np.abs(sin - np.sin(angles)).max() < 1e-7


def test_rotation_of_adjacent_pairs():
    """Products of rotated queries and keys are those of complex numbers turned by their angles."""
    q, k = normal(0, 2, 12, 3, 16), normal(1, 2, 12, 3, 16)
    tables = rotary_tables(16, 3, 2, 2)
    turn = np.exp(1j * exact_angles(16, 3, 2, 2))[None, :, None, :]
    pairs = [(a[..., 0::2] + 1j * a[..., 1::2]) * turn for a in map(np.asarray, (q, k))]
    want = np.einsum("bnkd,bmkd->bknm", pairs[0], pairs[1].conj()).real
    got = jnp.einsum("bnkd,bmkd->bknm", apply_rotary(q, *tables), apply_rotary(k, *tables))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_timestep_embedding_tells_all_timesteps_apart():
    timesteps = np.arange(1000, dtype=np.int32)
    got = np.asarray(timestep_embedding(jnp.asarray(timesteps), 256))
    angles = timesteps[:, None] * 10000.0 ** (-np.arange(128) / 128)
    np.testing.assert_allclose(got, np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=1e-4)
    assert len(np.unique(got.round(3), axis=0)) == 1000
