"""Pairs of drawn people: the same for the same seed, labelled by what was done, read by the reader, and refused in one line."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from jax_idgrpo import cli
from jax_idgrpo.config import RewardConfig
from jax_idgrpo.data.video import read_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences import synthesis
from jax_idgrpo.preferences.clip_pairs import Shape, from_synthetic
from jax_idgrpo.preferences.corruptions import DISTRACTOR, swap
from jax_idgrpo.preferences.csv_source import LABELS, load_pairs
from jax_idgrpo.rewards.base import References
from jax_idgrpo.rewards.factory import make_face_reward
from jax_idgrpo.synthetic.people import FRAMES_PER_SECOND


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "made"
    synthesis.write_pairs(folder, "train", 24, seed=3, automatic=0.5, careless=1.0)
    with (folder / "pairs.csv").open(newline="") as file:
        return folder, list(csv.DictReader(file))


def test_the_lesser_fault_wins_and_no_fault_is_a_tie(written):
    _, rows = written
    for row in rows:
        a, b = float(row["strength_A"]), float(row["strength_B"])
        assert row["truth"] == ("same" if not row["distortion"] else "A" if a < b else "B")
        least, gap = synthesis.STRENGTHS[row["distortion"]] if row["distortion"] else (0, 0)
        assert max(a, b) >= least and abs(a - b) >= gap - 1e-3 if row["distortion"] else a == b == 0
        assert row["SA"] == row["truth"] or row["source"] == "automatic"
    assert {row["source"] for row in rows} == {"trusted", "automatic"}
    assert any(row["SA"] != row["truth"] for row in rows)
    assert {row["truth"] for row in rows} == {"A", "B", "same"}


def test_the_folder_is_what_training_reads(written):
    folder, rows = written
    read = load_pairs(folder / "pairs.csv", ("SA",))
    assert [pair.labels[0] for pair in read] == [LABELS[row["SA"]] for row in rows]
    a, b = (read_video(path) for path in read[0].videos)
    assert a.shape == b.shape == (9, 64, 64, 3)
    assert np.abs(a - b).mean() > 0.01
    assert read[0].fps == (FRAMES_PER_SECOND,) * 2


def test_both_videos_are_takes_of_one_prompt():
    for _, clip_pair in zip(range(4), from_synthetic(2, "eval"), strict=False):
        one, other = clip_pair.clips
        assert np.array_equal(one.photos, other.photos)
        assert np.array_equal(one.mask, other.mask)
        people = one.people
        assert len(clip_pair.photos) == len(people)
        assert clip_pair.prompt.count("person with") == len(people)
        assert np.abs(one.video - other.video).mean() > 0.02
        assert (
            np.abs(one.boxes - other.boxes)[:, people].max() > 1
        )  # pixels: poses, sizes and motion differ
        order = [np.argsort(clip.boxes[0, people, 0]).tolist() for clip in (one, other)]
        assert order[0] == order[1]  # who stands where does not


def test_drawn_people_can_have_any_face_above_their_own_clothes():
    """Drawn, not pasted: an exchange leaves no seam for a cosine to go by, so that only who stands where tells of it."""
    clips = list(
        itertools.islice(
            (
                clip_pair.clips[0]
                for clip_pair in from_synthetic(7, "eval")
                if len(clip_pair.photos) == 2
            ),
            6,
        )
    )
    reward = make_face_reward(RewardConfig(frames=9))
    photos = References.of_pixels(
        *(np.stack([getattr(clip, name) for clip in clips]) for name in ("photos", "mask"))
    )
    people = reward.encode_references(photos, [""] * len(clips))

    def terms(videos):
        found = reward.score(np.stack(videos), people)
        return (np.asarray(found[name]) for name in ("similarity", "similarity_min", "swapped"))

    exchanged = [
        clip.swap_faces(dict(zip(clip.people, clip.people[::-1], strict=True))) for clip in clips
    ]
    strange = [clip.swap_faces({clip.people[1]: DISTRACTOR}) for clip in clips]
    (
        (alike, worst, _),
        (_, exchanged_worst, throughout),
        (_, strange_worst, _),
        (late, _, swapped),
    ) = map(
        terms, ([clip.video for clip in clips], exchanged, strange, [swap(clip) for clip in clips])
    )
    assert min(worst.min(), exchanged_worst.min()) > 0.4 > 0.3 > strange_worst.max()
    assert abs((late - alike).mean()) < 0.03
    assert not throughout.any()
    assert swapped.min() > 0.3
    for clip in clips:
        np.testing.assert_allclose(clip.swap_faces({}), clip.video, atol=1e-5)
    change = np.abs(np.stack(exchanged) - [clip.video for clip in clips]).mean(
        (0, 1, 3, 4)
    )  # by rows: heads are above, clothes below
    assert change[-4:].max() < 0.3 * change.max()


def test_a_pair_depends_on_the_seed_and_its_number_alone(written, tmp_path):
    folder, _ = written
    synthesis.write_pairs(tmp_path / "few", "train", 4, seed=3, automatic=0.5, careless=1.0)
    for path in sorted((tmp_path / "few").glob("*-*")):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    synthesis.write_pairs(tmp_path / "other", "train", 2, seed=4)
    assert (tmp_path / "other" / "00000-A.mp4").read_bytes() != (
        folder / "00000-A.mp4"
    ).read_bytes()


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (dict(split="test"), "no such split"),
        (dict(distortions="swap,melt"), "no 'melt'"),
        (dict(count=0), "1 or more"),
        (dict(automatic=2.0), "0 to 1"),
        (dict(shape=Shape(fps=16)), "--clips"),
        (dict(faces=Path("networks")), "--clips"),
    ],
)
def test_mistakes_are_refused_and_leave_nothing(tmp_path, change, answer):
    with pytest.raises(UserError, match=answer):
        synthesis.write_pairs(**dict(out=tmp_path / "out", split="train", count=1) | change)
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        cli.run(["pairs", "--out", str(tmp_path / "there"), "--split", "train", "--count", "1"])
