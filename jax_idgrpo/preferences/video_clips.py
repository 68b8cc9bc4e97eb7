"""Clips of one's own with photos of the people in them: the folder's CSV, and who belongs to which split.

The folder holds `clips.csv`: a prompts CSV (`data.prompts`) with one more column `path`, the video file that shows what the row's prompt
says, its people in the order of their photos. A person is a photo's content: rows with the same file, or copies of it, show the same
person, so give everybody one photo. People who are ever in one clip together are a circle, and so are those whom a third joins; a
circle belongs to one split as a whole, by the hash of its photos alone: four fifths to "train", and "rl" and "eval" a tenth each.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jax_idgrpo.data.prompts import COLUMNS, load_prompts, read_rows
from jax_idgrpo.data.video import File
from jax_idgrpo.errors import UserError

MOST = 4  # people of a clip
UPTO = {"train": 0.8, "rl": 0.9, "eval": 1.0}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A row of clips.csv. people: the hash of each photo's content. circle: the least hash of the people who belong together."""

    video: Path
    prompt: str
    references: tuple[File, ...]
    people: tuple[str, ...]
    circle: str = ""


def load_clips(folder: Path, split: str) -> list[Clip]:
    """The clips of a folder whose people belong to a split, in the order of their rows.

    Raises:
      UserError: there is no such folder or split, its CSV or a photo is not as it should be, a video is missing, or nobody is left.
    """
    if split not in UPTO:
        raise UserError(f"--split {split}: no such split; use one of {', '.join(UPTO)}")
    if not folder.is_dir():
        raise UserError(
            f"--clips {folder}: no such folder; name one with clips.csv, whose header is path,{','.join(COLUMNS)}"
        )
    csv = folder / "clips.csv"
    rows, clips = list(read_rows(csv, ("path", *COLUMNS))), []
    for prompt, (line, row) in zip(load_prompts(csv, MOST), rows, strict=True):
        video = folder / (row["path"] or "").strip()
        if not video.is_file():
            raise UserError(
                f"clips {csv}, line {line}: {video} is no file; write the video's path relative to the CSV"
            )
        people = tuple(
            hashlib.sha256(photo.read_bytes()).hexdigest() for photo in prompt.references
        )
        if len(set(people)) < len(people):
            raise UserError(
                f"clips {csv}, line {line}: two of the photos are the same; name one photo per person"
            )
        clips.append(Clip(video, prompt.text, prompt.references, people))
    of = {
        person: min(circle)
        for circle in circles([clip.people for clip in clips])
        for person in circle
    }
    clips = [dataclasses.replace(clip, circle=of[clip.people[0]]) for clip in clips]
    chosen = [clip for clip in clips if split_of(clip.circle) == split]
    if not chosen:
        raise UserError(
            f"--clips {folder}: none of its {len(set(of.values()))} circles of people belongs to the split {split}; add clips"
        )
    return chosen


def circles(groups: Sequence[Sequence[str]]) -> list[set[str]]:
    """The smallest sets that share no member and each hold whole groups."""
    found: list[set[str]] = []
    for group in groups:
        touched = [circle for circle in found if not circle.isdisjoint(group)]
        found = [circle for circle in found if circle.isdisjoint(group)] + [
            set(group).union(*touched)
        ]
    return found


def split_of(name: str) -> str:
    """The split of a circle, by its name: a hash in hexadecimal digits."""
    share = int(name[:12], 16) / 16**12
    return next(split for split, upto in UPTO.items() if share < upto)
