"""The vision-language reward where it is used: training, scoring and evaluating by configuration, and divided over devices."""

import json

import numpy as np
import pytest

from jax_idgrpo import cli
from jax_idgrpo import config as c
from jax_idgrpo.data.video import write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import commands
from jax_idgrpo.rewards import factory
from tests.helpers.command import stop_of
from tests.helpers.paths import ROOT
from tests.helpers.vlm_runs import configured, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory)


@pytest.mark.filterwarnings("ignore:reward.vlm_prompt")
def test_score_writes_it_for_files(folder, tmp_path):
    listed = commands.load_prompts(c.prompts_file("embedded:eval"), 4)[:2]
    videos = np.random.default_rng(0).uniform(-1, 1, (2, 5, 64, 64, 3)).astype(np.float32)
    for n, video in enumerate(videos):
        write_video(tmp_path / "videos" / f"{n:04d}-0.mp4", video, 8)
    given = configured(folder)
    options = [
        word
        for name in ("faces", "vlm", "vlm_base", "vlm_dtype")
        for word in (f"--reward.{name}={getattr(given, name)}",)
    ]
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
            *options,
        ]
    )
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompt.text for prompt in listed]
    assert all(line.keys() == {"file", "prompt", "reward", "motion"} for line in lines)
    assert lines[0]["reward"] != lines[1]["reward"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward.vlm=nowhere"], "reward.vlm nowhere: no such folder"),
        (
            ["--reward.faces="],
            "only a reward.vlm, a reward.custom and models of deepface can do without",
        ),
        (["--reward.vlm=x", "--reward.vlm_dtype=half"], "reward.vlm_dtype is 'half'"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(words, message, capsys, monkeypatch, tmp_path):
    write_video(tmp_path / "0000-0.mp4", np.zeros((5, 64, 64, 3), np.float32), 8)
    given = ["--videos", tmp_path, "--prompts", "embedded:eval", "--out", tmp_path / "out.jsonl"]
    command = ["idgrpo", "score", ROOT / "configs" / "quickstart.py", *given, *words]
    stop = stop_of(cli.main, monkeypatch, capsys, *command)
    assert stop.status == 2
    assert message in stop.err
    assert stop.err.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_devices_for_the_reward_alone_leave_some_to_the_video_model(folder):
    with pytest.raises(UserError, match="reward.vlm_devices is 1, but there are 1 devices"):
        factory.make_vlm(c.Config(reward=configured(folder, vlm_devices=1)), None)
    with pytest.raises(UserError, match="smooth in the pixels"):
        c.Config(
            reward=configured(folder),
            grpo=c.GrpoConfig(objective="reward_gradient", kl_units="velocity"),
            rollout=c.RolloutConfig(window="none"),
        )
