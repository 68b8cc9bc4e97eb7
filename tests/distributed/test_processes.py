"""Several processes are one run: the same numbers, the same refusals, and an end when one of them is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from jax_idgrpo import rng
from jax_idgrpo.config import prompts_file
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel import hosts
from tests.distributed.processes import ROOT, finish, free_port, start

ALL = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


def test_how_processes_find_each_other():
    assert hosts.arguments({}) is None
    assert hosts.arguments(ALL) == {
        "coordinator_address": "10.0.0.2:8476",
        "num_processes": 4,
        "process_id": 3,
    }
    assert hosts.arguments({"IDGRPO_DISTRIBUTED": "auto"}) == {}
    assert hosts.arguments({"SLURM_STEP_NUM_TASKS": "8"}) == {}
    assert hosts.arguments({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}) is None
    assert hosts.arguments(ALL | {"SLURM_STEP_NUM_TASKS": "8"})["process_id"] == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"JAX_PROCESS_ID": ""},
            r"JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES without JAX_PROCESS_ID: set all three",
        ),
        (
            {"JAX_PROCESS_ID": "4"},
            r"JAX_PROCESS_ID is 4 and JAX_NUM_PROCESSES 4; processes are numbered from 0 to 3",
        ),
        ({"JAX_NUM_PROCESSES": "four"}, r"JAX_NUM_PROCESSES is 'four'; set it to a whole number"),
        (
            {"JAX_COORDINATOR_ADDRESS": "host"},
            r"JAX_COORDINATOR_ADDRESS is 'host'; it names a host and a port",
        ),
    ],
)
def test_incomplete_variables_are_refused(change, reason):
    with pytest.raises(UserError, match=reason):
        hosts.arguments(ALL | change)
    with pytest.raises(UserError, match="IDGRPO_DISTRIBUTED is 'yes'"):
        hosts.arguments({"IDGRPO_DISTRIBUTED": "yes"})


def test_alone_nothing_is_gathered_and_everything_agrees():
    hosts.assert_facts_match({"anything": "at all"})
    assert hosts.memory_share(1000) == 1000
    assert hosts.any_process(True) and not hosts.any_process(False)
    tree = hosts.to_host({"a": jnp.arange(3), "b": [np.ones(2)]})
    assert (
        isinstance(tree["a"], np.ndarray)
        and tree["a"].tolist() == [0, 1, 2]
        and tree["b"][0].tolist() == [1, 1]
    )


def test_facts_of_a_folder_are_names_sizes_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"123")
    before = hosts.folder_facts(tmp_path)
    assert before.startswith("a/x.bin 3 ") and hosts.folder_facts(
        tmp_path / "a" / "x.bin"
    ).startswith("x.bin 3 ")
    (tmp_path / "a" / "x.bin").write_bytes(b"321")  # as another adapter or head of the same shape
    assert hosts.folder_facts(tmp_path) != before
    (tmp_path / "a" / "x.bin").write_bytes(b"123")
    assert hosts.folder_facts(tmp_path) == before
    (tmp_path / "a" / ".hidden").write_bytes(b"")
    assert hosts.folder_facts(tmp_path) == before


@pytest.mark.parametrize("place", [0, 10 * hosts.SAMPLE // 2, 10 * hosts.SAMPLE - 1])
def test_large_files_are_compared_by_samples(tmp_path, place):
    data = bytearray(10 * hosts.SAMPLE)
    (tmp_path / "x.bin").write_bytes(data)
    before = hosts.folder_facts(tmp_path)
    data[place] = 1
    (tmp_path / "x.bin").write_bytes(data)
    assert hosts.folder_facts(tmp_path) != before


def test_a_host_without_an_address_is_named_at_once():
    with pytest.raises(
        UserError,
        match=r"JAX_COORDINATOR_ADDRESS is 'no-such-host\.invalid:8476': the host no-such-host\.invalid cannot",
    ):
        hosts.check_address("no-such-host.invalid:8476", listens=False)
    for address in ("127.0.0.1:8476", "localhost:8476"):
        hosts.check_address(address, listens=False)


def test_a_port_in_use_is_named_by_process_0_alone():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError,
            match=rf"port {port} of process 0 is in use; choose another, the same in all processes",
        ):
            hosts.check_address(f"127.0.0.1:{port}", listens=True)
        hosts.check_address(f"127.0.0.1:{port}", listens=False)
    hosts.check_address(f"127.0.0.1:{port}", listens=True)
    with pytest.raises(UserError, match="port 99999 of process 0 cannot be used"):
        hosts.check_address("127.0.0.1:99999", listens=True)


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
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1, answer.stderr
    assert answer.stderr.startswith(f"idgrpo: JAX_COORDINATOR_ADDRESS is '{where}': ")


def worker(folder, *facts):
    answers = finish(start(["-m", "tests.distributed.worker", *facts], len(facts), 2, folder))
    assert all(status == 0 for status, _ in answers), answers
    return [json.loads(printed.splitlines()[-1]) for _, printed in answers]


def test_arrays_cross_two_processes_and_a_difference_is_named(tmp_path):
    one, other = worker(tmp_path, "same", "other")
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    noise = jax.vmap(jax.random.uniform)(
        rng.row_keys(rng.key(0, "noise"), jnp.arange(8), jnp.arange(8))
    )
    for found in (one, other):
        assert found["devices"] == 4 and found["held"] == 4
        assert (
            found["doubled"] == (2 * rows).tolist()
            and found["moved"] == rows.tolist()
            and found["sum"] == rows.sum()
        )
        np.testing.assert_allclose(found["noise"], noise, rtol=1e-6)
        assert found["marks"] == [True, False]
        assert found["answer"].startswith(
            "the hosts differ from process 0 in the configuration (process 1);"
        )
        rewards = rows.sum(1)
        rewards[5] = -1  # could not be scored
        assert found["scored"] == {"reward": rewards.tolist(), "odd": [-1, 1, -1, 1, -1, -1, -1, 1]}
    assert sorted(one["mine"] + other["mine"]) == list(range(8)) and len(one["mine"]) == 4
    assert one["wrote"] == [0] and other["wrote"] == []
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
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1, answer.stderr
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
    answers = finish(start(["-m", "tests.distributed.agreement_worker", tmp_path], 2, 1, tmp_path))
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


# ---- whole runs: minutes ------------------------------------------------------------------------------------------------

CONFIG = """
from jax_idgrpo import config as c

def get_config():
    return c.Config(
        model=c.ModelConfig(rank=2, alpha=2.0, unroll=True),
        data=c.DataConfig(max_people=3, text_length=80),
        video=c.VideoConfig(frames=5, height=64, width=64, fps=8),
        rollout=c.RolloutConfig(prompts=2, group=2, steps=3, guidance=1.0, window="fixed", window_size=1),
        grpo=c.GrpoConfig(kl=0.1),
        optimizer=c.OptimizerConfig(learning_rate=3e-3, ema_decay=0.5),
        reward=c.RewardConfig(frames=2),
        run=c.RunConfig(steps=10, save_every=2, sample_every=5),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "short.py").write_text(CONFIG)
    return folder


def idgrpo(folder, command, processes, devices, *words, own=None):
    return start(
        ["-m", "jax_idgrpo", command, folder / "short.py", *words], processes, devices, folder, own
    )


def train(folder, name, processes, devices, *words, own=None):
    return idgrpo(folder, "train", processes, devices, "--workdir", folder / name, *words, own=own)


def rows(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def adapter(folder, name):
    return load_file(folder / name / "export" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def together(folder):
    """Ten steps of two processes with two devices each."""
    answers = finish(train(folder, "together", 2, 2))
    assert [status for status, _ in answers] == [0, 0], answers
    return "together"


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (1, 1)])
def test_two_processes_equal_one(folder, together, processes, devices):
    name = f"alone-{devices}"
    answers = finish(train(folder, name, processes, devices))
    assert answers[0][0] == 0, answers
    for ours, _ in zip(rows(folder, together), rows(folder, name), strict=True):
        assert ours["ratio_min"] == ours["ratio_max"] == 1
    first, other = rows(folder, together)[0], rows(folder, name)[0]
    for value in (
        "reward",
        "reward_group_std",
        "advantage_std",
        "gradient_norm",
        "policy_loss",
        "kl",
    ):
        assert first[value] == pytest.approx(other[value], rel=1e-5, abs=1e-5), value
    ours, theirs = adapter(folder, together), adapter(folder, name)
    for tensor, value in ours.items():
        np.testing.assert_allclose(theirs[tensor], value, atol=1e-4, err_msg=tensor)


@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_the_run_goes_on(folder, together):
    started = train(folder, "lost", 2, 2)
    while not (folder / "lost" / "metrics.jsonl").exists() or len(rows(folder, "lost")) < 3:
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.1)
    started[1].send_signal(signal.SIGKILL)
    lost = time.monotonic()
    (status, printed), _ = finish(started)
    assert status != 0 and time.monotonic() - lost < 60
    assert (
        "process that was lost" in printed or "distributed service detected fatal errors" in printed
    ), printed
    answers = finish(train(folder, "lost", 2, 2))
    assert [status for status, _ in answers] == [0, 0], answers
    for tensor, value in adapter(folder, together).items():
        np.testing.assert_array_equal(adapter(folder, "lost")[tensor], value, err_msg=tensor)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_a_run(folder, together):
    assert finish(train(folder, "fewer", 2, 2, "--run.steps", "4"))[0][0] == 0
    assert finish(train(folder, "fewer", 1, 1))[0][0] == 0
    for tensor, value in adapter(folder, together).items():
        np.testing.assert_allclose(
            adapter(folder, "fewer")[tensor], value, atol=1e-4, err_msg=tensor
        )


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_one_step(folder, together):
    started = train(folder, "stopped", 2, 2, "--run.save_every", "100")
    while not (folder / "stopped" / "metrics.jsonl").exists() or len(rows(folder, "stopped")) < 1:
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    assert [status for status, _ in finish(started)] == [143, 143]
    done = len(rows(folder, "stopped"))
    assert 1 <= done < 10 and [
        int(path.name) for path in (folder / "stopped" / "checkpoints").iterdir()
    ] == [done]
    assert finish(train(folder, "stopped", 2, 2))[0][0] == 0
    for tensor, value in adapter(folder, together).items():
        np.testing.assert_array_equal(adapter(folder, "stopped")[tensor], value, err_msg=tensor)


@pytest.mark.slow
def test_videos_scores_and_tables_of_two_processes_are_those_of_one(folder):
    listed = load_prompts(prompts_file("embedded:eval"), 3)[:6]
    table = [
        f'{";".join(str(path.absolute()) for path in prompt.references)},"{prompt.text}"\n'
        for prompt in listed
    ]
    (folder / "six.csv").write_text("ref_paths,prompt\n" + "".join(table))
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


@pytest.mark.slow
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
