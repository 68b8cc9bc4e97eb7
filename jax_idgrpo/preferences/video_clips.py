"""User-provided clips with photos of the people in them: the folder's CSV, and the splits.

The folder holds `clips.csv`: a prompts CSV (`data.prompts`) with an additional column `path`, the
video file of the row's prompt and people. A person is identified by the name in the column `people`
(names joined by `;` in the order of `ref_paths`, as `idgrpo ingest` writes it). Without that column,
the content of the photo identifies the person: rows with the same file, or with copies of it, show
the same person, and every person needs exactly one photo. The optional column `more_paths` lists
further photos, joined by `|` for one person and by `;` between people.

People who co-occur in a clip, directly or through others, form one identity cluster; clusters are
never split across train and test. A hash of the cluster's photos selects its split: "train" with
probability 0.8, "rl" and "eval" with 0.1 each.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jax_idgrpo.data.places import Places
from jax_idgrpo.data.prompts import COLUMNS, SEPARATOR, load_prompts, read_rows
from jax_idgrpo.data.video import File
from jax_idgrpo.errors import UserError

MOST = 4  # people per clip
# Upper bound of each split's share of the hash range, in [0, 1].
UPTO = {"train": 0.8, "rl": 0.9, "eval": 1.0}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A row of clips.csv.

    people: hash of each person's name or photo. cluster: smallest hash of the identity cluster.
    more: further photos of each person. places: where the people are in the clip; None without that
    column.
    """

    video: Path
    prompt: str
    references: tuple[File, ...]
    people: tuple[str, ...]
    cluster: str = ""
    more: tuple[tuple[File, ...], ...] = ()
    places: Places | None = None


def load_clips(folder: Path, split: str) -> list[Clip]:
    """Load the clips of a folder whose people belong to a split, in the order of the rows.

    Raises:
      UserError: the folder or split does not exist, the CSV or a photo is invalid, a video is
        missing, or no clip belongs to the split.
    """
    if split not in UPTO:
        raise UserError(f"--split {split}: no such split; use one of {', '.join(UPTO)}")
    if not folder.is_dir():
        raise UserError(
            f"--clips {folder}: no such folder; "
            f"name one with clips.csv, whose header is path,{','.join(COLUMNS)}"
        )
    clips = read_clips(folder / "clips.csv")
    chosen = [clip for clip in clips if split_of(clip.cluster) == split]
    if not chosen:
        raise UserError(
            f"--clips {folder}: none of the {len({clip.cluster for clip in clips})} identity "
            f"clusters belongs to the split {split}; add clips of other people"
        )
    return chosen


def read_clips(csv: Path) -> list[Clip]:
    """Read all rows of a clips.csv, in order.

    Raises:
      UserError: the CSV or a photo is invalid, or a video is missing.
    """
    folder = csv.parent
    rows, clips = list(read_rows(csv, ("path", *COLUMNS))), []
    for prompt, (line, row) in zip(load_prompts(csv, MOST), rows, strict=True):
        video = folder / (row["path"] or "").strip()
        if not video.is_file():
            raise UserError(
                f"clips {csv}, line {line}: {video} is no file; "
                "write the video's path relative to the CSV"
            )
        names = [name.strip() for name in (row.get("people") or "").split(SEPARATOR)]
        if any(names) and len(names) != prompt.people:
            raise UserError(
                f"clips {csv}, line {line}: {len(names)} names in people and {prompt.people} photos; "
                f"name every person once, joined by {SEPARATOR}"
            )
        people = tuple(
            hashlib.sha256(content).hexdigest()
            for content in (
                map(str.encode, names)
                if any(names)
                else (photo.read_bytes() for photo in prompt.references)
            )
        )
        if len(set(people)) < len(people):
            raise UserError(
                f"clips {csv}, line {line}: two of the people are the same; "
                "name one photo per person"
            )
        more = prompt.more or ((),) * prompt.people
        shown = (video, prompt.text, prompt.references, people)
        clips.append(Clip(*shown, more=more, places=prompt.places))
    of = {
        person: min(cluster)
        for cluster in identity_clusters([clip.people for clip in clips])
        for person in cluster
    }
    return [dataclasses.replace(clip, cluster=of[clip.people[0]]) for clip in clips]


def identity_clusters(groups: Sequence[Sequence[str]]) -> list[set[str]]:
    """Return the connected components of the people: groups that share a person are merged."""
    found: list[set[str]] = []
    for group in groups:
        touched = [cluster for cluster in found if not cluster.isdisjoint(group)]
        found = [cluster for cluster in found if cluster.isdisjoint(group)] + [
            set(group).union(*touched)
        ]
    return found


def split_of(name: str) -> str:
    """Return the split of a cluster from its name, a hash in hexadecimal digits."""
    share = int(name[:12], 16) / 16**12
    return next(split for split, upto in UPTO.items() if share < upto)
