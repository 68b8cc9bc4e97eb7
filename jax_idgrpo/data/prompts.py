"""Prompts with reference photos: the CSV, its images, and which prompts a training step reads.

The CSV has the header `ref_paths,prompt`, one row per prompt; `ref_paths` are image files joined by `;`, one per person in the
order of the prompt, relative to the CSV or absolute. Rows of different counts of people mix freely; further columns are ignored.
Everything is checked when the file is loaded, images included, so that a broken one cannot stop a run that is hours old.
"""

import concurrent.futures
import csv
import dataclasses
import functools
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from PIL import Image, ImageOps

from jax_idgrpo.data.video import File
from jax_idgrpo.errors import UserError

COLUMNS = ("ref_paths", "prompt")
SEPARATOR = ";"
PICTURES = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Pillow's names of what is read: pictures alone, not those that it has another program draw (EPS)."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of a prompts CSV; its people are in the order of `references`.

    id: rows counted from 0. where: the CSV and the line in it, for messages; empty for prompts that come from no CSV.
    """

    id: int
    text: str
    references: tuple[File, ...]
    where: str = dataclasses.field(default="", compare=False)

    @property
    def people(self) -> int:
        """How many people are asked for."""
        return len(self.references)


def load_prompts(path: str | Path, max_people: int) -> list[Prompt]:
    """The prompts of a CSV, with every reference photo decoded once to be sure of it.

    Raises:
      UserError: the file, its header, a row or an image is not as the module's docstring says, or a row has more than
        `max_people` references; the message names the file and the line in it.
    """
    path = Path(path)
    rows = list(read_rows(path))
    if not rows:
        raise UserError(f"prompts {path}: no rows below the header; write one prompt per line: {','.join(COLUMNS)}")
    prompts = [
        Prompt(k, *_parse(row, path, line, max_people), f"prompts {path}, line {line}") for k, (line, row) in enumerate(rows)
    ]
    lines = {reference: line for (line, _), prompt in reversed(list(zip(rows, prompts))) for reference in prompt.references}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = {reference: pool.submit(load_reference, reference) for reference in sorted(lines, key=lines.__getitem__)}
    for reference, future in checked.items():
        if isinstance(error := future.exception(), UserError):
            raise UserError(f"prompts {path}, line {lines[reference]}: {error}") from None
        future.result()
    return prompts


def read_rows(path: Path, columns: Sequence[str] = COLUMNS) -> Iterator[tuple[int, dict]]:
    """Line numbers and fields of the rows below the header; empty lines are skipped.

    Raises:
      UserError: the file cannot be read as a CSV, or its header has not each of the columns once.
    """
    where = f"prompts {path}"
    if path.is_dir():
        raise UserError(f"{where}: is a folder; name the CSV file in it")
    if not path.is_file():
        raise UserError(f"{where}: no such file; pass a CSV with the header {','.join(columns)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            if missing := [name for name in columns if header.count(name) != 1]:
                raise UserError(f"{where}, line 1: needs one column {missing[0]}; start the file with the header {','.join(columns)}")
            for row in reader:
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as a UTF-8 CSV") from None
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}: {error}; check the quotes of this row") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); check its permissions") from None


def _parse(row: dict, path: Path, line: int, max_people: int) -> tuple[str, tuple[Path, ...]]:
    """Text and reference paths of one row."""
    where = f"prompts {path}, line {line}"
    if None in row:
        raise UserError(f'{where}: more fields than the header has; put a prompt that holds commas in double quotes: "..."')
    if any(row[name] is None for name in COLUMNS):
        raise UserError(f"{where}: fewer fields than the header has; a row is {','.join(COLUMNS)}")
    text, listed = (row["prompt"].strip(), row["ref_paths"].strip())
    if not text:
        raise UserError(f"{where}: the prompt is empty; write what the video should show")
    if not listed:
        raise UserError(f"{where}: no reference photo; name 1 to {max_people} image files in ref_paths, joined by {SEPARATOR}")
    names = [name.strip() for name in listed.split(SEPARATOR)]
    if not all(names):
        raise UserError(f"{where}: an empty name in ref_paths {listed!r}; join image files by single {SEPARATOR}")
    if len(names) > max_people:
        raise UserError(
            f"{where}: {len(names)} reference photos, but data.max_people is {max_people}; remove some or raise data.max_people"
        )
    return text, tuple(path.parent / name for name in names)


@functools.cache
def _formats() -> list[str]:
    """Those of `PICTURES` that this Pillow reads."""
    Image.init()
    return [name for name in PICTURES if name in Image.OPEN]


def load_reference(path: str | File) -> Image.Image:
    """An image file of any mode, size and EXIF orientation as upright RGB; transparent parts become white.

    Raises:
      UserError: the file is missing, is not an image, or is damaged.
    """
    try:
        with Image.open(io.BytesIO((Path(path) if isinstance(path, str) else path).read_bytes()), formats=_formats()) as image:
            return on_white(ImageOps.exif_transpose(image))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"image {path}: no such file; check ref_paths, which are relative to the CSV") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UserError(f"image {path}: cannot be read ({reason}); store it again as PNG or JPEG") from None


def on_white(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: transparent parts become white, 16-bit grey is scaled to 8 bits, float grey is 0 to 1."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) // 257).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray((np.nan_to_num(np.clip(np.asarray(image), 0.0, 1.0)) * 255.0).round().astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def prompt_batch(prompts: Sequence[Prompt], seed: int, step: int, count: int) -> list[int]:
    """Indices of the `count` prompts of a step: a pure function of (seed, step), so a run resumes by its step alone.

    Steps read one endless sequence in which every pass is its own permutation: each prompt comes once per pass. A step that
    crosses into the next pass, or asks for more prompts than there are, may hold a prompt twice.
    """
    order = grain.MapDataset.range(len(prompts)).seed(seed).shuffle().repeat()
    return [int(order[position]) for position in range(step * count, (step + 1) * count)]
