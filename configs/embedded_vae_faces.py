"""Train the bundled autoencoder, part two: windows around faces. See `embedded_vae.py`."""

from embedded_vae import LOSS, NETWORK, OPTIMIZER

from jax_idgrpo.config import EMBEDDED, Config, FinetuneConfig, RunConfig, VideoConfig


def get_config() -> Config:
    seen = {
        "pictures": [20, 12],
        "pictures_beside_clips": [4, 4],
        "clips_from": 0,
        "clips_every": 4,
        "frames": 9,
        "crop": 32,
    }
    return Config(
        video=VideoConfig(frames=9, height=64, width=64, fps=8),
        run=RunConfig(steps=3880, seed=8, save_every=250, keep=2, sample_every=500),
        optimizer=OPTIMIZER,
        finetune=FinetuneConfig(
            task="vae",
            start="runs/embedded_vae/export",
            out=str(EMBEDDED / "pipeline"),
            batch=8,
            log_every=40,
            options={"train": "all"} | NETWORK | seen | LOSS,
        ),
    )
