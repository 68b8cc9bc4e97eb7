"""Resolve a user's path: a name on the Hugging Face Hub, its cache, or the workdir of a run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from checkpoints_convert import hub, store
from jax_idgrpo.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
EXPORT, RUN_CONFIG = "export", "config.json"  # inside the workdir of a run


def checkpoint_place(path: str | Path) -> Path:
    """Resolve the folder or file of a checkpoint.

    An entry of the Hugging Face cache stands for its `main` snapshot, a name ORG/NAME for that
    model on the Hub.

    Raises:
      UserError: there is nothing at `path`, or no such snapshot.
    """
    path = Path(path)
    if not path.exists():
        if hub.is_name(path):
            return hub.fetched(path)
        raise UserError(f"{path}: does not exist; check the path")
    if not path.is_dir():
        return path
    if hub.is_entry(path):
        return hub.snapshot(path)
    hub.refuse_cache(path)
    return path


def run_config(workdir: Path) -> dict[str, Any] | None:
    """Read the configuration of a run from its workdir; None for any other folder."""
    file = workdir / RUN_CONFIG
    values = store.read_json(file) if file.is_file() else {}
    return values if {"model", "rollout", "grpo"} <= values.keys() else None


def is_export(path: Path) -> bool:
    """Return whether this is the place of a run's adapter, written or not."""
    return path.name == EXPORT and run_config(path.parent) is not None


def adapter_place(path: str | Path) -> Path:
    """Resolve the place of an adapter: `export/` of a run's workdir, or the path itself.

    Raises:
      UserError: there is nothing at `path`, or the run has not written its adapter yet.
    """
    path = Path(path)
    inside = path / EXPORT
    if (path / ADAPTER_CONFIG).is_file():
        return path
    if (inside / ADAPTER_CONFIG).is_file():
        return inside
    workdir = path.parent if is_export(path) and not path.exists() else path
    config = run_config(workdir)
    if config is not None and (workdir / EXPORT).exists():
        return workdir / EXPORT
    if config is not None:
        every = config.get("run", {}).get("save_every")
        when = f" (run.save_every {every})" if every else ""
        raise UserError(
            f"{workdir}: this run has not written an adapter yet{when}; wait for it, or train on"
        )
    return checkpoint_place(path)


@dataclasses.dataclass(frozen=True)
class LoRASum:
    """Adapters that are added, each at a strength.

    Attributes:
      parts: place and strength of every adapter.
    """

    parts: tuple[tuple[Path, float], ...]

    def __str__(self) -> str:
        return " + ".join(f"{path}:{scale:g}" for path, scale in self.parts)


def split_scale(text: str, option: str) -> tuple[Path, float]:
    """Split PATH[:SCALE] into the path and the strength, which is 1 if it is left out.

    A path that exists is never split.

    Args:
      text: as the user gave it.
      option: the option that it comes from, for the message.

    Raises:
      UserError: the strength is no positive number.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or not path or Path(text).exists():
        return Path(text), 1.0
    try:
        strength = float(scale)
    except ValueError:
        return Path(text), 1.0  # a colon inside the path
    if not 0 < strength < math.inf:
        raise UserError(f"{option} {text}: the scale {scale} is no positive number; use 0.5 or so")
    return Path(path), strength
