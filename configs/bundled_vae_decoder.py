"""Train the autoencoder of the bundled model, part three: only the decoder.

The latents do not change, so this part may run after the transformer or beside it.
"""

import dataclasses

from bundled_vae import ASSETS
from bundled_vae_clips import get_config as clips

from jax_idgrpo.config import Config


def get_config() -> Config:
    config = clips()
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, steps=6000, seed=9),
        finetune=dataclasses.replace(
            config.finetune,
            start="runs/bundled/vae_clips/export",
            out=f"{ASSETS}/pipeline",
            options=config.finetune.options
            | {"train": "decoder", "pictures_beside_clips": [0, 0], "pictures": [0, 0]},
        ),
    )
