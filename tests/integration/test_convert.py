"""The rule tables are bijections, files survive a round trip bit for bit, and what does not fit is refused in one line."""

import os
import signal
import subprocess
import sys

from checkpoints_convert import store


def test_a_killed_write_leaves_nothing_under_the_name(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from checkpoints_convert import store\n"
        "with store.atomic_path(sys.argv[1], 'config.json') as new:\n"
        "    new.mkdir(); (new / 'config.json').write_text('{}')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with store.atomic_path(tmp_path / "out", "config.json") as new:
        new.mkdir()
        (new / "config.json").write_text("{}")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
