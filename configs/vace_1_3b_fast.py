"""Identity-GRPO on Wan2.1-VACE-1.3B at about a quarter of the published cost.

Two early steps of the 20 denoising steps are stochastic and trained.
"""

import dataclasses
from pathlib import Path

from jax_idgrpo import config as c


def get_config() -> c.Config:
    """Return `vace_1_3b` with a window, a deterministic last step and one update per rollout."""
    base = c.load(Path(__file__).with_name("vace_1_3b.py"))
    return dataclasses.replace(
        base,
        rollout=dataclasses.replace(
            base.rollout, prompts=16, steps=20, window="random", window_size=2, final_step="ode"
        ),
        grpo=dataclasses.replace(base.grpo, updates=1),
    )
