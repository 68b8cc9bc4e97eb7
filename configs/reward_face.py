r"""Train a reward head on the faces of your preference pairs, in minutes on a CPU.

    idgrpo train-reward configs/reward_face.py --workdir runs/head \
        --finetune.options '{"pairs": "pairs.csv", "held_out": "held_out.csv"}'
    idgrpo train configs/quickstart.py --workdir runs/with-head \
        --reward.head runs/head/export --reward.frames 9

With automatic pairs, first train a head on the trusted pairs ("mixing": "trusted"), then a second
one with "teacher": "runs/head/export".
"""

from jax_idgrpo.config import (
    Config,
    DataConfig,
    FinetuneConfig,
    OptimizerConfig,
    RewardConfig,
    RunConfig,
    VideoConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(max_people=3),
        video=VideoConfig(frames=9, height=64, width=64, fps=8),
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            weight_decay=1.0,
            max_norm=1.0,
            warmup=50,
            schedule="cosine",
            ema_decay=0.99,
        ),
        finetune=FinetuneConfig(
            task="reward_face",
            batch=64,
            log_every=50,
            options={"pairs": "pairs.csv", "held_out": "held_out.csv"},
        ),
        reward=RewardConfig(frames=9),
        run=RunConfig(steps=600, save_every=200, keep=1, sample_every=0),
    )
