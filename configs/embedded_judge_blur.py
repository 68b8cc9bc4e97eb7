"""Continue `embedded_judge.py` with pictures as blurred as those of a small video model."""

import dataclasses

from embedded_judge import get_config as first_run

from jax_idgrpo.config import EMBEDDED, Config


def get_config() -> Config:
    config = first_run()
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, steps=300, seed=config.run.seed + 10),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-3),
        finetune=dataclasses.replace(
            config.finetune,
            start=str(EMBEDDED / "faces"),
            options=config.finetune.options | {"blur": 4.0},
        ),
    )
