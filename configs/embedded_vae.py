"""The autoencoder of the embedded model set, trained on the drawn cast: pictures first, then clips of 9 frames.

    idgrpo finetune configs/embedded_vae.py --workdir runs/embedded_vae
"""

from jax_idgrpo.config import Config, FinetuneConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        run=RunConfig(steps=3000, seed=7, save_every=250, keep=2, sample_every=500),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, beta2=0.99, weight_decay=0.0, max_norm=1.0, warmup=50, schedule="cosine", ema_decay=0.99
        ),
        finetune=FinetuneConfig(
            task="vae",
            batch=2,
            log_every=25,
            options={
                "base_dim": 8,
                "dim_mult": [1, 2, 4, 5],
                "num_res_blocks": 1,
                "picture_steps": 2000,
                "picture_batch": 8,
                "frames": 9,
                "face_weight": 3.0,
                "edges": 0.5,
                "kl": 2e-5,
            },
        ),
    )
