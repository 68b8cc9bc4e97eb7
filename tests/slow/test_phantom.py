"""Phantom as a policy: three branches with the photos behind the video, only the video is the state, and the same loop as VACE."""

import numpy as np
import pytest

from jax_idgrpo.training import train
from tests.helpers.phantom import make_checkpoint, short
from tests.helpers.tiny_run import adapter, assert_same_adapter, rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory)


def test_training_and_resume(checkpoint, tmp_path):
    train.train(short(checkpoint, 2), tmp_path / "whole")
    train.train(short(checkpoint, 1), tmp_path / "stopped")
    train.train(short(checkpoint, 2), tmp_path / "stopped")
    logged = rows(tmp_path / "whole")
    assert [(row["ratio_min"], row["ratio_max"]) for row in logged] == [(1, 1)] * 2
    assert logged[0]["forward_passes_rollout"] == 4 * 3 * 3
    assert_same_adapter(tmp_path / "whole", tmp_path / "stopped")
    trained = adapter(tmp_path / "whole").items()
    assert max(np.abs(tensor).max() for name, tensor in trained if "lora_B" in name) > 0
