"""Which row of the prompts CSV each video of a folder belongs to.

In this order: the column `video` of the CSV, whose cells name files joined by `;`; a file
`samples.jsonl` beside the videos, as `idgrpo sample` writes it; names of the form NUMBER-MEMBER,
NUMBER being the row, counted from 0. Any other name says nothing, and is refused.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_idgrpo.data.prompts import SEPARATOR, Prompt, read_rows
from jax_idgrpo.data.video import SUFFIXES, list_videos
from jax_idgrpo.errors import UserError

COLUMN = "video"
SAMPLES = "samples.jsonl"
NAME = re.compile(r"(\d+)-(\d+)")


class Listing(NamedTuple):
    """Videos with their prompts, by name, and what else lies in the folder."""

    rows: list[tuple[Path, Prompt]]
    passed_over: list[str]


def list_rows(videos: Path, prompts: Path, listed: Sequence[Prompt]) -> Listing:
    """Find the videos of a folder, or one file, and the prompt of each.

    Args:
      videos: a folder or a file.
      prompts: the CSV that `listed` was read from.
      listed: its rows.

    Raises:
      UserError: there is no video, or the row of one is not known.
    """
    if videos.is_dir():
        files, others = list_videos(videos)
        if not files:
            raise UserError(
                f"--videos {videos}: holds no video ({', '.join(SUFFIXES)}); "
                "pass a folder that idgrpo sample wrote"
            )
    else:
        files, others = [videos], []
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
    """File -> row, from the CSV's own column; nothing where it has none."""
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
    """File -> row, from the file that `idgrpo sample` leaves."""
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
