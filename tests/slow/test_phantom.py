"""Phantom as a policy: three branches with the photos behind the video, only the video is the state, and the same loop as VACE."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_idgrpo.training import train
from tests.helpers.phantom import make_checkpoint, short


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory)


def test_training_and_resume(checkpoint, tmp_path):
    train.train(short(checkpoint, 2), tmp_path / "whole")
    train.train(short(checkpoint, 1), tmp_path / "stopped")
    train.train(short(checkpoint, 2), tmp_path / "stopped")
    rows = [
        json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(row["ratio_min"], row["ratio_max"]) for row in rows] == [(1, 1)] * 2
    assert rows[0]["forward_passes_rollout"] == 4 * 3 * 3
    one, other = (
        load_file(tmp_path / name / "export" / "adapter_model.safetensors")
        for name in ("whole", "stopped")
    )
    for name, tensor in one.items():
        np.testing.assert_array_equal(other[name], tensor, err_msg=name)
    assert max(np.abs(tensor).max() for name, tensor in one.items() if "lora_B" in name) > 0
