"""The sampler's mathematics against the published code (tests/golden) and against worked numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo import flow

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return dict(np.load(GOLDEN / f"{name}.npz"))


def relative(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def test_schedule_equals_the_published_solver():
    data = golden("schedule")
    for steps, shift in zip(data["num_steps"], data["shift"], strict=True):
        name = f"n{steps}_shift{shift:g}"
        np.testing.assert_array_equal(flow.timesteps(int(steps), float(shift)), data[f"timesteps_{name}"])
        np.testing.assert_allclose(flow.sigmas(int(steps), float(shift)), data[f"sigmas_{name}"], atol=1e-7, rtol=0)


def test_schedule_exact_values():
    values = flow.sigmas(25, 3.0)
    assert values.dtype == np.float32 and values[-1] == 0
    assert values[0] == np.float32(0.9996664524078369) and values[1] == np.float32(0.9859633445739746)
    assert values[24] == np.float32(0.11100822)
    assert flow.timesteps(25, 5.0)[-1] == 172


@pytest.mark.parametrize("bad", [(0, 3.0), (25, 0.0)])
def test_schedule_refuses(bad):
    with pytest.raises(ValueError):
        flow.sigmas(*bad)


def test_sde_step_equals_the_published_code():
    data = golden("sde_step")
    for n in range(len(data["step"])):
        sigma, sigma_next, sigma_max = (data[k][n] for k in ("sigma", "sigma_next", "sigma_max"))
        drawn = flow.sde_step(data["x"][n], data["v"][n], sigma, sigma_next, sigma_max, noise=data["noise"][n])
        assert relative(drawn.x_next, data["x_next"][n]) < 1e-5
        assert relative(drawn.mean, data["mean"][n]) < 1e-5
        np.testing.assert_allclose(drawn.std, data["std"][n], rtol=1e-5)
        np.testing.assert_allclose(drawn.log_prob, data["log_prob"][n], rtol=1e-5)
        scored = flow.sde_step(data["x"][n], data["v"][n], sigma, sigma_next, sigma_max, x_next=drawn.x_next)
        np.testing.assert_array_equal(scored.log_prob, drawn.log_prob)
        moved = flow.sde_step(data["x"][n], data["v_new"][n], sigma, sigma_next, sigma_max, x_next=data["x_next"][n])
        np.testing.assert_allclose(moved.log_prob, data["log_prob_new"][n], rtol=1e-5)
        assert relative(flow.ode_step(data["x"][n], data["v"][n], sigma, sigma_next), data["x_next_ode"][n]) < 1e-5


@pytest.mark.parametrize(
    "step, std, mean, x_next, log_prob, ode",
    [(0, 0.1153786, 0.5000972, 0.5347108, 1.195597, 0.5034258), (24, 0.0364664, 0.5260884, 0.5370284, 2.347424, 0.5277521)],
)
def test_sde_step_worked_numbers(step, std, mean, x_next, log_prob, ode):
    s = flow.sigmas(25, 3.0)
    x, v = jnp.full((1, 1, 1, 1, 1), 0.5), jnp.full((1, 1, 1, 1, 1), -0.25)
    got = flow.sde_step(x, v, s[step], s[step + 1], s[1], noise=jnp.full_like(x, 0.3))
    np.testing.assert_allclose([float(got.std), got.mean.item(), got.x_next.item(), got.log_prob.item()],
                               [std, mean, x_next, log_prob], rtol=2e-6)
    np.testing.assert_allclose(flow.ode_step(x, v, s[step], s[step + 1]).item(), ode, rtol=2e-6)


def test_log_ratio_is_the_difference_of_the_log_probabilities_and_zero_at_equal_velocities():
    data = golden("sde_step")
    for n in range(len(data["step"])):
        step = [data[k][n].astype(np.float64) for k in ("sigma", "sigma_next", "sigma_max")]
        x, x_next, old, new = (jnp.asarray(data[k][n]) for k in ("x", "x_next", "v", "v_new"))
        want = data["log_prob_new"][n] - data["log_prob"][n]
        np.testing.assert_allclose(flow.log_ratio(x, new, old, *step, x_next), want, atol=1e-6, rtol=1e-4)
        np.testing.assert_array_equal(flow.log_ratio(x, old, old, *step, x_next), np.zeros(len(x)))
        of_ratio, of_probability = (
            jax.grad(lambda v: f(v).sum())(old)
            for f in (
                lambda v: flow.log_ratio(x, v, old, *step, x_next),
                lambda v: flow.sde_step(x, v, *step, x_next=x_next).log_prob,
            )
        )
        assert relative(of_ratio, of_probability) < 1e-5


def test_masked_frames_change_nothing():
    rng = np.random.default_rng(0)
    x, v, noise = (rng.normal(size=(2, 4, 2, 3, 5)).astype(np.float32) for _ in range(3))
    mask = np.array([[True, True, True, False], [True, True, True, True]])
    full = flow.sde_step(x, v, 0.7, 0.6, 0.98, noise=noise, mask=mask)
    short = flow.sde_step(x[:, :3], v[:, :3], 0.7, 0.6, 0.98, noise=noise[:, :3])
    np.testing.assert_allclose(full.log_prob[0], short.log_prob[0], rtol=1e-6)
    assert abs(full.log_prob[1] - short.log_prob[1]) > 1e-3
    kl_full = flow.kl(full.mean, full.mean + v, full.std, mask)
    np.testing.assert_allclose(kl_full[0], flow.kl(short.mean, short.mean + v[:, :3], short.std)[0], rtol=1e-6)


def test_sde_step_wants_one_of_noise_and_x_next():
    x = jnp.zeros((1, 1, 1, 1, 1))
    for kwargs in ({}, {"noise": x, "x_next": x}):
        with pytest.raises(ValueError, match="either noise"):
            flow.sde_step(x, x, 0.5, 0.4, 0.9, **kwargs)


def test_gradient_reaches_the_velocity_only_through_the_mean():
    data = golden("sde_step")
    x, v, noise = data["x"][2], data["v"][2], data["noise"][2]
    sigma, sigma_next, sigma_max = (data[k][2] for k in ("sigma", "sigma_next", "sigma_max"))
    drawn = jax.grad(lambda v: flow.sde_step(x, v, sigma, sigma_next, sigma_max, noise=noise).log_prob.sum())(v)
    x_next = flow.sde_step(x, v, sigma, sigma_next, sigma_max, noise=noise).x_next
    scored = jax.grad(lambda v: flow.sde_step(x, v, sigma, sigma_next, sigma_max, x_next=x_next).log_prob.sum())(v)
    np.testing.assert_allclose(drawn, scored, rtol=1e-6)
    assert float(jnp.abs(drawn).max()) > 0
