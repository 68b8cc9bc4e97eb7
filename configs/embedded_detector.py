"""Face detector of the embedded set: 80 thousand parameters, drawn people at 64 x 64. About three minutes on two cores."""

from jax_idgrpo.config import EMBEDDED, Config, FinetuneConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
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
