"""A training run whose reward mixes `placed` in, with places in one of two prompts."""

import csv
import dataclasses
import math

import pytest

from jax_idgrpo import config as c
from jax_idgrpo.data.prompts import read_rows
from jax_idgrpo.errors import UserError
from jax_idgrpo.training.train import train
from tests.helpers.tiny_run import rows, tiny


def write_prompts(path, places):
    """Write a CSV of bundled prompts with the given places of the first ones, and return its path."""
    source = c.EMBEDDED / "prompts" / "rl" / "prompts.csv"
    listed = [row for _, row in read_rows(source) if ";" in row["ref_paths"]]
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(("ref_paths", "prompt", "places"))
        for row, given in zip(listed, places, strict=False):
            names = row["ref_paths"].split(";")[:2]
            photos = ";".join(str(source.parent / name) for name in names)
            out.writerow((photos, row["prompt"], given))
    return path


def test_a_run_mixes_placed_in_and_skips_rows_without_places(tmp_path):
    config = tiny(2)
    mixed = dataclasses.replace(
        config,
        reward=dataclasses.replace(config.reward, mixture={"placed": 1.0}),
        data=dataclasses.replace(
            config.data, prompts=str(write_prompts(tmp_path / "a.csv", ["left;right", ""]))
        ),
    )
    train(mixed, tmp_path / "mixed")
    assert all(0 <= row["placed"] <= 1 for row in rows(tmp_path / "mixed"))
    assert all(math.isfinite(row["policy_loss"]) for row in rows(tmp_path / "mixed"))
    boxes = "0 0 .5 1;.5 0 1 1"
    write_prompts(tmp_path / "a.csv", [boxes, ""])
    with pytest.raises(UserError, match="row 0 has other photos"):
        train(mixed, tmp_path / "mixed")
    without = write_prompts(tmp_path / "b.csv", ["", ""])
    data = dataclasses.replace(mixed.data, prompts=str(without))
    with pytest.raises(UserError, match="reward.mixture placed: no row of data.prompts has places"):
        train(dataclasses.replace(mixed, data=data), tmp_path / "none")
    assert not (tmp_path / "none").exists() or not list((tmp_path / "none").glob("checkpoints/*"))
