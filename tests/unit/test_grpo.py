"""Advantages and objectives: the published code (tests/golden), worked numbers, and the properties each objective is chosen for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo import flow, grpo
from tests.helpers.paths import GOLDEN

CASES = (
    "even",
    "uneven",
    "single_members",
    "constant_groups",
    "all_constant",
    "near_ties",
    "large_offset",
    "outlier",
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("global_std", [False, True])
def test_advantages_equal_the_published_code(case, global_std):
    data = np.load(GOLDEN / "advantages.npz")
    want = data[f"{case}_advantages" + ("_global_std" if global_std else "")]
    got = grpo.advantages(
        data[f"{case}_rewards"], data[f"{case}_groups"], clip=np.inf, global_std=global_std
    )
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_advantages_worked_numbers_clip_and_order():
    rewards, groups = np.array([1.0, 2, 3, 4]), np.zeros(4, int)
    got = np.asarray(grpo.advantages(rewards, groups))
    np.testing.assert_allclose(got, [-1.341521, -0.447174, 0.447174, 1.341521], atol=1e-5)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(grpo.advantages(rewards[order], groups), got[order], atol=1e-6)
    assert float(grpo.advantages(rewards, groups, clip=0.5).max()) == 0.5


def test_constant_group_is_exactly_zero():
    rewards = np.full(7, 2.7000001, np.float32)
    np.testing.assert_array_equal(grpo.advantages(rewards, np.zeros(7, int)), np.zeros(7))


@pytest.mark.parametrize("row", range(3))
def test_loss_and_gradient_equal_the_published_code(row):
    data = np.load(GOLDEN / "ppo_loss.npz")
    d = {k: data[k][row] for k in data.files}
    step = flow.identity_sde(d["sigma"], d["sigma_next"], d["sigma_max"])

    def loss(v):
        new = flow.step(step, d["x"], v, x_next=d["x_next"])
        clipped = grpo.clipped_loss(
            new.log_prob - d["old_log_prob"], jnp.clip(d["advantages"], -5, 5), clip=1e-3
        )
        kl = flow.divergence(step, v, d["v_ref"])
        return clipped.loss.mean() + 0.004 * kl.mean(), (clipped, kl, new)

    (value, (clipped, kl, new)), gradient = jax.value_and_grad(loss, has_aux=True)(d["v"])
    np.testing.assert_allclose(new.log_prob, d["log_prob"], rtol=1e-5)
    np.testing.assert_allclose(clipped.ratio, d["ratio"], rtol=1e-5)
    np.testing.assert_allclose(clipped.loss.mean(), d["policy_loss"], rtol=1e-5)
    np.testing.assert_allclose(kl.mean(), d["kl_loss"], rtol=1e-5)
    np.testing.assert_allclose(value, d["loss"], rtol=1e-5)
    assert np.linalg.norm(gradient - d["grad_loss"]) / np.linalg.norm(d["grad_loss"]) < 1e-4


def test_clip_stops_the_gradient_of_a_row_that_went_too_far():
    advantage, log_ratio = jnp.array([1.0, 1.0, -1.0, -1.0]), jnp.array([0.01, -0.01, 0.01, -0.01])
    gradient = jax.grad(
        lambda log_ratio: grpo.clipped_loss(log_ratio, advantage, clip=1e-3).loss.sum()
    )(log_ratio)
    np.testing.assert_array_equal(np.asarray(gradient) != 0, [False, True, True, False])
    np.testing.assert_array_equal(
        grpo.clipped_loss(log_ratio, advantage, clip=1e-3).stopped, [True, False, False, True]
    )


def test_a_reward_that_is_not_a_number_costs_its_own_video_only():
    rewards, groups = (
        np.array([1.0, np.nan, 2, 3, 4, np.inf, 7, 9]),
        np.array([0, 0, 0, 0, 0, 1, 1, 1]),
    )
    for global_std in (False, True):
        got = grpo.advantages(rewards, groups, global_std=global_std)
        seen = np.isfinite(rewards)
        np.testing.assert_array_equal(np.asarray(got)[~seen], 0)
        np.testing.assert_allclose(
            got[seen],
            grpo.advantages(rewards[seen], groups[seen], global_std=global_std),
            rtol=1e-5,
        )
    np.testing.assert_array_equal(
        grpo.advantages(np.full(3, np.nan), np.zeros(3, int)), np.zeros(3)
    )


def test_best_and_worst_of_every_group():
    scores = np.array([[3.0, 9, 1, 5, 7], [2, 2, 2, 2, 2], [np.nan, 4, np.inf, 1, 2]])
    np.testing.assert_array_equal(
        grpo.best_and_worst(scores, 2, 2), [[1, 4, 0, 2], [0, 1, 3, 4], [1, 4, 3, 0]]
    )
    np.testing.assert_array_equal(grpo.best_and_worst(scores, 1, 1)[0], [1, 2])
    np.testing.assert_array_equal(grpo.best_and_worst(scores, 1, 0)[0], [1])
    shape = jax.eval_shape(
        lambda s: grpo.best_and_worst(s, 4, 4), jax.ShapeDtypeStruct((16, 24), jnp.float32)
    ).shape
    assert shape == (16, 8)


def replayed(seed=0, rows=64, size=1e-3):
    """A step of the Identity SDE, replayed by policies whose velocities differ from the sampler's by `size`."""
    rng = np.random.default_rng(seed)
    s = flow.sigmas(25, 3.0)
    x, v, noise, off = (
        jnp.asarray(rng.normal(size=(rows, 2, 8, 8, 16)), jnp.float32) for _ in range(4)
    )
    step = flow.identity_sde(s[12], s[13], s[1])
    x_next = flow.step(step, x, v, noise=noise).x_next
    return step, x, v, v + size * off, x_next


def test_guard_removes_the_bias_of_the_ratio():
    """The mean of the plain log-ratio is -divergence, so positive advantages rarely reach their clip; the guarded one has mean 0."""
    step, x, old, new, x_next = replayed(size=0.5)
    change, divergence = flow.change(step, x, new, old, x_next), flow.divergence(step, new, old)
    np.testing.assert_allclose(change.log_ratio.mean(), -divergence.mean(), rtol=0.1)
    assert np.mean(change.log_ratio > 0) < 0.3
    np.testing.assert_allclose(
        change.guarded, (change.log_ratio + divergence) * step.std, rtol=2e-3, atol=1e-6
    )
    assert 0.35 < np.mean(change.guarded > 0) < 0.65


def test_guard_weighs_all_steps_about_alike():
    s = flow.sigmas(25, 3.0)
    steps = flow.identity_sde(s[:-1], s[1:], s[1])
    weight = np.abs(steps.b) / -np.diff(s)  # of noise in the gradient of the guarded loss
    assert weight.min() >= 1
    assert weight.max() < 1.13
    x, v, noise = (
        jnp.asarray(np.random.default_rng(n).normal(size=(1, 1, 2, 2, 4)), jnp.float32)
        for n in range(3)
    )
    for index in (0, 12, 23):
        step, dt = steps.at(index), s[index + 1] - s[index]
        x_next = flow.step(step, x, v, noise=noise).x_next

        def loss(new):
            return grpo.guarded_loss(
                flow.change(step, x, new, v, x_next).guarded, jnp.ones(1), dt, clip=1.0
            ).loss.sum()

        slope = jax.grad(loss)(v)
        np.testing.assert_allclose(slope, noise / 16 * weight[index], rtol=2e-3, atol=1e-5)


def test_divergence_mask():
    log_ratio = jnp.array([0.01, 0.01, -0.01, 0.01, -0.01])
    divergence = jnp.array([2e-5, 0.5e-5, 2e-5, 2e-5, 2e-5])
    advantage = jnp.array([1.0, 1.0, 1.0, -1.0, -1.0])
    got = grpo.masked_loss(log_ratio, divergence, advantage, limit=1e-5)
    np.testing.assert_array_equal(got.stopped, [True, False, False, False, True])
    gradient = jax.grad(
        lambda r: grpo.masked_loss(r, divergence, advantage, limit=1e-5).loss.sum()
    )(log_ratio)
    np.testing.assert_allclose(
        gradient, np.where(got.stopped, 0, -advantage * got.ratio), rtol=1e-6
    )
    np.testing.assert_array_equal(got.loss, np.where(got.stopped, 0, -advantage * got.ratio))


def test_time_weights_reproduce_the_released_table():
    """Flash-GRPO's table of 1 / c for the first ten of 20 steps at shift 3."""
    s = flow.sigmas(20, 3.0).astype(np.float64)
    inverse = np.asarray(1 / flow.identity_sde(s[:-1], s[1:], s[1]).weight)[:10]
    table = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]
    np.testing.assert_allclose(inverse, table, atol=5.1e-5)
    assert list(flow.timesteps(20, 3.0)[:10]) == [999, 982, 963, 944, 922, 899, 874, 847, 817, 785]
    weights = grpo.time_weights(1 / inverse)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-6)
    np.testing.assert_allclose(weights / weights[0], inverse / inverse[0], rtol=1e-6)
    some = grpo.time_weights(1 / inverse, (np.arange(10) < 4) * 1.0)
    np.testing.assert_allclose(some[:4].mean(), 1, rtol=1e-6)


SHAPE = (6, 3, 2, 2, 4)


def matching(seed=0):
    rng = np.random.default_rng(seed)
    v, old, target = (jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(3))
    return (
        v,
        old,
        target,
        jnp.asarray(rng.uniform(0.1, 0.95, SHAPE[0]), jnp.float32),
        jnp.asarray([5.0, 2.0, 0.0, -1.0, -5.0, -9.0]),
    )


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_minimiser_of_nft(beta):
    _, old, target, sigma, advantage = matching()
    slope = jax.grad(
        lambda v: grpo.nft_loss(
            v, old, target, sigma, advantage, beta=beta, advantage_clip=5.0, normalise=False
        ).sum()
    )
    r = np.clip(np.asarray(advantage) / 10 + 0.5, 0, 1).reshape(-1, 1, 1, 1, 1)
    best = old + (2 * r - 1) * (target - old) / beta
    assert float(jnp.abs(slope(best)).max()) < 1e-5 * float(jnp.abs(slope(old)[:2]).max()) + 1e-6
    assert float(jnp.abs(slope(old)[:2]).max()) > 1e-3
    np.testing.assert_allclose(
        slope(old)[2], np.zeros(SHAPE[1:]), atol=1e-6
    )  # an average video teaches nothing


def test_nft_against_its_formula_on_predictions_of_x0():
    v, old, target, sigma, advantage = matching(1)
    rng = np.random.default_rng(2)
    x0 = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    s = sigma.reshape(-1, 1, 1, 1, 1)
    x = (1 - s) * x0 + s * (target + x0)
    beta = 0.3
    plus, minus = beta * v + (1 - beta) * old, (1 + beta) * old - beta * v
    r, terms = np.clip(np.asarray(advantage) / 10 + 0.5, 0, 1), []
    for velocity in (plus, minus):
        off = np.asarray(x - s * velocity - x0)
        terms.append((off**2).mean((1, 2, 3, 4)) / np.maximum(np.abs(off).mean((1, 2, 3, 4)), 1e-5))
    want = 5 * (r * terms[0] + (1 - r) * terms[1]) / beta
    got = grpo.nft_loss(v, old, target, sigma, advantage, beta=beta, advantage_clip=5.0)
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("weighting", grpo.AWM_WEIGHTINGS)
def test_awm(weighting):
    """On-policy: ratio exactly 1, gradient that of flow matching times the advantage; off-policy: the written formula."""
    v, old, target, sigma, advantage = matching(3)
    advantage = advantage / 9

    def loss(v, old):
        return grpo.awm_loss(v, old, target, sigma, advantage, clip=0.5, weighting=weighting)

    np.testing.assert_array_equal(loss(old, old).ratio, np.ones(len(sigma)))
    m = lambda v: ((v - target) ** 2).mean((1, 2, 3, 4))  # noqa: E731
    log_prob = {
        "uniform": lambda v: -m(v),
        "sigma": lambda v: -sigma * m(v),
        "sigma2": lambda v: -(sigma**2) * m(v),
        "huber": lambda v: -(jnp.sqrt(m(v) + 1e-10) - 1e-5) * sigma,
        "ghuber": lambda v: -((m(v) + 1e-10) ** 0.25 - 1e-10**0.25) * sigma / 0.25,
    }[weighting]
    np.testing.assert_allclose(loss(v, old).ratio, jnp.exp(log_prob(v) - log_prob(old)), rtol=1e-4)
    got = jax.grad(lambda v: loss(v, old).loss.sum())(old)
    np.testing.assert_allclose(
        got, jax.grad(lambda v: -(advantage * log_prob(v)).sum())(old), rtol=1e-3, atol=1e-6
    )


def test_dpo():
    """At the base: log 2 and a gradient that lowers the winner's error and raises the loser's; and the written formula."""
    v, base, target, _, _ = matching(4)
    np.testing.assert_allclose(
        grpo.dpo_loss(base, base, target, beta=2000.0), np.full(6, np.log(2)), rtol=1e-6
    )
    error = lambda v: ((v - target) ** 2).mean((1, 2, 3, 4))  # noqa: E731
    inside = (error(v) - error(base)).reshape(3, 2)
    want = np.repeat(np.log1p(np.exp(0.5 * (inside[:, 0] - inside[:, 1]))), 2)
    np.testing.assert_allclose(grpo.dpo_loss(v, base, target, beta=1.0), want, rtol=1e-5)
    slope = jax.grad(lambda v: grpo.dpo_loss(v, base, target, beta=1.0).sum())(base)
    towards = (slope * (base - target)).sum((1, 2, 3, 4)).reshape(3, 2)
    assert np.all(towards[:, 0] > 0)
    assert np.all(towards[:, 1] < 0)


def test_padding_counts_in_no_objective():
    v, old, target, sigma, advantage = matching(5)
    mask = jnp.asarray([[True, True, False]] * 6)
    cut = [value[:, :2] for value in (v, old, target)]
    for objective in (
        lambda a, b, t, **mask: grpo.nft_loss(
            a, b, t, sigma, advantage, beta=0.5, advantage_clip=5.0, **mask
        ),
        lambda a, b, t, **mask: grpo.awm_loss(a, b, t, sigma, advantage, clip=0.5, **mask).loss,
        lambda a, b, t, **mask: grpo.dpo_loss(a, b, t, beta=1.0, **mask),
        lambda a, b, t, **mask: grpo.matching_error(a, t, **mask),
    ):
        np.testing.assert_allclose(objective(v, old, target, mask=mask), objective(*cut), rtol=1e-5)
