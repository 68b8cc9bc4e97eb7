"""Find the row of the prompts CSV of each video in a folder.

The first of these sources that exists is used:

    1. the column `video` of the CSV, whose cells contain file names joined by `;`
    2. a file `samples.jsonl` beside the videos, as written by `idgrpo sample`
    3. file names of the form NUMBER-MEMBER, where NUMBER is the row, from 0

Without a column or `samples.jsonl`, a file with any other name is refused.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_idgrpo.data.prompts import SEPARATOR, Prompt, read_rows
from jax_idgrpo.data.video import SUFFIXES, list_videos
from jax_idgrpo.errors import UserError

COLUMN = "video"
SAMPLES = "samples.jsonl"
NAME = re.compile(r"(\d+)-(\d+)")


class Listing(NamedTuple):
    """Videos in order of their names, with their prompts, and the names of all other files."""

    rows: list[tuple[Path, Prompt]]
    passed_over: list[str]


def list_rows(videos: Path, prompts: Path, listed: Sequence[Prompt]) -> Listing:
    """Find the prompt of each video of a folder.

    Args:
      videos: a folder of videos, or one video file.
      prompts: the prompts CSV.
      listed: the prompts of the CSV.

    Raises:
      UserError: there is no video, or the row of a video is unknown.
    """
    files, others = _files(videos, "pass a folder that idgrpo sample wrote")
    folder = videos if videos.is_dir() else videos.parent
    passed = [path.name for path in others if path.name != SAMPLES]
    named = _column(prompts, listed)
    source = f"the column {COLUMN} of {prompts}"
    if not named and (folder / SAMPLES).is_file():
        named, source = _samples(folder / SAMPLES, listed), str(folder / SAMPLES)
    if named:
        passed += [file.name for file in files if file.name not in named]
        rows = [(file, listed[named[file.name]]) for file in files if file.name in named]
        if not rows:
            raise UserError(
                f"--videos {videos}: {source} names none of its {len(files)} videos; correct it"
            )
        return Listing(rows, passed)
    return Listing([(file, listed[_number(file, len(listed))]) for file in files], passed)


def list_named(
    videos: Path, rows: Mapping[str, int], source: Path, listed: Sequence[Prompt]
) -> Listing:
    """Find the prompt of each video by its name without suffix.

    Args:
      videos: a folder of videos, or one video file.
      rows: row of each name.
      source: the file that the names are from, for messages.
      listed: the prompts.

    Raises:
      UserError: no video has one of the names.
    """
    files, others = _files(videos, f"pass a folder with videos such as {next(iter(rows))}.mp4")
    found = [(file, listed[rows[file.stem]]) for file in files if file.stem in rows]
    if not found:
        raise UserError(
            f"--videos {videos}: none of its {len(files)} videos is named as in {source}, such as "
            f"{next(iter(rows))}.mp4; rename them"
        )
    return Listing(
        found, [*[f.name for f in others], *[f.name for f in files if f.stem not in rows]]
    )


def _files(videos: Path, remedy: str) -> tuple[list[Path], list[Path]]:
    """List the videos and the other files of a folder; a file is listed alone."""
    if not videos.is_dir():
        return [videos], []
    files, others = list_videos(videos)
    if not files:
        raise UserError(f"--videos {videos}: holds no video ({', '.join(SUFFIXES)}); {remedy}")
    return files, others


def _number(file: Path, rows: int) -> int:
    match = NAME.fullmatch(file.stem)
    if not match:
        raise UserError(
            f"video {file}: its name does not say which row of the prompts CSV it was made from; "
            "name it ROW-NUMBER, such as 0000-0.mp4 for a video of the first row, or name the files "
            f"in a column {COLUMN} of the CSV"
        )
    if int(match[1]) >= rows:
        raise UserError(
            f"video {file}: is named for row {int(match[1])} of the prompts CSV, which has rows "
            f"0 to {rows - 1}; pass the CSV that the videos were made from"
        )
    return int(match[1])


def _column(prompts: Path, listed: Sequence[Prompt]) -> dict[str, int]:
    """Map file names to rows by the column of the CSV; empty if there is no such column."""
    if not prompts.is_file():
        return {}
    named: dict[str, int] = {}
    for number, (line, row) in zip(range(len(listed)), read_rows(prompts), strict=False):
        for name in (row.get(COLUMN) or "").split(SEPARATOR):
            if name.strip() and named.setdefault(Path(name.strip()).name, number) != number:
                raise UserError(
                    f"prompts {prompts}, line {line}: video {name.strip()} is that of an earlier "
                    "row, too; name it once"
                )
    return named


def _samples(path: Path, listed: Sequence[Prompt]) -> dict[str, int]:
    """Map file names to rows by the `samples.jsonl` of `idgrpo sample`."""
    named = {}
    for number, text in enumerate(path.read_text().splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            line: dict[str, Any] = json.loads(text)
            file, prompt = str(line["file"]), str(line["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                f'{where}: is not {{"file": ..., "prompt": ...}}; correct it, or remove {SAMPLES}'
            ) from None
        match = NAME.fullmatch(Path(file).stem)
        rows = [int(match[1])] if match else [row.id for row in listed if row.text == prompt]
        if len(rows) != 1 or rows[0] >= len(listed) or listed[rows[0]].text != prompt:
            raise UserError(
                f"{where}: {file} was made from a prompt that is not that of one row of the CSV "
                f"({prompt[:60]!r}); pass the CSV that the videos were made from"
            )
        named[file] = rows[0]
    return named
