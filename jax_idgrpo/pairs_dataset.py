"""A data set of preference pairs, made of a CSV: few large files that hold everything, for many pairs or for other machines.

    python -m jax_idgrpo.pairs_dataset --csv pairs.csv --out DIR [--dimensions SA,VQ]

The folder takes the CSV's place in the options of training, which then does the same to the bit. It is a TFDS data set in ArrayRecord files
(`tfds_builder`), so that `tfds.builder_from_directory(DIR)` reads it too. A video that is in several pairs is stored with each.
"""

import argparse
import contextlib
import io
import shutil
import sys
from pathlib import Path

from jax_idgrpo.data import folders
from jax_idgrpo.metrics import progress
from jax_idgrpo.preferences.csv_source import load_pairs
from jax_idgrpo.preferences.tfds_source import builder


def write_dataset(csv: Path, out: Path, dimensions: str = "SA") -> None:
    """Make the folder `out` of the pairs of a CSV; it appears once it is complete.

    dimensions: columns of the CSV that hold labels, joined by commas.

    Raises:
      UserError: the CSV is not as `csv_source` says, a file of it cannot be read, `out` exists or cannot be made, or a package is
        missing.
    """
    names = dimensions.split(",")
    written, pairs = builder(), load_pairs(csv, names)
    with (
        folders.new_folder(out) as folder,
        progress("pairs", len(pairs)) as update,
        contextlib.redirect_stdout(io.StringIO()),      # which says where the folder is while it is not complete
    ):
        made = written.IdentityPairs(pairs=pairs, dimensions=names, update=update, data_dir=folder / "making")
        made.download_and_prepare()
        for file in Path(made.data_dir).iterdir():
            file.rename(folder / file.name)
        shutil.rmtree(folder / "making")


def main(arguments: list[str] | None = None) -> int:
    """The command of the module's docstring; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make a data set of the preference pairs of a CSV.")
    parser.add_argument("--csv", type=Path, required=True, help="the pairs, see jax_idgrpo/preferences/csv_source.py")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--dimensions", default="SA", help="columns that hold labels, joined by commas (default: SA)")
    return folders.run(write_dataset, vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
