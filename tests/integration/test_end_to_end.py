"""The main job through the command line, on the embedded model set and very short: train, continue, evaluate, sample, score, report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jax_idgrpo import cli
from jax_idgrpo.config import EMBEDDED
from tests.helpers.command import stop_of
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import rows

CONFIG = str(ROOT / "configs" / "quickstart.py")
SHORT = """
    --rollout.prompts 2 --rollout.group 2 --rollout.micro_batch 0 --rollout.steps 4 --rollout.window fixed --rollout.window_start 0
    --rollout.window_size 1 --grpo.updates 1 --run.save_every 1 --run.sample_every 1
    --evaluate.videos 1 --evaluate.steps 2 --evaluate.batch 4 --evaluate.bootstrap 50
""".split()  # noqa: SIM905


def idgrpo(*words: str) -> None:
    cli.run([str(word) for word in words])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Four rows of the embedded held-out prompts, so that little is sampled."""
    source = EMBEDDED / "prompts" / "eval" / "prompts.csv"
    folder = tmp_path_factory.mktemp("prompts") / "eval"
    shutil.copytree(source.parent, folder)
    lines = source.read_text().splitlines()
    (folder / "prompts.csv").write_text("\n".join(lines[:5]) + "\n")
    return folder / "prompts.csv"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps, the second by a second command."""
    workdir = tmp_path_factory.mktemp("runs") / "short"
    idgrpo("train", CONFIG, "--workdir", workdir, *SHORT, "--run.steps", "1")
    idgrpo("train", CONFIG, "--workdir", workdir, *SHORT, "--run.steps", "2")
    return workdir


def test_training_continues_and_the_ratio_is_one(run):
    logged = rows(run)
    assert [row["step"] for row in logged] == [0, 1]
    assert all(row["ratio_min"] == row["ratio_max"] == 1 for row in logged)
    assert all(np.isfinite(row["reward"]) for row in logged)
    adapter = {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_progress.json",
    }
    assert {path.name for path in (run / "export").iterdir()} == adapter
    assert list((run / "samples").rglob("*.mp4"))


def test_a_run_and_an_adapter_of_version_0_1_go_on(prompts, tmp_path):
    """Written by 0.1.0 with the same options: its configuration is accepted, its checkpoint and adapter are read."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "run_of_version_0_1", tmp_path / "old")
    old = tmp_path / "old" / "export"
    idgrpo(
        "sample", CONFIG, "--prompts", prompts, "--out", tmp_path / "videos", "--lora", old, *SHORT
    )
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 4
    before = (old / "adapter_model.safetensors").read_bytes()
    options = ["--run.save_every", "2", "--run.sample_every", "0"]
    same = [*SHORT[: SHORT.index("--run.save_every")], *SHORT[-8:], *options]
    idgrpo("train", CONFIG, "--workdir", tmp_path / "old", *same, "--run.steps", "3")
    logged = rows(tmp_path / "old")
    assert [row["step"] for row in logged] == [0, 1, 2]
    assert logged[2]["ratio_min"] == logged[2]["ratio_max"] == 1
    assert (old / "adapter_model.safetensors").read_bytes() != before


def test_evaluate_and_report(run, prompts):
    idgrpo(
        "evaluate",
        CONFIG,
        "--prompts",
        prompts,
        "--out",
        run / "evaluation",
        "--lora",
        f"tuned={run / 'export'}",
        *SHORT,
    )
    found = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert found["models"].keys() == {"base", "tuned"}
    assert all(0 <= found["models"][model]["faces"]["mean"] <= 1 for model in ("base", "tuned"))
    idgrpo("report", run)
    text = (run / "report.html").read_text()
    assert "judge identity" in text
    assert text.count("<video") == 8


def test_sample_and_score_agree_with_one_another(run, prompts, tmp_path):
    idgrpo(
        "sample",
        CONFIG,
        "--prompts",
        prompts,
        "--out",
        tmp_path / "videos",
        "--lora",
        run / "export",
        *SHORT,
    )
    idgrpo(
        "score",
        CONFIG,
        "--videos",
        tmp_path / "videos",
        "--prompts",
        prompts,
        "--out",
        tmp_path / "scores.jsonl",
        *SHORT,
    )
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert all(-1 <= line["judge_identity"] <= 1 for line in lines)


def refused(capsys, monkeypatch, *words) -> str:
    """The one line that a command answers."""
    stop = stop_of(cli.main, monkeypatch, capsys, "idgrpo", *words)
    printed = stop.err
    assert stop.status == 2
    assert "Traceback" not in printed
    assert printed.strip().splitlines()[-1].startswith("idgrpo: ")
    return printed


def test_a_change_that_breaks_exactness_is_refused(run, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    changed = " ".join(SHORT).replace("--rollout.group 2", "--rollout.group 4").split()
    answer = refused(
        capsys, monkeypatch, "train", CONFIG, "--workdir", run, *changed, "--run.steps", "3"
    )
    assert "rollout.group" in answer
    assert "twice" not in answer
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_a_truncated_checkpoint_is_refused(tmp_path, capsys, monkeypatch):
    shutil.copytree(EMBEDDED / "pipeline", tmp_path / "pipeline")
    weights = next((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    answer = refused(
        capsys,
        monkeypatch,
        "train",
        CONFIG,
        "--workdir",
        tmp_path / "w",
        *SHORT,
        "--model.path",
        tmp_path / "pipeline",
    )
    assert weights.name in answer
    assert not (tmp_path / "w" / "checkpoints").exists() or not list(
        (tmp_path / "w" / "checkpoints").iterdir()
    )


@pytest.mark.parametrize(
    ("rows", "answer"),
    [
        ("", "header"),
        ("ref_paths,prompt\n", "no rows"),
        ("ref_paths,prompt\nnone.png,hello\n", "none.png"),
    ],
)
def test_a_bad_csv_is_refused(tmp_path, capsys, monkeypatch, rows, answer):
    (tmp_path / "bad.csv").write_text(rows)
    out = tmp_path / "out"
    assert answer in refused(
        capsys,
        monkeypatch,
        "sample",
        CONFIG,
        "--prompts",
        tmp_path / "bad.csv",
        "--out",
        out,
        *SHORT,
    )
    assert not out.exists()
