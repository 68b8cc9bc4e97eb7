"""The text encoder by itself: position buckets, padding that changes nothing, dtypes; parity is in parity/test_umt5.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.umt5 import UMT5Config, UMT5Encoder, relative_buckets

CONFIG = UMT5Config(vocab_size=23, d_model=16, d_kv=6, num_heads=2, d_ff=24, num_layers=2)


@functools.cache
def encoder(dtype: str = "float32") -> UMT5Encoder:
    """The same random weights in either dtype, norm scales and position biases among them."""
    rng = np.random.default_rng(1)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(loc=leaf.ndim == 1, scale=0.4, size=leaf.shape), leaf.dtype)

    graph, shapes = nnx.split(
        nnx.eval_shape(lambda: UMT5Encoder(CONFIG, dtypes=Dtypes.named(dtype), rngs=nnx.Rngs(0)))
    )
    return nnx.merge(graph, jax.tree.map(draw, shapes))


@nnx.jit
def apply(model: UMT5Encoder, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return model(ids, mask)


def encode(ids: np.ndarray, mask: np.ndarray, dtype: str = "float32") -> jax.Array:
    return apply(encoder(dtype), jnp.asarray(ids), jnp.asarray(mask))


def inputs(length: int = 12) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(1, CONFIG.vocab_size, (2, length)).astype(np.int32)
    mask = (np.arange(length) < np.array([[length], [5]])).astype(np.int32)
    return ids * mask, mask


def test_buckets_are_the_published_table():
    last = {
        7: 7,
        8: 11,
        9: 15,
        10: 22,
        11: 31,
        12: 45,
        13: 63,
        14: 90,
        15: 299,
    }  # bucket -> its largest distance
    expected = [next(b for b in (*range(7), *last) if n <= last.get(b, b)) for n in range(300)]
    buckets = relative_buckets(300, 32, 128)
    np.testing.assert_array_equal(buckets[:, 0], expected)  # keys before the query
    np.testing.assert_array_equal(buckets[0, 1:], np.array(expected)[1:] + 16)  # keys behind it
    np.testing.assert_array_equal(buckets[7:20, 9], buckets[0:13, 2])


def test_padding_has_no_say_and_its_rows_are_zero():
    ids, mask = inputs()
    full = encode(ids, mask)
    noisy = encode(np.where(mask, ids, 7), mask)
    np.testing.assert_array_equal(full, noisy)
    np.testing.assert_array_equal(full[1, 5:], 0)
    assert np.abs(full[1, :5]).min(axis=-1).max() > 0
    np.testing.assert_allclose(full[1, :5], encode(ids[1:, :5], mask[1:, :5])[0], atol=2e-6)
    unmasked = encode(ids, np.ones_like(mask))
    assert np.abs(full[1, :5] - unmasked[1, :5]).max() > 1e-2


def test_order_matters():
    ids, mask = inputs()
    ones = np.ones_like(mask)
    assert np.abs(encode(ids[:, ::-1], ones)[:, ::-1] - encode(ids, ones)).max() > 1e-2


def test_bfloat16_is_near_float32_and_sensitive_leaves_stay_float32():
    ids, mask = inputs()
    got, want, model = encode(ids, mask, "bfloat16"), encode(ids, mask), encoder("bfloat16")
    assert got.dtype == jnp.bfloat16
    assert want.dtype == jnp.float32
    error = np.linalg.norm(got.astype(np.float32) - want) / np.linalg.norm(want)
    assert 1e-5 < error < 3e-2
    assert model.norm.scale.dtype == model.blocks.norm1.scale.dtype == jnp.float32
    assert model.blocks.attention.relative_bias.dtype == jnp.float32
    assert model.blocks.ffn.gate.kernel.dtype == jnp.bfloat16


def test_wrong_shapes_and_sizes_are_refused():
    ids, mask = inputs()
    with pytest.raises(
        (UserError, TypeCheckError), match="mask"
    ):  # the annotations speak first in the tests
        encode(ids, mask[:, :-1])
    with pytest.raises(UserError, match="d_ff is 0"):
        UMT5Config(vocab_size=23, d_model=16, d_kv=6, num_heads=2, d_ff=0, num_layers=2)
    with pytest.raises(UserError, match="max_distance"):
        UMT5Config(
            vocab_size=23, d_model=16, d_kv=6, num_heads=2, d_ff=8, num_layers=2, max_distance=8
        )
