"""The first contact with a GPU runs on a CPU at toy size, so that it runs where it is needed."""

from tests.helpers.gpu_benchmark import SLOW, assert_parts_run


def test_every_slow_part_runs_and_its_properties_hold(tmp_path):
    assert_parts_run(SLOW, tmp_path)
