"""OpenS2V-Eval is read as its repository lays it out, and FaceSim is computed as defined there."""

import json

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import opens2v
from jax_idgrpo.evaluation.listing import list_named

ENTRIES = {
    "singleobj_1": ["Images/cup/1.jpg"],
    "singlehuman_1": ["Images/singlehuman/man/15.png"],
    "singleface_2": ["Images/singleface/crop_woman/1.png"],
    "humanobj_1": [
        "Images/humanobj/human/man/celebrity/1.jpg",
        "Images/humanobj/thing/animal/bird/1.jpg",
        "Images/humanobj/environment/park/1.jpg",
    ],
    "multiface_1": [
        "Images/multiface/crop_woman/1.jpg",
        "Images/multiface/crop_woman/2.jpg",
        "Images/multiface/scene/1.jpg",
    ],
    "multihuman_3": ["Images/multihuman/woman/3.jpg", "Images/multihuman/man/4.jpg"],
}


@pytest.fixture
def folder(tmp_path):
    entries = {
        name: {
            "img_paths": pictures,
            "prompt": f"prompt of {name}",
            "synthesis_flag": "wrong",
            "class_label": ["Man"],
        }
        for name, pictures in ENTRIES.items()
    }
    (tmp_path / opens2v.FILE).write_text(json.dumps(entries))
    for picture in {path for paths in ENTRIES.values() for path in paths}:
        (tmp_path / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / picture)
    return tmp_path


def test_people_are_found_and_objects_are_passed_over(folder):
    read = opens2v.load(folder, 4)
    photos = {
        name: [str(path.relative_to(folder)) for path in read.prompts[row].references]
        for name, row in read.rows.items()
    }
    assert photos == {
        "singlehuman_1": ENTRIES["singlehuman_1"],
        "singleface_2": ENTRIES["singleface_2"],
        "humanobj_1": ENTRIES["humanobj_1"][:1],
        "multiface_1": ENTRIES["multiface_1"][:2],
        "multihuman_3": ENTRIES["multihuman_3"],
    }
    assert read.prompts[read.rows["humanobj_1"]].text == "prompt of humanobj_1"
    assert opens2v.load(folder / opens2v.FILE, 4).rows == read.rows


def test_videos_are_found_by_their_ids(folder, tmp_path):
    read = opens2v.load(folder, 4)
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("multihuman_3.mp4", "singleobj_1.mp4", "humanobj_1.webm", "notes.txt"):
        (videos / name).touch()
    rows, passed_over = list_named(videos, read.rows, folder, read.prompts)
    assert [(file.name, prompt.text) for file, prompt in rows] == [
        ("humanobj_1.webm", "prompt of humanobj_1"),
        ("multihuman_3.mp4", "prompt of multihuman_3"),
    ]
    assert sorted(passed_over) == ["notes.txt", "singleobj_1.mp4"]
    for path in videos.iterdir():
        path.unlink()
    (videos / "0000-0.mp4").touch()
    with pytest.raises(
        UserError, match=r"none of its 1 videos is named as in .*singlehuman_1\.mp4"
    ):
        list_named(videos, read.rows, folder, read.prompts)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / opens2v.FILE).unlink(), "no such file; pass the folder"),
        (lambda folder: (folder / opens2v.FILE).write_text("{"), "is damaged"),
        (lambda folder: (folder / opens2v.FILE).write_text("[]"), "does not map video ids"),
        (lambda folder: (folder / opens2v.FILE).write_text('{"a_1": {}}'), "a_1: has no img_paths"),
        (
            lambda folder: (folder / opens2v.FILE).write_text(
                '{"a_1": {"img_paths": ["../man/1.jpg"], "prompt": "p"}}'
            ),
            "outside the folder",
        ),
        (lambda folder: (folder / ENTRIES["singlehuman_1"][0]).unlink(), "singlehuman_1: image"),
        (
            lambda folder: (folder / ENTRIES["singlehuman_1"][0]).write_bytes(b"x"),
            "singlehuman_1: image",
        ),
    ],
)
def test_a_folder_that_is_something_else_is_refused(folder, change, reason):
    change(folder)
    with pytest.raises(UserError, match=reason) as error:
        opens2v.load(folder, 4)
    assert "\n" not in str(error.value)


def test_more_people_than_the_configuration_allows(folder):
    with pytest.raises(UserError, match=r"multiface_1: shows 2 people, but data\.max_people is 1"):
        opens2v.load(folder, 1)


def original(frames):
    """FaceSim of a video frame by frame, each a list of (area, cosine)."""
    numbers = np.linspace(0, len(frames) - 1, 32, dtype=int)
    values = []
    for number in numbers:
        if frames[number]:
            value = max(0.0, max(frames[number])[1])
            if value != 0.0:
                values.append(value)
    return np.mean(values) if values else 0.0


@pytest.mark.parametrize("frames", [1, 20, 32, 81, 200])
def test_facesim_is_that_of_the_original(frames):
    """The largest face counts in 32 frames; frames without a face or likeness do not."""
    rng = np.random.default_rng(frames)
    mask = rng.random((frames, 3)) < 0.5
    sides = rng.uniform(4, 40, (frames, 3, 2))
    corners = rng.uniform(0, 100, (frames, 3, 2))
    cosine = np.where(mask, rng.uniform(-0.4, 0.9, (frames, 3)), 0.0)
    listed = [
        [(sides[t, k].prod(), cosine[t, k]) for k in np.flatnonzero(mask[t])] for t in range(frames)
    ]
    boxes = np.concatenate([corners, corners + sides], -1)
    assert opens2v.facesim(boxes, mask, cosine) == pytest.approx(original(listed))


def test_facesim_without_any_face_is_zero():
    assert opens2v.facesim(np.zeros((5, 2, 4)), np.zeros((5, 2), bool), np.zeros((5, 2))) == 0


def test_table_separates_one_person_from_several(folder):
    lines = [
        {
            "file": "singlehuman_1.mp4",
            "facesim_embedder": 0.5,
            "facesim_judge": 0.6,
            "identity": 0.9,
        },
        {"file": "humanobj_1.mp4", "facesim_embedder": 0.3, "facesim_judge": 0.2, "identity": 0.8},
        {"file": "singleface_2.mp4", "reward": None, "error": "damaged"},
        {"file": "multihuman_3.mp4", "identity": 0.4, "judge_identity": 0.2, "count": 1.0},
    ]
    header, *rows = opens2v.table(
        lines, opens2v.load(folder, 4), {"embedder": "sface", "judge": "arcface"}
    )
    assert header[2:5] == ["FaceSim (sface)", "FaceSim (arcface)", "identity (sface)"]
    table = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    assert table["singlehuman"]["FaceSim (sface)"] == "0.500"
    assert table["singlehuman"]["identity (sface)"] == "-", "identity is of several people"
    assert table["singleface"]["videos"] == "0 of 1"
    assert table["one person"]["videos"] == "2 of 3"
    assert table["one person"]["FaceSim (sface)"] == "0.400"
    assert table["several people"]["videos"] == "1 of 2"
    assert table["several people"]["identity (sface)"] == "0.400"
    assert table["several people"]["FaceSim (sface)"] == "-"
    text = opens2v.markdown([header, *rows]).splitlines()
    assert len({len(line) for line in text}) == 1
    assert set(text[1]) == {"|", "-"}
