"""Training of the vision-language reward: what moves and what does not, resume, pairs of a CSV, and pairs of known truth."""

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jax_idgrpo import cli
from jax_idgrpo import config as c
from jax_idgrpo.data.prompts import describe_change
from jax_idgrpo.data.video import write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.preferences import batches as pairs_tasks
from jax_idgrpo.preferences import train_vlm
from jax_idgrpo.preferences.csv_source import (
    Pair,
    Row,
    agrees,
    automatic_share,
    by_source,
    load_pairs,
    pair_batch,
    pair_digests,
)
from jax_idgrpo.rewards.vlm import files
from tests import vlm_folders

ROOT = Path(__file__).parents[1]


def write_rows(path, rows):
    """A CSV with the columns of its first row."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_pairs(folder, count, first, size=64, frames=5):
    """Drawn people: a head of a person's colour on a field of another, moving; in the worse video it is gone. Ten pairs in a row differ."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        skin, field = rng.uniform(-0.2, 1, 3), rng.uniform(-1, 0.2, 3)
        y, x = np.mgrid[:size, :size] / size

        def head(centre):
            inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 0.05
            return np.where(inside[..., None], skin, field) + 0.05 * rng.normal(
                size=(size, size, 3)
            )

        path = rng.uniform(0.3, 0.7, (2, 2))
        centres = [path[0] + (path[1] - path[0]) * n / (frames - 1) for n in range(frames)]
        good = np.stack([head(centre) for centre in centres])
        bad = np.stack([field + 0.05 * rng.normal(size=(size, size, 3)) for _ in range(frames)])
        flip = bool(rng.integers(2))
        for side, video in zip("AB", (bad, good) if flip else (good, bad), strict=True):
            write_video(
                folder / f"{number}{side}.mp4", np.clip(video, -1, 1).astype(np.float32), 10
            )
        Image.fromarray(((np.clip(head((0.5, 0.5)), -1, 1) + 1) * 127.5).astype(np.uint8)).save(
            folder / f"{number}.png"
        )
        rows.append(
            {
                "path_A": f"{number}A.mp4",
                "path_B": f"{number}B.mp4",
                "prompt": "a person",
                "ref_paths": f"{number}.png",
                "SA": "B" if flip else "A",
                "source": ("trusted", "automatic")[number % 2],
            }
        )
    return write_rows(folder / "pairs.csv", rows)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    vlm_folders.write_base(folder)
    return folder


def configuration(base, pairs, steps, held_out="", batch=2, rate=1e-3, **options):
    return c.Config(
        optimizer=c.OptimizerConfig(learning_rate=rate, weight_decay=0.0, ema_decay=0.0),
        reward=c.RewardConfig(vlm_base=str(base), vlm_dtype="float32"),
        finetune=c.FinetuneConfig(
            task="reward_vlm",
            batch=batch,
            log_every=5,
            options={
                "pairs": str(pairs),
                "held_out": str(held_out),
                "rank": 4,
                "alpha": 8.0,
                "remat": False,
                "automatic": 0.5,
            }
            | options,
        ),
        run=c.RunConfig(steps=steps, save_every=max(steps // 2, 1), keep=1, sample_every=0),
    )


@pytest.mark.slow
def test_what_is_trained_moves_and_the_rest_does_not(base, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 3, 0)
    config = configuration(base, pairs, 2, held_out=pairs)
    from jax_idgrpo.training.finetune import finetune

    finetune(config, tmp_path / "run")
    options = pairs_tasks.read_options(train_vlm.Options, config.finetune.options)
    from jax_idgrpo import rng

    before, text = train_vlm.open_model(config, options, rng.key(config.run.seed, "init"))
    after = files.load(tmp_path / "run" / "export", base, "float32", merge=False)
    assert (
        tmp_path / "run" / "export" / "prompt.txt"
    ).read_text() == text and after.settings.template == "own"
    old, new = (nnx.state(model.network) for model in (before, after))
    table = [np.asarray(model.network.embed_tokens[...]) for model in (before, after)]
    np.testing.assert_array_equal(table[0][:-1], table[1][:-1])
    assert np.abs(table[0][-1] - table[1][-1]).max() > 0
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(old)[0], jax.tree.leaves(new), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if "visual" in name or "rm_head" in name or "lora" in name:
            assert np.any(np.asarray(a) != np.asarray(b)), name
        elif "embed_tokens" not in name:
            np.testing.assert_array_equal(a, b, err_msg=name)
    assert len(jax.tree.leaves(nnx.state(after.network, LoRAParam))) == 14
    found = json.loads((tmp_path / "run" / "accuracy.json").read_text())["SA"]
    assert found["pairs"] == 3 and found["ties"] == 0 and 0 <= found["without_ties"]["mean"] <= 1


def test_the_share_of_automatic_pairs_falls_by_half_a_cosine():
    assert automatic_share(0, 10, 0.8) == pytest.approx(0.8) and automatic_share(
        10, 10, 0.8
    ) == pytest.approx(0)
    assert automatic_share(5, 10, 0.8) == pytest.approx(0.4)
    pairs = by_source(
        [
            Pair(
                Row((Path("a"),), (Path("b"), Path(str(n))), ""),
                (1,),
                ("trusted", "automatic")[n % 2],
            )
            for n in range(20)
        ]
    )
    drawn = [pair_batch(pairs, 3, step, 4, 0.25) for step in range(40)]
    assert drawn[7] == pair_batch(pairs, 3, 7, 4, 0.25) != drawn[8]
    share = np.mean([pair.source == "automatic" for batch in drawn for pair in batch])
    assert abs(share - 0.25) < 0.1
    assert {pair.source for batch in drawn[:1] for pair in pair_batch(pairs, 3, 1, 8, 0.0)} == {
        "trusted"
    }
    assert (
        len({pair.videos for step in range(5) for pair in pair_batch(pairs, 3, step, 2, 0.0)}) == 10
    )


def test_a_teacher_agrees_with_signs_and_with_likely_ties():
    assert agrees(0.1, 1) and not agrees(-0.1, 1) and agrees(-3.0, -1) and not agrees(0.0, 1)
    assert agrees(1.52, 0) and agrees(-1.52, 0) and not agrees(1.53, 0)


def test_a_teacher_drops_the_automatic_pairs_that_it_contradicts(base, tmp_path):
    listed = load_pairs(write_pairs(tmp_path / "pairs", 6, 20), ("SA",))
    config = configuration(
        base, tmp_path / "pairs" / "pairs.csv", 1, teacher=str(tmp_path / "teacher")
    )
    options = pairs_tasks.read_options(train_vlm.Options, config.finetune.options)
    model, text = train_vlm.open_model(config, options, jax.random.key(1))
    files.save(model, tmp_path / "teacher", text=text)
    trainee = train_vlm.Trainee(model.network, 1, model.settings)
    said = train_vlm.differences(trainee, listed, train_vlm.read_with(model, text, 10.0), 2)[:, 0]
    kept = pairs_tasks.filter_automatic(
        listed, options, lambda: train_vlm.read_teacher(config, options)
    )
    want = [
        pair
        for pair, d in zip(listed, said, strict=True)
        if pair.source == "trusted" or d * pair.labels[0] > 0
    ]
    assert {pair.videos for pair in kept} == {pair.videos for pair in want}


@pytest.mark.parametrize(
    "header, row, message",
    [
        ("path_A,path_B,prompt,ref_paths", "a.mp4,b.mp4,x,p.png", "needs one column SA"),
        (
            "path_A;path_B;prompt;ref_paths;SA",
            "a.mp4;b.mp4;x;p.png;A",
            "columns are separated by semicolons",
        ),
        ("path_A,path_B,prompt,ref_paths,SA", "a.mp4,b.mp4,x,p.png,C", "line 2: a label is 'C'"),
        (
            "path_A,path_B,prompt,ref_paths,SA",
            "a.mp4,b.mp4,x,p.png,A",
            "a.mp4 is no file|p.png is no file",
        ),
        ("path_A,path_B,prompt,ref_paths,SA", "a.mp4,b.mp4,x,,A", "no reference photo"),
        (
            "path_A,path_B,prompt,ref_paths,SA,source",
            "a.mp4,b.mp4,x,p.png,A,robot",
            "source is 'robot'",
        ),
        ("path_A,path_B,prompt,ref_paths,SA", "a.mp4", "more or fewer fields"),
        (
            "path_A,path_B,prompt,ref_paths,SA,fps_A",
            "a.mp4,b.mp4,x,p.png,A,nan",
            "line 2: fps_A is 'nan'; write a number",
        ),
        (
            "path_A,path_B,prompt,ref_paths,SA,num_frames_B",
            "a.mp4,b.mp4,x,p.png,A,-3",
            "line 2: num_frames_B is '-3'",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, header, row, message):
    (tmp_path / "pairs.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(UserError, match=message):
        load_pairs(tmp_path / "pairs.csv", ("SA",))


def test_mistakes_in_the_options_are_named(base, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 1, 0)
    for options, message in (({"pears": 1}, "has no 'pears'"), ({"theta": 1.0}, "theta above 1")):
        with pytest.raises(UserError, match=message):
            train_vlm.make(configuration(base, pairs, 1, **options))
    with pytest.raises(UserError, match="no such file"):
        train_vlm.make(configuration(base, tmp_path / "nowhere.csv", 1))
    with pytest.raises(UserError, match="train-reward trains reward_face, reward_vlm"):
        cli.run(
            [
                "train-reward",
                str(ROOT / "configs" / "embedded_vae.py"),
                "--workdir",
                str(tmp_path / "run"),
            ]
        )


@pytest.mark.slow
def test_it_learns_64_pairs_by_heart_and_tells_held_out_ones_apart(base, tmp_path):
    pairs, held_out = (
        write_pairs(tmp_path / "pairs", 64, 0),
        write_pairs(tmp_path / "held_out", 64, 1000),
    )
    config = configuration(base, pairs, 48, held_out=held_out, batch=8, rate=2e-3, pixels=20_000)
    from jax_idgrpo.training.finetune import finetune

    finetune(config, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "accuracy.json").read_text())["SA"]
    model = files.load(tmp_path / "run" / "export", base, "float32")
    text = (tmp_path / "run" / "export" / "prompt.txt").read_text()
    listed = load_pairs(pairs, ("SA",))
    difference = train_vlm.differences(
        train_vlm.Trainee(model.network, 1, model.settings),
        listed,
        train_vlm.read_with(model, text, 10.0),
        8,
    )[:, 0]
    labels = np.array([pair.labels[0] for pair in listed])
    print(found, np.mean(difference * labels > 0))
    assert np.mean(difference * labels > 0) == 1.0
    assert found["pairs"] == 64 and found["without_ties"]["low"] > 0.75


def test_digests_of_pairs_tell_which_row_changed(tmp_path):
    for name, size in (("a.mp4", 3), ("b.mp4", 4), ("p.png", 5)):
        (tmp_path / name).write_bytes(bytes(size))

    def digests(*rows):
        (tmp_path / "pairs.csv").write_text(
            "path_A,path_B,prompt,ref_paths,SA\n" + "".join(f"a.mp4,b.mp4,{row}\n" for row in rows)
        )
        return pair_digests(load_pairs(tmp_path / "pairs.csv", ("SA",)))

    rows = ("Anna walks,p.png,A", "Ben sits,p.png,same")
    before = digests(*rows)
    assert digests(*rows) == before and len(set(before)) == 2
    assert describe_change(before, digests(rows[0], "Ben sits,p.png,B")).startswith("row 1 ")
    assert describe_change(before, digests(*rows[:1])).startswith("row 1 removed")
    (tmp_path / "b.mp4").write_bytes(bytes(400))
    assert not set(digests(*rows)) & set(before)
