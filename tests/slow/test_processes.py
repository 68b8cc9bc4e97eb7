"""Several processes are one run: the same numbers, the same refusals, and an end when one of them is lost."""

import json
import signal
import time

import jax
import numpy as np
import pytest

from tests.helpers.checkpoint import assert_fell_back, truncate_part
from tests.helpers.process_runs import idgrpo, make_folder, train
from tests.helpers.processes import answers_of, finish, start
from tests.helpers.prompts import write_bundled_prompts
from tests.helpers.tiny_run import adapter, assert_same_adapter, rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def together(folder):
    """Ten steps of two processes with two devices each."""
    answers = finish(train(folder, "together", 2, 2))
    assert [status for status, _ in answers] == [0, 0], answers
    return "together"


@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (1, 1)])
def test_two_processes_equal_one(folder, together, processes, devices):
    name = f"alone-{devices}"
    answers = finish(train(folder, name, processes, devices))
    assert answers[0][0] == 0, answers
    for ours, _ in zip(rows(folder / together), rows(folder / name), strict=True):
        assert ours["ratio_min"] == ours["ratio_max"] == 1
    first, other = rows(folder / together)[0], rows(folder / name)[0]
    for value in (
        "reward",
        "reward_group_std",
        "advantage_std",
        "gradient_norm",
        "policy_loss",
        "kl",
    ):
        assert first[value] == pytest.approx(other[value], rel=1e-5, abs=1e-5), value
    ours, theirs = adapter(folder / together), adapter(folder / name)
    for tensor, value in ours.items():
        np.testing.assert_allclose(theirs[tensor], value, atol=1e-4, err_msg=tensor)


def test_a_lost_process_ends_the_other_and_the_run_goes_on(folder, together):
    started = train(folder, "lost", 2, 2)
    while not (folder / "lost" / "metrics.jsonl").exists() or len(rows(folder / "lost")) < 3:
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.1)
    started[1].send_signal(signal.SIGKILL)
    lost = time.monotonic()
    (status, printed), _ = finish(started)
    assert status != 0
    assert time.monotonic() - lost < 60
    assert (
        "process that was lost" in printed or "distributed service detected fatal errors" in printed
    ), printed
    answers = finish(train(folder, "lost", 2, 2))
    assert [status for status, _ in answers] == [0, 0], answers
    assert_same_adapter(folder / together, folder / "lost")


def test_another_number_of_processes_goes_on_with_a_run(folder, together):
    assert finish(train(folder, "fewer", 2, 2, "--run.steps", "4"))[0][0] == 0
    assert finish(train(folder, "fewer", 1, 1))[0][0] == 0
    for tensor, value in adapter(folder / together).items():
        np.testing.assert_allclose(
            adapter(folder / "fewer")[tensor], value, atol=1e-4, err_msg=tensor
        )


def test_sigterm_to_one_process_stops_all_at_one_step(folder, together):
    started = train(folder, "stopped", 2, 2, "--run.save_every", "100")
    while not (folder / "stopped" / "metrics.jsonl").exists() or len(rows(folder / "stopped")) < 1:
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    assert [status for status, _ in finish(started)] == [143, 143]
    done = len(rows(folder / "stopped"))
    assert 1 <= done < 10
    assert [int(path.name) for path in (folder / "stopped" / "checkpoints").iterdir()] == [done]
    assert finish(train(folder, "stopped", 2, 2))[0][0] == 0
    assert_same_adapter(folder / together, folder / "stopped")


def test_videos_scores_and_tables_of_two_processes_are_those_of_one(folder):
    write_bundled_prompts(folder / "six.csv", "eval", 6)
    prompts = [
        "--prompts",
        folder / "six.csv",
        "--evaluate.videos",
        "1",
        "--evaluate.steps",
        "2",
        "--evaluate.batch",
        "3",
    ]
    found = {}
    for processes, devices in ((2, 2), (1, 1)):
        out = folder / f"evaluated-{processes}"
        for command, words in (
            ("sample", ["--out", out / "videos"]),
            ("score", ["--videos", out / "videos", "--out", out / "scores.jsonl"]),
            ("evaluate", ["--out", out / "compared"]),
        ):
            answers = finish(idgrpo(folder, command, processes, devices, *prompts, *words))
            assert all(status == 0 for status, _ in answers), answers
        scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
        found[processes] = (
            scores,
            json.loads((out / "compared" / "metrics.json").read_text())["videos"],
        )
    (ours, table), (theirs, other) = found[2], found[1]
    assert len(ours) == len(theirs) == 6
    np.testing.assert_allclose(
        [row["reward"] for row in ours], [row["reward"] for row in theirs], atol=0.02
    )  # mp4 rounds
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, float), np.asarray(b, float), atol=1e-3
        ),
        table,
        other,
    )


def test_supervised_training_of_two_processes_is_that_of_one(folder):
    found = []
    for processes, devices in ((2, 2), (1, 1)):
        workdir = folder / f"detector-{processes}"
        words = [
            "-m",
            "jax_idgrpo",
            "finetune",
            "configs/embedded_detector.py",
            "--workdir",
            workdir,
            "--run.steps",
            "3",
            "--finetune.batch",
            "4",
            "--finetune.log_every",
            "1",
            "--finetune.start",
            "jax_idgrpo/synthetic/assets/faces",
            "--finetune.out",
            str(workdir / "export"),
        ]
        answers = finish(start(words, processes, devices, folder))
        assert all(status == 0 for status, _ in answers), answers
        found.append([row["loss"] for row in rows(folder, workdir.name)])
        assert (workdir / "export" / "detector.safetensors").exists()
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_a_process_may_come_late_to_the_first_exchange_along_an_axis(tmp_path):
    """As one that compiles a program which the other finds in the cache; gloo connects within 30 seconds or never."""
    for answer in answers_of(["-m", "tests.helpers.late_worker", "40"], 2, 2, tmp_path):
        assert answer == [[2, 4], [1, 5]]


@pytest.mark.parametrize("number", [0, 2])
def test_damage_that_one_of_four_processes_meets_falls_back_in_all(tmp_path, number):
    workdir, words = tmp_path / "run", ["-m", "tests.helpers.checkpoint_worker"]
    answers_of([*words, "write", workdir], 4, 1, tmp_path)
    truncate_part(workdir, 6, number)
    assert_fell_back(answers_of([*words, "read", workdir], 4, 1, tmp_path), workdir)


STOPPING = """
import os, signal

calls = []

def score(videos, prompts, references):
    calls.append(len(videos))
    if len(calls) == 8 + 2 and os.environ["JAX_PROCESS_ID"] == "2":
        os.kill(os.getpid(), signal.SIGTERM)
    with open({path!r} + os.environ["JAX_PROCESS_ID"], "a") as file:
        file.write("scored\\n")
    return videos.mean(axis=(1, 2, 3, 4))
"""


def test_sigterm_to_one_of_four_within_a_rollout_of_many_chunks_stops_all_at_one_step(folder):
    """The signal comes with the second of eight chunks of the second step."""
    (folder / "stopping.py").write_text(STOPPING.format(path=str(folder / "scored-")))
    workdir = folder / "within"
    fields = {
        "rollout.group": 16,
        "rollout.micro_batch": 4,
        "reward.custom": f"{folder / 'stopping.py'}:score",
        "reward.faces": "",
        "model.unroll": "false",
    }
    given = [f"--{name}={value}" for name, value in fields.items()]
    words = ["train", folder / "short.py", "--workdir", workdir, *given]
    worker = ["-m", "tests.helpers.writes_worker", workdir, *words]
    assert [status for status, _ in finish(start(worker, 4, 1, folder))] == [143] * 4
    assert len(rows(workdir)) == 1
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["1"]
    for number in range(4):
        scored = (folder / f"scored-{number}").read_text().splitlines()
        assert 8 + 2 <= len(scored) < 8 + 8
