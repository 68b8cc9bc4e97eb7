"""Rollout and update: on-policy ratio, exact accumulation, rows that do not see their neighbours, and what is left untouched."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_idgrpo import flow, grpo, rng
from jax_idgrpo.config import Config, GrpoConfig, MeshConfig, RolloutConfig, objectives
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel import sharding
from jax_idgrpo.planning import cost_model
from jax_idgrpo.sampling import rollout
from jax_idgrpo.sampling.conditioning import select
from jax_idgrpo.sampling.policy import PolicyInputs
from jax_idgrpo.training import setup, update
from jax_idgrpo.training.state import start
from tests.helpers.update import (
    ADVANTAGE,
    FIRST,
    FRAMES,
    NEGATIVE,
    NOISE,
    OBJECTIVES,
    ROWS,
    SCHEDULE,
    STEPS,
    asked,
    assert_awm_is_on_policy,
    assert_descends_without_a_trajectory,
    assert_micro_batches_equal_one_batch,
    assert_reward_gradient_climbs,
    chunked,
    distance_from_the_base,
    generated,
    gradients,
    model,
    named,
    objective,
    sampled,
    vector,
    whole,
)


@pytest.mark.parametrize("sampler", ["identity", "flow", "dance", "cps"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_first_update_after_a_rollout_has_a_ratio_of_exactly_one(guidance, sampler):
    actor, lora, base = model(guidance=guidance)
    schedule = rollout.Schedule.make(STEPS, 3.0, sampler)
    batch = chunked([sampled((actor, lora, base), schedule=schedule)], ADVANTAGE)
    _, rows = gradients(objective(actor, kl=0.0), lora, base, batch, schedule)
    np.testing.assert_array_equal(rows["ratio"], np.ones((1, STEPS - 1, ROWS)))


@pytest.mark.parametrize("wanted", ["guard", "divergence"])
def test_every_replaying_objective_is_on_policy_with_a_step_per_prompt(wanted):
    actor, lora, base = model()
    window = whole(jnp.asarray([1, 1, 0, 0]), 1)
    chunk = sampled((actor, lora, base), window=window)
    fixed = objective(
        actor, objective=wanted, kl_units="velocity", time_weights=wanted == "divergence"
    )
    gradient, rows = gradients(fixed, lora, base, chunked([chunk], ADVANTAGE))
    np.testing.assert_array_equal(rows["ratio"], np.ones((1, 1, ROWS)))
    np.testing.assert_array_equal(rows["clip_fraction"], np.zeros((1, 1, ROWS)))
    assert np.all(np.isfinite(vector(gradient)))
    assert np.any(vector(gradient))
    full = sampled((actor, lora, base)).trajectory
    np.testing.assert_array_equal(
        chunk.trajectory.x[2:, 0], full.x[2:, 0]
    )  # these rows draw noise at step 0, as in the whole schedule
    assert chunk.trajectory.x.shape[1] == 2
    assert chunk.trajectory.velocity.shape[1] == 1
    assert full.x.shape[1] == STEPS


def test_rows_outside_their_window_take_euler_steps():
    actor, lora, base = model()
    late = sampled((actor, lora, base), window=whole(jnp.asarray([1, 1, 0, 0]), 1)).trajectory
    start = rng.step_noise(NOISE, -1, asked().latent_shape)
    inputs = PolicyInputs(lora, base, asked(), NEGATIVE)
    v = actor.velocity(inputs, start, SCHEDULE.timestep[0])
    euler = start + v * (SCHEDULE.sigma[1] - SCHEDULE.sigma[0])
    np.testing.assert_allclose(late.x[:2, 0], euler[:2], atol=1e-5)
    still = sampled(
        (actor, lora, base), window=whole(FIRST, 1, final_noise=False)
    ).trajectory.latents
    noisy = sampled(
        (actor, lora, base), window=whole(FIRST, 1, final_noise=True)
    ).trajectory.latents
    s = float(SCHEDULE.transition.std[-1])
    spread = np.asarray(noisy - still)[asked().frame_mask]
    assert 0.9 * s < spread.std() < 1.1 * s


def test_a_replay_at_another_dtype_is_seen_in_the_ratio():
    chunk = sampled(model())
    actor, lora, base = model("bfloat16")
    _, rows = gradients(objective(actor), lora, base, chunked([chunk], ADVANTAGE))
    assert float(jnp.abs(rows["ratio"] - 1).max()) > 1e-4


@pytest.mark.parametrize("wanted", [*OBJECTIVES[:2], OBJECTIVES[4]], ids=named)
def test_micro_batches_equal_one_batch(wanted):
    assert_micro_batches_equal_one_batch(wanted)


def test_a_row_of_weight_zero_changes_nothing():
    actor, lora, base = model()
    chunk, weight = sampled((actor, lora, base)), jnp.asarray([1.0, 1, 1, 0])
    fixed = objective(actor, time_weights=True)
    got, _ = gradients(fixed, lora, base, chunked([chunk], ADVANTAGE, weight))
    other, _ = gradients(fixed, lora, base, chunked([chunk], ADVANTAGE.at[3].set(5.0), weight))
    np.testing.assert_array_equal(vector(got), vector(other))
    nothing, _ = gradients(fixed, lora, base, chunked([chunk], ADVANTAGE, jnp.zeros(ROWS)))
    assert not np.any(np.isfinite(vector(nothing)))  # skipped as any update that is not finite


def test_time_weights_have_mean_one_and_change_only_the_policy_loss():
    actor, lora, base = model()
    chunk = sampled((actor, lora, base))
    batch = chunked([chunk], ADVANTAGE)
    plain = [
        np.asarray(g)
        for g in jax.tree.leaves(gradients(objective(actor, kl=0.0), lora, base, batch)[0])
    ]
    weighted = [
        np.asarray(g)
        for g in jax.tree.leaves(
            gradients(objective(actor, kl=0.0, time_weights=True), lora, base, batch)[0]
        )
    ]
    assert any(np.abs(a - b).max() > 1e-6 for a, b in zip(plain, weighted, strict=True))
    only_kl = ADVANTAGE * 0
    same = [
        gradients(objective(actor, time_weights=t), lora, base, chunked([chunk], only_kl))[0]
        for t in (False, True)
    ]
    np.testing.assert_array_equal(vector(same[0]), vector(same[1]))


def test_awm_is_on_policy_at_its_first_update_also_with_the_old_adapter_run_again():
    assert_awm_is_on_policy(3.0, "grid")


def test_nft_stores_no_trajectory_and_descends():
    assert_descends_without_a_trajectory(OBJECTIVES[2])


@pytest.mark.parametrize("kind", ["nft", "reward_gradient"])
def test_sampling_without_a_trajectory_reads_nothing_from_the_host(kind):
    wanted = GrpoConfig(objective=kind, kl_units="velocity", gradient_steps=2)
    config = Config(rollout=RolloutConfig(steps=STEPS, window="none"), grpo=wanted)
    actor, lora, base = model()
    on_device = sharding.replicated(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    given, schedule, noise, window = sharding.device_put_global(
        (PolicyInputs(lora, base, asked(), NEGATIVE), SCHEDULE, NOISE, whole()), on_device
    )
    with jax.transfer_guard("disallow"):
        trajectory = setup.sample(config, actor, given, schedule, noise, noise, window)
    np.testing.assert_allclose(
        trajectory.latents, rollout.generate(actor, given, schedule, noise), atol=1e-5
    )


def test_reward_gradient_runs_the_last_steps_again_and_climbs():
    assert_reward_gradient_climbs(STEPS - 1)


def test_weights_by_noise_have_mean_one_over_the_last_steps():
    """By the distances of two steps, of which that of the last one is known alone."""
    even, sigma, alone = (
        distance_from_the_base(kl_weights=weights, gradient_steps=last)
        for weights, last in (("even", 2), ("sigma", 2), ("sigma", 1))
    )
    noise = np.asarray(SCHEDULE.sigma[STEPS - 2 : STEPS])
    assert float(noise[0]) > float(noise[1]) > 0
    expected = ((even - alone) * noise[0] + alone * noise[1]) / noise.mean()
    np.testing.assert_allclose(sigma, expected, rtol=1e-4)
    assert np.abs(sigma / even - 1).max() > 1e-3


def test_a_pair_is_noised_alike():
    """With one latent twice, the pair's errors change alike and the loss is log 2 whatever the adapter is."""
    actor, lora, base = model(guidance=1.0)
    twice = jax.tree.map(
        lambda leaf: leaf[jnp.asarray([0, 0, 2, 2])], generated((actor, lora, base))
    )
    batch = chunked([twice], ADVANTAGE)
    _, rows = gradients(
        objective(actor, objective="dpo", kl_units="velocity", best=1, worst=1), lora, base, batch
    )
    np.testing.assert_allclose(rows["policy_loss"], np.full((1, 2, ROWS), np.log(2)), rtol=1e-3)


def test_rows_are_taken_through_all_chunks_and_stay_on_policy():
    actor, lora, base = model()
    halves = [sampled((actor, lora, base), rows) for rows in (slice(0, 2), slice(2, 4))]
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    batch = update.select_rows(chunked(halves, ADVANTAGE), jnp.asarray([3, 1]), mesh)
    np.testing.assert_array_equal(batch.advantage, [[ADVANTAGE[3], ADVANTAGE[1]]])
    np.testing.assert_array_equal(batch.trajectory.x[0, 0], halves[1].trajectory.x[1])
    np.testing.assert_array_equal(batch.conditioning.text[0, 1], asked().text[1])
    _, rows = gradients(objective(actor), lora, base, batch)
    np.testing.assert_array_equal(rows["ratio"], np.ones((1, STEPS - 1, 2)))


def test_an_objective_is_one_entry_and_one_function(monkeypatch):
    """The configuration, the sampler and the update find all they need in the table."""

    def plain_rows(level, settings):
        return {
            "policy_loss": level.advantage
            * flow.row_mean((level.v - level.target) ** 2, level.mask),
            "mine": level.sigma,
        }

    monkeypatch.setitem(
        objectives.OBJECTIVES, "plain", objectives.Objective("latents", "plain_rows")
    )
    monkeypatch.setattr(grpo, "plain_rows", plain_rows, raising=False)
    actor, lora, base = model(guidance=1.0)
    fixed = objective(actor, objective="plain", kl=0.0)
    gradient, rows = gradients(
        fixed, lora, base, chunked([generated((actor, lora, base))], ADVANTAGE)
    )
    assert np.any(vector(gradient))
    assert rows["mine"].shape == (1, 2, ROWS)
    with pytest.raises(
        UserError,
        match=r"grpo\.kl_units std requires an objective that replays sampling steps; 'plain' does not",
    ):
        GrpoConfig(objective="plain")
    with pytest.raises(ValueError, match="unknown needs \\['luck'\\]"):
        objectives.Objective("latents", "plain_rows", frozenset({"luck"}))


def test_updates_take_turns_on_shares_that_stay_where_they_are():
    """Two updates on halves of one rollout equal an update on each half alone."""
    actor, lora, base = model()
    halves = [sampled((actor, lora, base), rows) for rows in (slice(0, 2), slice(2, 4))]
    whole, networks = chunked(halves, ADVANTAGE), update.Networks(base=base, negative=NEGATIVE)
    for turn in (0, 1, 2):
        fixed = objective(actor, updates=2)
        state, scalars = update.update(
            fixed, start(fixed.optimizer, lora), networks, whole, SCHEDULE, jnp.int32(turn)
        )
        half = jax.tree.map(lambda leaf: leaf[turn % 2 : turn % 2 + 1], whole)
        alone = objective(actor)
        wanted, same = update.update(
            alone, start(alone.optimizer, lora), networks, half, SCHEDULE, jnp.int32(turn)
        )
        np.testing.assert_allclose(
            vector(state.params), vector(wanted.params), rtol=1e-5, atol=1e-7
        )
        assert scalars["kl"] == pytest.approx(float(same["kl"]), rel=1e-5)
        assert np.abs(vector(state.params) - vector(lora)).max() > 1e-4


def test_a_row_does_not_depend_on_its_neighbours_or_on_its_padding():
    parts = model()
    together = sampled(parts).trajectory
    given = jax.tree.map(lambda leaf: leaf[:1], asked())
    alone = sampled(parts, slice(0, 1), given).trajectory
    np.testing.assert_allclose(together.log_prob[:1], alone.log_prob, rtol=1e-5)
    real = FRAMES + 1
    bare = dataclasses.replace(
        given, control=given.control[:, :real], frame_mask=given.frame_mask[:, :real]
    )
    unpadded = sampled(parts, slice(0, 1), bare).trajectory
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
    networks = update.Networks(base=base, negative=NEGATIVE)
    moved, scalars = update.update(
        fixed, start(fixed.optimizer, lora), networks, batch, SCHEDULE, jnp.int32(0)
    )
    assert scalars["skipped"] == 0
    assert scalars["ratio_min"] == scalars["ratio_max"] == 1
    assert np.abs(vector(moved.params) - vector(lora)).max() > 0
    bad = batch.replace(advantage=batch.advantage.at[0, 0].set(jnp.nan))
    kept, scalars = update.update(
        fixed, start(fixed.optimizer, lora), networks, bad, SCHEDULE, jnp.int32(0)
    )
    assert scalars["skipped"] == 1
    np.testing.assert_array_equal(vector(kept.params), vector(lora))


def test_a_run_compiles_rollout_and_update_once():
    """Three steps, each from the state that the one before returned: the first may compile, the others find their programs."""
    actor, lora, base = model()
    state, networks = start(optax.sgd(0.1), lora), update.Networks(base=base, negative=NEGATIVE)
    fixed, sizes = objective(actor), []
    for step in range(3):
        batch = chunked([sampled((actor, state.params, base))], ADVANTAGE)
        state, _ = update.update(fixed, state, networks, batch, SCHEDULE, jnp.int32(step))
        sizes.append(
            (rollout.sample._cache_size(), update._room._cache_size(), update.update._cache_size())
        )
    assert sizes[1] == sizes[2] == sizes[0]


def test_noise_is_a_function_of_seed_prompt_member_and_step_and_prefix_stable():
    draw = functools.partial(rng.step_noise, shape=(3, 2, 2))
    first = draw(NOISE, 0)
    every = np.stack([np.asarray(draw(NOISE, step)) for step in (-1, 0, 1)])
    flat = every.reshape(-1, 12)
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.95
    np.testing.assert_array_equal(draw(NOISE[2:3], 0)[0], first[2])
    np.testing.assert_array_equal(rng.step_noise(NOISE, 0, (5, 2, 2))[:, :3], first)


def starts(step=0, **values):
    config = RolloutConfig(prompts=6, **values)
    return rollout.window_starts(config, 0, step)


def test_windows():
    np.testing.assert_array_equal(starts(steps=25), np.zeros(6))
    np.testing.assert_array_equal(
        starts(5, steps=12, window="fixed", window_start=2, window_size=3), np.full(6, 2)
    )
    drawn = dict(steps=12, window="random", window_size=3)
    assert {int(starts(step, **drawn)[0]) for step in range(40)} == {0, 1, 2, 3}
    assert np.ptp(starts(7, **drawn)) == 0
    np.testing.assert_array_equal(starts(7, **drawn), starts(7, **drawn))
    single = dict(steps=20, window="per_prompt", window_size=1)
    every = np.stack([starts(step, **single) for step in range(60)])
    assert set(every.ravel()) == set(range(10))
    assert np.ptp(every, axis=1).max() > 0
    moving = dict(steps=8, window="progressive", window_start=1, window_size=4, window_every=3)
    assert [int(starts(step, **moving)[0]) for step in range(12)] == [
        1,
        1,
        1,
        2,
        2,
        2,
        3,
        3,
        3,
        1,
        1,
        1,
    ]


def test_generate_is_sampling_without_noise():
    actor, lora, base = model()
    quiet = rollout.Schedule.make(STEPS, 3.0)
    quiet = quiet.replace(
        transition=flow.identity_sde(quiet.sigma[:-1], quiet.sigma[1:], quiet.sigma[1], 0.0)
    )
    still = sampled((actor, lora, base), schedule=quiet).trajectory.latents
    got = rollout.generate(actor, PolicyInputs(lora, base, asked(), NEGATIVE), SCHEDULE, NOISE)
    np.testing.assert_allclose(got, still, atol=1e-5)


def test_groups_repeat_their_prompt():
    repeated = select(asked(), np.repeat(np.arange(ROWS), 2))
    assert repeated.text.shape[0] == 2 * ROWS
    np.testing.assert_array_equal(repeated.control[2], repeated.control[3])


def test_a_group_may_start_from_one_noise_and_parts_at_its_first_stochastic_step():
    actor, lora, base = model()
    given = select(asked(), np.array([0, 0, 2, 2]))
    keys_of_start = NOISE[jnp.asarray([0, 0, 2, 2])]
    x = rollout.sample(
        actor,
        PolicyInputs(lora, base, given, NEGATIVE),
        SCHEDULE,
        keys_of_start,
        NOISE,
        whole(),
    ).x
    np.testing.assert_array_equal(x[0, 0], x[1, 0])
    assert float(jnp.abs(x[0, 0] - x[2, 0]).max()) > 0.1
    assert float(jnp.abs(x[0, 1] - x[1, 1]).max()) > 0.01


def test_what_depends_on_the_prompt_alone_is_computed_once_per_rollout():
    """The arithmetic of a rollout is that of its steps and one prefill; a velocity by itself has a prefill of its own, to the same bits."""
    actor, lora, base = model(guidance=3.0)
    latents = sampled((actor, lora, base)).trajectory.latents
    inputs = PolicyInputs(lora, base, asked(), NEGATIVE)

    def rollout_of(steps):
        schedule = rollout.Schedule.make(steps, 3.0)
        given = (inputs, schedule, NOISE, NOISE, whole())
        return cost_model.flops(jax.make_jaxpr(functools.partial(rollout.sample, actor))(*given))

    def velocity(prompt=None):
        return actor.velocity(inputs, latents, SCHEDULE.timestep[0], prompt)

    prefill = functools.partial(actor.prefill, inputs)
    alone, before = (
        cost_model.flops(jax.make_jaxpr(function)()) for function in (velocity, prefill)
    )
    assert 0.01 * alone < before < 0.5 * alone
    for steps in (2, 8):
        assert abs(rollout_of(steps) - (steps * (alone - before) + before)) < 0.01 * before
    np.testing.assert_array_equal(jax.jit(velocity)(jax.jit(prefill)()), jax.jit(velocity)())


def test_the_fence_round_a_velocity_asks_for_no_gradient_of_frozen_weights():
    """Else every update would cost the products of a training of all weights: forward, backward, and their gradients."""
    actor, lora, base = model()
    latents = sampled((actor, lora, base)).trajectory.latents

    def total(lora):
        inputs = PolicyInputs(lora, base, asked(), NEGATIVE)
        return jnp.sum(actor.velocity(inputs, latents, SCHEDULE.timestep[0]))

    forward, gradient = (
        cost_model.flops(jax.make_jaxpr(function)(lora)) for function in (total, jax.grad(total))
    )
    assert 1.5 * forward < gradient < 2.5 * forward
