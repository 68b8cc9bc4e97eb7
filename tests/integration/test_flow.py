"""The sampler's mathematics against the published code (tests/golden) and against worked numbers."""

import jax.numpy as jnp
import numpy as np

from jax_idgrpo import flow
from tests.helpers.comparison import relative_error
from tests.helpers.flow import Denoiser, solve


def test_euler_is_the_ode_step_and_unipc_is_closer_to_the_solution():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6)), jnp.float32)
    s = flow.sigmas(16, 3.0)
    want = x
    for i in range(16):
        want = flow.ode_step(want, Denoiser()(want, s[i]), s[i], s[i + 1])
    np.testing.assert_allclose(solve("euler", s, x, Denoiser()), want, atol=1e-5)
    exact = solve("euler", flow.sigmas(2000, 3.0), x, Denoiser())
    error = {name: relative_error(solve(name, s, x, Denoiser()), exact) for name in flow.SOLVERS}
    assert error["unipc"] < error["euler"], error
