"""Train the bundled Phantom transformer, part one: pictures. See `bundled_pictures.py`."""

import dataclasses

from bundled_pictures import get_config as vace

from jax_idgrpo.config import Config


def get_config() -> Config:
    config = vace()
    options = dict(config.finetune.options) | {"num_layers": 8}
    del options["vace_layers"]
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, kind="phantom"),
        finetune=dataclasses.replace(config.finetune, options=options),
    )
