"""Measure sums of two adapters on the bundled model: one for identity, one for motion.

    python -m benchmarks.adapters [--steps 40 20] [--prompts 64] [--videos 4] [--out runs/adapters]

Both adapters are trained by the quickstart's recipe, with fewer steps: `identity` on its face reward,
`motion` on the mean difference of neighbouring frames alone, which `reward.custom` names. Every line
of the table is the sum of both at two weights, as `idgrpo sample --lora A:0.5 --lora B`, against the
base from the same noise: paired differences with 95 % intervals over prompts. An interrupted run is
continued.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np

from benchmarks.guidance import measured
from checkpoints_convert.places import LoRASum
from jax_idgrpo import config as configuration
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.training.train import train
from tests.helpers.paths import ROOT

RECIPE = ROOT / "configs" / "quickstart.py"
REWARDS = {"identity": [], "motion": [("reward.custom", f"{Path(__file__).resolve()}:motion")]}
WEIGHTS = (0.0, 0.5, 1.0)
METRICS = ("judge_identity", "motion", "reward", "faces", "duplicated")


def motion(videos: np.ndarray, prompts: list[str], references: list) -> np.ndarray:
    """Return the mean absolute difference of neighbouring frames, the metric `motion`.

    Args:
      videos: [B, F, H, W, 3] in [-1, 1].
      prompts: not read.
      references: not read.
    """
    return np.abs(np.diff(videos, axis=1)).mean(axis=(1, 2, 3, 4))


def adapter(name: str, steps: int, out: Path) -> Path:
    """Train an adapter, or continue its training, and return its export."""
    common = [("run.steps", str(steps)), ("run.save_every", "10"), ("run.sample_every", "0")]
    train(configuration.load(RECIPE, [*common, *REWARDS[name]]), out / name)
    return out / name / "export"


def measure(lora: LoRASum | None, prompts: int, videos: int, label: str) -> dict[str, np.ndarray]:
    """Sample and score the model with an adapter; [prompts * videos] values of each metric.

    Args:
      lora: the sum of adapters; None for the base.
      prompts: number of held-out prompts.
      videos: per prompt.
      label: text of the progress bar.
    """
    config = configuration.load(RECIPE, [("evaluate.videos", str(videos))])
    path = configuration.prompts_file(config.evaluate.prompts)
    listed = load_prompts(path, config.data.max_people)[:prompts]
    return measured(config, listed, METRICS, label, lora)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--steps", type=int, nargs=2, default=(40, 20), metavar=("I", "M"))
    options.add_argument("--prompts", type=int, default=64)
    options.add_argument("--videos", type=int, default=4)
    options.add_argument("--out", type=Path, default=Path("runs/adapters"))
    given = options.parse_args()
    places = [
        adapter(name, steps, given.out) for name, steps in zip(REWARDS, given.steps, strict=True)
    ]
    clusters = np.repeat(np.arange(given.prompts), given.videos)

    def values(weights: tuple[float, ...]) -> dict[str, np.ndarray]:
        """Measure, or read what an earlier run measured."""
        label = "identity {:g} motion {:g}".format(*weights)
        path = given.out / f"{label.replace(' ', '-')}-{given.prompts}x{given.videos}.npz"
        if not path.is_file():
            parts = tuple((place, weight) for place, weight in zip(places, weights) if weight)
            found = measure(LoRASum(parts) if parts else None, given.prompts, given.videos, label)
            np.savez(path, **found)
        return dict(np.load(path))

    base = values((0.0, 0.0))
    print(f"| identity | motion | {' | '.join(METRICS)} |\n| --- | --- |{' --- |' * len(METRICS)}")
    means = " | ".join(f"{base[metric].mean():.3f}" for metric in METRICS)
    print(f"| 0 | 0 | {means} |", flush=True)
    for weights in list(itertools.product(WEIGHTS, WEIGHTS))[1:]:
        found = values(weights)
        changes = [
            bootstrap.bootstrap(found[metric] - base[metric], clusters, 0, 2000).text(sign=True)
            for metric in METRICS
        ]
        print("| {:g} | {:g} | ".format(*weights) + " | ".join(changes) + " |", flush=True)


if __name__ == "__main__":
    main()
