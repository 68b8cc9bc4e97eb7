"""Metrics: rows as written, the same file after a resume, and what happens without W&B."""

import json
import sys
import types

import jax
import numpy as np
import pytest

from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import MetricsWriter, progress, read_metrics


def write(workdir, steps, start=0):
    workdir.mkdir(exist_ok=True)
    with MetricsWriter(workdir, step=start) as writer:
        for step in steps:
            writer.write(step, {"loss": 1.0 / (step + 1), "reward": np.float32(step)})


def test_rows_and_tensorboard(tmp_path):
    write(tmp_path, range(3))
    assert read_metrics(tmp_path / "metrics.jsonl")[2] == {"step": 2, "loss": 1 / 3, "reward": 2.0}
    assert b"reward" in b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("tail", ["", '{"step": 5, "lo'], ids=["whole", "cut off by a kill"])
def test_a_resumed_file_equals_the_undisturbed_one(tmp_path, tail):
    write(tmp_path / "straight", range(8))
    write(tmp_path / "resumed", range(5))
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write(tail)
    write(tmp_path / "resumed", range(3, 8), start=3)
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == (
        tmp_path / "straight" / "metrics.jsonl"
    ).read_bytes()


def test_what_is_no_number_is_null(tmp_path, caplog):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": float("nan"), "norm": float("inf")})
    assert not caplog.records  # not a line for each of them
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 0,
        "loss": None,
        "norm": None,
    }
    write(tmp_path, [1], start=1)
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [None, 0.5]


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(tmp_path, range(3))
    assert not any(tmp_path.iterdir())


def test_wandb_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        MetricsWriter(tmp_path, wandb="project")


def test_wandb_gets_the_rows_under_one_name(tmp_path, monkeypatch):
    rows, names = [], []
    run = types.SimpleNamespace(log=lambda row, step: rows.append((step, row)), finish=lambda: None)
    fake = types.SimpleNamespace(
        init=lambda **options: names.append((options["project"], options["id"])) or run
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in range(2):
        with MetricsWriter(tmp_path, step=step, wandb="project", config_json="{}") as writer:
            writer.write(step, {"loss": 2.0})
    assert rows == [(0, {"loss": 2.0}), (1, {"loss": 2.0})]
    assert names[0] == names[1]
    assert names[0][0] == "project"


def test_progress_shows_metrics_and_time_left(capsys):
    with progress("train", total=10, done=4) as update:
        update(5)
        update(6, {"reward": 0.123456, "rows/s": 7.0})
    assert capsys.readouterr().err.strip().startswith("train 6/10  reward 0.1235  rows/s 7  ")
