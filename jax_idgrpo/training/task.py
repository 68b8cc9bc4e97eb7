"""What supervised training trains: a `Task` names a network, its batches, its loss and how it is stored.

`jax_idgrpo.training.finetune` runs any of them. One module per task, each with `make(config) -> Task`.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jax_idgrpo.config import Config
from jax_idgrpo.errors import UserError

TASKS = {
    "vae": "jax_idgrpo.synthetic.training.vae",
    "text": "jax_idgrpo.synthetic.training.text",
    "transformer": "jax_idgrpo.synthetic.training.transformer",
    "detector": "jax_idgrpo.synthetic.training.detector",
    "embedder": "jax_idgrpo.synthetic.training.embedder",
    "reward_face": "jax_idgrpo.preferences.train_head",
    "reward_vlm": "jax_idgrpo.preferences.train_vlm",
}
"""Task -> module with its `make(config)`. Modules are loaded by name, since they stand above this one."""

Loss = tuple[jax.Array, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Task:
    """One supervised problem.

    init: key -> the network at its start, from random weights or from `finetune.start`; called once, outside `jax.jit`.
    batch: (seed, step) -> the step's batch, a pytree of arrays; a pure function of its two arguments, so that a resumed run
        sees what an undisturbed one saw.
    loss: (network, batch, key) -> (scalar float32 loss, scalars to log); traced, pure but for the network's own variables.
    save: writes the network in its published layout into a folder.
    preview: writes pictures of what the network does into a folder, or None.
    trained, frozen: filters of the network's variables: what the optimizer moves, and what stays as it is and is in no checkpoint.
        Everything else changes with the network, such as running means.
    rows: digests of the user's rows that the batches are made of, so that a run is not continued on others.
    """

    init: Callable[[jax.Array], nnx.Module]
    batch: Callable[[int, int], Any]
    loss: Callable[[nnx.Module, Any, jax.Array], Loss]
    save: Callable[[nnx.Module, Path], None]
    preview: Callable[[nnx.Module, Path], None] | None = None
    trained: Any = nnx.Param
    frozen: Any = False
    rows: Sequence[str] = ()


def make_task(config: Config) -> Task:
    """The task that `config.finetune.task` names.

    Raises:
      UserError: there is no task of that name.
    """
    name = config.finetune.task
    if name not in TASKS:
        match = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"finetune.task is {name!r}; did you mean {match}? The tasks are {', '.join(TASKS)}"
        )
    return importlib.import_module(TASKS[name]).make(config)
