"""The properties that runs rely on, compiled as users compile: the other tests turn the optimizations of XLA's CPU backend off."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import assert_same_adapter, rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What tests.helpers.default_flags_worker leaves when it runs without XLA_FLAGS."""
    folder = tmp_path_factory.mktemp("default_flags")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.helpers.default_flags_worker", str(folder)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return folder


def test_the_ratio_of_a_first_update_is_exactly_one(folder):
    for row in rows(folder / "whole"):
        assert row["ratio_min"] == row["ratio_max"] == 1
        assert row["gradient_norm"] > 0
    for name in ("phantom", "others", "experts"):
        ratio = np.load(folder / f"{name}.npy")
        np.testing.assert_array_equal(ratio, np.ones_like(ratio))


def test_a_stopped_run_ends_bit_for_bit_as_one_without_a_stop(folder):
    assert_same_adapter(folder / "whole", folder / "stopped")
    numbers = ("reward", "policy_loss", "kl", "gradient_norm", "ratio_min", "ratio_max")
    whole, stopped = (
        [[row[name] for name in numbers] for row in rows(folder / name)]
        for name in ("whole", "stopped")
    )
    assert len(whole) == 2
    assert whole == stopped
