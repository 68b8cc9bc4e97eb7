r"""Measure memory and decodes of a run's start with many large photos.

    python -m benchmarks.photo_memory [--rows 1000] [--distinct 50] [--megapixels 12] [--passes 40]

Writes JPEGs of a drawn face on noise, and a CSV whose rows name one file each; files with the same
content have different names, so that no cache by name hides them. Then does what `idgrpo train`
does before its first step: read the CSV, which checks every photo, and find the face of every
photo. Finally the canvases of the first `--passes` prompts are made twice. Prints, for each phase,
the peak of resident memory above what was resident before the first phase, the seconds, and the decodes per
photo; the networks are loaded and compiled before.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from jax_idgrpo.config import RewardConfig
from jax_idgrpo.data.photos import PhotoCache
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.data.video import to_uint8
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import check_references
from jax_idgrpo.sampling import conditioning
from jax_idgrpo.synthetic import scenes


def write_photos(folder: Path, rows: int, distinct: int, megapixels: float) -> Path:
    """Write photos and a CSV with one of them per row; returns the CSV.

    Args:
      folder: where to write.
      rows: number of rows, each with a file of its own name.
      distinct: number of different contents.
      megapixels: of each photo, four to three.
    """
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    width = round(height * 4 / 3)
    batch = scenes.batch(3, 0, 32, "train", frames=1)
    faces = np.asarray(batch.portraits)[:, 0]
    rng = np.random.default_rng(0)
    for number in range(distinct):
        picture = Image.fromarray(
            rng.integers(90, 170, (height // 8, width // 8, 3), np.uint8)
        ).resize((width, height), Image.Resampling.BICUBIC)
        face = Image.fromarray(to_uint8(faces[number % len(faces)]))
        side = round(height * rng.uniform(0.5, 0.8))
        picture.paste(
            face.resize((side, side), Image.Resampling.BICUBIC), (width // 4, height // 8)
        )
        picture.save(folder / f"content{number}.jpg", quality=90)
    lines = ["ref_paths,prompt"]
    for row in range(rows):
        os.link(folder / f"content{row % distinct}.jpg", folder / f"photo{row}.jpg")
        lines.append(f"photo{row}.jpg,A person talks {row}")
    (folder / "prompts.csv").write_text("\n".join(lines) + "\n")
    return folder / "prompts.csv"


def count_decodes() -> Counter[str]:
    """Count, from now on, the decodes of JPEGs at full size and at a reduced one."""
    counts: Counter[str] = Counter()
    load, draft, reduced = JpegImageFile.load, JpegImageFile.draft, set[int]()

    def counted(image: JpegImageFile):
        if image.tile:  # not decoded yet
            counts["reduced" if id(image) in reduced else "full"] += 1
            reduced.discard(id(image))
        return load(image)

    def marked(image: JpegImageFile, mode: str | None, size: tuple[int, int] | None):
        reduced.add(id(image))
        return draft(image, mode, size)

    JpegImageFile.load, JpegImageFile.draft = counted, marked
    return counts


def resident(field: str) -> float:
    """Return resident memory of this process in GB: "VmRSS" now, "VmHWM" at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rows", 1000), ("distinct", 50), ("megapixels", 12), ("passes", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    rows = arguments.rows
    with tempfile.TemporaryDirectory() as place:
        small = Path(place) / "small"
        small.mkdir()
        csv = write_photos(small, 2, 2, 1.0)
        reward = factory.make_face_reward(RewardConfig())
        check_references(reward, load_prompts(csv, 1))  # compiles
        large = Path(place) / "large"
        large.mkdir()
        with multiprocessing.get_context("spawn").Pool(1) as other:  # its memory is not measured
            sizes = large, rows, arguments.distinct, arguments.megapixels
            listed = other.apply(write_photos, sizes)
        cache, start = PhotoCache(), resident("VmRSS")
        counts = count_decodes()
        print(f"{rows} photos of {arguments.megapixels} megapixels; {start:.2f} GB before\n")
        print("| phase | peak above, GB | seconds | full decodes | reduced decodes |")
        print("| --- | --- | --- | --- | --- |")

        def phase(name: str, function: Callable[[], object]) -> object:
            counts.clear()
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
            began = time.monotonic()
            value = function()
            seconds = time.monotonic() - began
            print(
                f"| {name} | {resident('VmHWM') - start:.2f} | {seconds:.0f} | {counts['full']} | "
                f"{counts['reduced']} |",
                flush=True,
            )
            return value

        prompts = phase("CSV", lambda: load_prompts(listed, 1))
        phase("faces of the photos", lambda: check_references(reward, prompts))

        def make_canvases() -> None:
            for prompt in prompts[: arguments.passes]:
                cache.fitted(prompt.references[0], conditioning.canvas, 480, 832)

        for name in ("first", "second"):
            phase(f"canvases of {arguments.passes} prompts, {name} pass", make_canvases)


if __name__ == "__main__":
    main()
