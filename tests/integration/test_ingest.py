"""A folder of films becomes clips with photos; bad files cost only themselves, and a rerun continues."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import cli
from jax_idgrpo.data.video import Clip, write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.ingest import command
from jax_idgrpo.preferences.video_clips import load_clips
from tests.helpers.films import FPS, FRAMES, REASONS, write_film

FAULTS = ["", "dark", "", "blurred", "freeze", "nobody", "duplicate", "swap", "", "bright"]


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(films, out, *options):
    cli.run(
        [
            *("ingest", "--videos", str(films), "--out", str(out)),
            *("--faces", "embedded", "--face", "6", *options),
        ]
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ingest")
    films = folder / "films"
    films.mkdir()
    write_film(films / "a.mp4", FAULTS, seed=3, people=2)
    (films / "a.txt").write_text("Two people walk.\n")
    shutil.copy(films / "a.mp4", films / "b.mp4")
    (films / "c.mp4").write_bytes((films / "a.mp4").read_bytes()[:3000])
    write_video(films / "d.mp4", np.zeros((1, 32, 32, 3), np.uint8), 8)
    (films / "notes.pdf").write_bytes(b"%PDF")
    run(films, folder / "out")
    return folder


def test_clips_begin_and_end_at_the_cuts(done):
    found = [json.loads(p.read_text()) for p in (done / "out" / "films").glob("*/film.json")]
    (clips,) = (film["clips"] for film in found if film["film"] == "a.mp4")
    edges = [(round(clip["from"] * FPS), round(clip["to"] * FPS)) for clip in clips]
    count = len(FAULTS)
    assert edges == [
        (FRAMES * n + 2 * (n > 0), FRAMES * (n + 1) - 2 * (n < count - 1)) for n in range(count)
    ]


def test_faulty_clips_are_left_out_with_their_reason(done):
    reasons = {
        round(float(row["from"]) * FPS) // FRAMES: row["reason"]
        for row in rows(done / "out" / "left_out.csv")
        if row["film"] == "a.mp4"
    }
    for number, fault in enumerate(FAULTS):
        if fault:
            assert reasons[number] == REASONS[fault], fault


def test_unusable_files_cost_only_themselves(done):
    found = {row["film"]: row["reason"] for row in rows(done / "out" / "left_out.csv")}
    assert found["b.mp4"] == "the same content as a.mp4"
    assert "c.mp4" in found["c.mp4"]
    assert found["d.mp4"] == "short"


def test_kept_clips_have_text_photos_and_playable_files(done):
    kept = rows(done / "out" / "clips.csv")
    assert len(kept) >= 2
    for row in kept:
        assert row["prompt"] == "Two people walk."
        photos = row["ref_paths"].split(";")
        assert len(photos) == len(row["people"].split(";")) == 2
        for photo in photos:
            picture = Image.open(done / "out" / photo)
            assert picture.width == picture.height
        clip = Clip.open(done / "out" / row["path"])
        assert len(clip.numbers) == round((float(row["to"]) - float(row["from"])) * FPS)


def test_the_folder_is_a_folder_of_clips_for_pairs(done):
    clips = [clip for split in ("train", "rl", "eval") for clip in _of_split(done / "out", split)]
    assert len(clips) == len(rows(done / "out" / "clips.csv"))


def _of_split(folder, split):
    try:
        return load_clips(folder, split)
    except UserError as error:
        if "belongs to the split" not in str(error):
            raise
        return []


def test_a_rerun_continues_and_gives_the_same_tables(done, monkeypatch):
    before = (done / "out" / "clips.csv").read_bytes()

    def again(*_):
        raise AssertionError("a finished film is processed again")

    with monkeypatch.context() as patch:
        patch.setattr(command, "process", again)
        patch.setattr(command, "ClipReader", lambda *_: None)
        # The film of one frame and the truncated one have no faces to find.
        run(done / "films" / "a.mp4", done / "out")
    assert (done / "out" / "clips.csv").read_bytes() == before


def test_missing_networks_are_one_line_before_any_film(done, tmp_path):
    with pytest.raises(UserError, match=r"detector.json: cannot be read"):
        cli.run(
            [
                *("ingest", "--videos", str(done / "films"), "--out", str(tmp_path / "out")),
                *("--faces", str(tmp_path / "nowhere")),
            ]
        )
    assert not (tmp_path / "out" / "clips.csv").exists()


def test_no_clip_left_is_one_line(tmp_path, capsys):
    write_video(tmp_path / "still.mp4", np.full((40, 32, 32, 3), 90, np.uint8), 8)
    with pytest.raises(UserError, match="no clip is left"):
        run(tmp_path / "still.mp4", tmp_path / "out")
    assert rows(tmp_path / "out" / "left_out.csv")[0]["reason"] == "blurred"
