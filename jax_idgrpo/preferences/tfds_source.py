"""Read preference pairs from a CSV, or from a data set that `idgrpo pack-pairs` made of one.

Both contain the same pairs in the same order. Records of a data set are read on demand; only one
letter per label and source is in memory. Videos and photos are decoded from bytes. The folder's
metadata is untrusted: no code is imported and no path is followed; names and types are constants of
`tfds_builder`.
"""

import contextlib
import dataclasses
import functools
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, overload

import grain

from jax_idgrpo import workdir
from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import progress
from jax_idgrpo.preferences.csv_source import LABELS, Pair, Row, load_pairs

LETTERS = {name[0]: value for name, value in LABELS.items()}
SOURCES = {"t": "trusted", "a": "automatic"}
INFO, INDEX = "dataset_info.json", "metadata.json"
MAKE = "idgrpo pack-pairs --csv pairs.csv --out DIR"
AGAIN = "copy the data set again, or make it again"
CACHED_RECORDS = 16
"""Number of cached records."""


def open_pairs(path: str | Path, dimensions: Sequence[str]) -> Sequence[Pair]:
    """Open the pairs of a CSV or of a data set's folder, with the labels of `dimensions`.

    Raises:
      UserError: as `load_pairs` and `StoredPairs`.
    """
    return (
        StoredPairs(Path(path), dimensions) if Path(path).is_dir() else load_pairs(path, dimensions)
    )


def builder() -> ModuleType:
    """Import `tfds_builder`, which requires an optional package.

    Raises:
      UserError: the package is not installed.
    """
    try:
        from jax_idgrpo.preferences import tfds_builder
    except ImportError as error:
        raise UserError(
            f"data sets of pairs need tensorflow-datasets ({error}); "
            "install it: pip install 'jax-idgrpo[data]'"
        ) from None
    return tfds_builder


@dataclasses.dataclass(frozen=True)
class StoredRow:
    """A row of a data set."""

    dataset: "StoredPairs"
    number: int

    def __str__(self) -> str:
        return f"pairs {self.dataset.folder}, pair {self.number}"

    def read(self) -> Row:
        """Read the row.

        Raises:
          UserError: the data set is damaged.
        """
        found = self.dataset.example(self.number)
        photos = tuple(
            StoredFile(self, "references", index) for index in range(len(found["references"]))
        )
        return Row(
            photos,
            (StoredFile(self, "video_A"), StoredFile(self, "video_B")),
            found["prompt"],
            (float(found["fps_A"]), float(found["fps_B"])),
            (int(found["num_frames_A"]), int(found["num_frames_B"])),
        )


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A photo or a video of a data set. index: number of the photo, -1 for a video."""

    row: StoredRow
    name: str
    index: int = -1

    def __str__(self) -> str:
        return (
            f"{self.row}, {self.name}"
            if self.index < 0
            else f"{self.row}, {self.name} {self.index}"
        )

    def read_bytes(self) -> bytes:
        """Read the bytes of the file.

        Raises:
          UserError: the data set is damaged.
        """
        found = self.row.dataset.example(self.row.number)[self.name]
        return bytes(found if self.index < 0 else found[self.index])


class StoredPairs(Sequence[Pair]):
    """The pairs of a data set, in the order of its CSV.

    Raises:
      UserError: the folder contains no data set of pairs, the data set is damaged or has no labels
        of `dimensions`, or a package is missing.
    """

    def __init__(self, folder: Path, dimensions: Sequence[str]):
        written = builder()
        lengths = _lengths(folder, written)
        self.folder, (self._columns, self._sources) = folder, _index(folder, sum(lengths))
        if missing := [name for name in dimensions if name not in self._columns]:
            raise UserError(
                f"pairs {folder}: has no labels {missing[0]}, only {', '.join(self._columns)}; "
                f"make it again with --dimensions {','.join(dimensions)}"
            )
        self._labels = [self._columns[name] for name in dimensions]
        self._features = written.features(list(self._columns))
        stem = folder / f"{written.NAME}-{written.SPLIT}.array_record"
        files = [
            Path(f"{stem}-{number:05d}-of-{len(lengths):05d}") for number in range(len(lengths))
        ]
        if lost := [file.name for file in files if not file.is_file()]:
            raise UserError(f"pairs {folder}: {lost[0]} is missing; {AGAIN}")
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(file) for file in files])
            found = len(self._records)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"pairs {folder}: {_damaged(error)}") from None
        if found != len(self):
            raise UserError(f"pairs {folder}: holds {found} records, not {len(self)}; {AGAIN}")
        self.example = functools.lru_cache(CACHED_RECORDS)(self._read)

    def __len__(self) -> int:
        return len(self._sources)

    @overload
    def __getitem__(self, number: int) -> Pair: ...

    @overload
    def __getitem__(self, number: slice) -> list[Pair]: ...

    def __getitem__(self, number: int | slice) -> Pair | list[Pair]:
        if isinstance(number, slice):
            return [self[n] for n in range(len(self))[number]]
        number = range(len(self))[number]
        labels = tuple(LETTERS[column[number]] for column in self._labels)
        return Pair(StoredRow(self, number), labels, SOURCES[self._sources[number]])

    def _read(self, number: int) -> dict[str, Any]:
        try:
            read = self._features.deserialize_example_np(self._records[number])
            read["prompt"] = read["prompt"].decode()
            stored = (
                {name: list(LETTERS)[label] for name, label in read["labels"].items()},
                list(SOURCES)[read["source"]],
            )
        except Exception as error:  # whatever the libraries raise over damaged bytes
            raise UserError(f"{StoredRow(self, number)}: {_damaged(error)}") from None
        if stored != (
            {name: column[number] for name, column in self._columns.items()},
            self._sources[number],
        ):
            raise UserError(
                f"{StoredRow(self, number)}: its labels are not those of {INDEX}; {AGAIN}"
            )
        return read


def _damaged(error: Exception) -> str:
    return f"cannot be read ({str(error).partition(chr(10))[0] or type(error).__name__}); {AGAIN}"


def _json(file: Path) -> Any:
    """Parse a JSON file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"pairs {file}: {_damaged(error)}") from None


def _lengths(folder: Path, written: ModuleType) -> list[int]:
    """Read the number of records in each file.

    Raises:
      UserError: the folder is no data set of pairs, or has another version.
    """
    if not (folder / INFO).is_file():
        raise UserError(
            f"pairs {folder}: is a folder without {INFO}, so no data set; "
            f"name a CSV, or make one: {MAKE}"
        )
    info = _json(folder / INFO)
    try:
        found = [info[name] for name in ("name", "version", "fileFormat")]
        lengths = {
            split["name"]: [int(length) for length in split["shardLengths"]]
            for split in info["splits"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"pairs {folder / INFO}: {_damaged(error)}") from None
    expected = [written.NAME, written.VERSION, "array_record"]
    if found != expected or list(lengths) != [written.SPLIT]:
        raise UserError(
            f"pairs {folder}: holds {' '.join(map(str, found))}, not {' '.join(expected)}; "
            f"make one of the CSV: {MAKE}"
        )
    return lengths[written.SPLIT]


def _index(folder: Path, count: int) -> tuple[dict[str, str], str]:
    """Read the letters of all labels by dimension, and of all sources.

    Raises:
      UserError: the letters are missing, or are not those of `count` pairs.
    """
    index = _json(folder / INDEX)
    try:
        labels, sources = dict(index["labels"]), str(index["sources"])
        fit = [
            set(sources) <= set(SOURCES),
            *(set(column) <= set(LETTERS) for column in labels.values()),
        ]
        if not all(fit) or any(len(column) != count for column in (sources, *labels.values())):
            raise ValueError(f"not the letters of {count} pairs")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"pairs {folder / INDEX}: {_damaged(error)}") from None
    return labels, sources


def write_dataset(csv: Path, out: Path, dimensions: str = "SA") -> None:
    """Convert the pairs of a CSV to a data set; the folder appears once it is complete.

    Args:
      csv: pairs in the format of `csv_source`.
      out: folder to create.
      dimensions: columns with labels, joined by commas.

    Raises:
      UserError: the CSV is invalid, one of its files cannot be read, `out` exists or cannot be
        created, or a package is missing.
    """
    names = dimensions.split(",")
    written, pairs = builder(), load_pairs(csv, names)
    with (
        workdir.new_folder(out) as folder,
        progress("pairs", len(pairs)) as update,
        # TFDS prints the path of the temporary folder.
        contextlib.redirect_stdout(io.StringIO()),
    ):
        made = written.IdentityPairs(
            pairs=pairs, dimensions=names, update=update, data_dir=folder / "making"
        )
        made.download_and_prepare()
        for file in Path(made.data_dir).iterdir():
            file.rename(folder / file.name)
        shutil.rmtree(folder / "making")
