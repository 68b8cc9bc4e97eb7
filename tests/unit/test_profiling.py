"""A profile: which steps it takes, what it leaves, and when there is nothing to take."""

import jax
import pytest

from jax_idgrpo.errors import UserError
from jax_idgrpo.training.profiling import Profile, phase_table

PHASES = ("seconds_rollout", "seconds_update")


@pytest.mark.parametrize(("first", "last", "steps"), [(0, 9, [1, 2]), (5, 9, [6, 7]), (0, 2, [1])])
def test_the_steps_after_the_first_are_traced_once(tmp_path, monkeypatch, first, last, steps):
    seen, step = [], first
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append(("start", step)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(("stop", step)))
    profile = Profile(tmp_path, first, last)
    for step in range(first, last):
        profile.begin(step)
        profile.end(step, {"seconds_rollout": float(step), "seconds_update": 1.0}, PHASES)
    assert seen == [("start", steps[0]), ("stop", steps[-1])]
    mean = sum(steps) / len(steps)
    assert (
        f"| rollout | {mean:.3f} | {mean / (mean + 1):.0%} |"
        in (tmp_path / "phases.md").read_text()
    )


def test_the_table_says_each_phase_and_the_whole():
    table = phase_table(
        [
            {"seconds_rollout": 1.0, "seconds_update": 3.0},
            {"seconds_rollout": 2.0, "seconds_update": 0.0},
        ],
        PHASES,
    )
    assert table.splitlines()[2:] == [
        "| rollout | 1.500 | 50% |",
        "| update | 1.500 | 50% |",
        "| step | 3.000 | 100% |",
    ]


def test_a_run_with_one_step_left_cannot_be_profiled(tmp_path):
    with pytest.raises(UserError, match="step 3 of 4 is next"):
        Profile(tmp_path, 3, 4)
    Profile(None, 3, 4)
