"""The vision-language reward where it is used: training, scoring and evaluating by configuration, and divided over devices."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.training import train as loop
from jax_idgrpo.training import update
from tests.helpers.paths import ROOT
from tests.helpers.processes import finish, start
from tests.helpers.prompts import write_bundled_prompts
from tests.helpers.tiny_run import rows, tiny
from tests.helpers.vlm_runs import configured, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory)


@pytest.mark.filterwarnings("ignore:reward.vlm_prompt")
def test_a_run_maximises_it(folder, tmp_path):
    config = dataclasses.replace(tiny(2), reward=configured(folder))
    loop.train(config, tmp_path)
    logged = rows(tmp_path)
    assert [row["skipped"] for row in logged] == [0, 0]
    assert all(np.isfinite(row["reward"]) and row["SA"] == row["reward"] for row in logged)


@pytest.mark.filterwarnings("ignore:reward.vlm_prompt")
def test_prompts_of_all_sizes_train_by_one_program(folder, tmp_path):
    """One to three people, photos of two sizes: what the reward is shown of them is no part of the update."""
    photos = [tmp_path / f"{n}.png" for n in range(3)]
    for path, size in zip(photos, ((64, 64), (320, 200), (64, 64))):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(path)
    texts = [
        f"{';'.join(path.name for path in photos[:count])},{'A person walks. ' * 9 * count}"
        for count in (1, 2, 3)
    ]
    (tmp_path / "my.csv").write_text("\n".join(["ref_paths,prompt", *texts]) + "\n")
    config = tiny(3)
    data = dataclasses.replace(config.data, prompts=str(tmp_path / "my.csv"))
    before = update.update._cache_size()
    loop.train(dataclasses.replace(config, data=data, reward=configured(folder)), tmp_path / "run")
    assert update.update._cache_size() == before + 1
    assert len(rows(tmp_path / "run")) == 3


def test_two_processes_evaluate_by_it_as_one_does(folder, tmp_path):
    write_bundled_prompts(tmp_path / "three.csv", "eval", 3)
    given = configured(folder)
    options = [
        f"--reward.{name}={getattr(given, name)}"
        for name in ("faces", "vlm", "vlm_base", "vlm_dtype")
    ]
    sizes = [
        "--evaluate.videos",
        "1",
        "--evaluate.steps",
        "2",
        "--evaluate.batch",
        "4",
        "--evaluate.frames",
        "5",
    ]
    found = {}
    for processes, devices, mesh in ((2, 2, ["--mesh.data", "2", "--mesh.fsdp", "2"]), (1, 1, [])):
        out = tmp_path / f"evaluated-{processes}"
        words = [
            "-m",
            "jax_idgrpo",
            "evaluate",
            ROOT / "configs" / "quickstart.py",
            "--prompts",
            tmp_path / "three.csv",
            "--out",
            out,
        ]
        answers = finish(start([*words, *options, *sizes, *mesh], processes, devices, tmp_path))
        assert all(status == 0 for status, _ in answers), answers
        found[processes] = json.loads((out / "metrics.json").read_text())["videos"]
        assert len(list(out.rglob("*.mp4"))) == 3
    for ours, theirs in zip(found[2], found[1], strict=True):
        assert ours["base"] == pytest.approx(theirs["base"], abs=1e-3)


def test_scores_are_the_same_however_it_is_divided(folder):
    subprocess.run(
        [sys.executable, "-m", "tests.helpers.vlm_worker", str(folder)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    with np.load(folder / "scores.npz") as found:
        assert found["parts"].tolist() == [1, 2, 2]
        assert np.ptp(found["one"]) > 1e-4
        for name in ("divided", "own"):
            np.testing.assert_allclose(found[name], found["one"], atol=1e-5)
