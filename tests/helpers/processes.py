"""Real processes on this machine, joined over loopback as those of a pod are."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.helpers.paths import ROOT


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(
    words: Sequence[str | Path],
    processes: int,
    devices: int,
    folder: Path,
    own: Mapping[int, Sequence[str]] | None = None,
) -> list[subprocess.Popen[str]]:
    """`python words...` in `processes` processes of `devices` CPU devices each; programs are compiled once for all of them.

    own: more words for some of them, by number.
    """
    port = free_port()
    started = []
    for number in range(processes):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "IDGRPO_PATIENCE": "120",
        }
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
        command = [sys.executable, *map(str, words), *(own or {}).get(number, ())]
        started.append(
            subprocess.Popen(
                command,
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(started: Sequence[subprocess.Popen[str]], timeout: float = 900) -> list[tuple[int, str]]:
    """Exit status and output of each."""
    return [
        (process.returncode, printed)
        for process in started
        for printed in (process.communicate(timeout=timeout)[0],)
    ]


def answers_of(
    words: Sequence[str | Path], processes: int, devices: int, folder: Path
) -> list[dict[str, object]]:
    """Run a worker to its end in several processes, and read the JSON that each of them prints last.

    Args:
      words: words of the command, without `python`.
      processes: how many are started.
      devices: CPU devices of each.
      folder: of the compiled programs.
    """
    ended = finish(start(words, processes, devices, folder))
    assert all(status == 0 for status, _ in ended), ended
    return [json.loads(printed.splitlines()[-1]) for _, printed in ended]
