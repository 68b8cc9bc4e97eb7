"""Train the bundled autoencoder, part three: only the decoder. See `embedded_vae.py`.

The weights of brightness, red-blue and green-magenta are 1, 1.5 and 3. Green-magenta varies least;
without a large weight the decoder ignores it.
"""

import dataclasses

from embedded_vae import LOSS, NETWORK, OPTIMIZER

from jax_idgrpo.config import EMBEDDED, Config, FinetuneConfig, RunConfig, VideoConfig

COLOURS = [[0.5774, 0.5774, 0.5774], [1.0607, 0.0, -1.0607], [1.2247, -2.4495, 1.2247]]


def get_config() -> Config:
    seen = {
        "pictures": [4, 4],
        "pictures_beside_clips": [0, 0],
        "clips_from": 0,
        "clips_every": 1,
        "frames": 9,
        "crop": 32,
    }
    options = {"train": "decoder"} | NETWORK | seen | LOSS | {"colours": COLOURS}
    return Config(
        video=VideoConfig(frames=9, height=64, width=64, fps=8),
        run=RunConfig(steps=1500, seed=9, save_every=250, keep=2, sample_every=500),
        optimizer=dataclasses.replace(OPTIMIZER, learning_rate=2e-3),
        finetune=FinetuneConfig(
            task="vae",
            start=str(EMBEDDED / "pipeline"),
            out=str(EMBEDDED / "pipeline"),
            batch=8,
            log_every=40,
            options=options,
        ),
    )
