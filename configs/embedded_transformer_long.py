"""The video transformer of the embedded set, second run: goes on with a pool of twice as many new clips, annealed to the end.

208k clips, 36 minutes on two cores. The stored weights are the first run (45k clips), 13k clips more at a constant rate, and this run.
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
