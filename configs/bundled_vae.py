"""Train the autoencoder of the bundled model, part one: whole pictures of synthetic people.

`launch/bundled.sh` runs all parts of the bundled model in order.
"""

from jax_idgrpo.config import Config, FinetuneConfig, OptimizerConfig, RunConfig, VideoConfig

VIDEO = VideoConfig(frames=9, height=64, width=96, fps=8)
ASSETS = "runs/bundled/assets"  # the folder that launch/bundled.sh fills


def get_config() -> Config:
    return Config(
        video=VIDEO,
        run=RunConfig(steps=1500, seed=7, save_every=250, keep=2, sample_every=500),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, beta2=0.99, weight_decay=0.0, warmup=50, ema_decay=0.99
        ),
        finetune=FinetuneConfig(
            task="vae",
            batch=8,
            log_every=25,
            options={
                "train": "all",
                "base_dim": 8,
                "dim_mult": [1, 2, 6, 10],
                "num_res_blocks": 1,
                "pictures": [10, 6],
                "pictures_beside_clips": [4, 4],
                "clips_from": 1500,
                "clips_every": 1,
                "frames": VIDEO.frames,
                "crop": 0,
                "face_weight": 3.0,
                "edges": 0.5,
                "kl": 2e-5,
                "colours": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
            },
        ),
    )
