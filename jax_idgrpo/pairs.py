"""Preference pairs with known truth, from drawn people: a clip against what a fault of known kind and strength makes of it.

    python -m jax_idgrpo.pairs --out DIR --split train --count 1000 [--distortions swap,blur] [--automatic 0.5]

Both videos of a pair are the same clip, each under a nuisance of its own (light, compression, cropping, a leaning camera). On top of it one
has the stronger fault and the other the lesser one or none, and the lesser fault wins; a fifth of the pairs has none at all and is a tie.
Automatic pairs are labelled as a careless labeller does: a share of the labels is drawn afresh among A, B and same.

The folder holds `pairs.csv` in the columns of `data.preferences` with further ones that training ignores (num_frames_A, num_frames_B,
distortion, strength_A, strength_B, truth), mp4 files as `video.FINE` and one PNG per photo. Everything is a function of the seed and of the
pair's number; people of one split are in no other.
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from jax_idgrpo import keys
from jax_idgrpo.config import RewardConfig
from jax_idgrpo.data import cast, folders
from jax_idgrpo.data.distortions import DISTORTIONS, NUISANCES, TOGETHER, Subject
from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import progress
from jax_idgrpo.rewards.faces import load_stack
from jax_idgrpo.video import FINE, to_uint8, write_video

BATCH = 32
TIES = 0.2          # share of pairs without a fault
LEAST, GAP = 0.5, 0.4       # of the stronger fault, and between the two
SEEN = 0.8          # share of every face that the honest clip shows
FPS = 8
COLUMNS = ("path_A", "path_B", "prompt", "ref_paths", "num_frames_A", "num_frames_B", "fps_A", "fps_B", "SA", "source", "distortion",
           "strength_A", "strength_B", "truth")


def subjects(seed: int, split: str) -> Iterator[tuple[Subject, str]]:
    """Clips and their prompts, endlessly: everybody's face is seen throughout and found in their photo.

    The stranger of a clip is the first person of the one before it in its batch.
    """
    stack = load_stack(RewardConfig().folder(), "embedder")
    best = jax.jit(lambda photos: stack.best(photos))
    step = 0
    while True:
        drawn = jax.device_get(cast.batch(seed, step, BATCH, split))
        flat = drawn.portraits.reshape(-1, *drawn.portraits.shape[2:])
        found = np.asarray(best(flat)[1]).reshape(drawn.mask.shape)
        seen = (drawn.visible > SEEN).all(1) | ~drawn.mask
        for n in np.flatnonzero((seen & (found | ~drawn.mask)).all(1)):
            other = (n - 1) % BATCH
            stranger = drawn.video[other], drawn.boxes[other, :, 0]
            scene, people = jax.tree.map(lambda leaf: leaf[n], (drawn.scene, drawn.people))  # noqa: B023
            subject = Subject(drawn.video[n], drawn.boxes[n], drawn.mask[n], drawn.portraits[n], drawn.portrait_boxes[n], *stranger)
            yield subject, cast.prompt(scene, people, drawn.mask[n])
        step += 1


def _among(names: Sequence[str], u: float) -> str:
    return names[min(int(u * len(names)), len(names) - 1)]


def pair(
    subject: Subject, u: Float[np.ndarray, "18"], distortions: Sequence[str]
) -> tuple[str, tuple[float, float], list[Float[np.ndarray, "F H W 3"]]]:
    """(distortion or "", strengths of A and B, the two videos) of a clip, by eighteen numbers in [0, 1)."""
    tie, kind, much, second, little, order, *nuisances = u
    usable = [name for name in distortions if len(subject.people) > 1 or name not in TOGETHER]
    name = "" if tie < TIES or not usable else _among(usable, kind)
    high = LEAST + (1 - LEAST) * much if name else 0.0
    low = little * (high - GAP) if name and second < 0.5 else 0.0
    a, b = (high, low) if order < 0.5 else (low, high)
    videos = []
    for strength, (which, amount, *direction) in zip((a, b), (nuisances[:6], nuisances[6:12]), strict=True):
        video = DISTORTIONS[name](subject, float(strength)) if name else subject.video
        changed = NUISANCES[_among(list(NUISANCES), which)](video, float(amount), 2 * np.asarray(direction) - 1)
        videos.append(np.clip(changed, -1, 1).astype(np.float32))
    return name, (float(a), float(b)), videos


def _said(truth: str, u: Float[np.ndarray, "2"], wrong: float) -> str:
    return _among(("A", "B", "same"), u[1]) if u[0] < wrong else truth


def write_pairs(
    out: Path,
    split: str,
    count: int,
    seed: int = 0,
    distortions: str = ",".join(DISTORTIONS),
    automatic: float = 0.0,
    careless: float = 0.5,
) -> None:
    """Make the folder `out`; it appears once it is complete.

    distortions: names, joined by commas. automatic: share of pairs labelled by a labeller who draws a share `careless` of the labels.

    Raises:
      UserError: `out` exists or cannot be made, or an option is of no use.
    """
    names = distortions.split(",")
    cast.check_asked(split, count)
    if unknown := [name for name in names if name not in DISTORTIONS]:
        raise UserError(f"--distortions: no {unknown[0]!r}; use {', '.join(DISTORTIONS)}")
    if not 0 <= automatic <= 1 or not 0 <= careless <= 1:
        raise UserError("--automatic and --careless are shares; use 0 to 1")
    root = keys.key(seed, "augment")
    draws = np.asarray(jax.vmap(lambda n: jax.random.uniform(keys.fold(root, n), (21,)))(np.arange(count)), np.float64)
    with (
        folders.new_folder(out) as folder,
        progress("pairs", count) as update,
        (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for number, u, (subject, prompt) in zip(range(count), draws, subjects(seed, split), strict=False):
            name, (a, b), videos = pair(subject, u[:18], names)
            files = [f"{number:05d}-{side}.mp4" for side in "AB"]
            for path, video in zip(files, videos, strict=True):
                write_video(folder / path, video, FPS, FINE)
            photos = [f"{number:05d}-{m}.png" for m in subject.people]
            for path, m in zip(photos, subject.people, strict=True):
                Image.fromarray(to_uint8(subject.photos[m])).save(folder / path)
            truth = "same" if a == b else "A" if a < b else "B"
            source = "automatic" if u[18] < automatic else "trusted"
            said = _said(truth, u[19:], careless if source == "automatic" else 0.0)
            sizes = (len(subject.video),) * 2 + (FPS,) * 2
            rows.writerow((*files, prompt, ";".join(photos), *sizes, said, source, name, f"{a:.3f}", f"{b:.3f}", truth))
            update(number + 1)


def main(arguments: list[str] | None = None) -> int:
    """The command of the module's docstring; returns the exit status."""
    parser = folders.options("Write preference pairs of drawn people, with known truth.", "pairs.csv, mp4 and PNG files", "pairs",
                             ", ".join(cast.SPLITS))
    parser.add_argument("--distortions", default=",".join(DISTORTIONS), help="faults that occur, joined by commas (default: all)")
    parser.add_argument("--automatic", type=float, default=0.0, help="share of automatic pairs, with labels that are partly wrong")
    parser.add_argument("--careless", type=float, default=0.5, help="share of the automatic labels that is drawn (default 0.5)")
    return folders.run(write_pairs, vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
