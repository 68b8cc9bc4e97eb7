"""`idgrpo pool`: which pairs it chooses, and what it refuses."""

import csv

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import cli
from jax_idgrpo.config import Config, VideoConfig
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences import pool
from jax_idgrpo.preferences.couples import Scored, write_couples
from tests.helpers.command import stop_of


def member(tmp_path, source, prompt, **values):
    """A video of a source with scores."""
    file = tmp_path / f"{source}-{prompt}.mp4"
    if not file.exists():
        write_video(file, np.zeros((5, 16, 16, 3), np.float32), 8)
    return pool.Member(source, Scored(file, Prompt(prompt, f"text {prompt}", ()), values))


def test_a_winner_is_at_least_as_good_in_every_term(tmp_path):
    members = [
        member(tmp_path, "base", 0, reward=0.2, motion=0.03),
        member(tmp_path, "tuned", 0, reward=0.5, motion=0.02),  # better, and stiller
        member(tmp_path, "clip", 0, reward=0.9, motion=0.04),
        member(tmp_path, "base", 1, reward=0.2, motion=0.03),
        member(tmp_path, "tuned", 1, reward=0.5, motion=0.02),
        member(tmp_path, "base", 2, reward=0.2, motion=0.03),
        member(tmp_path, "tuned", 2, reward=float("nan"), motion=0.05),
        member(tmp_path, "base", 3, reward=0.2, motion=0.03),
    ]
    both = pool.dominant_couples(members, pool.Rule({"reward": 1.0, "motion": 0.5}, {}))
    assert [(winner.source, couple.a.prompt.id) for couple, winner in both] == [("clip", 0)]
    slack = pool.dominant_couples(
        members, pool.Rule({"reward": 1.0, "motion": 0.0}, {"motion": 9.0})
    )
    assert [(winner.source, couple.a.prompt.id) for couple, winner in slack] == [
        ("clip", 0),
        ("tuned", 1),
    ]
    for couple, winner in slack:
        won = couple.a if couple.labels["SA"] == "A" else couple.b
        assert won == winner.video
        assert (couple.differences["SA"] > 0) == (couple.labels["SA"] == "A")


def test_pairs_name_what_made_their_videos(tmp_path):
    members = [member(tmp_path, "base", 0, reward=0.2), member(tmp_path, "clip", 0, reward=0.9)]
    ((couple, _),) = pool.dominant_couples(members, pool.Rule({"reward": 1.0}, {}))
    makers = {one.video.file: one.source for one in members}
    write_couples(tmp_path / "pairs.csv", [couple], ("SA",), "reward", makers)
    (row,) = csv.DictReader((tmp_path / "pairs.csv").open())
    for side in "AB":
        assert row[f"path_{side}"] == f"{row[f'made_by_{side}']}-0.mp4"
    assert row[f"made_by_{row['SA']}"] == "clip"


def test_unknown_terms_name_the_closest(tmp_path):
    members = [member(tmp_path, "base", 0, reward=0.2, motion=0.1)]
    with pytest.raises(UserError, match="no 'moton'; did you mean motion"):
        pool.check_terms(pool.Rule({"moton": 1.0}, {}), members)


def test_the_judge_chooses_no_pairs(tmp_path):
    members = [member(tmp_path, "base", 0, reward=0.2, judge_identity=0.1)]
    with pytest.raises(UserError, match="must not be trained on it; use reward"):
        pool.check_terms(pool.Rule({"judge_identity": 1.0}, {}), members)


def test_clips_without_the_text_of_a_prompt_and_stills_of_several_people_are_refused(tmp_path):
    Image.new("RGB", (32, 32), (90, 150, 30)).save(tmp_path / "a.png")
    write_video(tmp_path / "v.mp4", np.zeros((5, 32, 32, 3), np.float32), 8)
    (tmp_path / "clips.csv").write_text("path,ref_paths,prompt\nv.mp4,a.png,other text\n")
    config = Config(video=VideoConfig(5, 32, 32, 8))
    prompts = [Prompt(0, "text", (tmp_path / "a.png", tmp_path / "b.png"))]
    with pytest.raises(UserError, match="no clip of 5 frames or more has the text of a prompt"):
        pool.write_matching_clips(config, tmp_path / "clips.csv", prompts, tmp_path / "clip")
    with pytest.raises(UserError, match="no prompt has one person"):
        pool.write_stills(config, prompts, tmp_path / "still")
    prompts = [Prompt(0, "other text", (tmp_path / "a.png",))]
    pool.write_matching_clips(config, tmp_path / "clips.csv", prompts, tmp_path / "clip")
    assert [path.name for path in (tmp_path / "clip").iterdir()] == ["0000-0.mp4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "other=nowhere"], "no such file"),
        (["--model", "clip=."], "the name clip is of other videos"),
        (["--model", "tuned"], "not NAME=PATH"),
        (["--terms", "reward"], "--terms reward: write numbers by name as JSON"),
        (["--terms", '{"reward": 0}'], "--terms weighs no term"),
        (["--slack", '{"motion": 1}'], "--slack motion: 1; name a term of --terms"),
        (["--margin", "-1"], "--margin is -1.0; use 0 or more"),
        (["--clips", "none.csv"], "--clips none.csv: no such file"),
    ],
)
def test_wrong_options_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    given = ["--prompts", "embedded:eval", "--out", tmp_path / "out", *options]
    stop = stop_of(cli.main, monkeypatch, capsys, "idgrpo", "pool", "quickstart", *given)
    assert stop.status == 2
    assert message in stop.err
    assert len(stop.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
