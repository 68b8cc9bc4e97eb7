"""Load prompts with reference photos from a CSV, and select the prompts of a training step.

The CSV has the header `ref_paths,prompt` and one row per prompt. `ref_paths` are image files joined
by `;`, one per person in the order of the prompt, relative to the CSV or absolute. Rows may have
different numbers of people. The optional column `more_paths` lists further photos of these people,
which `reward.pool` reads: people joined by `;`, photos of one person by `|`, such as
`a2.jpg|a3.jpg;` for two people of whom the second has none. The optional columns `control` and
`mask` name inputs of VACE (`controls`), and `places` says where the people stand (`places`). Further
columns are ignored. Everything is checked before a run starts, photos included, so that a broken photo cannot stop it hours later.
"""

import concurrent.futures
import csv
import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grain

from jax_idgrpo.data.controls import file_digest, find_controls
from jax_idgrpo.data.photos import (
    Checked,
    check_photo,
    identify_photo,
    load_reference,
    on_white,
)
from jax_idgrpo.data.places import Places, parse_places
from jax_idgrpo.data.video import File
from jax_idgrpo.errors import UserError

__all__ = [
    "COLUMNS",
    "SEPARATOR",
    "Prompt",
    "describe_change",
    "load_prompts",
    "load_reference",
    "on_white",
    "parse_more",
    "prompt_batch",
    "prompts_digest",
    "read_rows",
    "row_digests",
]

COLUMNS = ("ref_paths", "prompt")
SEPARATOR = ";"

_READERS = 8  # threads that check photos; each holds one decoded photo
_LISTED = 3  # problems of a CSV that a message describes in full
_SUFFIX = re.compile(r"\.(avif|bmp|gif|heic|heif|jp2|jpe?g|png|tga|tiff?|webp)\b", re.IGNORECASE)
_COLUMN_SEPARATORS = {";": "semicolons (;)", "\t": "tabs", "|": "bars (|)"}
_QUOTES = "\u201c\u201d\u201e\u201f\uff02\u00ab\u00bb"  # word processors replace " by these


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of a prompts CSV.

    Attributes:
      id: number of the row, from 0.
      text: the prompt.
      references: photos, one per person in the order of the prompt.
      where: the CSV and the line in it, for messages; "" for prompts that come from no CSV.
      digests: SHA-256 of each photo's bytes; () for prompts that come from no CSV.
      more: further photos of each person; () if nobody has any.
      more_digests: SHA-256 of the bytes of the photos in `more`.
      control: video that VACE follows; None for none.
      mask: video or picture, white where the control video is generated; None for everywhere.
      control_digests: SHA-256 of the bytes of `control` and `mask`; () without them.
      places: where the people stand; None if the CSV has no such column.
    """

    id: int
    text: str
    references: tuple[File, ...]
    where: str = dataclasses.field(default="", compare=False)
    digests: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    more: tuple[tuple[File, ...], ...] = ()
    more_digests: tuple[tuple[str, ...], ...] = dataclasses.field(default=(), compare=False)
    control: Path | None = None
    mask: Path | None = None
    control_digests: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    places: Places | None = None

    @property
    def people(self) -> int:
        """Number of people in the prompt."""
        return len(self.references)


# ---- the CSV -------------------------------------------------------------------------------------


def load_prompts(path: str | Path, max_people: int, decode: bool = True) -> list[Prompt]:
    """Read the prompts of a CSV, and check every reference photo.

    Usable rows that look like a mistake cause a warning that names the line.

    Args:
      path: the CSV.
      max_people: largest number of reference photos of a row.
      decode: decode the photos to check their pixels. Commands that decode all photos anyway
        (`rewards.base.check_references`) leave it to that pass.

    Raises:
      UserError: the file, its header, a row or a photo is not as the module's docstring describes,
        or a row has too many references. The message names the file and the first problems, each
        with its line in the file.
    """
    path = Path(path)
    rows = list(read_rows(path))
    if not rows:
        raise UserError(
            f"prompts {path}: no rows below the header; write one prompt per line: "
            f"{','.join(COLUMNS)}"
        )
    parsed: list[Prompt] = []
    numbers: list[int] = []  # of the lines of `parsed`
    problems: list[tuple[int, str]] = []
    for line, row in rows:
        try:
            text, names = _parse(row, max_people)
            further = parse_more(row.get("more_paths") or "", len(names))
            places = parse_places(row, len(names))
            video, mask = find_controls(row, path.parent)
        except UserError as error:
            problems.append((line, str(error)))
            continue
        found: list[File] = []
        for name in [*names, *itertools.chain(*further)]:
            try:
                found.append(_find(name, path.parent))
            except UserError as error:
                problems.append((line, str(error)))
        rest = iter(found[len(names) :])
        more = tuple(tuple(itertools.islice(rest, len(group))) for group in further)
        prompt = Prompt(
            id=len(parsed),
            text=text,
            references=tuple(found[: len(names)]),
            where=f"prompts {path}, line {line}",
            more=more if any(more) else (),
            control=video,
            mask=mask,
            control_digests=tuple(file_digest(file) for file in (video, mask) if file),
            places=places,
        )
        parsed.append(prompt)
        numbers.append(line)
    lines = {
        photo: line
        for line, prompt in zip(reversed(numbers), reversed(parsed), strict=True)
        for photo in (*prompt.references, *itertools.chain(*prompt.more))
    }
    check = check_photo if decode else identify_photo
    checked = _check_photos(sorted(lines, key=lines.__getitem__), check)
    problems += [
        (lines[file], str(result))
        for file, result in checked.items()
        if isinstance(result, UserError)
    ]
    if problems:
        raise UserError(_summary(path, sorted(problems, key=lambda problem: problem[0])))
    known = {file: result for file, result in checked.items() if isinstance(result, Checked)}
    for file, photo in known.items():
        if photo.note:
            warnings.warn(f"prompts {path}, line {lines[file]}: {photo.note}", stacklevel=2)
    prompts = []
    for prompt in parsed:
        digests = tuple(known[file].digest for file in prompt.references)
        if len(set(digests)) < len(digests):
            warnings.warn(
                f"{prompt.where}: shows one photo twice; name one photo per person", stacklevel=2
            )
        of_more = tuple(tuple(known[file].digest for file in group) for group in prompt.more)
        prompts.append(dataclasses.replace(prompt, digests=digests, more_digests=of_more))
    return prompts


def parse_more(text: str, people: int) -> tuple[tuple[str, ...], ...]:
    """Split the column `more_paths` into the names of the further photos of each person.

    Args:
      text: the field; empty for nobody.
      people: number of people of the row.

    Raises:
      UserError: the photos are not listed for every person.
    """
    if not text.strip():
        return ((),) * people
    groups = [
        tuple(name.strip() for name in group.split("|") if name.strip())
        for group in text.split(SEPARATOR)
    ]
    if len(groups) != people:
        raise UserError(
            f"more_paths has photos of {len(groups)} people and ref_paths of {people}; join photos "
            f"of one person by | and people by {SEPARATOR}"
        )
    return tuple(groups)


def _check_photos(
    files: Sequence[File], check: Callable[[File], Checked]
) -> dict[File, Checked | UserError]:
    """Map each file to the result or the error of `check`; few photos are in memory."""

    def checked(file: File) -> Checked | UserError:
        try:
            return check(file)
        except UserError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, _READERS)) as pool:
        return dict(zip(files, pool.map(checked, files), strict=True))


def _summary(path: Path, problems: Sequence[tuple[int, str]]) -> str:
    """Describe the problems of a CSV in one line: the first in full, the others by line number."""
    if len(problems) == 1:
        return "prompts {}, line {}: {}".format(path, *problems[0])
    parts = [f"line {line}: {problem}" for line, problem in problems[:_LISTED]]
    if rest := list(dict.fromkeys(line for line, _ in problems[_LISTED:])):
        parts.append(f"and {len(problems) - _LISTED} more, {_numbers('line', rest)}")
    return f"prompts {path}: {len(problems)} problems | {' | '.join(parts)}"


def _numbers(noun: str, numbers: Sequence[int], most: int = 8) -> str:
    """List the first `most` numbers after their noun, as in "lines 3, 4, 9, ..."."""
    listed = ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")
    return f"{noun}{'s' if len(numbers) > 1 else ''} {listed}"


def read_rows(
    path: Path, columns: Sequence[str] = COLUMNS, what: str = "prompts"
) -> Iterator[tuple[int, dict]]:
    """Read the rows below the header as line numbers and fields.

    Blank rows are skipped. Names of the header match in upper and lower case. A row that is too
    short has None for the missing fields. Fields beyond the header are under the key None.

    Args:
      path: the CSV.
      columns: names that the header must hold.
      what: what the rows are, for messages.

    Raises:
      UserError: the file cannot be read as a CSV, or its header does not have each column once.
    """
    where, header_line = f"{what} {path}", ",".join(columns)
    text = _text(path, where, header_line)
    skipped = 0
    # Excel reads and writes a first line that declares the separator.
    if declared := re.match(r'"?sep=(.)"?\s*?(\r\n?|\n)', text, re.IGNORECASE):
        _refuse_separator(declared[1], where)
        text, skipped = text[declared.end() :], 1
    first = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]
    needed = {name.casefold() for name in columns}
    for separator in (",", *_COLUMN_SEPARATORS):
        if needed.issubset(name.strip(' "').casefold() for name in first.split(separator)):
            _refuse_separator(separator, f"{where}, line {skipped + 1}")
            break
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    header: list[str] | None = None
    spelt = {name.casefold(): name for name in columns}
    last = 0
    try:
        for fields in reader:
            line, last = last + 1 + skipped, reader.line_num
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = [spelt.get(name.strip().casefold(), name.strip()) for name in fields]
                _check_header(header, columns, f"{where}, line {line}")
                continue
            row: dict[str | None, str | list[str] | None] = dict.fromkeys(header)
            row |= zip(header, fields)
            if any(field.strip() for field in fields[len(header) :]):
                row[None] = fields[len(header) :]
            yield line, row
    except csv.Error as error:
        line = max(reader.line_num, 1) + skipped
        raise UserError(f"{where}, line {line}: {error}; check the quotes of this row") from None
    if header is None:
        _check_header([], columns, f"{where}, line 1")


def _text(path: Path, where: str, header: str) -> str:
    """Read the text of a CSV.

    Args:
      path: the CSV.
      where: start of messages.
      header: header of the CSV, for messages.

    Raises:
      UserError: the file is missing, or its content is something else.
    """
    if path.is_dir():
        raise UserError(f"{where}: is a folder; name the CSV file in it")
    if not path.is_file():
        raise UserError(f"{where}: no such file; pass a CSV with the header {header}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{where}: cannot be read ({error.strerror}); check its permissions"
        ) from None
    if content.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise UserError(
            f"{where}: is an Excel workbook or another archive; save the sheet as CSV in UTF-8"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as a "
            "UTF-8 CSV"
        ) from None
    start = text[:512].lstrip().lower()
    for signs, kind in ((("{", "["), "holds JSON"), (("<!doctype", "<html"), "is a web page")):
        if start.startswith(signs):
            raise UserError(f"{where}: {kind}; write a CSV with the header {header}")
    return text


def _check_header(header: Sequence[str], columns: Sequence[str], where: str) -> None:
    """Refuse a header that does not have each column once; the message lists what it has."""
    missing = [name for name in columns if header.count(name) != 1]
    if not missing:
        return
    found = f" and has {', '.join(header)[:120]}" if any(header) else ""
    raise UserError(
        f"{where}: needs one column {missing[0]}{found}; start the file with the header "
        f"{','.join(columns)}"
    )


def _refuse_separator(separator: str, where: str) -> None:
    """Refuse a column separator other than the comma."""
    if separator != ",":
        name = _COLUMN_SEPARATORS.get(separator, repr(separator))
        raise UserError(
            f"{where}: columns are separated by {name}; save the file with commas between the "
            "columns"
        )


def _parse(row: dict, max_people: int) -> tuple[str, list[str]]:
    """Return the prompt and the names of the photos of one row."""
    if None in row:
        if _SUFFIX.search(row["prompt"] or "") or any(map(_SUFFIX.search, row[None])):
            raise UserError(
                f"photos are joined by commas; join them by {SEPARATOR}, as in "
                f"a.png{SEPARATOR}b.png"
            )
        if any(quote in str(row.values()) for quote in _QUOTES):
            raise UserError(
                'more fields than the header has; put the prompt in straight quotes ("), '
                "not in curly ones"
            )
        raise UserError(
            "more fields than the header has; put a prompt that holds commas in double quotes: "
            '"..."'
        )
    if any(row[name] is None for name in COLUMNS):
        raise UserError(f"fewer fields than the header has; a row is {','.join(COLUMNS)}")
    text, listed = (row["prompt"].strip(), row["ref_paths"].strip())
    if not text:
        raise UserError("the prompt is empty; write what the video should show")
    if not listed:
        raise UserError(
            f"no reference photo; name 1 to {max_people} image files in ref_paths, joined by "
            f"{SEPARATOR}"
        )
    names = [name.strip() for name in listed.split(SEPARATOR)]
    if not all(names):
        raise UserError(
            f"an empty name in ref_paths {listed!r}; join image files by single {SEPARATOR}"
        )
    if len(names) > max_people:
        raise UserError(
            f"{len(names)} reference photos, but data.max_people is {max_people}; remove some or "
            "raise data.max_people"
        )
    return text, names


def _find(name: str, folder: Path) -> Path:
    """Find the photo that a row names, relative to the CSV's folder.

    A name that begins with ~ is in the user's home. An accented letter matches in composed and in
    decomposed form, which macOS uses.

    Raises:
      UserError: there is no such file; the message explains what the name looks like.
    """
    if re.match(r"[a-z]+://", name, re.IGNORECASE):
        raise UserError(f"image {name}: is a web address; download the photo and name the file")
    home = Path(os.path.expanduser(name)) if name.startswith("~") else None
    forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    paths = [folder / name, *([home] if home else []), *(folder / form for form in forms)]
    for path in paths:
        # False for a name that no disk can hold, such as a prompt in the wrong column.
        if os.path.exists(path):
            return path
    hint = "check ref_paths, which are relative to the CSV"
    slashed = name.replace("\\", "/")
    last = slashed.rpartition("/")[2]
    if len(_SUFFIX.findall(name)) > 1:
        hint = f"join the photos by {SEPARATOR}, as in a.png{SEPARATOR}b.png"
    elif last != name and os.path.exists(folder / last):
        hint = f"ref_paths are relative to the CSV, and {last} is beside it: write {last}"
    elif re.match(r"[a-zA-Z]:[\\/]", name):
        hint = "it is a Windows path; copy the photos beside the CSV and name them relative to it"
    elif slashed != name and os.path.exists(folder / slashed):
        hint = f"write / between folders: {slashed}"
    elif slashed != name:
        hint = f"write / between folders; {hint}"
    elif os.path.exists(name):
        hint = f"{name} is in the current folder, but ref_paths are relative to the CSV"
    raise UserError(f"image {home or folder / name}: no such file; {hint}")


# ---- prompts of a step ---------------------------------------------------------------------------


def prompt_batch(prompts: Sequence[Prompt], seed: int, step: int, count: int) -> list[int]:
    """Select the prompts of a training step as a pure function of (seed, step).

    Steps read one endless sequence. Every pass is its own permutation, so each prompt occurs once
    per pass. A step that crosses into the next pass, or is larger than a pass, may hold a prompt
    twice.

    Args:
      prompts: all prompts.
      seed: seed of the permutations.
      step: training step, from 0.
      count: prompts per step.

    Returns:
      Indices of the step's prompts.
    """
    return prompt_sequence(range(len(prompts)), seed, step * count, count)


def prompt_sequence(rows: Sequence[int], seed: int, start: int, count: int) -> list[int]:
    """Return a part of the endless sequence of permutations of rows.

    Args:
      rows: indices of prompts.
      seed: seed of the permutations.
      start: position of the first returned index.
      count: number of returned indices.
    """
    order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
    return [rows[int(order[position])] for position in range(start, start + count)]


# ---- changes of the data -------------------------------------------------------------------------


def row_digests(prompts: Sequence[Prompt]) -> list[str]:
    """Hash each row as `TEXT-PHOTOS`, 12 hexadecimal digits each.

    A run stores the digests to describe a change of its data later. They cover the text and the
    bytes of the photos in their order, but not the names and folders of the photos, on which
    nothing depends. `load_prompts` hashes photos while it checks them; photos of prompts from
    elsewhere are read here.
    """

    def short(value: object) -> str:
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]

    def photos(prompt: Prompt) -> list[object]:
        found: list[object] = list(prompt.digests) or [
            hashlib.sha256(file.read_bytes()).hexdigest() for file in prompt.references
        ]
        controls = ["control", *prompt.control_digests] if prompt.control else []
        places = [dataclasses.astuple(prompt.places)] if prompt.places else []
        return [*found, *([prompt.more_digests] if prompt.more else []), *controls, *places]

    return [f"{short(prompt.text)}-{short(photos(prompt))}" for prompt in prompts]


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of the `row_digests` in their order.

    Two CSVs that differ only in column order, further columns, blank rows or quotes have the same
    digest.
    """
    return hashlib.sha256("\n".join(row_digests(prompts)).encode()).hexdigest()


def describe_change(old: Sequence[str], new: Sequence[str]) -> str:
    """Describe in one line how rows differ from earlier ones; "" if they do not.

    Args:
      old: `row_digests` of the earlier rows.
      new: `row_digests` of the present rows.

    Returns:
      The rows that were changed, added (by their present number) or removed (by their earlier
      number), counted from 0.
    """
    if list(old) == list(new):
        return ""
    if sorted(old) == sorted(new):
        return f"the same {len(new)} rows in another order"
    rows_by_kind: dict[str, list[int]] = {
        "another text": [],
        "other photos": [],
        "added": [],
        "removed": [],
    }
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for kind, first, last, start, stop in matcher.get_opcodes():
        if kind == "equal":
            continue
        changed = [_changed(*pair) for pair in zip(old[first:last], new[start:stop])]
        if last - first == stop - start and all(changed):
            for number, sort in enumerate(changed, start):
                rows_by_kind[sort].append(number)
            continue
        rows_by_kind["removed"] += range(first, last)
        rows_by_kind["added"] += range(start, stop)
    verbs = {"another text": "has another text", "other photos": "has other photos"}
    parts = [
        f"{_numbers('row', numbers)} {verbs.get(kind, kind)}"
        for kind, numbers in rows_by_kind.items()
        if numbers
    ]
    return "; ".join(parts) + " (rows counted from 0)"


def _changed(old: str, new: str) -> str:
    """Name the half of two row digests that differs; "" if both do."""
    (text, photos), (new_text, new_photos) = old.split("-"), new.split("-")
    return "other photos" if text == new_text else "another text" if photos == new_photos else ""
