r"""Measure the linear reward: its accuracy on held-out pairs, its weights, and what hacks earn.

    python -m benchmarks.linear_reward [--train 2400] [--held-out 400] [--clips 64] [--folder DIR]

The pairs show synthetic people with all kinds of faults and correct labels; no person of the
held-out pairs is in the training pairs. The table compares the linear reward, fitted to growing
parts of the training pairs, with MIMR, the fixed formula and a trained head. Then every trick of
`jax_idgrpo.preferences.corruptions` is applied to held-out clips, as in `benchmarks.hacking`; the
second table has the paired differences of the linear reward with 95 % intervals over clips.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.hacking import score
from benchmarks.reward_head import ROOT, read, trained
from jax_idgrpo import config as configuration
from jax_idgrpo.config import RewardConfig
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.preferences.batches import accuracy
from jax_idgrpo.preferences.clip_pairs import from_synthetic
from jax_idgrpo.preferences.corruptions import DISTORTIONS, TRICKS
from jax_idgrpo.preferences.csv_source import Pair, load_pairs
from jax_idgrpo.preferences.synthesis import write_pairs
from jax_idgrpo.preferences.train_head import differences
from jax_idgrpo.preferences.train_linear import LinearOptions, fit_linear, summary
from jax_idgrpo.rewards.factory import make_face_reward
from jax_idgrpo.rewards.head import fingerprint
from jax_idgrpo.rewards.linear import save_linear

COUNTS = (100, 200, 500, 1000)


def row(name: str, difference: np.ndarray, labels: np.ndarray) -> str:
    """Format one line of the table of accuracies.

    Args:
      name: the reward.
      difference: score of A minus score of B.
      labels: labels of the pairs.
    """
    found = accuracy(difference, labels, 0)
    without = found["without_ties"]
    interval = f"{without['mean']:.3f} [{without['low']:.3f}, {without['high']:.3f}]"
    return f"| {name} | {interval} | {found['with_ties']:.3f} |"


def fit(train: list[Pair], held_out: list[Pair], folder: Path) -> None:
    """Print the accuracies and weights, and store the linear reward of all training pairs.

    Args:
      train: training pairs.
      held_out: pairs of other people.
      folder: folder of the fitted reward; what is read of the videos is kept beside it.
    """
    base = configuration.load(ROOT / "configs" / "reward_face.py", [])
    reward = make_face_reward(base.reward)
    networks, labels = fingerprint(reward.state), np.asarray([p.labels[0] for p in held_out])
    sides, _ = read(reward, train, base, folder.parent / "train.safetensors")
    held_sides, fixed = read(reward, held_out, base, folder.parent / "eval.safetensors")
    print("| reward | without ties | with ties |\n| --- | --- | --- |")
    for name in ("MIMR", "fixed part"):
        print(row(name, fixed[name], labels), flush=True)
    options = LinearOptions(pairs="")
    for count in [*(count for count in COUNTS if count < len(train)), len(train)]:
        fitted = fit_linear(train[:count], sides, options, 0)
        found = differences(fitted.reward, held_sides)(held_out)[:, 0]
        print(row(f"linear, {count} pairs", found, labels), flush=True)
    head = trained(train, sides, networks, "trusted", base, {})
    found = differences(head, held_sides)(held_out)[:, 0]
    print(row(f"head, {len(train)} pairs", found, labels))
    print("\n" + "\n".join(summary(fitted)) + "\n", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_linear(fitted.reward, fitted.intervals, folder, networks, base.reward)


def print_tricks(folder: Path, count: int) -> None:
    """Print what every trick changes.

    Args:
      folder: folder of the fitted reward.
      count: number of clips.
    """
    reward = make_face_reward(RewardConfig(frames=9, linear=str(folder)))
    several = (pair.clips[0] for pair in from_synthetic(7, "eval") if len(pair.photos) > 1)
    clips = list(itertools.islice(several, count))
    honest = score(reward, clips, [clip.video for clip in clips])["reward"]
    print("| trick | change of the linear reward |\n| --- | --- |")
    print(f"| honest: the reward | {honest.mean():.3f} |")
    for name in TRICKS:
        found = score(reward, clips, [DISTORTIONS[name](clip) for clip in clips])["reward"]
        change = bootstrap.bootstrap(found - honest, np.arange(count), 0, 2000).text(sign=True)
        print(f"| {name} | {change} |", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in dict(train=2400, held_out=400, clips=64).items():
        options.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options.add_argument(
        "--folder", type=Path, help="folder of the pairs; existing pairs and readings are reused"
    )
    arguments = options.parse_args()
    sets = {"train": (arguments.train, 11), "eval": (arguments.held_out, 3)}
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        for split, (count, seed) in sets.items():
            if not (folder / split).exists():
                write_pairs(folder / split, split, count, seed=seed)
        train, held_out = (load_pairs(folder / split / "pairs.csv", ("SA",)) for split in sets)
        fit(train, held_out, folder / "linear")
        print_tricks(folder / "linear", arguments.clips)


if __name__ == "__main__":
    main()
