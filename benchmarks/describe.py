"""Measure prompts completed from photos on the bundled model, with the true words of synthetic people.

    python -m benchmarks.describe [--prompts 64] [--videos 4] [--out runs/describe]

The looks are stripped from the held-out prompts ("a person talks"), and `idgrpo describe --words`
puts the words of the generator back behind the mentions, which must give the original prompts. As a
control every person gets the words of the person of the next photo. Every line is a model with
completed prompts against the same model with stripped ones, from the same noise: paired differences
with 95 % intervals over prompts.
"""

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.guidance import measured
from jax_idgrpo import config as configuration
from jax_idgrpo.cli import main as idgrpo
from jax_idgrpo.data.prompts import Prompt, load_prompts
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.synthetic.people import _ACTIONS
from tests.helpers.paths import ROOT

METRICS = ("reward", "judge_identity", "motion", "faces", "count", "duplicated")
LOOKS = re.compile(rf"person (with .*?) (?=(?:{'|'.join(_ACTIONS)})[,.])")
VARIANTS = ("true", "next")


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def complete(prompts: Sequence[Prompt], out: Path) -> dict[str, Path]:
    """Write the stripped prompts, and the prompts completed by the words of every variant."""
    files = {name: out / f"{name}.csv" for name in ("stripped", *VARIANTS)}
    photos = [str(photo) for prompt in prompts for photo in prompt.references]
    words = [found for prompt in prompts for found in LOOKS.findall(prompt.text)]
    stripped = [
        (";".join(map(str, prompt.references)), LOOKS.sub("person ", prompt.text))
        for prompt in prompts
    ]
    write_csv(files["stripped"], ("ref_paths", "prompt"), stripped)
    for variant, given in zip(VARIANTS, (words, [*words[1:], words[0]])):
        table = out / f"words-{variant}.csv"
        write_csv(table, ("photo", "words"), list(zip(photos, given, strict=True)))
        sys.argv = f"idgrpo describe --prompts {files['stripped']} --words {table}".split()
        sys.argv += ["--out", str(files[variant])]
        idgrpo()
    restored = [prompt.text for prompt in load_prompts(files["true"], 3)]
    assert restored == [prompt.text for prompt in prompts], "completing does not restore prompts"
    return files


def measure(path: Path, videos: int) -> dict[str, np.ndarray]:
    """Sample and score the bundled model; [prompts * videos] values of each metric.

    Args:
      path: CSV of prompts.
      videos: per prompt.
    """
    config = configuration.load(
        ROOT / "configs" / "quickstart.py", [("evaluate.videos", str(videos))]
    )
    return measured(config, load_prompts(path, config.data.max_people), METRICS, path.stem)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--prompts", type=int, default=64)
    options.add_argument("--videos", type=int, default=4)
    options.add_argument("--out", type=Path, default=Path("runs/describe"))
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    prompts = load_prompts(configuration.prompts_file("embedded:eval"), 3)[: given.prompts]
    files = complete(prompts, given.out)
    clusters = np.repeat(np.arange(len(prompts)), given.videos)

    def values(name: str) -> dict[str, np.ndarray]:
        """Measure, or read what an earlier run measured."""
        path = given.out / f"{name}-{given.prompts}x{given.videos}.npz"
        if not path.is_file():
            np.savez(path, **measure(files[name], given.videos))
        return dict(np.load(path))

    plain = values("stripped")
    print(f"| words | {' | '.join(METRICS)} |\n| --- |{' --- |' * len(METRICS)}")
    means = " | ".join(f"{plain[metric].mean():.3f}" for metric in METRICS)
    print(f"| none | {means} |", flush=True)
    for name in VARIANTS:
        found = values(name)
        changes = [
            bootstrap.bootstrap(found[metric] - plain[metric], clusters, 0, 2000).text(sign=True)
            for metric in METRICS
        ]
        print(f"| {name} | {' | '.join(changes)} |", flush=True)


if __name__ == "__main__":
    main()
