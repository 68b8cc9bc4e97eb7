"""Give files from the field to the readers of the project, and print what each of them gets.

    python -m benchmarks.field FOLDER [--out TABLE.md]

Every file and subfolder of FOLDER is tried: model files and adapters with `idgrpo-convert inspect`
and `import`, CSV files with the reader of prompts and every photo in them, videos with the reader
of videos. A row says whether the file was read, or the one line that refuses it. Anything else than
these two, such as a traceback, is a defect and makes the exit status 1.
"""

import argparse
import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoints_convert.__main__ import run as convert
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.data.video import Clip, list_videos
from jax_idgrpo.errors import UserError

TABLES = (".csv", ".jsonl")


def outcome(read: Callable[[], str]) -> tuple[str, str]:
    """Return the verdict on one file, "read", "refused" or "DEFECT", and the words to it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            said = read()
        except UserError as error:
            text = str(error)
            return ("refused", text) if "\n" not in text else ("DEFECT", "more than one line")
        except Exception as error:
            return "DEFECT", f"{type(error).__name__}: {error}"
    notes = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    return "read", "; ".join([said, *(f"warning: {note}" for note in notes)])


def inspect(path: Path) -> str:
    """Describe a model file and import it."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        convert(["inspect", str(path)])
        with tempfile.TemporaryDirectory() as out:
            convert(["import", str(path), str(Path(out) / "store")])
    lines = printed.getvalue().splitlines()
    return lines[0] if lines else ""


def prompts(path: Path) -> str:
    """Read a CSV and check its photos."""
    listed = load_prompts(path, 4)
    return f"{len(listed)} rows, {sum(prompt.people for prompt in listed)} photos"


def video(path: Path) -> str:
    """Read all frames of a video, one at a time."""
    clip = Clip.open(path)
    return f"{len(clip.numbers)} frames of {clip.width} x {clip.height} pixels"


def attempts(folder: Path) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """Yield name, kind and reader of everything in a folder."""
    for entry in sorted(folder.iterdir()):
        files = [entry] if entry.is_file() else sorted(entry.iterdir())
        tables = [file for file in files if file.suffix.lower() in TABLES]
        clips = list_videos(entry)[0] if entry.is_dir() else []
        for file in tables:
            yield f"{entry.name}/{file.name}", "prompts", lambda file=file: prompts(file)
        for file in clips:
            yield f"{entry.name}/{file.name}", "video", lambda file=file: video(file)
        if not tables and not clips and entry.is_dir():
            yield entry.name, "model", lambda entry=entry: inspect(entry)


def main() -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description="Try files from the field and print a table.")
    parser.add_argument("folder", type=Path, help="folder of files and folders")
    parser.add_argument("--out", type=Path, help="file for the table, beside printing it")
    given = parser.parse_args()
    rows = ["| input | kind | verdict | words |", "| --- | --- | --- | --- |"]
    defects = 0
    for name, kind, read in attempts(given.folder):
        verdict, words = outcome(read)
        defects += verdict == "DEFECT"
        rows.append(f"| {name} | {kind} | {verdict} | {words.replace('|', '/')} |")
        print(rows[-1], flush=True)
    print(f"{len(rows) - 2} inputs, {defects} defects")
    if given.out:
        given.out.write_text("\n".join(rows) + "\n")
    return 1 if defects else 0


if __name__ == "__main__":
    raise SystemExit(main())
