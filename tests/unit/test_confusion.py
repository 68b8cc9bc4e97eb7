"""`confused`: nothing for faces like their own photo alone, 1 - 1 / M for average faces, and a gradient that separates people."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo import config as c
from jax_idgrpo.rewards import photo_copy
from jax_idgrpo.rewards.faces import Settings
from jax_idgrpo.rewards.factory import identity_constants
from jax_idgrpo.rewards.matching import confusion, cosines, match_videos

PEOPLE, FRAMES, FACES, SIZE = 3, 4, 5, 16


def references():
    """Orthogonal unit vectors, one per person."""
    drawn = np.random.default_rng(0).normal(size=(SIZE, SIZE))
    return np.linalg.qr(drawn)[0][:PEOPLE].astype(np.float32)


def shown(people, faces):
    """One video that shows the given faces in every frame, in front of padding."""
    embeddings = np.zeros((1, FRAMES, FACES, SIZE), np.float32)
    embeddings[:, :, : len(faces)] = np.reshape(faces, (-1, SIZE))
    mask = np.broadcast_to(np.arange(FACES) < len(faces), (1, FRAMES, FACES))
    padded = np.zeros((1, PEOPLE, SIZE), np.float32)
    padded[0, : len(people)] = people
    return embeddings, mask, padded, np.arange(PEOPLE)[None] < len(people)


def confused(people, faces, least=0.15):
    embeddings, mask, known, asked = map(jnp.asarray, shown(people, faces))
    matches = match_videos(embeddings, mask, known, asked, least)
    return float(confusion(cosines(embeddings, known), matches, asked)[0])


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_people_like_their_own_photos_alone_are_not_confused():
    assert confused(references(), references()) < 1e-3
    assert confused(references(), references()[[2, 0, 1]]) < 1e-3, "the order of faces decides"


def test_average_faces_count_as_if_people_were_guessed():
    average = unit(references().sum(0))
    assert confused(references(), [average] * PEOPLE) == pytest.approx(1 - 1 / PEOPLE, abs=1e-4)


def test_missing_people_count_as_average_faces():
    assert confused(references(), []) == pytest.approx(1 - 1 / PEOPLE)
    one = confused(references(), references()[:1])
    assert one == pytest.approx((1 - 1 / PEOPLE) * (PEOPLE - 1) / PEOPLE, abs=1e-3)


def test_one_person_is_never_confused():
    assert confused(references()[:1], unit(references().sum(0))[None]) == pytest.approx(0, abs=1e-6)


def test_padding_of_people_changes_nothing():
    faces = unit(references()[:2] + 0.4 * references()[1::-1])
    few = confused(references()[:2], faces)
    embeddings, mask, known, asked = (leaf for leaf in shown(references()[:2], faces))
    known, asked = jnp.asarray(known[:, :2]), jnp.asarray(asked[:, :2])
    matches = match_videos(embeddings, mask, known, asked, 0.15)
    assert float(confusion(cosines(embeddings, known), matches, asked)[0]) == pytest.approx(few)
    assert 0.001 < few < 0.5


def test_its_gradient_moves_a_face_from_the_other_person_to_its_own():
    people = jnp.asarray(references())
    faces = unit(np.asarray(people[:2]) + 0.9 * np.asarray(people[1::-1]))
    embeddings, mask, known, asked = map(jnp.asarray, shown(people[:2], faces))
    matches = match_videos(embeddings, mask, known, asked, 0.15)

    def loss(embeddings):
        return confusion(cosines(embeddings, known), matches, asked)[0]

    step = -jax.grad(loss)(embeddings)[0, 0]
    own = [float(step[i] @ people[i]) for i in range(2)]
    other = [float(step[i] @ people[1 - i]) for i in range(2)]
    assert min(own) > 0 > max(other)
    assert np.isfinite(np.asarray(step)).all()


def test_its_weight_is_a_penalty_like_the_others():
    chosen = c.RewardConfig(penalties={"confused": 0.5})
    constants = identity_constants(chosen, Settings(), photo_copy.DRAWN)
    assert dict(constants.penalties)["confused"] == 0.5
    assert "confused" not in c.RewardConfig().penalty_weights()
