"""The sampler's mathematics against the published code (tests/golden) and against worked numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo import flow
from tests.helpers.comparison import relative_error
from tests.helpers.flow import Denoiser, solve


@pytest.mark.parametrize(("steps", "shift"), [(12, 3.0), (50, 5.0), (2, 3.0), (1, 3.0)])
def test_unipc_equals_diffusers(steps, shift):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    s = flow.sigmas(steps, shift)
    original = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        solver_order=2,
        solver_type="bh2",
    )
    original.set_timesteps(sigmas=s[:-1].astype(np.float64))
    original.sigmas = torch.from_numpy(s)
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    want = torch.from_numpy(x)
    for i, timestep in enumerate(original.timesteps):
        velocity = torch.tensor(np.array(Denoiser()(jnp.asarray(want.numpy()), s[i])))
        want = original.step(velocity, timestep, want).prev_sample
    assert relative_error(solve("unipc", s, jnp.asarray(x), Denoiser()), want.numpy()) < 1e-4
