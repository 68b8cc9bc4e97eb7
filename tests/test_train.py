"""The whole loop on the embedded models, small: files, exact resume, refusals."""

import dataclasses
import gc
import json
import os
import signal
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_idgrpo import config as c
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.errors import UserError
from jax_idgrpo.sampling.adapters import saved_step
from jax_idgrpo.training import keeper, selection, setup, train


def tiny(steps, grpo=None, **rollout):
    values = (
        dict(
            prompts=2, group=2, steps=3, guidance=1.0, window="fixed", window_start=0, window_size=1
        )
        | rollout
    )
    return c.Config(
        model=c.ModelConfig(rank=2, alpha=2.0, unroll=True),
        data=c.DataConfig(max_people=3, text_length=80),
        video=c.VideoConfig(frames=5, height=64, width=64, fps=8),
        rollout=c.RolloutConfig(**values),
        grpo=c.GrpoConfig(**(grpo or {})),
        optimizer=c.OptimizerConfig(learning_rate=1e-2, ema_decay=0.5),
        reward=c.RewardConfig(frames=2),
        run=c.RunConfig(steps=steps, save_every=2, sample_every=2, give_up_after=2),
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Four steps without a stop."""
    workdir = tmp_path_factory.mktemp("straight")
    train.train(tiny(4), workdir)
    return workdir


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_interface_says(straight):
    adapter = ("export/adapter_config.json", "export/adapter_model.safetensors")
    for name in ("config.json", "metrics.jsonl", "checkpoints", "samples", *adapter):
        assert (straight / name).exists(), name
    assert len(list((straight / "samples" / "000002").glob("*.mp4"))) == train.SHOWN
    tensors = load_file(straight / "export" / "adapter_model.safetensors")
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


def test_forward_passes_of_a_step():
    """The published recipe at 25 steps: 50 passes to sample a video; 24 steps, two branches, the policy and the base to train it."""
    got = setup.forward_passes(c.Config(rollout=c.RolloutConfig(prompts=1, group=2)), branches=2)
    assert got == dict(
        forward_passes_rollout=100, forward_passes_update=2 * 24 * 2 * 2, backward_passes=2 * 24 * 2
    )
    nft = c.Config(
        rollout=c.RolloutConfig(prompts=1, group=2, steps=10, window="none"),
        grpo=c.GrpoConfig(objective="nft", kl=0.0, times=3, epochs=2),
    )
    assert setup.forward_passes(nft, branches=2) == dict(
        forward_passes_rollout=40, forward_passes_update=2 * 2 * 3 * 2, backward_passes=12
    )


def test_resume_equals_never_having_stopped(straight, tmp_path):
    train.train(tiny(2), tmp_path)
    train.train(tiny(4), tmp_path)
    again, whole = (
        load_file(folder / "export" / "adapter_model.safetensors")
        for folder in (tmp_path, straight)
    )
    for name, tensor in whole.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)
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


def test_a_prompt_that_comes_twice_gets_other_noise():
    numbers = selection.members([5, 3, 5], 4)
    np.testing.assert_array_equal(numbers, [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]])


def test_group_statistics():
    got = selection.group_statistics(np.array([1.0, 3.0, 2.0, 2.0]), 2)
    assert got == {
        "reward": 2.0,
        "reward_group_std": 0.5,
        "zero_std_groups": 0.5,
        "rewards_failed": 0.0,
    }
    got = selection.group_statistics(np.array([1.0, 3.0, 2.0, np.nan, np.nan, np.nan]), 2)
    assert got == {
        "reward": 2.0,
        "reward_group_std": 0.5,
        "zero_std_groups": 0.5,
        "rewards_failed": 3.0,
    }


REWARDS = np.array([[1.0, 4, 2, 3], [5, 5, 5, 5], [np.nan, 1, 0, 0.5]], np.float32)
NONE: dict = {}


def test_what_is_trained_is_decided_on_all_groups():
    advantage, weight, picks = selection.choose(c.GrpoConfig(), REWARDS, NONE, NONE)
    np.testing.assert_array_equal(weight, [[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    np.testing.assert_array_equal(advantage[1], np.zeros(4))
    assert picks is None and advantage[2, 0] == 0 and advantage[0].argmax() == 1
    _, weight, _ = selection.choose(c.GrpoConfig(drop_constant=True), REWARDS, NONE, NONE)
    np.testing.assert_array_equal(weight[1], np.zeros(4))
    _, weight, picks = selection.choose(c.GrpoConfig(best=1, worst=1), REWARDS, NONE, NONE)
    np.testing.assert_array_equal(picks, [1, 0, 4, 7, 9, 10])
    np.testing.assert_array_equal(weight.ravel()[picks], np.ones(6))
    pairs = c.GrpoConfig(objective="dpo", kl_units="velocity", best=1, worst=1)
    _, weight, picks = selection.choose(pairs, REWARDS, NONE, NONE)
    np.testing.assert_array_equal(
        weight.ravel()[picks], [1, 1, 0, 0, 1, 1]
    )  # equal rewards prefer nobody
    _, weight, picks = selection.choose(
        pairs, np.array([[np.nan, np.nan, 3, np.nan]], np.float32), NONE, NONE
    )
    np.testing.assert_array_equal(weight.ravel()[picks], [0, 0])


def test_pairs_of_identity_and_motion():
    motion = {"motion": np.array([[9.0, 1, 1, 2]], np.float32)}
    pairs = c.GrpoConfig(objective="dpo", kl_units="velocity", best=1, worst=1)
    assert selection.choose(pairs, REWARDS[:1], motion, {"motion": 2.0})[2][0] == 0
    assert selection.choose(c.GrpoConfig(best=1, worst=1), REWARDS[:1], motion, NONE)[2][0] == 1


def test_a_mixture_weighs_terms_in_units_of_their_own_spread():
    rewards = np.array([[1.0, 2, 3, 4], [2, 2, 2, 2], [np.nan, 1, 2, 3]], np.float32)
    other = np.random.default_rng(0).normal(size=rewards.shape).astype(np.float32)
    alone, own = (
        selection.choose(c.GrpoConfig(), values, NONE, NONE)[0] for values in (rewards, other)
    )
    terms = {"mimr": 1000 * other, "motion": np.zeros_like(other)}
    mixed, weight, _ = selection.choose(
        c.GrpoConfig(), rewards, terms, {"mimr": 0.5, "motion": 0.25}
    )
    seen = np.isfinite(rewards)
    np.testing.assert_allclose(
        mixed[seen], (alone + 0.5 * own)[seen], rtol=1e-3
    )  # the spread of the large one makes 1e-4 smaller
    assert mixed[2, 0] == weight[2, 0] == 0  # no reward, no say
    only, _, _ = selection.choose(
        c.GrpoConfig(), rewards, {"mimr": other}, {"reward": 0, "mimr": 1}
    )
    np.testing.assert_array_equal(only[seen], own[seen])
    selection.check_mixture({"mimr": 1.0, "reward": 0.0}, ("reward", "motion", "mimr"))
    with pytest.raises(
        UserError,
        match=r"knows no 'mimir'; did you mean mimr\? \(the terms of this reward: mimr, motion, reward\)",
    ):
        selection.check_mixture({"mimir": 1.0}, ("reward", "motion", "mimr"))


def test_summary_keeps_the_ratio_of_the_first_update_and_of_the_last():
    logged = [
        dict(kl=1.0, ratio_min=1.0, ratio_max=1.0, skipped=0.0),
        dict(kl=3.0, ratio_min=0.9, ratio_max=1.2, skipped=1.0),
    ]
    got = train.summary(logged)
    assert got == dict(
        kl=2.0, ratio_min=1.0, ratio_max=1.0, skipped=0.5, ratio_min_last=0.9, ratio_max_last=1.2
    )
    assert train.summary(logged[:1]) == logged[0]


def test_failures_in_a_row_are_counted_from_what_is_stored():
    assert selection.failed_in_a_row([]) == 0
    assert selection.failed_in_a_row([{"skipped": s} for s in (1.0, 0.0, 1.0, 1.0)]) == 2
    assert selection.failed_in_a_row([{"skipped": s} for s in (1.0, 0.5)]) == 0


VELOCITY = dict(kl=1e-3, kl_units="velocity")
RECIPES = {
    "cps, a step per prompt, two updates in two epochs": (
        dict(
            grpo=dict(**VELOCITY, updates=2, epochs=2, time_weights=True),
            sampler="cps",
            window="per_prompt",
        ),
        ("ratio_min_last", "approx_kl"),
    ),
    "guard, best and worst": (
        dict(
            grpo=dict(objective="guard", best=1, worst=1, drop_constant=True),
            group=3,
            micro_batch=2,
        ),
        ("ratio_min",),
    ),
    "nft": (dict(grpo=dict(**VELOCITY, objective="nft"), window="none"), ()),
    "awm, off-policy": (
        dict(grpo=dict(**VELOCITY, objective="awm", clip=0.5, updates=2), window="none"),
        ("ratio_min_last",),
    ),
    "dpo": (
        dict(grpo=dict(**VELOCITY, objective="dpo", best=1, worst=1), window="none", guidance=2.0),
        (),
    ),
    "gradient of the reward": (
        dict(grpo=dict(**VELOCITY, objective="reward_gradient", gradient_steps=2), window="none"),
        (),
    ),
    "sft on the best": (
        dict(grpo=dict(**VELOCITY, objective="sft", best=1), window="none", micro_batch=2),
        (),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_in_the_same_loop(recipe, tmp_path):
    values, logged = RECIPES[recipe]
    config = tiny(2, **values)
    exact = dataclasses.replace(
        config.model, remat="full"
    )  # without, a ratio may be a unit in the last place off, by CPU
    train.train(dataclasses.replace(config, model=exact), tmp_path)
    for row in rows(tmp_path):
        assert (
            row["skipped"] == 0
            and row["gradient_norm"] > 0
            and np.isfinite(row["policy_loss"])
            and row["kl"] >= 0
        )
        assert row.get("ratio_min", 1) == row.get("ratio_max", 1) == 1
        assert all(np.isfinite(row[name]) for name in logged)
    tensors = load_file(tmp_path / "export" / "adapter_model.safetensors")
    assert max(np.abs(tensor).max() for name, tensor in tensors.items() if "lora_B" in name) > 0


def failing(monkeypatch, broken):
    """The embedded reward, whose scores are no numbers for the rows `broken(call)` of each call."""
    real = setup.make_reward
    calls = []

    def make(config, mesh):
        reward = real(config, mesh)
        scored = reward.score

        def score(*given):
            calls.append(0)
            terms = scored(*given)
            return terms | {"reward": np.where(broken(len(calls)), np.nan, terms["reward"])}

        monkeypatch.setattr(reward, "score", score)
        return reward

    monkeypatch.setattr(setup, "make_reward", make)
    return calls


@pytest.mark.slow
def test_a_reward_that_is_no_number_costs_one_video_and_the_same_one_after_a_resume(
    monkeypatch, tmp_path
):
    calls = failing(monkeypatch, lambda call: np.arange(4) == (1 if call == 3 else -1))
    train.train(tiny(4), tmp_path / "whole")
    calls.clear()
    train.train(tiny(2), tmp_path / "stopped")
    train.train(tiny(4), tmp_path / "stopped")
    assert [row["rewards_failed"] for row in rows(tmp_path / "whole")] == [0, 0, 1, 0]
    assert all(row["skipped"] == 0 for row in rows(tmp_path / "whole"))
    one, other = (
        load_file(tmp_path / name / "export" / "adapter_model.safetensors")
        for name in ("whole", "stopped")
    )
    for name, tensor in one.items():
        np.testing.assert_array_equal(other[name], tensor, err_msg=name)


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
    assert not any((tmp_path / "checkpoints").iterdir()) and not (tmp_path / "export").exists()


def test_constant_groups_are_warned_of_once():
    assert selection.constant_in_a_row([{"zero_std_groups": s} for s in (1.0, 0.5, 1.0, 1.0)]) == 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for constant in range(25):
            train.warn_if_constant(constant, constant)
    (warning,) = caught
    assert str(warning.message).startswith(
        "step 10: in each of the last 10 steps the rewards of every group were all equal"
    )


# ---- a run in chunks and updates: what it leaves in memory, and where it can be stopped -----------------------------------


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """Two steps of two chunks and two updates on the same two prompts, without a stop: the configuration and the workdir, the bytes on
    the device before each chunk, and how many videos were taken to the host at a time."""
    workdir = tmp_path_factory.mktemp("chunked")
    listed = load_prompts(c.prompts_file("embedded:rl"), 3)[:2]
    lines = [
        f'{";".join(str(path.absolute()) for path in prompt.references)},"{prompt.text}"\n'
        for prompt in listed
    ]
    (workdir / "two.csv").write_text("ref_paths,prompt\n" + "".join(lines))
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
    assert len(held) == 4 and held[2] <= held[0] < held[1]


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

    def function(*given):
        calls.append(0)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return real(*given)

    monkeypatch.setattr(module, name, function)
    return calls


def adapters(*folders):
    return [load_file(folder / "export" / "adapter_model.safetensors") for folder in folders]


def test_a_run_stops_between_chunks_and_between_updates_and_goes_on_bit_for_bit(
    chunked, monkeypatch, tmp_path
):
    config, undisturbed, *_ = chunked
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        calls = stopped_by(
            patch, train, "sample", 1, signal.SIGTERM
        )  # the first chunk: nothing is done yet
        train.train(config, tmp_path)
    assert (
        stop.value.code == 143 and len(calls) == 1 and not any((tmp_path / "checkpoints").iterdir())
    )
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        calls = stopped_by(patch, train, "update", 3, signal.SIGINT)  # the first update of step 2
        train.train(config, tmp_path)
    assert stop.value.code == 130 and len(calls) == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"] and saved_step(
        tmp_path / "export"
    ) == 1
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        calls = stopped_by(
            patch, train, "sample", 1, signal.SIGHUP
        )  # step 2 again, its first chunk
        train.train(config, tmp_path)
    assert stop.value.code == 129 and len(calls) == 1

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            keeper.Keeper, "_export", killed
        )  # after the last checkpoint, before its export
        train.train(config, tmp_path)
    assert (
        "2" in {path.name for path in (tmp_path / "checkpoints").iterdir()}
        and saved_step(tmp_path / "export") == 1
    )
    train.train(config, tmp_path)
    whole, again = adapters(undisturbed, tmp_path)
    for name, tensor in whole.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)
    assert [row["policy_loss"] for row in rows(tmp_path)] == [
        row["policy_loss"] for row in rows(undisturbed)
    ]
