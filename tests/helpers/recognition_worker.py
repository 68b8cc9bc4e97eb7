"""Run by slow/test_recognition.py in a process with eight devices: who is recognised on one device and on a mesh.

python -m tests.helpers.recognition_worker OUT
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from jax_idgrpo.config import Config, DataConfig, MeshConfig
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import to_uint8
from jax_idgrpo.evaluation import scoring
from jax_idgrpo.parallel import sharding
from jax_idgrpo.synthetic import scenes

ROWS = 8


def main(out: str) -> None:
    drawn = jax.device_get(scenes.batch(5, 0, ROWS, "eval", 5))
    mesh = sharding.make_mesh(MeshConfig(data=4, seq=2))
    config, found = Config(data=DataConfig(max_people=3)), {}
    with tempfile.TemporaryDirectory() as folder:
        prompts = []
        for n in range(ROWS):
            people = np.flatnonzero(drawn.mask[n])
            files = [Path(folder) / f"{n}-{m}.png" for m in people]
            for file, m in zip(files, people, strict=True):
                Image.fromarray(to_uint8(drawn.portraits[n, m])).save(file)
            prompts.append(Prompt(n, f"prompt {n}", tuple(files)))
        placed = sharding.device_put_global(drawn.video, sharding.batch_sharding(mesh))
        for label, videos, where in (("one", drawn.video, None), ("mesh", placed, mesh)):
            scorer = scoring.make_scorer(config, ROWS, where, prompts)
            for name, value in scorer(videos, prompts).items():
                found[f"{label}/{name}"] = value
    np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1])
