"""A workdir belongs to one run at a time, and to this machine."""

import signal
import subprocess
import sys

import pytest

from jax_idgrpo.config import Config
from jax_idgrpo.errors import UserError
from jax_idgrpo.training.finetune import finetune
from jax_idgrpo.training.lock import locked
from jax_idgrpo.training.train import train
from tests.helpers.paths import ROOT

HOLD = """
import sys
from pathlib import Path
from jax_idgrpo.training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the workdir `tmp_path / "run"` until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_workdir_in_use_is_refused_and_free_after_a_kill(tmp_path, holder):
    workdir = tmp_path / "run"
    before = sorted(path.name for path in workdir.iterdir())
    for command in (train, finetune):
        with pytest.raises(
            UserError,
            match=rf"workdir .*run: another process is training here \(process {holder.pid} on ",
        ) as refused:
            command(Config(), workdir)
        assert "\n" not in str(refused.value)
    assert sorted(path.name for path in workdir.iterdir()) == before  # nothing was touched
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(workdir):
        pass
    assert not list(workdir.iterdir())


def test_the_command_ends_with_status_2(tmp_path, holder):
    words = [
        sys.executable,
        "-m",
        "jax_idgrpo",
        "train",
        "configs/quickstart.py",
        "--workdir",
        str(tmp_path / "run"),
    ]
    answer = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.count("\n") == 1
    assert "another process is training here" in answer.stderr
