"""Train the autoencoder of the bundled model, part two: clips in windows around faces."""

import dataclasses

from bundled_vae import ASSETS
from bundled_vae import get_config as pictures

from jax_idgrpo.config import Config


def get_config() -> Config:
    config = pictures()
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, steps=5000, seed=8),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=2e-3, schedule="cosine"),
        finetune=dataclasses.replace(
            config.finetune,
            start="runs/bundled/vae/export",
            out=f"{ASSETS}/pipeline",
            options=config.finetune.options | {"clips_from": 0, "crop": 48},
        ),
    )
