"""Measure `idgrpo ingest` on a drawn film with known cuts, faults and people.

    python -m benchmarks.ingest [--people 20] [--folder DIR]

Each group of people is drawn in two clips, so that photos can come from another clip. Faulty clips of
every kind are mixed in. The table has: cuts found to the frame; faulty clips left out, and with the
right reason; good clips kept; photos from another clip where one is kept; pairs of clips of one
person that are recognised (recall), and recognised pairs that are right (precision). With the
package scenedetect installed, the cuts of its two detectors are compared, too.
"""

import argparse
import contextlib
import csv
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np

from jax_idgrpo import cli
from jax_idgrpo.data.video import FINE, Clip, write_video
from jax_idgrpo.ingest.frames import Statistics, find_cuts
from tests.helpers.films import FPS, FRAMES, REASONS, drawn_clips, faulty

TIMES = 5  # faulty clips of each kind


def make_film(path: Path, groups: int) -> list[tuple[str, int]]:
    """Write the film, and return fault and group of every clip.

    Args:
      path: the film.
      groups: groups of people with two good clips each.
    """
    kinds = [*("" for _ in range(groups)), *(name for name in REASONS for _ in range(TIMES))]
    pairs = list(itertools.islice(drawn_clips(3, people=2), len(kinds)))
    shots = []
    for group, (fault, pair) in enumerate(zip(kinds, pairs, strict=True)):
        shots.append((fault, group, faulty(pair, fault)))
        if not fault:
            shots.append((fault, group, faulty(pair, fault, variant=1)))
    order = np.random.default_rng(0).permutation(len(shots))
    shots = [shots[index] for index in order]
    write_video(path, np.concatenate([pixels for *_, pixels in shots]), FPS, FINE)
    return [(fault, group) for fault, group, _ in shots]


def detected(film: Path) -> dict[str, list[int]]:
    """Return the cuts by every detector at hand."""
    statistics = Statistics()
    for frame in Clip.open(film).frames():
        statistics.add(frame)
    found = {"ours": find_cuts(statistics.change)}
    with contextlib.suppress(ImportError):
        import scenedetect

        for detector in (scenedetect.AdaptiveDetector(), scenedetect.ContentDetector()):
            scenes = scenedetect.detect(str(film), detector)
            found[f"scenedetect {type(detector).__name__}"] = [
                start.frame_num for start, _ in scenes[1:]
            ]
    return found


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--people", type=int, default=20, help="groups of people")
    options.add_argument("--folder", type=Path, help="folder of film and clips")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        shots = make_film(folder / "film.mp4", arguments.people)
        truth = {FRAMES * number for number in range(1, len(shots))}
        for name, cuts in detected(folder / "film.mp4").items():
            right = len(truth & set(cuts))
            print(
                f"cuts, {name}: recall {right / len(truth):.3f}, precision {right / len(cuts):.3f}"
            )
        (folder / "film.txt").write_text("Two people.")
        given = (
            "--videos",
            folder / "film.mp4",
            "--out",
            folder / "out",
            "--face",
            6,
            "--same",
            0.7,
        )
        cli.run(["ingest", *map(str, given), "--faces", "embedded"])
        (path,) = (folder / "out" / "films").glob("*/film.json")
        clips = json.loads(path.read_text())["clips"]
        with (folder / "out" / "clips.csv").open(encoding="utf-8", newline="") as file:
            kept = list(csv.DictReader(file))
    reason = {round(clip["from"] * FPS) // FRAMES: clip["reason"] for clip in clips}
    bad = [number for number, (fault, _) in enumerate(shots) if fault]
    good = [number for number, (fault, _) in enumerate(shots) if not fault]
    print(f"faulty clips left out: {np.mean([bool(reason[n]) for n in bad]):.3f} of {len(bad)}")
    named = [reason[n] == REASONS[shots[n][0]] for n in bad]
    print(f"with the right reason: {np.mean(named):.3f}")
    print(f"good clips kept: {np.mean([not reason[n] for n in good]):.3f} of {len(good)}")
    foreign, possible, shown = 0, 0, []
    groups = [shots[round(float(row["from"]) * FPS) // FRAMES][1] for row in kept]
    for row, group in zip(kept, groups, strict=True):
        shown.append((group, set(row["people"].split(";"))))
        if groups.count(group) > 1:
            possible += 1
            stem = Path(row["path"]).stem
            foreign += all(stem not in photo for photo in row["ref_paths"].split(";"))
    print(f"photos from another clip where there is one: {foreign} of {possible}")
    pairs = list(itertools.combinations(shown, 2))
    recalled = [len(a[1] & b[1]) / len(a[1]) for a, b in pairs if a[0] == b[0]]
    joined = [a[0] == b[0] for a, b in pairs for _ in a[1] & b[1]]
    print(f"people recognised in their other clip: {np.mean(recalled):.3f} of {2 * len(recalled)}")
    print(f"recognised people who are the same: {np.mean(joined):.3f} of {len(joined)}")


if __name__ == "__main__":
    main()
