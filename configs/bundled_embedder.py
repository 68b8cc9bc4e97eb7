"""Train the face embedder that the reward of the bundled model uses: a small IR network.

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
        run=RunConfig(steps=1500, seed=12, save_every=250, sample_every=0),
        finetune=FinetuneConfig(
            task="embedder",
            batch=24,
            out=f"{ASSETS}/faces",
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
                blur=3.0,
            ),
        ),
    )
