"""A denoiser with an exact velocity, and the solvers run on it."""

import jax
import numpy as np

from jax_idgrpo import flow


class Denoiser:
    """The exact velocity for data of several Gaussian bumps: smooth, not linear in x, cheap."""

    centres = np.random.default_rng(5).normal(size=(4, 6))
    width = 0.4

    def __call__(self, x, sigma):
        variance = (1 - sigma) ** 2 * self.width**2 + sigma**2
        away = x[:, None] - (1 - sigma) * self.centres
        weight = jax.nn.softmax(-(away**2).sum(-1) / (2 * variance), axis=-1)[..., None]
        x0 = (weight * (self.centres + (1 - sigma) * self.width**2 / variance * away)).sum(1)
        return (x - x0) / sigma


def solve(name, s, x, denoiser):
    """Run the solver `name` from `x` through the noise levels `s`."""
    solver, state = flow.SOLVERS[name](s), flow.SolverState.start(x)
    for i in range(len(s) - 1):
        step = jax.tree.map(lambda leaf: leaf[i], solver)
        state = flow.solver_step(step, state, denoiser(state.x, s[i]), s[i])
    return state.x
