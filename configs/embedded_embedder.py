"""Train the bundled reward's face embedder: a small IR network with the ArcFace loss.

It takes about five minutes on two CPU cores.
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
        run=RunConfig(steps=900, seed=12, save_every=300, sample_every=0),
        finetune=FinetuneConfig(
            task="embedder",
            batch=24,
            out=str(EMBEDDED / "faces"),
            options=dict(
                name="embedder",
                architecture="arcface",
                network=dict(
                    units=(1, 1, 1, 1),
                    widths=(16, 32, 64, 96),
                    stem=16,
                    input_size=32,
                    embedding_size=96,
                ),
                units=2.6,
                people=2000,
                first_id=0,
                margin=0.3,
                scale=24.0,
                blur=2.0,
            ),
        ),
    )
