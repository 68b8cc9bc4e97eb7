r"""Measure rewards as annotators of pairs, and heads that are trained on their labels.

    python -m benchmarks.annotate --folder DIR [--trusted 300] [--steps 600]

DIR is the folder of `benchmarks.linear_reward`: drawn pairs with correct labels, the people of
`eval` in no pair of `train`. The annotators are the fixed face formula, and a linear reward and a
head that are fitted to the first `--trusted` training pairs. Labels are made as by
`idgrpo annotate` with its defaults: the margin is 0.25 standard deviations for the formula, and the
band of ties of the training loss for the others. The first table counts on held-out pairs

- right: share of the pairs with a better video whose label names it;
- precision: the same share, of those labelled A or B;
- ties found: share of the true ties that are labelled "same".

Then all training pairs are labelled, and a head is trained on each set of labels, and another one on
the same labels as automatic pairs that give way to the `--trusted` pairs with correct labels
(mixing "smooth"); the second table has their accuracy on the held-out pairs.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.linear_reward import row
from benchmarks.reward_head import ROOT, read_videos, trained
from jax_idgrpo import config as configuration
from jax_idgrpo.preferences.couples import REWARD, Scored, kappa, label, margins
from jax_idgrpo.preferences.csv_source import LABELS, Pair, load_pairs
from jax_idgrpo.preferences.train_head import Sides, collate, differences
from jax_idgrpo.preferences.train_linear import LinearOptions, fit_linear
from jax_idgrpo.rewards.factory import make_face_reward
from jax_idgrpo.rewards.head import fingerprint

NAMES = {value: name for name, value in LABELS.items()}
PAIRED = (("face formula", "linear"), ("face formula", "head"), ("linear", "head"))


def labels_of(values: np.ndarray, log_odds: bool) -> list[str]:
    """Label pairs as `idgrpo annotate` does.

    Args:
      values: rewards of both videos, [pairs, 2].
      log_odds: whether the reward is in log-odds.
    """
    scored = [Scored(Path(), None, {REWARD: float(value)}) for value in values.ravel()]
    margin = margins(scored, (REWARD,), 0.25, log_odds)[REWARD]
    return [label(float(a - b), margin) for a, b in values]


def agreed(one: list[str], other: list[str]) -> list[str]:
    """Keep the labels that two annotators share; the others become "invalid"."""
    return [mine if mine == theirs else "invalid" for mine, theirs in zip(one, other, strict=True)]


def print_labels(name: str, labels: list[str], truth: list[str]) -> None:
    """Print one line of the table of annotators.

    Args:
      name: the annotator.
      labels: its labels.
      truth: the correct labels.
    """
    found, true = np.asarray(labels), np.asarray(truth)
    better, decided = true != "same", np.isin(found, ("A", "B"))
    right = np.mean((found == true)[better])
    precision = np.mean((found == true)[better & decided])
    all_right = np.mean((found == true)[found != "invalid"])
    ties = np.mean(found[~better] == "same")
    print(
        f"| {name} | {np.mean(found != 'invalid'):.3f} | {right:.3f} | {precision:.3f} | "
        f"{ties:.3f} | {all_right:.3f} |",
        flush=True,
    )


def with_labels(pairs: list[Pair], sides: Sides, labels: list[str]) -> tuple[list[Pair], Sides]:
    """Return the pairs with other labels, without the invalid ones, and their tokens."""
    made = {
        dataclasses.replace(pair, labels=(LABELS[text],)): sides[pair]
        for pair, text in zip(pairs, labels, strict=True)
        if text != "invalid"
    }
    return list(made), made


def then_trusted(
    pairs: list[Pair], sides: Sides, trusted: list[Pair], correct: Sides
) -> tuple[list[Pair], Sides]:
    """Return labelled pairs as automatic ones, followed by trusted ones, and their tokens.

    Args:
      pairs: labelled pairs.
      sides: their tokens.
      trusted: pairs with correct labels.
      correct: tokens of the trusted pairs.
    """
    made = {dataclasses.replace(pair, source="automatic"): sides[pair] for pair in pairs}
    made |= {pair: correct[pair] for pair in trusted}
    return list(made), made


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--trusted", type=int, default=300)
    options.add_argument("--steps", type=int, default=600)
    arguments = options.parse_args()
    base = configuration.load(
        ROOT / "configs" / "reward_face.py", [("run.steps", str(arguments.steps))]
    )
    reward = make_face_reward(base.reward)
    networks, programs = fingerprint(reward.state), {}
    sets, read = {}, {}
    for split in ("train", "eval"):
        sets[split] = load_pairs(arguments.folder / split / "pairs.csv", ("SA",))
        cache = arguments.folder / f"{split}.safetensors"
        read[split] = read_videos(reward, sets[split], base, cache)
    trusted, sides = sets["train"][: arguments.trusted], read["train"][0]

    def head_of(pairs: list[Pair], tokens: Sides, mixing: str = "trusted") -> Callable:
        return trained(pairs, tokens, networks, mixing, base, programs)

    linear = fit_linear(trusted, sides, LinearOptions(pairs=""), 0).reward
    teacher = head_of(trusted, sides)
    labels: dict[str, dict[str, list[str]]] = {}
    for split, pairs in sets.items():
        tokens, fixed = read[split]
        given = collate(pairs, tokens).tokens
        labels[split] = {"face formula": labels_of(fixed["reward"], False)}
        for name, model in (("linear", linear), ("head", teacher)):
            values = np.stack(np.split(np.asarray(model(given)), 2), axis=1)
            labels[split][name] = labels_of(values, True)
        single = dict(labels[split])
        for one, other in PAIRED:
            labels[split][f"{one} and {other}"] = agreed(single[one], single[other])
    truth = [NAMES[pair.labels[0]] for pair in sets["eval"]]
    print("| annotator | labelled | right | precision | ties found | all labels right |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, found in labels["eval"].items():
        print_labels(name, found, truth)
    for one, other in PAIRED:
        found = kappa(labels["eval"][one], labels["eval"][other])
        print(f"kappa of {one} and {other}: {found:.3f}")

    print("\n| head trained on | without ties | with ties |\n| --- | --- | --- |")
    held = np.asarray([pair.labels[0] for pair in sets["eval"]])

    def tell(name: str, model: Callable) -> None:
        found = differences(model, read["eval"][0])(sets["eval"])[:, 0]
        print(row(name, found, held), flush=True)

    tell(f"truth, {len(sets['train'])} pairs", head_of(sets["train"], sides))
    tell(f"truth, {arguments.trusted} pairs", teacher)
    for name, found in labels["train"].items():
        pairs, tokens = with_labels(sets["train"], sides, found)
        tell(f"labels of {name}, {len(pairs)} pairs", head_of(pairs, tokens))
        both = then_trusted(pairs, tokens, trusted, sides)
        tell(f"the same, then {len(trusted)} trusted pairs", head_of(*both, "smooth"))


if __name__ == "__main__":
    main()
