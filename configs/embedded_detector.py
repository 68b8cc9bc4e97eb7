"""Train the bundled face detector: 80,000 parameters, synthetic people at 64 x 64.

It takes about three minutes on two CPU cores.
"""

from jax_idgrpo.config import (
    EMBEDDED,
    Config,
    FinetuneConfig,
    OptimizerConfig,
    RunConfig,
    VideoConfig,
)


def get_config() -> Config:
    return Config(
        video=VideoConfig(frames=9, height=64, width=64, fps=8),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, beta2=0.99, warmup=50, schedule="cosine", ema_decay=0.99
        ),
        run=RunConfig(steps=600, seed=11, save_every=200, sample_every=0),
        finetune=FinetuneConfig(
            task="detector",
            batch=32,
            out=str(EMBEDDED / "faces"),
            options=dict(
                network=dict(width=32, blocks=4),
                portraits=0.2,
                max_faces=6,
                threshold=0.4,
                blur=4.0,
            ),
        ),
    )
