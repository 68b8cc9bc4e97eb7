"""The first contact with a GPU runs on a CPU at toy size, so that it runs where it is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_parts

ROOT = Path(__file__).parents[1]


def benchmark(*words):
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


@pytest.mark.parametrize("names", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_every_part_runs_and_its_properties_hold(names, tmp_path):
    assert {*QUICK, *SLOW} == set(gpu_parts.PARTS)
    answer = benchmark("--small", "--out", str(tmp_path), "--only", *names)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    records = json.loads((tmp_path / "results.json").read_text())["parts"]
    table = (tmp_path / "results.md").read_text()
    assert [record["part"] for record in records] == list(names)
    for record in records:
        assert record["status"] == "done" and record["rows"]
        assert all(row["holds"] is not False for row in record["rows"])
        assert FIGURES.get(record["part"], set()) <= {row["name"] for row in record["rows"]}
        assert f"| {record['part']} | {record['rows'][0]['name']} |" in table


def test_a_machine_without_gpu_is_refused_in_one_line(tmp_path):
    answer = benchmark("--out", str(tmp_path / "out"))
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    assert "--small" in answer.stderr and not (tmp_path / "out").exists()


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A part that fails after its first figure, run as the process of a part runs it."""

    def part(small, folder):
        yield gpu_parts.Row("before", 1.0)
        raise ValueError("of two\nlines | with a bar")

    monkeypatch.setitem(gpu.PARTS, "matmul", gpu_parts.Part(part, 1))
    gpu.child("matmul", True, tmp_path / "record.jsonl")
    return [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]


def test_a_part_that_fails_keeps_its_figures_and_says_why_in_one_line(broken):
    figure, end = broken
    assert figure["row"]["name"] == "before"
    assert end["status"] == "failed: ValueError: of two lines | with a bar"


def test_a_part_is_stopped_at_the_end_of_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    record = gpu.run("quickstart", tmp_path, True, 0.1)
    assert record["status"].startswith("stopped after") and record["rows"] == []
