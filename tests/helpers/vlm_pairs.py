"""Preference pairs and a short training run of the vision-language reward."""

import csv

import numpy as np
from PIL import Image

from jax_idgrpo import config as c
from jax_idgrpo.data.video import write_video
from tests.helpers import vlm_folders


def write_rows(path, rows):
    """A CSV with the columns of its first row."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_pairs(folder, count, first, size=64, frames=5):
    """Drawn people: a head of a person's colour on a field of another, moving; in the worse video it is gone. Ten pairs in a row differ."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        skin, field = rng.uniform(-0.2, 1, 3), rng.uniform(-1, 0.2, 3)
        y, x = np.mgrid[:size, :size] / size

        def head(centre):
            inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 0.05
            return np.where(inside[..., None], skin, field) + 0.05 * rng.normal(
                size=(size, size, 3)
            )

        path = rng.uniform(0.3, 0.7, (2, 2))
        centres = [path[0] + (path[1] - path[0]) * n / (frames - 1) for n in range(frames)]
        good = np.stack([head(centre) for centre in centres])
        bad = np.stack([field + 0.05 * rng.normal(size=(size, size, 3)) for _ in range(frames)])
        flip = bool(rng.integers(2))
        for side, video in zip("AB", (bad, good) if flip else (good, bad), strict=True):
            write_video(
                folder / f"{number}{side}.mp4", np.clip(video, -1, 1).astype(np.float32), 10
            )
        Image.fromarray(((np.clip(head((0.5, 0.5)), -1, 1) + 1) * 127.5).astype(np.uint8)).save(
            folder / f"{number}.png"
        )
        rows.append(
            {
                "path_A": f"{number}A.mp4",
                "path_B": f"{number}B.mp4",
                "prompt": "a person",
                "ref_paths": f"{number}.png",
                "SA": "B" if flip else "A",
                "source": ("trusted", "automatic")[number % 2],
            }
        )
    return write_rows(folder / "pairs.csv", rows)


def configuration(base, pairs, steps, held_out="", batch=2, rate=1e-3, **options):
    """Return the configuration of a training run on the pairs of a CSV."""
    return c.Config(
        optimizer=c.OptimizerConfig(learning_rate=rate, weight_decay=0.0, ema_decay=0.0),
        reward=c.RewardConfig(vlm_base=str(base), vlm_dtype="float32"),
        finetune=c.FinetuneConfig(
            task="reward_vlm",
            batch=batch,
            log_every=5,
            options={
                "pairs": str(pairs),
                "held_out": str(held_out),
                "rank": 4,
                "alpha": 8.0,
                "remat": False,
                "automatic": 0.5,
            }
            | options,
        ),
        run=c.RunConfig(steps=steps, save_every=max(steps // 2, 1), keep=1, sample_every=0),
    )


def make_base(tmp_path_factory):
    """Return a new folder with a small base model."""
    folder = tmp_path_factory.mktemp("base") / "base"
    vlm_folders.write_base(folder)
    return folder
