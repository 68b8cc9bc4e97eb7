"""A run that is killed, stopped or damaged, in processes of its own, ends with the adapter of one that nothing disturbed, bit for bit.

Every run is `idgrpo train` on the embedded models, as small as it gets; they share a compilation cache, so that a restart takes seconds.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.prompts import write_bundled_prompts
from tests.helpers.tiny_run import assert_same_adapter, rows

CONFIG = """
from jax_idgrpo import config as c

def get_config():
    return c.Config(
        model=c.ModelConfig(rank=2, alpha=2.0, unroll=True),
        data=c.DataConfig(max_people=3, text_length=80),
        video=c.VideoConfig(frames=5, height=64, width=64, fps=8),
        rollout=c.RolloutConfig(prompts=2, group=2, steps=3, guidance=1.0, window="fixed", window_size=1),
        optimizer=c.OptimizerConfig(learning_rate=1e-2, ema_decay=0.5),
        reward=c.RewardConfig(frames=2),
        run=c.RunConfig(steps={steps}, save_every=2, sample_every=5),
    )
"""
TIMING = (
    "seconds_prepare",
    "seconds_rollout",
    "seconds_reward",
    "seconds_update",
    "videos_per_hour",
)


class Runs:
    """Runs of one length, in workdirs below `folder`."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        self.config = folder / "short.py"
        self.config.write_text(CONFIG.format(steps=steps))
        self.environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, name: str, *words: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "jax_idgrpo",
            "train",
            str(self.config),
            "--workdir",
            str(self.folder / name),
            *words,
        ]
        return subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, name: str, *words: str) -> str:
        """Run to the end; -> what it printed."""
        process = self.start(name, *words)
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
        return printed

    def rows(self, name: str) -> list[dict[str, float]]:
        """Return the metrics of a run, without its timings."""
        return [
            {key: value for key, value in row.items() if key not in TIMING}
            for row in rows(self.folder / name)
        ]

    def wait_for(self, name: str, steps: int, process: subprocess.Popen[str]) -> None:
        """Until the run has logged so many steps."""
        file = self.folder / name / "metrics.jsonl"
        while not file.exists() or len(file.read_text().splitlines()) < steps:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)

    def assert_equal(self, name: str, other: str) -> None:
        """Adapter and metrics of two runs, bit for bit."""
        assert_same_adapter(self.folder / name, self.folder / other)
        assert self.rows(name) == self.rows(other)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Runs of six steps, one of them undisturbed."""
    runs = Runs(tmp_path_factory.mktemp("survival"), 6)
    runs.finish("straight")
    return runs


def test_twenty_kills_change_nothing(tmp_path):
    runs, draw, kills = Runs(tmp_path, 60), random.Random(0), 0
    runs.finish("straight")
    while kills < 20:
        process = runs.start("killed")
        before = time.monotonic()
        while (
            time.monotonic() - before < 1.0
        ):  # the interpreter alone takes this long: a kill there disturbs nothing
            time.sleep(0.01)
        try:
            process.wait(draw.uniform(0, 16))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        printed = process.communicate()[0]
        assert process.returncode in (0, -signal.SIGKILL), printed
        if process.returncode == 0:
            break
    assert kills == 20, f"the run ended after {kills} kills: make it longer"
    runs.finish("killed")
    runs.assert_equal("straight", "killed")


def test_sigterm_leaves_a_checkpoint_and_changes_nothing(short):
    process = short.start("terminated")
    short.wait_for("terminated", 3, process)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, printed
    logged = len(short.rows("terminated"))
    assert str(logged) in {
        path.name for path in (short.folder / "terminated" / "checkpoints").iterdir()
    }
    short.finish("terminated")
    short.assert_equal("straight", "terminated")


def test_a_truncated_checkpoint_is_passed_over_with_a_warning(short):
    short.finish("damaged", "--run.steps", "4")
    newest = short.folder / "damaged" / "checkpoints" / "4"
    largest = max(
        (path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    printed = short.finish("damaged")
    assert "is damaged" in printed
    assert "trying the one before" in printed
    short.assert_equal("straight", "damaged")


def test_other_prompts_under_the_same_name_are_refused(short):
    table = short.folder / "four.csv"
    write_bundled_prompts(table, "rl", 4)
    short.finish("prompts", "--run.steps", "2", "--data.prompts", str(table))
    write_bundled_prompts(table, "rl", 2)
    process = short.start("prompts", "--data.prompts", str(table))
    printed = process.communicate()[0]
    assert process.returncode == 2, printed
    assert "rows 2, 3 removed" in printed.splitlines()[-1]
    assert len(short.rows("prompts")) == 2


def test_a_disk_that_fills_up_stops_the_run_in_one_line_and_loses_nothing(short):
    """A file system of less than a megabyte, where this machine allows one to be mounted."""
    small = short.folder / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        process = short.start("small/run", "--run.sample_every", "0")
        printed = process.communicate()[0]
        assert process.returncode == 2, printed
        assert "Traceback" not in printed
        assert "disk" in printed or "space" in printed
        shutil.copytree(
            small / "run", short.folder / "moved"
        )  # what the user does: find room, and go on
    finally:
        subprocess.run(["umount", str(small)], check=True)
    short.finish("moved")
    short.assert_equal("straight", "moved")
