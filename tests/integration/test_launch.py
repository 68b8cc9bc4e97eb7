"""What starts runs elsewhere: scripts without findings, a manifest of the right form, images of what exists."""

import subprocess

import pytest

from tests.helpers.paths import ROOT

SCRIPTS = sorted(
    [*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch"), ROOT / ".ci" / "run"]
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    found = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path", str(ROOT), str(script)],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


CALLS = [
    ("local_multiprocess.sh", []),
    ("local_multiprocess.sh", ["many", "true"]),
    ("slurm.sbatch", []),
    ("tpu_vm.sh", ["idgrpo"]),
    ("xpk.sh", []),
]


@pytest.mark.parametrize(("script", "words"), CALLS)
def test_scripts_say_how_they_are_used(script, words):
    answer = subprocess.run(
        ["bash", str(ROOT / "launch" / script), *words],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("usage: ")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["quickstart.sh", "local_multiprocess.sh"])
def test_options_of_a_run_are_not_taken_for_an_extra(script, tmp_path):
    """A sourced script sees the arguments of the one that sources it, unless it is given its own."""
    (tmp_path / "launch").mkdir()
    text = (ROOT / "launch" / script).read_text()
    (tmp_path / "launch" / script).write_text(text)
    (tmp_path / "launch" / "environment.sh").write_text('echo "extra=<${1:-}>"; exit 0\n')
    words = (
        ["runs/look", "--run.steps", "3"] if script == "quickstart.sh" else ["2", "idgrpo", "train"]
    )
    command = ["bash", str(tmp_path / "launch" / script), *words]
    answer = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert answer.stdout == "extra=<>\n"


def test_processes_end_together_with_the_status_of_the_first_that_fails(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "run.sh").write_text(
        (ROOT / "launch" / "local_multiprocess.sh").read_text()
    )
    (tmp_path / "launch" / "environment.sh").write_text(":\n")
    environment = {"PATH": "/usr/bin:/bin", "DEVICES": "1", "PORT": "1"}

    def run(command):
        words = ["bash", str(tmp_path / "launch" / "run.sh"), "2", "bash", "-c", command]
        return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)

    assert run("exit 0").returncode == 0
    failed = run('if [ "$JAX_PROCESS_ID" = 1 ]; then exit 3; fi; sleep 600')
    assert failed.returncode == 3
    assert "ended with status 3" in failed.stderr
    seen = run('echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"')
    assert seen.stdout == "0 of 2 at 127.0.0.1:1\n"
    assert (tmp_path / "runs" / "logs" / "process-1.log").read_text() == "1 of 2 at 127.0.0.1:1\n"


INTERPRETER = """#!/bin/bash
case "$*" in
    "-c "*) ;;
    --version) echo "Python 3.12.0" ;;
    "-m venv"*)
        [ "$3" != --clear ] || rm -rf .venv
        mkdir -p .venv/bin
        cp "$0" .venv/bin/python
        touch .venv/bin/activate
        echo made >>calls
        ;;
    "-m pip"*) echo installed >>calls ;;
    *) exit 1 ;;
esac
"""


@pytest.mark.parametrize("left", ["nothing", "no activate", "no interpreter", "everything"])
def test_an_environment_that_was_left_half_made_is_made_again(left, tmp_path):
    """With it go the stamps of what was installed in the old one."""
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    interpreter = tmp_path / "interpreter"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    command = ["bash", "-c", f"source {ROOT / 'launch' / 'environment.sh'} '' && echo ready"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(interpreter)}

    def start():
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment
        )

    if left != "nothing":
        assert start().returncode == 0
        for file in {"no activate": ["activate"], "no interpreter": ["python"]}.get(left, []):
            (tmp_path / ".venv" / "bin" / file).unlink()
        (tmp_path / "calls").unlink()
    answer = start()
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.endswith("ready\n")
    calls = tmp_path / "calls"
    assert (calls.read_text().split() if calls.exists() else []) == (
        [] if left == "everything" else ["made", "installed"]
    )
