"""The whole loop on the embedded models, small: files, exact resume, refusals."""

import dataclasses
import gc
import os
import signal

import jax
import numpy as np
import pytest

from jax_idgrpo import config as c
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.errors import UserError
from jax_idgrpo.sampling.adapters import saved_step
from jax_idgrpo.training import keeper, train
from tests.helpers.decodes import count_decodes
from tests.helpers.prompts import write_bundled_prompts
from tests.helpers.tiny_run import adapter, assert_same_adapter, failing, rows, tiny


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Four steps without a stop."""
    workdir = tmp_path_factory.mktemp("straight")
    train.train(tiny(4), workdir)
    return workdir


def test_a_run_leaves_what_the_interface_says(straight):
    exported = ("export/adapter_config.json", "export/adapter_model.safetensors")
    for name in ("config.json", "metrics.jsonl", "checkpoints", "samples", *exported):
        assert (straight / name).exists(), name
    assert len(list((straight / "samples" / "000002").glob("*.mp4"))) == train.SHOWN
    tensors = adapter(straight)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert max(np.abs(tensor).max() for name, tensor in tensors.items() if "lora_B" in name) > 0


def test_every_rollout_is_on_policy_at_its_first_update(straight):
    assert [(row["ratio_min"], row["ratio_max"]) for row in rows(straight)] == [(1.0, 1.0)] * 4


def test_a_step_logs_more_than_its_mean_reward(straight):
    for row in rows(straight):
        assert row.keys() >= {
            "reward_group_std",
            "advantage_std",
            "zero_std_groups",
            "gradient_norm",
            "clip_fraction",
            "kl",
            "skipped",
            "rewards_failed",
            "videos_per_hour",
            "forward_passes_rollout",
            "forward_passes_update",
            *train.PHASES,
        }
        assert (
            row["forward_passes_rollout"],
            row["forward_passes_update"],
            row["backward_passes"],
        ) == (12, 8, 4)


def test_resume_equals_never_having_stopped(straight, tmp_path, monkeypatch):
    decoded = count_decodes(monkeypatch)
    train.train(tiny(2), tmp_path)
    prompts = load_prompts(tiny(2).data.prompts_file(), 3, decode=False)
    once = {digest: 1 for prompt in prompts for digest in prompt.digests}
    assert decoded == once, "a run decodes every photo once"
    train.train(tiny(4), tmp_path)
    assert decoded == dict.fromkeys(once, 2), "and so does the one that goes on"
    assert_same_adapter(straight, tmp_path)
    timing = (*train.PHASES, "videos_per_hour")
    for resumed, undisturbed in zip(rows(tmp_path), rows(straight), strict=True):
        assert {k: v for k, v in resumed.items() if k not in timing} == {
            k: v for k, v in undisturbed.items() if k not in timing
        }


def test_resume_refuses_what_would_change_the_numbers(straight):
    changed = dataclasses.replace(
        tiny(6), optimizer=c.OptimizerConfig(learning_rate=2e-2, ema_decay=0.5)
    )
    with pytest.raises(UserError, match="optimizer.learning_rate"):
        train.train(changed, straight)


def test_a_step_that_waits_for_the_host_is_refused(monkeypatch, tmp_path):
    decode = train.rollout.decode
    monkeypatch.setattr(
        train.rollout,
        "decode",
        lambda vae, latents, start, frames: decode(vae, latents, np.asarray(start), frames),
    )
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train.train(tiny(1), tmp_path / "run")


def test_a_run_that_cannot_be_saved_stops_with_one_line(monkeypatch, tmp_path):
    failing(monkeypatch, lambda call: np.ones(4, bool))
    with pytest.raises(
        UserError, match="no update of the last 2 steps, up to step 2, had a finite gradient"
    ) as stopped:
        train.train(tiny(4), tmp_path)
    assert "\n" not in str(stopped.value)
    assert [row["skipped"] for row in rows(tmp_path)] == [1, 1]
    assert "start again in another --workdir with a lower --optimizer.learning_rate" in str(
        stopped.value
    )
    assert not any((tmp_path / "checkpoints").iterdir())
    assert not (tmp_path / "export").exists()


# ---- a run in chunks and updates: what it leaves in memory, and where it can be stopped -----------------------------------


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """Two steps of two chunks and two updates on the same two prompts, without a stop: the configuration and the workdir, the bytes on
    the device before each chunk, and how many videos were taken to the host at a time."""
    workdir = tmp_path_factory.mktemp("chunked")
    write_bundled_prompts(workdir / "two.csv", "rl", 2)
    config = tiny(2, grpo=dict(updates=2))
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, prompts=str(workdir / "two.csv"))
    )
    held, shown = [], []
    real_sample, real_host = train.sample, train.to_host

    def sample(*given):
        if not held:
            gc.collect()  # what other runs left, and the setup of this one
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        return real_sample(*given)

    def to_host(tree):
        shown.append(len(tree) if getattr(tree, "ndim", 0) == 5 else 0)
        return real_host(tree)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "sample", sample)
        patch.setattr(train, "to_host", to_host)
        patch.setattr(train, "SHOWN", 3)
        train.train(
            dataclasses.replace(config, run=dataclasses.replace(config.run, sample_every=5)),
            workdir,
        )
    return config, workdir, held, shown


def test_nothing_of_a_step_is_on_the_devices_in_the_next(chunked):
    *_, held, _ = chunked
    assert len(held) == 4
    assert held[2] <= held[0] < held[1]


def test_as_many_videos_are_kept_as_are_written(chunked):
    _, workdir, _, shown = chunked
    assert [count for count in shown if count] == [
        2,
        1,
    ]  # of the first step; the second writes none
    assert len(list((workdir / "samples" / "000001").glob("*.mp4"))) == 3


def stopped_by(monkeypatch, module, name, count, number):
    """Send this process a signal at the `count`-th call of a function, which still runs."""
    real, calls = getattr(module, name), []

    def function(*given, **named):
        calls.append(0)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return real(*given, **named)

    monkeypatch.setattr(module, name, function)
    return calls


def test_a_run_stops_between_chunks_and_between_updates_and_goes_on_bit_for_bit(
    chunked, monkeypatch, tmp_path
):
    config, undisturbed, *_ = chunked
    with monkeypatch.context() as patch:
        # The first chunk: nothing is done yet.
        calls = stopped_by(patch, train, "sample", 1, signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            train.train(config, tmp_path)
    assert stop.value.code == 143
    assert len(calls) == 1
    assert not any((tmp_path / "checkpoints").iterdir())
    with monkeypatch.context() as patch:
        calls = stopped_by(patch, train, "update", 3, signal.SIGINT)  # the first update of step 2
        with pytest.raises(SystemExit) as stop:
            train.train(config, tmp_path)
    assert stop.value.code == 130
    assert len(calls) == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert saved_step(tmp_path / "export") == 1
    with monkeypatch.context() as patch:
        calls = stopped_by(patch, train, "sample", 1, signal.SIGHUP)  # the first chunk of step 2
        with pytest.raises(SystemExit) as stop:
            train.train(config, tmp_path)
    assert stop.value.code == 129
    assert len(calls) == 1

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # After the last checkpoint, before its export.
        patch.setattr(keeper.Keeper, "_export", killed)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path)
    assert "2" in {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert saved_step(tmp_path / "export") == 1
    train.train(config, tmp_path)
    assert_same_adapter(undisturbed, tmp_path)
    assert [row["policy_loss"] for row in rows(tmp_path)] == [
        row["policy_loss"] for row in rows(undisturbed)
    ]
