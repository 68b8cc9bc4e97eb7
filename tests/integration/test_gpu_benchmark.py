"""The first contact with a GPU runs on a CPU at toy size, so that it runs where it is needed."""

import json

import pytest

from benchmarks import gpu, gpu_parts
from tests.helpers.gpu_benchmark import benchmark


def test_a_machine_without_gpu_is_refused_in_one_line(tmp_path):
    answer = benchmark("--out", str(tmp_path / "out"))
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert "--small" in answer.stderr
    assert not (tmp_path / "out").exists()


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
    assert record["status"].startswith("stopped after")
    assert record["rows"] == []
