"""Pairs to label: small videos that browsers play, photos, and a CSV."""

import csv

import numpy as np
from PIL import Image

from jax_idgrpo.data.video import FINE, write_video


def write_label_pairs(folder, count, labels=None, videos=4, **columns):
    """Write a CSV of `count` pairs that share a few videos; labels and columns are lists."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(videos):
        pixels = rng.integers(0, 255, (4, 32, 32, 3)).astype(np.uint8)
        write_video(folder / f"{number}.mp4", pixels, 8)
    write_video(folder / "fine.mp4", pixels, 8, FINE)
    Image.fromarray(pixels[0]).save(folder / "photo.png")
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        names = ["SA"] if labels else []
        rows.writerow(["path_A", "path_B", "prompt", "ref_paths", *names, *columns])
        for number in range(count):
            sides = f"{number % videos}.mp4", f"{(number + 1) % videos}.mp4"
            more = [
                values[number] for values in ([labels] if labels else []) + list(columns.values())
            ]
            rows.writerow([*sides, f"text, number {number}", "photo.png;photo.png", *more])
    return folder / "pairs.csv"
