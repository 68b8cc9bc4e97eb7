r"""Measure memory and decodes of a run's start with many large photos.

    python -m benchmarks.photo_memory [--rows 1000] [--distinct 50] [--megapixels 12] [--faces DIR]

Writes JPEGs of a face on noise, and a CSV whose rows name one file each; files with the same
content have different names, so that no cache by name hides them. The faces are drawn, or those of
`--photos A.jpg B.jpg`. Then does what `idgrpo train` does before its first step: read the CSV, and
decode every photo once for its face and for its latents at the size of `--height` and `--width`.
Finally all prompts are encoded, as the steps of a run do. Prints, for each phase, the peak of
resident memory above what was resident before the first phase, the seconds, and the decodes per
photo; the networks are loaded and compiled before. The video model is the bundled one.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from jax_idgrpo.config import EMBEDDED, Config, DataConfig, RewardConfig, VideoConfig
from jax_idgrpo.data.prompts import Prompt, load_prompts
from jax_idgrpo.data.video import to_uint8
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import check_references
from jax_idgrpo.sampling import conditioning
from jax_idgrpo.sampling.pipeline import load_pipeline
from jax_idgrpo.synthetic import scenes

Result = TypeVar("Result")


def drawn_faces() -> list[Image.Image]:
    """Draw the portraits of a few people."""
    batch = scenes.batch(3, 0, 32, "train", frames=1)
    return [Image.fromarray(to_uint8(face)) for face in np.asarray(batch.portraits)[:, 0]]


def write_photos(
    folder: Path, rows: int, distinct: int, megapixels: float, photos: Sequence[str]
) -> Path:
    """Write photos and a CSV with one of them per row; returns the CSV.

    Args:
      folder: where to write.
      rows: number of rows, each with a file of its own name.
      distinct: number of different contents.
      megapixels: of each photo, four to three.
      photos: files with the faces to show; drawn ones if there are none.
    """
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    width = round(height * 4 / 3)
    faces = [Image.open(file).convert("RGB") for file in photos] or drawn_faces()
    rng = np.random.default_rng(0)
    for number in range(distinct):
        picture = Image.fromarray(
            rng.integers(90, 170, (height // 8, width // 8, 3), np.uint8)
        ).resize((width, height), Image.Resampling.BICUBIC)
        face = faces[number % len(faces)]
        scale = height * rng.uniform(0.5, 0.8) / face.height
        size = round(face.width * scale), round(face.height * scale)
        picture.paste(face.resize(size, Image.Resampling.BICUBIC), (width // 8, height // 8))
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
    numbers = dict(rows=1000, distinct=50, megapixels=12, height=240, width=416)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--faces", default="embedded", help="folder of face networks")
    parser.add_argument("--photos", nargs="*", default=[], help="files with the faces to show")
    given = parser.parse_args()
    config = Config(
        data=DataConfig(max_people=1, text_length=16),
        video=VideoConfig(frames=5, height=given.height, width=given.width),
        reward=RewardConfig(faces=given.faces),
    )
    with tempfile.TemporaryDirectory() as place:
        small = Path(place) / "small"
        small.mkdir()
        csv = write_photos(small, 2, 2, given.megapixels, given.photos)
        reward = factory.make_face_reward(config.reward)
        pipe = load_pipeline(EMBEDDED / "pipeline")

        def prepare(prompts: Sequence[Prompt], cache: conditioning.Cache) -> None:
            encoder = conditioning.photo_encoder(pipe, config, cache, prompts)
            check_references(reward, prompts, consume=encoder)

        def encode(prompts: Sequence[Prompt], cache: conditioning.Cache) -> None:
            for first in range(0, len(prompts), 4):
                conditioning.encode(pipe, prompts[first : first + 4], config, cache)

        few, cache = load_prompts(csv, 1, decode=False), conditioning.Cache()
        prepare(few, cache)  # compiles
        encode(few, cache)
        large = Path(place) / "large"
        large.mkdir()
        with multiprocessing.get_context("spawn").Pool(1) as other:  # its memory is not measured
            sizes = large, given.rows, given.distinct, given.megapixels, given.photos
            listed = other.apply(write_photos, sizes)
        cache, start = conditioning.Cache(), resident("VmRSS")
        counts = count_decodes()
        print(f"{given.rows} photos of {given.megapixels} megapixels; {start:.2f} GB before\n")
        print("| phase | peak above, GB | seconds | full decodes | reduced decodes |")
        print("| --- | --- | --- | --- | --- |")

        def phase(name: str, function: Callable[[], Result]) -> Result:
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

        prompts = phase("CSV", lambda: load_prompts(listed, 1, decode=False))
        phase("faces and latents of the photos", lambda: prepare(prompts, cache))
        for name in ("first", "second"):
            phase(f"{name} pass over the prompts", lambda: encode(prompts, cache))


if __name__ == "__main__":
    main()
