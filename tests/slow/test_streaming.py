"""Memory of a judged video does not grow with its length, and blocks of frames are worth what the whole is."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.config import Config, DataConfig
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import Clip, write_video
from jax_idgrpo.evaluation import scoring, streaming
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.identity import IdentityConfig
from tests.helpers.paths import ROOT
from tests.helpers.small_faces import small_stack


@pytest.fixture(scope="module")
def rewards():
    """A reward that looks at 3 frames and a judge that looks at all, of small random networks that find faces everywhere."""
    return FaceReward(small_stack(), IdentityConfig(), 3), FaceReward(
        small_stack(), IdentityConfig(), 0
    )


@pytest.fixture
def patched(monkeypatch, rewards):
    for module in (scoring, streaming):
        monkeypatch.setattr(module, "make_reward", lambda config, mesh=None: rewards[0])
        monkeypatch.setattr(module, "make_judge", lambda config, mesh=None: rewards[1])


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for n in range(2):
        pixels = np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).resize((128, 128)).save(folder / f"{n}.png")
    return Prompt(0, "two people", (folder / "0.png", folder / "1.png"))


def coloured(frames, height=32, width=48):
    rng = np.random.default_rng(0)
    coarse = rng.uniform(-1, 1, (frames, height // 8, width // 8, 3)).astype(np.float32)
    return coarse.repeat(8, 1).repeat(8, 2)


def test_blocks_of_a_file_are_worth_what_the_whole_video_is(patched, prompt, tmp_path, monkeypatch):
    config = Config(data=DataConfig(max_people=2))
    write_video(tmp_path / "clip.mp4", coloured(9), 8)
    clip = Clip.open(tmp_path / "clip.mp4")
    whole = scoring.make_scorer(config, 1)(clip.read(range(9))[None], [prompt])
    for block in (4, 32):
        monkeypatch.setattr(streaming, "BLOCK", block)
        found = streaming.make_clip_scorer(config)(clip, prompt)
        assert found.keys() == whole.keys()
        for name, value in found.items():
            assert value == pytest.approx(whole[name][0], abs=2e-5), (block, name)
    assert len({round(value, 4) for value in found.values()}) > 3


def test_a_stream_holds_no_more_of_a_long_video_than_of_a_short_one(
    patched, prompt, tmp_path, monkeypatch
):
    monkeypatch.setattr(streaming, "BLOCK", 3)
    shown = []
    look = streaming._look

    def looking(graph, config, state, frames, *known):
        shown.append(frames.shape)
        return look(graph, config, state, frames, *known)

    monkeypatch.setattr(streaming, "_look", looking)
    scorer = streaming.make_clip_scorer(Config(data=DataConfig(max_people=2)))
    write_video(tmp_path / "clip.mp4", coloured(10), 8)
    given = []
    score = scorer.reward.score

    def scoring_them(videos, encoded):
        given.append(videos.shape)
        return score(videos, encoded)

    monkeypatch.setattr(scorer.reward, "score", scoring_them)
    scorer(Clip.open(tmp_path / "clip.mp4"), prompt)
    assert shown == [(4, 32, 48, 3)] * 4, "blocks are programs of their own"
    assert given == [(1, 3, 32, 48, 3)], "the reward gets more than the frames that it looks at"


def test_memory_of_the_judge_does_not_grow_with_the_frames(rewards):
    judge = rewards[1]
    people = judge.shapes(2, 2)

    def held(frames):
        videos = jax.ShapeDtypeStruct((2, frames, 64, 96, 3), jnp.float32)
        memory = jax.jit(judge.apply).lower(judge.state, videos, people).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert held(81) < 2 * held(9)


@functools.cache
def on_eight_devices(folder):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
    }
    out = folder / "scores.npz"
    subprocess.run(
        [sys.executable, "-m", "tests.helpers.scoring_worker", str(out)],
        check=True,
        cwd=ROOT,
        env=environment,
    )
    with np.load(out) as found:
        return dict(found)


@pytest.mark.parametrize("mesh", ["data8", "data2-fsdp2-seq2", "fsdp4-tensor2"])
def test_videos_are_scored_on_all_devices_of_the_mesh(tmp_path_factory, mesh):
    found = on_eight_devices(tmp_path_factory.getbasetemp())
    assert found[f"{mesh}/devices"].tolist() == [8, 8], (
        "terms of the reward or of the judge are not on all devices"
    )
    assert found[f"{mesh}/rows"] == {"data8": 1, "data2-fsdp2-seq2": 2, "fsdp4-tensor2": 2}[mesh], (
        "a device has other rows than its own"
    )
    for name in [name.removeprefix("one/") for name in found if name.startswith("one/")]:
        np.testing.assert_allclose(
            found[f"{mesh}/{name}"], found[f"one/{name}"], atol=2e-5, err_msg=name
        )
    assert found[f"{mesh}/fetched"].all(), "a video that was fetched is another"
    assert found[f"{mesh}/gathered"] < 32 * 48 * 3, "frames are gathered to be scored"
