"""Train the bundled autoencoder in three parts, each of which continues the previous one.

    idgrpo finetune configs/embedded_vae.py --workdir runs/embedded_vae
    idgrpo finetune configs/embedded_vae_faces.py --workdir runs/embedded_vae_faces
    idgrpo finetune configs/embedded_vae_decoder.py --workdir runs/embedded_vae_decoder

Part one trains on whole pictures of synthetic people, then on clips of 9 frames. Part two trains on
windows around faces, and part three trains only the decoder. The bundled weights are from parts one
and two, which take 20 and 23 minutes on two shared CPU cores. Part three would sharpen the videos
without changing the latents that the transformer was trained on.
"""

from jax_idgrpo.config import Config, FinetuneConfig, OptimizerConfig, RunConfig, VideoConfig

NETWORK = {"base_dim": 8, "dim_mult": [1, 2, 4, 5], "num_res_blocks": 1}
LOSS = {
    "face_weight": 3.0,
    "edges": 0.5,
    "kl": 2e-5,
    "colours": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
}
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3,
    beta2=0.99,
    weight_decay=0.0,
    max_norm=1.0,
    warmup=50,
    schedule="cosine",
    ema_decay=0.99,
)


def get_config() -> Config:
    seen = {
        "pictures": [4, 4],
        "pictures_beside_clips": [1, 1],
        "clips_from": 1781,
        "clips_every": 1,
        "frames": 9,
        "crop": 0,
    }
    return Config(
        video=VideoConfig(frames=9, height=64, width=64, fps=8),
        run=RunConfig(steps=2768, seed=7, save_every=250, keep=2, sample_every=500),
        optimizer=OPTIMIZER,
        finetune=FinetuneConfig(
            task="vae", batch=2, log_every=25, options={"train": "all"} | NETWORK | seen | LOSS
        ),
    )
