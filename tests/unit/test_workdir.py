"""A workdir belongs to one run at a time, and to this machine."""

from pathlib import Path

import pytest

from checkpoints_convert.__main__ import run as convert
from jax_idgrpo import cli
from jax_idgrpo.config import Config, EvaluateConfig, FinetuneConfig, ModelConfig, RewardConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.training.lock import LOCK, locked
from jax_idgrpo.workdir import local_path, new_folder, prepare_workdir
from tests.helpers.paths import CONFIGS


def test_the_lock_is_given_up_whatever_happens_within(tmp_path):
    def fail():
        with locked(tmp_path):
            assert (tmp_path / LOCK).exists()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with locked(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


ADDRESS = "gs://bucket/run"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "configs/quickstart.py", "--workdir", ADDRESS],
        ["finetune", "configs/embedded_detector.py", "--workdir", ADDRESS],
        ["train-reward", "configs/reward_face.py", "--workdir", ADDRESS],
        ["train", ADDRESS, "--workdir", "run"],
        ["train", "configs/quickstart.py", "--workdir", "run", "--profile", ADDRESS],
        ["train", "configs/quickstart.py", "--workdir", "run", "--model.path", ADDRESS],
        ["train", "configs/quickstart.py", "--workdir", "run", "--data.prompts", ADDRESS],
        ["sample", "configs/quickstart.py", "--prompts", "embedded:eval", "--out", ADDRESS],
        ["sample", "configs/quickstart.py", "--prompts", ADDRESS, "--out", "out"],
        [
            "sample",
            "configs/quickstart.py",
            "--prompts",
            "embedded:eval",
            "--out",
            "out",
            "--lora",
            ADDRESS,
        ],
        [
            "score",
            "configs/quickstart.py",
            "--prompts",
            "embedded:eval",
            "--videos",
            ADDRESS,
            "--out",
            "out",
        ],
        [
            "score",
            "configs/quickstart.py",
            "--prompts",
            "embedded:eval",
            "--videos",
            ".",
            "--out",
            ADDRESS,
        ],
        ["evaluate", "configs/quickstart.py", "--out", "out", "--lora", f"tuned={ADDRESS}"],
        ["evaluate", "configs/quickstart.py", "--out", ADDRESS],
        ["plan", "configs/quickstart.py", "--topology", "cpu:8", "--out", ADDRESS],
        ["report", ADDRESS],
        ["draw-prompts", "--out", ADDRESS, "--split", "rl", "--count", "1"],
        ["pairs", "--out", ADDRESS, "--split", "rl", "--count", "1"],
        ["pairs", "--out", "out", "--split", "rl", "--count", "1", "--clips", ADDRESS],
        ["pack-pairs", "--csv", ADDRESS, "--out", "out"],
        ["pack-pairs", "--csv", "pairs.csv", "--out", ADDRESS],
    ],
    ids=lambda words: " ".join(words).replace(ADDRESS, "ADDRESS"),
)
def test_an_address_is_no_path(words, tmp_path, monkeypatch):
    configs = CONFIGS
    monkeypatch.chdir(tmp_path)
    words = [
        str(configs / word.removeprefix("configs/")) if word.startswith("configs/") else word
        for word in words
    ]
    with pytest.raises(
        UserError, match="gs:/+bucket/run: is an address, not a path on this machine"
    ) as refused:
        cli.run(words)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", ADDRESS],
        ["verify", ".", ADDRESS],
        ["import", ".", ADDRESS],
        ["export", ".", ADDRESS, "--format", "merged", "--base", "."],
        ["export", ".", "out", "--format", "merged", "--base", ADDRESS],
    ],
    ids=lambda words: " ".join(words).replace(ADDRESS, "ADDRESS"),
)
def test_an_address_is_no_path_of_a_conversion(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="gs:/bucket/run: is an address, not a path on this machine"
    ):
        convert(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "sections",
    [
        {"model": ModelConfig(adapter=ADDRESS)},
        {"reward": RewardConfig(faces="https://host/faces")},
        {"evaluate": EvaluateConfig(prompts="s3://bucket/held.csv")},
        {"finetune": FinetuneConfig(out=ADDRESS)},
        {"finetune": FinetuneConfig(options={"csv": "file:///data/pairs.csv"})},
    ],
    ids=lambda sections: next(iter(sections)),
)
def test_an_address_in_a_configuration_is_refused_by_field(sections):
    with pytest.raises(UserError, match=rf"{next(iter(sections))}\.\w+.* is an address"):
        Config(**sections)


def test_addresses_that_became_paths_are_refused_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="workdir gs:/bucket/run: is an address"):
        prepare_workdir(Path(ADDRESS))
    with (
        pytest.raises(UserError, match="--out gs:/bucket/run: is an address"),
        new_folder(Path(ADDRESS)),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path", ["runs/mine", "/runs/a:b/c", "C:/runs", "embedded:eval", "10:30 run", "a b://c"]
)
def test_paths_with_colons_are_paths(path):
    assert local_path(path, "--out") == Path(path)
