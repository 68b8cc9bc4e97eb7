"""Run by test_default_flags.py with the compiler's own flags: what holds bit for bit where the tests' flags do not apply.

python -m tests.helpers.default_flags_worker ratios
python -m tests.helpers.default_flags_worker runs FOLDER

`ratios` prints one JSON line, the least and the largest ratio of a first update: {"vace": [1.0, 1.0], ...}.
`runs` trains in FOLDER/whole without a stop, and in FOLDER/stopped with one.
"""

import dataclasses
import json
import sys
from pathlib import Path

from jax_idgrpo.training.train import train
from tests.helpers import phantom, update
from tests.helpers.tiny_run import tiny


def ratios() -> dict[str, list[float]]:
    """Sample a rollout of each policy and return the extremes of the ratio, over steps and rows."""
    found = {}
    parts = update.model(remat="full")
    batch = update.chunked([update.sampled(parts)], update.ADVANTAGE)
    found["vace"] = update.gradients(update.objective(parts[0]), *parts[1:], batch)[1]["ratio"]
    parts = phantom.model(remat="full")
    batch = phantom.chunked([phantom.sampled(parts)])
    found["phantom"] = phantom.gradients(phantom.objective(parts[0]), *parts[1:], batch)[1]["ratio"]
    return {name: [float(ratio.min()), float(ratio.max())] for name, ratio in found.items()}


def runs(folder: Path) -> None:
    """Train for two steps in one go, and for one step and then another."""
    for name, stops in (("whole", [2]), ("stopped", [1, 2])):
        for steps in stops:
            config = tiny(steps, steps=2)
            model = dataclasses.replace(config.model, remat="full", unroll=False)
            run = dataclasses.replace(config.run, save_every=1, sample_every=0)
            train(dataclasses.replace(config, model=model, run=run), folder / name)


if __name__ == "__main__":
    if sys.argv[1] == "ratios":
        print(json.dumps(ratios()))
    else:
        runs(Path(sys.argv[2]))
