"""Wan2.1-VACE-1.3B at about a quarter of the published cost: 20 denoising steps of which two early ones are stochastic and trained."""

import dataclasses
from pathlib import Path

from jax_idgrpo import config as c


def get_config() -> c.Config:
    """The published recipe with a window and a clean last step; one update of whole groups per rollout."""
    base = c.load(Path(__file__).with_name("vace_1_3b.py"))
    return dataclasses.replace(
        base,
        rollout=dataclasses.replace(
            base.rollout, prompts=16, steps=20, window="random", window_size=2, final_step="ode"
        ),
        grpo=dataclasses.replace(base.grpo, updates=1),
    )
