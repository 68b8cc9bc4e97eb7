"""Train the bundled Phantom transformer, part two: clips. See `bundled_clips.py`."""

import dataclasses

from bundled_clips import get_config as vace
from bundled_phantom_pictures import get_config as pictures

from jax_idgrpo.config import Config


def get_config() -> Config:
    config, phantom = vace(), pictures()
    options = config.finetune.options | phantom.finetune.options
    pool = {name: config.finetune.options[name] for name in ("pool", "pool_seed", "pool_file")}
    del options["vace_layers"]
    return dataclasses.replace(
        config,
        model=phantom.model,
        finetune=dataclasses.replace(
            config.finetune,
            start="runs/bundled/phantom_pictures/export",
            out="runs/bundled/assets/phantom",
            options=options | pool,
        ),
    )
