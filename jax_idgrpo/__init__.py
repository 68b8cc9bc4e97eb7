"""Expose the public API of Identity-GRPO in JAX.

    import jax_idgrpo as idg
    pipe = idg.load_pipeline(path)
    sigmas = idg.flow.sigmas(num_steps, shift)

Each public name is imported when it is first used.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_idgrpo import flow, grpo, rewards
    from jax_idgrpo.sampling.pipeline import Pipeline, load_pipeline

    __version__: str

__all__ = ["__version__", "flow", "grpo", "load_pipeline", "rewards"]


def __getattr__(name: str) -> ModuleType | Callable[..., "Pipeline"] | str:
    if name == "__version__":
        return importlib.metadata.version("jax-idgrpo")
    if name == "load_pipeline":
        return importlib.import_module("jax_idgrpo.sampling.pipeline").load_pipeline
    if name in __all__:
        return importlib.import_module(f"jax_idgrpo.{name}")
    raise AttributeError(f"module 'jax_idgrpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
