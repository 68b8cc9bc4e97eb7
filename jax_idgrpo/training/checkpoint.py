"""Checkpoints of a run: written so that a kill at any moment loses only the steps since the last one, and read back bit for bit.

A checkpoint is a flat mapping from names to arrays, so that it does not depend on the classes that hold them, with a checksum of
every array, because a flipped bit in stored numbers is otherwise read without complaint. A workdir holds `checkpoints/<step>/`
(orbax) and `config.json`, the configuration that made them.
"""

import contextlib
import fnmatch
import json
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jax_idgrpo.config import Config
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel.hosts import any_process
from jax_idgrpo.workdir import write_text

T = TypeVar("T")

MAY_CHANGE = ("run.steps", "run.save_every", "run.keep", "run.sample_every", "run.give_up_after", "run.watch_*", "run.wandb",
              "model.text_memory", "mesh.*", "evaluate.*", "finetune.out", "finetune.log_every")
"""Fields that a resumed run may set anew: they say how long, how often and where, and change no number of a step but, for another mesh,
by rounding."""

_CHECKSUMS = "checksums"

TERMINATED = 128 + signal.SIGTERM
"""Exit status after SIGTERM, as a shell gives it."""


def check_resume(old_config_json: str, new_config: Config, may_change: tuple[str, ...] = MAY_CHANGE) -> None:
    """Refuse to continue a run whose numbers would no longer be those of the configuration that began it.

    Args:
      old_config_json: `Config.to_json()` of the run in the workdir.
      may_change: patterns of `section.field` that may differ. A cosine schedule depends on the run's length, so `run.steps` is
        then held fixed whatever this says.

    Raises:
      UserError: fields that differ, by name, with both values.
    """
    old, new = (
        {f"{section}.{field}": value for section, fields in json.loads(text).items() for field, value in fields.items()}
        for text in (old_config_json, new_config.to_json())
    )
    if new.get("optimizer.schedule") == "cosine":
        may_change = tuple(name for name in may_change if name != "run.steps")
    missing = "(absent)"
    differing = [name for name in {**old, **new} if old.get(name, missing) != new.get(name, missing)]
    refused = [name for name in differing if not any(fnmatch.fnmatchcase(name, pattern) for pattern in may_change)]
    if refused:
        changes = ", ".join(f"{name} was {old.get(name, missing)!r} and is {new.get(name, missing)!r}" for name in refused)
        raise UserError(f"cannot resume exactly: {changes}; restore the old values or start in another --workdir")


def open_checkpoints(workdir: Path, keep: int) -> ocp.CheckpointManager:
    """The manager of `workdir/checkpoints`, keeping the newest `keep`; close it when done, or use it as a context."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(
        (workdir / "checkpoints").absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
    )


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path; keys of random numbers as their bits."""

    def name(path: Any) -> str:
        return re.sub(r"\.(raw_)?value$", "", jax.tree_util.keystr(path, simple=True, separator="."))

    def bits(leaf: jax.Array) -> jax.Array:
        return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return {name(path): bits(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _rebuild(target: T, named: dict[str, jax.Array]) -> T:
    """`target` with its leaves replaced by those of `named`, which lists them in the same order."""
    leaves = [
        jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else value
        for leaf, value in zip(jax.tree.leaves(target), named.values(), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


@jax.jit
def _checksums(named: dict[str, jax.Array]) -> jax.Array:
    """uint32 [leaves]: the sum of each array's bits times odd weights by position, exact in any order and under any sharding."""

    def one(x: jax.Array) -> jax.Array:
        bits = x.view(f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        position = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(x.shape):
            position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)

    return jnp.stack([one(x) for x in jax.tree.leaves(named)])


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Write the state after `step` steps and return when it is complete; a step that is already there is left alone."""
    if step in manager.all_steps():
        return
    named = _named(state)
    if not manager.save(step, args=ocp.args.StandardSave({**named, _CHECKSUMS: _checksums(named)}), force=True):
        raise RuntimeError(f"{manager.directory}: orbax did not write step {step}")


def _read(manager: ocp.CheckpointManager, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays of one checkpoint.

    Raises:
      UserError: it holds other arrays than `wanted`.
      Exception: of many types, when a file is not whole.
    """
    metadata = manager.item_metadata(step)
    if metadata is None:
        raise FileNotFoundError("its metadata is missing")
    found = {name: leaf for name, leaf in metadata.tree.items() if name != _CHECKSUMS}
    stored, expected = ({name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()} for leaves in (found, wanted))
    differing = sorted(name for name in {**stored, **expected} if stored.get(name) != expected.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"checkpoint {manager.directory / str(step)}: {len(differing)} arrays differ from the network's, first {name} "
            f"({stored.get(name, 'absent')} there, {expected.get(name, 'absent')} here); start in another --workdir"
        )
    checksums = jax.ShapeDtypeStruct((len(wanted),), jnp.uint32, sharding=_whole(next(iter(wanted.values())).sharding))
    restored = manager.restore(step, args=ocp.args.StandardRestore({**wanted, _CHECKSUMS: checksums}))
    stored_sums = restored.pop(_CHECKSUMS)
    if not bool(jnp.array_equal(stored_sums, _checksums(restored))):
        raise ValueError("its numbers do not match their checksums")
    return {name: restored[name] for name in wanted}


def _whole(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The devices of `sharding`, each holding the whole array."""
    return jax.NamedSharding(sharding.mesh, jax.P()) if isinstance(sharding, jax.NamedSharding) else sharding


def restore(manager: ocp.CheckpointManager, target: T) -> T | None:
    """The newest state that can be read, with the dtypes and the sharding of `target`; None when there is no checkpoint.

    A damaged checkpoint is moved to `checkpoints-damaged/` with a warning, and the one before it is read.

    Args:
      target: a state of arrays of which only shapes, dtypes and shardings are used.

    Raises:
      UserError: a checkpoint holds other arrays than the target, or none of them can be read.
    """
    named = _named(target)
    wanted = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in named.items()}
    damaged = []
    for step in sorted(manager.all_steps(), reverse=True):
        reason, restored = "", {}
        try:
            restored = _read(manager, step, wanted)
        except UserError:
            raise
        except Exception as error:  # orbax and tensorstore raise many types for a file that is not whole
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        if any_process(reason != ""):
            reason = reason or "another process cannot read its part"
            warnings.warn(f"checkpoint {manager.directory / str(step)} is damaged ({reason}); trying the one before", stacklevel=2)
            damaged.append(step)
            continue
        _set_aside(manager, damaged)
        return _rebuild(target, restored)
    if damaged:
        raise UserError(f"checkpoints {manager.directory}: none of the {len(damaged)} can be read; move the folder away to start anew")
    return None


def _set_aside(manager: ocp.CheckpointManager, steps: list[int]) -> None:
    """Move damaged checkpoints out of the manager's sight, so that their steps can be written again."""
    if jax.process_index() == 0:
        for step in steps:
            place = Path(manager.directory).with_name("checkpoints-damaged") / str(step)
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(exist_ok=True)
            shutil.move(Path(manager.directory) / str(step), place)
    manager.reload()


def resume(workdir: Path, config: Config, manager: ocp.CheckpointManager, state: T) -> T:
    """The state to go on from: the newest in the workdir, or `state` when there is none. Records the configuration.

    Raises:
      UserError: the configuration changed in a way that breaks exactness, or the checkpoints cannot be used.
    """
    path = workdir / "config.json"
    if manager.all_steps() and path.exists():
        check_resume(path.read_text(), config)
    restored = restore(manager, state)
    if jax.process_index() == 0:
        write_text(path, config.to_json())
    return state if restored is None else restored


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM only sets a mark, which the yielded function reads: the loop saves and exits with `TERMINATED`."""
    requested = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: requested.set())
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
