"""Identity-GRPO on a step-distilled policy: few steps, no guidance, little noise.

Set `--model.path` to a checkpoint that was distilled to few steps without guidance. At the flow
sampler's own noise level, 0.7, the noise that one of 8 steps adds is 0.6 to 1 times the noise of the
sample, and a distilled model has never seen such a sample; at 0.2 it is a fifth. No published
weights have been trained with this recipe.
"""

import dataclasses
from pathlib import Path

from jax_idgrpo import config as c


def get_config() -> c.Config:
    """Return `vace_1_3b` with 8 steps, guidance 1 and noise level 0.2 of the flow sampler.

    Evaluation uses the same number of steps.
    """
    base = c.load(Path(__file__).with_name("vace_1_3b.py"))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, path="Wan2.1-VACE-1.3B-few-step"),
        rollout=dataclasses.replace(
            base.rollout,
            steps=8,
            shift=5.0,
            guidance=1.0,
            sampler="flow",
            noise_level=0.2,
            final_step="ode",
        ),
        evaluate=dataclasses.replace(base.evaluate, steps=8),
    )
