r"""Train a vision-language reward on your preference pairs with the published hyperparameters.

    idgrpo train-reward configs/reward_vlm.py --workdir runs/reward \
        --reward.vlm_base /models/Qwen2.5-VL-3B-Instruct \
        --finetune.options '{"pairs": "pairs.csv", "held_out": "held_out.csv"}'
"""

from jax_idgrpo.config import Config, FinetuneConfig, OptimizerConfig, RewardConfig, RunConfig


def get_config() -> Config:
    return Config(
        optimizer=OptimizerConfig(
            learning_rate=2e-6, weight_decay=0.0, max_norm=1.0, warmup=500, ema_decay=0.0
        ),
        reward=RewardConfig(vlm_dtype="bfloat16"),
        finetune=FinetuneConfig(
            task="reward_vlm",
            batch=4,
            log_every=10,
            options={"pairs": "pairs.csv", "held_out": "held_out.csv"},
        ),
        # 3 passes over 15,000 pairs
        run=RunConfig(steps=11250, save_every=500, keep=2, sample_every=0),
    )
