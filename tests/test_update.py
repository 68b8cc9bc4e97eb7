"""Rollout and update: on-policy ratio, exact accumulation, rows that do not see their neighbours, and what is left untouched."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_idgrpo import keys, policy, rollout, update
from jax_idgrpo.conditioning import Conditioning, frame_mask, select
from jax_idgrpo.config import GrpoConfig, RolloutConfig
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.wan import WanConfig, WanTransformer
from jax_idgrpo.state import start

ROWS, STEPS, FRAMES, PEOPLE, LENGTH, WIDTH = 4, 3, 2, 2, 5, 16
CONFIG = WanConfig(
    num_layers=2, num_heads=2, head_dim=12, ffn_dim=32, text_dim=WIDTH, freq_dim=16, vace_layers=(0,), rank=2, alpha=2.0, unroll=True
)
SCHEDULE = rollout.Schedule.make(STEPS, 3.0)
TRAINED = np.arange(STEPS - 1)


@functools.cache
def model(dtype="float32", guidance=3.0):
    """A policy whose adapter and zero-initialised layers are all random."""
    transformer = WanTransformer(CONFIG, dtypes=Dtypes.named(dtype), rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.state(transformer))
    rng = np.random.default_rng(1)
    noisy = [leaf + 0.1 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    nnx.update(transformer, jax.tree.unflatten(tree, noisy))
    return policy.split(transformer, guidance)


@functools.cache
def asked():
    rng = np.random.default_rng(2)
    references = jnp.asarray([1, 2, 2, 1])
    frames = FRAMES + PEOPLE
    return Conditioning(
        text=jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32),
        control=jnp.asarray(rng.normal(size=(ROWS, frames, 4, 6, 96)), jnp.float32),
        frame_mask=frame_mask(references, FRAMES, PEOPLE),
        references=references,
    )


NEGATIVE = jnp.asarray(np.random.default_rng(3).normal(size=(LENGTH, WIDTH)), jnp.float32)
NOISE = keys.row_keys(keys.key(0, "noise"), jnp.asarray([7, 7, 9, 9]), jnp.asarray([0, 1, 0, 1]))
ADVANTAGE = jnp.asarray([1.3, -0.7, 0.2, -0.9])
DRAWS = jnp.asarray(rollout.stochastic(RolloutConfig(steps=STEPS), TRAINED))


def sampled(parts, rows=slice(None), given=None):
    actor, lora, base = parts
    given = given or jax.tree.map(lambda leaf: leaf[rows], asked())
    return rollout.sample(actor, lora, base, given, NEGATIVE, SCHEDULE, NOISE[rows], NOISE[rows], DRAWS), given


def chunked(pairs, advantage):
    trajectory, conditioning = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
    return update.Rollout(trajectory=trajectory, conditioning=conditioning, advantage=advantage.reshape(len(pairs), -1))


def objective(actor, **changes):
    return update.Objective(policy=actor, grpo=GrpoConfig(**changes), optimizer=optax.sgd(1.0), ema_decay=0.9)


@functools.partial(jax.jit, static_argnums=0)
def gradients(fixed, lora, base, batch):
    return update.gradients(fixed, lora, base, NEGATIVE, batch, SCHEDULE, jnp.asarray(TRAINED))


def vector(state):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(state)])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_first_update_after_a_rollout_has_a_ratio_of_exactly_one(guidance):
    actor, lora, base = model(guidance=guidance)
    _, rows = gradients(objective(actor), lora, base, chunked([sampled((actor, lora, base))], ADVANTAGE))
    np.testing.assert_array_equal(rows["ratio"], np.ones((1, len(TRAINED), ROWS)))


def test_a_replay_at_another_dtype_is_seen_in_the_ratio():
    pair = sampled(model())
    actor, lora, base = model("bfloat16")
    _, rows = gradients(objective(actor), lora, base, chunked([pair], ADVANTAGE))
    assert float(jnp.abs(rows["ratio"] - 1).max()) > 1e-4


def test_micro_batches_equal_one_batch():
    actor, lora, base = model()
    whole, _ = gradients(objective(actor), lora, base, chunked([sampled((actor, lora, base))], ADVANTAGE))
    halves = [sampled((actor, lora, base), rows) for rows in (slice(0, 2), slice(2, 4))]
    parts, _ = gradients(objective(actor), lora, base, chunked(halves, ADVANTAGE))
    assert np.linalg.norm(vector(parts) - vector(whole)) < 1e-5 * np.linalg.norm(vector(whole))


def test_a_row_does_not_depend_on_its_neighbours_or_on_its_padding():
    parts = model()
    together, _ = sampled(parts)
    given = jax.tree.map(lambda leaf: leaf[:1], asked())
    alone, _ = sampled(parts, slice(0, 1), given)
    np.testing.assert_allclose(together.log_prob[:, :1], alone.log_prob, rtol=1e-5)
    real = FRAMES + 1
    bare = dataclasses.replace(given, control=given.control[:, :real], frame_mask=given.frame_mask[:, :real])
    unpadded, _ = sampled(parts, slice(0, 1), bare)
    np.testing.assert_allclose(alone.x[:, :, :real], unpadded.x, atol=1e-4)
    np.testing.assert_allclose(alone.log_prob, unpadded.log_prob, rtol=1e-5)


def test_the_gradient_raises_the_probability_of_the_better_videos():
    actor, lora, base = model()
    batch = chunked([sampled((actor, lora, base))], ADVANTAGE)
    fixed = objective(actor, kl=0.0)
    gradient, rows = gradients(fixed, lora, base, batch)
    size = 0.05 / optax.global_norm(gradient)
    stepped = jax.tree.map(lambda leaf, slope: leaf - size * slope, lora, gradient)
    _, after = gradients(fixed, stepped, base, batch)
    assert float(after["policy_loss"].mean()) < float(rows["policy_loss"].mean())


def test_kl_is_zero_at_the_base_and_positive_away_from_it():
    actor, lora, base = model()
    zero = jax.tree.map(jnp.zeros_like, lora)
    batch = chunked([sampled((actor, zero, base))], ADVANTAGE)
    assert float(gradients(objective(actor), zero, base, batch)[1]["kl"].max()) < 1e-9
    assert float(gradients(objective(actor), lora, base, batch)[1]["kl"].min()) > 1e-6


def test_update_moves_the_adapter_once_and_a_gradient_that_is_not_finite_moves_nothing():
    actor, lora, base = model()
    fixed = objective(actor)
    batch = chunked([sampled((actor, lora, base))], ADVANTAGE)
    arguments = (SCHEDULE, jnp.asarray(TRAINED), jnp.int32(0))
    moved, scalars = update.update(fixed, start(fixed.optimizer, lora), base, NEGATIVE, batch, *arguments)
    assert scalars["skipped"] == 0 and scalars["ratio_min"] == scalars["ratio_max"] == 1
    assert np.abs(vector(moved.params) - vector(lora)).max() > 0
    bad = batch.replace(advantage=batch.advantage.at[0, 0].set(jnp.nan))
    kept, scalars = update.update(fixed, start(fixed.optimizer, lora), base, NEGATIVE, bad, *arguments)
    assert scalars["skipped"] == 1
    np.testing.assert_array_equal(vector(kept.params), vector(lora))


def test_noise_is_a_function_of_seed_prompt_member_and_step_and_prefix_stable():
    draw = functools.partial(keys.step_noise, shape=(3, 2, 2))
    first = draw(NOISE, 0)
    every = np.stack([np.asarray(draw(NOISE, step)) for step in (-1, 0, 1)])
    flat = every.reshape(-1, 12)
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.95
    np.testing.assert_array_equal(draw(NOISE[2:3], 0)[0], first[2])
    np.testing.assert_array_equal(keys.step_noise(NOISE, 0, (5, 2, 2))[:, :3], first)


def test_windows():
    assert list(rollout.window(RolloutConfig(steps=25), 0, 0)) == list(range(24))
    fixed = RolloutConfig(steps=12, window="fixed", window_start=2, window_size=3)
    assert list(rollout.window(fixed, 0, 5)) == [2, 3, 4]
    drawn = RolloutConfig(steps=12, window="random", window_size=3)
    starts = {int(rollout.window(drawn, 0, step)[0]) for step in range(40)}
    assert starts == {0, 1, 2, 3}
    assert list(rollout.window(drawn, 0, 7)) == list(rollout.window(drawn, 0, 7))
    last = RolloutConfig(steps=4, final_step="sde")
    assert list(rollout.stochastic(last, np.arange(3))) == [True] * 4
    assert list(rollout.stochastic(RolloutConfig(steps=4), np.arange(3))) == [True] * 3 + [False]


def test_generate_is_sampling_without_noise():
    actor, lora, base = model()
    still, _ = rollout.sample(actor, lora, base, asked(), NEGATIVE, SCHEDULE, NOISE, NOISE, jnp.zeros(STEPS, bool)), None
    got = rollout.generate(actor, lora, base, asked(), NEGATIVE, SCHEDULE, NOISE)
    np.testing.assert_allclose(got, still.x[-1], atol=1e-5)


def test_groups_repeat_their_prompt():
    repeated = select(asked(), np.repeat(np.arange(ROWS), 2))
    assert repeated.text.shape[0] == 2 * ROWS
    np.testing.assert_array_equal(repeated.control[2], repeated.control[3])


def test_a_group_may_start_from_one_noise_and_parts_at_its_first_stochastic_step():
    actor, lora, base = model()
    given = select(asked(), np.array([0, 0, 2, 2]))
    keys_of_start = NOISE[jnp.asarray([0, 0, 2, 2])]
    x = rollout.sample(actor, lora, base, given, NEGATIVE, SCHEDULE, keys_of_start, NOISE, DRAWS).x
    np.testing.assert_array_equal(x[0, 0], x[0, 1])
    assert float(jnp.abs(x[0, 0] - x[0, 2]).max()) > 0.1
    assert float(jnp.abs(x[1, 0] - x[1, 1]).max()) > 0.01
