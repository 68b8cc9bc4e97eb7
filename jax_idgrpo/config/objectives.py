"""List the objectives: what each trains on, its loss function, and what it requires.

The configuration checks, the update and the training loop read this table and do not name
objectives themselves. A new objective is one entry here and one function in `grpo`. This module
does not import JAX, which would delay the check of a configuration.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

REPLAY, LATENTS, REWARD = "replay", "latents", "reward"
"""Kinds of objectives. They train on the replayed stochastic steps of the rollout, on its final
latents with new noise, or on the reward's gradient through the last denoising steps."""

NEEDS = {
    "gaussian": "stochastic steps that are drawn from a Gaussian",
    "unweighted": "steps that `grpo.time_weights` does not weight",
    "base": "the velocity of the frozen base, also where `grpo.kl` is 0",
    "pairs": "the best and the worst video of each group, side by side in one program call",
    "winners": "only the best videos of each group",
    "on_policy": "one update per rollout",
    "smooth_reward": "a reward that is one differentiable function of the video's pixels",
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
      kind: REPLAY, LATENTS or REWARD.
      loss: name of the function of `grpo` that computes values per row, `policy_loss` among them.
        Its arguments are a `grpo.Replayed`, a `grpo.Noised` or the reward of each row, by kind, and
        the section `grpo` of the configuration.
      needs: names of `NEEDS`.
    """

    kind: str
    loss: str
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if unknown := self.needs - set(NEEDS):
            raise ValueError(
                f"unknown needs {sorted(unknown)}; add them to NEEDS and to the checks of the "
                "configuration"
            )

    @property
    def function(self) -> Callable[..., Any]:
        """Loss function."""
        return getattr(importlib.import_module("jax_idgrpo.grpo"), self.loss)


OBJECTIVES: dict[str, Objective] = {
    "clip": Objective(REPLAY, "clip_rows"),
    "guard": Objective(REPLAY, "guard_rows", frozenset({"gaussian", "unweighted"})),
    "divergence": Objective(REPLAY, "divergence_rows"),
    "nft": Objective(LATENTS, "nft_rows"),
    "awm": Objective(LATENTS, "awm_rows"),
    "dpo": Objective(LATENTS, "dpo_rows", frozenset({"base", "pairs"})),
    "sft": Objective(LATENTS, "sft_rows", frozenset({"winners"})),
    "reward_gradient": Objective(REWARD, "reward_rows", frozenset({"on_policy", "smooth_reward"})),
}
