"""Define the configuration of a run and the checks across its sections."""

import dataclasses
import json

from jax_idgrpo.config.model_kinds import MODEL_KINDS, REFERENCE_KINDS, ModelKind
from jax_idgrpo.config.optimisation import FinetuneConfig, GrpoConfig, OptimizerConfig, RunConfig
from jax_idgrpo.config.options import require
from jax_idgrpo.config.scoring import EvaluateConfig, RewardConfig
from jax_idgrpo.config.video_model import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    RolloutConfig,
    VideoConfig,
)
from jax_idgrpo.config.weakened import weak_branch
from jax_idgrpo.workdir import refuse_addresses

NOT_PATHS = ("data.negative_prompt", "run.wandb", "reward.backend")
"""Text fields that name no file."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One run: its sections, checked together."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    video: VideoConfig = dataclasses.field(default_factory=VideoConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    grpo: GrpoConfig = dataclasses.field(default_factory=GrpoConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        sections = dataclasses.asdict(self) | {"finetune.options": self.finetune.options}
        refuse_addresses(sections, but=NOT_PATHS)
        rollout, grpo = self.rollout, self.grpo
        if self.kind.image_guidance is None:
            others = ", ".join(
                name for name in REFERENCE_KINDS if MODEL_KINDS[name].image_guidance is not None
            )
            for section in ("rollout", "evaluate"):
                scale = getattr(self, section).image_guidance
                require(
                    scale == 0,
                    f"{section}.image_guidance {scale} scales a branch that model.kind "
                    f"{self.model.kind} does not have (only {others}); leave it out",
                )
        for section, evaluation in (("rollout", False), ("evaluate", True)):
            own = getattr(self, section)
            require(
                own.control_scale == 1 or self.model.kind == "vace",
                f"{section}.control_scale {own.control_scale} is of VACE's hints, which model.kind "
                f"{self.model.kind} does not have; leave it out",
            )
            weak = weak_branch(f"{section}.weakened", own.weakened)
            negative = weak is not None and weak.source == "negative"
            require(
                not negative or self.kind.image_guidance is None,
                f"{section}.weakened: from negative is for VACE; model.kind {self.model.kind} has a "
                "branch without photos already, use from prompt",
            )
            require(
                not negative or 1 not in self.guidance(evaluation),
                f"{section}.weakened: from negative needs a negative branch, and the guidance is 1; "
                "raise it, or use from prompt",
            )
        require(
            self.data.max_people <= self.kind.most_photos,
            f"data.max_people is {self.data.max_people}; model.kind {self.model.kind} takes up to "
            f"{self.kind.most_photos} photos",
        )
        require(
            self.judged or not self.reward.reads_faces,
            "reward.faces embedded recognises synthetic people only, and model.path is "
            f"{self.model.path}; pass --reward.faces FOLDER with face networks for photographs, as "
            "idgrpo-convert faces makes it",
        )
        require(
            rollout.prompts % grpo.updates == 0,
            f"grpo.updates {grpo.updates} does not divide the {rollout.prompts} prompts of a "
            "rollout",
        )
        require(
            not grpo.replays or rollout.window != "none",
            f"grpo.objective {grpo.objective} replays stochastic steps, and rollout.window none "
            "has none; use all or a window",
        )
        require(
            grpo.replays or rollout.window == "none",
            f"grpo.objective {grpo.objective} trains on final latents and stores no trajectory; "
            "set rollout.window none",
        )
        if rollout.sampler == "cps":
            require(
                grpo.kl == 0 or grpo.kl_units == "velocity",
                "rollout.sampler cps has log-probabilities without std, so grpo.kl_units std is "
                "undefined; use velocity",
            )
            require(
                "gaussian" not in grpo.needs,
                f"grpo.objective {grpo.objective} corrects the ratio of a normal distribution, "
                "which cps does not have; use another",
            )
        require(
            grpo.best + grpo.worst <= rollout.group,
            f"grpo.best {grpo.best} and worst {grpo.worst} are more than the {rollout.group} "
            "videos of a group",
        )
        require(
            not grpo.through_reward or grpo.gradient_steps < rollout.steps,
            f"grpo.gradient_steps is {grpo.gradient_steps}; use fewer than the {rollout.steps} of "
            "rollout.steps",
        )
        require(
            not grpo.through_reward or not self.reward.mixture,
            f"reward.mixture weights advantages, and grpo.objective {grpo.objective} has none; use "
            "reward.penalties",
        )
        self.reward.require_faces_beside_people("grpo.pair_terms", grpo.pair_terms)
        smooth = "smooth_reward" in grpo.needs
        for name in ("backend", "custom"):
            require(
                not smooth or not getattr(self.reward, name),
                f"grpo.objective {grpo.objective} needs a reward in JAX, and reward.{name} runs on "
                f"the host; leave the {name} out",
            )
        require(
            not smooth or not self.reward.vlm,
            f"grpo.objective {grpo.objective} needs a reward that is smooth in the pixels, and "
            "reward.vlm rounds them; use another",
        )
        share = self.trained_rows // grpo.updates
        require(
            rollout.rows % self.rows_per_call == 0 and share % self.rows_per_call == 0,
            f"rollout.micro_batch {self.rows_per_call} does not divide the {rollout.rows} rows of "
            f"a rollout, or the {share} rows of one of {grpo.updates} updates",
        )
        require(
            "pairs" not in grpo.needs or self.rows_per_call % 2 == 0,
            f"rollout.micro_batch {self.rows_per_call} would split the two videos of a pair; use "
            "an even number",
        )

    @property
    def judged(self) -> bool:
        """Whether there are face networks that fit the model.

        The bundled networks recognise synthetic people only.
        """
        return self.reward.faces != "" and (
            self.reward.faces != "embedded" or self.model.shows_synthetic_people()
        )

    @property
    def kind(self) -> ModelKind:
        """Entry of `model.kind` in the table of kinds."""
        return MODEL_KINDS[self.model.kind]

    @property
    def reference_frames(self) -> int:
        """Number of latent frames for the photos of every row, with padding."""
        return self.kind.slots or self.data.max_people

    def guidance(self, evaluation: bool = False) -> tuple[float, float]:
        """Return the guidance scales of the prompt in rollouts or in evaluation.

        The first is of the only transformer or of the high-noise expert, the second of the
        low-noise expert.
        """
        first = self.rollout.guidance
        second = self.rollout.guidance_2 or first
        if evaluation:
            own = self.evaluate
            first, second = own.guidance or first, own.guidance_2 or own.guidance or second
        return first, second

    def require_experts(self, experts: int) -> None:
        """Refuse fields that a model with this number of transformers does not have.

        Raises:
          UserError: a field of the second expert is set, and there is one transformer.
        """
        only_of_two = {
            "rollout.guidance_2": self.rollout.guidance_2 != 0,
            "evaluate.guidance_2": self.evaluate.guidance_2 != 0,
            "model.experts_idle": self.model.experts_idle != "device",
        }
        for name, used in only_of_two.items():
            require(
                experts > 1 or not used,
                f"{name} is for a model with two transformers, and that at model.path "
                f"{self.model.path} has one; leave it out",
            )

    def image_guidance(self, evaluation: bool = False) -> float | None:
        """Return the guidance scale of the photos in rollouts or in evaluation.

        None for a model without a branch for photos.
        """
        default = self.kind.image_guidance
        if default is None:
            return None
        chosen = self.evaluate.image_guidance if evaluation else 0
        return chosen or self.rollout.image_guidance or default

    @property
    def trained_rows(self) -> int:
        """Number of videos of a rollout that are trained on."""
        return self.rollout.prompts * (self.grpo.best + self.grpo.worst or self.rollout.group)

    @property
    def rows_per_call(self) -> int:
        """Number of rows of one program call, both in rollout and in update."""
        return self.rollout.micro_batch or self.trained_rows // self.grpo.updates

    def to_json(self) -> str:
        """Return the configuration as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)
