"""What the commands that draw a folder of files share: its options, its appearance as a whole, and the one line that a mistake gets."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jax_idgrpo.errors import UserError


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends and is gone when it fails.

    Raises:
      UserError: `out` exists already or cannot be made.
    """
    if out.exists():
        raise UserError(f"--out {out}: exists already; remove it or name another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
            folder = Path(aside) / out.name
            folder.mkdir()
            yield folder
            folder.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name a folder you may write to") from None


def options(description: str, holds: str, unit: str, splits: str) -> argparse.ArgumentParser:
    """A parser of --out, --split, --count and --seed. holds: what the folder holds. unit: of which there are --count."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"folder to make: {holds}")
    parser.add_argument("--split", required=True, help=f"whose people: {splits}")
    parser.add_argument("--count", type=int, required=True, metavar="N", help=unit)
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other people and scenes (default 0)")
    return parser


def run(write: Callable[..., None], values: dict[str, Any]) -> int:
    """`write(**values)`; returns the exit status, and a user's mistake is one line on standard error."""
    try:
        write(**values)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
