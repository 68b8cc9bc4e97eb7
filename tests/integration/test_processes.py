"""Several processes are one run: the same numbers, the same refusals, and an end when one of them is lost."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import rng
from tests.helpers.paths import ROOT
from tests.helpers.process_runs import make_folder, train
from tests.helpers.processes import answers_of, finish, free_port, start


@pytest.mark.parametrize("trouble", ["port", "host"])
def test_process_0_ends_in_one_line_where_nobody_can_meet(trouble, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = (
            f"127.0.0.1:{taken.getsockname()[1]}"
            if trouble == "port"
            else "no-such-host.invalid:8476"
        )
        variables = {
            "JAX_COORDINATOR_ADDRESS": where,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "0",
        }
        answer = subprocess.run(
            [
                sys.executable,
                "-m",
                "jax_idgrpo",
                "train",
                "configs/quickstart.py",
                "--workdir",
                str(tmp_path / "run"),
            ],
            env={**os.environ, "JAX_PLATFORMS": "cpu", **variables},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.count("\n") == 1
    assert answer.stderr.startswith(f"idgrpo: JAX_COORDINATOR_ADDRESS is '{where}': ")


def test_arrays_cross_two_processes_and_a_difference_is_named(tmp_path):
    words = ["-m", "tests.helpers.processes_worker", "same", "other"]
    one, other = answers_of(words, 2, 2, tmp_path)
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    noise = jax.vmap(jax.random.uniform)(
        rng.row_keys(rng.key(0, "noise"), jnp.arange(8), jnp.arange(8))
    )
    for found in (one, other):
        assert found["devices"] == 4
        assert found["held"] == 4
        assert found["doubled"] == (2 * rows).tolist()
        assert found["moved"] == rows.tolist()
        assert found["sum"] == rows.sum()
        np.testing.assert_allclose(found["noise"], noise, rtol=1e-6)
        assert found["marks"] == [True, False]
        assert found["answer"].startswith(
            "the hosts differ from process 0 in the configuration (process 1);"
        )
        rewards = rows.sum(1)
        rewards[5] = -1  # could not be scored
        assert found["scored"] == {"reward": rewards.tolist(), "odd": [-1, 1, -1, 1, -1, -1, -1, 1]}
    assert sorted(one["mine"] + other["mine"]) == list(range(8))
    assert len(one["mine"]) == 4
    assert one["began"] == other["began"] == []
    assert one["initial"] == other["initial"] == [1]
    assert one["wrote"] == [0]
    assert other["wrote"] == []
    assert one["share"] == other["share"] == 500  # both are on this machine
    assert not one["warned"]
    assert other["warned"] == [
        "reward: video 5 could not be scored (ValueError: no face); the reward is NaN there, and "
        "the update leaves it out"
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_waits_in_vain_says_for_whom(number, tmp_path):
    where = f"127.0.0.1:{free_port()}"
    variables = {
        "JAX_COORDINATOR_ADDRESS": where,
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
        "IDGRPO_PATIENCE": "2",
    }
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "jax_idgrpo",
            "train",
            "configs/quickstart.py",
            "--workdir",
            str(tmp_path),
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.count("\n") == 1
    assert answer.stderr.startswith(
        f"idgrpo: the processes did not find each other at {where} (not all came within 2 s);"
    )


def test_hosts_with_other_photos_or_another_reward_are_named(tmp_path):
    """Files of the same names and sizes on every host, one byte of which is another on process 1."""
    for number in (0, 1):
        host = tmp_path / str(number)
        (host / "head").mkdir(parents=True)
        (host / "head" / "head.safetensors").write_bytes(b"head%d" % number)
        (host / "mine.py").write_text(
            f"def score(videos, prompts, references):\n    return {number}\n"
        )
        Image.new("RGB", (32, 32), (number, 0, 0)).save(host / "anna.png")
        (host / "prompts.csv").write_text("ref_paths,prompt\nanna.png,Anna walks\n")
    answers = finish(start(["-m", "tests.helpers.agreement_worker", tmp_path], 2, 1, tmp_path))
    assert all(status == 0 for status, _ in answers), answers
    for _, printed in answers:
        assert printed.splitlines()[-3:] == [
            "the hosts differ from process 0 in the prompts, photos or pairs (process 1); give all of them the same and start again",
            *[
                "the hosts differ from process 0 in the reward (process 1); give all of them the same and start again"
            ]
            * 2,
        ]


def test_hosts_with_another_configuration_do_not_start(folder):
    answers = finish(train(folder, "differing", 2, 1, own={1: ("--run.seed", "1")}))
    assert [status for status, _ in answers] == [2, 2], answers
    for _, printed in answers:
        assert printed.splitlines()[-1] == (
            "idgrpo: the hosts differ from process 0 in the configuration (process 1); give all of them the same and start again"
        )
    assert not any((folder / "differing").iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory)
