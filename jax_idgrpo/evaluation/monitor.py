"""Score a few held-out prompts during training."""

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jax_idgrpo.config import Config, prompts_file
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.evaluation import bootstrap, recognition
from jax_idgrpo.evaluation.journal import decided
from jax_idgrpo.evaluation.sampler import Model, Row, Sampler, all_rows, make_sampler
from jax_idgrpo.evaluation.scoring import Scorer, make_scorer
from jax_idgrpo.rewards.base import Reward
from jax_idgrpo.sampling import conditioning
from jax_idgrpo.sampling.pipeline import Pipeline
from jax_idgrpo.workdir import write_text


@dataclasses.dataclass(frozen=True)
class Watch:
    """Score held-out prompts by reward and judge, with one video per prompt from fixed noise.

    Attributes:
      sampler: makes the videos.
      scorer: scores the videos.
      rows: the videos to make.
      folder: output folder, with one JSON file of all videos' values per call. Files are named by
        the training step; 0 is the start of the run.
    """

    sampler: Sampler
    scorer: Scorer
    rows: Sequence[Row]
    folder: Path

    @classmethod
    def make(cls, config: Config, pipe: Pipeline, reward: Reward, folder: Path) -> "Watch":
        """Use the first `run.watch_prompts` of `evaluate.prompts`, at the training video size.

        Args:
          config: the run.
          pipe: networks of the video model.
          reward: the reward of the run, which is not loaded again.
          folder: output folder of the scores.

        Raises:
          UserError: the prompts or their photos cannot be used.
        """
        held_out = prompts_file(config.evaluate.prompts)
        listed = load_prompts(held_out, config.data.max_people, decode=False)
        conditioning.refuse_controls(listed, config.model.kind)
        listed = listed[: config.run.watch_prompts]
        few = min(config.evaluate.batch, len(listed))
        sampler = make_sampler(
            dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, batch=few)),
            pipe,
        )
        mesh = pipe.transformer.config.mesh
        scorer = make_scorer(
            config, sampler.batch, mesh, listed, sampler.photo_encoder(listed), reward
        )
        return cls(sampler=sampler, scorer=scorer, rows=all_rows(listed, 1), folder=folder)

    def scores(self, model: Model, step: int) -> bootstrap.Scores:
        """Sample and score all videos, and write their values to a file."""
        size = self.sampler.batch
        batches = [self.rows[first : first + size] for first in range(0, len(self.rows), size)]
        parts = [
            self.scorer(self.sampler.videos(model, batch), [row.prompt for row in batch])
            for batch in batches
        ]
        found = bootstrap.without_absent(
            recognition.summarised(
                {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            )
        )
        if jax.process_index() == 0:
            self.folder.mkdir(exist_ok=True)
            write_text(
                self._file(step),
                json.dumps(
                    {
                        name: [None if math.isnan(value) else value for value in values.tolist()]
                        for name, values in found.items()
                    }
                ),
            )
        return found

    def initial(self) -> bootstrap.Scores:
        """Return the scores of the initial model, which process 0 reads (collective)."""
        stored = decided(lambda: json.loads(self._file(0).read_text()))
        return {name: np.asarray(values, np.float64) for name, values in stored.items()}

    def begin(self, model: Model) -> None:
        """Score the initial model, unless process 0 finds its scores from before a resume."""
        if not decided(self._file(0).exists):
            self.scores(model, 0)

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        """Score a model after `step` training steps and return means to log.

        Warns if the reward rose and the judge's identity fell, each with its 95 % interval on one
        side of 0.
        """
        now, evaluation = self.scores(model, step), self.sampler.config.evaluate
        first = self.initial()
        # A run of an earlier version began with fewer metrics.
        shared = {name: values for name, values in now.items() if name in first}
        scores, clusters = {"base": first, "now": shared}, np.arange(len(self.rows))
        changes = bootstrap.summarise(
            scores, clusters, self.sampler.config.run.seed, evaluation.bootstrap
        )[1]["now"]
        parted = (
            "judge_identity" in changes
            and changes["reward"].low > 0 > changes["judge_identity"].high
        )
        if parted:
            warnings.warn(
                f"step {step}: on {len(self.rows)} held-out prompts the reward rose by {changes['reward'].text(sign=True)} and the judge's "
                f"identity fell by {changes['judge_identity'].text(sign=True)} since the start: the policy is gaming the reward; look at "
                "samples/, raise grpo.kl, or go back to an earlier checkpoint",
                stacklevel=2,
            )
        means = {name: bootstrap.mean(name, values) for name, values in now.items()}
        return {f"watch_{name}": value for name, value in means.items()} | {
            "watch_parted": float(parted)
        }

    def _file(self, step: int) -> Path:
        return self.folder / f"{step:06d}.json"
