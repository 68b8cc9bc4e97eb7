"""Run by test_default_flags.py with the compiler's own flags: what holds bit for bit where the tests' flags do not apply.

python -m tests.helpers.default_flags_worker FOLDER

Trains the bundled VACE model in FOLDER/whole without a stop and in FOLDER/stopped with one, and stores the ratios of a first update of
Phantom in FOLDER/phantom.npy, of the other models with photos behind the video in FOLDER/others.npy, and of two experts in
FOLDER/experts.npy.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from jax_idgrpo.training.train import train
from tests.helpers import experts, phantom
from tests.helpers.tiny_run import tiny


def ratio(*scales: float, **conditions: bool) -> np.ndarray:
    """Sample a rollout of a tiny policy and return the ratio of its first update, per step and row."""
    actor, lora, base = phantom.model(*scales, remat="full")
    given = dataclasses.replace(phantom.asked(), **conditions)
    batch = phantom.chunked([phantom.sampled((actor, lora, base), given=given)])
    return np.asarray(phantom.gradients(phantom.objective(actor), lora, base, batch)[1]["ratio"])


def runs(folder: Path) -> None:
    """Train for two steps in one go, and for one step and then another."""
    for name, stops in (("whole", [2]), ("stopped", [1, 2])):
        for steps in stops:
            config = tiny(steps)
            rollout = dataclasses.replace(config.rollout, steps=2)
            model = dataclasses.replace(config.model, remat="full", unroll=False)
            run = dataclasses.replace(config.run, save_every=1, sample_every=0)
            config = dataclasses.replace(config, rollout=rollout, model=model, run=run)
            train(config, folder / name)


if __name__ == "__main__":
    np.save(Path(sys.argv[1]) / "phantom.npy", ratio(7.5, 5.0))
    # The properties of RefAlign and SkyReels-V3 in one program.
    others = ratio(1.0, 1.0, padding_attended=True, photos_read_text=False)
    np.save(Path(sys.argv[1]) / "others.npy", others)
    np.save(Path(sys.argv[1]) / "experts.npy", experts.ratios(remat="full"))
    runs(Path(sys.argv[1]))
