"""The autoencoder of the embedded model set, first part: whole pictures of the drawn cast, then clips of 9 frames.

    idgrpo finetune configs/embedded_vae.py --workdir runs/embedded_vae --finetune.out runs/embedded_vae/first
    idgrpo finetune configs/embedded_vae_faces.py --workdir runs/embedded_vae_faces --finetune.start runs/embedded_vae/first
"""

from jax_idgrpo.config import Config, FinetuneConfig, OptimizerConfig, RunConfig

NETWORK = {"base_dim": 8, "dim_mult": [1, 2, 4, 5], "num_res_blocks": 1}
LOSS = {"face_weight": 3.0, "edges": 0.5, "kl": 2e-5}
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3, beta2=0.99, weight_decay=0.0, max_norm=1.0, warmup=50, schedule="cosine", ema_decay=0.99
)


def get_config() -> Config:
    seen = {"pictures": [4, 4], "clips_from": 1781, "clips_every": 1, "frames": 9, "crop": 64}
    return Config(
        run=RunConfig(steps=2768, seed=7, save_every=250, keep=2, sample_every=500),
        optimizer=OPTIMIZER,
        finetune=FinetuneConfig(task="vae", batch=2, log_every=25, options=NETWORK | seen | LOSS),
    )
