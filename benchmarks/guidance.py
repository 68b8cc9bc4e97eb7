"""Measure guidance without training on the bundled model: the weakened branch and best of N.

    python -m benchmarks.guidance [--prompts 32] [--videos 4] [--out runs/guidance]

Every row of the first table is the model with a weakened branch against the model without, from the
same noise: paired differences with 95 % intervals over prompts. A gain has an interval of the judge
above 0, and neither motion nor the count falls. The second table compares the best of 4 videos by
the training reward with the mean of the 4.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from checkpoints_convert.places import LoRASum
from jax_idgrpo import config as configuration
from jax_idgrpo.data.prompts import Prompt, load_prompts
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.evaluation.sampler import all_rows, make_models, make_sampler
from jax_idgrpo.evaluation.scoring import make_scorer
from tests.helpers.paths import ROOT

SETTINGS: list[dict] = [
    *({"scale": scale, "photos": "none"} for scale in (0.25, 0.5, 1.0, 2.0, 3.0)),
    *({"scale": scale, "photos": "blank"} for scale in (0.25, 0.5, 1.0, 2.0, 3.0)),
    *({"scale": 0.5, "blocks": [block]} for block in (1, 3, 4)),
    *({"scale": 1.0, "blocks": [block]} for block in (1, 3, 4)),
    {"scale": 0.5, "blocks": [3], "photos": "none"},
]
METRICS = ("reward", "judge_identity", "motion", "faces", "count", "duplicated")


def measured(
    config: configuration.Config,
    prompts: Sequence[Prompt],
    metrics: Sequence[str],
    label: str,
    lora: Path | LoRASum | None = None,
) -> dict[str, np.ndarray]:
    """Sample and score `evaluate.videos` videos per prompt; return metric -> value of every video.

    Args:
      config: model, sampling and reward.
      prompts: the prompts.
      metrics: names of the metrics.
      label: name of the progress.
      lora: adapter, or a sum of adapters; None samples from the base.
    """
    sampler = make_sampler(config)
    model = list(make_models(sampler, {"adapted": lora} if lora else {}).values())[-1]
    scorer = make_scorer(config, sampler.batch)
    found: dict[str, list[np.ndarray]] = {metric: [] for metric in metrics}
    rows = all_rows(prompts, config.evaluate.videos)
    for batch, made in sampler.batches(model, rows, label):
        values = scorer(made, [row.prompt for row in batch])
        for metric in metrics:
            found[metric].append(values[metric])
    return {metric: np.concatenate(parts) for metric, parts in found.items()}


def measure(weakened: dict, prompts: int, videos: int) -> dict[str, np.ndarray]:
    """Sample and score the bundled model; [prompts * videos] values of each metric.

    Args:
      weakened: as in `evaluate.weakened`.
      prompts: number of held-out prompts.
      videos: per prompt.
    """
    base = configuration.load(ROOT / "configs" / "quickstart.py", [])
    config = dataclasses.replace(
        base, evaluate=dataclasses.replace(base.evaluate, weakened=weakened, videos=videos)
    )
    listed = load_prompts(
        configuration.prompts_file(config.evaluate.prompts), config.data.max_people
    )
    listed = listed[:prompts]
    return measured(config, listed, METRICS, json.dumps(weakened) or "plain")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--prompts", type=int, default=32)
    options.add_argument("--videos", type=int, default=4)
    options.add_argument("--out", type=Path, default=Path("runs/guidance"))
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    clusters = np.repeat(np.arange(given.prompts), given.videos)

    def values(weakened: dict) -> dict[str, np.ndarray]:
        """Measure, or read what an earlier run measured."""
        name = json.dumps(weakened, sort_keys=True).translate(str.maketrans("", "", '{}":, []'))
        path = given.out / f"{name or 'plain'}-{given.prompts}x{given.videos}.npz"
        if not path.is_file():
            np.savez(path, **measure(weakened, given.prompts, given.videos))
        return dict(np.load(path))

    def change(after: np.ndarray, before: np.ndarray) -> str:
        return bootstrap.bootstrap(after - before, clusters, 0, 2000).text(sign=True)

    plain = values({})
    print(f"| weakened | {' | '.join(METRICS)} |\n| --- |{' --- |' * len(METRICS)}")
    means = " | ".join(f"{plain[metric].mean():.3f}" for metric in METRICS)
    print(f"| none | {means} |", flush=True)
    for weakened in SETTINGS:
        found = values(weakened)
        cells = " | ".join(change(found[metric], plain[metric]) for metric in METRICS)
        print(f"| `{json.dumps(weakened)}` | {cells} |", flush=True)
    shape = (given.prompts, given.videos)
    best = np.argmax(plain["reward"].reshape(shape), axis=1)[:, None]
    print(f"\n| best of {given.videos} | change against the mean |\n| --- | --- |")
    for metric in METRICS:
        each = plain[metric].reshape(shape)
        gain = np.take_along_axis(each, best, 1)[:, 0] - each.mean(axis=1)
        text = bootstrap.bootstrap(gain, np.arange(given.prompts), 0, 2000).text(sign=True)
        print(f"| {metric} | {text} |")


if __name__ == "__main__":
    main()
