"""Define supervised tasks: network, batches, loss and storage.

`jax_idgrpo.training.finetune` trains any task. Each task is a module with `make(config) -> Task`.
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
    "adapter": "jax_idgrpo.preferences.train_adapter",
}
"""Task -> module with `make(config)`.

Modules are imported by name, because their packages depend on this one."""

FITTED = {"reward_linear": "jax_idgrpo.preferences.train_linear"}
"""Task -> module with `train(config, workdir)`, for tasks that are solved at once, without steps."""

Loss = tuple[jax.Array, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Task:
    """One supervised task.

    Attributes:
      init: key -> initial network, from random weights or from `finetune.start`. Called once,
        outside `jax.jit`.
      batch: (seed, step) -> batch, a pytree of arrays. Must be a pure function, so that a resumed
        run gets the same batches as an uninterrupted one.
      loss: (network, batch, key) -> (scalar float32 loss, scalars to log). Traced; pure except for
        the network's own variables.
      save: writes the network in its published layout into a folder.
      preview: writes example outputs of the network into a folder; None writes nothing.
      trained: filter of the variables that the optimizer updates.
      frozen: filter of the variables that never change and are in no checkpoint. Variables that
        match neither filter, such as running means, change with the network.
      rows: digests of the user's rows in the batches. A run resumes only on the same rows.
      prepare: makes, in a folder of the workdir, what batches read; called before `init` in every
        process. None prepares nothing.
      evaluate: (network with averaged weights, function that places a batch on the devices) ->
        values to log about held-out data; called every `evaluate_every` steps and after the last
        one, in every process. None evaluates nothing.
      evaluate_every: steps between evaluations.
    """

    init: Callable[[jax.Array], nnx.Module]
    batch: Callable[[int, int], Any]
    loss: Callable[[nnx.Module, Any, jax.Array], Loss]
    save: Callable[[nnx.Module, Path], None]
    preview: Callable[[nnx.Module, Path], None] | None = None
    trained: Any = nnx.Param
    frozen: Any = False
    rows: Sequence[str] = ()
    prepare: Callable[[Path], None] | None = None
    evaluate: Callable[[nnx.Module, Callable[[Any], Any]], dict[str, float]] | None = None
    evaluate_every: int = 100


def make_task(config: Config) -> Task:
    """Make the task with the name `config.finetune.task`.

    Raises:
      UserError: no task has this name.
    """
    name = config.finetune.task
    if name not in TASKS:
        known = [*TASKS, *FITTED]
        match = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(
            f"finetune.task is {name!r}; did you mean {match}? The tasks are {', '.join(known)}"
        )
    return importlib.import_module(TASKS[name]).make(config)
