r"""Generate preference pairs with known labels: two clips of one prompt, one with a stronger fault.

    idgrpo pairs --out DIR --split train --count 1000 [--distortions swap,blur] [--automatic 0.5]
    idgrpo pairs --out DIR --split train --count 1000 --clips FOLDER --faces NETWORKS \
        --frames 33 --size 240 416 --fps 16

The clips show synthetic people, or come from `--clips`, videos with photos of the people in them
(`video_clips`, `clip_pairs`). Each of the two clips gets its own nuisance (light, compression,
cropping or a rolled camera). The clips of a pair therefore differ as two generated videos of one
prompt do, and a reward cannot find the fault by comparing them pixel by pixel. Both clips have the
same kind of fault, one stronger than the other or absent; the weaker fault wins. A fifth of the
pairs has no fault and is a tie. Automatic pairs have label noise: a share of their labels is
replaced by a random choice among A, B and same.

The folder holds `pairs.csv` with the columns of `csv_source` and further columns that training
ignores (num_frames_A, num_frames_B, distortion, strength_A, strength_B, truth), mp4 files encoded
with `video.FINE`, and one PNG per photo. The content depends on the seed, the pair's number and the
clips only. No person occurs in two splits.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from jax_idgrpo import rng, workdir
from jax_idgrpo.config import RewardConfig
from jax_idgrpo.data.video import FINE, write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import progress
from jax_idgrpo.preferences.clip_pairs import Shape, among, from_synthetic, from_videos
from jax_idgrpo.preferences.corruptions import (
    DISTORTIONS,
    LOOKS,
    NUISANCES,
    TOGETHER,
    AnnotatedClip,
)
from jax_idgrpo.synthetic import captions, people

TIES = 0.2  # share of pairs without a fault
STRENGTHS = {name: (0.5, 0.4) if name in LOOKS else (0.2, 0.15) for name in DISTORTIONS} | {
    "swap": (0.2, 0.25)
}
"""Distortion -> (smallest strength of the stronger fault, smallest difference of the strengths).

Small changes of identity count, whereas faults of appearance must be visible. Faults that last for
a share of the clip differ by at least one frame of nine."""
COLUMNS = (
    "path_A",
    "path_B",
    "prompt",
    "ref_paths",
    "num_frames_A",
    "num_frames_B",
    "fps_A",
    "fps_B",
    "SA",
    "source",
    "distortion",
    "strength_A",
    "strength_B",
    "truth",
)


def pair(
    clips: tuple[AnnotatedClip, AnnotatedClip],
    u: Float[np.ndarray, "18"],
    distortions: Sequence[str],
) -> tuple[str, tuple[float, float], list[Float[np.ndarray, "F H W 3"]]]:
    """Corrupt the two clips of a pair.

    Args:
      clips: the two clips of a clip pair.
      u: random numbers in [0, 1).
      distortions: names of the distortions to select from.

    Returns:
      The distortion ("" for a tie), its strengths in A and B, and the two videos.
    """
    tie, kind, much, second, little, order, *nuisances = u
    usable = [name for name in distortions if len(clips[0].people) > 1 or name not in TOGETHER]
    name = "" if tie < TIES or not usable else among(usable, kind)
    least, gap = STRENGTHS.get(name, (0.0, 0.0))
    high = least + (1 - least) * much if name else 0.0
    low = little * (high - gap) if name and second < 0.5 else 0.0
    a, b = (high, low) if order < 0.5 else (low, high)
    videos = []
    for clip, strength, (which, amount, *direction) in zip(
        clips, (a, b), (nuisances[:6], nuisances[6:12]), strict=True
    ):
        video = DISTORTIONS[name](clip, float(strength)) if name else clip.video
        changed = NUISANCES[among(list(NUISANCES), which)](
            video, float(amount), 2 * np.asarray(direction) - 1
        )
        videos.append(np.clip(changed, -1, 1).astype(np.float32))
    return name, (float(a), float(b)), videos


def _noisy_label(truth: str, u: Float[np.ndarray, "2"], wrong: float) -> str:
    """Replace a label by a random one with probability `wrong`."""
    return among(["A", "B", "same"], u[1]) if u[0] < wrong else truth


def write_pairs(
    out: Path,
    split: str,
    count: int,
    seed: int = 0,
    distortions: str = ",".join(DISTORTIONS),
    automatic: float = 0.0,
    careless: float = 0.5,
    clips: Path | None = None,
    faces: Path | None = None,
    shape: Shape = Shape(),
) -> None:
    """Write a folder of preference pairs; the folder appears once it is complete.

    Args:
      out: folder to create.
      split: "train", "rl" or "eval".
      count: number of pairs.
      seed: seed of people, scenes and faults.
      distortions: names of `DISTORTIONS`, joined by commas.
      automatic: share of automatic pairs, in [0, 1].
      careless: label noise: share of the automatic labels that are random, in [0, 1].
      clips: folder of videos; None for synthetic people.
      faces: folder of face networks for `clips`; None for the bundled ones.
      shape: length and size of the clips.

    Raises:
      UserError: `out` exists or cannot be created, an option is invalid, or a clip is not as
        `video_clips` describes.
    """
    names = distortions.split(",")
    captions.check_request(split, count, seed)
    if unknown := [name for name in names if name not in DISTORTIONS]:
        raise UserError(f"--distortions: no {unknown[0]!r}; use {', '.join(DISTORTIONS)}")
    if not 0 <= automatic <= 1 or not 0 <= careless <= 1:
        raise UserError("--automatic and --careless are shares; use 0 to 1")
    if clips is None and (faces or shape.fps != people.FRAMES_PER_SECOND):
        raise UserError(
            "--faces and --fps are for videos; name their folder with --clips, or leave them out"
        )
    root = rng.key(seed, "augment")
    draws = np.asarray(
        jax.vmap(lambda n: jax.random.uniform(rng.fold(root, n), (21,)))(np.arange(count)),
        np.float64,
    )
    networks = (RewardConfig(faces=str(faces)) if faces else RewardConfig()).folder()
    source = (
        from_videos(clips, split, shape, networks, seed)
        if clips
        else from_synthetic(seed, split, shape)
    )
    with (
        workdir.new_folder(out) as folder,
        progress("pairs", count) as update,
        (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for number, u, clip_pair in zip(range(count), draws, source, strict=False):
            name, (a, b), videos = pair(clip_pair.clips, u[:18], names)
            files = [f"{number:05d}-{side}.mp4" for side in "AB"]
            for path, video in zip(files, videos, strict=True):
                write_video(folder / path, video, shape.fps, FINE)
            photos = [f"{number:05d}-{m}.png" for m in range(len(clip_pair.photos))]
            for path, photo in zip(photos, clip_pair.photos, strict=True):
                photo.save(folder / path)
            truth = "same" if a == b else "A" if a < b else "B"
            kind = "automatic" if u[18] < automatic else "trusted"
            label = _noisy_label(truth, u[19:], careless if kind == "automatic" else 0.0)
            sizes = (shape.frames,) * 2 + (shape.fps,) * 2
            rows.writerow(
                (
                    *files,
                    clip_pair.prompt,
                    ";".join(photos),
                    *sizes,
                    label,
                    kind,
                    name,
                    f"{a:.3f}",
                    f"{b:.3f}",
                    truth,
                )
            )
            update(number + 1)
