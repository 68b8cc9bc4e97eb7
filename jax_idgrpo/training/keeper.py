"""What a run keeps: checkpoints and the exported adapter, never those of an adapter that has diverged over good ones."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jax_idgrpo.config import Config
from jax_idgrpo.models.wan import WanConfig
from jax_idgrpo.parallel.hosts import any_process, to_host
from jax_idgrpo.sampling.adapters import save_lora, saved_step
from jax_idgrpo.training.checkpoint import save
from jax_idgrpo.training.state import TrainState


@dataclasses.dataclass
class Keeper:
    """Writes checkpoints with their exports, and leaves out the states of which no update was finite.

    A diverged adapter shows in the step after it, whose gradient is not finite. Such a step changes nothing and is `doubtful`: it is
    not saved, and a checkpoint that was due is written after the next step that works.

    manager: of the checkpoints. export: folder of the adapter. config: the run. transformer: the policy's, with its adapter.
    kept: step of the newest checkpoint and its export. postponed: whether a checkpoint is due that could not be written.
    """

    manager: Any
    export: Path
    config: Config
    transformer: WanConfig
    kept: int = 0
    doubtful: bool = False
    postponed: bool = False

    def judge(self, row: Mapping[str, float], nothing_to_train: bool) -> None:
        """Note whether a step worked.

        Args:
          row: what it logged.
          nothing_to_train: whether the step was skipped because no video was left to train on, which says nothing of the adapter.
        """
        self.doubtful = row["skipped"] == 1 and not nothing_to_train

    def keep_if_due(self, state: TrainState, done: int) -> None:
        """Write a checkpoint with its export when `done` steps are a multiple of `run.save_every`, or all."""
        settings = self.config.run
        due = self.postponed or done % settings.save_every == 0 or done == settings.steps
        self.postponed = due and self.doubtful
        if due:
            self.keep(state, done)

    def keep(self, state: TrainState, done: int) -> None:
        """Write the checkpoint and the export after `done` steps, unless they are there, nothing was done, or the step is doubtful."""
        if done != self.kept and not self.doubtful:
            save(self.manager, done, state)
            self._export(state, done)

    def begin(self, state: TrainState) -> None:
        """Take up a run at its first or its resumed state; a process that was killed before an export left that to be done."""
        self.kept = int(state.step)
        if any_process(self.kept > 0 and saved_step(self.export) != self.kept):
            self._export(state, self.kept)

    def advice(self, failed: int, done: int) -> str:
        """What to do when the last `failed` of `done` steps had no finite update, as the end of a message."""
        again = "start again in another --workdir with a lower --optimizer.learning_rate"
        if 0 < self.kept < done - failed:
            again += f", from this run's adapter of step {self.kept} with --model.adapter {self.export} or without"
        return f"see rewards_failed and gradient_norm in {self.export.parent / 'metrics.jsonl'}, and {again}"

    def _export(self, state: TrainState, done: int) -> None:
        ema = to_host(state.ema)
        if jax.process_index() == 0:
            save_lora(self.export, ema, self.transformer, dataclasses.asdict(self.config), done)
        self.kept = done
