"""A reward of one's own: what it is given, what it may return, and that what goes wrong costs its own videos alone."""

import dataclasses
import json
import warnings

import numpy as np
import pytest

from jax_idgrpo import cli
from jax_idgrpo import config as c
from jax_idgrpo.data.video import write_video
from jax_idgrpo.training import train
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import rows, tiny

EXAMPLE = f"{ROOT}/examples/custom_reward.py:score"


def test_three_steps_of_the_quickstart_with_the_example(tmp_path):
    config = c.load(
        ROOT / "configs" / "quickstart.py",
        [
            ("reward.custom", EXAMPLE),
            ("run.steps", "3"),
            ("run.sample_every", "0"),
            ("rollout.prompts", "2"),
            ("rollout.group", "2"),
            ("rollout.steps", "4"),
            ("rollout.window_size", "2"),
        ],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "reward.custom")
        train.train(config, tmp_path)
    logged = rows(tmp_path)
    assert [
        (row["ratio_min"], row["ratio_max"], row["skipped"], row["rewards_failed"])
        for row in logged
    ] == [(1, 1, 0, 0)] * 3
    for row in logged:
        assert row["reward"] == pytest.approx(row["colour"] + row["motion"], abs=1e-5)
        assert row["reward_group_std"] > 0


def test_a_video_without_a_reward_is_left_out_of_the_update(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "calls = []\n\n\ndef score(videos, prompts, references):\n    calls.append(0)\n    found = videos.mean((1, 2, 3, 4))\n"
        "    found[1] = float('nan')\n    return found\n"
    )
    config = dataclasses.replace(tiny(1), reward=c.RewardConfig(custom="mine.py:score"))
    with pytest.warns(UserWarning, match="reward.custom: video 1 could not be scored"):
        train.train(config, tmp_path / "run")
    (row,) = rows(tmp_path / "run")
    assert row["rewards_failed"] == 1
    assert row["skipped"] == 0
    assert np.isfinite(row["reward"])
    assert row["gradient_norm"] > 0


def test_score_writes_its_terms_and_the_judges(tmp_path):
    write_video(
        tmp_path / "videos" / "0000-0.mp4",
        np.random.default_rng(0).uniform(-1, 1, (5, 64, 64, 3)).astype(np.float32),
        8,
    )
    cli.run(
        [
            "score",
            str(ROOT / "configs" / "quickstart.py"),
            "--videos",
            str(tmp_path / "videos"),
            "--prompts",
            "embedded:eval",
            "--out",
            str(tmp_path / "scores.jsonl"),
            "--reward.custom",
            EXAMPLE,
        ]
    )
    (line,) = [json.loads(text) for text in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert {
        "reward",
        "judge_identity",
        "motion",
        "colour",
    } <= line.keys()
    assert "embedder_identity" not in line
