"""Measure DPO on stored pairs: drawn clips against the bundled model's own videos.

    python -m benchmarks.stored_pairs --folder runs/stored_pairs [--pairs 128] [--steps 300]

Winners are rendered clips of people of the RL split, losers are the base's videos of the same prompts
and photos. The table compares the adapter with the base on the bundled prompts of held-out people.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import jax
from PIL import Image

from jax_idgrpo.data.video import FINE, to_uint8, write_video
from jax_idgrpo.synthetic import captions, scenes

CHUNK, SEED, FPS = 32, 21, 8


def idgrpo(*words: object) -> None:
    """Run a command of the package.

    Raises:
      CalledProcessError: it fails.
    """
    subprocess.run([sys.executable, "-m", "jax_idgrpo", *map(str, words)], check=True)


def write_clips(folder: Path, count: int) -> None:
    """Render clips with their photos, and write `prompts.csv`; clips are named as samples are."""
    folder.mkdir(parents=True)
    rows = []
    for start in range(0, count, CHUNK):
        drawn = jax.device_get(scenes.batch(SEED, start // CHUNK, CHUNK, "rl"))
        for n, text in enumerate(captions.prompts(drawn)):
            name = f"{start + n:04d}"
            write_video(folder / f"{name}-0.mp4", drawn.video[n], FPS, FINE)
            photos = [f"{name}-{m}.png" for m in range(int(drawn.mask[n].sum()))]
            for m, photo in enumerate(photos):
                Image.fromarray(to_uint8(drawn.portraits[n, m])).save(folder / photo)
            rows.append((";".join(photos), text))
    with (folder / "prompts.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("ref_paths", "prompt"), *rows[:count]])


def write_pairs(clips: Path, videos: Path, out: Path) -> None:
    """Pair every clip, the winner, with the base's video of its prompt."""
    with (clips / "prompts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path_A", "path_B", "prompt", "ref_paths", "SA"))
        for n, row in enumerate(rows):
            photos = ";".join(str(clips / name) for name in row["ref_paths"].split(";"))
            sides = clips / f"{n:04d}-0.mp4", videos / f"{n:04d}-0.mp4"
            writer.writerow((*sides, row["prompt"], photos, "A"))


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--folder", type=Path, required=True)
    for name, value in dict(pairs=128, steps=300, batch=8).items():
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--rate", type=float, default=3e-4, help="learning rate")
    given = options.parse_args()
    folder = given.folder.resolve()
    clips, videos, pairs = folder / "clips", folder / "base", folder / "pairs.csv"
    if not clips.exists():
        write_clips(clips, given.pairs)
    idgrpo(
        "sample", "quickstart", "--prompts", clips / "prompts.csv", "--out", videos,
        "--evaluate.videos", 1,
    )  # fmt: skip
    write_pairs(clips, videos, pairs)
    idgrpo(
        "finetune", "adapter", "--workdir", folder / "dpo", "--run.steps", given.steps,
        "--finetune.batch", given.batch, "--optimizer.learning_rate", given.rate,
        "--finetune.options", json.dumps({"pairs": str(pairs), "loss": "dpo"}),
    )  # fmt: skip
    idgrpo(
        "evaluate", "quickstart", "--out", folder / "evaluation",
        "--lora", f"dpo={folder / 'dpo' / 'export'}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
