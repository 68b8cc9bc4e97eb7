"""What a report says about a person follows from the faces of the frames alone."""

import dataclasses

import numpy as np
import pytest

from jax_idgrpo.evaluation import sightings
from jax_idgrpo.evaluation.sightings import STATES, Sightings
from jax_idgrpo.rewards.base import ReferenceFaces
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.identity import IdentityConfig

NONE = 3  # index of no face, of three


def sighted(cosine, face, track, of_person, mask=None) -> Sightings:
    """Faces of frames; the judge sees what the embedder sees."""
    cosine, face = np.asarray(cosine, np.float32), np.asarray(face)
    mask = np.ones((len(cosine), cosine.shape[2]), bool) if mask is None else np.asarray(mask)
    return Sightings(
        boxes=np.zeros((*mask.shape, 4), np.float32),
        mask=mask,
        cosine=cosine,
        face=face,
        track=np.where(mask, np.asarray(track), 2 * mask.shape[1]),
        of_person=np.asarray(of_person),
        judge_cosine=cosine,
        judge_face=face,
    )


def two_people(frames=4, **changed) -> Sightings:
    """Two people who are clearly themselves, on the tracks 4 and 2, and a stranger on track 0."""
    given = {
        "cosine": [[[0.8, 0.1, 0.0], [0.1, 0.7, 0.0]]] * frames,
        "face": [[0, 1]] * frames,
        "track": [[4, 2, 0]] * frames,
        "of_person": [4, 2],
    }
    return sighted(**(given | changed))


def named(found):
    return [[STATES[value] for value in row] for row in sightings.states(found)]


def test_people_who_are_themselves_are_matched():
    assert named(two_people(2)) == [["matched", "matched"]] * 2


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"face": [[0, NONE]]}, ["matched", "missing"]),
        # Another face of the frame is nearly as similar to the first person.
        ({"cosine": [[[0.8, 0.1, 0.75], [0.1, 0.7, 0.0]]]}, ["ambiguous", "matched"]),
        # The second person's face is nearly as similar to the first person's photo.
        ({"cosine": [[[0.8, 0.65, 0.0], [0.1, 0.7, 0.0]]]}, ["matched", "ambiguous"]),
        # The faces have exchanged their places.
        ({"track": [[2, 4, 0]]}, ["ambiguous", "ambiguous"]),
        # A place without a face is no rival, whatever is stored there.
        (
            {
                "cosine": [[[0.8, 0.1, 0.79], [0.1, 0.7, 0.0]]],
                "mask": [[True, True, False]],
            },
            ["matched", "matched"],
        ),
    ],
)
def test_a_match_is_ambiguous_when_something_comes_near(changed, expected):
    assert named(two_people(1, **changed)) == [expected]


def test_summary_of_a_person_who_is_absent_for_a_while():
    face = [[0, 1], [0, NONE], [0, NONE], [0, 1], [0, 1]]
    cosine = np.repeat([[[0.8, 0.1, 0.0], [0.1, 0.7, 0.0]]], 5, axis=0)
    cosine[4, 1, 1] = 0.5
    first, second = sightings.people_rows(two_people(5, face=face, cosine=cosine))
    assert first["found"] == 1
    assert first["frames_found"] == "0-4"
    assert second["found"] == pytest.approx(0.6)
    assert second["frames_found"] == "0;3-4"
    assert second["similarity_mean"] == pytest.approx((0.7 + 0.7 + 0.5) / 5)
    assert second["similarity_min"] == pytest.approx(0.5)
    assert second["similarity_max"] == pytest.approx(0.7)
    assert (first["track"], second["track"]) == (1, 2), "tracks are not counted by appearance"
    assert second["track_share"] == pytest.approx(0.6)
    assert second["track_changes"] == 0


def test_summary_of_a_person_who_never_appears():
    found = two_people(3, face=[[0, NONE]] * 3, of_person=[4, 6])
    absent = sightings.people_rows(found)[1]
    assert absent["found"] == absent["similarity_mean"] == absent["judge_mean"] == 0
    assert absent["similarity_min"] is absent["track"] is None
    assert absent["frames_found"] == ""


def test_a_person_who_changes_tracks():
    found = two_people(4, track=[[4, 2, 0], [4, 2, 0], [1, 2, 0], [1, 2, 0]])
    row = sightings.people_rows(found)[0]
    assert (row["track"], row["track_share"], row["track_changes"]) == (1, 0.5, 1)


def test_runs():
    assert sightings.runs(np.array([1, 1, 0, 2])) == [(1, 0, 1), (0, 2, 2), (2, 3, 3)]
    assert sightings.runs(np.array([], int)) == []


def test_length_of_a_video_does_not_change_what_is_seen_in_its_frames(monkeypatch):
    """Empty frames are appended so that few programs are compiled; they must not show."""
    rng = np.random.default_rng(0)
    frames, faces, people = 5, 3, 2
    mask = rng.random((frames, faces)) < 0.7
    vectors = rng.normal(size=(2, frames, faces, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    references = ReferenceFaces(
        embeddings=vectors[0, 0][None, :people],
        crops=np.zeros((1, people, 2, 2, 3), np.float32),
        mask=np.ones((1, people), bool),
    )
    corners = rng.uniform(0, 40, (frames, faces, 2)).astype(np.float32)
    seen = (np.concatenate([corners, corners + 20], -1), mask, *(vectors * mask[..., None]))
    found = []
    for room in (1, 8):
        monkeypatch.setattr(sightings, "FRAMES", room)
        reward = object.__new__(FaceReward)  # no network is called
        reward.config = IdentityConfig()
        follower = sightings.Follower(reward, IdentityConfig(), references, references)
        follower._seen = [tuple(leaf[:2] for leaf in seen), tuple(leaf[2:] for leaf in seen)]
        found.append(follower.sightings())
    for field in dataclasses.fields(Sightings):
        first, second = (getattr(one, field.name) for one in found)
        assert len(first) in (frames, people)
        np.testing.assert_allclose(first, second, atol=1e-6, err_msg=field.name)
