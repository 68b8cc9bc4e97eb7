"""Write checkpoints and the export, but never those of a diverged run."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jax_idgrpo.config import Config
from jax_idgrpo.models.wan import WanConfig
from jax_idgrpo.parallel.hosts import any_process, to_host
from jax_idgrpo.sampling.adapters import save_lora, saved_step
from jax_idgrpo.sampling.exports import save_checkpoint
from jax_idgrpo.training.checkpoint import save
from jax_idgrpo.training.setup import Run
from jax_idgrpo.training.state import Parameters, TrainState


@dataclasses.dataclass
class Keeper:
    """Write checkpoints with their exports, except after a step without a finite update.

    Divergence is detected in the following step, whose gradient is not finite. Such
    a step changes nothing and is `doubtful`. It is not saved. A checkpoint that was due is written
    after the next step with a finite gradient.

    Attributes:
      manager: checkpoint manager of the workdir.
      export: folder of the exported adapter or checkpoint, or of the adapters of two experts.
      config: the run.
      transformer: architecture of the policy, including its adapter.
      write_weights: writes the export of a run that trains weights, from (folder, averaged weights,
        training steps done, whether the folder is an export of this run); None for an adapter.
      kept: step of the newest checkpoint and its export.
      doubtful: whether the last step had no finite update.
      postponed: whether a checkpoint is due that was not written because of a doubtful step.
    """

    manager: Any
    export: Path
    config: Config
    transformer: WanConfig
    write_weights: Callable[[Path, Parameters, int, bool], None] | None = None
    kept: int = 0
    doubtful: bool = False
    postponed: bool = False

    def judge(self, row: Mapping[str, float], nothing_to_train: bool) -> None:
        """Record whether a step had a finite update.

        Args:
          row: logged values of the step.
          nothing_to_train: whether the step was skipped because no video was left to train on,
            which is no sign of divergence.
        """
        self.doubtful = row["skipped"] == 1 and not nothing_to_train

    def keep_if_due(self, state: TrainState, done: int) -> None:
        """Write checkpoint and export every `run.save_every` steps and after the last step."""
        settings = self.config.run
        due = self.postponed or done % settings.save_every == 0 or done == settings.steps
        self.postponed = due and self.doubtful
        if due:
            self.keep(state, done)

    def keep(self, state: TrainState, done: int) -> None:
        """Write checkpoint and export after `done` steps.

        Does nothing if they exist already, if no step was done, or if the last step is doubtful.
        """
        if done != self.kept and not self.doubtful:
            save(self.manager, done, state)
            self._export(state, done)

    def begin(self, state: TrainState) -> None:
        """Start from the initial or the restored state.

        Writes the export if an earlier process was killed between checkpoint and export.
        """
        self.kept = int(state.step)
        if any_process(self.kept > 0 and saved_step(self.export) != self.kept):
            self._export(state, self.kept)

    def advice(self, failed: int, done: int) -> str:
        """Return the end of an error message: advice after `failed` steps without finite update.

        `done` is the number of all training steps done.
        """
        again = "start again in another --workdir with a lower --optimizer.learning_rate"
        if 0 < self.kept < done - failed:
            field, what = (
                ("adapter", "adapter") if self.write_weights is None else ("path", "weights")
            )
            again += f", from this run's {what} of step {self.kept} with --model.{field} {self.export} or without"
        return f"see rewards_failed and gradient_norm in {self.export.parent / 'metrics.jsonl'}, and {again}"

    def _export(self, state: TrainState, done: int) -> None:
        if self.write_weights is None:
            ema = to_host(state.ema)
            if jax.process_index() == 0:
                save_lora(self.export, ema, self.transformer, dataclasses.asdict(self.config), done)
        else:
            reuse = self.kept > 0 and not any_process(saved_step(self.export) is None)
            self.write_weights(self.export, state.ema, done, reuse)
        self.kept = done


def weights_writer(run: Run) -> Callable[[Path, Parameters, int, bool], None] | None:
    """Return `Keeper.write_weights` of a run."""
    weights = run.policy.weights
    if weights is None:
        return None

    def write(folder: Path, average: Parameters, done: int, reuse: bool) -> None:
        state, training = weights.merge(average, run.base), dataclasses.asdict(run.config)
        save_checkpoint(folder, run.pipe, state, training, done, reuse)

    return write
