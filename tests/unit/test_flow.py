"""The sampler's mathematics against the published code (tests/golden) and against worked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo import flow
from tests.helpers.comparison import relative_error
from tests.helpers.paths import GOLDEN


def golden(name):
    return dict(np.load(GOLDEN / f"{name}.npz"))


def test_schedule_equals_the_published_solver():
    data = golden("schedule")
    for steps, shift in zip(data["num_steps"], data["shift"], strict=True):
        name = f"n{steps}_shift{shift:g}"
        np.testing.assert_array_equal(
            flow.timesteps(int(steps), float(shift)), data[f"timesteps_{name}"]
        )
        np.testing.assert_allclose(
            flow.sigmas(int(steps), float(shift)), data[f"sigmas_{name}"], atol=1e-7, rtol=0
        )


def test_one_rule_for_shifts_timesteps_and_latent_frames():
    u = np.linspace(0, 1, 7)
    np.testing.assert_allclose(flow.shifted(u, 1.0), u)
    np.testing.assert_allclose(flow.shifted(u, 3.0), 3 * u / (1 + 2 * u))
    np.testing.assert_array_equal(
        flow.timestep(np.array([0.0, 0.0019, 0.5, 0.9999, 1.0])), [0, 1, 500, 999, 999]
    )
    np.testing.assert_array_equal(flow.timestep(jnp.float32([0.25, 1.0])), [250, 999])
    assert [flow.latent_frames(frames) for frames in (1, 5, 9, 33, 81)] == [1, 2, 3, 9, 21]


def test_schedule_exact_values():
    values = flow.sigmas(25, 3.0)
    assert values.dtype == np.float32
    assert values[-1] == 0
    assert values[0] == np.float32(0.9996664524078369)
    assert values[1] == np.float32(0.9859633445739746)
    assert values[24] == np.float32(0.11100822)
    assert flow.timesteps(25, 5.0)[-1] == 172


@pytest.mark.parametrize(
    ("bad", "reason"),
    [((0, 3.0), "needs 1 or more"), ((25, 0.0), "use a positive number")],
)
def test_schedule_refuses(bad, reason):
    with pytest.raises(ValueError, match=reason):
        flow.sigmas(*bad)


def test_sde_step_equals_the_published_code():
    data = golden("sde_step")
    for n in range(len(data["step"])):
        sigma, sigma_next, sigma_max = (data[k][n] for k in ("sigma", "sigma_next", "sigma_max"))
        drawn = flow.sde_step(
            data["x"][n], data["v"][n], sigma, sigma_next, sigma_max, noise=data["noise"][n]
        )
        assert relative_error(drawn.x_next, data["x_next"][n]) < 1e-5
        assert relative_error(drawn.mean, data["mean"][n]) < 1e-5
        np.testing.assert_allclose(drawn.std, data["std"][n], rtol=1e-5)
        np.testing.assert_allclose(drawn.log_prob, data["log_prob"][n], rtol=1e-5)
        scored = flow.sde_step(
            data["x"][n], data["v"][n], sigma, sigma_next, sigma_max, x_next=drawn.x_next
        )
        np.testing.assert_array_equal(scored.log_prob, drawn.log_prob)
        moved = flow.sde_step(
            data["x"][n], data["v_new"][n], sigma, sigma_next, sigma_max, x_next=data["x_next"][n]
        )
        np.testing.assert_allclose(moved.log_prob, data["log_prob_new"][n], rtol=1e-5)
        assert (
            relative_error(
                flow.ode_step(data["x"][n], data["v"][n], sigma, sigma_next), data["x_next_ode"][n]
            )
            < 1e-5
        )


@pytest.mark.parametrize(
    ("step", "std", "mean", "x_next", "log_prob", "ode"),
    [
        (0, 0.1153786, 0.5000972, 0.5347108, 1.195597, 0.5034258),
        (24, 0.0364664, 0.5260884, 0.5370284, 2.347424, 0.5277521),
    ],
)
def test_sde_step_worked_numbers(step, std, mean, x_next, log_prob, ode):
    s = flow.sigmas(25, 3.0)
    x, v = jnp.full((1, 1, 1, 1, 1), 0.5), jnp.full((1, 1, 1, 1, 1), -0.25)
    got = flow.sde_step(x, v, s[step], s[step + 1], s[1], noise=jnp.full_like(x, 0.3))
    np.testing.assert_allclose(
        [float(got.std), got.mean.item(), got.x_next.item(), got.log_prob.item()],
        [std, mean, x_next, log_prob],
        rtol=2e-6,
    )
    np.testing.assert_allclose(flow.ode_step(x, v, s[step], s[step + 1]).item(), ode, rtol=2e-6)


def test_log_ratio_is_the_difference_of_the_log_probabilities_and_zero_at_equal_velocities():
    data = golden("sde_step")
    for n in range(len(data["step"])):
        sigmas = [data[k][n].astype(np.float64) for k in ("sigma", "sigma_next", "sigma_max")]
        step = flow.identity_sde(*sigmas)
        x, x_next, old, new = (jnp.asarray(data[k][n]) for k in ("x", "x_next", "v", "v_new"))
        want = data["log_prob_new"][n] - data["log_prob"][n]
        np.testing.assert_allclose(
            flow.change(step, x, new, old, x_next).log_ratio, want, atol=1e-6, rtol=1e-4
        )
        np.testing.assert_array_equal(
            flow.change(step, x, old, old, x_next).log_ratio, np.zeros(len(x))
        )
        of_ratio, of_probability = (
            jax.grad(lambda v: f(v).sum())(old)
            for f in (
                lambda v: flow.change(step, x, v, old, x_next).log_ratio,
                lambda v: flow.sde_step(x, v, *sigmas, x_next=x_next).log_prob,
            )
        )
        assert relative_error(of_ratio, of_probability) < 1e-5


def schedule(sampler, steps=25, shift=3.0, **noise_level):
    s = flow.sigmas(steps, shift)
    return s, flow.SAMPLERS[sampler](s[:-1], s[1:], s[1], **noise_level)


@pytest.mark.parametrize(
    ("sampler", "step", "std", "mean", "x_next"),
    [
        ("identity", 12, 0.1305539, 0.5025850, 0.5417512),
        ("identity", 23, 0.0630548, 0.5210263, 0.5399427),
        ("cps", 0, 0.8784998, 0.2342980, 0.4978479),
        ("cps", 12, 0.6542829, 0.3306531, 0.5269379),
    ],
)
def test_sampler_worked_numbers(sampler, step, std, mean, x_next):
    _, transition = schedule(sampler)
    x, v = jnp.full((1, 1, 1, 1, 1), 0.5), jnp.full((1, 1, 1, 1, 1), -0.25)
    got = flow.step(transition.at(step), x, v, noise=jnp.full_like(x, 0.3))
    np.testing.assert_allclose(
        [float(got.std), got.mean.item(), got.x_next.item()], [std, mean, x_next], rtol=2e-6
    )


def test_residual_noise_of_the_last_step():
    """Noise that the last step adds and that is decoded: an SDE's is left in the video, CPS has none."""
    got = [float(schedule(name)[1].std[-1]) for name in ("identity", "flow", "dance", "cps")]
    np.testing.assert_allclose(got, [0.0365, 0.0824, 0.1000, 0], atol=5e-5)


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_a_sampler_without_noise_is_an_euler_step(sampler):
    s, transition = schedule(sampler, noise_level=0.0)
    np.testing.assert_allclose(transition.a, np.ones(25), rtol=1e-6)
    np.testing.assert_allclose(transition.b, np.diff(s), atol=1e-6)
    np.testing.assert_array_equal(transition.std, np.zeros(25))


def test_the_sdes_differ_only_in_their_diffusion():
    """DanceGRPO writes its drift as a score: x + v dt + 0.5 eta^2 (x - (1 - sigma) x0) / sigma^2 dt is the mean of the others."""
    s = flow.sigmas(25, 3.0).astype(np.float64)
    x, v = 0.5, -0.25
    for step in (0, 7, 23):
        sigma, dt = s[step], s[step + 1] - s[step]
        x0 = x - sigma * v
        dance = flow.dance_sde(sigma, s[step + 1], s[1], 0.25)
        want = x + v * dt + 0.5 * 0.25**2 * (x - (1 - sigma) * x0) / sigma**2 * dt
        np.testing.assert_allclose(dance.a * x + dance.b * v, want, rtol=1e-6)
        same = flow.flow_sde(
            sigma, s[step + 1], s[1], 0.25 / np.sqrt(sigma / (1 - (s[1] if step == 0 else sigma)))
        )
        for name in ("a", "b", "std", "precision"):
            np.testing.assert_allclose(
                getattr(same, name), getattr(dance, name), rtol=1e-5, err_msg=name
            )


@pytest.mark.parametrize(
    ("sampler", "late"), [("identity", 0.157), ("flow", 0.53), ("dance", 0.36), ("cps", 0)]
)
def test_marginals(sampler, late):
    """With the true velocity, a step keeps (1 - sigma_next) x0 exactly, and noise of sigma_next plus what Euler's method adds."""
    s, transition = schedule(sampler)
    a, b, std = (
        np.asarray(value, np.float64)[:-1] for value in (transition.a, transition.b, transition.std)
    )
    sigma, sigma_next, dt = (value[:-1].astype(np.float64) for value in (s[:-1], s[1:], np.diff(s)))
    np.testing.assert_allclose(
        a * (1 - sigma) - b, 1 - sigma_next, atol=1e-6
    )  # x = (1 - sigma) x0 + sigma n, v = n - x0
    excess = (a * sigma + b) ** 2 + std**2 - sigma_next**2
    diffusion = std**2 / -dt
    want = 0 if sampler == "cps" else diffusion * dt**2 / sigma * (1 + diffusion / (4 * sigma))
    np.testing.assert_allclose(excess, want, rtol=2e-2, atol=1e-6)
    np.testing.assert_allclose(excess[23] / sigma_next[23] ** 2, late, rtol=0.01, atol=1e-5)


def test_gradient_weight_of_the_steps():
    want = (
        0.1188,
        0.1246,
        0.1309,
        0.1379,
        0.1455,
        0.1539,
        0.1633,
        0.1737,
        0.1853,
        0.1984,
        0.2133,
        0.2304,
        0.2500,
        0.2729,
        0.2998,
        0.3320,
        0.3712,
        0.4197,
        0.4815,
        0.5629,
        0.6751,
        0.8405,
        1.1106,
        1.6389,
        3.1901,
    )
    np.testing.assert_allclose(schedule("identity")[1].weight, want, atol=5e-5)
    spread = {
        name: float(w[:24].max() / w[:24].min())
        for name, w in ((n, schedule(n)[1].weight) for n in ("identity", "flow", "dance"))
    }
    np.testing.assert_allclose(
        [spread["identity"], spread["flow"], spread["dance"]], [13.8, 54, 3.1], rtol=0.02
    )


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_every_sampler_scores_its_own_step_and_compares_velocities(sampler):
    rng = np.random.default_rng(0)
    x, v, other, noise = (
        jnp.asarray(rng.normal(size=(3, 2, 2, 3, 4)), jnp.float32) for _ in range(4)
    )
    _, transition = schedule(sampler)
    for index in (jnp.int32(0), jnp.int32(20), jnp.asarray([0, 11, 23])):
        step = transition.at(index)
        drawn = flow.step(step, x, v, noise=noise)
        scored = flow.step(step, x, v, x_next=drawn.x_next)
        np.testing.assert_array_equal(scored.log_prob, drawn.log_prob)
        moved = v + 0.01 * other
        change = flow.change(step, x, moved, v, drawn.x_next)
        np.testing.assert_allclose(
            change.log_ratio,
            flow.step(step, x, moved, x_next=drawn.x_next).log_prob - drawn.log_prob,
            rtol=1e-3,
            atol=1e-6,
        )
        delta = flow.step(step, x, moved, x_next=drawn.x_next).mean - drawn.mean
        np.testing.assert_allclose(
            change.guarded, (noise * delta).mean((1, 2, 3, 4)), rtol=1e-3, atol=1e-6
        )
        still = flow.change(step, x, v, v, drawn.x_next)
        assert not np.any(still.log_ratio)
        assert not np.any(still.guarded)
        assert not np.any(flow.divergence(step, v, v))
        slope = jax.grad(lambda v: flow.step(step, x, v, x_next=drawn.x_next).log_prob.sum())(v)
        want = np.asarray(step.weight).reshape(-1, 1, 1, 1, 1) * np.abs(noise) / noise[0].size
        np.testing.assert_allclose(np.abs(slope), want, rtol=2e-3, atol=1e-5)


def test_divergence_is_the_kl_of_the_two_gaussians():
    _, transition = schedule("identity")
    rng = np.random.default_rng(0)
    x, v, other = (jnp.asarray(rng.normal(size=(2, 2, 2, 3, 4)), jnp.float32) for _ in range(3))
    step = transition.at(5)
    means = [flow.step(step, x, value, x_next=x).mean for value in (v, other)]
    want = ((means[0] - means[1]) ** 2 / (2 * step.std**2)).mean((1, 2, 3, 4))
    np.testing.assert_allclose(flow.divergence(step, v, other), want, rtol=1e-4)


def test_masked_frames_change_nothing():
    rng = np.random.default_rng(0)
    x, v, noise = (rng.normal(size=(2, 4, 2, 3, 5)).astype(np.float32) for _ in range(3))
    mask = np.array([[True, True, True, False], [True, True, True, True]])
    full = flow.sde_step(x, v, 0.7, 0.6, 0.98, noise=noise, mask=mask)
    short = flow.sde_step(x[:, :3], v[:, :3], 0.7, 0.6, 0.98, noise=noise[:, :3])
    np.testing.assert_allclose(full.log_prob[0], short.log_prob[0], rtol=1e-6)
    assert abs(full.log_prob[1] - short.log_prob[1]) > 1e-3
    step = flow.identity_sde(0.7, 0.6, 0.98)
    np.testing.assert_allclose(
        flow.divergence(step, v, noise, mask)[0],
        flow.divergence(step, v[:, :3], noise[:, :3])[0],
        rtol=1e-6,
    )


def test_sde_step_wants_one_of_noise_and_x_next():
    x = jnp.zeros((1, 1, 1, 1, 1))
    for kwargs in ({}, {"noise": x, "x_next": x}):
        with pytest.raises(ValueError, match="either noise"):
            flow.sde_step(x, x, 0.5, 0.4, 0.9, **kwargs)


def test_gradient_reaches_the_velocity_only_through_the_mean():
    data = golden("sde_step")
    x, v, noise = data["x"][2], data["v"][2], data["noise"][2]
    sigma, sigma_next, sigma_max = (data[k][2] for k in ("sigma", "sigma_next", "sigma_max"))
    drawn = jax.grad(
        lambda v: flow.sde_step(x, v, sigma, sigma_next, sigma_max, noise=noise).log_prob.sum()
    )(v)
    x_next = flow.sde_step(x, v, sigma, sigma_next, sigma_max, noise=noise).x_next
    scored = jax.grad(
        lambda v: flow.sde_step(x, v, sigma, sigma_next, sigma_max, x_next=x_next).log_prob.sum()
    )(v)
    np.testing.assert_allclose(drawn, scored, rtol=1e-6)
    assert float(jnp.abs(drawn).max()) > 0
