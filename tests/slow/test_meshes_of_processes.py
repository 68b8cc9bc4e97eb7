"""Four processes on meshes with fsdp, seq and tensor watch and evaluate as one process does, and process 0 alone writes."""

import functools
import json

import jax
import numpy as np
import pytest

from tests.helpers import process_runs, vlm_runs
from tests.helpers.processes import finish, start
from tests.helpers.prompts import write_bundled_prompts
from tests.helpers.tiny_run import rows

MESHES = {
    "one": {},
    "fsdp2-seq2": {"data": 1, "fsdp": 2, "seq": 2},
    "fsdp2-tensor2": {"data": 1, "fsdp": 2, "tensor": 2},
    "data2-fsdp2": {"data": 2, "fsdp": 2},
}
SIZES = {
    "model.unroll": "false",
    "run.steps": 1,
    "run.watch_every": 1,
    "run.watch_prompts": 3,
    "evaluate.videos": 1,
    "evaluate.steps": 2,
    "evaluate.batch": 4,  # one row of padding
}


class Runs:
    """On each mesh, runs that maximise and watch each reward, and evaluations of what they trained."""

    def __init__(self, folder, vlm):
        self.folder, self.found = folder, {}
        given = vlm_runs.configured(vlm)
        words = ("faces", "vlm", "vlm_base", "vlm_dtype")
        self.rewards = {
            "face": {},
            "vlm": {f"reward.{name}": getattr(given, name) for name in words},
        }
        write_bundled_prompts(folder / "three.csv", "eval", 3)

    def __call__(self, mesh):
        """Return the metrics, the watched scores and the comparison of each reward's run."""
        if mesh not in self.found:
            self._run(mesh)
            self.found[mesh] = {
                name: self._read(self.folder / mesh / name) for name in self.rewards
            }
        return self.found[mesh]

    def _run(self, mesh):
        sizes, words = MESHES[mesh], []
        for name, reward in self.rewards.items():
            fields = SIZES | reward | {f"mesh.{axis}": size for axis, size in sizes.items()}
            config = [
                self.folder / "short.py",
                *(f"--{field}={value}" for field, value in fields.items()),
            ]
            out = self.folder / mesh / name
            prompts = ["--prompts", self.folder / "three.csv", "--out", out / "compared"]
            words += ["train", *config, "--workdir", out, "+"]
            words += ["evaluate", *config, *prompts, "--lora", f"tuned={out / 'export'}", "+"]
        worker = ["-m", "tests.helpers.writes_worker", self.folder / mesh, *words]
        answers = finish(start(worker, 4 if sizes else 1, 1, self.folder))
        assert all(status == 0 for status, _ in answers), answers
        first, *others = (json.loads(printed.splitlines()[-1]) for _, printed in answers)
        files = ("watch/000001.json", "metrics.jsonl", "compared/metrics.json", "compared/table.md")
        assert {f"{name}/{file}" for name in self.rewards for file in files} < {*first}
        assert not any(others)

    def _read(self, out):
        files = sorted((out / "watch").iterdir())
        assert [file.name for file in files] == ["000000.json", "000001.json"]
        (row,) = rows(out)
        compared = json.loads((out / "compared" / "metrics.json").read_text())
        return row, [json.loads(file.read_text()) for file in files], compared["videos"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(process_runs.make_folder(tmp_path_factory), vlm_runs.make_folder(tmp_path_factory))


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
@pytest.mark.parametrize("reward", ["face", "vlm"])
def test_four_processes_watch_and_evaluate_as_one_does(runs, reward, mesh):
    ours, watched, compared = runs(mesh)[reward]
    theirs, alone, expected = runs("one")[reward]
    assert ours["ratio_min"] == ours["ratio_max"] == 1
    for value in ("reward", "reward_group_std", "gradient_norm", "kl"):
        assert ours[value] == pytest.approx(theirs[value], rel=1e-4, abs=1e-5), value
    terms = [name for name in theirs if name.startswith("watch_")]
    assert {"watch_reward", "watch_motion"} < {*terms}
    assert ("watch_judge_identity" in terms) == (reward == "face")
    for name in terms:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-3), name
    close = functools.partial(np.testing.assert_allclose, atol=1e-3)
    jax.tree.map(close, watched, alone)
    jax.tree.map(close, compared, expected)
    assert len({video["base"]["reward"] for video in expected}) == 3
