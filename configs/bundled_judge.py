"""Train the judge of the bundled model, an embedder independent of the reward's.

Network, crop, seed and people differ from those of `bundled_embedder.py`. `launch/bundled.sh` runs
all parts in order.
"""

import dataclasses

from bundled_embedder import get_config as embedder

from jax_idgrpo.config import Config


def get_config() -> Config:
    config = embedder()
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, seed=13),
        finetune=dataclasses.replace(
            config.finetune,
            options=dict(
                name="judge",
                architecture="judge",
                network=dict(widths=(24, 48, 96), input_size=40, embedding_size=96),
                units=3.0,
                people=2000,
                first_id=500_000,
                margin=0.3,
                scale=24.0,
                blur=3.0,
            ),
        ),
    )
