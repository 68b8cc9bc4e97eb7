"""Define the configuration of a run as frozen dataclasses that are checked when built.

A configuration file is a Python file that defines `get_config() -> Config` and holds only values;
options of the command line override them. Every error is one line that names the field and the
remedy.
"""

from jax_idgrpo.config.loading import describe, field_names, load, override, recipes
from jax_idgrpo.config.optimisation import (
    REWARD_TASKS,
    FinetuneConfig,
    GrpoConfig,
    OptimizerConfig,
    RunConfig,
)
from jax_idgrpo.config.options import require_seed
from jax_idgrpo.config.root import Config
from jax_idgrpo.config.scoring import (
    PENALTIES,
    PENALTY_WEIGHTS,
    EvaluateConfig,
    RewardConfig,
    photographs_folder,
)
from jax_idgrpo.config.video_model import (
    EMBEDDED,
    CurriculumSettings,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RolloutConfig,
    VideoConfig,
    prompts_file,
)

__all__ = [
    "EMBEDDED",
    "PENALTIES",
    "PENALTY_WEIGHTS",
    "REWARD_TASKS",
    "Config",
    "CurriculumSettings",
    "DataConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "GrpoConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "VideoConfig",
    "describe",
    "field_names",
    "load",
    "override",
    "photographs_folder",
    "prompts_file",
    "recipes",
    "require_seed",
]
