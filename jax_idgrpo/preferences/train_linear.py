"""Fit the linear reward (`rewards.linear`) to preference pairs, with intervals and a learning curve.

The loss is convex and has about twenty parameters, so it is minimised at once on the host, in
float64, by a bounded quasi-Newton method:

    mean over pairs of loss(w . (x_A - x_B)) + 0.001 |w|^2,   w >= 0
    loss(d) = -log sigmoid(d) if A is better, -log sigmoid(-d) if B is better
    loss(d) = -log((theta^2 - 1) sigmoid(d - log theta) sigmoid(-d - log theta)) for a tie

Options (`finetune.options`): those of `batches.PairOptions`, with one dimension; `tokens`, as for
the head; and `features`, the names of terms to use (default: all of `rewards.linear.DIRECTIONS`).
All pairs count alike: `mixing` is "random", "trusted" or "automatic". `teacher` is a folder of a
reward head. `finetune.batch`, `optimizer` and `run.steps` have no effect.

With a checklist in `reward.vlm`, its questions take the place of the terms: x is the soft answer,
or 0 where a gate is not answered with yes. The export is then the checklist with fitted weights.

Source: VisionReward, arXiv 2412.21059; the bound, the ridge and the intervals are ours.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Float, Int

from jax_idgrpo.config import Config
from jax_idgrpo.data.video import File, read_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import progress
from jax_idgrpo.preferences.batches import (
    MIXINGS,
    Differences,
    filter_automatic,
    read_options,
    write_accuracy,
)
from jax_idgrpo.preferences.csv_source import Pair
from jax_idgrpo.preferences.tfds_source import open_pairs
from jax_idgrpo.preferences.train_head import (
    HeadOptions,
    Sides,
    collate,
    differences,
    read_tokens,
)
from jax_idgrpo.rewards.base import Photo, References
from jax_idgrpo.rewards.factory import faces_alone, make_face_reward
from jax_idgrpo.rewards.head import VIDEO, fingerprint, load_head
from jax_idgrpo.rewards.linear import DIRECTIONS, LinearReward, check_features, save_linear
from jax_idgrpo.rewards.vlm.checklist import CHECKLIST, is_checklist, write_checklist
from jax_idgrpo.rewards.vlm.checklist_reward import (
    ChecklistReward,
    counted_answers,
    load_checklist,
)

RIDGE = 0.001
DRAWS = 200
FOLDS = 5
PERCENTILES = (1, 99)


@dataclasses.dataclass(frozen=True)
class LinearOptions(HeadOptions):
    """Options of `finetune.options`; features: names of the terms, in any order."""

    mixing: str = "random"
    features: tuple[str, ...] = tuple(DIRECTIONS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_features(self.features, "finetune.options: features")
        if self.mixing == "smooth":
            raise UserError(
                "finetune.options: mixing smooth changes the pairs from step to step, and the "
                f"linear reward is fitted at once; use {', '.join(MIXINGS[1:])}"
            )
        if len(self.dimensions) != 1:
            raise UserError(
                "finetune.options: a linear reward scores one dimension, "
                f"not {', '.join(self.dimensions)}; name one"
            )


def fit_weights(
    inputs: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"], theta: float
) -> Float[np.ndarray, " K"]:
    """Minimise the loss of the module's docstring.

    Args:
      inputs: inputs of A minus inputs of B, each larger if A is better.
      labels: 1 (A is better), -1 (B is better) or 0 (tie); other pairs are ignored.
      theta: tie parameter, above 1.
    """
    valid = np.isin(labels, (-1, 0, 1))
    x, y = inputs[valid].astype(np.float64), labels[valid].astype(np.float64)
    tied, band = y == 0, math.log(theta)

    def loss(weight: Float[np.ndarray, " K"]) -> tuple[float, Float[np.ndarray, " K"]]:
        d = x @ weight
        above, below = d - band, -d - band
        tie = -scipy.special.log_expit(above) - scipy.special.log_expit(below)
        value = np.where(tied, tie - math.log(theta**2 - 1), -scipy.special.log_expit(y * d))
        tie_slope = scipy.special.expit(-below) - scipy.special.expit(-above)
        slope = np.where(tied, tie_slope, -y * scipy.special.expit(-y * d))
        return (
            float(value.mean() + RIDGE * weight @ weight),
            x.T @ slope / len(x) + 2 * RIDGE * weight,
        )

    start = np.zeros(x.shape[1])
    found = scipy.optimize.minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start)
    )
    return found.x


def bootstrap_intervals(
    inputs: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"], theta: float, seed: int
) -> Float[np.ndarray, "2 K"]:
    """Compute 95 % percentile intervals of the weights over resampled pairs.

    Args:
      inputs: as for `fit_weights`.
      labels: as for `fit_weights`.
      theta: tie parameter, above 1.
      seed: seed of the resamples.
    """
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(labels), size=(DRAWS, len(labels)))
    weights = [fit_weights(inputs[draw], labels[draw], theta) for draw in draws]
    return np.percentile(weights, (2.5, 97.5), axis=0)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fitted reward.

    Attributes:
      reward: the reward.
      intervals: lower and upper end of every weight's 95 % interval.
      curve: see `learning_curve`.
    """

    reward: LinearReward
    intervals: Float[np.ndarray, "2 K"]
    curve: list[tuple[int, float]]


def fit_linear(pairs: Sequence[Pair], sides: Sides, options: LinearOptions, seed: int) -> Fitted:
    """Fit the reward to pairs.

    Args:
      pairs: training pairs.
      sides: tokens of the pairs.
      options: options of the task.
      seed: seed of intervals and curve.
    """
    given = collate(pairs, sides)
    columns = [VIDEO.index(name) for name in options.features]
    limits = np.percentile(given.tokens.video[:, columns], PERCENTILES, axis=0)
    reward = LinearReward(options.features, limits, np.zeros(len(columns)))
    a, b = np.split(np.asarray(reward.inputs(given.tokens)), 2)
    differences_ = a - b, given.labels[:, 0], options.theta
    reward.weight[...] = fit_weights(*differences_).astype(np.float32)
    return Fitted(
        reward, bootstrap_intervals(*differences_, seed), learning_curve(*differences_, seed)
    )


def learning_curve(
    inputs: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"], theta: float, seed: int
) -> list[tuple[int, float]]:
    """Measure the accuracy on held-back pairs for growing numbers of training pairs.

    Five times, a fifth of the pairs is held back, and growing parts of the others are fitted. Ties
    are no test of accuracy.

    Args:
      inputs: as for `fit_weights`.
      labels: as for `fit_weights`.
      theta: tie parameter, above 1.
      seed: seed of the order of pairs.

    Returns:
      Number of training pairs and mean accuracy, ascending; empty with fewer than 20 pairs.
    """
    if len(labels) < 20:
        return []
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = np.array_split(order, FOLDS)
    whole = len(labels) - len(parts[0])
    counts = sorted({max(whole // 2**power, 8) for power in range(5)})
    right: dict[int, list[bool]] = {count: [] for count in counts}
    for number, held in enumerate(parts):
        train = np.concatenate([part for other, part in enumerate(parts) if other != number])
        tested = held[np.abs(labels[held]) == 1]
        for count in counts:
            weight = fit_weights(inputs[train[:count]], labels[train[:count]], theta)
            right[count] += list(inputs[tested] @ weight * labels[tested] > 0)
    return [(count, float(np.mean(found))) for count, found in right.items() if found]


def expected_gain(curve: Sequence[tuple[int, float]], more: int = 100) -> float | None:
    """Estimate how much accuracy further pairs add.

    The model of the curve is accuracy = a - b / sqrt(pairs), b >= 0, fitted by least squares.

    Args:
      curve: as `learning_curve` returns it.
      more: number of further pairs.

    Returns:
      The gain in accuracy; None for a curve of fewer than three points.
    """
    if len(curve) < 3:
        return None
    counts, accuracies = (np.asarray(column, np.float64) for column in zip(*curve, strict=True))
    slope = -np.polyfit(counts**-0.5, accuracies, 1)[0]
    return float(max(slope, 0.0) * (counts[-1] ** -0.5 - (counts[-1] + more) ** -0.5))


def summary(fitted: Fitted) -> list[str]:
    """Format the weights, largest first, and the learning curve as lines."""
    reward = fitted.reward
    weights = np.asarray(reward.weight[...])
    lines = [f"{'feature':<20}{'direction':>10}{'weight':>9}  95 % interval"]
    for index in np.argsort(-weights, kind="stable"):
        name, (low, high) = reward.features[index], fitted.intervals[:, index]
        sign = "+" if DIRECTIONS[name] > 0 else "-"
        lines.append(f"{name:<20}{sign:>10}{weights[index]:>9.3f}  [{low:.3f}, {high:.3f}]")
    if (gain := expected_gain(fitted.curve)) is not None:
        points = ", ".join(f"{accuracy:.3f} with {count}" for count, accuracy in fitted.curve)
        lines.append(f"accuracy by number of pairs: {points}")
        lines.append(f"100 more pairs are expected to add {gain:.3f}")
    return lines


def train(config: Config, workdir: Path) -> None:
    """Fit the reward of `configs/reward_linear.py`, print it, and write it to the workdir.

    Writes `export/linear.json`, or `export/checklist.json` for a checklist (also to `finetune.out`),
    and, with held-out pairs, `accuracy.json`.

    Raises:
      UserError: an option is invalid, or a file cannot be read.
    """
    options = read_options(LinearOptions, config.finetune.options)
    pairs = open_pairs(options.pairs, options.dimensions)
    held_out = open_pairs(options.held_out, options.dimensions) if options.held_out else []
    if options.mixing != "random":
        pairs = [pair for pair in pairs if pair.source == options.mixing]
    if not any(pair.labels[0] in (-1, 1) for pair in pairs):
        raise UserError(
            f"{options.pairs}: no {options.mixing if options.mixing != 'random' else 'labelled'} "
            "pair has a better video; label some with A or B"
        )
    folders = {workdir / "export", Path(config.finetune.out or workdir / "export")}
    fit = _fit_checklist if config.reward.vlm else _fit_faces
    scores = fit(FitInputs(config, options, pairs, held_out, folders))
    write_accuracy(workdir, held_out, scores, options, config.run.seed)


@dataclasses.dataclass(frozen=True)
class FitInputs:
    """What a reward is fitted with.

    Attributes:
      config: configuration of the run.
      options: options of the task.
      pairs: training pairs.
      held_out: further pairs that will be scored.
      folders: destinations.
    """

    config: Config
    options: LinearOptions
    pairs: Sequence[Pair]
    held_out: Sequence[Pair]
    folders: Collection[Path]


def _fit_faces(given: FitInputs) -> Differences:
    """Fit the reward of face terms, print it and write it; return the function that scores pairs."""
    config, options = given.config, given.options
    reward = make_face_reward(dataclasses.replace(faces_alone(config.reward), head="", linear=""))
    networks = fingerprint(reward.state)
    sides = read_tokens(reward, [*given.pairs, *given.held_out], config, options.tokens)
    pairs = filter_automatic(
        given.pairs,
        options,
        lambda: differences(load_head(Path(options.teacher), networks, config.reward), sides),
    )
    fitted = fit_linear(pairs, sides, options, config.run.seed)
    print("\n".join(summary(fitted)))
    for folder in given.folders:
        folder.mkdir(parents=True, exist_ok=True)
        save_linear(fitted.reward, fitted.intervals, folder, networks, config.reward)
    return differences(fitted.reward, sides)


def _fit_checklist(given: FitInputs) -> Differences:
    """Fit the weights of a checklist, print them and write the checklist.

    Returns:
      The function that scores pairs, in log-odds.

    Raises:
      UserError: an option has no effect here, `reward.vlm` is no checklist, or no weight of a
        question without a gate is positive.
    """
    config, options, pairs = given.config, given.options, given.pairs
    if options.tokens or options.teacher or options.features != tuple(DIRECTIONS):
        raise UserError(
            "finetune.options: tokens, teacher and features have no effect on a checklist; leave "
            "them out"
        )
    if not is_checklist(config.reward.vlm):
        raise UserError(
            f"reward.vlm {config.reward.vlm}: holds no {CHECKLIST}; reward_linear fits the weights "
            "of a checklist or, without reward.vlm, of face terms"
        )
    reward = load_checklist(config.reward)
    inputs = _read_answers(reward, [*pairs, *given.held_out])
    difference = np.stack([inputs[pair][0] - inputs[pair][1] for pair in pairs])
    labels = np.asarray([pair.labels[0] for pair in pairs])
    weights = fit_weights(difference, labels, options.theta)
    intervals = bootstrap_intervals(difference, labels, options.theta, config.run.seed)
    fitted = [
        dataclasses.replace(asked, weight=round(float(weight), 6))
        for asked, weight in zip(reward.checklist, weights, strict=True)
    ]
    if not any(asked.weight > 0 and asked.gate is None for asked in fitted):
        raise UserError(
            f"{options.pairs}: no answer to a question without a gate agrees with the labels; label "
            "more pairs, or ask other questions"
        )
    print(f"{'weight':>7}  {'95 % interval':<16}  question")
    for asked, (low, high) in zip(fitted, intervals.T, strict=True):
        interval = f"[{low:.3f}, {high:.3f}]"
        print(f"{asked.weight:>7.3f}  {interval:<16}  {asked.question}")
    for folder in given.folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_checklist(fitted, folder / CHECKLIST)
    return lambda chosen: np.stack(
        [(inputs[pair][0] - inputs[pair][1]) @ weights for pair in chosen]
    )[:, None]


def _read_answers(
    reward: ChecklistReward, pairs: Sequence[Pair]
) -> dict[Pair, tuple[np.ndarray, np.ndarray]]:
    """Compute the soft answers that count, [Q], for both videos of every pair."""
    known: dict[tuple[object, ...], np.ndarray] = {}
    listed = list(dict.fromkeys(pairs))
    with progress("answering questions", len(listed)) as update:
        for done, pair in enumerate(listed, 1):
            for path in pair.videos:
                key = (pair.references, pair.prompt, path)
                if key not in known:
                    known[key] = _answers_of(reward, pair, path)
            update(done)
    return {
        pair: (
            known[pair.references, pair.prompt, pair.videos[0]],
            known[pair.references, pair.prompt, pair.videos[1]],
        )
        for pair in listed
    }


def _answers_of(reward: ChecklistReward, pair: Pair, path: File) -> Float[np.ndarray, " Q"]:
    """Compute the soft answers that count for one video of a pair."""
    video = read_video(path)
    photos = References((tuple(map(Photo, pair.references)),), len(pair.references))
    encoded = reward.encode_references(photos, [pair.prompt], video.shape[:3])
    answers = counted_answers(reward.log_odds(video[None], encoded), reward.checklist)
    return np.asarray(answers[0])
