"""Training of the vision-language reward: what moves and what does not, resume, pairs of a CSV, and pairs of known truth."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jax_idgrpo import cli
from jax_idgrpo.data.prompts import describe_change
from jax_idgrpo.errors import UserError
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
from tests.helpers.paths import ROOT
from tests.helpers.vlm_pairs import configuration, make_base, write_pairs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory)


def test_the_share_of_automatic_pairs_falls_by_half_a_cosine():
    assert automatic_share(0, 10, 0.8) == pytest.approx(0.8)
    assert automatic_share(10, 10, 0.8) == pytest.approx(0)
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
    assert agrees(0.1, 1)
    assert not agrees(-0.1, 1)
    assert agrees(-3.0, -1)
    assert not agrees(0.0, 1)
    assert agrees(1.52, 0)
    assert agrees(-1.52, 0)
    assert not agrees(1.53, 0)


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
    ("header", "row", "message"),
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
    with pytest.raises(
        UserError, match="train-reward trains reward_face, reward_linear, reward_vlm"
    ):
        cli.run(
            [
                "train-reward",
                str(ROOT / "configs" / "embedded_vae.py"),
                "--workdir",
                str(tmp_path / "run"),
            ]
        )


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
    assert digests(*rows) == before
    assert len(set(before)) == 2
    assert describe_change(before, digests(rows[0], "Ben sits,p.png,B")).startswith("row 1 ")
    assert describe_change(before, digests(*rows[:1])).startswith("row 1 removed")
    (tmp_path / "b.mp4").write_bytes(bytes(400))
    assert not set(digests(*rows)) & set(before)
