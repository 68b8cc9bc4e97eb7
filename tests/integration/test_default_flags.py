"""The properties that runs rely on, compiled as users compile: the other tests turn the optimizations of XLA's CPU backend off."""

import json
import os
import subprocess
import sys

from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import assert_same_adapter, rows


def worker(*words):
    """Run tests.helpers.default_flags_worker without XLA_FLAGS and return the last line that it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.helpers.default_flags_worker", *map(str, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.rpartition("\n")[0].rpartition("\n")[2]


def test_the_ratio_of_a_first_update_is_exactly_one():
    assert json.loads(worker("ratios")) == {"vace": [1.0, 1.0], "phantom": [1.0, 1.0]}


def test_a_stopped_run_ends_bit_for_bit_as_one_without_a_stop(tmp_path):
    worker("runs", tmp_path)
    folders = [tmp_path / name for name in ("whole", "stopped")]
    assert_same_adapter(*folders)
    numbers = ("reward", "policy_loss", "kl", "gradient_norm", "ratio_min", "ratio_max")
    first, second = ([[row[name] for name in numbers] for row in rows(f)] for f in folders)
    assert first == second
    assert all(row["ratio_min"] == row["ratio_max"] == 1 for row in rows(folders[0]))
