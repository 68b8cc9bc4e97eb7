"""Advantages and the clipped objective against the published code (tests/golden)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo import flow, grpo

GOLDEN = Path(__file__).parent / "golden"
CASES = ("even", "uneven", "single_members", "constant_groups", "all_constant", "near_ties", "large_offset", "outlier")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("global_std", [False, True])
def test_advantages_equal_the_published_code(case, global_std):
    data = np.load(GOLDEN / "advantages.npz")
    want = data[f"{case}_advantages" + ("_global_std" if global_std else "")]
    got = grpo.advantages(data[f"{case}_rewards"], data[f"{case}_groups"], clip=np.inf, global_std=global_std)
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
    step = (d["sigma"], d["sigma_next"], d["sigma_max"])

    def loss(v):
        new = flow.sde_step(d["x"], v, *step, x_next=d["x_next"])
        reference = flow.sde_step(d["x"], d["v_ref"], *step, x_next=d["x_next"])
        clipped = grpo.clipped_loss(new.log_prob - d["old_log_prob"], jnp.clip(d["advantages"], -5, 5), clip=1e-3)
        kl = flow.kl(new.mean, jax.lax.stop_gradient(reference.mean), new.std)
        return clipped.loss.mean() + 0.004 * kl.mean(), (clipped, kl, new)

    (value, (clipped, kl, new)), gradient = jax.value_and_grad(loss, has_aux=True)(d["v"])
    np.testing.assert_allclose(new.log_prob, d["log_prob"], rtol=1e-5)
    np.testing.assert_allclose(clipped.ratio, d["ratio"], rtol=1e-5)
    np.testing.assert_allclose(clipped.loss.mean(), d["policy_loss"], rtol=1e-5)
    np.testing.assert_allclose(kl.mean(), d["kl_loss"], rtol=1e-5)
    np.testing.assert_allclose(value, d["loss"], rtol=1e-5)
    assert np.linalg.norm(gradient - d["grad_loss"]) / np.linalg.norm(d["grad_loss"]) < 1e-4


def test_clip_stops_the_gradient_of_a_row_that_went_too_far():
    gradient = jax.grad(lambda lp: grpo.clipped_loss(lp, jnp.array([1.0, 1.0, -1.0, -1.0]), clip=1e-3).loss.sum())
    np.testing.assert_array_equal(np.asarray(gradient(jnp.array([0.01, -0.01, 0.01, -0.01]))) != 0, [False, True, True, False])
