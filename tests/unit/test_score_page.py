"""Names, curves and small copies of a report, without networks."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from jax_idgrpo.data.video import Clip, preview, write_video
from jax_idgrpo.evaluation import recorder, score_page

ROOT = Path(__file__).parents[2]


def test_folders_of_videos_are_plain_and_distinct():
    names = ["a b.mp4", "a_b.mp4", "a.b.mp4", "A b.mp4", "../x.mp4", "видео.mp4", "…", "x" * 300]
    folders = [recorder.folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", name) for name in folders)
    assert max(map(len, folders)) < 50


def test_photos_are_named_without_folders_of_the_machine(tmp_path):
    assert recorder.photo_name(tmp_path / "photos" / "a.jpg", tmp_path) == "photos/a.jpg"
    assert recorder.photo_name(tmp_path / "elsewhere" / "a.jpg", tmp_path / "csv") == "a.jpg"


def test_messages_are_freed_of_folders_of_the_machine():
    folders = [Path("/home/me/my clips"), Path("/home/me"), Path(".")]
    text = "video /home/me/my clips/a b.mp4: is damaged; prompts /home/me/my.csv, line 3"
    assert score_page.without_folders(text, folders) == (
        "video a b.mp4: is damaged; prompts my.csv, line 3"
    )


def person(similarity):
    state = "".join("-" if value is None else "m" for value in similarity)
    return {"similarity": similarity, "judge": similarity, "state": state}


def test_curve_has_gaps_where_the_person_is_missing():
    text = score_page._curve(1, person([0.5, 0.6, None, None, 0.7]), 0.3)
    lines = re.findall(r'class="line c0" points="([^"]*)"', text)
    assert [len(line.split()) for line in lines] == [2, 2], "one frame alone is not drawn"
    bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="\d+" width="([\d.]+)"', text)
    assert [(kind, float(x), float(w)) for kind, x, w in bars] == [
        ("matched", 0, 240),
        ("missing", 240, 240),
        ("matched", 480, 120),
    ]


def test_curve_of_a_long_video_stays_small():
    long, short = (score_page._curve(1, person([0.5] * frames), 0.3) for frames in (30_000, 300))
    assert len(long) < 1.2 * len(short)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((48, 64), 32, (24, 32)), ((31, 45), 480, (32, 44)), ((2, 400), 100, (2, 100))],
)
def test_small_copies_are_of_even_size(tmp_path, size, side, expected):
    rng = np.random.default_rng(0)
    with preview(tmp_path / "clip.mp4", size, 12.5, side) as add:
        for _ in range(5):
            add(rng.integers(0, 256, (*size, 3), np.uint8))
    clip = Clip.open(tmp_path / "clip.mp4")
    assert (len(clip.numbers), clip.rate) == (5, pytest.approx(12.5, rel=1e-3))
    assert (clip.height, clip.width) == expected


@pytest.mark.parametrize("rate", [1e-9, 1e9, 30000 / 1001])
def test_small_copies_of_any_rate_can_be_written(tmp_path, rate):
    with preview(tmp_path / "clip.mp4", (32, 32), rate, 32) as add:
        for _ in range(3):
            add(np.zeros((32, 32, 3), np.uint8))
    assert Clip.open(tmp_path / "clip.mp4").rate == pytest.approx(min(max(rate, 1), 240), rel=1e-2)


def test_rate_of_a_clip(tmp_path):
    write_video(tmp_path / "clip.mp4", np.zeros((6, 32, 32, 3), np.float32), 24)
    assert Clip.open(tmp_path / "clip.mp4").rate == pytest.approx(24)
    write_video(tmp_path / "one.mp4", np.zeros((1, 32, 32, 3), np.float32), 24)
    assert Clip.open(tmp_path / "one.mp4").rate is None


def test_style_and_script_are_shipped():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["jax_idgrpo"]
    shipped = {path for pattern in patterns for path in (ROOT / "jax_idgrpo").glob(pattern)}
    folder = ROOT / "jax_idgrpo" / "evaluation"
    assert {folder / "report.css", folder / "score_page.css", folder / "score_page.js"} <= shipped
