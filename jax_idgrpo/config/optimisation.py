"""Define the configuration of training: objective, optimizer, run and supervised tasks."""

import dataclasses
import math
from typing import Any, ClassVar

from jax_idgrpo.config.objectives import OBJECTIVES, REPLAY, REWARD, Objective
from jax_idgrpo.config.options import Section, option, require, require_seed
from jax_idgrpo.config.scoring import PLACED


@dataclasses.dataclass(frozen=True)
class GrpoConfig(Section):
    """The objective and the videos it is computed on."""

    section: ClassVar[str] = "grpo"

    objective: str = option(
        "clip",
        "clip is as published; clip, guard and divergence replay steps; nft, awm, dpo and sft "
        "train on final latents; reward_gradient follows the reward's gradient through the last "
        "denoising steps",
        choices=OBJECTIVES,
    )
    clip: float = option(
        1e-3,
        "range of the ratio for clip, guard and awm; its scale depends on the objective",
        above=0,
    )
    divergence: float = option(
        1e-5, "divergence of a step from the old policy beyond which it gets no gradient", above=0
    )
    time_weights: bool = option(
        False, "weight steps by 1 / c(t) so that all contribute equally; for clip and divergence"
    )
    kl: float = option(0.004, "coefficient of the distance to the frozen base", least=0)
    kl_units: str = option(
        "std",
        "units of the distance to the base: std of the step (as published, the KL divergence) or "
        "velocity (mean squared difference)",
        choices=("std", "velocity"),
    )
    kl_weights: str = option(
        "even",
        "weights of the distance to the base over the steps of reward_gradient: even, or sigma (the "
        "step's noise level, scaled to mean 1)",
        choices=("even", "sigma"),
    )
    advantage_clip: float = option(5.0, "largest absolute advantage", above=0)
    advantage_eps: float = option(1e-4, "added to the spread of a group's rewards", above=0)
    global_std: bool = option(
        False, "divide advantages by the spread of the whole step instead of the group's"
    )
    best: int = option(
        0, "best videos per group that are trained; best = worst = 0 trains all", least=0
    )
    worst: int = option(0, "worst videos per group that are trained", least=0)
    drop_constant: bool = option(
        False,
        "exclude groups whose rewards are all equal; they still pull towards the base otherwise",
    )
    updates: int = option(
        1,
        "optimizer steps per pass over a rollout, each over an equal share of the prompts",
        least=1,
    )
    epochs: int = option(
        1, "passes over a rollout; updates after the first are off-policy", least=1
    )
    times: int = option(2, "noise levels per video, for objectives on final latents", least=1)
    levels: str = option(
        "grid",
        "noise levels: even over the noisiest 90 % of the schedule, or the sigmoid of a normal, "
        "shifted like the schedule",
        choices=("grid", "logit_normal"),
    )
    nft_beta: float = option(1.0, "step size of nft", above=0)
    nft_normalise: bool = option(True, "divide the errors of nft by their size")
    dpo_beta: float = option(2000.0, "inverse temperature of dpo", above=0)
    awm_weighting: str = option(
        "ghuber",
        "weighting of noise levels for awm",
        choices=("uniform", "sigma", "sigma2", "huber", "ghuber"),
    )
    gradient_steps: int = option(4, "denoising steps that reward_gradient differentiates", least=1)
    pairs: str = option(
        "extremes",
        "pairs of dpo: the best and the worst by advantage, or a winner that is at least as good in "
        "every one of pair_terms",
        choices=("extremes", "dominance"),
    )
    pair_terms: dict[str, Any] = option(
        {},
        'terms that a winner must be better in and their weights as JSON, such as {"reward": 1, '
        '"motion": 0.5, "duplicated": -0.5}; the sign is the direction, 0 does not count in the gap',
    )
    pair_slack: dict[str, Any] = option(
        {},
        'spreads of a term by which a winner may be worse as JSON, such as {"motion": 0.5}; 0 unless '
        "set",
    )
    pair_margin: float = option(
        0.0, "least weighted gap of a pair, in spreads of the terms, exclusive", least=0
    )
    pair_share: float = option(
        1.0, "share of the pairs of a step that are trained, by gap", above=0, most=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        needs = self.needs
        require(
            not self.time_weights or (self.replays and "unweighted" not in needs),
            f"grpo.time_weights has no effect with objective {self.objective!r}; it applies to "
            "clip and divergence only",
        )
        require(
            self.replays or self.kl == 0 or self.kl_units == "velocity",
            "grpo.kl_units std requires an objective that replays sampling steps; "
            f"{self.objective!r} does not; use velocity",
        )
        require(
            "pairs" not in needs or (self.best, self.worst) == (1, 1),
            f"grpo.objective {self.objective} trains pairs, and grpo.best {self.best}, worst "
            f"{self.worst} are none; use 1 and 1",
        )
        self._check_pairs()
        require(
            self.kl_weights == "even" or self.through_reward,
            "grpo.kl_weights sigma weighs the steps of reward_gradient, and grpo.objective is "
            f"{self.objective}; leave it out",
        )
        require(
            "on_policy" not in needs or self.on_policy,
            f"grpo.objective {self.objective} is on-policy, and {self.optimizer_steps} updates per "
            "rollout are not; use grpo.updates 1 and epochs 1",
        )
        require(
            "winners" not in needs or (self.best >= 1 and self.worst == 0),
            f"grpo.objective {self.objective} trains on the best videos only: use grpo.best 1 or "
            f"more and grpo.worst 0, not {self.worst}",
        )

    def _check_pairs(self) -> None:
        """Refuse settings of pairs that contradict each other or the objective."""
        dominance = self.pairs == "dominance"
        require(
            not dominance or "pairs" in self.needs,
            f"grpo.pairs dominance chooses pairs, and grpo.objective {self.objective} trains none; "
            "use dpo, or extremes",
        )
        unset: dict[str, Any] = {
            "pair_terms": {},
            "pair_slack": {},
            "pair_margin": 0.0,
            "pair_share": 1.0,
        }
        for name, default in unset.items():
            require(
                dominance or getattr(self, name) == default,
                f"grpo.{name} belongs to grpo.pairs dominance, and pairs is {self.pairs}; leave it out",
            )
        for field, least in (("pair_terms", None), ("pair_slack", 0)):
            for name, value in getattr(self, field).items():
                require(
                    isinstance(value, int | float)
                    and not isinstance(value, bool)
                    and (math.isfinite(value) if least is None else value >= least),
                    f"grpo.{field}: {name} is {value!r}; use a number"
                    + ("" if least is None else f" of {least} or more"),
                )
        require(
            not dominance or any(self.pair_terms.values()),
            "grpo.pair_terms weighs no term; name some as JSON, such as "
            '{"reward": 1, "motion": 0.5}',
        )
        require(
            not self.pair_terms.get(PLACED)
            or any(weight for name, weight in self.pair_terms.items() if name != PLACED),
            "grpo.pair_terms placed cannot be the only term, because rows without places have none; "
            'add another, such as {"reward": 1, "placed": 0.5}',
        )
        for name in self.pair_slack:
            require(
                name in self.pair_terms,
                f"grpo.pair_slack: {name} is not among grpo.pair_terms "
                f"({', '.join(self.pair_terms)}); add it there",
            )

    @property
    def definition(self) -> Objective:
        """Entry of the objective in the table of objectives."""
        return OBJECTIVES[self.objective]

    @property
    def needs(self) -> frozenset[str]:
        """Requirements of the objective: names of `objectives.NEEDS`."""
        return self.definition.needs

    @property
    def replays(self) -> bool:
        """Whether the objective replays the stochastic steps of the rollout."""
        return self.definition.kind == REPLAY

    @property
    def through_reward(self) -> bool:
        """Whether the objective follows the gradient of the reward."""
        return self.definition.kind == REWARD

    @property
    def compares_with_base(self) -> bool:
        """Whether the objective evaluates the velocity of the frozen base."""
        return self.kl > 0 or "base" in self.needs

    @property
    def optimizer_steps(self) -> int:
        """Number of optimizer steps per training step."""
        return self.updates * self.epochs

    @property
    def on_policy(self) -> bool:
        """Whether every update is the first after its rollout."""
        return self.optimizer_steps == 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """The optimizer, after clipping to a global norm."""

    section: ClassVar[str] = "optimizer"

    name: str = option(
        "adamw",
        "adamw, or muon: Muon for the weight matrices of layers and AdamW for all other parameters",
        choices=("adamw", "muon"),
    )
    learning_rate: float = option(1e-4, "peak learning rate", above=0)
    beta1: float = option(0.9, "decay of the first moment")
    beta2: float = option(0.999, "decay of the second moment")
    eps: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(1e-4, "decoupled weight decay, scaled by the learning rate")
    max_norm: float = option(1.0, "global norm that gradients are clipped to", above=0)
    warmup: int = option(0, "optimizer steps of linear warm-up")
    schedule: str = option(
        "constant",
        "learning rate after the warm-up; cosine ends at 0",
        choices=("constant", "cosine"),
    )
    ema_decay: float = option(
        0.9487, "decay of the averaged weights that are evaluated and exported"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.ema_decay < 1, f"optimizer.ema_decay is {self.ema_decay}; use 0 to below 1"
        )


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """Length of a run, its seed, and what it writes; intervals are in training steps, 0 = never."""

    section: ClassVar[str] = "run"

    steps: int = option(1000, "training steps", least=1)
    seed: int = option(42, "seed of every random draw")
    save_every: int = option(20, "steps between checkpoints", least=1)
    keep: int = option(3, "checkpoints that are kept", least=1)
    sample_every: int = option(20, "steps between sample videos", least=0)
    give_up_after: int = option(
        10, "consecutive steps without a finite gradient that end the run", least=1
    )
    watch_every: int = option(
        0, "steps between scores of held-out prompts by reward and judge", least=0
    )
    watch_prompts: int = option(
        16, "held-out prompts that are watched, the first of evaluate.prompts"
    )
    wandb: str = option("", 'Weights & Biases project; "" = none')

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seed("config: run.seed", self.seed)
        require(
            self.watch_prompts >= 2,
            f"run.watch_prompts is {self.watch_prompts}; an interval needs 2 or more",
        )


REWARD_TASKS = ("reward_face", "reward_linear", "reward_vlm")
"""Supervised tasks that train a reward."""


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Section):
    """Supervised training, for `idgrpo finetune` and `idgrpo train-reward`."""

    section: ClassVar[str] = "finetune"

    task: str = option(
        "transformer",
        "vae, text, transformer, adapter, detector, embedder, reward_face, reward_linear or "
        "reward_vlm",
    )
    batch: int = option(32, "rows per step", least=1)
    out: str = option(
        "", 'folder of the trained network, in published layout; "" = export/ in the workdir'
    )
    start: str = option("", 'folder to continue from; "" = random weights')
    log_every: int = option(20, "training steps that one row of metrics averages", least=1)
    options: dict[str, Any] = option({}, "values of the task as JSON, documented by the task")
