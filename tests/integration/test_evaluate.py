"""Sampling is paired and independent of the batch; an adapter of zeros changes nothing; what is written can be read by the next command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jax_idgrpo import cli, rng
from jax_idgrpo.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    VideoConfig,
)
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import read_video, to_uint8, write_video
from jax_idgrpo.errors import Failure, UserError
from jax_idgrpo.evaluation import bootstrap, commands, monitor, report, sampler
from jax_idgrpo.evaluation.sampler import all_rows, evaluated, make_models, make_sampler
from jax_idgrpo.models.layers import Dtypes, LoRAParam
from jax_idgrpo.models.umt5 import UMT5Encoder
from jax_idgrpo.models.vae import WanVAE
from jax_idgrpo.models.wan import VaceConfig, WanConfig, WanTransformer
from jax_idgrpo.rewards.base import References
from jax_idgrpo.rewards.custom import CustomReward
from jax_idgrpo.sampling import pipeline, rollout
from jax_idgrpo.sampling.adapters import add_adapter, save_lora
from tests.helpers.command import stop_of

TEXT_WIDTH = 8


class WordLengths:
    """A tokenizer whose ids are the lengths of the words."""

    def __call__(
        self, text, *, padding=False, max_length=None, truncation=False, return_tensors=None
    ):
        if max_length is None:
            return {"input_ids": [*(len(word) for word in text.split()), 1]}
        ids = [len(word) for word in text.split()][: max_length - 1] + [1]
        pad = [0] * (max_length - len(ids))
        return {
            "input_ids": np.array([ids + pad]),
            "attention_mask": np.array([[1] * len(ids) + pad]),
        }

    def decode(self, ids, *, skip_special_tokens):
        return " ".join(map(str, ids))


class Lookup(UMT5Encoder):
    """A text encoder that looks its ids up."""

    def __init__(self):
        self.table = nnx.Param(
            jnp.asarray(np.random.default_rng(3).normal(0, 1, (32, TEXT_WIDTH)), jnp.float32)
        )

    def __call__(self, ids, mask):
        return self.table[...][ids] * mask[..., None]


class Blocks(WanVAE):
    """A VAE whose latents are mean colours of 8 x 8 pixels of every fourth frame, so that nothing takes long to compile."""

    def __init__(self):
        self.colours = nnx.Param(
            jnp.asarray(np.random.default_rng(4).normal(0, 0.5, (3, 16)), jnp.float32)
        )

    def chunk(self, frames, height, width):
        return None

    def encode(self, video, chunk=None, noise=None):
        batch, _, height, width, _ = video.shape
        blocks = video[:, ::4].reshape(batch, -1, height // 8, 8, width // 8, 8, 3).mean((3, 5))
        return blocks @ self.colours[...]

    def decode(self, latents, chunk=None):
        frames = jnp.repeat(jnp.tanh(latents @ self.colours[...].T), 4, axis=1)[:, 3:]
        return jnp.repeat(jnp.repeat(frames, 8, axis=2), 8, axis=3)


def drawn(build, seed: int) -> nnx.Module:
    """A network whose every parameter is drawn: nothing is zero by initialisation, and nothing is compiled to make it."""
    graph, abstract = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(seed)
    return nnx.merge(
        graph,
        jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), abstract
        ),
    )


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    wan = WanConfig(
        num_layers=1,
        num_heads=2,
        head_dim=12,
        ffn_dim=32,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        vace=VaceConfig((0,)),
        unroll=True,
    )
    transformer = drawn(
        lambda: WanTransformer(wan, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0)), 1
    )
    return pipeline.Pipeline(
        transformer=transformer,
        vae=Blocks(),
        text_encoder=Lookup(),
        tokenizer=WordLengths(),
        shift=3.0,
        kind="vace",
        path=tmp_path_factory.mktemp("pipe"),
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for n in range(3):
        noise = np.random.default_rng(n).integers(0, 256, (20 + n, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{n}.png")
    photos = [folder / f"{n}.png" for n in range(3)]
    return [
        Prompt(0, "a person waves", (photos[0],)),
        Prompt(1, "two people , one nods", (photos[1], photos[2])),
        Prompt(2, "a person walks", (photos[2],)),
    ]


@pytest.fixture(scope="module")
def config():
    return Config(
        model=ModelConfig(rank=4, alpha=4.0),
        data=DataConfig(max_people=2, text_length=8),
        video=VideoConfig(frames=5, height=16, width=32, fps=8),
        rollout=RolloutConfig(guidance=1.5),
        evaluate=EvaluateConfig(videos=2, steps=3, batch=4, bootstrap=50),
    )


@pytest.fixture(scope="module")
def adapters(pipe, tmp_path_factory):
    """Two saved adapters: "still", whose output is zero, and "moved", whose is not."""
    folder = tmp_path_factory.mktemp("adapters")
    adapted = add_adapter(pipe.transformer, 4, 4.0, rng.key(7, "init"))
    state = nnx.state(adapted, LoRAParam)
    save_lora(folder / "still", state, adapted.config)
    moved = jax.tree.map(
        lambda leaf: (
            leaf + np.random.default_rng(leaf.size).normal(0, 0.3, leaf.shape).astype(np.float32)
        ),
        state,
    )
    save_lora(folder / "moved", moved, adapted.config)
    return {name: folder / name for name in ("still", "moved")}


@pytest.fixture
def stubbed(monkeypatch, pipe, prompts):
    """The commands' inputs replaced: the pipeline and the prompts above, and a face reward that looks at brightness alone."""

    def make_scorer(config, batch, *others):
        def score(videos, asked):
            videos = np.asarray(videos, np.float64)[: len(asked)]
            mean = videos.mean((1, 2, 3, 4))
            people = np.array([len(prompt.references) for prompt in asked])
            motion = np.abs(np.diff(videos, axis=1)).mean((1, 2, 3, 4))
            found = {
                "reward": mean,
                "judge_identity": mean / people,
                "faces": np.ones(len(mean)),
                "motion": motion,
            }
            return dict.fromkeys(bootstrap.LABELS, mean) | found

        return score

    def make_clip_scorer(config, prompts=()):
        score = make_scorer(config, 1)

        def score_clip(clip, prompt):
            frames = clip.read(range(len(clip.numbers)))
            return {name: float(value[0]) for name, value in score(frames[None], [prompt]).items()}

        return score_clip

    monkeypatch.setattr(
        sampler, "load_pipeline", lambda *args, **options: dataclasses.replace(pipe)
    )
    monkeypatch.setattr(commands, "load_prompts", lambda path, people, **_: prompts)
    monkeypatch.setattr(commands, "make_scorer", make_scorer)
    monkeypatch.setattr(commands, "make_clip_scorer", make_clip_scorer)


def test_a_video_does_not_depend_on_its_batch(stubbed, config, prompts):
    sampler = make_sampler(config)
    base = make_models(sampler, {})["base"]
    rows = all_rows(prompts, 2)
    together = np.concatenate(
        [videos[: len(batch)] for batch, videos in sampler.batches(base, rows, "")]
    )
    assert together.shape == (6, 5, 16, 32, 3)
    assert np.abs(together).max() <= 1
    alone = sampler.videos(base, [rows[3]])
    np.testing.assert_allclose(alone[0], together[3], atol=1e-5)
    apart = [np.abs(together[a] - together[b]).mean() for a in range(6) for b in range(a)]
    assert min(apart) > 1e-3, "two videos share their noise"


def test_an_adapter_of_zeros_is_the_base(stubbed, config, prompts, adapters):
    sampler = make_sampler(config)
    models = make_models(sampler, adapters)
    rows = all_rows(prompts, 1)
    videos = {name: sampler.videos(model, rows) for name, model in models.items()}
    np.testing.assert_array_equal(videos["still"], videos["base"])
    assert np.abs(videos["moved"] - videos["base"]).mean() > 1e-3


def test_evaluate_compares_and_the_report_shows_it(stubbed, config, adapters, tmp_path, capsys):
    out = tmp_path / "run" / "evaluation"
    commands.evaluate(config, tmp_path / "any.csv", out, adapters)
    found = json.loads((out / "metrics.json").read_text())
    for name in found["labels"]:
        change = found["differences"]["still"][name]
        assert (change["mean"], change["low"], change["high"]) == (0, 0, 0)
    assert found["differences"]["moved"]["reward"]["mean"] != 0
    assert len(found["videos"]) == 6
    assert [shown["group"] for shown in found["shown"]] == ["gains", "gains", "losses"]
    gains = [
        shown["videos"]["moved"]["judge_identity"] - shown["videos"]["base"]["judge_identity"]
        for shown in found["shown"]
    ]
    assert gains == sorted(gains, reverse=True)
    means = np.mean([row["moved"]["reward"] - row["base"]["reward"] for row in found["videos"]])
    assert means == pytest.approx(found["differences"]["moved"]["reward"]["mean"])
    table = (out / "table.md").read_text()
    assert "judge identity" in table
    assert table.splitlines()[0] in capsys.readouterr().out
    text = report.report(tmp_path / "run").read_text()
    assert text.count("<video") == 9
    assert text.count("<img") == 4
    assert text.index("Largest gains") < text.index("Largest losses")
    commands.evaluate(config, tmp_path / "any.csv", out, {})
    assert json.loads((out / "metrics.json").read_text())["models"].keys() == {"base"}, (
        "a second run replaces the first"
    )


def test_the_worst_videos_are_shown_beside_the_best():
    values = {f"{n:04d}-0": {"base": 0.5, "other": 9.0, "tuned": 0.5 + n / 10} for n in range(20)}
    groups = commands.gallery_groups(values)
    assert groups["gains"] == ["0019-0", "0018-0", "0017-0", "0016-0"]
    assert groups["losses"] == ["0000-0", "0001-0", "0002-0", "0003-0"]
    alone = {video: {"base": models["base"]} for video, models in values.items()}
    assert commands.gallery_groups(alone) == {"first": list(values)[:8]}
    assert commands.gallery_groups({"0000-0": values["0000-0"]}) == {
        "gains": ["0000-0"],
        "losses": [],
    }


def test_watching_warns_when_reward_and_judge_part(
    pipe, prompts, config, adapters, tmp_path, monkeypatch
):
    """The scorer below pays for whatever differs from the base's videos, and its judge minds it."""
    monkeypatch.setattr(monitor, "load_prompts", lambda path, people, **_: prompts)
    seen = []

    def make_scorer(config, batch, *others):
        def score(videos, asked):
            seen.append(videos)
            moved = np.abs(videos - seen[0][: len(videos)]).mean((1, 2, 3, 4))
            return {
                "reward": moved,
                "judge_identity": sign * moved,
                "faces": moved,
                "motion": moved,
            }

        return score

    monkeypatch.setattr(monitor, "make_scorer", make_scorer)
    models = make_models(make_sampler(config, dataclasses.replace(pipe)), adapters)
    watch = monitor.Watch.make(
        config, dataclasses.replace(pipe), CustomReward(len), tmp_path / "watch"
    )
    sign = 1
    watch.begin(models["still"])
    assert watch(models["moved"], 5)["watch_parted"] == 0
    sign = -1
    with pytest.warns(
        UserWarning,
        match=r"step 7: on 3 held-out prompts the reward rose .* and the judge's identity fell",
    ):
        logged = watch(models["moved"], 7)
    assert logged["watch_parted"] == 1
    assert logged["watch_reward"] == -logged["watch_judge_identity"] > 0
    count = len(seen)
    watch.begin(models["moved"])  # what a run starts from is scored once
    assert len(seen) == count
    assert sorted(path.name for path in (tmp_path / "watch").iterdir()) == [
        f"00000{n}.json" for n in (0, 5, 7)
    ]
    np.testing.assert_array_equal(seen[1], seen[2])  # fixed noise


def test_sample_then_score(stubbed, config, prompts, adapters, tmp_path):
    commands.sample(config, tmp_path / "any.csv", tmp_path / "videos", adapters["moved"])
    lines = [
        json.loads(line)
        for line in (tmp_path / "videos" / "samples.jsonl").read_text().splitlines()
    ]
    assert [line["file"] for line in lines] == [
        f"{row:04d}-{member}.mp4" for row in range(3) for member in range(2)
    ]
    commands.score(
        config, tmp_path / "videos", tmp_path / "any.csv", tmp_path / "new" / "scores.jsonl"
    )
    scores = [
        json.loads(line) for line in (tmp_path / "new" / "scores.jsonl").read_text().splitlines()
    ]
    assert [line["file"] for line in scores] == [line["file"] for line in lines]
    assert [line["prompt"] for line in scores] == [
        prompt.text for prompt in prompts for _ in range(2)
    ]
    assert scores[2]["judge_identity"] == pytest.approx(scores[2]["reward"] / 2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("holiday.mp4", "does not say which row"),
        ("20251103-anna.mp4", "does not say which row"),
        ("0_1_0_0.mp4", "does not say which row"),
        ("2.mp4", "does not say which row"),
        ("0003-0.mp4", "rows 0 to 2"),
    ],
)
def test_video_whose_row_is_not_known_is_refused(stubbed, config, tmp_path, name, reason):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=reason):
        commands.score(config, tmp_path, tmp_path / "any.csv", tmp_path / "scores.jsonl")
    assert not (tmp_path / "scores.jsonl").exists()


def test_folder_without_videos_is_refused(stubbed, config, tmp_path):
    with pytest.raises(UserError, match=r"holds no video \(\.mp4"):
        commands.score(config, tmp_path, tmp_path / "any.csv", tmp_path / "scores.jsonl")


def scores_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_clips(folder, *names, frames=3):
    for n, name in enumerate(names):
        write_video(folder / name, np.full((frames, 16, 32, 3), 0.1 * n, np.float32), 8)


def test_videos_of_all_kinds_are_scored_and_hidden_files_are_not(stubbed, config, tmp_path, capsys):
    folder = tmp_path / "videos"
    write_clips(folder, "0000-0.mp4", "0001-0.MP4", "0002-0.m4v", "._0000-1.mp4")
    (folder / "notes.txt").write_text("mine")
    commands.score(config, folder, tmp_path / "any.csv", tmp_path / "scores.jsonl")
    assert [line["file"] for line in scores_of(tmp_path / "scores.jsonl")] == [
        "0000-0.mp4",
        "0001-0.MP4",
        "0002-0.m4v",
    ]
    assert "1 other files" in (printed := capsys.readouterr().out)
    assert "notes.txt" in printed


def test_the_best_of_several_videos_is_kept(stubbed, config, tmp_path, monkeypatch):
    """Video k of a prompt is the best of the members 2 k and 2 k + 1 of a plain command."""
    brightness = commands.make_scorer(config, 4)
    monkeypatch.setattr(
        commands,
        "RewardScorer",
        lambda *_: lambda videos, asked: brightness(videos, asked)["reward"],
    )
    commands.sample(config, tmp_path / "any.csv", tmp_path / "best", None, 2)
    four = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, videos=4))
    commands.sample(four, tmp_path / "any.csv", tmp_path / "all", None)
    lines = scores_of(tmp_path / "best" / "samples.jsonl")
    assert [line["file"] for line in lines] == [
        f"{row:04d}-{member}.mp4" for row in range(3) for member in range(2)
    ]
    for line in lines:
        row, member = map(int, line["file"].removesuffix(".mp4").split("-"))
        first, second = line["rewards"]
        better = 2 * member + (second > first)
        assert (tmp_path / "best" / line["file"]).read_bytes() == (
            tmp_path / "all" / f"{row:04d}-{better}.mp4"
        ).read_bytes()
    assert {line["rewards"][0] < line["rewards"][1] for line in lines} == {True, False}
    before = (tmp_path / "best" / "samples.jsonl").read_text()
    (tmp_path / "best" / lines[3]["file"]).unlink()
    commands.sample(config, tmp_path / "any.csv", tmp_path / "best", None, 2)
    assert (tmp_path / "best" / "samples.jsonl").read_text() == before
    with pytest.raises(UserError, match="holds 6 videos that were made otherwise"):
        commands.sample(config, tmp_path / "any.csv", tmp_path / "best", None, 3)


def test_videos_with_names_of_their_own_are_found_by_the_csv_or_by_samples(
    stubbed, config, prompts, tmp_path
):
    folder = tmp_path / "videos"
    write_clips(folder, "anna.mp4", "both.mp4", "left.mp4")
    lines = [
        {"file": "both.mp4", "prompt": prompts[1].text},
        {"file": "anna.mp4", "prompt": prompts[2].text},
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    commands.score(config, folder, tmp_path / "any.csv", tmp_path / "scores.jsonl")
    found = {line["file"]: line["prompt"] for line in scores_of(tmp_path / "scores.jsonl")}
    assert found == {"anna.mp4": prompts[2].text, "both.mp4": prompts[1].text}
    (tmp_path / "any.csv").write_text(
        "ref_paths,prompt,video\na,b,left.mp4\na,b,\na,b,anna.mp4;both.mp4\n"
    )
    commands.score(config, folder, tmp_path / "any.csv", tmp_path / "scores.jsonl")
    found = {line["file"]: line["prompt"] for line in scores_of(tmp_path / "scores.jsonl")}
    assert found == {
        "left.mp4": prompts[0].text,
        "anna.mp4": prompts[2].text,
        "both.mp4": prompts[2].text,
    }


def test_samples_of_other_prompts_are_refused(stubbed, config, tmp_path):
    write_clips(tmp_path, "0001-0.mp4")
    (tmp_path / "samples.jsonl").write_text(
        json.dumps({"file": "0001-0.mp4", "prompt": "somebody else"}) + "\n"
    )
    with pytest.raises(UserError, match=r"line 1: 0001-0\.mp4 was made from a prompt that is not"):
        commands.score(config, tmp_path, tmp_path / "any.csv", tmp_path / "scores.jsonl")


def test_a_broken_video_costs_its_own_score_alone(stubbed, config, tmp_path, monkeypatch):
    folder, out = tmp_path / "videos", tmp_path / "scores.jsonl"
    write_clips(folder, "0000-0.mp4", "0001-0.mp4", "0002-0.mp4")
    whole = (folder / "0001-0.mp4").read_bytes()
    (folder / "0001-0.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        Failure, match=r"1 of 3 videos could not be scored.*0001-0\.mp4: is damaged or cut off"
    ):
        commands.score(config, folder, tmp_path / "any.csv", out)
    rewards = [line["reward"] for line in scores_of(out)]
    assert rewards[1] is None
    assert None not in (rewards[0], rewards[2])
    (folder / "0001-0.mp4").write_bytes(whole)
    scored = []
    make = commands.make_clip_scorer

    def counting(config, prompts):
        def score(clip, prompt):
            scored.append(clip.path.name)
            return make(config, prompts)(clip, prompt)

        return score

    monkeypatch.setattr(commands, "make_clip_scorer", counting)
    commands.score(config, folder, tmp_path / "any.csv", out)
    assert scored == ["0001-0.mp4"], "scores that were there are made again"
    again = [line["reward"] for line in scores_of(out)]
    assert again[0] == rewards[0]
    assert again[1] is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.jsonl", "videos"]


@pytest.fixture
def counted(monkeypatch):
    """Rows of every program call."""
    calls = []
    videos = sampler.Sampler.videos

    def counting(self, model, rows):
        calls.append([row.name for row in rows])
        return videos(self, model, rows)

    monkeypatch.setattr(sampler.Sampler, "videos", counting)
    return calls


def test_a_stopped_sample_continues(stubbed, config, adapters, tmp_path, monkeypatch, counted):
    out = tmp_path / "videos"
    commands.sample(config, tmp_path / "any.csv", tmp_path / "whole", adapters["moved"])
    write, written = commands.write_video, []

    def stopping(path, *rest):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(commands, "write_video", stopping)
    with pytest.raises(KeyboardInterrupt):
        commands.sample(config, tmp_path / "any.csv", out, adapters["moved"])
    monkeypatch.setattr(commands, "write_video", write)
    counted.clear()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    commands.sample(config, tmp_path / "any.csv", out, adapters["moved"])
    assert counted == [["0002-1"]]
    assert len(times) == 5
    assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())
    assert (out / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
    np.testing.assert_array_equal(
        read_video(out / "0002-1.mp4"), read_video(tmp_path / "whole" / "0002-1.mp4")
    )
    commands.sample(config, tmp_path / "any.csv", out, adapters["moved"])
    assert len(counted) == 1, "a finished command samples again"


def test_a_folder_with_videos_of_something_else_is_refused(stubbed, config, adapters, tmp_path):
    commands.sample(config, tmp_path / "any.csv", tmp_path / "videos", None)
    before = {path.name: path.read_bytes() for path in (tmp_path / "videos").iterdir()}
    seeded = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=7))
    fewer = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, videos=1))
    for other, lora, count in ((seeded, None, 6), (config, adapters["moved"], 6), (fewer, None, 3)):
        with pytest.raises(UserError, match=f"holds {count} videos that were made otherwise"):
            commands.sample(other, tmp_path / "any.csv", tmp_path / "videos", lora)
    assert {path.name: path.read_bytes() for path in (tmp_path / "videos").iterdir()} == before


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_videos_that_are_not_finite_are_not_written(
    stubbed, config, adapters, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(
        Blocks,
        "decode",
        lambda self, latents, chunk=None: jnp.full((latents.shape[0], 5, 16, 32, 3), jnp.nan),
    )
    given = {"sample": adapters["moved"], "evaluate": adapters}[command]
    rollout.decode.clear_cache()
    with pytest.raises(Failure, match=r"video 0000-0 is not finite"):
        getattr(commands, command)(config, tmp_path / "any.csv", tmp_path / "out", given)
    rollout.decode.clear_cache()
    assert not list((tmp_path / "out").rglob("*.mp4"))
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_mistake_leaves_what_was_there(stubbed, config, adapters, tmp_path, monkeypatch):
    commands.evaluate(config, tmp_path / "any.csv", tmp_path / "out", adapters)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}

    def refuse(*given):
        raise UserError("the networks cannot be read")

    for name in ("make_models", "make_clip_scorer"):
        monkeypatch.setattr(commands, name, refuse)
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=7))
    with pytest.raises(UserError, match="cannot be read"):
        commands.evaluate(other, tmp_path / "any.csv", tmp_path / "out", adapters)
    with pytest.raises(UserError, match="cannot be read"):
        commands.sample(other, tmp_path / "any.csv", tmp_path / "new", None)
    write_clips(tmp_path / "videos", "0000-0.mp4")
    with pytest.raises(UserError, match="cannot be read"):
        commands.score(other, tmp_path / "videos", tmp_path / "any.csv", tmp_path / "scores.jsonl")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "videos"]


def test_a_failure_is_one_line_and_exit_status_1(monkeypatch, capsys):
    def fail(words):
        raise Failure("video 0000-0 is not finite")

    monkeypatch.setattr(cli, "run", fail)
    stopped = stop_of(cli.main, monkeypatch, capsys, "idgrpo", "sample")
    assert stopped.status == 1
    assert stopped.err == "idgrpo: video 0000-0 is not finite\n"


def test_a_stopped_evaluation_continues(stubbed, config, adapters, tmp_path, monkeypatch, counted):
    commands.evaluate(config, tmp_path / "any.csv", tmp_path / "whole", adapters)
    make = commands.make_scorer

    def stopping(*given):
        score, calls = make(*given), []

        def limited(videos, asked):
            calls.append(asked)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return score(videos, asked)

        return limited

    monkeypatch.setattr(commands, "make_scorer", stopping)
    with pytest.raises(KeyboardInterrupt):
        commands.evaluate(config, tmp_path / "any.csv", tmp_path / "out", adapters)
    monkeypatch.setattr(commands, "make_scorer", make)
    counted.clear()
    commands.evaluate(config, tmp_path / "any.csv", tmp_path / "out", adapters)
    assert [len(rows) for rows in counted] == [2, 4, 2], "what was scored is sampled again"
    ours, theirs = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("out", "whole")
    )
    assert ours == theirs
    counted.clear()
    commands.evaluate(config, tmp_path / "any.csv", tmp_path / "out", {"moved": adapters["moved"]})
    assert not counted, "a comparison of models that were measured samples again"
    other = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, steps=2))
    commands.evaluate(other, tmp_path / "any.csv", tmp_path / "out", {})
    assert sum(map(len, counted)) == 6, "scores of other settings are taken for these"


def test_a_comparison_without_guidance_says_what_that_means():
    plain = Config(
        model=ModelConfig(path="/models/wan"),
        rollout=RolloutConfig(guidance=1.0),
        reward=RewardConfig(faces="faces"),
    )
    assert "without guidance (scale 1)" in commands._guidance_note(plain)
    guided = dataclasses.replace(plain, evaluate=EvaluateConfig(guidance=5.0))
    assert not commands._guidance_note(guided)
    assert not commands._guidance_note(Config(rollout=RolloutConfig(guidance=1.0)))


def test_a_fetched_video_is_the_file_s_bytes():
    videos = np.random.default_rng(0).uniform(-1.2, 1.2, (3, 2, 4, 6, 3)).astype(np.float32)
    for number in range(3):
        np.testing.assert_array_equal(
            sampler.fetch(jnp.asarray(videos), number), to_uint8(videos[number])
        )


def test_size_of_the_evaluation_overrides_that_of_the_run(config):
    larger = dataclasses.replace(
        config, evaluate=dataclasses.replace(config.evaluate, frames=9, width=64)
    )
    video = evaluated(larger).video
    assert (video.frames, video.height, video.width, video.fps) == (9, 16, 64, 8)


def test_references_are_photos_at_their_own_size_and_a_mask_of_people(config, prompts):
    references = References.of_prompts(prompts, config.data.max_people)
    assert references.mask.tolist() == [[True, False], [True, True], [True, False]]
    for row, prompt in zip(references.photos, prompts, strict=True):
        assert [photo.open().size for photo in row] == [
            Image.open(path).size for path in prompt.references
        ]


def test_a_stopped_evaluation_recognises_whom_a_whole_one_does(
    stubbed, config, adapters, tmp_path, monkeypatch
):
    """Who is recognised is decided among all prompts, so it is concluded from every line at the end."""
    make, calls = commands.make_scorer, []

    def recognising(*given):
        score = make(*given)

        def columns(videos, asked):
            calls.append(asked)
            if len(calls) == stop:
                raise KeyboardInterrupt
            own = np.array([prompt.id for prompt in asked], float)
            taken = np.where(own == 1, 2.0, own)
            return score(videos, asked) | {"asked_0": own, "taken_0": taken}

        return columns

    monkeypatch.setattr(commands, "make_scorer", recognising)
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        commands.evaluate(config, tmp_path / "any.csv", tmp_path / "out", adapters)
    stop = 0
    for name in ("out", "whole"):
        commands.evaluate(config, tmp_path / "any.csv", tmp_path / name, adapters)
    ours, theirs = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("out", "whole")
    )
    assert ours == theirs
    base = ours["models"]["base"]
    assert base["recognised"]["mean"] == pytest.approx(2 / 3)
    assert base["identities"]["mean"] == pytest.approx(2 / 3)
    assert "people are recognised among 3 references, by chance 0.333" in ours["note"]
    assert "people recognised" in (tmp_path / "out" / "table.md").read_text()
    assert {"recognised", "identities"} <= ours["labels"].keys()
