"""Train the bundled VACE transformer, part one: pictures, at a third of the cost of clips.

It requires the autoencoder and the text encoder. `launch/bundled.sh` runs all parts in order.
"""

import dataclasses

from bundled_vae import ASSETS, VIDEO

from jax_idgrpo.config import (
    Config,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(path=f"{ASSETS}/pipeline", unroll=True),
        data=DataConfig(max_people=3, text_length=80),
        video=dataclasses.replace(VIDEO, frames=1),
        reward=RewardConfig(faces=f"{ASSETS}/faces"),
        rollout=RolloutConfig(shift=3.0, steps=12, guidance=1.0),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=2e-3,
            beta2=0.99,
            weight_decay=0.01,
            warmup=100,
            ema_decay=0.998,
        ),
        run=RunConfig(steps=16000, seed=50, save_every=400, keep=2, sample_every=2000),
        finetune=FinetuneConfig(
            task="transformer",
            batch=32,
            log_every=100,
            options=dict(
                num_layers=6,
                num_heads=4,
                head_dim=32,
                ffn_dim=512,
                freq_dim=64,
                vace_layers=[0, 2, 4],
                pool=40960,
                pool_seed=50,
                pool_file="runs/bundled/pool_pictures.npz",
                face_weight=3.0,
                text_dropout=0.1,
                photo_dropout=0.1,
            ),
        ),
    )
