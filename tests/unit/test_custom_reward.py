"""A reward of one's own: what it is given, what it may return, and that what goes wrong costs its own videos alone."""

import gc
import threading
import weakref

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import config as c
from jax_idgrpo.data.prompts import Prompt, load_prompts
from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import Photo, References, Reward, check_references
from jax_idgrpo.rewards.custom import HELD, CustomReward, load_function
from jax_idgrpo.rewards.host import collect


def videos(*levels):
    """Videos of one grey level each."""
    return (
        np.ones((len(levels), 2, 4, 4, 3), np.float32)
        * np.asarray(levels, np.float32)[:, None, None, None, None]
    )


def scores(function, given, timeout=30.0):
    """What a function earns, on the host."""
    reward = CustomReward(function, timeout)
    references = References(
        tuple((Photo(Image.new("RGB", (20 + n, 16))),) for n in range(len(given))), 1
    )
    encoded = reward.encode_references(references, [f"prompt {n}" for n in range(len(given))])
    return collect(reward.score(given, encoded))


def brightness(videos, prompts, references):
    return videos.mean((1, 2, 3, 4))


def test_the_function_gets_videos_texts_and_photos_in_their_order():
    seen = []

    def function(videos, prompts, references):
        seen.append(
            (
                videos.dtype,
                videos.shape,
                prompts,
                [[photo.size for photo in photos] for photos in references],
            )
        )
        return brightness(videos, prompts, references)

    np.testing.assert_allclose(scores(function, videos(0.5, -0.5, 0))["reward"], [0.5, -0.5, 0])
    assert seen == [
        (
            np.float32,
            (3, 2, 4, 4, 3),
            ["prompt 0", "prompt 1", "prompt 2"],
            [[(20, 16)], [(21, 16)], [(22, 16)]],
        )
    ]
    assert isinstance(CustomReward(function), Reward)


def test_values_of_a_dict_are_terms():
    found = scores(
        lambda videos, *_: {"reward": [1, 2], "sharpness": np.array([3.0, 4.0])}, videos(0, 1)
    )
    assert {name: value.tolist() for name, value in found.items()} == {
        "reward": [1, 2],
        "sharpness": [3, 4],
    }


def fussy(videos, prompts, references):
    if videos.max() > 0.9:
        raise RuntimeError("too bright\nfor my eyes")
    return brightness(videos, prompts, references)


def sometimes(videos, prompts, references):
    return np.where(
        brightness(videos, prompts, references) > 0.9,
        np.nan,
        brightness(videos, prompts, references),
    )


@pytest.mark.parametrize(
    ("function", "reason"),
    [(fussy, "RuntimeError: too bright"), (sometimes, "Unusable: the reward is nan")],
)
def test_a_video_that_cannot_be_scored_costs_itself_alone(function, reason):
    with pytest.warns(
        UserWarning,
        match=rf"^reward.custom: video 1 could not be scored \({reason}\); the reward is NaN there",
    ) as told:
        found = scores(function, videos(0.5, 1, 0.25))
    np.testing.assert_array_equal(found["reward"], np.float32([0.5, np.nan, 0.25]))
    assert len(told) == 1


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (lambda videos: np.zeros((len(videos), 2)), r"reward has shape \(3, 2\) and not \(3,\)"),
        (lambda videos: 0.5, r"reward has shape \(\) and not \(3,\)"),
        (lambda videos: {"rewards": [1, 2, 3]}, 'a dict without "reward", but with rewards'),
        (lambda videos: {"reward": [1, 2, 3], "other": [1]}, r"other has shape \(1,\)"),
        (
            lambda videos: None,
            "reward has shape|reward is no array of numbers but NoneType|the reward is nan",
        ),
        (lambda videos: ["good", "bad", "ugly"], "reward is no array of numbers but list"),
    ],
)
def test_what_is_no_reward_costs_its_videos_and_is_told_once(returned, reason):
    with pytest.warns(
        UserWarning, match=rf"videos 0, 1, 2 could not be scored \(Unusable: .*{reason}"
    ) as told:
        found = scores(lambda videos, *_: returned(videos), videos(0, 0.5, 1))
    assert np.isnan(found["reward"]).all()
    assert len(told) == 1


def test_a_call_that_hangs_is_given_up_and_the_next_is_made():
    gate = threading.Event()

    def slow(videos, prompts, references):
        if videos.max() > 0.9:
            gate.wait(60)
        return brightness(videos, prompts, references)

    reward = CustomReward(slow, 0.5)
    encoded = reward.encode_references(References(((), ()), 1), ["", ""])
    first, second = reward.score(videos(1, 0), encoded), reward.score(videos(0.25, 0), encoded)
    with pytest.warns(
        UserWarning,
        match=r"videos 0, 1 could not be scored \(TimeoutError: no answer in 0.5 seconds\)",
    ):
        assert np.isnan(collect(first)["reward"]).all()
    np.testing.assert_array_equal(collect(second)["reward"], [0.25, 0])
    gate.set()


def test_photos_need_no_face_for_the_function(tmp_path):
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "nobody.png")
    (tmp_path / "my.csv").write_text("ref_paths,prompt\nnobody.png,A dog runs.\n")
    check_references(CustomReward(brightness), load_prompts(tmp_path / "my.csv", 1))


def test_few_decoded_photos_are_held_for_the_function(tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(HELD + 5)]
    for file in files:
        Image.new("RGB", (64, 64), "grey").save(file)
    shown = []

    def count(videos, prompts, references):
        shown.extend(weakref.ref(image) for row in references for image in row)
        return [0.0] * len(videos)

    reward = CustomReward(count)
    prompts = [Prompt(number, "x", (file,)) for number, file in enumerate(files)]
    encoded = reward.encode_references(References.of_prompts(prompts, 1), ["x"] * len(files))
    for _ in range(2):
        for number in encoded:
            collect(reward.score(videos(1), number[None]))
    gc.collect()
    held = {id(image) for one in shown if (image := one()) is not None}
    assert 0 < len(held) <= HELD < len(files)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere.py:score", "no such file"),
        ("no_such_package.part:score", "no module 'no_such_package'"),
        ("broken.py:score", r"cannot be imported \(ZeroDivisionError"),
        ("empty.py:score", "has no function score"),
    ],
)
def test_a_function_that_is_not_there_is_one_line(name, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=rf"^reward.custom {name}: .*{reason}") as caught:
        load_function(name)
    assert "\n" not in str(caught.value)


def test_a_function_of_a_module_or_a_file_with_neighbours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_of_mine").mkdir()
    (tmp_path / "rewards_of_mine" / "__init__.py").write_text("")
    (tmp_path / "rewards_of_mine" / "constants.py").write_text("WORTH = 7\n")
    (tmp_path / "rewards_of_mine" / "faces.py").write_text(
        "from rewards_of_mine.constants import WORTH\n\n\ndef score(videos, prompts, references):\n    return [WORTH] * len(videos)\n"
    )
    (tmp_path / "alone.py").write_text("from rewards_of_mine.faces import score as score\n")
    for name in ("rewards_of_mine.faces:score", "alone.py:score"):
        assert load_function(name)(videos(0, 1), ["", ""], [[], []]) == [7, 7]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            dict(custom="mine"),
            r"reward.custom is 'mine'; use package.module:function or file.py:function",
        ),
        (dict(custom="a:b", vlm="folder"), "reward.custom excludes"),
        (dict(custom="a:b", mixture={"motion": 1.0}), "reward.mixture"),
        (dict(custom="a:b", custom_timeout=0.0), "custom_timeout"),
    ],
)
def test_what_makes_no_sense_beside_it_is_refused(values, reason):
    with pytest.raises(UserError, match=reason):
        c.RewardConfig(**values)
    with pytest.raises(
        UserError, match="reward_gradient needs a reward in JAX, and reward.custom runs on the host"
    ):
        c.Config(
            reward=c.RewardConfig(custom="a:b"),
            grpo=c.GrpoConfig(objective="reward_gradient", gradient_steps=2, kl_units="velocity"),
            rollout=c.RolloutConfig(window="none"),
        )


def test_the_bundled_faces_serve_no_model_that_films(tmp_path):
    films = c.ModelConfig(path="x")
    with pytest.raises(
        UserError,
        match=r"reward.faces embedded recognises synthetic people only, and model.path is x; pass --reward.faces",
    ):
        c.Config(model=films)
    with pytest.raises(UserError, match="reward.faces embedded"):
        c.Config(model=films, reward=c.RewardConfig(backend="deepface:opencv/embedder"))
    for other in (
        dict(faces="faces"),
        dict(custom="a:b"),
        dict(vlm="reward"),
        dict(backend="deepface:retinaface/ArcFace"),
    ):
        c.Config(model=films, reward=c.RewardConfig(**other))
    with pytest.warns(
        UserWarning, match="no judge: reward.faces embedded knows synthetic people only"
    ):
        assert (
            factory.make_judge(c.Config(model=films, reward=c.RewardConfig(custom="a:b"))) is None
        )
    assert factory.make_judge(c.Config(reward=c.RewardConfig(faces="", vlm="reward"))) is None
    for bundled in ("embedded", str(c.EMBEDDED / "pipeline")):
        assert c.Config(model=c.ModelConfig(path=bundled)).judged
