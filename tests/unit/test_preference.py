"""The preference loss equals the published one, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo.rewards import preference
from tests.helpers.paths import GOLDEN

ARRAYS = np.load(GOLDEN / "btt.npz")


@pytest.mark.parametrize("suffix", ["", "_with_invalid"])
def test_equals_the_reference_arrays(suffix):
    a, b, label = (jnp.asarray(ARRAYS[name]) for name in ("score_a", "score_b", "label" + suffix))
    value, gradients = jax.value_and_grad(preference.btt_loss, argnums=(0, 1))(a, b, label)
    np.testing.assert_allclose(value, ARRAYS["loss_mean" + suffix], rtol=1e-5)
    for ours, theirs in zip(gradients, ("grad_score_a", "grad_score_b"), strict=True):
        np.testing.assert_allclose(ours, ARRAYS[theirs + suffix], rtol=1e-4, atol=1e-6)
    if not suffix:
        np.testing.assert_allclose(
            preference.btt_losses(a, b, label), ARRAYS["loss_per_pair"], rtol=1e-5, atol=1e-6
        )


def test_probabilities_of_the_three_outcomes_sum_to_one():
    d = jnp.linspace(-4, 4, 9)
    total = sum(
        jnp.exp(-preference.btt_losses(d, jnp.zeros(9), jnp.full(9, label))) for label in (1, -1, 0)
    )
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)
