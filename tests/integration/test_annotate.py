"""Pairs labelled by the face reward from a folder of videos, and their way into training."""

import csv
import dataclasses
import shutil

import numpy as np
import pytest

from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences import synthesis
from jax_idgrpo.preferences.annotate import annotate
from jax_idgrpo.preferences.csv_source import load_pairs
from tests.helpers.reward_head import configuration


def drawn(folder, count):
    """Drawn pairs as a folder of videos, two per prompt, with the truth by file of the winner."""
    synthesis.write_pairs(folder / "pairs", "eval", count, 2, "drop,replace")
    (folder / "videos").mkdir()
    better, prompts = {}, []
    with (folder / "pairs" / "pairs.csv").open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            for member, side in enumerate("AB"):
                name = f"{number:04d}-{member}.mp4"
                shutil.copy(folder / "pairs" / row[f"path_{side}"], folder / "videos" / name)
            better[number] = row["truth"]
            photos = ";".join(f"pairs/{name}" for name in row["ref_paths"].split(";"))
            prompts.append((photos, row["prompt"]))
    with (folder / "prompts.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("ref_paths", "prompt"), *prompts])
    return better


def test_the_labels_are_mostly_right_and_train_reward_reads_them(tmp_path):
    truth = drawn(tmp_path, 10)
    config = configuration(tmp_path / "unused.csv")
    out = tmp_path / "labels" / "pairs.csv"
    out.parent.mkdir()
    annotate(config, [tmp_path / "videos"], tmp_path / "prompts.csv", out, ["SA", "swapped"])
    pairs = load_pairs(out, ("SA", "swapped"))
    assert all(pair.source == "automatic" for pair in pairs)
    right = []
    with out.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            number = int(row["path_A"][-10:-6])
            sides = {"0": "A", "1": "B"}
            winner = {"A": row["path_A"], "B": row["path_B"]}.get(row["SA"])
            if truth[number] != "same" and winner:
                right.append(sides[winner[-5]] == truth[number])
            assert (row["num_frames_A"], row["fps_A"]) == ("9", "8")
            assert float(row["difference_SA"]) != 0
    assert len(right) >= 5
    assert np.mean(right) > 0.75

    with pytest.raises(UserError, match="the scores have no 'swaped'; did you mean swapped"):
        annotate(config, [tmp_path / "videos"], tmp_path / "prompts.csv", out, ["swaped"])
    twice = dataclasses.replace(config)
    annotate(config, [tmp_path / "videos"], tmp_path / "prompts.csv", out, second=twice)
    assert len(load_pairs(out, ("SA",))) > 0  # an annotator agrees with itself
