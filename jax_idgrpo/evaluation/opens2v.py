"""Read the benchmark OpenS2V-Eval, compute its FaceSim, and summarise scores by category.

Layout: a folder with `Open-Domain_Eval.json`, which maps a video id such as `multihuman_3` to
`img_paths` (relative to the folder) and `prompt`, and with the pictures in `Images/`. A generated
video is named by its id, `multihuman_3.mp4`. The category is the id without its number. Pictures of
people are those with a folder `man`, `woman`, `crop_man` or `crop_woman` in their path; ids without
such a picture, as of objects, are passed over.

FaceSim, as `eval/get_facesim.py` of the repository computes it for `singlehuman`, `singleface`,
`humanobj` and `faceobj`; the several people of `multihuman` and `multiface` are not measured:

    frames     32 of the video, at floor(linspace(0, frames - 1, 32))
    detector   insightface's FaceAnalysis at 320 pixels; of several faces the largest is taken, in
               the picture of the person and in each frame; a picture without a face is searched
               again with a grey border of a quarter of its size
    networks   CurricularFace IR-101 on aligned crops ("cur", the reported number), and ArcFace of
               the same FaceAnalysis ("arc")
    value      mean of max(cosine, 0) over frames with a face, 0 without any; "cur" also leaves out
               frames whose value is 0

`facesim` applies the frames, the choice of faces and the mean of "cur" to the faces and cosines of
the configured networks. With networks other than theirs its values are on another scale, so columns
name the network. Numbers of the leaderboard need their detector and CurricularFace.

Source: PKU-YuanGroup/OpenS2V-Nexus, `eval/get_facesim.py`, `eval/README.md` and
`eval/demo_result/input_json`; arXiv 2505.20292.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jax_idgrpo.data.photos import check_photo
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation.sightings import Sightings

FILE = "Open-Domain_Eval.json"
PERSON = ("man", "woman", "crop_man", "crop_woman")
SINGLE = ("singlehuman", "singleface", "humanobj", "faceobj")
FRAMES = 32
NAME = re.compile(r"([A-Za-z]+)_(\d+)")


class Benchmark(NamedTuple):
    """The prompts with people, the row of each video id, and the folder of the pictures."""

    prompts: list[Prompt]
    rows: dict[str, int]
    folder: Path


def load(path: Path, max_people: int) -> Benchmark:
    """Read the prompts with people of the benchmark, and check the pictures of the people.

    Args:
      path: the benchmark's folder, or one of its JSON files.
      max_people: largest number of people of a prompt.

    Raises:
      UserError: the file, an entry or a picture is not as described, or an entry shows too many
        people.
    """
    file = path / FILE if path.is_dir() else path
    folder = file.parent
    prompts: list[Prompt] = []
    rows: dict[str, int] = {}
    for name, entry in _entries(file).items():
        where = f"--benchmark {file}, {name}"
        pictures, text = entry.get("img_paths"), entry.get("prompt")
        if not isinstance(pictures, list) or not isinstance(text, str):
            raise UserError(f"{where}: has no img_paths or no prompt; download the file again")
        people = [str(picture) for picture in pictures if _shows_person(str(picture))]
        if not people:
            continue
        if len(people) > max_people:
            raise UserError(
                f"{where}: shows {len(people)} people, but data.max_people is {max_people}; raise it"
            )
        files = tuple(_inside(folder, picture, where) for picture in people)
        rows[name] = len(prompts)
        prompts.append(Prompt(len(prompts), text, files, where))
    if not prompts:
        raise UserError(f"--benchmark {file}: shows no person; pass {FILE}")
    for prompt in prompts:
        for photo in prompt.references:
            try:
                check_photo(photo)
            except UserError as error:
                raise UserError(f"{prompt.where}: {error}") from None
    return Benchmark(prompts, rows, folder)


def _entries(file: Path) -> dict[str, dict[str, Any]]:
    if not file.is_file():
        raise UserError(
            f"--benchmark {file}: no such file; pass the folder that holds {FILE} and Images"
        )
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--benchmark {file}: is damaged ({error}); download it again") from None
    named = isinstance(entries, dict) and all(NAME.fullmatch(name) for name in entries)
    if not named or not all(isinstance(entry, dict) for entry in entries.values()):
        raise UserError(
            f"--benchmark {file}: does not map video ids such as singlehuman_1 to prompts; pass "
            f"{FILE}"
        )
    return entries


def _shows_person(picture: str) -> bool:
    return any(part in PERSON for part in PurePosixPath(picture).parts[:-1])


def _inside(folder: Path, picture: str, where: str) -> Path:
    path = folder / picture
    if PurePosixPath(picture).is_absolute() or ".." in PurePosixPath(picture).parts:
        raise UserError(f"{where}: image {picture} is outside the folder; download the file again")
    if not path.is_file():
        raise UserError(
            f"{where}: image {path}: no such file; download Images beside the JSON file"
        )
    return path


def category(video: str) -> str:
    """Return the category of a video id or file, such as "multihuman"."""
    return Path(video).stem.rpartition("_")[0]


def facesim(
    boxes: Float[np.ndarray, "T K 4"],
    mask: Bool[np.ndarray, "T K"],
    cosine: Float[np.ndarray, "T K"],
) -> float:
    """Compute FaceSim of one person as the module's docstring describes, in [0, 1].

    Args:
      boxes: x0 y0 x1 y1 of the faces in pixels.
      mask: False where a frame has fewer than K faces.
      cosine: cosine of the person's picture and every face.
    """
    frames = np.linspace(0, len(mask) - 1, FRAMES, dtype=int)
    area = np.where(mask, np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1), -1.0)
    largest = np.take_along_axis(cosine, np.argmax(area, -1)[:, None], axis=1)[:, 0]
    shown = np.asarray(mask.any(-1))
    values = largest[frames][shown[frames]]
    values = values[values > 0]
    return float(values.mean()) if len(values) else 0.0


def measure(prompt: Prompt, found: Sightings) -> dict[str, float]:
    """Compute FaceSim by both networks; nothing for a prompt with several people."""
    if prompt.people > 1:
        return {}
    cosines = {"facesim_embedder": found.cosine, "facesim_judge": found.judge_cosine}
    return {
        name: facesim(found.boxes, found.mask, cosine[:, 0]) for name, cosine in cosines.items()
    }


class Column(NamedTuple):
    """A column of the table: its heading, a value of the videos, and whether it is of one person."""

    heading: str
    value: str
    single: bool


def columns(networks: Mapping[str, str]) -> tuple[Column, ...]:
    """Return the columns of the table.

    Args:
      networks: architectures of "embedder" and "judge".
    """
    embedder, judge = networks["embedder"], networks["judge"]
    return (
        Column(f"FaceSim ({embedder})", "facesim_embedder", True),
        Column(f"FaceSim ({judge})", "facesim_judge", True),
        Column(f"identity ({embedder})", "identity", False),
        Column(f"judge identity ({judge})", "judge_identity", False),
        Column("least person", "identity_minimum", False),
        Column("right number of faces", "count", False),
    )


def table(
    lines: Sequence[Mapping[str, Any]], benchmark: Benchmark, networks: Mapping[str, str]
) -> list[list[str]]:
    """Summarise scored videos by category: a header and rows of cells.

    FaceSim is of categories with one person, the other values of those with several, which FaceSim
    leaves out. Videos that could not be scored are counted as absent.

    Args:
      lines: the lines of the scores.
      benchmark: the benchmark.
      networks: architectures of "embedder" and "judge".
    """
    shown = columns(networks)
    scored = [line for line in lines if "error" not in line]
    expected: dict[str, list[str]] = {}
    for name in benchmark.rows:
        expected.setdefault(category(name), []).append(name)
    groups = {name: [name] for name in expected}
    groups["one person"] = [name for name in expected if name in SINGLE]
    groups["several people"] = [name for name in expected if name not in SINGLE]
    rows = [["category", "videos", *(column.heading for column in shown)]]
    for title, names in groups.items():
        if not names:
            continue
        chosen = [line for line in scored if category(str(line["file"])) in names]
        present = len({Path(str(line["file"])).stem for line in chosen})
        total = sum(len(expected[name]) for name in names)
        single = names[0] in SINGLE
        cells = [
            _mean([line.get(column.value) for line in chosen]) if column.single == single else "-"
            for column in shown
        ]
        rows.append([title, f"{present} of {total}", *cells])
    return rows


def _mean(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    return f"{np.mean(numbers):.3f}" if numbers else "-"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format the table as Markdown."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in rows
    ]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(lines) + "\n"
