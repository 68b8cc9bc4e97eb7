"""Checkpoints: the bits come back, damage is survived, a changed configuration is refused by name."""

import dataclasses
import errno
import os
import shutil
import warnings
from pathlib import Path

import jax
import pytest

from jax_idgrpo.config import Config, OptimizerConfig
from jax_idgrpo.data.prompts import Prompt, row_digests
from jax_idgrpo.errors import UserError
from jax_idgrpo.training.checkpoint import check_resume, open_checkpoints, restore, resume, save
from jax_idgrpo.workdir import prepare_workdir
from tests.helpers.checkpoint import WIDE, make_state, same

# Reads that fail leave coroutines of orbax behind, which complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def manager(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as manager:
        yield manager


def test_the_bits_come_back_and_the_newest_are_kept(tmp_path, manager):
    assert restore(manager, make_state(0)) is None
    for step in (3, 6, 9):
        save(manager, step, make_state(step))
    save(manager, 9, make_state(9))
    assert same(restore(manager, make_state(0)), make_state(9))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [6, 9]


def test_restores_with_the_sharding_of_the_target(manager):
    save(manager, 1, make_state(1))
    sharding = jax.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P())
    restored = restore(manager, jax.device_put(make_state(0), sharding))
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored))


def test_another_network_is_refused(tmp_path, manager):
    save(manager, 1, make_state(1))
    with pytest.raises(
        UserError, match=r"blocks\.kernel \(float32\[2, 3\] there, float32\[2, 4\] here\)"
    ):
        restore(manager, make_state(0, width=4))
    assert (tmp_path / "checkpoints" / "1").is_dir()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [truncate, flip, Path.unlink], ids=["truncated", "flipped", "lost"]
)
def test_damage_to_any_file_costs_at_most_the_newest_checkpoint(tmp_path, damage):
    """Whatever file is hit: the bits of the newest checkpoint, or with a warning of the one before; never other numbers."""
    with open_checkpoints(tmp_path / "whole", keep=2) as manager:
        save(manager, 3, make_state(3, WIDE))
        save(manager, 6, make_state(6, WIDE))
    folder = tmp_path / "whole" / "checkpoints" / "6"
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    survivors = []
    for name in names:
        copy = shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        damage(copy / "checkpoints" / "6" / name)
        with (
            warnings.catch_warnings(record=True) as caught,
            open_checkpoints(copy, keep=2) as manager,
        ):
            warnings.simplefilter("always", UserWarning)
            state = restore(manager, make_state(0, WIDE))
            step = int(state.step)
            assert same(state, make_state(step, WIDE)), name
            assert step == (
                3 if any("checkpoints/6 is damaged" in str(w.message) for w in caught) else 6
            )
            survivors.append(step)
            save(manager, 6, make_state(6, WIDE))
            assert same(restore(manager, make_state(0, WIDE)), make_state(6, WIDE))
        shutil.rmtree(copy)
    assert {3, 6} == set(survivors)


def test_all_damaged_is_an_error_and_deletes_nothing(tmp_path, manager):
    save(manager, 3, make_state(3))
    manifest = tmp_path / "checkpoints" / "3" / "default" / "manifest.ocdbt"
    truncate(manifest)
    with (
        pytest.raises(UserError, match="none of the 1 can be read"),
        pytest.warns(UserWarning, match="damaged"),
    ):
        restore(manager, make_state(0))
    assert manifest.exists()


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as manager:
        save(manager, 3, make_state(3))
    shutil.copytree(
        tmp_path / "checkpoints" / "3", tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp-17"
    )
    with open_checkpoints(tmp_path, keep=2) as manager:
        assert same(restore(manager, make_state(0)), make_state(3))


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (
            ValueError(
                "RESOURCE_EXHAUSTED: Error writing local file: [OS error 28: ENOSPC No space left on device]"
            ),
            True,
        ),
        (
            ValueError(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes"
            ),
            False,
        ),
        (PermissionError(errno.EACCES, "Permission denied"), False),
    ],
)
def test_only_a_full_disk_is_told_as_one(manager, monkeypatch, error, full):
    """Whatever is raised, and however deep in orbax."""

    def fail(*_, **__):
        try:
            raise error
        except type(error) as cause:
            raise RuntimeError("a thread failed") from cause

    monkeypatch.setattr(manager, "save", fail)
    with pytest.raises(
        UserError if full else RuntimeError,
        match="no space left on the disk" if full else "a thread failed",
    ):
        save(manager, 3, make_state(3))


def change(config: Config, **sections) -> Config:
    """`config` with fields of sections replaced."""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **fields)
            for name, fields in sections.items()
        },
    )


def test_what_may_change_on_resume():
    old = Config()
    new = change(
        old,
        run={"steps": 7, "save_every": 2, "keep": 9, "sample_every": 0, "wandb": "x"},
        evaluate={"steps": 3, "batch": 2},
        mesh={"data": 1, "fsdp": -1},
        model={"text_memory": "host"},
    )
    check_resume(old.to_json(), new)


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({"run": {"seed": 1}}, ["run.seed was 42 and is 1"]),
        (
            {"grpo": {"clip": 0.5}, "model": {"rank": 4}},
            ["model.rank was 32 and is 4", "grpo.clip was 0.001 and is 0.5"],
        ),
        ({"finetune": {"options": {"width": 3}}}, ["finetune.options was {} and is {'width': 3}"]),
    ],
)
def test_what_may_not_is_named(sections, names):
    with pytest.raises(UserError) as refused:
        check_resume(
            Config().to_json(),
            change(
                Config(),
                run={**sections.get("run", {}), "steps": 7},
                **{k: v for k, v in sections.items() if k != "run"},
            ),
        )
    assert all(name in str(refused.value) for name in names)
    assert "run.steps" not in str(refused.value)


def test_a_cosine_schedule_holds_the_length():
    old = Config(optimizer=OptimizerConfig(schedule="cosine"))
    with pytest.raises(UserError, match=r"run\.steps was 1000 and is 7"):
        check_resume(old.to_json(), change(old, run={"steps": 7}))


def test_cosines_written_out_are_those_left_to_the_networks():
    """Runs from before the networks stored them go on, and other numbers are refused."""
    written = change(
        Config(), reward={"similarity_low": 0.0, "similarity_high": 0.9, "missing": 0.15}
    )
    check_resume(written.to_json(), Config())
    check_resume(Config().to_json(), written)
    for old, new in (
        (written, change(Config(), reward={"missing": 0.3})),
        (change(Config(), reward={"missing": 0.3}), Config()),
    ):
        with pytest.raises(
            UserError, match=r"cannot resume exactly: reward\.missing was 0\.\d+ and is 0\.\d+;"
        ):
            check_resume(old.to_json(), new)


def test_resume_records_the_configuration(tmp_path, manager):
    state = make_state(0)
    assert resume(tmp_path, Config(), manager, state) is state
    save(manager, 4, make_state(4))
    longer = change(Config(), run={"steps": 7})
    assert same(resume(tmp_path, longer, manager, state), make_state(4))
    assert (tmp_path / "config.json").read_text() == longer.to_json()
    with pytest.raises(UserError, match=r"run\.seed"):
        resume(tmp_path, change(longer, run={"seed": 5}), manager, state)
    assert (tmp_path / "config.json").read_text() == longer.to_json()


def digests(*rows: tuple[str, bytes], folder: Path) -> list[str]:
    """Digests of prompts with one photo each."""
    prompts = []
    for number, (text, photo) in enumerate(rows):
        path = folder / f"{number}-{len(photo)}.png"
        path.write_bytes(photo)
        prompts.append(Prompt(number, text, (path,)))
    return row_digests(prompts)


def test_other_rows_under_the_same_name_are_refused(tmp_path, manager):
    rows = digests(
        ("Anna walks", b"a"), ("Ben sits", b"bb"), ("Carl runs", b"ccc"), folder=tmp_path
    )
    state, config = make_state(0), Config()
    resume(tmp_path, config, manager, state, rows)
    resume(
        tmp_path, config, manager, state, rows[:1]
    )  # nothing is trained yet: the rows may change
    resume(tmp_path, config, manager, state, rows)
    save(manager, 4, make_state(4))
    assert same(resume(tmp_path, config, manager, state, rows), make_state(4))
    changed = digests(
        ("Anna walks", b"a"), ("Ben stands", b"bb"), ("Carl runs", b"dddd"), folder=tmp_path
    )
    for other, said in (
        (rows[:1], "rows 1, 2 removed"),
        (changed, "row 1 has another text; row 2 has other photos"),
    ):
        with pytest.raises(
            UserError, match=f"cannot resume exactly: .*{said}.* start in another --workdir"
        ) as refused:
            resume(tmp_path, config, manager, state, other)
        assert "\n" not in str(refused.value)
    assert same(resume(tmp_path, config, manager, state, rows), make_state(4))


def test_a_run_from_before_rows_were_stored_is_continued(tmp_path, manager):
    state = make_state(0)
    resume(tmp_path, Config(), manager, state)
    save(manager, 4, make_state(4))
    assert not (tmp_path / "rows.json").exists()
    rows = digests(("Anna walks", b"a"), folder=tmp_path)
    assert same(resume(tmp_path, Config(), manager, state, rows), make_state(4))
    with pytest.raises(UserError, match="cannot resume exactly"):
        resume(tmp_path, Config(), manager, state, [*rows, *rows])


@pytest.mark.parametrize("inside", [False, True])
def test_workdir_that_cannot_be_written(tmp_path, inside):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .* pass another folder with --workdir"):
        prepare_workdir(tmp_path / "file" / "deeper" if inside else tmp_path / "file")
