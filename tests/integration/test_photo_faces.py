"""Reference photos: looked at once, at their own size, by few programs; whoever shows no face is named before a run begins."""

import functools
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import config as c
from jax_idgrpo.data.prompts import load_prompts, prompt_batch
from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards import factory, photo_faces
from jax_idgrpo.rewards.base import Photo, References, check_references
from jax_idgrpo.synthetic import scenes
from jax_idgrpo.training import train
from tests.helpers.decodes import count_decodes
from tests.helpers.tiny_run import tiny


@functools.cache
def reward():
    return factory.make_face_reward(c.RewardConfig())


@functools.cache
def portraits():
    """Photos of eight drawn people."""
    drawn = scenes.batch(5, 0, 8, "eval")
    pixels = np.asarray(drawn.portraits)[:, 0]
    return [Image.fromarray(np.round((picture + 1) * 127.5).astype(np.uint8)) for picture in pixels]


def enlarged(image, factor):
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def embeddings(*images):
    references = References(tuple((Photo(image),) for image in images), 1)
    return np.asarray(reward().encode_references(references, [""] * len(images)).embeddings[:, 0])


def test_a_large_photo_says_of_a_face_what_a_small_one_says():
    small = embeddings(*portraits()[:4])
    large = embeddings(*(enlarged(image, 8) for image in portraits()[:4]))
    assert (np.sum(small * large, -1) > 0.99).all()
    assert np.sum(small[0] * small[1]) < 0.9


def test_the_crop_of_a_large_photo_is_that_of_a_small_one():
    one, other = (
        reward().encode_references(References(((Photo(image),),), 1), [""]).crops[0, 0]
        for image in (portraits()[0], enlarged(portraits()[0], 8))
    )
    assert np.abs(one - other).mean() < 0.02 < np.abs(one).mean()


@pytest.mark.parametrize("person", [0, 2, 3])
def test_a_face_that_fills_a_fifth_of_a_large_photo_is_looked_at_in_its_own_pixels(person):
    """Shrunk to a video of 64 pixels it would have 13 pixels."""
    whole = Image.new("RGB", (768, 768), "grey")
    whole.paste(enlarged(portraits()[person], 4), (256, 128))
    assert np.sum(embeddings(whole) * embeddings(portraits()[person])) > 0.95


def test_a_photo_is_never_enlarged_and_its_own_pixels_are_looked_at():
    image = portraits()[0]
    level, *others = photo_faces.levels(image, pyramid=True)
    assert not others
    np.testing.assert_array_equal(level.pixels, np.asarray(image))
    np.testing.assert_array_equal(photo_faces.padded(level.pixels), np.asarray(image))


@pytest.mark.parametrize(
    "size",
    [(1, 1), (64, 64), (65, 64), (3000, 1000), (1000, 3000), (500, 640), (4000, 16), (1024, 2048)],
)
def test_photos_of_any_size_come_to_few_sizes(size):
    sides = {
        side
        for short in photo_faces.SIDES
        for ratio in photo_faces.RATIOS
        for side in (short, round(short * ratio))
    }
    for level in photo_faces.levels(Image.new("RGB", size), pyramid=True):
        padded = photo_faces.padded(level.pixels)
        assert set(padded.shape[:2]) <= sides
        np.testing.assert_array_equal(
            padded[: level.pixels.shape[0], : level.pixels.shape[1]], level.pixels
        )
        points = np.array([[0.0, 0.0], [size[0] - 1, size[1] - 1]])
        np.testing.assert_allclose(level.photo(level.place(points)), points, atol=1e-3)


def test_one_program_serves_any_number_of_new_photos():
    fresh = factory.make_face_reward(c.RewardConfig())
    pictures = [
        image.transpose(turn)
        for image in portraits()
        for turn in (Image.Transpose.FLIP_LEFT_RIGHT,)
    ]
    pictures += portraits()
    for count in (3, 5, 7):
        new, pictures = pictures[:count], pictures[count:]
        fresh.encode_references(References((tuple(map(Photo, new)),), 7), [""])
    assert fresh.find._cache_size() == fresh.embed._cache_size() == 1


def test_a_photo_is_looked_at_once():
    fresh, looked = factory.make_face_reward(c.RewardConfig()), []
    encoder = photo_faces.PhotoEncoder(
        lambda image: looked.append(image) or fresh._photo_face(image)
    )
    one, other = (Photo(image) for image in portraits()[:2])
    first = encoder(References(((one, other), (one,)), 3), ["", ""])
    again = encoder(References(((one, other), (one,)), 3), ["", ""])
    assert len(looked) == 2
    assert first.mask.tolist() == [[True, True, False], [True, False, False]]
    jax.tree.map(np.testing.assert_array_equal, first, again)
    np.testing.assert_array_equal(first.embeddings[0, 0], first.embeddings[1, 0])
    assert not first.embeddings[:, 2].any()
    assert not first.crops[1, 1].any()


def test_of_several_faces_the_largest_is_taken_with_a_warning(tmp_path):
    both = Image.new("RGB", (192, 128), "grey")
    both.paste(enlarged(portraits()[2], 2), (0, 0))
    both.paste(portraits()[3], (128, 32))
    both.save(tmp_path / "both.png")
    with pytest.warns(
        UserWarning,
        match=r"^my.csv, line 7: image .*both.png: shows 2 faces; the largest is taken$",
    ):
        found = reward().encode_references(
            References(((Photo(tmp_path / "both.png", "my.csv, line 7"),),), 1), [""]
        )
    alone = embeddings(*portraits()[2:4])
    likeness = alone @ np.asarray(found.embeddings[0, 0])
    assert likeness[0] > 0.95 > likeness[1]


def test_the_surer_of_two_boxes_of_one_face_stays():
    boxes = np.array([[0, 0, 10, 10], [20, 0, 50, 30], [22, 2, 30, 10], [1, 1, 11, 11]], np.float32)
    assert photo_faces.largest(boxes, np.array([0.9, 0.5, 0.4, 0.8])) == [1, 0]


def write_prompts(folder, *photos):
    """A CSV with a row for each photo; None is a photo without a face."""
    for n, photo in enumerate(photos):
        (photo or Image.new("RGB", (64, 64), "grey")).save(folder / f"{n}.png")
    text = "".join(f"{n}.png,A person smiles.\n" for n in range(len(photos)))
    (folder / "my.csv").write_text(f"ref_paths,prompt\n{text}")
    return folder / "my.csv"


def test_all_photos_without_a_face_are_named_at_once(tmp_path):
    prompts = load_prompts(write_prompts(tmp_path, None, portraits()[0], *[None] * 6), 1)
    with pytest.raises(UserError) as caught:
        check_references(reward(), prompts)
    message = str(caught.value)
    assert message.startswith(
        f"7 of 8 reference photos cannot be used: prompts {tmp_path}/my.csv, line 2: image {tmp_path}/0.png: no face"
    )
    assert "line 4" in message
    assert message.endswith("and 2 more; use a photo that shows one face, large and clear")
    assert "\n" not in message
    with pytest.raises(
        UserError, match=r"^prompts .*my.csv, line 2: image .*0.png: no face is found; use"
    ):
        check_references(reward(), prompts[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_references(reward(), prompts[1:2])


def test_a_run_with_a_photo_without_a_face_is_refused_before_its_first_step(tmp_path):
    path = write_prompts(tmp_path, *portraits()[:2], None, portraits()[2])
    config = tiny(2)
    prompts = load_prompts(path, 1)
    order = [
        index for step in range(2) for index in prompt_batch(prompts, config.run.seed, step, 2)
    ]
    assert order.index(2) >= 2, "the photo is drawn in the second step"
    data = c.DataConfig(prompts=str(path), max_people=1, text_length=80)
    with pytest.raises(UserError, match=r"my.csv, line 4: image .*2.png: no face is found"):
        train.train(c.Config(**{**vars(config), "data": data}), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_photos_are_opened_in_the_first_pass_alone(tmp_path, monkeypatch):
    prompts = load_prompts(write_prompts(tmp_path, *portraits()[:3]), 1)
    decoded = count_decodes(monkeypatch)
    check_references(reward(), prompts)
    for _ in range(2):
        reward().encode_references(
            References.of_prompts(prompts, 2), [prompt.text for prompt in prompts]
        )
    assert decoded == {prompt.digests[0]: 1 for prompt in prompts}


def test_reward_and_judge_share_the_decoded_photos(tmp_path, monkeypatch):
    prompts = load_prompts(write_prompts(tmp_path, *portraits()[:3]), 1)
    decoded = count_decodes(monkeypatch)
    fresh, judge = (factory.make_face_reward(c.RewardConfig()) for _ in range(2))
    check_references(fresh, prompts, [judge])
    assert decoded == {prompt.digests[0]: 1 for prompt in prompts}
