"""Complete the prompts of a CSV by descriptions of the people on their photos.

The written CSV has the columns of the original and `prompt_before`, the original prompt. A row that
cannot be completed keeps its prompt. Names of files are rewritten if the CSV is written to another
folder; other columns are copied as they are.

Source: TPIGE, arXiv 2509.01362, whose prompts a multimodal model rewrites.
"""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jax_idgrpo.data.controls import file_digest
from jax_idgrpo.data.mentions import ORDINALS, complete_prompt, keeps_words
from jax_idgrpo.data.prompts import COLUMNS, SEPARATOR, Prompt, load_prompts, read_rows
from jax_idgrpo.errors import UserError
from jax_idgrpo.workdir import write_text

BEFORE = "prompt_before"
WORDS = ("photo", "words")
LISTED = 8  # lines that a message names

Describe = Callable[[Sequence[Prompt]], Mapping[str, str]]
"""Maps prompts to the description of every photo by its SHA-256; "" for none."""


def complete_csv(prompts: Path, out: Path, describe: Describe) -> str:
    """Write a CSV of prompts that describe the people.

    Args:
      prompts: the CSV.
      out: the CSV to write; replaced if it exists, and complete or absent.
      describe: describes the photos.

    Returns:
      How many prompts were completed, and which were not.

    Raises:
      UserError: the CSV or a photo cannot be used, the CSV was written by this function, or `out` is
        the CSV itself.
    """
    if out.resolve() == prompts.resolve():
        raise UserError(f"--out {out}: is the CSV of --prompts; choose another file")
    listed = load_prompts(prompts, len(ORDINALS))
    rows = list(read_rows(prompts, COLUMNS))
    if BEFORE in rows[0][1]:
        raise UserError(
            f"prompts {prompts}: has a column {BEFORE}, so it was completed before; pass the original"
        )
    words = describe(listed)
    completed: list[dict[str, str]] = []
    kept: list[int] = []
    for prompt, (line, row) in zip(listed, rows, strict=True):
        phrases = [words[digest] for digest in prompt.digests]
        text = complete_prompt(prompt.text, phrases) if all(phrases) else prompt.text
        if not all(phrases) or not keeps_words(prompt.text, text):
            kept.append(line)
            text = prompt.text
        moved = _moved(prompt, out) if out.resolve().parent != prompts.resolve().parent else {}
        fields = {name: row[name] or "" for name in row if name is not None}
        fields |= {name: value for name, value in moved.items() if fields.get(name)}
        completed.append(fields | {"prompt": text, BEFORE: prompt.text})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(completed[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(completed)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, file.getvalue())
    summary = f"{len(listed) - len(kept)} of {len(listed)} prompts are completed"
    if not kept:
        return summary
    lines = ", ".join(map(str, kept[:LISTED])) + (", ..." if len(kept) > LISTED else "")
    return (
        f"{summary}; {len(kept)} keep their text, because a photo got no usable description "
        f"(lines {lines})"
    )


def _moved(prompt: Prompt, out: Path) -> dict[str, str]:
    """Return the names of a prompt's files relative to the folder of `out`, by column."""

    def name(file: object) -> str:
        return os.path.relpath(str(file), out.absolute().parent)

    return {
        "ref_paths": SEPARATOR.join(map(name, prompt.references)),
        "more_paths": SEPARATOR.join("|".join(map(name, group)) for group in prompt.more),
        "control": name(prompt.control) if prompt.control else "",
        "mask": name(prompt.mask) if prompt.mask else "",
    }


def read_words(path: Path, prompts: Sequence[Prompt]) -> dict[str, str]:
    """Read descriptions from a CSV with the columns photo and words.

    Photos are compared by content; their names are relative to the CSV.

    Args:
      path: the CSV.
      prompts: the prompts whose photos are to be described.

    Returns:
      The descriptions by the SHA-256 of the photos.

    Raises:
      UserError: a row cannot be used, or a photo of a prompt has no description.
    """
    found: dict[str, str] = {}
    for line, row in read_rows(path, WORDS, "--words"):
        where = f"--words {path}, line {line}"
        photo, words = ((row[name] or "").strip() for name in WORDS)
        words = " ".join(words.split()).rstrip(" .,;")
        file = path.parent / Path(photo).expanduser()
        if None in row:
            raise UserError(
                f'{where}: has more fields than the header; put words with commas in ""'
            )
        if not photo or not file.is_file():
            raise UserError(f"{where}: photo {file}: no such file; names are relative to the CSV")
        if not words:
            raise UserError(f"{where}: no words; describe {photo}, or remove the row")
        if found.setdefault(file_digest(file), words) != words:
            raise UserError(f"{where}: {photo} is described before by other words; remove one row")
    for prompt in prompts:
        for reference, digest in zip(prompt.references, prompt.digests, strict=True):
            if digest not in found:
                raise UserError(
                    f"--words {path}: does not describe {reference} ({prompt.where}); add a row"
                )
    return found
