"""Pairs of a folder of videos: split by people, cut as asked, everybody found where they are, labelled by what was done."""

import csv
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import cli
from jax_idgrpo.data.video import FINE, read_frames, read_video, to_uint8, write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences import clip_pairs, synthesis, video_clips
from jax_idgrpo.preferences.clip_pairs import Shape, from_videos, located
from jax_idgrpo.preferences.corruptions import DISTRACTOR
from jax_idgrpo.preferences.csv_source import load_pairs
from jax_idgrpo.synthetic import captions, scenes
from jax_idgrpo.synthetic.people import FRAMES_PER_SECOND

ROWS, FACES = 12, clip_pairs.RewardConfig().folder()


def write_clips(folder, rows):
    """clips.csv of rows of (video, photos, prompt)."""
    with (folder / "clips.csv").open("w", newline="") as file:
        listed = ((video, ";".join(photos), prompt) for video, photos, prompt in rows)
        csv.writer(file).writerows([("path", "ref_paths", "prompt"), *listed])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips of each synthetic prompt as mp4, their photos as PNG; and boxes of the faces by video."""
    folder, boxes, rows = tmp_path_factory.mktemp("clips"), {}, []
    for variant in (0, 1):
        drawn = jax.device_get(scenes.batch(5, 0, ROWS, "train", variant=variant))
        prompts = captions.prompts(drawn)
        for n in range(ROWS):
            photos = []
            for m in np.flatnonzero(drawn.mask[n]):
                photos.append(f"{n}-{m}.png")
                Image.fromarray(to_uint8(drawn.portraits[n, m])).save(folder / photos[-1])
            write_video(folder / f"{n}-{variant}.mp4", drawn.video[n], FRAMES_PER_SECOND, FINE)
            rows.append((f"{n}-{variant}.mp4", photos, prompts[n]))
            boxes[rows[-1][0]] = drawn.boxes[n]
    write_clips(folder, rows)
    return folder, rows, boxes


def test_people_of_one_split_are_in_no_other_whatever_else_is_in_the_folder(tmp_path):
    rng, rows = np.random.default_rng(1), []
    for n in range(150):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / f"{n}.png")
    for n in range(60):
        (tmp_path / f"{n}.mp4").touch()
        rows.append(
            (f"{n}.mp4", [f"{k}.png" for k in rng.choice(150, 1 + n % 3, replace=False)], "people")
        )
    write_clips(tmp_path, rows)
    listed = {split: video_clips.load_clips(tmp_path, split) for split in video_clips.UPTO}
    people = {
        split: {person for clip in found for person in clip.people}
        for split, found in listed.items()
    }
    assert sum(map(len, listed.values())) == 60
    assert all(people.values())
    assert not (people["train"] & people["eval"])
    assert not (people["train"] & people["rl"])
    assert not (people["rl"] & people["eval"])
    (tmp_path / "copy.png").write_bytes(
        (tmp_path / rows[0][1][0]).read_bytes()
    )  # the same person under another name
    write_clips(tmp_path, [("0.mp4", ["copy.png"], "somebody"), *reversed(rows)])
    for split, found in listed.items():
        assert {clip.people for clip in video_clips.load_clips(tmp_path, split)} == {
            clip.people for clip in found
        } | {clip.people[:1] for clip in found if clip.video.name == "0.mp4"}


def test_a_photo_in_common_joins_and_the_shares_are_kept():
    assert sorted(map(sorted, video_clips.identity_clusters(["ab", "c", "de", "bd", "f"]))) == [
        ["a", "b", "d", "e"],
        ["c"],
        ["f"],
    ]
    names = [f"{n * 2654435761 % 16**8:08x}" * 8 for n in range(4000)]
    shares = {
        split: sum(video_clips.split_of(name) == split for name in names) / len(names)
        for split in video_clips.UPTO
    }
    assert shares == pytest.approx({"train": 0.8, "rl": 0.1, "eval": 0.1}, abs=0.02)


def test_everybody_is_located_where_they_are(folder, capsys):
    source, _, boxes = folder
    found, listed = (
        located(source, "train", Shape(), FACES),
        video_clips.load_clips(source, "train"),
    )
    assert len(found) >= 0.6 * len(listed)
    assert (
        f"{len(listed)} clips of the split train: 0 too short, {len(listed) - len(found)} that"
        in capsys.readouterr().out
    )
    for one in found:
        for m in range(len(one.clip.people)):
            truth = boxes[one.clip.video.name][:, m]
            near = (
                np.abs(
                    (truth[:, :2] + truth[:, 2:]) - (one.boxes[:, m, :2] + one.boxes[:, m, 2:])
                ).max()
                / 2
            )
            assert near < 6, (
                one.clip.video.name,
                m,
            )  # of 64 pixels; the nearest other face is further away
        assert not one.boxes[:, len(one.clip.people) :].any()


def test_pairs_are_of_one_prompt_and_distractors_are_other_people(folder):
    source, _, _ = folder
    pairs = from_videos(source, "train", Shape(frames=5), FACES)
    different = []
    for _, clip_pair in zip(range(8), pairs, strict=False):
        one, other = clip_pair.clips
        assert one.video.shape == other.video.shape == (5, 64, 64, 3)
        different.append(np.abs(one.video - other.video).mean() > 0.02)
        assert np.array_equal(one.photos, other.photos)
        assert len(clip_pair.photos) == len(one.people)
        for clip in (one, other):
            strange = clip.swap_faces(dict.fromkeys(clip.people, DISTRACTOR))
            boxes = np.maximum(clip.boxes[0, clip.people], 0).astype(int)
            assert all(
                np.abs(strange - clip.video)[0, y0:y1, x0:x1].mean() > 0.02
                for x0, y0, x1, y1 in boxes
            )
    assert sum(different) >= 5  # a clip without a usable partner forms a pair with itself


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "made"
    cli.run(
        [
            "pairs",
            "--clips",
            str(folder[0]),
            "--out",
            str(out),
            "--split",
            "train",
            "--count",
            "12",
            "--frames",
            "5",
        ]
    )
    return out


def test_the_folder_is_what_training_reads_and_the_truth_is_what_was_done(written):
    read = load_pairs(written / "pairs.csv", ("SA",))
    with (written / "pairs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == synthesis.COLUMNS
    assert len(read) == len(rows) == 12
    for pair, row in zip(read, rows, strict=True):
        a, b = float(row["strength_A"]), float(row["strength_B"])
        assert (
            row["SA"]
            == row["truth"]
            == ("same" if not row["distortion"] else "A" if a < b else "B")
        )
        assert all(read_video(path).shape == (5, 64, 64, 3) for path in pair.videos)
    assert len({row["truth"] for row in rows}) == 3


def test_the_same_clips_give_the_same_bytes(folder, written, tmp_path):
    shutil.copytree(folder[0], tmp_path / "copy")
    synthesis.write_pairs(
        tmp_path / "again", "train", 3, clips=tmp_path / "copy", shape=Shape(frames=5)
    )
    for path in sorted((tmp_path / "again").glob("*-*")):
        assert path.read_bytes() == (written / path.name).read_bytes(), path.name


def test_frames_are_taken_by_time_and_cut_about_the_middle(tmp_path):
    grey = np.linspace(-1, 1, 24, dtype=np.float32)[:, None, None, None] * np.ones(
        (1, 32, 64, 3), np.float32
    )
    grey[:, :, :16] = grey[:, :, 48:] = 1.0  # what is cut away
    write_video(tmp_path / "grey.mp4", grey, 24, FINE)
    half = read_frames(tmp_path / "grey.mp4", 5, (16, 16), 12)
    assert half.shape == (5, 16, 16, 3)
    np.testing.assert_allclose(
        half[:, 4:12, 4:12].mean((1, 2, 3)), grey[:10:2, 0, 32, 0], atol=0.03
    )
    assert len(read_frames(tmp_path / "grey.mp4", 20, (16, 16), 12)) == 12


def broken(kind, source, rows):
    """What breaks a copy of the folder."""
    video, photos, prompt = rows[0]
    if kind == "csv":
        (source / "clips.csv").unlink()
    elif kind == "column":
        (source / "clips.csv").write_text("ref_paths,prompt\n")
    elif kind == "video":
        write_clips(source, [("none.mp4", photos, prompt)])
    elif kind == "photo":
        write_clips(source, [(video, ["none.png"], prompt)])
    elif kind == "twice":
        write_clips(source, [(video, [photos[0], photos[0]], prompt)])
    elif kind == "one cluster":
        split = next(
            split
            for split in video_clips.UPTO
            if any(clip.video.name == video for clip in video_clips.load_clips(source, split))
        )
        write_clips(source, [rows[0]])
        return ["--split", split]
    elif kind == "not a video":
        for name, *_ in rows:
            (source / name).write_text("text")
    elif kind == "nobody":
        for name, *_ in rows:
            write_video(source / name, np.zeros((9, 64, 64, 3), np.float32), 8)
    return []


@pytest.mark.parametrize(
    ("kind", "extra", "answer"),
    [
        ("csv", [], "no such file"),
        ("column", [], "needs one column path"),
        ("video", [], "line 2: .*none.mp4 is no file"),
        ("photo", [], "line 2: image .*none.png"),
        ("twice", [], "two of the people are the same"),
        ("one cluster", [], "one identity cluster"),
        ("not a video", [], "is no video"),
        ("nobody", [], "none remains"),
        ("", ["--frames", "0"], "1 or more"),
        ("", ["--size", "60", "64"], "multiples of 8"),
        ("", ["--split", "test"], "no such split"),
        ("", ["--clips", "nowhere"], "no such folder"),
        ("", ["--frames", "99"], "too short"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(folder, tmp_path, kind, extra, answer):
    source = tmp_path / "clips"
    shutil.copytree(folder[0], source)
    extra = extra + broken(kind, source, folder[1])
    usual = {"--clips": str(source), "--split": "train"}
    words = [word for name, value in usual.items() if name not in extra for word in (name, value)]
    with pytest.raises(UserError, match=answer):
        cli.run(["pairs", *words, "--out", str(tmp_path / "out"), "--count", "2", *extra])
    assert not (tmp_path / "out").exists()
