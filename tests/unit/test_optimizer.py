"""The optimizer against torch's formula and the published average."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo.config import OptimizerConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.training.state import (
    apply_gradients,
    ema_decay,
    ema_update,
    learning_rate,
    make_optimizer,
    start,
)
from tests.helpers.paths import GOLDEN


def adamw(config: OptimizerConfig, params: list, gradients: list) -> np.ndarray:
    """torch.optim.AdamW after clip_grad_norm_, written out in float64."""
    p = np.concatenate([np.ravel(leaf) for leaf in params]).astype(np.float64)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, step in enumerate(gradients, 1):
        g = np.concatenate([np.ravel(leaf) for leaf in step]).astype(np.float64)
        g *= min(1.0, config.max_norm / (np.linalg.norm(g) + 1e-6))
        p *= 1 - config.learning_rate * config.weight_decay
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g * g
        p -= (
            config.learning_rate
            * (m / (1 - config.beta1**t))
            / (np.sqrt(v / (1 - config.beta2**t)) + config.eps)
        )
    return p


@pytest.mark.parametrize("scale", [0.1, 30.0], ids=["below the clip", "above the clip"])
def test_equals_clipping_then_adamw(scale):
    config = OptimizerConfig(
        learning_rate=3e-2, beta1=0.8, beta2=0.95, eps=1e-2, weight_decay=0.1, max_norm=1.5
    )
    random = np.random.default_rng(0)
    params = [
        random.normal(size=(3, 4)).astype(np.float32),
        random.normal(size=5).astype(np.float32),
    ]
    gradients = [
        [scale * random.normal(size=leaf.shape).astype(np.float32) for leaf in params]
        for _ in range(7)
    ]
    optimizer = make_optimizer(config, total_steps=7)
    state = start(optimizer, params)
    step = jax.jit(lambda state, gradient, i: apply_gradients(state, gradient, optimizer, i, 0.9))
    for i, gradient in enumerate(gradients):
        state, logged = step(state, gradient, i)
        norm = math.sqrt(sum(float(np.sum(leaf.astype(np.float64) ** 2)) for leaf in gradient))
        assert float(logged["gradient_norm"]) == pytest.approx(norm, rel=1e-6)
    ours = np.concatenate([np.ravel(leaf) for leaf in state.params])
    np.testing.assert_allclose(ours, adamw(config, params, gradients), rtol=2e-6, atol=2e-6)


def test_muon_makes_the_update_of_every_layer_orthogonal():
    config = OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.0, max_norm=1e9)
    random = np.random.default_rng(0)
    params = {
        "blocks": {"kernel": jnp.zeros((2, 8, 12)), "bias": jnp.zeros((2, 12))},
        "out": {"kernel": jnp.zeros((8, 4))},
    }
    gradient = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape)), params)
    optimizer = make_optimizer(config, total_steps=3)
    state, _ = apply_gradients(start(optimizer, params), gradient, optimizer, 0, 0.9)
    moved = jax.device_get(state.params)
    for layer in moved["blocks"]["kernel"]:
        values = np.linalg.svd(layer, compute_uv=False)
        # Five Newton-Schulz steps bring singular values near 1; the scale is that of AdamW.
        assert values.max() / values.min() < 2.5
        assert np.sqrt(np.mean(layer**2)) == pytest.approx(0.2 * config.learning_rate, rel=0.3)
    # All other parameters take AdamW's first step (with Nesterov momentum): the gradient's sign.
    for part, name in (("out", "kernel"), ("blocks", "bias")):
        steps = moved[part][name] / -np.sign(gradient[part][name])
        np.testing.assert_allclose(steps, steps.max(), rtol=1e-4)
        assert config.learning_rate <= steps.max() < 2 * config.learning_rate


def test_muon_is_refused_where_there_is_nothing_for_it():
    optimizer = make_optimizer(OptimizerConfig(name="muon"), total_steps=3)
    with pytest.raises(UserError, match="no stacked weight matrices; use adamw"):
        start(optimizer, {"lora_a": jnp.ones((2, 8, 4))})


def test_a_gradient_that_is_not_finite_changes_nothing():
    optimizer = make_optimizer(OptimizerConfig(), total_steps=3)
    state = start(optimizer, {"a": jnp.arange(3.0), "b": jnp.ones(2)})
    state, _ = apply_gradients(state, {"a": jnp.ones(3), "b": jnp.ones(2)}, optimizer, 0, 0.9)
    after, logged = apply_gradients(
        state, {"a": jnp.ones(3), "b": jnp.array([1.0, jnp.inf])}, optimizer, 1, 0.9
    )
    assert logged["skipped"] == 1
    assert all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"schedule": "constant"}, {0: 1.0, 5: 1.0, 100: 1.0}),
        ({"schedule": "constant", "warmup": 4}, {0: 0.2, 2: 0.6, 4: 1.0, 100: 1.0}),
        ({"schedule": "cosine"}, {0: 1.0, 50: 0.5, 100: 0.0}),
        ({"schedule": "cosine", "warmup": 20}, {20: 1.0, 60: 0.5, 100: 0.0}),
    ],
)
def test_learning_rate(config, expected):
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, **config), 100)
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("step", "share"),
    [(7, 0.470588), (15, 0.64), (23, 0.727273), (31, 0.780488), (80, 0.9), (500, 0.9)],
)
def test_published_decay(step, share):
    assert float(ema_decay(step, 0.9)) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("calls", ["every_step", "repeated"])
def test_published_average(calls):
    """Called where the published code fires (every 8th step), ours is its average, also where it fires four times."""
    golden = np.load(GOLDEN / "ema.npz")
    ema = {name: jnp.asarray(golden[f"{calls}_start_{name}"]) for name in "ab"}
    for i, step in enumerate(golden[f"{calls}_steps"]):
        if (step + 1) % 8 == 0:
            params = {name: jnp.asarray(golden[f"{calls}_parameters_{name}"][i]) for name in "ab"}
            ema = ema_update(ema, params, int(step), 0.9)
        for name in "ab":
            np.testing.assert_allclose(
                ema[name], golden[f"{calls}_ema_{name}"][i], rtol=1e-5, atol=1e-6
            )


def test_average_is_float32_whatever_the_weights_are():
    optimizer = make_optimizer(OptimizerConfig(), total_steps=3)
    state = start(optimizer, {"a": jnp.ones(3, jnp.bfloat16)})
    state, _ = apply_gradients(state, {"a": jnp.ones(3, jnp.bfloat16)}, optimizer, 0, 0.9)
    assert state.ema["a"].dtype == jnp.float32
    assert state.params["a"].dtype == jnp.bfloat16
