"""A report of videos of synthetic people says who is in which frame, and holds all that it shows."""

import csv
import json
import re
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.cli import run
from jax_idgrpo.data.video import Clip, to_uint8, write_video
from jax_idgrpo.errors import Failure, UserError
from jax_idgrpo.evaluation import recorder, score_page
from jax_idgrpo.synthetic import scenes

FRAMES, GONE = 14, range(5, 9)
PROMPT = 'Two <b>people</b> & "friends"'


@pytest.fixture(scope="module")
def drawn():
    """Clips of 14 frames with two people each, and their portraits."""
    drawn = jax.device_get(scenes.batch(0, 0, 24, "eval", FRAMES))
    rows = np.flatnonzero(drawn.mask.sum(1) == 2)[:3]
    return drawn.video[rows], drawn.portraits[rows][:, :2], drawn.boxes[rows]


@pytest.fixture(scope="module")
def inputs(drawn, tmp_path_factory):
    """A folder of three videos with names of their own, and the CSV; in one video nobody is there for a while."""
    folder = tmp_path_factory.mktemp("inputs")
    videos, portraits, _ = drawn
    (folder / "clips").mkdir()
    lines = ["ref_paths,prompt,video"]
    for n, name in enumerate(("whole.mp4", "people gone.mp4", "third.mkv.mp4")):
        clip = videos[n].copy()
        if n == 1:
            clip[GONE.start : GONE.stop] = -0.2
        write_video(folder / "clips" / name, clip, 8)
        photos = []
        for m, portrait in enumerate(portraits[n]):
            photos.append(f"photos/{n}-{m}.png")
            (folder / photos[-1]).parent.mkdir(exist_ok=True)
            Image.fromarray(to_uint8(portrait)).save(folder / photos[-1])
        quoted = PROMPT.replace('"', '""')
        lines.append(f'{";".join(photos)},"{quoted} {n}",{name}')
    (folder / "my.csv").write_text("\n".join(lines) + "\n")
    return folder


def score(inputs, report, *options):
    run(
        [
            "score",
            "quickstart",
            "--videos",
            str(inputs / "clips"),
            "--prompts",
            str(inputs / "my.csv"),
            "--report",
            str(report),
            *options,
        ]
    )


@pytest.fixture(scope="module")
def report(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "report"
    score(inputs, folder)
    return folder


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """The files that a page names, its pictures without a description, and whether its tags close."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.undescribed = 0
        self.videos: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.links += [given[name] or "" for name in ("src", "href", "poster") if name in given]
        self.undescribed += tag == "img" and "alt" not in given
        if tag == "video":
            self.videos.append(given["src"])
        if tag not in ("meta", "link", "img", "input", "line", "rect", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_what_it_shows(report, inputs):
    text = (report / score_page.PAGE).read_text()
    page = Page(text)
    assert not page.open
    assert not page.undescribed
    files = [link for link in page.links if not link.startswith("data:")]
    assert len(files) > 3 * 2 * recorder.SHOWN
    for link in files:
        assert not re.match(r"[a-z]+:|/|\.\.", link), link
        assert (report / link).is_file(), link
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|@import|url\(", text)
    assert "<b>people" not in text
    assert "Two &lt;b&gt;people&lt;/b&gt; &amp; &quot;friends&quot; 0" in text
    for path in (report / "index.html", *report.glob("*.csv"), *report.glob("videos/*/*.json")):
        for place in (inputs, report.parent):
            assert str(place) not in path.read_text(), f"{path.name} names a folder of this machine"
    assert not list(report.rglob(".*")), "unfinished files are left"


def test_pictures_are_small_and_videos_play(report):
    pictures = list(report.glob("videos/*/*.jpg"))
    assert pictures
    assert max(path.stat().st_size for path in pictures) < 30_000
    for path in report.glob("videos/*/clip.mp4"):
        clip = Clip.open(path)
        assert len(clip.numbers) == FRAMES
        assert clip.rate == pytest.approx(8)


def test_worst_video_comes_first(report):
    page = Page((report / score_page.PAGE).read_text())
    lines = rows_of(report / "scores.csv")
    order = sorted(lines, key=lambda line: float(line["identity"]))
    folders = [recorder.folder_name(line["video"]) for line in order]
    assert [path.split("/")[1] for path in page.videos] == folders
    assert order[0]["video"] == "people gone.mp4"


def test_people_s_rows_agree_with_the_scores(report):
    """The judge's value of a video is the mean over its people, and its least is that of one."""
    people = rows_of(report / "people.csv")
    assert len(people) == 6
    for line in rows_of(report / "scores.csv"):
        rows = [row for row in people if row["video"] == line["video"]]
        assert [row["person"] for row in rows] == ["1", "2"]
        for name, mean, least in (
            ("judge_mean", "judge_identity", "judge_minimum"),
            ("similarity_mean", "identity", "identity_minimum"),
        ):
            values = [float(row[name]) for row in rows]
            assert np.mean(values) == pytest.approx(float(line[mean]), abs=1e-5)
            assert min(values) == pytest.approx(float(line[least]), abs=1e-5)
        found = sum(float(row["found"]) for row in rows)
        assert 0 < found <= 2
        assert float(line["faces_asked"]) == 2


def test_frames_without_a_person_are_named(report):
    """Nobody is in the frames that were painted over, and both people are in most others."""
    for row in rows_of(report / "people.csv"):
        ranges = [part.split("-") for part in row["frames_found"].split(";") if part]
        frames = {
            n for first, *last in ranges for n in range(int(first), int((last or [first])[0]) + 1)
        }
        assert len(frames) == round(float(row["found"]) * FRAMES)
        if row["video"] == "people gone.mp4":
            assert not frames & set(GONE)
    name = recorder.folder_name("people gone.mp4")
    faces = json.loads((report / "videos" / name / recorder.FACES).read_text())
    assert [faces["faces"][n] for n in GONE] == [0] * len(GONE)
    assert all(
        person["state"][GONE.start : GONE.stop] == "-" * len(GONE) for person in faces["people"]
    )
    assert {row["photo"] for row in rows_of(report / "people.csv")} == {
        f"photos/{n}-{m}.png" for n in range(3) for m in range(2)
    }


def test_the_embedder_of_a_report_is_that_of_the_reward(report, inputs, tmp_path):
    """With every frame scored, the reward's own similarity is the mean of the people's rows."""
    score(inputs, tmp_path / "all", "--reward.frames", str(FRAMES))
    for line in rows_of(tmp_path / "all" / "scores.csv"):
        assert float(line["identity"]) == pytest.approx(float(line["embedder_identity"]), abs=2e-3)


def test_a_stopped_command_continues_and_a_damaged_video_is_named(inputs, tmp_path, monkeypatch):
    """A kill leaves only whole folders; what was scored is not scored again, and the page is the same."""
    scored = []
    record = recorder.Recorder.__call__

    def counting(self, clip, prompt):
        scored.append(clip.path.name)
        if len(scored) == 2:
            record(self, clip, prompt)
            raise KeyboardInterrupt
        return record(self, clip, prompt)

    monkeypatch.setattr(recorder.Recorder, "__call__", counting)
    folder = tmp_path / "report"
    with pytest.raises(KeyboardInterrupt):
        score(inputs, folder)
    assert not (folder / "index.html").exists()
    assert len(list(folder.glob("videos/[!.]*"))) == 1
    score(inputs, folder)
    assert scored == ["people gone.mp4", "third.mkv.mp4", "third.mkv.mp4", "whole.mp4"]
    first = (folder / "index.html").read_text()
    score(inputs, folder)
    assert len(scored) == 4
    assert (folder / "index.html").read_text() == first
    assert not list(folder.rglob(".*"))
    assert not list(folder.glob("*.part"))

    whole = (inputs / "clips" / "whole.mp4").read_bytes()
    try:
        (inputs / "clips" / "whole.mp4").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(Failure, match="1 of 3 videos"):
            score(inputs, folder)
    finally:
        (inputs / "clips" / "whole.mp4").write_bytes(whole)
    text = (folder / "index.html").read_text()
    assert "2 of 3 videos scored" in text
    assert "video whole.mp4: is damaged" in text
    for path in (folder / "scores.csv", folder / "scores.jsonl"):
        assert str(inputs) not in text + path.read_text()
    assert len(rows_of(folder / "people.csv")) == 4


def test_a_benchmark_is_scored_with_its_table(drawn, tmp_path, capsys):
    """Videos of one person get FaceSim, those of several our identity, and objects nothing."""
    videos, portraits, _ = drawn
    entries = {
        "singlehuman_1": [("man", 0, 0)],
        "multihuman_1": [("woman", 1, 0), ("man", 1, 1)],
        "singleobj_1": [("cup", 2, 0)],
    }
    (tmp_path / "videos").mkdir()
    read = {}
    for name, pictures in entries.items():
        category, row = name.partition("_")[0], pictures[0][1]
        write_video(tmp_path / "videos" / f"{name}.mp4", videos[row], 8)
        paths = []
        for kind, n, m in pictures:
            paths.append(f"Images/{category}/{kind}/{n}{m}.png")
            (tmp_path / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(to_uint8(portraits[n][m])).save(tmp_path / paths[-1])
        read[name] = {"img_paths": paths, "prompt": f"a video of {name}"}
    (tmp_path / "Open-Domain_Eval.json").write_text(json.dumps(read))
    run(
        [
            "score",
            "quickstart",
            "--videos",
            str(tmp_path / "videos"),
            "--benchmark",
            "opens2v",
            str(tmp_path),
            "--report",
            str(tmp_path / "report"),
        ]
    )
    lines = {line["video"]: line for line in rows_of(tmp_path / "report" / "scores.csv")}
    assert set(lines) == {"singlehuman_1.mp4", "multihuman_1.mp4"}
    single, several = lines["singlehuman_1.mp4"], lines["multihuman_1.mp4"]
    assert 0 < float(single["facesim_embedder"]) <= 1
    assert 0 < float(single["facesim_judge"]) <= 1
    assert several["facesim_embedder"] == several["facesim_judge"] == ""
    printed, table = capsys.readouterr().out, (tmp_path / "report" / "table.md").read_text()
    assert table in printed
    assert "FaceSim (arcface)" in table
    assert re.search(r"\| multihuman +\| 1 of 1 +\| - ", table)
    assert f"{float(single['facesim_embedder']):.3f}" in table
    assert "Benchmark" in (tmp_path / "report" / "index.html").read_text()


def test_a_report_needs_face_networks_before_anything_is_scored(inputs, tmp_path):
    with pytest.raises(UserError, match="--report shows faces"):
        score(
            inputs,
            tmp_path / "none",
            "--reward.faces",
            "",
            "--reward.custom",
            "examples/custom_reward.py:score",
        )
    assert not (tmp_path / "none").exists()
