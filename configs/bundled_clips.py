"""Train the bundled VACE transformer, part two: clips, with a rate that decays to 0."""

import dataclasses

from bundled_pictures import get_config as pictures
from bundled_vae import ASSETS, VIDEO

from jax_idgrpo.config import Config


def get_config() -> Config:
    config = pictures()
    return dataclasses.replace(
        config,
        video=VIDEO,
        run=dataclasses.replace(config.run, steps=20000, seed=51),
        optimizer=dataclasses.replace(config.optimizer, schedule="cosine"),
        finetune=dataclasses.replace(
            config.finetune,
            batch=16,
            start="runs/bundled/pictures/export",
            out=f"{ASSETS}/pipeline",
            options=config.finetune.options
            | {"pool": 12288, "pool_seed": 51, "pool_file": "runs/bundled/pool_clips.npz"},
        ),
    )
