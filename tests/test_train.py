"""The whole loop on the embedded models, small: files, exact resume, refusals."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_idgrpo import config as c
from jax_idgrpo import train as loop
from jax_idgrpo.errors import UserError


def tiny(steps, **rollout):
    values = dict(prompts=2, group=2, steps=3, guidance=1.0, window="fixed", window_start=0, window_size=1) | rollout
    return c.Config(
        model=c.ModelConfig(rank=2, alpha=2.0, unroll=True),
        data=c.DataConfig(max_people=3, text_length=80),
        video=c.VideoConfig(frames=5, height=64, width=64, fps=8),
        rollout=c.RolloutConfig(**values),
        optimizer=c.OptimizerConfig(learning_rate=1e-2, ema_decay=0.5),
        reward=c.RewardConfig(frames=2),
        run=c.RunConfig(steps=steps, save_every=2, sample_every=2),
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Four steps without a stop."""
    workdir = tmp_path_factory.mktemp("straight")
    loop.train(tiny(4), workdir)
    return workdir


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_interface_says(straight):
    adapter = ("export/adapter_config.json", "export/adapter_model.safetensors")
    for name in ("config.json", "metrics.jsonl", "checkpoints", "samples", *adapter):
        assert (straight / name).exists(), name
    assert len(list((straight / "samples" / "000002").glob("*.mp4"))) == loop.SHOWN
    tensors = load_file(straight / "export" / "adapter_model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert max(np.abs(tensor).max() for name, tensor in tensors.items() if "lora_B" in name) > 0


def test_every_rollout_is_on_policy_at_its_first_update(straight):
    assert [(row["ratio_min"], row["ratio_max"]) for row in rows(straight)] == [(1.0, 1.0)] * 4


def test_resume_equals_never_having_stopped(straight, tmp_path):
    loop.train(tiny(2), tmp_path)
    loop.train(tiny(4), tmp_path)
    again, whole = (load_file(folder / "export" / "adapter_model.safetensors") for folder in (tmp_path, straight))
    for name, tensor in whole.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)
    timing = ("seconds_rollout", "seconds_update", "videos_per_hour")
    for resumed, undisturbed in zip(rows(tmp_path), rows(straight), strict=True):
        assert {k: v for k, v in resumed.items() if k not in timing} == {k: v for k, v in undisturbed.items() if k not in timing}


def test_resume_refuses_what_would_change_the_numbers(straight):
    changed = dataclasses.replace(tiny(6), optimizer=c.OptimizerConfig(learning_rate=2e-2, ema_decay=0.5))
    with pytest.raises(UserError, match="optimizer.learning_rate"):
        loop.train(changed, straight)


def test_a_prompt_that_comes_twice_gets_other_noise():
    numbers = loop.members([5, 3, 5], 4)
    np.testing.assert_array_equal(numbers, [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]])


def test_group_statistics():
    got = loop.group_statistics(np.array([1.0, 3.0, 2.0, 2.0]), 2)
    assert got == {"reward": 2.0, "reward_group_std": 0.5, "zero_std_groups": 0.5}
