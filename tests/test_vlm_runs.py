"""The vision-language reward where it is used: training, scoring and evaluating by configuration, and divided over devices."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import cli
from jax_idgrpo import config as c
from jax_idgrpo.data.video import write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import commands
from jax_idgrpo.rewards import factory
from jax_idgrpo.training import train as loop
from jax_idgrpo.training import update
from tests import vlm_folders
from tests.distributed.processes import finish, start
from tests.test_train import rows, tiny

ROOT = Path(__file__).parents[1]
TEXT = "\nHow alike are the faces?\n<|SA_reward|>\nEND\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and a released reward with its text."""
    root = tmp_path_factory.mktemp("vlm")
    vlm_folders.write_base(root / "base")
    vlm_folders.write_released(root / "base", root / "reward")
    (root / "reward" / "prompt.txt").write_text(TEXT)
    return root


def configured(folder, **changes):
    return c.RewardConfig(
        faces="",
        vlm=str(folder / "reward"),
        vlm_base=str(folder / "base"),
        vlm_dtype="float32",
        **changes,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:reward.vlm_prompt")
def test_a_run_maximises_it(folder, tmp_path):
    config = dataclasses.replace(tiny(2), reward=configured(folder))
    loop.train(config, tmp_path)
    logged = rows(tmp_path)
    assert [row["skipped"] for row in logged] == [0, 0] and all(
        np.isfinite(row["reward"]) and row["SA"] == row["reward"] for row in logged
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:reward.vlm_prompt")
def test_prompts_of_all_sizes_train_by_one_program(folder, tmp_path):
    """One to three people, photos of two sizes: what the reward is shown of them is no part of the update."""
    photos = [tmp_path / f"{n}.png" for n in range(3)]
    for path, size in zip(photos, ((64, 64), (320, 200), (64, 64))):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(path)
    texts = [
        f"{';'.join(path.name for path in photos[:count])},{'A person walks. ' * 9 * count}"
        for count in (1, 2, 3)
    ]
    (tmp_path / "my.csv").write_text("\n".join(["ref_paths,prompt", *texts]) + "\n")
    config = tiny(3)
    data = dataclasses.replace(config.data, prompts=str(tmp_path / "my.csv"))
    before = update.update._cache_size()
    loop.train(dataclasses.replace(config, data=data, reward=configured(folder)), tmp_path / "run")
    assert update.update._cache_size() == before + 1
    assert len(rows(tmp_path / "run")) == 3


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
    assert (
        all(line.keys() == {"file", "prompt", "reward", "motion"} for line in lines)
        and lines[0]["reward"] != lines[1]["reward"]
    )


@pytest.mark.slow
def test_two_processes_evaluate_by_it_as_one_does(folder, tmp_path):
    listed = commands.load_prompts(c.prompts_file("embedded:eval"), 4)[:3]
    table = [
        f'{";".join(str(path.absolute()) for path in prompt.references)},"{prompt.text}"\n'
        for prompt in listed
    ]
    (tmp_path / "three.csv").write_text("ref_paths,prompt\n" + "".join(table))
    given = configured(folder)
    options = [
        f"--reward.{name}={getattr(given, name)}"
        for name in ("faces", "vlm", "vlm_base", "vlm_dtype")
    ]
    sizes = [
        "--evaluate.videos",
        "1",
        "--evaluate.steps",
        "2",
        "--evaluate.batch",
        "4",
        "--evaluate.frames",
        "5",
    ]
    found = {}
    for processes, devices, mesh in ((2, 2, ["--mesh.data", "2", "--mesh.fsdp", "2"]), (1, 1, [])):
        out = tmp_path / f"evaluated-{processes}"
        words = [
            "-m",
            "jax_idgrpo",
            "evaluate",
            ROOT / "configs" / "quickstart.py",
            "--prompts",
            tmp_path / "three.csv",
            "--out",
            out,
        ]
        answers = finish(start([*words, *options, *sizes, *mesh], processes, devices, tmp_path))
        assert all(status == 0 for status, _ in answers), answers
        found[processes] = json.loads((out / "metrics.json").read_text())["videos"]
        assert len(list(out.rglob("*.mp4"))) == 3
    for ours, theirs in zip(found[2], found[1], strict=True):
        assert ours["base"] == pytest.approx(theirs["base"], abs=1e-3)


@pytest.mark.parametrize(
    "words, message",
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
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "idgrpo",
            "score",
            str(ROOT / "configs" / "quickstart.py"),
            "--videos",
            str(tmp_path),
            "--prompts",
            "embedded:eval",
            "--out",
            str(tmp_path / "out.jsonl"),
            *words,
        ],
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and message in told
        and told.count("\n") == 1
        and not (tmp_path / "out.jsonl").exists()
    )


def test_devices_for_the_reward_alone_leave_some_to_the_video_model(folder):
    with pytest.raises(UserError, match="reward.vlm_devices is 1, but there are 1 devices"):
        factory.make_vlm(c.Config(reward=configured(folder, vlm_devices=1)), None)
    with pytest.raises(UserError, match="smooth in the pixels"):
        c.Config(
            reward=configured(folder),
            grpo=c.GrpoConfig(objective="reward_gradient", kl_units="velocity"),
            rollout=c.RolloutConfig(window="none"),
        )


@pytest.mark.slow
def test_scores_are_the_same_however_it_is_divided(folder):
    subprocess.run(
        [sys.executable, "-m", "tests.vlm_worker", str(folder)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    with np.load(folder / "scores.npz") as found:
        assert found["parts"].tolist() == [1, 2, 2] and np.ptp(found["one"]) > 1e-4
        for name in ("divided", "own"):
            np.testing.assert_allclose(found[name], found["one"], atol=1e-5)
