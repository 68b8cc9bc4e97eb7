"""The GPU benchmark at toy size, in a process of its own."""

import json
import os
import subprocess
import sys

from benchmarks import gpu_parts
from tests.helpers.paths import ROOT


def benchmark(*words):
    """Run the GPU benchmark with `words` on this machine's CPU."""
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


QUICK = ("matmul", "attention", "parity", "ratio", "quickstart", "transformer")
SLOW = ("resume", "memory")  # several programs or processes of the whole package
FIGURES = {  # what a first run is for
    "ratio": {
        f"{adapter} adapter, ratio_{end}"
        for adapter in ("fresh", "trained")
        for end in ("min", "max")
    },
    "resume": {"both steps, resumed: numbers of the adapter that differ"},
    "transformer": {"rollout, model-FLOP utilization", "update, model-FLOP utilization"},
    "memory": {"rollout, memory", "decode, memory", "update, memory"},
}


def assert_parts_run(names, tmp_path):
    """The parts run at toy size, their properties hold, and their figures are in the table."""
    assert {*QUICK, *SLOW} == set(gpu_parts.PARTS)
    answer = benchmark("--small", "--out", str(tmp_path), "--only", *names)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    records = json.loads((tmp_path / "results.json").read_text())["parts"]
    table = (tmp_path / "results.md").read_text()
    assert [record["part"] for record in records] == list(names)
    for record in records:
        assert record["status"] == "done"
        assert record["rows"]
        assert all(row["holds"] is not False for row in record["rows"])
        assert FIGURES.get(record["part"], set()) <= {row["name"] for row in record["rows"]}
        assert f"| {record['part']} | {record['rows'][0]['name']} |" in table
