"""Pairs labelled by the face reward from a folder of videos, and their way into training."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences import synthesis
from jax_idgrpo.preferences.annotate import annotate
from jax_idgrpo.preferences.csv_source import load_pairs
from tests.helpers.reward_head import configuration


def drawn(folder, count):
    """Write a folder of videos, two per prompt, and their prompts CSV."""
    synthesis.write_pairs(folder / "pairs", "eval", count, 2, "drop,replace")
    (folder / "videos").mkdir()
    prompts = []
    with (folder / "pairs" / "pairs.csv").open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            for member, side in enumerate("AB"):
                name = f"{number:04d}-{member}.mp4"
                shutil.copy(folder / "pairs" / row[f"path_{side}"], folder / "videos" / name)
            photos = ";".join(f"pairs/{name}" for name in row["ref_paths"].split(";"))
            prompts.append((photos, row["prompt"]))
    with (folder / "prompts.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("ref_paths", "prompt"), *prompts])


def test_labels_follow_the_scores_and_train_reward_reads_them(tmp_path):
    drawn(tmp_path, 6)
    config = configuration(tmp_path / "unused.csv")
    out = tmp_path / "labels" / "pairs.csv"
    out.parent.mkdir()
    given = [tmp_path / "videos"], tmp_path / "prompts.csv", out
    annotate(config, *given, ["SA", "motion"], margin=0.1)
    assert all(pair.source == "automatic" for pair in load_pairs(out, ("SA", "motion")))
    lines = (tmp_path / "labels" / "pairs.csv.scores" / "0-0.jsonl").read_text().splitlines()
    scores = {line["file"]: line for line in map(json.loads, lines)}
    decided = 0
    with out.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            a, b = (scores[Path(row[f"path_{side}"]).name] for side in "AB")
            for name, term in (("SA", "reward"), ("motion", "motion")):
                gap = a[term] - b[term]
                assert float(row[f"difference_{name}"]) == pytest.approx(gap, abs=1e-5)
                if row[name] != "same":
                    assert row[name] == ("A" if gap > 0 else "B")
                    decided += 1
            assert (row["num_frames_A"], row["fps_A"]) == ("9", "8")
    assert decided > 3

    with pytest.raises(UserError, match="the scores have no 'motoin'; did you mean motion"):
        annotate(config, *given, ["motoin"])
    first = out.read_bytes()
    annotate(config, *given, ["SA", "motion"], margin=0.1, second=config)
    assert out.read_bytes() == first  # an annotator agrees with itself
