"""Continue `embedded_transformer.py` on a pool of new clips, twice as large, with a decaying rate.

The run trains on 208,000 clips and takes 36 minutes on two CPU cores. The bundled weights are from
the first run (45,000 clips), 13,000 more clips at a constant rate, and this run.
"""

import dataclasses

from embedded_transformer import get_config as first_run

from jax_idgrpo.config import EMBEDDED, Config


def get_config() -> Config:
    config = first_run()
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, steps=13000, seed=44, save_every=500),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-3),
        finetune=dataclasses.replace(
            config.finetune,
            start=str(EMBEDDED / "pipeline"),
            options=config.finetune.options | {"pool": 12288, "pool_seed": 44},
        ),
    )
