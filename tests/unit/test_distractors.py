"""`recognised_log` and `unrecognised`: people against the people of all prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import config as c
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import journal
from jax_idgrpo.rewards import distractors, factory
from jax_idgrpo.rewards.base import ReferenceFaces
from jax_idgrpo.rewards.identity import IdentityConfig, term_names
from jax_idgrpo.rewards.matching import match_videos
from tests.helpers import identity_cases

FRAMES, FACES, SIZE, EVERYBODY = 4, 3, 16, 12
SAME = 0.9


def everybody():
    """Orthogonal unit vectors, one per person of all prompts."""
    drawn = np.random.default_rng(0).normal(size=(SIZE, SIZE))
    return np.linalg.qr(drawn)[0][:EVERYBODY].astype(np.float32)


def unit(vectors):
    vectors = np.asarray(vectors)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def inputs(asked, faces, frames=FRAMES):
    """One video that shows the given faces in the first `frames` frames, in front of padding."""
    embeddings = np.zeros((1, FRAMES, FACES, SIZE), np.float32)
    mask = np.zeros((1, FRAMES, FACES), bool)
    embeddings[:, :frames, : len(faces)] = np.reshape(faces, (-1, SIZE))
    mask[:, :frames, : len(faces)] = True
    known = np.zeros((1, FACES, SIZE), np.float32)
    known[0, : len(asked)] = asked
    return embeddings, mask, known, np.arange(FACES)[None] < len(asked)


def terms(asked, faces, others=None, frames=FRAMES):
    embeddings, mask, known, people = map(jnp.asarray, inputs(asked, faces, frames))
    matches = match_videos(embeddings, mask, known, people, 0.15)
    others = everybody() if others is None else others
    found = distractors.recognition(embeddings, matches, known, people, others, SAME)
    return {name: float(value[0]) for name, value in found.items()}


def test_people_like_their_own_photos_alone_are_recognised():
    found = terms(everybody()[:2], everybody()[:2])
    assert found["recognised_log"] == pytest.approx(0, abs=1e-3)
    assert found["unrecognised"] == pytest.approx(0, abs=1e-3)


def test_average_faces_could_be_anybody():
    average = unit(everybody().sum(0))
    found = terms(everybody()[:2], [average, average])
    assert found["recognised_log"] == pytest.approx(-np.log(EVERYBODY), abs=1e-4)
    assert found["unrecognised"] == pytest.approx(1, abs=1e-4)


def test_likeness_to_a_person_of_another_prompt_costs_more_than_it_earns():
    person, stranger, neutral = everybody()[0], everybody()[5], np.eye(SIZE)[0]
    free = neutral - everybody().T @ (everybody() @ neutral)  # like nobody of the gallery
    like_nobody, like_the_stranger = (
        terms([person], [unit(0.6 * person + 0.8 * unit(other))])["recognised_log"]
        for other in (free, stranger)
    )
    assert like_the_stranger < -2 < -0.1 < like_nobody


def test_hiding_a_face_counts_as_a_face_of_anybody():
    assert terms(everybody()[:1], [])["unrecognised"] == pytest.approx(1)
    half = terms(everybody()[:1], everybody()[:1], frames=FRAMES // 2)
    assert half["unrecognised"] == pytest.approx(0.5, abs=1e-3)


def test_the_order_of_distractors_changes_nothing():
    faces = unit(everybody()[:2] + 0.7 * everybody()[5:7])
    shuffled = np.random.default_rng(1).permutation(everybody())
    assert terms(everybody()[:2], faces, shuffled) == pytest.approx(
        terms(everybody()[:2], faces), abs=1e-6
    )


def test_nobody_is_their_own_distractor():
    """Another photo of a person, above the cosine of one person, is no wrong answer."""
    again = unit(everybody()[:1] + 0.2 * everybody()[11:])
    assert (again @ everybody()[0]).item() > SAME
    face = unit(everybody()[:1] + 0.1 * everybody()[3:4])
    listed = np.concatenate([everybody(), again])
    assert terms(everybody()[:1], face, listed) == pytest.approx(
        terms(everybody()[:1], face), abs=1e-6
    )
    relative = unit(everybody()[:1] + everybody()[11:])
    listed = np.concatenate([everybody(), relative])
    assert terms(everybody()[:1], face, listed)["unrecognised"] > 1e-3


def test_people_of_the_prompt_count_even_if_they_are_not_among_the_distractors():
    faces = everybody()[[1, 0]]
    swapped = unit(0.5 * everybody()[:2] + faces)
    assert terms(everybody()[:2], swapped, everybody()[4:])["unrecognised"] < 0.1, (
        "faces are matched first"
    )
    alike = unit(everybody()[:2].sum(0))
    found = terms(everybody()[:2], [alike, alike], everybody()[4:])
    assert found["recognised_log"] == pytest.approx(-np.log(2), abs=0.01)


def test_padding_of_people_changes_nothing():
    faces = unit(everybody()[:2] + 0.7 * everybody()[5:7])
    embeddings, mask, known, people = map(jnp.asarray, inputs(everybody()[:2], faces))
    matches = match_videos(embeddings, mask, known[:, :2], people[:, :2], 0.15)
    found = distractors.recognition(
        embeddings, matches, known[:, :2], people[:, :2], everybody(), SAME
    )
    assert float(found["recognised_log"][0]) == pytest.approx(
        terms(everybody()[:2], faces)["recognised_log"], abs=1e-6
    )


def test_its_gradient_moves_a_face_from_the_stranger_to_its_own_photo():
    embeddings, mask, known, people = map(
        jnp.asarray, inputs(everybody()[:1], unit(everybody()[:1] + 0.9 * everybody()[5:6]))
    )
    matches = match_videos(embeddings, mask, known, people, 0.15)

    def loss(embeddings):
        found = distractors.recognition(embeddings, matches, known, people, everybody(), SAME)
        return found["unrecognised"][0]

    step = -jax.grad(loss)(embeddings)[0]
    assert np.isfinite(np.asarray(step)).all()
    assert float(step[0, 0] @ everybody()[0]) > 0 > float(step[0, 0] @ everybody()[5])
    empty = jax.grad(
        lambda e: distractors.recognition(
            e,
            match_videos(e, jnp.zeros_like(mask), known, people, 0.15),
            known,
            people,
            everybody(),
            SAME,
        )["unrecognised"][0]
    )(embeddings)
    np.testing.assert_array_equal(empty, 0)


class Listed:
    """A reward whose embedding of a photo is read from its name."""

    term_names = reported = ()
    motion_of_all_frames = False

    def frames_read(self, total):
        raise NotImplementedError

    def score(self, videos, encoded):
        raise NotImplementedError

    def encode_references(self, references, prompts, video=None):
        embeddings = np.zeros((*references.mask.shape, SIZE), np.float32)
        for n, row in enumerate(references.photos):
            for m, photo in enumerate(row):
                embeddings[n, m] = everybody()[int(photo.source.stem)]
        return ReferenceFaces(embeddings, np.zeros(0), references.mask)


def test_a_photo_of_several_prompts_is_one_distractor(tmp_path):
    files = [tmp_path / f"{n}.png" for n in range(3)]
    prompts = [Prompt(0, "a", (files[0], files[1])), Prompt(1, "b", (files[1],))]
    found = distractors.encode_distractors(Listed(), [*prompts, Prompt(2, "c", (files[2],))])
    assert sorted(map(tuple, found)) == sorted(map(tuple, everybody()[:3]))


def test_without_them_the_reward_has_the_terms_and_values_it_had():
    case = identity_cases.case()
    priced = IdentityConfig(penalties=(("unrecognised", 1.0),))
    plain, without = identity_cases.terms(case), identity_cases.terms(case, priced)
    assert "unrecognised" not in plain
    for name, value in plain.items():
        np.testing.assert_array_equal(value, without[name], err_msg=name)
    assert set(term_names(priced, contrasted=True)) - set(plain) == {
        "recognised_log",
        "unrecognised",
    }


def test_the_penalty_lowers_the_reward_by_its_weight():
    case = identity_cases.case() | {"distractors": everybody()}
    plain = identity_cases.terms(case)
    priced = identity_cases.terms(case, IdentityConfig(penalties=(("unrecognised", 0.5),)))
    np.testing.assert_allclose(
        priced["reward"], plain["reward"] - 0.5 * plain["unrecognised"], atol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"penalties": {"unrecognised": 0.0}}, False),
        ({"penalties": {"unrecognised": 0.5}}, True),
        ({"mixture": {"recognised_log": 0.5}}, True),
    ],
)
def test_distractors_are_read_only_if_a_term_needs_them(options, expected):
    chosen = c.RewardConfig(**options)
    assert chosen.contrasted is expected


def test_missing_prompts_are_one_line(tmp_path):
    config = c.Config(
        data=c.DataConfig(prompts=str(tmp_path / "nowhere.csv")),
        reward=c.RewardConfig(penalties={"unrecognised": 1.0}),
    )
    with pytest.raises(UserError, match="nowhere.csv: no such file"):
        factory.make_reward(config)


def test_scores_of_a_stopped_evaluation_hold_for_the_same_people_only(tmp_path):
    file = tmp_path / "prompts.csv"
    for n, colour in enumerate(("red", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{n}.png")

    def facts(photo, **options):
        file.write_text(f"ref_paths,prompt\n{photo},one person\n")
        data = c.DataConfig(prompts=str(file))
        return journal.reward_facts(c.Config(data=data, reward=c.RewardConfig(**options)))

    assert facts("0.png") == facts("1.png")
    priced = {"penalties": {"unrecognised": 1.0}}
    assert facts("0.png", **priced) == facts("0.png", **priced) != facts("1.png", **priced)
