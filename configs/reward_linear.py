r"""Fit a linear reward with readable weights to your preference pairs, in minutes on a CPU.

    idgrpo train-reward configs/reward_linear.py --workdir runs/linear \
        --finetune.options '{"pairs": "pairs.csv", "held_out": "held_out.csv"}'
    idgrpo train configs/quickstart.py --workdir runs/with-linear \
        --reward.linear runs/linear/export --reward.frames 9
"""

from jax_idgrpo.config import Config, DataConfig, FinetuneConfig, RewardConfig, VideoConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(max_people=3),
        video=VideoConfig(frames=9, height=64, width=64, fps=8),
        finetune=FinetuneConfig(
            task="reward_linear", options={"pairs": "pairs.csv", "held_out": "held_out.csv"}
        ),
        reward=RewardConfig(frames=9),
    )
