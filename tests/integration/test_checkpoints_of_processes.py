"""Checkpoints of several processes: damage that one process meets alone costs one checkpoint."""

import shutil

import pytest

from jax_idgrpo.training.lock import locked
from tests.helpers.checkpoint import assert_fell_back, truncate_part
from tests.helpers.processes import answers_of, finish, start


def run(task, workdir, folder):
    return answers_of(["-m", "tests.helpers.checkpoint_worker", task, workdir], 2, 2, folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A workdir with checkpoints of the steps 3 and 6, each of two processes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    assert [answer["steps"] for answer in run("write", folder / "run", folder)] == [[3, 6], [3, 6]]
    return folder


@pytest.mark.parametrize("number", [0, 1])
def test_damage_that_one_process_meets_falls_back_in_all(written, tmp_path, number):
    workdir = shutil.copytree(written / "run", tmp_path / "run")
    truncate_part(workdir, 6, number)
    assert_fell_back(run("read", workdir, written), workdir)


def test_whole_checkpoints_are_read_as_they_are(written, tmp_path):
    workdir = shutil.copytree(written / "run", tmp_path / "run")
    for answer in run("read", workdir, written):
        assert answer == {"step": 6, "exact": True, "again": True, "steps": [3, 6], "warned": []}
    assert not (workdir / "checkpoints-damaged").exists()
    assert not (workdir / ".lock").exists()


def test_a_workdir_in_use_is_refused_by_all_processes(written, tmp_path):
    with locked(tmp_path / "run"):
        words = ["-m", "tests.helpers.checkpoint_worker", "read", tmp_path / "run"]
        answers = finish(start(words, 2, 2, written), timeout=120)
    for status, printed in answers:
        assert status != 0, printed
        assert "another process is training here" in printed
