"""`recognised` and `identities` as functions of who was asked for and who people are taken for."""

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.config import Config, EvaluateConfig, ModelConfig, RewardConfig
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.evaluation import recognition
from jax_idgrpo.evaluation.recognition import NOBODY, Gallery, summarised
from jax_idgrpo.rewards.base import ReferenceFaces
from jax_idgrpo.rewards.recognition import PeopleShown


def columns(asked, taken):
    return {
        f"{name}_{m}": np.asarray(people, float)[:, m]
        for name, people in (("asked", asked), ("taken", taken))
        for m in range(np.shape(people)[1])
    }


ASKED = [[0, 1, NOBODY], [2, NOBODY, NOBODY], [3, 4, 5], [0, 1, NOBODY]]
"""Four videos, the first and the last of one prompt, of six references."""


def means(taken):
    found = summarised(columns(ASKED, taken))
    return found["recognised"].mean(), found["identities"].mean()


def test_everybody_in_their_place_counts_one_in_every_video():
    found = summarised(columns(ASKED, ASKED))
    np.testing.assert_allclose(found["recognised"], 1)
    np.testing.assert_allclose(found["identities"], 1, atol=1e-12)


def test_one_face_for_everybody_is_one_identity_of_all():
    taken = [[4 if one != NOBODY else NOBODY for one in row] for row in ASKED]
    recognised, identities = means(taken)
    assert recognised == pytest.approx(1 / 3 / 4)
    assert identities == pytest.approx(1 / 6)


def test_nobody_found_is_wrong_and_no_identity():
    assert means(np.full((4, 3), NOBODY)) == (0, 0)


def test_people_in_one_another_s_place_are_other_people_but_all_there():
    taken = [[1, 0, NOBODY], [3, NOBODY, NOBODY], [4, 5, 2], [1, 0, NOBODY]]
    recognised, identities = means(taken)
    assert recognised == 0
    assert identities == pytest.approx(1)


def test_the_mean_over_videos_is_the_number_of_references_found():
    rng = np.random.default_rng(0)
    asked = rng.integers(0, 40, (50, 3))
    taken = np.where(rng.random((50, 3)) < 0.2, NOBODY, rng.integers(0, 40, (50, 3)))
    found = summarised(columns(asked, taken))["identities"]
    expected = len(set(taken[taken != NOBODY])) / len(set(asked.ravel()))
    assert found.mean() == pytest.approx(expected)


def test_scores_without_a_judge_stay_as_they_are():
    scores = {"reward": np.arange(3.0)}
    assert summarised(scores) == scores
    assert recognition.references_asked(scores) == 0


SAME = 0.9
ALIKE = np.array([-1.0, 0.5, 0.6])
"""Most alike faces of a frame: of one face, at the threshold, and above it."""


class Lookup:
    """A judge whose embedding of a photo is the colour of its first pixel."""

    term_names = reported = ()
    motion_of_all_frames = False

    def frames_read(self, total):
        raise NotImplementedError

    def score(self, videos, encoded):
        raise NotImplementedError

    def encode_references(self, references, prompts, video=None):
        embeddings = np.zeros((*references.mask.shape, 3), np.float32)
        for n, row in enumerate(references.photos):
            for m, photo in enumerate(row):
                colour = np.asarray(photo.open(), np.float32)[0, 0]
                embeddings[n, m] = colour / np.linalg.norm(colour)
        return ReferenceFaces(
            embeddings, np.zeros((*references.mask.shape, 1, 1, 3)), references.mask
        )


@pytest.fixture
def gallery(tmp_path):
    """Three people in four files: the first person's photo is there under two names."""
    colours = {"a": "red", "b": "lime", "again": "red", "c": "blue"}
    files = {name: tmp_path / f"{name}.png" for name in colours}
    for name, colour in colours.items():
        Image.new("RGB", (32, 32), colour).save(files[name])
    prompts = [
        Prompt(0, "two", (files["a"], files["b"])),
        Prompt(1, "one", (files["again"],)),
        Prompt(2, "two", (files["c"], files["a"])),
    ]
    return Gallery.make(Lookup(), prompts, 2, SAME, 0.5), prompts


def test_a_photo_in_several_rows_is_one_reference(gallery):
    gallery, prompts = gallery
    assert len(gallery.embeddings) == 3
    first, second, third = (gallery.of_prompt[prompt.id] for prompt in prompts)
    assert first[0] == second[0] == third[1]
    assert len({*first, third[0]}) == 3


def test_people_are_taken_for_the_reference_most_alike_to_their_mean_face(gallery):
    gallery, prompts = gallery
    red, green, blue = np.eye(3)
    total = np.array([[9 * red + green, green - blue], [blue, 0 * red], [0 * red, red + green / 2]])
    frames = np.array([[9, 2], [1, 0], [0, 3]])
    found = gallery.columns(prompts, PeopleShown(total, frames, ALIKE))
    a, b = gallery.of_prompt[0]
    c = gallery.of_prompt[2][0]
    assert [found[f"asked_{m}"].tolist() for m in range(2)] == [[a, a, c], [b, NOBODY, a]]
    assert [found[f"taken_{m}"].tolist() for m in range(2)] == [[a, c, NOBODY], [b, NOBODY, a]]
    np.testing.assert_allclose(summarised(found)["recognised"], [1, 0, 0.5])
    np.testing.assert_array_equal(summarised(found)["unique"], [1, 1, 0])


def test_another_photo_of_the_same_person_is_no_mistake(tmp_path):
    colours = {"a": (250, 0, 0), "again": (250, 60, 0), "relative": (250, 180, 0)}
    files = {name: tmp_path / f"{name}.png" for name in colours}
    for name, colour in colours.items():
        Image.new("RGB", (32, 32), colour).save(files[name])
    prompts = [Prompt(n, name, (file,)) for n, (name, file) in enumerate(files.items())]
    gallery = Gallery.make(Lookup(), prompts, 1, SAME, 0.5)
    assert len(gallery.embeddings) == 3
    total = gallery.embeddings[[gallery.of_prompt[n][0] for n in (1, 0, 0)]][:, None]
    found = summarised(gallery.columns(prompts, PeopleShown(total, np.ones((3, 1)), ALIKE)))
    np.testing.assert_array_equal(found["recognised"], [1, 1, 0])
    assert found["identities"].mean() == pytest.approx(2 / 3), "the relative is shown by nobody"


def test_photos_and_their_order_decide_whether_scores_of_a_stopped_run_hold(tmp_path):
    for n in range(2):
        Image.new("RGB", (32, 32), (n, 0, 0)).save(tmp_path / f"{n}.png")
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    one, other = Prompt(0, "a", (files[0],)), Prompt(1, "b", (files[1],))
    facts = recognition.gallery_facts(Config(), [one, other])
    assert facts == recognition.gallery_facts(Config(), [Prompt(0, "new text", (files[0],)), other])
    assert facts != recognition.gallery_facts(Config(), [one])
    other_bound = Config(evaluate=EvaluateConfig(same=0.6))
    assert facts != recognition.gallery_facts(other_bound, [one, other])
    Image.new("RGB", (32, 32), "white").save(files[1])
    assert facts != recognition.gallery_facts(Config(), [one, other])


def test_without_a_judge_other_prompts_leave_scores_as_they_are(tmp_path):
    absent = Prompt(0, "a", (tmp_path / "absent.png",))
    config = Config(
        model=ModelConfig(path=str(tmp_path)), reward=RewardConfig(custom="a:b", faces="")
    )
    assert recognition.gallery_facts(config, [absent]) == ""
