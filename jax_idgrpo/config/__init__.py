"""The configuration of a run: frozen dataclasses, checked when built, read from a Python file and overridden by options.

A configuration file holds values only: `get_config() -> Config`. Every error is one line that names the field and the remedy.
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
    PRICES,
    EvaluateConfig,
    RewardConfig,
    photographs_folder,
)
from jax_idgrpo.config.video_model import (
    EMBEDDED,
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
    "PRICES",
    "REWARD_TASKS",
    "Config",
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
