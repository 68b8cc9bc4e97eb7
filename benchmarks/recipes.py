"""Compare the gains of recipes at equal transformer passes and at equal time.

    python benchmarks/recipes.py --workdir runs/recipes               all recipes
    python benchmarks/recipes.py --workdir runs/recipes --only fast nft
    python benchmarks/recipes.py --workdir runs/recipes --table       only print finished results

All recipes take hours on two cores; the same command resumes an interrupted run.

All recipes train the bundled models on the same prompts with the same judge and start noise. The
first steps of every recipe are timed, one recipe after the other (`seconds.json`); only they need a
quiet machine. The parity recipe defines both budgets: the forward passes of its run and, from the
median seconds per step, its time. Every other recipe is trained to the number of steps of either
budget, and `idgrpo evaluate` compares both adapters with the base on held-out people. The fast
recipe is also stopped at one eighth of the forward passes. The parity and the fast recipe are
repeated with two more seeds.

Only the last recipes use guidance, because the bundled base is best without. Their adapters are
evaluated with and without guidance, which shows whether sampling still needs it. Several processes
may share a folder, each with its own `--only`, once `seconds.json` is complete.
"""

import argparse
import itertools
import json
import shutil
import statistics as numbers
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_idgrpo import config as configuration
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.training.setup import forward_passes
from jax_idgrpo.training.train import PHASES

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.py"
UNGUIDED, GUIDED = "evaluation", "evaluation-guided"  # names of folders
CALIBRATION = 6  # steps for measuring the seconds per step; the first ones compile

LATENTS = {
    "rollout.window": "none",
    "rollout.window_size": 0,
    "rollout.start_noise": "distinct",
    "grpo.kl_units": "velocity",
}
FAST = {
    "rollout.steps": 8,
    "rollout.window": "per_prompt",
    "rollout.window_size": 1,
    "grpo.kl": 0,
    "grpo.time_weights": True,
}
RECIPES: dict[str, dict[str, object]] = {
    "parity": {
        "rollout.steps": 25,
        "rollout.window": "all",
        "rollout.window_size": 0,
        "rollout.final_step": "sde",
        "rollout.start_noise": "distinct",
    },
    "window": {},
    "fast": FAST,
    "cps": FAST | {"rollout.sampler": "cps", "grpo.kl_units": "velocity"},
    "guard": FAST | {"grpo.objective": "guard", "grpo.time_weights": False, "grpo.clip": 1e-5},
    "divergence": {"grpo.objective": "divergence"},
    "nft": LATENTS | {"grpo.objective": "nft", "grpo.kl": 1e-3},
    "awm": LATENTS | {"grpo.objective": "awm", "grpo.kl": 1e-3, "grpo.clip": 1.0},
    "dpo": LATENTS
    | {
        "grpo.objective": "dpo",
        "grpo.kl": 1e-3,
        "grpo.best": 1,
        "grpo.worst": 1,
        "reward.mixture": '{"motion": 0.25}',
    },
    "sft": LATENTS
    | {
        "grpo.objective": "sft",
        "grpo.kl": 0,
        "grpo.best": 1,
        "optimizer.learning_rate": 3e-4,  # collapses at 3e-3
    },
    "reward_gradient": LATENTS
    | {"grpo.objective": "reward_gradient", "grpo.kl": 1e-3, "grpo.gradient_steps": 2},
    "fast_guided": FAST | {"rollout.guidance": 2.0},
    "nft_guided": LATENTS | {"grpo.objective": "nft", "grpo.kl": 1e-3, "rollout.guidance": 2.0},
}
# Faster, and without the penalty for copies, which do not occur in these videos.
SHARED = {"model.remat": "none", "reward.penalties": '{"copied": 0}'}
SEEDS = {"parity": (1, 2, 3), "fast": (1, 2, 3)}


def overrides(recipe: str, seed: int) -> dict[str, str]:
    """Return the options of `idgrpo train` for a recipe."""
    of_run = {"run.seed": seed, "run.sample_every": 0, "run.save_every": 10}
    return {name: str(value) for name, value in (SHARED | RECIPES[recipe] | of_run).items()}


def load(recipe: str, seed: int) -> configuration.Config:
    """Load the configuration of a recipe."""
    return configuration.load(CONFIG, list(overrides(recipe, seed).items()))


def words(options: Mapping[str, object]) -> list[object]:
    """Convert options to command-line words."""
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def passes_per_step(recipe: str) -> float:
    """Count the forward passes of one training step."""
    config = load(recipe, 1)
    counted = forward_passes(config, 1 if config.rollout.guidance == 1 else 2)
    return counted["forward_passes_rollout"] + counted["forward_passes_update"]


def idgrpo(*words: object) -> None:
    """Run an `idgrpo` command."""
    subprocess.run(
        [sys.executable, "-m", "jax_idgrpo", *map(str, words)], check=True, cwd=CONFIG.parents[1]
    )


def train(folder: Path, recipe: str, seed: int, steps: int) -> None:
    """Train or resume to `steps` steps, and copy the adapter to a folder named after the steps.

    Args:
      folder: folder of the run.
      recipe: name of the recipe.
      seed: seed of the run.
      steps: last step.
    """
    copy = folder / f"export-{steps}"
    if not copy.exists():
        idgrpo(
            "train",
            CONFIG,
            "--workdir",
            folder,
            *words(overrides(recipe, seed)),
            "--run.steps",
            steps,
        )
        shutil.copytree(folder / "export", copy)


def seconds_per_step(workdir: Path) -> dict[str, float]:
    """Return the median seconds per step of every recipe; times the missing ones.

    Steps with compilation are excluded.
    """
    file = workdir / "seconds.json"
    seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    for recipe in RECIPES:
        if recipe not in seconds:
            folder = workdir / f"{recipe}-1"
            train(folder, recipe, 1, CALIBRATION)
            rows = [
                json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
            ]
            seconds[recipe] = numbers.median(
                sum(row[phase] for phase in PHASES) for row in rows[2:CALIBRATION]
            )
            file.write_text(json.dumps(seconds))
    return seconds


def run(
    workdir: Path, recipe: str, seed: int, parity_steps: int, seconds: dict[str, float]
) -> None:
    """Train a recipe to both budgets and evaluate its adapters.

    Args:
      workdir: folder of the benchmark.
      recipe: name of the recipe.
      seed: seed of the run.
      parity_steps: steps of the parity recipe.
      seconds: seconds per step of every recipe.
    """
    folder = workdir / f"{recipe}-{seed}"
    guidance = RECIPES[recipe].get("rollout.guidance", 1.0)
    scales = {UNGUIDED: 1.0} if guidance == 1.0 else {UNGUIDED: 1.0, GUIDED: guidance}
    if all((folder / name / "metrics.json").exists() for name in scales):
        return
    budget = parity_steps * passes_per_step("parity")
    steps = {"passes": round(budget / passes_per_step(recipe))}
    if recipe != "parity":
        steps["time"] = round(parity_steps * seconds["parity"] / seconds[recipe])
    if recipe == "fast":
        eighth = {"eighth": round(budget / 8 / passes_per_step(recipe))}
        steps = steps | eighth if seed == 1 else eighth
    for count in sorted(steps.values()):
        train(folder, recipe, seed, count)
    (folder / "steps.json").write_text(json.dumps(steps))
    adapters = [f"{name}={folder / f'export-{count}'}" for name, count in steps.items()]
    for name, scale in scales.items():
        options = SHARED | {"evaluate.videos": 4, "evaluate.guidance": scale}
        idgrpo("evaluate", CONFIG, "--out", folder / name, *words(options), "--lora", *adapters)


def evaluated(workdir: Path, recipe: str, name: str) -> list[list[dict[str, Any]]]:
    """Read the videos of the finished evaluations of all seeds.

    Args:
      workdir: folder of the benchmark.
      recipe: name of the recipe.
      name: `UNGUIDED` or `GUIDED`.
    """
    files = [
        workdir / f"{recipe}-{seed}" / name / "metrics.json" for seed in SEEDS.get(recipe, (1,))
    ]
    return [json.loads(file.read_text())["videos"] for file in files if file.exists()]


def table(workdir: Path) -> str:
    """Format the finished evaluations as changes from the base sampled without guidance.

    Seeds are averaged per video; intervals (95 %) are over prompts.
    """
    names = ("judge_identity", "reward", "faces", "motion")
    head = ["recipe", "sampled with", "budget", "seeds", "steps", "forward passes", "s / step"]
    rows = [[*head, *(bootstrap.LABELS[name] for name in names)]]
    seconds = json.loads((workdir / "seconds.json").read_text())
    base = [video["base"] for video in evaluated(workdir, "parity", UNGUIDED)[0]]
    for recipe, name in itertools.product(RECIPES, (UNGUIDED, GUIDED)):
        found = evaluated(workdir, recipe, name)
        if not found:
            continue
        clusters = np.asarray([video["prompt"] for video in found[0]])
        budgets = json.loads((workdir / f"{recipe}-1" / "steps.json").read_text())
        for budget, steps in (budgets if name == UNGUIDED else budgets | {"base": 0}).items():
            seeds = [videos for videos in found if budget in videos[0]]
            scale = 1.0 if name == UNGUIDED else RECIPES[recipe]["rollout.guidance"]
            cells = [
                recipe,
                f"guidance {scale:g}",
                budget,
                str(len(seeds)),
                str(steps),
                f"{steps * passes_per_step(recipe):,.0f}",
                f"{seconds[recipe]:.1f}",
            ]
            for term in names:
                change = [
                    [
                        video[budget][term] - before[term]
                        for video, before in zip(videos, base, strict=True)
                    ]
                    for videos in seeds
                ]
                cells.append(
                    bootstrap.bootstrap(np.mean(change, axis=0), clusters, 0, 2000).text(sign=True)
                )
            rows.append(cells)
    return bootstrap.align(rows)


def main() -> None:
    """Run the missing recipes, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--parity-steps", type=int, default=30)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    given.workdir.mkdir(parents=True, exist_ok=True)
    if not given.table:
        seconds = seconds_per_step(given.workdir.absolute())
        first = [("parity", 1), *((recipe, 1) for recipe in given.only if recipe != "parity")]
        more = [(recipe, seed) for recipe in given.only for seed in SEEDS.get(recipe, ())[1:]]
        for recipe, seed in [*first, *more]:
            run(given.workdir.absolute(), recipe, seed, given.parity_steps, seconds)
    print(table(given.workdir))


if __name__ == "__main__":
    main()
