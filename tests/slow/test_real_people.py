"""The networks for photographs on real people: who is told apart, and what the terms of the reward react to.

The material is that of `benchmarks.photographs`. Tests are skipped where it cannot be downloaded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import photographs as measured
from benchmarks import real_people
from jax_idgrpo.config import RewardConfig
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import Photo, References
from tests.helpers import packages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    packages.all_packages()
    return measured.write_networks(tmp_path_factory.mktemp("networks") / "faces")


@pytest.fixture(scope="module")
def networks(folder):
    return measured.Networks(folder)


@pytest.fixture(scope="module")
def reward(folder):
    return factory.make_face_reward(RewardConfig(faces=str(folder), frames=5))


def score(reward, video, photos):
    """The reward's terms of one video, which is uint8."""
    people = measured.encode(reward, photos)
    terms = reward.score(jnp.asarray(real_people.pixels(video))[None], people)
    return {name: float(value[0]) for name, value in jax.device_get(terms).items()}


@pytest.fixture(scope="module")
def honest(reward):
    """Terms of a clip of two people."""
    return score(reward, np.concatenate(measured.halves(5), 2), measured.reference_photos())


def test_photographs_of_one_person_are_closer_than_those_of_strangers(networks):
    embeddings, people = measured.embed_photographs(networks)
    assert sum(name.startswith("group") for name in people) == 5
    same, strangers = measured.split_pairs(embeddings["embedder"], people)
    assert same.min() > 0.5 > strangers.max()
    assert np.quantile(strangers, 0.99) < 0.35
    assert measured.area_under_curve(same, strangers) > 0.999
    same, others = measured.split_pairs(embeddings["judge"], people)
    assert measured.area_under_curve(same, others) > 0.99
    assert abs(np.corrcoef(strangers, others)[0, 1]) < 0.4  # of what the two take for alike


@pytest.mark.parametrize(("height", "least"), [(24, 0.98), (48, 0.999)])
def test_small_faces_are_found_and_told_apart(networks, height, least):
    found, sought, cosines = measured.small_faces(networks, height)
    assert found == sought == 8
    assert measured.area_under_curve(*cosines["embedder"]) >= least


def test_two_people_of_a_clip_are_matched_also_after_they_are_exchanged(folder):
    left, right = measured.halves(5)
    together, exchanged = np.concatenate([left, right], 2), np.concatenate([right, left], 2)
    video = np.concatenate([together[:3], exchanged[3:]])
    count, cosines = measured.similarities(folder, video, measured.reference_photos())
    np.testing.assert_array_equal(count, 2)
    own, other = cosines[:, [0, 1], [0, 1]], cosines[:, [0, 1], [1, 0]]
    assert own[:3].min() > 0.3
    assert other[:3].max() < 0.3
    assert other[3:].min() > 0.3
    assert own[3:].max() < 0.3


def test_an_exchange_is_seen_by_the_tracks_and_by_no_similarity(reward, honest):
    left, right = measured.halves(5)
    together, exchanged = np.concatenate([left, right], 2), np.concatenate([right, left], 2)
    video = np.concatenate([together[:3], exchanged[3:]])
    swapped = score(reward, video, measured.reference_photos())
    assert swapped["similarity"] > 0.4
    assert swapped["missing"] == honest["missing"] == 0
    assert honest["swapped"] == honest["switched"] == 0
    assert max(swapped["swapped"], swapped["switched"]) > 0.2


def test_a_face_that_is_absent_for_a_time_is_missing(reward, honest):
    left, _ = measured.halves(5)
    entering = real_people.clip(real_people.ENTERING, 5, measured.SIZE, 0.4, (0.0, 0.9))
    absent = score(reward, np.concatenate([left, entering], 2), measured.reference_photos())
    assert 0.2 < absent["missing"] < 0.5
    assert absent["reward"] < honest["reward"] - 0.15


def copied(reward, frames, photo):
    """The term of a video of one person."""
    people = reward.encode_references(References(((Photo(Image.fromarray(photo)),),), 1), [""])
    return float(
        reward.score(jnp.asarray(real_people.pixels(np.stack(frames)))[None], people)["copied"][0]
    )


@pytest.mark.parametrize("who", ["obama", "macron", "ardern"])
def test_another_photo_of_the_person_is_no_copy_and_the_photo_itself_is(reward, who):
    photos = [real_people.photo(*place) for place in real_people.PORTRAITS[who]]

    def frame(photo):
        shown = np.zeros((320, 320, 3), np.uint8)
        small = Image.fromarray(photo)
        small.thumbnail((320, 320))
        shown[: small.height, : small.width] = np.asarray(small)
        return shown

    for n, photo in enumerate(photos):
        for m, other in enumerate(photos):
            found = copied(reward, [frame(other)], photo)
            assert found > 0.9 if n == m else found == 0


def test_a_pasted_photo_is_a_copy_and_an_honest_clip_is_not(reward, networks):
    """The frames of the man end before he smiles as in his photo."""
    photos, parts = measured.reference_photos(), measured.halves(5, ((0.0, 0.45), (0.0, 0.2)))
    honest = score(reward, np.concatenate(parts, 2), photos)
    video = [
        measured.paste_aligned(networks, part, photo)
        for part, photo in zip(parts, photos, strict=True)
    ]
    pasted = score(reward, np.concatenate(video, 2), photos)
    assert honest["copied"] == 0
    assert pasted["copied"] > 0.5
    assert pasted["reward"] < honest["reward"]
