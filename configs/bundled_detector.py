"""Train the face detector of the bundled model, with accurate landmarks, which show head turns.

`launch/bundled.sh` runs all parts in order.
"""

from bundled_vae import ASSETS, VIDEO

from jax_idgrpo.config import Config, FinetuneConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        video=VIDEO,
        optimizer=OptimizerConfig(
            learning_rate=2e-3, beta2=0.99, warmup=50, schedule="cosine", ema_decay=0.99
        ),
        run=RunConfig(steps=4000, seed=11, save_every=200, sample_every=0),
        finetune=FinetuneConfig(
            task="detector",
            batch=32,
            out=f"{ASSETS}/faces",
            options=dict(
                network=dict(width=32, blocks=4, scale=16.0),
                portraits=0.2,
                max_faces=6,
                threshold=0.4,
                blur=3.0,
                landmarks=1.0,
            ),
        ),
    )
