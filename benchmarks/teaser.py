"""Make the animation of the README from an evaluation: photos, base and tuned side by side.

    python benchmarks/teaser.py runs/quickstart --out docs/images/teaser.gif [--rows 3]

Rows are the first held-out prompts of the evaluation, in its order; none is picked by its result.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from jax_idgrpo.data.video import read_video, to_uint8

SCALE, GAP, LABEL = 3, 6, 16


def enlarge(pixels: np.ndarray) -> np.ndarray:
    """Repeat every pixel of [..., H, W, 3] `SCALE` times in height and width."""
    return pixels.repeat(SCALE, axis=-3).repeat(SCALE, axis=-2)


def animate(folder: Path, rows: int) -> list[Image.Image]:
    """Return the frames of the animation.

    Raises:
      OSError: the folder holds no evaluation.
    """
    shown = json.loads((folder / "metrics.json").read_text())["shown"][:rows]
    people = max(len(entry["references"]) for entry in shown)
    side = Image.open(folder / shown[0]["references"][0]).height * SCALE
    labels = ["photos"] + [""] * (people - 1) + list(shown[0]["videos"])
    width = len(labels) * (side + GAP) - GAP
    clips = [
        {
            name: enlarge(to_uint8(read_video(folder / video["path"])))
            for name, video in entry["videos"].items()
        }
        for entry in shown
    ]
    frames = []
    for number in range(min(len(clip) for row in clips for clip in row.values())):
        canvas = Image.new("RGB", (width, LABEL + len(shown) * (side + GAP)), "white")
        draw = ImageDraw.Draw(canvas)
        for column, label in enumerate(labels):
            draw.text((column * (side + GAP), 2), label, fill="black")
        for row, (entry, videos) in enumerate(zip(shown, clips, strict=True)):
            top = LABEL + row * (side + GAP)
            photos = [
                np.asarray(Image.open(folder / path).convert("RGB")) for path in entry["references"]
            ]
            cells = [enlarge(photo) for photo in photos] + [None] * (people - len(photos))
            for column, cell in enumerate([*cells, *(video[number] for video in videos.values())]):
                if cell is not None:
                    canvas.paste(Image.fromarray(cell), (column * (side + GAP), top))
        frames.append(canvas)
    return frames


def main() -> None:
    """Write the animation."""
    parser = argparse.ArgumentParser(description="Make the README's animation from an evaluation.")
    parser.add_argument("workdir", type=Path, help="folder of a run with its evaluation/")
    parser.add_argument("--out", type=Path, required=True, help="GIF to write")
    parser.add_argument("--rows", type=int, default=3, help="prompts that are shown (default 3)")
    given = parser.parse_args()
    frames = animate(given.workdir / "evaluation", given.rows)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(given.out, save_all=True, append_images=frames[1:], duration=160, loop=0)


if __name__ == "__main__":
    main()
