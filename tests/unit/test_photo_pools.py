"""Several photos of a person: the column `more_paths`, and what the reward compares with."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.config import RewardConfig
from jax_idgrpo.data.prompts import load_prompts, row_digests
from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards.base import Photo, References
from jax_idgrpo.rewards.photo_copy import SIDE
from jax_idgrpo.rewards.photo_faces import PhotoEncoder, PhotoFace

WIDTH = 6


def picture(number):
    return Image.new("RGB", (32, 32), (number, 0, 0))


def write(folder, *rows):
    """Write a prompts CSV with photos named by their shade."""
    for number in range(10):
        picture(number).save(folder / f"{number}.png")
    lines = ["ref_paths,prompt,more_paths", *rows]
    (folder / "prompts.csv").write_text("\n".join(lines) + "\n")
    return folder / "prompts.csv"


def direction(number):
    """The embedding of a photo: photos 0 to 4 show one person, 5 to 9 another."""
    rng = np.random.default_rng(number)
    vector = np.eye(WIDTH)[number // 5] + 0.2 * rng.normal(size=WIDTH)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def look(image):
    number = image.getpixel((0, 0))[0]
    if number == 9:
        return None
    return PhotoFace(direction(number), np.zeros((SIDE, SIDE, 3), np.float32), 1)


def encoded(*rows, least=0.0):
    """Embeddings of rows of people; each person is a list of photos."""
    people = max(map(len, rows))
    photos = tuple(tuple(Photo(picture(person[0])) for person in row) for row in rows)
    more = tuple(
        tuple(tuple(Photo(picture(number)) for number in person[1:]) for person in row)
        for row in rows
    )
    found = PhotoEncoder(look, least)(References(photos, people, more), ["text"] * len(rows))
    return found.embeddings


def test_the_column_is_read_by_person(tmp_path):
    (first, second, third) = load_prompts(
        write(tmp_path, '0.png;5.png,"Two.",1.png|2.png;', "0.png,One.,", "5.png,One.,6.png"), 2
    )
    assert [[photo.name for photo in group] for group in first.more] == [["1.png", "2.png"], []]
    assert second.more == ()
    assert [photo.name for photo in third.more[0]] == ["6.png"]


def test_the_photos_of_a_pool_are_part_of_a_row(tmp_path):
    rows = ["0.png,One.,", "0.png,One.,1.png", "0.png,One.,2.png", "0.png,One.,1.png|2.png"]
    digests = row_digests(load_prompts(write(tmp_path, *rows), 1))
    assert len(set(digests)) == 4
    alone = load_prompts(write(tmp_path, "0.png,One.,"), 1)
    without = [dataclasses.replace(prompt, more=(), more_digests=()) for prompt in alone]
    assert row_digests(alone) == row_digests(without)


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (
            "1.png;2.png",
            "line 2: more_paths has photos of 2 people and ref_paths of 1; join photos",
        ),
        ("1.png|none.png", r"line 2: image .*none\.png: no such file"),
    ],
)
def test_a_column_that_does_not_fit_is_refused(tmp_path, field, reason):
    with pytest.raises(UserError, match=reason):
        load_prompts(write(tmp_path, f"0.png,One.,{field}"), 2)


def test_copies_of_one_photo_change_nothing():
    np.testing.assert_allclose(encoded([[0, 0, 0]]), encoded([[0]]), atol=1e-6)


def test_the_order_of_a_pool_does_not_matter_and_rows_are_independent():
    together = encoded([[0, 1, 2], [5]], [[3, 4], [6, 7, 8, 5]])
    np.testing.assert_allclose(encoded([[0, 2, 1]])[0, 0], together[0, 0], atol=1e-6)
    np.testing.assert_allclose(encoded([[6, 5, 8, 7]])[0, 0], together[1, 1], atol=1e-6)
    np.testing.assert_allclose(together[0, 1], direction(5))


def test_a_cosine_with_a_pool_is_the_mean_cosine_up_to_a_factor_of_the_person():
    faces = np.random.default_rng(3).normal(size=(50, WIDTH))
    mean = np.mean([faces @ direction(number) for number in (0, 1, 2, 3)], axis=0)
    ratio = faces @ encoded([[0, 1, 2, 3]])[0, 0] / mean
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert ratio[0] > 1


def test_another_person_in_a_pool_is_refused_by_name(tmp_path):
    prompts = load_prompts(write(tmp_path, "0.png,One.,1.png|7.png"), 1)
    references = References.of_prompts(prompts, 1)
    with pytest.raises(UserError, match=r"line 2: image .*7\.png: is unlike the other photos"):
        PhotoEncoder(look, 0.5)(references, ["One."])
    # Without pools the column is not looked at.
    found = PhotoEncoder(look)(references, ["One."]).embeddings
    np.testing.assert_array_equal(found[0, 0], direction(0))


def test_a_photo_without_a_face_is_refused_by_name(tmp_path):
    prompts = load_prompts(write(tmp_path, "5.png,One.,9.png"), 1)
    with pytest.raises(UserError, match=r"line 2: image .*9\.png: no face is found"):
        PhotoEncoder(look, 0.5)(References.of_prompts(prompts, 1), ["One."])


@pytest.mark.parametrize("other", [{"linear": "x"}, {"head": "x"}, {"custom": "a:b"}])
def test_rewards_that_know_one_photo_refuse_pools(other):
    with pytest.raises(UserError, match="reward.pool pool changes the formula over faces"):
        RewardConfig(pool="pool", **other)
