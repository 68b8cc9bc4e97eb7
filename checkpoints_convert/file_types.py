"""Identify files without readable weights by their first bytes, with a remedy for each."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from jax_idgrpo.errors import UserError

START = 512  # bytes that are examined
FACE_FILE_LIMIT = 1 << 28  # bytes; the largest published face network has 39 million
READ = "get its safetensors or .pth file"
FACE_FILES = (
    "face networks are read from deepface's .pth files and insightface's or CurricularFace's "
    "backbone.pth"
)
GRAPHS = "YuNet, SFace and dlib's ResNet are read by idgrpo-convert faces"
# Suffixes of unfinished downloads.
UNFINISHED = (".aria2", ".part", ".partial", ".crdownload", ".incomplete", ".!qB")
JSON = rb"\s*[{\[]"


@dataclasses.dataclass(frozen=True)
class FileType:
    """A kind of file.

    Attributes:
      pattern: regular expression for the first bytes.
      name: description of the file.
      remedy: what to do.
    """

    pattern: bytes
    name: str
    remedy: str


TYPES = (
    FileType(
        rb"GGUF",
        "a GGUF file, whose quantised weights are not read",
        "get the bfloat16 or float32 safetensors file",
    ),
    FileType(rb"\x89HDF\r\n\x1a\n", "an HDF5 file (such as a Keras .h5)", f"{READ}; {FACE_FILES}"),
    # A ModelProto starts with ir_version; the producer, the domain or the graph follows.
    FileType(
        rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]",
        "an ONNX file",
        f"{READ}; {FACE_FILES}; {GRAPHS}",
    ),
    FileType(rb"\x01\x01\x01.loss_", "a network of dlib", GRAPHS),
    FileType(
        rb"version https://git-lfs",
        "a Git LFS pointer, not the file itself",
        "run git lfs pull in its folder",
    ),
    FileType(
        rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|!--)",
        "a web page, as a gated or failed download leaves",
        "log in where it comes from and download the file again",
    ),
    FileType(rb"\x1f\x8b", "a gzip archive", "unpack it"),
    FileType(
        rb"7z\xbc\xaf\x27\x1c|Rar!|\xfd7zXZ\x00|BZh[1-9]|\x28\xb5\x2f\xfd|.{257}ustar",
        "an archive",
        "unpack it",
    ),
    FileType(rb"PK\x05\x06", "an empty ZIP archive", "get the file again"),
    FileType(rb"\x93NUMPY", "a NumPy array", READ),
    FileType(JSON, "a JSON file, not weights", "give the file of weights, or the folder of both"),
)


def start_of(path: Path) -> bytes:
    """Read the first bytes of a file.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(START)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def is_safetensors(start: bytes) -> bool:
    """Return whether a file may be safetensors: eight bytes of length, then a JSON object."""
    return start[8:9] == b"{"


def is_unfinished(path: Path) -> bool:
    """Return whether a file is an unfinished download, by its name or by aria2's file beside it."""
    return path.suffix in UNFINISHED or path.with_name(f"{path.name}.aria2").exists()


def complaint(path: Path) -> str | None:
    """Describe a file that holds no readable weights, with the remedy.

    Returns:
      The description; None for a file of safetensors or of `torch.save`, complete or damaged.

    Raises:
      UserError: the file cannot be read.
    """
    start = start_of(path)
    if is_unfinished(path):
        return "is an unfinished download; wait until the download ends"
    if not start:
        return "is empty; get the file again"
    if is_safetensors(start):
        return None
    for kind in TYPES:
        if re.match(kind.pattern, start, re.IGNORECASE | re.DOTALL):
            return f"is {kind.name}; {kind.remedy}"
    if not start.strip(b"\0"):
        return "starts with nothing but zeros, as an unfinished download does; get the file again"
    return None


def refuse_others(path: Path) -> None:
    """Raise a UserError for a file that holds no readable weights."""
    if (what := complaint(path)) is not None:
        raise UserError(f"{path}: {what}")


def read_face_file(path: Path) -> bytes:
    """Read a whole file that should be a face network.

    Raises:
      UserError: the file cannot be read, or is larger than any face network.
    """
    try:
        size = path.stat().st_size
        if size > FACE_FILE_LIMIT:
            raise UserError(
                f"{path}: has {size:,} bytes, more than any face network; give the published file"
            )
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
