"""Save and restore checkpoints of a run.

A killed run loses only the steps since its last checkpoint. Restoring is bitwise exact.

A checkpoint is a flat mapping from names to arrays, independent of the classes that hold them. It
stores a checksum of every array, since orbax does not detect every flipped bit. A workdir holds
`checkpoints/<step>/` (orbax), `config.json`, the configuration of the run, and `rows.json`, digests
of the rows that the run reads.

Several processes share one checkpoint, and each reads only the part that its devices hold. A
damaged file may be read by one process only. Therefore all processes decide together which steps
exist and whether a step is readable. Functions marked "(collective)" must be called by all.
"""

import dataclasses
import errno
import fnmatch
import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import describe_change
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel.hosts import barrier, gather_objects
from jax_idgrpo.rewards.faces import Settings, reward_settings
from jax_idgrpo.workdir import write_text

T = TypeVar("T")

MAY_CHANGE = (
    "run.steps",
    "run.save_every",
    "run.keep",
    "run.sample_every",
    "run.give_up_after",
    "run.watch_*",
    "run.wandb",
    "model.text_memory",
    "model.experts_idle",
    "mesh.*",
    "evaluate.*",
    "reward.http_*",
    "finetune.out",
    "finetune.log_every",
)
"""Fields that may differ on resume: lengths, intervals, paths and the mesh.

They change no result of a step, except that another mesh changes rounding."""

_CHECKSUMS = "checksums"
_ITEM = "default"  # orbax's folder for the arrays of a step
_NO_ROOM = re.compile(r"No space left on device|Disk quota exceeded|ENOSPC|EDQUOT")


def _fields(config_json: str) -> dict[str, Any]:
    """Return the values of a stored configuration by `section.field`."""
    sections = json.loads(config_json).items()
    return {
        f"{section}.{field}": value
        for section, fields in sections
        for field, value in fields.items()
    }


def check_resume(
    old_config_json: str, new_config: Config, may_change: tuple[str, ...] = MAY_CHANGE
) -> None:
    """Refuse to resume a run with a configuration that would change its results.

    A field that is absent from the stored configuration counts as its default, which keeps the
    earlier behaviour.

    Args:
      old_config_json: `Config.to_json()` of the run in the workdir.
      new_config: the present configuration.
      may_change: patterns of `section.field` that may differ. With a cosine schedule, which depends
        on the run's length, `run.steps` may not differ either.

    Raises:
      UserError: names the fields that differ, with both values.
    """
    old, new = _fields(old_config_json), _fields(new_config.to_json())
    defaults = _fields(Config().to_json())
    old = {name: value for name, value in defaults.items() if name in new} | old
    if new.get("optimizer.schedule") == "cosine":
        may_change = tuple(name for name in may_change if name != "run.steps")
    if all(str(values.get("reward.backend")).startswith("http") for values in (old, new)):
        may_change = (*may_change, "reward.backend")  # a server may move
    cosines = [field.name for field in dataclasses.fields(Settings)]
    if any(old.get(f"reward.{name}") != new.get(f"reward.{name}") for name in cosines):
        left_out: dict[str, Any] = dict.fromkeys(cosines)
        networks = reward_settings(dataclasses.replace(new_config.reward, **left_out))
        for values in (old, new):  # an empty field equals the networks' own value
            for name in cosines:
                if values.get(f"reward.{name}") is None:
                    values[f"reward.{name}"] = getattr(networks, name)
    missing = "(absent)"
    differing = [
        name for name in {**old, **new} if old.get(name, missing) != new.get(name, missing)
    ]
    refused = [
        name
        for name in differing
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in may_change)
    ]
    if refused:
        changes = ", ".join(
            f"{name} was {old.get(name, missing)!r} and is {new.get(name, missing)!r}"
            for name in refused
        )
        raise UserError(
            f"cannot resume exactly: {changes}; restore the old values or start in another "
            "--workdir"
        )


def open_checkpoints(workdir: Path, keep: int) -> ocp.CheckpointManager:
    """Open `workdir/checkpoints` and keep only the newest `keep` steps (collective).

    Close the manager after use, or use it as a context.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(
        (workdir / "checkpoints").absolute(),
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),
    )


def _named(tree: PyTree) -> dict[str, jax.Array]:
    """Map the path of each leaf to the leaf. Random keys are converted to their bits."""

    def name(path: KeyPath) -> str:
        return re.sub(
            r"\.(raw_)?value$", "", jax.tree_util.keystr(path, simple=True, separator=".")
        )

    def bits(leaf: jax.Array) -> jax.Array:
        return (
            jax.random.key_data(leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )

    return {name(path): bits(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _rebuild(target: T, named: dict[str, jax.Array]) -> T:
    """Replace the leaves of `target` by the values of `named`, which are in the same order."""
    leaves = [
        jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else value
        for leaf, value in zip(jax.tree.leaves(target), named.values(), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


@jax.jit
def _checksums(named: dict[str, jax.Array]) -> jax.Array:
    """Compute one checksum per array, uint32 [leaves].

    A checksum is the sum of the array's bits, weighted by odd numbers that depend on the position,
    modulo 2^32. It is exact in any order of summation and under any sharding.
    """

    def one(x: jax.Array) -> jax.Array:
        bits = x.view(f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        position = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(x.shape):
            position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, x.shape, axis
            )
        return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)

    return jnp.stack([one(x) for x in jax.tree.leaves(named)])


def stored_steps(manager: ocp.CheckpointManager) -> list[int]:
    """List the steps that process 0 finds, in every process (collective).

    Network file systems cache listings, so processes may see different steps for a while.
    """
    return list(gather_objects(list(manager.all_steps()))[0])


def _is_full(error: BaseException | None) -> bool:
    """Return whether the error, or an error that caused it, reports a full disk."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return _NO_ROOM.search(str(error)) is not None or _is_full(error.__cause__ or error.__context__)


def save(manager: ocp.CheckpointManager, step: int, state: PyTree) -> None:
    """Write the state after `step` steps and wait until it is complete (collective).

    Does nothing for a step that is already stored.

    Args:
      manager: checkpoint manager of the workdir.
      step: training steps done.
      state: any pytree of arrays.

    Raises:
      UserError: the disk is full. Earlier checkpoints are untouched.
    """
    if step in stored_steps(manager):
        return
    named = _named(state)
    whole = {**named, _CHECKSUMS: _checksums(named)}
    try:
        written = manager.save(step, args=ocp.args.StandardSave(whole), force=True)
    except Exception as error:  # tensorstore raises ValueError for a full disk, not OSError
        if not _is_full(error):
            raise
        raise UserError(
            f"checkpoint {manager.directory / str(step)}: no space left on the disk; the "
            "checkpoints before it are whole: free space, or lower run.keep, and run the same "
            "command again"
        ) from None
    if not written:
        raise RuntimeError(f"{manager.directory}: orbax did not write step {step}")


def _read(folder: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read this process's part of one checkpoint. Not collective: it may fail in only one process.

    Args:
      folder: folder of one step's arrays, in orbax's format.
      wanted: shapes, dtypes and shardings by name.

    Returns:
      The arrays by name, and the stored checksums.

    Raises:
      UserError: names, shapes or dtypes differ from `wanted`.
      Exception: a file is damaged; the type varies.
    """
    handler = ocp.StandardCheckpointHandler()
    found = {
        name: leaf for name, leaf in handler.metadata(folder).tree.items() if name != _CHECKSUMS
    }
    stored, expected = (
        {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}
        for leaves in (found, wanted)
    )
    differing = sorted(
        name for name in {**stored, **expected} if stored.get(name) != expected.get(name)
    )
    if differing:
        name = differing[0]
        raise UserError(
            f"checkpoint {folder.parent}: {len(differing)} arrays differ from the network's, first "
            f"{name} ({stored.get(name, 'absent')} there, {expected.get(name, 'absent')} here); "
            "start in another --workdir"
        )
    checksums = jax.ShapeDtypeStruct(
        (len(wanted),), jnp.uint32, sharding=_whole(next(iter(wanted.values())).sharding)
    )
    restored = handler.restore(
        folder, args=ocp.args.StandardRestore({**wanted, _CHECKSUMS: checksums})
    )
    return {name: restored[name] for name in (*wanted, _CHECKSUMS)}


def _read_together(
    folder: Path, wanted: dict[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, jax.Array], str]:
    """Read one checkpoint in all processes (collective).

    Returns:
      The arrays and "", or no arrays and a description of the damage. The same in all processes.

    Raises:
      UserError: names, shapes or dtypes differ from `wanted`. If one process raises it, all do.
    """
    restored, refusal, damage = {}, "", ""
    try:
        restored = _read(folder, wanted)
    except UserError as error:
        refusal = str(error)
    except Exception as error:  # orbax and tensorstore raise many types for a damaged file
        damage = (str(error) or type(error).__name__).splitlines()[0][:200]
    outcomes = gather_objects([refusal, damage])
    if refused := [text for text, _ in outcomes if text]:
        raise UserError(refused[0])
    if failed := [(number, text) for number, (_, text) in enumerate(outcomes) if text]:
        number, text = failed[0]
        return {}, text if len(outcomes) == 1 else f"process {number}: {text}"
    if not bool(jnp.array_equal(restored.pop(_CHECKSUMS), _checksums(restored))):
        return {}, "its numbers do not match their checksums"
    return restored, ""


def _whole(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Return the sharding that replicates over the devices of `sharding`."""
    return (
        jax.NamedSharding(sharding.mesh, jax.P())
        if isinstance(sharding, jax.NamedSharding)
        else sharding
    )


def restore(manager: ocp.CheckpointManager, target: T) -> T | None:
    """Read the newest intact checkpoint, with the dtypes and shardings of `target` (collective).

    A damaged checkpoint is moved to `checkpoints-damaged/` with a warning, and the previous one is
    read instead.

    Returns:
      The restored tree, or None if there is no checkpoint.

    Raises:
      UserError: names, shapes or dtypes differ from those of the target, or no checkpoint is
        intact.
    """
    named = _named(target)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in named.items()
    }
    damaged = []
    for step in sorted(stored_steps(manager), reverse=True):
        folder = Path(manager.directory) / str(step)
        restored, reason = _read_together(folder / _ITEM, wanted)
        if reason:
            warnings.warn(
                f"checkpoint {folder} is damaged ({reason}); trying the one before", stacklevel=2
            )
            damaged.append(step)
            continue
        _set_aside(manager, damaged)
        return _rebuild(target, restored)
    if damaged:
        raise UserError(
            f"checkpoints {manager.directory}: none of the {len(damaged)} can be read; move the "
            "folder away to start anew"
        )
    return None


def _set_aside(manager: ocp.CheckpointManager, steps: list[int]) -> None:
    """Move damaged checkpoints away, so that their steps can be written again (collective)."""
    if not steps:
        return
    if jax.process_index() == 0:
        for step in steps:
            place = Path(manager.directory).with_name("checkpoints-damaged") / str(step)
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(exist_ok=True)
            shutil.move(Path(manager.directory) / str(step), place)
    barrier("damaged checkpoints are moved")  # before any process lists the folder again
    manager.reload()


def check_rows(path: Path, rows: Sequence[str]) -> None:
    """Refuse to resume a run on other data.

    Args:
      path: file with the digests of the run's rows. Not compared if the file is missing, as in
        runs of earlier versions.
      rows: digests of the present rows.

    Raises:
      UserError: names the rows that changed.
    """
    if path.exists() and (change := describe_change(json.loads(path.read_text()), rows)):
        raise UserError(
            f"cannot resume exactly: the data is not what the run in {path.parent} began with: "
            f"{change}; restore it, or start in another --workdir"
        )


def keep_base(workdir: Path, loras: Mapping[str, str], resumes: bool) -> None:
    """Store the digests of the LoRA files that are merged into the base of a run.

    Args:
      workdir: folder of the run.
      loras: path -> digest of the content.
      resumes: whether the workdir has a checkpoint, so that the files must be the same.

    Raises:
      UserError: the run began with other files.
    """
    path = workdir / "base_loras.json"
    if resumes and path.exists():
        before = json.loads(path.read_text())
        if changed := [name for name in loras if loras[name] != before.get(name)]:
            raise UserError(
                f"cannot resume exactly: the content of {changed[0]}, which is merged into the "
                f"base, is not what the run in {workdir} began with; restore it, or start in "
                "another --workdir"
            )
    if jax.process_index() == 0 and loras:
        write_text(path, json.dumps(dict(loras)))


def resume(
    workdir: Path,
    config: Config,
    manager: ocp.CheckpointManager,
    state: T,
    rows: Sequence[str] = (),
) -> T:
    """Restore the newest state of the workdir, or return `state` if it has none (collective).

    Stores the configuration and the digests of the rows for the next resume.

    Args:
      workdir: folder of the run.
      config: the present configuration.
      manager: checkpoint manager of the workdir.
      state: initial state, with the shapes, dtypes and shardings to restore to.
      rows: digests of the rows that the run reads, by `row_digests`. Not compared if empty.

    Raises:
      UserError: the configuration or the rows changed in a way that changes results, or the
        checkpoints are unusable.
    """
    path, listed = workdir / "config.json", workdir / "rows.json"
    if stored_steps(manager):
        if path.exists():
            check_resume(path.read_text(), config)
        if rows:
            check_rows(listed, rows)
    restored = restore(manager, state)
    if jax.process_index() == 0:
        if rows:
            write_text(listed, json.dumps(list(rows)))
        write_text(path, config.to_json())
    return state if restored is None else restored
