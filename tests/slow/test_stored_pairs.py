"""Pairs of a data set are those of the CSV that it was made of: to the byte, in the same steps, for training; and mistakes are named."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest

from jax_idgrpo import cli, preferences
from jax_idgrpo import config as c
from jax_idgrpo.data.video import read_frames, read_video, write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences import synthesis, tfds_builder, tfds_source
from jax_idgrpo.preferences.csv_source import LABELS, by_source, load_pairs, pair_batch
from jax_idgrpo.preferences.tfds_source import CACHED_RECORDS, INDEX, INFO, StoredPairs, open_pairs
from jax_idgrpo.training.finetune import finetune
from tests.helpers import vlm_folders
from tests.helpers.tiny_run import rows
from tests.helpers.vlm_pairs import configuration as vlm_configuration
from tests.helpers.vlm_pairs import write_rows

DIMENSIONS = ("SA", "VQ")


def write_csv(folder, count=3 * CACHED_RECORDS):
    """Rows of every kind; the files hold arbitrary bytes, which may be none and may end with zeros."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        (folder / f"{number}.bin").write_bytes(
            rng.bytes(int(rng.integers(400))) + bytes(number % 3)
        )
    names = [f"{number}.bin" for number in range(count)]
    rows = [
        {
            "path_A": names[number],
            "path_B": rng.choice(names),
            "prompt": f'Änne, "{number}"' if number else "",
            "ref_paths": ";".join(rng.choice(names, 1 + number % 4)),
            "SA": rng.choice(list(LABELS)),
            "VQ": rng.choice(list(LABELS)),
            "fps_A": "" if number % 5 else repr(rng.uniform(1, 60)),
            "fps_B": "23.976",
            "num_frames_A": number,
            "num_frames_B": "",
            "source": rng.choice(["", "trusted", "automatic", "synthetic"]),
            "MOS_A_SA": "4.5",
        }
        for number in range(count)
    ]
    return write_rows(folder / "pairs.csv", rows)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A CSV, and a data set of several files made of it."""
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds_builder, "SHARD", 5000)
        table = write_csv(folder / "csv")
        tfds_source.write_dataset(table, folder / "set", "SA,VQ")
    return table, folder / "set"


def content(pair):
    """All that a pair says, with the bytes of its files."""
    return (
        pair.labels,
        pair.source,
        pair.prompt,
        pair.fps,
        pair.row.read().num_frames,
        [file.read_bytes() for file in pair.references],
        [file.read_bytes() for file in pair.videos],
    )


def test_a_data_set_holds_what_the_csv_says(written):
    table, folder = written
    for dimensions in (DIMENSIONS, DIMENSIONS[::-1], ("VQ",)):
        rows, stored = load_pairs(table, dimensions), open_pairs(folder, dimensions)
        assert [content(pair) for pair in stored] == [content(pair) for pair in rows]
    assert {label for pair in rows for label in pair.labels} == set(LABELS.values())
    assert len({pair.source for pair in rows}) == 2
    assert content(stored[-1]) == content(rows[-1])
    assert [content(pair) for pair in stored[2:4]] == [content(pair) for pair in rows[2:4]]
    assert len(list(folder.glob("*array_record*"))) > 3
    assert {path.name for path in folder.iterdir() if "array_record" not in path.name} == {
        INFO,
        INDEX,
        "features.json",
        "labels-SA.labels.txt",
        "labels-VQ.labels.txt",
        "source.labels.txt",
    }


def test_tfds_reads_the_folder_too(written):
    import tensorflow_datasets as tfds

    table, folder = written
    read = tfds.builder_from_directory(folder).as_data_source("pairs")
    rows = load_pairs(table, DIMENSIONS)
    assert len(read) == len(rows)
    for example, row in zip(read, rows, strict=True):
        assert [example["video_A"], example["video_B"]] == [
            file.read_bytes() for file in row.videos
        ]
        assert [list(LABELS.values())[example["labels"][name]] for name in DIMENSIONS] == list(
            row.labels
        )


def test_steps_read_the_same_pairs_from_both_whenever_they_are_opened(written):
    table, folder = written
    rows = by_source(load_pairs(table, DIMENSIONS))
    drawn = [[content(pair) for pair in pair_batch(rows, 3, step, 4, 0.4)] for step in range(30)]
    assert drawn[3] != drawn[4]
    for first in (0, 17):
        stored = by_source(StoredPairs(folder, DIMENSIONS))
        assert drawn[first:] == [
            [content(pair) for pair in pair_batch(stored, 3, step, 4, 0.4)]
            for step in range(first, 30)
        ]


def test_what_steps_are_drawn_by_is_known_without_reading_a_record(written):
    _, folder = written
    stored = StoredPairs(folder, DIMENSIONS)
    stored.example = None
    mixed = by_source(stored)
    assert (
        len(mixed.trusted) + len(mixed.automatic)
        == len([pair.labels for pair in stored])
        == len(stored)
    )


def test_shards_are_neighbours_and_no_larger_than_asked():
    sizes = [3, 4, 2, 9, 1, 1, 7, 0]
    assert tfds_builder.shards(sizes, 7) == [
        range(2),
        range(2, 3),
        range(3, 4),
        range(4, 6),
        range(6, 8),
    ]
    assert tfds_builder.shards([5], 7) == [range(1)]
    assert tfds_builder.shards([50], 7) == [range(1)]


# ---- training ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A CSV of drawn people, and the data set of it."""
    folder = tmp_path_factory.mktemp("drawn")
    synthesis.write_pairs(folder / "csv", "train", 6, automatic=0.5)
    tfds_source.write_dataset(folder / "csv" / "pairs.csv", folder / "set")
    return folder / "csv" / "pairs.csv", folder / "set"


def test_training_from_a_data_set_is_training_from_its_csv(drawn, tmp_path):
    kept = []
    for name, given in zip(("csv", "set"), drawn, strict=True):
        finetune(
            c.Config(
                data=c.DataConfig(max_people=3),
                video=c.VideoConfig(frames=9, height=64, width=64),
                optimizer=c.OptimizerConfig(learning_rate=2e-3, ema_decay=0.0),
                finetune=c.FinetuneConfig(
                    task="reward_face",
                    batch=4,
                    log_every=1,
                    options={"pairs": str(given), "held_out": str(given)},
                ),
                run=c.RunConfig(steps=4, save_every=4, keep=1, sample_every=0),
            ),
            tmp_path / name,
        )
        folder = tmp_path / name
        losses = [row.get("loss") for row in rows(folder)]
        kept.append(
            (
                losses,
                (folder / "accuracy.json").read_text(),
                (folder / "export" / "head.safetensors").read_bytes(),
            )
        )
    assert kept[0] == kept[1]
    assert len(set(kept[0][0])) > 2


def test_a_vision_language_reward_reads_the_same_arrays(drawn, tmp_path):
    from jax_idgrpo.training.task import make_task

    vlm_folders.write_base(tmp_path / "base")
    tasks = [make_task(vlm_configuration(tmp_path / "base", given, 4)) for given in drawn]
    for step in (0, 1, 5):
        a, b = (jax.tree.leaves(task.batch(3, step)) for task in tasks)
        assert len(a) == len(b) > 3
        for left, right in zip(a, b, strict=True):
            np.testing.assert_array_equal(left, right)


# ---- mistakes ------------------------------------------------------------------------------------------------------------


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shards_of(folder):
    return sorted(folder.glob("*array_record*"))


def flip(folder):
    """Another byte in the middle of the first record."""
    path = shards_of(folder)[0]
    raw = bytearray(path.read_bytes())
    raw[200] ^= 1
    path.write_bytes(raw)


def relabel(folder):
    """An index that contradicts the records."""
    index = json.loads((folder / INDEX).read_text())
    index["sources"] = index["sources"].translate(str.maketrans("at", "ta"))
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda folder: (folder / INFO).unlink(),
            f"without {INFO}, so no data set; name a CSV, or make one: idgrpo pack-pairs",
        ),
        (lambda folder: (folder / INFO).write_text("{"), f"{INFO}: cannot be read"),
        (lambda folder: (folder / INFO).write_text("[]"), f"{INFO}: cannot be read"),
        (lambda folder: (folder / INFO).write_text("[" * 100_000), f"{INFO}: cannot be read"),
        (
            lambda folder: edit(folder / INFO, name="mnist"),
            "holds mnist 1.0.0 array_record, not identity_pairs 1.0.0 array_record",
        ),
        (lambda folder: edit(folder / INFO, version="2.0.0"), "holds identity_pairs 2.0.0"),
        (lambda folder: edit(folder / INFO, splits=[]), "make one of the CSV"),
        (
            lambda folder: edit(folder / INFO, splits=[{"name": "pairs", "shardLengths": ["x"]}]),
            "cannot be read",
        ),
        (
            lambda folder: edit(folder / INFO, splits=[{"name": "pairs", "shardLengths": []}]),
            "not the letters of 0 pairs",
        ),
        (lambda folder: (folder / INDEX).unlink(), f"{INDEX}: cannot be read"),
        (lambda folder: edit(folder / INDEX, sources="tt"), "not the letters of 48 pairs"),
        (
            lambda folder: edit(folder / INDEX, labels={"SA": "?" * 48}),
            "not the letters of 48 pairs",
        ),
        (lambda folder: shards_of(folder)[1].unlink(), "is missing; copy the data set again"),
        (lambda folder: shards_of(folder)[1].write_bytes(b"no records"), "cannot be read"),
        (
            lambda folder: shutil.copy(shards_of(folder)[0], shards_of(folder)[1]),
            "records, not 48; copy",
        ),
        (flip, "pair 0: cannot be read"),
        (relabel, f"pair 0: its labels are not those of {INDEX}"),
    ],
)
def test_a_damaged_or_foreign_folder_is_named_in_one_line(written, tmp_path, damage, says):
    shutil.copytree(written[1], tmp_path / "set")
    damage(tmp_path / "set")
    with pytest.raises(UserError) as told:
        content(open_pairs(tmp_path / "set", ("SA",))[0])
    message = str(told.value)
    assert says in message
    assert str(tmp_path / "set") in message
    assert "\n" not in message


def test_missing_labels_are_named(written):
    with pytest.raises(
        UserError, match="has no labels MQ, only SA, VQ; make it again with --dimensions SA,MQ"
    ):
        open_pairs(written[1], ("SA", "MQ"))


def test_a_video_that_is_none_is_named_by_its_pair(written):
    with pytest.raises(UserError, match="pair 1, video_A: is no video"):
        read_video(open_pairs(written[1], ("SA",))[1].videos[0])


def test_nothing_that_the_folder_names_is_imported(written, tmp_path, monkeypatch):
    shutil.copytree(written[1], tmp_path / "set")
    (tmp_path / "intruder.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(tmp_path / "set" / INFO, moduleName="intruder")
    (tmp_path / "set" / "features.json").write_text(
        json.dumps({"pythonClassName": "intruder.Feature", "featuresDict": {"features": {}}})
    )
    assert content(open_pairs(tmp_path / "set", ("SA",))[0]) == content(
        load_pairs(written[0], ("SA",))[0]
    )
    assert "intruder" not in sys.modules


def test_a_missing_package_says_what_to_install(written, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.delitem(sys.modules, "jax_idgrpo.preferences.tfds_builder")
    monkeypatch.delattr(preferences, "tfds_builder")
    with pytest.raises(
        UserError, match=r"need tensorflow-datasets .*pip install 'jax-idgrpo\[data\]'"
    ):
        open_pairs(written[1], ("SA",))
    with pytest.raises(UserError, match="pip install"):
        cli.run(["pack-pairs", "--csv", str(written[0]), "--out", str(tmp_path / "set")])
    assert not list(tmp_path.iterdir())
    assert len(open_pairs(written[0], ("SA",))) == 48  # a CSV needs nothing


def test_a_data_set_appears_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    table = write_csv(tmp_path / "csv", 3)
    command = ["pack-pairs", "--csv", str(table), "--out", str(tmp_path / "set")]
    for name, says in (("MQ", "needs one column MQ"), ("SA,SA,", "needs one column ")):
        with pytest.raises(UserError, match=says):
            cli.run([*command, "--dimensions", name])
    read = tfds_builder.example

    def fails_at_the_last(pair, dimensions):
        if pair.videos[0].name == "2.bin":
            pair.videos[0].unlink()
        return read(pair, dimensions)

    with monkeypatch.context() as patch:
        patch.setattr(tfds_builder, "example", fails_at_the_last)
        with pytest.raises(
            UserError, match=r"2\.bin: cannot be read \(No such file or directory\)"
        ):
            cli.run(command)
    assert [path.name for path in tmp_path.iterdir()] == ["csv"]
    (tmp_path / "set").mkdir()
    shutil.copy(tmp_path / "csv" / "1.bin", tmp_path / "csv" / "2.bin")
    with pytest.raises(UserError, match="exists already"):
        cli.run(command)
    (tmp_path / "set").rmdir()
    cli.run(command)
    assert len(open_pairs(tmp_path / "set", ("SA",))) == 3


def test_files_that_name_others_are_no_videos(tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((5, 32, 32, 3), np.float32), 8)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    with pytest.raises(UserError, match=r"list.mp4: is no video"):
        read_video(tmp_path / "list.mp4")
    with pytest.raises(UserError, match=r"list.mp4: is no video"):
        read_frames(tmp_path / "list.mp4", 5, (32, 32), 8)
    assert read_frames(tmp_path / "a.mp4", 5, (32, 32), 8).shape == (5, 32, 32, 3)
    assert read_video(str(tmp_path / "a.mp4")).shape == (5, 32, 32, 3)
