r"""Measure the accuracy of rewards on preference pairs: cosines, the fixed formula, learned heads.

    python -m benchmarks.reward_head [--train 1600] [--held-out 800] [--seeds 3] [--steps 1200] \
        [--folder DIR]

The pairs show synthetic people (`jax_idgrpo.preferences.synthesis`); no person of the held-out
pairs is in the training pairs. Both sets have one half with all kinds of faults, and one half with
only hard faults (swap, blend, drift, duplicate; column "hard"). Three quarters of the training
pairs are automatic, with half of their labels random.

Heads are trained on different selections of pairs (`ARMS`). "True labels" trains on all pairs with
correct labels. "No hard fault seen" trains on the trusted pairs without hard faults, which are then
new to the head; all other heads see every kind of fault. The teacher of an arm is the head of the
trusted pairs with the same seed. A head's figures are the mean over seeds, and the range.

Accuracy without ties is the share of the pairs with a better video whose better video has the
higher score.
"""

import argparse
import csv
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from checkpoints_convert import store
from jax_idgrpo import config as configuration
from jax_idgrpo import rng
from jax_idgrpo.config import Config
from jax_idgrpo.preferences.batches import PairOptions, accuracy, confirmed_pairs
from jax_idgrpo.preferences.corruptions import DISTORTIONS
from jax_idgrpo.preferences.csv_source import LABELS, Pair, load_pairs
from jax_idgrpo.preferences.synthesis import write_pairs
from jax_idgrpo.preferences.train_head import Sides, differences, head_task, read_one
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.factory import make_face_reward
from jax_idgrpo.rewards.head import Head, Tokens, fingerprint
from jax_idgrpo.training.finetune import make_step
from jax_idgrpo.training.state import make_optimizer, start
from jax_idgrpo.training.task import Division

ROOT = Path(__file__).parents[1]
HARD = ("swap", "blend", "drift", "duplicate")
SETS = {
    "train": ("train", 11, tuple(DISTORTIONS), 0.75),
    "train_hard": ("train", 12, HARD, 0.75),
    "held_out": ("eval", 3, tuple(DISTORTIONS), 0.0),
    "hard": ("eval", 5, HARD, 0.0),
}
"""Name -> (split, seed, kinds of faults, share of automatic pairs)."""
TRAIN, HELD_OUT = ("train", "train_hard"), ("held_out", "hard")
FIXED = {
    "mean cosine": "similarity",
    "min cosine": "similarity_min",
    "MIMR": "mimr",
    "fixed part": "reward",
}
ARMS = {
    "trusted only": ("trusted", False),
    "raw automatic": ("automatic", False),
    "random mix": ("random", True),
    "smooth mix": ("smooth", True),
}
"""Name -> (mixing, whether a teacher filters the automatic pairs)."""


def column(folder: Path, name: str) -> list[str]:
    with (folder / "pairs.csv").open(encoding="utf-8", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def read_videos(
    reward: FaceReward, pairs: Sequence[Pair], config: Config, cache: Path | None = None
) -> tuple[Sides, dict[str, np.ndarray]]:
    """Compute the tokens of every pair, and the fixed rewards of both videos, each [pairs, 2].

    Args:
      reward: face reward.
      pairs: pairs to read.
      config: configuration of the run.
      cache: file that keeps the results; an existing file of as many pairs is used as it is.
    """
    fields = [field.name for field in dataclasses.fields(Tokens)]
    if cache is not None and cache.is_file():
        kept = {name: np.asarray(value) for name, value in store.open_tensors(cache).items()}
        if kept["term.reward"].shape[0] == len(pairs):
            sides = {
                pair: tuple(
                    Tokens(**{name: kept[f"token.{name}"][row, side] for name in fields})
                    for side in (0, 1)
                )
                for row, pair in enumerate(pairs)
            }
            return sides, {term: kept[f"term.{term}"] for term in FIXED.values()}
    sides, fixed = {}, {term: [] for term in FIXED.values()}
    for pair in pairs:
        (terms, a), (others, b) = (read_one(reward, pair, path, config) for path in pair.videos)
        sides[pair] = a, b
        for term in FIXED.values():
            fixed[term].append((terms[term], others[term]))
    values = {term: np.asarray(rows) for term, rows in fixed.items()}
    if cache is not None:
        tokens = {
            f"token.{name}": np.stack(
                [[np.asarray(getattr(side, name)) for side in sides[pair]] for pair in pairs]
            )
            for name in fields
        }
        store.write_file(cache, tokens | {f"term.{term}": rows for term, rows in values.items()})
    return sides, values


def read(
    reward: FaceReward, pairs: Sequence[Pair], config: Config, cache: Path | None = None
) -> tuple[Sides, dict[str, np.ndarray]]:
    """Compute the tokens of every pair, and the fixed rewards' differences (A minus B).

    Args:
      reward: face reward.
      pairs: pairs to read.
      config: configuration of the run.
      cache: see `read_videos`.
    """
    sides, values = read_videos(reward, pairs, config, cache)
    return sides, {name: values[term] @ (1, -1) for name, term in FIXED.items()}


def trained(
    pairs: list[Pair], sides: Sides, networks: str, mixing: str, config, programs: dict
) -> Head:
    """Train a head; returns it with averaged weights, as `finetune` stores it.

    Args:
      pairs: training pairs.
      sides: tokens of the pairs.
      networks: fingerprint of the face networks.
      mixing: see `preferences.batches`.
      config: configuration of the run.
      programs: cache of compiled steps, shared by heads of the same structure.
    """
    task = head_task(pairs, [], sides, networks, PairOptions(pairs="", mixing=mixing), config)
    network = task.init(rng.key(config.run.seed, "init"))
    division = Division.of(task, network)
    params, frozen, rest = division.split(network)
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    step = programs.setdefault(
        division.graph,
        make_step(task, division, optimizer, config.optimizer.ema_decay, config.run.seed),
    )
    state = start(optimizer, params, rest)
    for number in range(config.run.steps):
        state, _ = step(state, frozen, task.batch(config.run.seed, number), ())
    return division.merge(state.ema, frozen, state.rest)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in dict(train=1600, held_out=800, seeds=3, steps=1200).items():
        options.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options.add_argument(
        "--folder",
        type=Path,
        help="folder of the pairs; existing pairs are reused",
    )
    arguments = options.parse_args()
    base = configuration.load(
        ROOT / "configs" / "reward_face.py", [("run.steps", str(arguments.steps))]
    )
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        for name, (split, seed, kinds, automatic) in SETS.items():
            if not (folder / name).exists():
                count = arguments.train if split == "train" else arguments.held_out
                write_pairs(
                    folder / name,
                    split,
                    count,
                    seed=seed,
                    distortions=",".join(kinds),
                    automatic=automatic,
                )
        pairs, held_out = (
            [pair for name in names for pair in load_pairs(folder / name / "pairs.csv", ("SA",))]
            for names in (TRAIN, HELD_OUT)
        )
        faults, held_faults = (
            np.asarray([fault for name in names for fault in column(folder / name, "distortion")])
            for names in (TRAIN, HELD_OUT)
        )
        reward = make_face_reward(base.reward)
        truth = [label for name in TRAIN for label in column(folder / name, "truth")]
        sides, _ = read(reward, pairs, base)
        held_sides, fixed = read(reward, held_out, base)
    networks = fingerprint(reward.state)
    right = [
        dataclasses.replace(pair, labels=(LABELS[label],), source="trusted")
        for pair, label in zip(pairs, truth, strict=True)
    ]
    sides |= {true: sides[pair] for pair, true in zip(pairs, right, strict=True)}
    labels = np.asarray([pair.labels[0] for pair in held_out])
    hard = np.arange(len(labels)) >= arguments.held_out  # the pairs of the second held-out set
    groups = {"all": ~hard, "no paste": ~hard & (held_faults != "paste"), "hard": hard}
    kinds_of = {
        name: (held_faults == name) & (hard if name in HARD else ~hard) for name in DISTORTIONS
    }

    def row(name: str, differences_: Sequence[np.ndarray]) -> str:
        """Format one line of the table: the accuracy of every group, and with ties."""

        def cell(chosen: np.ndarray, kind: str = "without_ties", ranged: bool = True) -> str:
            if not (labels[chosen] != 0).any():
                return "-"
            results = [accuracy(d[chosen], labels[chosen], 0)[kind] for d in differences_]
            values = [value["mean"] if isinstance(value, dict) else value for value in results]
            spread = f" ({min(values):.3f}-{max(values):.3f})" if ranged and len(values) > 1 else ""
            return f"{np.mean(values):.3f}{spread}"

        cells = [
            cell(groups["all"]),
            cell(groups["all"], "with_ties"),
            cell(groups["no paste"]),
            cell(groups["hard"]),
        ]
        cells += [cell(chosen, ranged=False) for chosen in kinds_of.values()]
        return f"| {name} | {' | '.join(cells)} |"

    trusted = sum(pair.source == "trusted" for pair in pairs)
    print(
        f"{len(pairs)} training pairs, {trusted} of them trusted; "
        f"{int((~hard).sum())} held-out pairs and {int(hard.sum())} with only hard faults; "
        f"{arguments.seeds} seeds, {arguments.steps} steps of {base.finetune.batch} pairs\n"
    )
    print("| reward | without ties | with ties | no paste | hard |", " | ".join(kinds_of), "|")
    print("| --- |" + " --- |" * (4 + len(kinds_of)), flush=True)
    for name, difference in fixed.items():
        print(row(name, [difference]), flush=True)
    scores_of: dict[str, list[np.ndarray]] = {
        name: [] for name in (*ARMS, "true labels", "trusted only, no hard fault seen")
    }
    programs: dict = {}
    for seed in range(arguments.seeds):
        began, teacher = time.monotonic(), None
        config = dataclasses.replace(base, run=dataclasses.replace(base.run, seed=seed))

        def opinion(head: Head) -> np.ndarray:
            return differences(head, held_sides)(held_out)[:, 0]

        for name, (mixing, filters) in ARMS.items():
            chosen = pairs
            if filters:
                kinds = [
                    [pair for pair in pairs if pair.source == kind]
                    for kind in ("trusted", "automatic")
                ]
                chosen = kinds[0] + confirmed_pairs(
                    kinds[1], differences(teacher, sides)(kinds[1]), 5.0
                )
            head = trained(chosen, sides, networks, mixing, config, programs)
            teacher = teacher or head
            scores_of[name].append(opinion(head))
        scores_of["true labels"].append(
            opinion(trained(right, sides, networks, "trusted", config, programs))
        )
        few = [pair for pair, fault in zip(pairs, faults, strict=True) if fault not in HARD]
        scores_of["trusted only, no hard fault seen"].append(
            opinion(trained(few, sides, networks, "trusted", config, programs))
        )
        print(f"<!-- seed {seed}: {time.monotonic() - began:.0f} s -->", flush=True)
    for name, found in scores_of.items():
        print(row(f"head, {name}", found), flush=True)


if __name__ == "__main__":
    main()
