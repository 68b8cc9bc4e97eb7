"""The first contact with a GPU runs on a CPU at toy size, so that it runs where it is needed."""

import pytest

from tests.helpers.gpu_benchmark import QUICK, SLOW, assert_parts_run


@pytest.mark.parametrize("parts", [QUICK, SLOW], ids=["quick", "slow"])
def test_every_part_runs_and_its_properties_hold(parts, tmp_path):
    assert_parts_run(parts, tmp_path)
