"""Define supervised tasks: network, batches, loss and storage.

`jax_idgrpo.training.finetune` trains any task. Each task is a module with `make(config) -> Task`.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from jax_idgrpo.config import Config
from jax_idgrpo.errors import UserError
from jax_idgrpo.sampling.weights import TrainedWeights

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
class StopRule:
    """End a run after steps in a row that get worse.

    Attributes:
      worse: whether the logged scalars of a step count as worse.
      steps: number of such steps in a row that ends the run.
      reason: what is worse and what to do, for the message.
    """

    worse: Callable[[Mapping[str, float]], bool]
    steps: int
    reason: str

    def count(self, rows: Sequence[Mapping[str, float]], before: int = 0) -> int:
        """Count the steps in a row that are worse, up to `steps`.

        Args:
          rows: logged scalars of the latest steps.
          before: steps in a row before these.
        """
        count = before
        for row in rows:
            if count < self.steps:
                count = count + 1 if self.worse(row) else 0
        return count


@dataclasses.dataclass(frozen=True)
class Task:
    """One supervised task.

    Attributes:
      init: key -> initial network, from random weights or from `finetune.start`. Called once,
        outside `jax.jit`.
      batch: (seed, step) -> batch, a pytree of arrays. Must be a pure function, so that a resumed
        run gets the same batches as an uninterrupted one.
      loss: (network, batch, key) -> (scalar float32 loss, scalars to log). Traced; pure except for
        the network's own variables. With `fixed`, its result is a fourth argument.
      save: writes the network in its published layout into a folder. Called in one process with
        arrays of its own; with `weights`, in every process with the sharded network.
      preview: writes example outputs of the network into a folder; None writes nothing.
      trained: filter of the variables that the optimizer updates.
      frozen: filter of the variables that never change and are in no checkpoint. Variables that
        match neither filter, such as running means, change with the network.
      weights: selects the weights of the initial network that are trained, with masters in float32,
        in place of the two filters; None uses the filters.
      fixed: makes, of the initial network, the arrays that the loss reads besides and that no step
        changes; None makes none.
      rows: digests of the user's rows in the batches. A run resumes only on the same rows.
      prepare: makes, in a folder of the workdir, what batches read; called before `init` in every
        process. None prepares nothing.
      evaluate: (network with averaged weights, function that places a batch on the devices) ->
        values to log about held-out data; called every `evaluate_every` steps and after the last
        one, in every process; with `weights`, first of all with the initial network. None evaluates
        nothing.
      evaluate_every: steps between evaluations.
      stop: ends a run that gets worse; None never does.
    """

    init: Callable[[jax.Array], nnx.Module]
    batch: Callable[[int, int], Any]
    loss: Callable[..., Loss]
    save: Callable[[nnx.Module, Path], None]
    preview: Callable[[nnx.Module, Path], None] | None = None
    trained: Any = nnx.Param
    frozen: Any = False
    weights: Callable[[nnx.Module], TrainedWeights] | None = None
    fixed: Callable[[nnx.Module], PyTree] | None = None
    rows: Sequence[str] = ()
    prepare: Callable[[Path], None] | None = None
    evaluate: Callable[[nnx.Module, Callable[[Any], Any]], dict[str, float]] | None = None
    evaluate_every: int = 100
    stop: StopRule | None = None


@dataclasses.dataclass(frozen=True)
class Division:
    """Divide a network into trained parameters, frozen variables, and variables that change.

    Attributes:
      graph: graph of the network.
      trained: filter of the trained variables.
      frozen: filter of the frozen variables.
      weights: the trained weights, in place of the filters; None uses the filters.
    """

    graph: nnx.GraphDef
    trained: Any
    frozen: Any
    weights: TrainedWeights | None = None

    @classmethod
    def of(cls, task: Task, network: nnx.Module) -> "Division":
        """Make the division of a task's initial network."""
        weights = None if task.weights is None else task.weights(network)
        return cls(nnx.graphdef(network), task.trained, task.frozen, weights)

    def split(self, network: nnx.Module) -> tuple[PyTree, PyTree, PyTree]:
        """Return trained parameters, frozen variables, and variables that change."""
        if self.weights is None:
            return nnx.split(network, self.trained, self.frozen, ...)[1:]
        return *self.weights.split(nnx.state(network)), ()

    def merge(self, params: PyTree, frozen: PyTree, rest: PyTree) -> nnx.Module:
        """Build a network of its parts, which it shares no variables with.

        Args:
          params: trained parameters.
          frozen: frozen variables.
          rest: variables that change.
        """
        if self.weights is None:
            return nnx.merge(self.graph, params, frozen, rest, copy=True)
        return nnx.merge(self.graph, self.weights.merge(params, frozen), copy=True)

    def masters(self, params: PyTree) -> PyTree:
        """Return the parameters that the optimizer holds; trained weights are float32."""
        if self.weights is None:
            return params
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


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
