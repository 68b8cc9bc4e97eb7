"""Identity by the reward's gradient and photo pools on Wan2.1-VACE-1.3B, after IPRO.

Source: IPRO, arXiv 2510.14255. From it are the gradient through the last four steps, the learning
rate, the batch, the number of steps, the distance from the base, and the pool of faces. Its reward
weight 0.1 against 1 for the distance is `grpo.kl` 10, if both are means over elements as here; the
paper does not say. It trains image to video at 14B, distilled to 8 steps without guidance, with the
faces of the real clip as pool. Here the pool is the column `more_paths` of the prompts, and the 64
videos of a batch are two of each of 32 prompts. No weights have been trained with this recipe.
"""

import dataclasses
from pathlib import Path

from jax_idgrpo import config as c


def get_config() -> c.Config:
    """Return `vace_1_3b` with the objective `reward_gradient` and `reward.pool` pool.

    For a checkpoint that was distilled without guidance, set `rollout.guidance` 1 and
    `rollout.steps` 8.
    """
    base = c.load(Path(__file__).with_name("vace_1_3b.py"))
    return dataclasses.replace(
        base,
        rollout=dataclasses.replace(
            base.rollout,
            prompts=32,
            group=2,
            micro_batch=8,
            steps=20,
            window="none",
            final_step="ode",
        ),
        grpo=c.GrpoConfig(
            objective="reward_gradient",
            gradient_steps=4,
            kl=10.0,
            kl_units="velocity",
        ),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=2e-5, weight_decay=0.0),
        reward=dataclasses.replace(base.reward, pool="pool"),
        run=dataclasses.replace(base.run, steps=100),
    )
