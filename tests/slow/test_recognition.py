"""People of drawn clips are recognised by the bundled judge; average faces and other people's faces are not."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.config import Config, DataConfig, RewardConfig
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import Clip, to_uint8, write_video
from jax_idgrpo.evaluation import recognition, scoring, streaming
from jax_idgrpo.preferences import corruptions
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import References
from jax_idgrpo.synthetic import scenes
from tests.helpers.decodes import count_decodes

COUNT = 24
HEAD = 1.9  # a head in units of its face


@pytest.fixture(scope="module")
def drawn():
    """Clips of held-out people."""
    return jax.device_get(scenes.batch(5, 0, COUNT, "eval"))


@pytest.fixture(scope="module")
def prompts(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    listed = []
    for n in range(COUNT):
        files = [folder / f"{n}-{m}.png" for m in np.flatnonzero(drawn.mask[n])]
        for file, m in zip(files, np.flatnonzero(drawn.mask[n]), strict=True):
            Image.fromarray(to_uint8(drawn.portraits[n, m])).save(file)
        listed.append(Prompt(n, f"prompt {n}", tuple(files)))
    return listed


@pytest.fixture(scope="module")
def scorer(prompts):
    return scoring.make_scorer(Config(data=DataConfig(max_people=3)), COUNT, None, prompts)


def test_reward_judge_and_assigner_share_one_decode_of_each_photo(prompts, monkeypatch):
    decoded, consumed = count_decodes(monkeypatch), []
    reward = RewardConfig(custom="math:fsum")
    config = Config(data=DataConfig(max_people=3), reward=reward)
    given = prompts[:2], lambda file, image: consumed.append(file)
    scorer = scoring.make_scorer(config, 1, None, *given)
    for encoder in (scorer.judge, scorer.assigner):
        encoder.encode_references(References.of_prompts(prompts[:2], 3), ["", ""])
    files = [file for prompt in prompts[:2] for file in prompt.references]
    assert consumed == files
    assert list(decoded.values()) == [1] * len(files)


def measured(scorer, videos, prompts):
    scores = recognition.summarised(scorer(np.asarray(videos, np.float32), prompts))
    return scores["recognised"].mean(), scores["identities"].mean()


def with_average_faces(drawn):
    """The clips with the mean of all portraits painted over every head, hair and hats included."""
    shown = drawn.mask.astype(bool)
    x, y = np.meshgrid((np.arange(64) + 0.5) / 64, (np.arange(64) + 0.5) / 64)

    def head(picture, box):
        left, top, right, bottom = corruptions.grown(box, HEAD)
        return corruptions.sampled(picture, left + x * (right - left), top + y * (bottom - top))

    pairs = zip(drawn.portraits[shown], drawn.portrait_boxes[shown], strict=True)
    average, whole = np.mean([head(*pair) for pair in pairs], 0), np.array([0.0, 0.0, 64.0, 64.0])
    videos = np.array(drawn.video, np.float32)
    for n, m in zip(*np.nonzero(shown), strict=True):
        for t, frame in enumerate(videos[n]):
            corruptions.put(frame, corruptions.grown(drawn.boxes[n, t, m], HEAD), average, whole)
    return videos


def test_people_of_drawn_clips_are_recognised(scorer, drawn, prompts):
    recognised, identities = measured(scorer, drawn.video, prompts)
    assert recognised >= 0.95
    assert identities >= 0.95


def test_average_faces_are_recognised_by_chance_alone(scorer, drawn, prompts):
    recognised, identities = measured(scorer, with_average_faces(drawn), prompts)
    chance, people = 1 / len(scorer.gallery.embeddings), int(drawn.mask.sum())
    error = np.sqrt(chance * (1 - chance) / people)
    assert abs(recognised - chance) <= 3 * error
    assert identities < 0.5


def test_the_penalty_across_prompts_tells_people_from_average_faces(drawn, prompts, tmp_path):
    """By the reward's network: people of drawn clips, average faces, and people of other prompts."""
    lines = [";".join(map(str, prompt.references)) + f",{prompt.text}\n" for prompt in prompts]
    (tmp_path / "prompts.csv").write_text("ref_paths,prompt\n" + "".join(lines))
    config = Config(
        data=DataConfig(prompts=str(tmp_path / "prompts.csv"), max_people=3),
        reward=RewardConfig(penalties={"copied": 0.0, "unrecognised": 1.0}),
    )
    reward = factory.make_reward(config)
    people = reward.encode_references(References.of_prompts(prompts, 3), [""] * COUNT)
    right, average, others = (
        np.asarray(reward.score(np.asarray(videos, np.float32), people)["unrecognised"])
        for videos in (drawn.video, with_average_faces(drawn), np.roll(drawn.video, 1, axis=0))
    )
    assert np.median(right) < 0.1
    assert right.mean() < 0.2
    assert average.mean() == pytest.approx(1, abs=0.2)
    assert others.mean() > average.mean()


def test_people_of_other_prompts_are_not_recognised(scorer, drawn, prompts):
    recognised, _ = measured(scorer, np.roll(drawn.video, 1, axis=0), prompts)
    assert recognised <= 1 / len(scorer.gallery.embeddings)


def test_a_file_read_block_by_block_shows_the_same_people(
    scorer, drawn, prompts, tmp_path, monkeypatch
):
    several = next(n for n in range(COUNT) if drawn.mask[n].sum() > 1)
    write_video(tmp_path / "clip.mp4", drawn.video[several], 8)
    clip = Clip.open(tmp_path / "clip.mp4")
    config, prompt = Config(data=DataConfig(max_people=3)), prompts[several]
    found = []
    for block in (4, 32):
        monkeypatch.setattr(streaming, "BLOCK", block)
        files = streaming.make_clip_scorer(config, prompts)
        people, assigned = (
            files.encoded(reward, clip, prompt) for reward in (files.judge, files.assigner)
        )
        stream = streaming.Stream(
            files.judge,
            people,
            block,
            len(clip.numbers),
            streaming.Assigner.make(files.assigner, assigned.embeddings),
        )
        for frames in clip.blocks(block):
            stream.show(frames)
        found.append(stream.finish().people)
        assert files(clip, prompt)["recognised"] == 1
    np.testing.assert_array_equal(found[0].frames, found[1].frames)
    np.testing.assert_allclose(found[0].total, found[1].total, atol=2e-4)
    assert found[0].frames.max() == len(clip.numbers)


def test_the_same_people_are_recognised_on_a_mesh(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
    }
    subprocess.run(
        [sys.executable, "-m", "tests.helpers.recognition_worker", str(tmp_path / "found.npz")],
        check=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    with np.load(tmp_path / "found.npz") as found:
        names = [name.removeprefix("one/") for name in found if name.startswith("one/")]
        people = [name for name in names if name.startswith(("asked_", "taken_"))]
        assert len(people) == 6
        for name in names:
            np.testing.assert_allclose(
                found[f"mesh/{name}"], found[f"one/{name}"], atol=2e-4, err_msg=name
            )
        assert (found["one/taken_0"] == found["one/asked_0"]).mean() > 0.8
