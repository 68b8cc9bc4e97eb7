"""Layers: linear with adapter, norms and position tables against float64 NumPy."""

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
    _depthwise_grouped,
    apply_rotary,
    depthwise_conv,
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
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(adapted, LoRAParam))} == {
            jnp.dtype("float32")
        }


def test_adapter_starts_as_the_recipe_says():
    layer = Linear(400, 8, rank=16, alpha=16.0, dtypes=FLOAT32, rngs=nnx.Rngs(0))
    assert float(jnp.std(layer.lora_a[...])) == pytest.approx(1 / 16, rel=0.05)
    assert not layer.lora_b[...].any()


@pytest.mark.parametrize(("inside", "outside"), [(3, 7), (7, 3)])
def test_matmul_gradients(inside, outside):
    """The hand-written gradients against those JAX derives, for both orders of the flattened product."""
    x, kernel, weight = (
        normal(0, 2, 5, inside),
        normal(1, inside, outside),
        normal(2, 2, 5, outside),
    )
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


@pytest.mark.parametrize("mean", [0, 1000])
def test_gradient_of_the_norm_is_that_of_the_formula(mean):
    """In float64 by hand; as far from zero as its digits allow."""
    x, dy = np.float32(mean) + normal(0, 3, 64), normal(1, 3, 64)
    exact, wide = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    centred = exact - exact.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    y = centred * scale
    want = scale * (wide - wide.mean(-1, keepdims=True) - y * (wide * y).mean(-1, keepdims=True))
    got = jax.vjp(lambda x: layer_norm(x, 1e-6), x)[1](dy)[0]
    np.testing.assert_allclose(got, want, atol=1e-6 if mean == 0 else 3e-4)
    assert layer_norm(x.astype(jnp.bfloat16), 1e-6).dtype == jnp.float32


# ---- positions -------------------------------------------------------------------------------------------------------


def exact_angles(head_dim, frames, height, width):
    part = 2 * (head_dim // 6)
    grid = np.stack(
        np.meshgrid(*map(np.arange, (frames, height, width)), indexing="ij"), -1
    ).reshape(-1, 3)
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


@pytest.mark.parametrize(("stride", "size"), [(1, (7, 5)), (2, (8, 6)), (2, (7, 5))])
def test_depthwise_convolution_is_the_grouped_one(stride, size):
    """The sum over taps of the CPU and the grouped convolution of accelerators, and their gradients."""
    x = jax.random.normal(jax.random.key(0), (2, *size, 4))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 4))
    values, gradients = [], []
    for conv in (depthwise_conv, _depthwise_grouped):
        values.append(conv(x, kernel, stride=stride))
        gradients.append(
            jax.grad(lambda *a: jnp.sum(conv(*a, stride=stride) ** 2), (0, 1))(x, kernel)
        )
    np.testing.assert_allclose(*values, atol=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
