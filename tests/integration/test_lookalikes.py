"""Before a run, two photos of one person in a prompt and people who are hardly told apart are named with file and line."""

import functools
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import config as c
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.data.video import to_uint8
from jax_idgrpo.rewards import base, factory
from jax_idgrpo.rewards.base import check_references
from jax_idgrpo.rewards.identity import IdentityConfig
from jax_idgrpo.rewards.lookalikes import warn_of_lookalikes
from jax_idgrpo.synthetic import scenes
from tests.helpers.decodes import count_decodes

REAL = os.environ.get("IDGRPO_TEST_PHOTOGRAPHS", "")
"""Folder with face networks in `faces` and photos of different people in `photos`."""


@functools.cache
def reward():
    """The bundled face reward, which photos of the tests are encoded by."""
    return factory.make_face_reward(c.RewardConfig())


@functools.cache
def portraits():
    """Photos of eight drawn people."""
    drawn = scenes.batch(5, 0, 8, "eval")
    return [Image.fromarray(to_uint8(picture)) for picture in np.asarray(drawn.portraits)[:, 0]]


def prompts_of(folder, *rows):
    """Prompts with the given photos; a photo is written once for each slot that shows it."""
    lines = ["ref_paths,prompt"]
    for n, row in enumerate(rows):
        names = [f"{n}-{m}.png" for m in range(len(row))]
        for name, photo in zip(names, row, strict=True):
            photo.save(folder / name)
        lines.append(f"{';'.join(names)},Some people smile.")
    (folder / "my.csv").write_text("\n".join(lines) + "\n")
    return load_prompts(folder / "my.csv", 3)


def warned(prompts, **cosines):
    """Warnings about photos, by a reward with other thresholds where they are given."""
    chosen = reward()
    before = chosen.config
    chosen.config = IdentityConfig(low=before.low, high=before.high)
    if cosines:
        chosen.config = IdentityConfig(**cosines)
    try:
        check_references(chosen, prompts)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_lookalikes(chosen, prompts)
    finally:
        chosen.config = before
    return [str(warning.message) for warning in caught]


def resaved(photo):
    """The same person in another file: brighter by an eighth."""
    return photo.point(lambda value: min(255, value * 9 // 8))


def test_different_people_are_not_warned_of(tmp_path):
    people = portraits()
    assert warned(prompts_of(tmp_path, people[:3], people[3:5], people[:1])) == []


def test_one_person_in_two_slots_is_named_with_files_and_line(tmp_path):
    people = portraits()
    twice = (people[1], people[2], resaved(people[1]))
    (message,) = warned(prompts_of(tmp_path, people[:2], twice), low=0.0, high=0.85)
    assert message.startswith("two photos of a prompt seem to show one person twice (cosine above")
    assert f"prompts {tmp_path}/my.csv, line 3: 1-0.png and 1-2.png (0.9" in message
    assert message.endswith("; name one photo per person")
    assert "\n" not in message


def test_a_few_examples_stand_for_all_pairs(tmp_path):
    photo = portraits()[1]
    (message,) = warned(prompts_of(tmp_path, *[(photo, resaved(photo))] * 5), low=0.0, high=0.85)
    assert message.startswith("5 pairs of photos of a prompt")
    assert ", and 2 more; " in message
    assert "line 2:" in message
    assert "line 4:" in message
    assert "line 5:" not in message
    assert message.count("my.csv") == 1


def test_people_whom_the_network_hardly_tells_apart_are_named(tmp_path):
    people = portraits()
    prompts = prompts_of(tmp_path, people[:2])
    embedded = reward().encode_references(base.References.of_prompts(prompts, 2), [""]).embeddings
    cosine = float(embedded[0, 0] @ embedded[0, 1])
    above, below = (dict(low=cosine - 0.6 + step, high=cosine + 0.4 + step) for step in (-0.1, 0.1))
    (message,) = warned(prompts, **above)
    assert f"line 2: 0-0.png and 0-1.png ({cosine:.2f}); the reward hardly notices" in message
    assert warned(prompts, **below) == []


def test_a_photo_that_is_named_twice_is_warned_of_once(tmp_path):
    """`load_prompts` names it, by its content."""
    photo = portraits()[1]
    with pytest.warns(UserWarning, match="line 2: shows one photo twice"):
        prompts = prompts_of(tmp_path, (photo, photo))
    assert warned(prompts) == []


def test_photos_are_not_opened_again(tmp_path, monkeypatch):
    prompts = prompts_of(tmp_path, portraits()[:2], portraits()[2:4])
    check_references(reward(), prompts)

    decoded = count_decodes(monkeypatch)
    warn_of_lookalikes(reward(), prompts)
    assert not decoded


def test_a_reward_without_face_networks_has_no_warning(tmp_path):
    prompts = prompts_of(tmp_path, portraits()[:2])
    custom = factory.make_reward(c.Config(reward=c.RewardConfig(custom="math:fsum", faces="")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_lookalikes(custom, prompts)


@pytest.mark.skipif(not REAL, reason="IDGRPO_TEST_PHOTOGRAPHS names no folder")
def test_photographs_of_two_people_are_not_warned_of_and_one_person_is(tmp_path):
    real = factory.make_face_reward(c.RewardConfig(faces=str(Path(REAL) / "faces")))
    files = sorted((Path(REAL) / "photos").glob("*.jpg"))
    one, other = (Image.open(file).convert("RGB") for file in files[:2])
    prompts = prompts_of(tmp_path, (one, other), (one, resaved(one)))
    check_references(real, prompts)
    with pytest.warns(UserWarning, match=r"line 3: 1-0.png and 1-1.png") as caught:
        warn_of_lookalikes(real, prompts)
    assert len(caught) == 1
