"""Preference pairs with known truth: two takes of one prompt, of which one has the stronger fault.

    idgrpo pairs --out DIR --split train --count 1000 [--distortions swap,blur] [--automatic 0.5]
    idgrpo pairs --out DIR --split train --count 1000 --clips FOLDER --faces NETWORKS --frames 33 --size 240 416 --fps 16

The takes are of drawn people, or of `--clips`, videos with photos of the people in them (`video_clips`, `clip_pairs`). They are two clips
of the same people and prompt, each under a nuisance of its own (light, compression, cropping, a leaning camera): what differs between two
videos that a model makes of one prompt differs here too, so that a reward cannot tell the faulty one by comparing it with itself. One
has the stronger fault of a kind and the other the lesser one or none, and the lesser fault wins; a fifth of the pairs has none at all and
is a tie. Automatic pairs are labelled as a careless labeller does: a share of the labels is drawn afresh among A, B and same.

The folder holds `pairs.csv` in the columns of `csv_source` with further ones that training ignores (num_frames_A, num_frames_B,
distortion, strength_A, strength_B, truth), mp4 files as `video.FINE` and one PNG per photo. Everything is a function of the seed, of the
pair's number and of the clips; people of one split are in no other.
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
"""Kind -> least strength of the stronger fault, and least difference of the two: who somebody is counts however little is changed, while
what is wrong with a picture must be seen. Faults that last for a share of the clip differ by one frame of nine at least."""
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
    """(distortion or "", strengths of A and B, the two videos) of two takes, by eighteen numbers in [0, 1)."""
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


def _said(truth: str, u: Float[np.ndarray, "2"], wrong: float) -> str:
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
    """Make the folder `out`; it appears once it is complete.

    distortions: names, joined by commas. automatic: share of pairs labelled by a labeller who draws a share `careless` of the labels.
    clips: folder of videos, None for drawn people. faces: folder of the networks that find people in them, None for those of drawn people.

    Raises:
      UserError: `out` exists or cannot be made, an option is of no use, or a clip is not as `video_clips` says.
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
            said = _said(truth, u[19:], careless if kind == "automatic" else 0.0)
            sizes = (shape.frames,) * 2 + (shape.fps,) * 2
            rows.writerow(
                (
                    *files,
                    clip_pair.prompt,
                    ";".join(photos),
                    *sizes,
                    said,
                    kind,
                    name,
                    f"{a:.3f}",
                    f"{b:.3f}",
                    truth,
                )
            )
            update(number + 1)
