"""Intervals that cover, pairing that cancels what both models share, and a table that reads."""

import numpy as np
import pytest

from jax_idgrpo.evaluation import bootstrap


def clustered(
    rng, prompts: int, videos: int, between: float, within: float
) -> tuple[np.ndarray, np.ndarray]:
    """Values around 0 whose prompts differ by `between` and whose videos differ by `within`."""
    values = rng.normal(0, between, (prompts, 1)) + rng.normal(0, within, (prompts, videos))
    return values.ravel(), np.repeat(np.arange(prompts), videos)


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        values, clusters = clustered(rng, 40, 4, between=1.0, within=0.5)
        interval = bootstrap.bootstrap(values, clusters, trial, 400)
        inside += interval.low < 0 < interval.high
    assert 0.89 <= inside / 200 <= 0.99, (
        "resampling videos instead of prompts would cover about 0.7"
    )


def test_interval_has_the_width_of_theory():
    values, clusters = clustered(np.random.default_rng(1), 400, 3, between=1.0, within=0.3)
    interval = bootstrap.bootstrap(values, clusters, 0, 4000)
    theory = 2 * 1.96 * values.reshape(400, 3).mean(1).std(ddof=1) / 20
    assert interval.high - interval.low == pytest.approx(theory, rel=0.05)
    assert interval.mean == pytest.approx(values.mean())


def test_prompts_with_more_videos_weigh_more():
    values, clusters = np.array([0.0, 0.0, 0.0, 1.0]), np.array([7, 7, 7, 9])
    assert bootstrap.bootstrap(values, clusters, 0, 100).mean == pytest.approx(0.25)


def test_pairing_cancels_what_the_models_share():
    values, clusters = clustered(np.random.default_rng(2), 64, 4, between=1.0, within=1.0)
    gain = np.random.default_rng(3).normal(0.05, 0.02, values.shape)
    scores = {"base": {"reward": values}, "tuned": {"reward": values + gain}}
    means, changes = bootstrap.summarise(scores, clusters, 0, 1000)
    assert changes["tuned"]["reward"].low > 0.04
    assert changes["tuned"]["reward"].high < 0.06
    assert (
        means["base"]["reward"].low < means["tuned"]["reward"].mean < means["base"]["reward"].high
    )
    assert set(changes) == {"tuned"}


def test_same_seed_same_interval():
    values, clusters = clustered(np.random.default_rng(4), 20, 2, 1.0, 1.0)
    assert bootstrap.bootstrap(values, clusters, 5, 100) == bootstrap.bootstrap(
        values, clusters, 5, 100
    )
    assert bootstrap.bootstrap(values, clusters, 5, 100) != bootstrap.bootstrap(
        values, clusters, 6, 100
    )


def test_table_lines_up():
    interval = bootstrap.Interval(mean=0.5, low=0.25, high=0.75)
    change = bootstrap.Interval(mean=0.05, low=-0.01, high=0.11)
    names = list(bootstrap.LABELS)
    table = bootstrap.markdown(
        {"base": dict.fromkeys(names, interval), "tuned": dict.fromkeys(names, interval)},
        {"tuned": dict.fromkeys(names, change)},
    )
    lines = table.splitlines()
    assert len(lines) == 2 + len(names)
    assert len({len(line) for line in lines}) == 1
    assert "| judge identity" in table
    assert "+0.050 [-0.010, +0.110] | +10.0%" in table


def test_every_two_models_are_compared_and_equal_videos_count_half():
    base = np.array([0.1, 0.2, 0.3, 0.4])
    scores = {
        "base": {"reward": base},
        "a": {"reward": base + [0.1, 0.1, 0.0, -0.1]},
        "b": {"reward": base + 0.2},
    }
    got = bootstrap.pairs(scores, np.arange(4), 0, 200)
    assert list(got) == [("a", "base"), ("b", "base"), ("b", "a")]
    assert got["a", "base"]["reward"].wins.mean == pytest.approx(0.625)
    assert got["b", "a"]["reward"].wins.mean == 1
    assert got["b", "a"]["reward"].difference.mean == pytest.approx(0.175)
    assert got["a", "base"]["reward"].wins.low < 0.625 < got["a", "base"]["reward"].wins.high
    worse = bootstrap.pairs(
        {"base": {"swapped": base}, "a": {"swapped": base + 0.1}}, np.arange(4), 0, 50
    )["a", "base"]["swapped"]
    assert worse.wins.mean == 0  # of some metrics less is better
    assert worse.difference.mean == pytest.approx(0.1)
    full = {
        model: dict.fromkeys(bootstrap.LABELS, values["reward"]) for model, values in scores.items()
    }
    lines = bootstrap.pairs_markdown(bootstrap.pairs(full, np.arange(4), 0, 50)).splitlines()
    assert len(lines) == 2 + 2 * len(bootstrap.LABELS)
    assert "b over a" in lines[0]
    assert len({len(line) for line in lines}) == 1
