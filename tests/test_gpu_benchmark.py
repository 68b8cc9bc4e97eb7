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


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the small variant of all parts leaves."""
    out = tmp_path_factory.mktemp("gpu")
    answer = benchmark("--small", "--out", str(out))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return out


@pytest.mark.parametrize("name", list(gpu.PARTS))
def test_every_part_runs_and_its_properties_hold(results, name):
    records = json.loads((results / "results.json").read_text())["parts"]
    (record,) = (record for record in records if record["part"] == name)
    assert record["status"] == "done" and record["rows"]
    assert all(row["holds"] is not False for row in record["rows"])
    assert f"| {name} | {record['rows'][0]['name']} |" in (results / "results.md").read_text()


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("ratio", {f"{adapter} adapter, ratio_{end}" for adapter in ("fresh", "trained")
                   for end in ("min", "max")}),
        ("resume", {"both steps, resumed: numbers of the adapter that differ"}),
        ("transformer", {"rollout, model-FLOP utilization", "update, model-FLOP utilization"}),
        ("memory", {"rollout, memory", "decode, memory", "update, memory"}),
    ],
)
def test_the_figures_that_a_first_run_is_for_are_there(results, part, names):
    records = json.loads((results / "results.json").read_text())["parts"]
    (record,) = (record for record in records if record["part"] == part)
    assert names <= {row["name"] for row in record["rows"]}


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
