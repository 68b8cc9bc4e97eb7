"""Train the bundled judge, an embedder independent of the reward's.

Network, crop, seed and people differ from those of `embedded_embedder.py`. It takes about five
minutes on two CPU cores.
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
        run=RunConfig(steps=900, seed=13, save_every=300, sample_every=0),
        finetune=FinetuneConfig(
            task="embedder",
            batch=24,
            out=str(EMBEDDED / "faces"),
            options=dict(
                name="judge",
                architecture="judge",
                network=dict(widths=(24, 48, 96), input_size=40, embedding_size=96),
                units=3.0,
                people=2000,
                first_id=500_000,
                margin=0.3,
                scale=24.0,
                blur=2.0,
            ),
        ),
    )
