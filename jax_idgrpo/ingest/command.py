"""Turn a folder of films into clips of people with reference photos and texts.

Every film becomes a folder in `OUT/films`, named by a hash of its content, the options and the face
networks, so the same command continues after an interruption and skips finished films. Then people
are recognised across all films, and the tables are written:

    clips.csv       a prompts CSV (`data.prompts`) with path, more_paths, people and measures
    untitled.csv    the same for clips without a text
    left_out.csv    film, from, to, reason and value of everything that is not used
    ingest.json     clips and seconds after every filter

Source: OpenHumanVid, arXiv 2412.00115, for the order and the thresholds that carry over. Captions,
aesthetics and skeletons are not made here. Licence and consent are the user's responsibility.
"""

import collections
import csv
import dataclasses
import hashlib
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_idgrpo.data.prompts import read_rows
from jax_idgrpo.data.video import list_videos
from jax_idgrpo.errors import UserError
from jax_idgrpo.ingest.faces import ClipReader
from jax_idgrpo.ingest.films import FILE, RATE, Settings, content_hash, process
from jax_idgrpo.ingest.identities import Candidate, choose_photos, group
from jax_idgrpo.parallel.hosts import folder_facts
from jax_idgrpo.workdir import prepare_workdir, write_text

MEASURES = ("luminance", "sharpness", "motion", "stalled", "face", "turn")
COLUMNS = ("path", "ref_paths", "more_paths", "people", "prompt", "film", "from", "to", *MEASURES)
STAGES = {
    "long enough": ("short",),
    "light": ("dark", "bright"),
    "sharp": ("blurred",),
    "moving": ("still", "unsteady", "stalled"),
    "with people": ("nobody", "other faces", "people"),
    "large faces": ("small faces",),
    "one person per track": ("exchanged", "the same person twice"),
    "turning": ("little turn",),
}
"""Filter -> reasons for which it leaves clips out, in order."""


def ingest(
    videos: Path, out: Path, networks: Path, settings: Settings, same: float, captions: Path | None
) -> None:
    """Process every film of a folder and write the tables.

    Args:
      videos: folder of films, or one film.
      out: folder of the results; an existing one is continued.
      networks: folder of face networks.
      settings: what clips and people must be like.
      same: least mean cosine between the clips of one person.
      captions: CSV with the columns video and prompt; None uses the .txt files beside the films.

    Raises:
      UserError: there is no film, no clip is left, or an option cannot be used.
    """
    check_settings(settings, same)
    films = list_films(videos)
    texts = read_captions(captions) if captions else {}
    prepare_workdir(out)
    described, refused = _process_all(films, out, networks, settings)
    rows, left = _rows(described)
    _assign_people(rows, same)
    titled = [(row, _text(row, texts, films)) for row in rows]
    _write_tables(out, titled, [*refused, *left])
    table = funnel(described)
    write_text(out / "ingest.json", json.dumps(table, indent=1))
    print(
        "\n".join(f"{r['filter']:<22}{r['clips']:>7} clips{r['seconds']:>10.1f} s" for r in table)
    )
    people = len({number for row in rows for number in row["identities"]})
    with_text = sum(bool(text) for _, text in titled)
    print(
        f"{with_text} clips in {out / 'clips.csv'}, {len(rows) - with_text} without a text in "
        f"{out / 'untitled.csv'}; {people} people; reasons for the others in {out / 'left_out.csv'}"
    )
    if not rows:
        raise UserError(
            f"--videos {videos}: no clip is left; see {out / 'left_out.csv'} for the reasons, and "
            "relax the options that leave clips out"
        )


def check_settings(settings: Settings, same: float) -> None:
    """Refuse options that no clip can satisfy.

    Raises:
      UserError: an option is out of its range.
    """
    limits, faces = settings.limits, settings.faces
    ranges = {
        "--seconds": limits.seconds,
        "--luminance": limits.luminance,
        "--motion": limits.motion,
        "--people": faces.people,
    }
    for name, (low, high) in ranges.items():
        if not 0 <= low <= high < math.inf:
            raise UserError(f"{name} {low} {high}: give the smaller number first, 0 or more")
    if limits.seconds[1] <= 0 or faces.people[0] < 1:
        raise UserError("--seconds and --people begin above 0")
    if not (-1 <= same <= 1 and 0 <= limits.stalled <= 1 and 0 <= faces.share <= 1):
        raise UserError("--same is a cosine, -1 to 1; --stalled and --share are 0 to 1")


def list_films(videos: Path) -> list[Path]:
    """List the films of a folder in order of their names; a file is listed alone.

    Raises:
      UserError: there is no film.
    """
    if not videos.is_dir():
        return [videos]
    films = sorted(
        {film for folder in [videos, *_folders(videos)] for film in list_videos(folder)[0]}
    )
    if not films:
        raise UserError(f"--videos {videos}: holds no video; name a folder with films")
    return films


def _folders(videos: Path) -> list[Path]:
    return [path for path in videos.rglob("*") if path.is_dir() and not path.name.startswith(".")]


def read_captions(path: Path) -> dict[str, str]:
    """Read texts by name of the film or path of the clip, from the columns video or path, and prompt.

    Raises:
      UserError: the file is not such a CSV.
    """
    found = {}
    for _, row in read_rows(path, ("prompt",), "captions"):
        name = (row.get("path") or row.get("video") or "").strip()
        if name and (row["prompt"] or "").strip():
            found[name] = row["prompt"].strip()
    if not found:
        raise UserError(f"captions {path}: no row has a video (or path) and a prompt; write some")
    return found


def _text(row: Mapping[str, Any], texts: Mapping[str, str], films: Sequence[Path]) -> str:
    """Return the text of a clip: its own, that of its film, or the .txt file beside the film.

    Args:
      row: the clip.
      texts: texts by name.
      films: all films.
    """
    for name in (row["path"], row["film"], Path(row["film"]).stem):
        if name in texts:
            return texts[name]
    for film in films:
        beside = film.with_suffix(".txt")
        if film.name == row["film"] and beside.is_file():
            return " ".join(beside.read_text(encoding="utf-8", errors="replace").split())
    return ""


def _process_all(
    films: Sequence[Path], out: Path, networks: Path, settings: Settings
) -> tuple[list[tuple[Path, dict[str, Any]]], list[dict[str, Any]]]:
    """Process the films that have no result yet.

    Args:
      films: the films.
      out: folder of the results.
      networks: folder of face networks.
      settings: what clips and people must be like.

    Returns:
      Folder and description of every film; rows of the films that cannot be used.

    Raises:
      UserError: a network is missing or damaged, or the folder cannot be written.
    """
    options = json.dumps([dataclasses.asdict(settings), folder_facts(networks)], sort_keys=True)
    reader: ClipReader | None = None
    described, refused = [], []
    seen: dict[str, Path] = {}
    for number, film in enumerate(films, 1):
        print(f"film {number} of {len(films)}: {film.name}", file=sys.stderr)
        try:
            content = content_hash(film)
        except OSError as error:
            refused.append(_left_out(film, f"cannot be read ({error.strerror})"))
            continue
        if content in seen:
            refused.append(_left_out(film, f"the same content as {seen[content].name}"))
            continue
        seen[content] = film
        name = hashlib.sha256(f"{content}\n{options}".encode()).hexdigest()[:16]
        folder = out / "films" / name
        if not (folder / FILE).is_file():
            if reader is None:
                longest = max(2, round(settings.limits.seconds[1] * RATE)) + 1
                reader = ClipReader(networks, longest)
            try:
                process(film, folder, settings, reader)
            except UserError as error:
                print(f"{error}; left out", file=sys.stderr)
                refused.append(_left_out(film, str(error)))
                continue
        described.append((folder, json.loads((folder / FILE).read_text())))
    return described, refused


def _left_out(film: Path, reason: str) -> dict[str, Any]:
    return {"film": film.name, "from": "", "to": "", "reason": reason, "value": ""}


def _rows(
    described: Sequence[tuple[Path, Mapping[str, Any]]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the clips of all films, and those that are left out.

    Args:
      described: folder and description of every film.
    """
    rows, left = [], []
    for folder, film in described:
        for clip in film["clips"]:
            row = clip | {"film": film["film"]}
            if clip["reason"]:
                left.append(row)
            else:
                row["path"] = f"films/{folder.name}/{clip['path']}"
                row["folder"] = f"films/{folder.name}"
                rows.append(row)
    return rows, left


def _assign_people(rows: Sequence[dict[str, Any]], same: float) -> None:
    """Add identities, ref_paths and more_paths to the clips.

    Args:
      rows: all clips.
      same: see `identities.group`.
    """
    people = [(number, person) for number, row in enumerate(rows) for person in row["people"]]
    if not people:
        return
    identities = group(np.asarray([person["embedding"] for _, person in people]), same)
    photos: dict[int, list[Candidate]] = collections.defaultdict(list)
    for (number, person), identity in zip(people, identities, strict=True):
        row = rows[number]
        row.setdefault("identities", []).append(int(identity))
        photos[int(identity)] += [
            Candidate(number, f"{row['folder']}/{shot['path']}", shot["quality"], shot["yaw"])
            for shot in person["photos"]
        ]
    for number, row in enumerate(rows):
        chosen = [choose_photos(photos[identity], number) for identity in row["identities"]]
        row["ref_paths"] = ";".join(photo.path for photo, _ in chosen)
        row["more_paths"] = ";".join("|".join(other.path for other in more) for _, more in chosen)


def _write_tables(
    out: Path,
    titled: Sequence[tuple[Mapping[str, Any], str]],
    left: Sequence[Mapping[str, Any]],
) -> None:
    """Write the CSV files.

    Args:
      out: folder of the results.
      titled: clips with their texts.
      left: what is left out.
    """

    def line(row: Mapping[str, Any], text: str) -> list[object]:
        named = {"prompt": text, "people": ";".join(f"p{n:04d}" for n in row["identities"])}
        return [{**row, **named}.get(name, "") for name in COLUMNS]

    files = {
        "clips.csv": [COLUMNS, *(line(row, text) for row, text in titled if text)],
        "untitled.csv": [COLUMNS, *(line(row, text) for row, text in titled if not text)],
        "left_out.csv": [
            ("film", "from", "to", "reason", "value"),
            *(
                [row.get(name) for name in ("film", "from", "to", "reason", "value")]
                for row in left
            ),
        ],
    }
    for name, rows in files.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(out / name, text.getvalue())


def funnel(described: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return clips and seconds after every filter, beginning with all scenes.

    Args:
      described: folder and description of every film.
    """
    clips = [clip for _, film in described for clip in film["clips"]]
    table = [{"filter": "scenes", **_size(clips)}]
    for name, reasons in STAGES.items():
        clips = [clip for clip in clips if clip["reason"] not in reasons]
        table.append({"filter": name, **_size(clips)})
    return table


def _size(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = sum(clip["to"] - clip["from"] for clip in clips)
    return {"clips": len(clips), "seconds": round(seconds, 2)}
