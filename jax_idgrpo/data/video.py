"""Read and write videos as h264 in mp4 through PyAV, and draw contact sheets.

Files made elsewhere are read as a player shows them: upright, with square pixels, and at a
constant rate.

In memory a video is float32 [F, H, W, 3] in [-1, 1]. h264 is lossy (4:2:0, quality factor 18), so
the score of a file differs a little from the score of the original frames. The difference is
negligible for a file written as `FINE` (4:4:4, quality factor 10).
"""

import collections
import contextlib
import dataclasses
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

import av
import numpy as np
from av.container import InputContainer
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from jax_idgrpo.errors import UserError


@runtime_checkable
class File(Protocol):
    """Bytes with a name, such as a `pathlib.Path`; `str` gives their location."""

    def __hash__(self) -> int: ...

    def read_bytes(self) -> bytes:
        """Read all bytes.

        Raises:
          OSError: the bytes cannot be read.
        """


CONTAINERS = "mov,matroska,avi,gif"
"""FFmpeg's names of the formats that are read. Playlists are excluded: FFmpeg would open the files
that they name."""
SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
"""Suffixes of such files, in lower case."""
# Offset and value of bytes that mark a file as a video.
_MARKS = (
    (4, b"ftyp"),
    (4, b"moov"),
    (4, b"mdat"),
    (0, b"\x1aE\xdf\xa3"),
    (0, b"RIFF"),
    (0, b"GIF8"),
)
_NOTHING = np.zeros((0, 0, 3), np.uint8)
_WIDEST = 8  # a pixel's sides differ by at most this factor


def to_uint8(video: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Clip values to [-1, 1] and convert them to bytes 0 to 255."""
    return np.round((np.clip(np.asarray(video, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


def from_uint8(pixels: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Convert bytes 0 to 255 to float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1


@dataclasses.dataclass(frozen=True)
class Quality:
    """Encoding quality of h264.

    Attributes:
      factor: quality factor, from 0 (lossless) to 51 (worst).
      pixels: "yuv420p", which every player shows, or "yuv444p", which keeps colour at full
        resolution. The identity of small faces depends on their colour.
      repeatable: whether the same frames always give the same bytes. The encoder then uses one
        thread and does not look ahead.
    """

    factor: int = 18
    pixels: str = "yuv420p"
    repeatable: bool = False


FINE = Quality(10, "yuv444p", repeatable=True)


@contextlib.contextmanager
def _encoder(
    target: str | io.BytesIO, size: tuple[int, int], rate: int | Fraction, quality: Quality
) -> Iterator[Callable[[UInt8[np.ndarray, "height width 3"]], None]]:
    """Yield a function that encodes the next frame of a video.

    Args:
      target: path of the file, or a buffer.
      size: height and width in pixels, both even.
      rate: frames per second.
      quality: encoding quality.
    """
    options = {"crf": str(quality.factor), "preset": "fast"}
    if quality.repeatable:
        options |= {"threads": "1", "x264-params": "rc-lookahead=0:mbtree=0:bframes=0"}
    # faststart reads the written file again, so it needs a file on disk.
    layout = {"movflags": "faststart"} if isinstance(target, str) else {}
    with av.open(target, "w", format="mp4", options=layout) as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = quality.pixels

        def encode(frame: UInt8[np.ndarray, "height width 3"]) -> None:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

        yield encode
        container.mux(stream.encode())


def _encode(
    target: str | io.BytesIO,
    pixels: UInt8[np.ndarray, "frames height width 3"],
    fps: int,
    quality: Quality,
) -> None:
    with _encoder(target, pixels.shape[1:3], fps, quality) as encode:
        for frame in pixels:
            encode(frame)


def _open(source: io.BytesIO | BinaryIO) -> InputContainer:
    """Open a video's container; only the bytes of `source` are read."""
    return av.open(source, options={"format_whitelist": CONTAINERS})


def _shown(frame: av.VideoFrame, aspect: Fraction) -> UInt8[np.ndarray, "height width 3"]:
    """Return the pixels as a player shows them: stretched to square pixels and turned upright.

    Args:
      frame: the stored frame.
      aspect: width of a stored pixel over its height.
    """
    pixels = frame.to_ndarray(format="rgb24")
    if aspect != 1:
        height, width = pixels.shape[:2]
        size = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    return np.rot90(pixels, round(frame.rotation / 90))


class _Frame(NamedTuple):
    """A decoded frame.

    Attributes:
      time: time in seconds, if known.
      pixels: the frame, or an empty array where the caller does not need it.
    """

    time: float | None
    pixels: UInt8[np.ndarray, "height width 3"]


def _frames(
    source: io.BytesIO | BinaryIO,
    name: str | File,
    needed: Callable[[int, float | None], bool] = lambda number, time: True,
) -> Iterator[_Frame]:
    """Decode a video frame by frame.

    Args:
      source: bytes of the file.
      name: name of the file, for messages.
      needed: returns whether the pixels of a frame are needed, given its number and time.

    Raises:
      UserError: the file cannot be read, holds no video, or is damaged.
    """
    head = source.read(16)
    size = source.seek(0, io.SEEK_END)
    source.seek(0)
    damaged = UserError(f"video {name}: is damaged or cut off; make or copy it again")
    try:
        with _open(source) as container:
            if not container.streams.video:
                raise UserError(f"video {name}: holds no video, sound alone; pass another file")
            stream = container.streams.video[0]
            aspect = stream.sample_aspect_ratio or Fraction(1)
            if not Fraction(1, _WIDEST) <= aspect <= _WIDEST:
                raise UserError(
                    f"video {name}: says that its pixels are {aspect} times as wide as high; "
                    "store it again with square pixels"
                )
            if any(entry.pos + entry.size > size for entry in stream.index_entries):
                raise damaged
            sizes = set()
            for number, frame in enumerate(container.decode(stream)):
                sizes.add((frame.height, frame.width))
                if len(sizes) > 1:
                    raise UserError(f"video {name}: changes its size on the way; store it again")
                pixels = _shown(frame, aspect) if needed(number, frame.time) else _NOTHING
                yield _Frame(frame.time, pixels)
    except (OSError, IndexError, av.FFmpegError):
        if any(head[place:].startswith(mark) for place, mark in _MARKS):
            raise damaged from None
        kinds = f"no video of a kind that is read ({', '.join(SUFFIXES)})"
        reason = kinds if head else "empty"
        raise UserError(f"video {name}: is {reason}; make or copy it again") from None


def _bytes(path: str | File) -> io.BytesIO:
    """Read the bytes of a file.

    Raises:
      UserError: the bytes cannot be read.
    """
    try:
        return io.BytesIO((Path(path) if isinstance(path, str) else path).read_bytes())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"video {path}: cannot be read ({reason}); check its path") from None


def constant_rate(times: Sequence[float | None]) -> list[int]:
    """List the frames that a player shows at evenly spaced times, as many as are stored.

    A frame with a long duration is repeated; a frame with a very short duration is dropped. If the
    rate is constant up to rounding, or the times are unknown, every frame occurs once.

    Args:
      times: time of every stored frame in seconds, ascending.

    Returns:
      Numbers of stored frames, from 0.
    """
    known = [time for time in times if time is not None]
    if len(known) < len(times) or len(times) < 3 or known[-1] <= known[0]:
        return list(range(len(times)))
    even = np.linspace(known[0], known[-1], len(known))
    if np.abs(np.asarray(known) - even).max() <= (even[1] - even[0]) / 2:
        return list(range(len(times)))
    return (np.searchsorted(known, even + 1e-6, side="right") - 1).tolist()


def _rate(times: Sequence[float | None]) -> float | None:
    """Return the mean frame rate of stored frames, from their times; None if it is unknown."""
    if len(times) < 2 or times[0] is None or times[-1] is None or times[-1] <= times[0]:
        return None
    return (len(times) - 1) / (times[-1] - times[0])


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video file whose frames are counted but not in memory.

    Attributes:
      path: path of the file.
      numbers: number of the stored frame of each shown frame (see `constant_rate`).
      height: height of a shown frame in pixels.
      width: width of a shown frame in pixels.
      rate: shown frames per second; None if the file does not tell.
    """

    path: Path
    numbers: tuple[int, ...]
    height: int
    width: int
    rate: float | None = None

    @classmethod
    def open(cls, path: Path) -> "Clip":
        """Decode a file once to check it.

        Raises:
          UserError: the file cannot be read, holds no video, or is damaged.
        """
        with _file(path) as file:
            found = list(_frames(file, path, lambda number, time: number == 0))
        if not found:
            raise UserError(f"video {path}: holds no frames; write it again")
        times = [frame.time for frame in found]
        numbers = constant_rate(times)
        height, width = found[0].pixels.shape[:2]
        return cls(Path(path), tuple(numbers), height, width, _rate(times))

    def frames(self) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        """Yield the shown frames in order; one is in memory at a time."""
        times_shown = collections.Counter(self.numbers)
        with _file(self.path) as file:
            decoded = _frames(file, self.path, lambda number, time: number in times_shown)
            for number, frame in enumerate(decoded):
                for _ in range(times_shown[number]):
                    yield frame.pixels

    def read(self, numbers: Sequence[int]) -> Float[np.ndarray, "frames height width 3"]:
        """Return the shown frames of these ascending numbers, values in [-1, 1].

        No other frames are held in memory.
        """
        selected = set(numbers)
        shown = enumerate(self.frames())
        return from_uint8(np.stack([frame for number, frame in shown if number in selected]))

    def blocks(self, size: int) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
        """Yield the shown frames in blocks of at most `size`."""
        held: list[np.ndarray] = []
        for frame in self.frames():
            held.append(frame)
            if len(held) == size:
                yield np.stack(held)
                held = []
        if held:
            yield np.stack(held)


def _file(path: str | Path) -> BinaryIO:
    """Open the file of a video.

    Raises:
      UserError: the file cannot be opened.
    """
    try:
        return Path(path).open("rb")
    except OSError as error:
        reason = error.strerror
        raise UserError(f"video {path}: cannot be read ({reason}); check its path") from None


def list_videos(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the videos of a folder, and its other files, by name.

    Hidden files, such as macOS leaves on foreign disks, are in neither list.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    videos = [path for path in files if path.suffix.lower() in SUFFIXES]
    return videos, [path for path in files if path.suffix.lower() not in SUFFIXES]


def _decode(source: io.BytesIO, name: str | File) -> UInt8[np.ndarray, "frames height width 3"]:
    return _at_constant_rate(list(_frames(source, name)), name)


def _at_constant_rate(
    frames: Sequence[_Frame], name: str | File
) -> UInt8[np.ndarray, "frames height width 3"]:
    if not frames:
        raise UserError(f"video {name}: holds no frames; write it again")
    numbers = constant_rate([frame.time for frame in frames])
    return np.stack([frames[number].pixels for number in numbers])


def write_video(
    path: str | Path,
    video: Float[np.ndarray, "frames height width 3"] | UInt8[np.ndarray, "frames height width 3"],
    fps: int,
    quality: Quality = Quality(),
) -> None:
    """Write a video of even height and width as h264.

    A video with a value that is NaN or infinite is not written; a warning is issued instead. The
    file is written under another name and renamed, so an interrupted run leaves no half file. A
    missing folder is created.

    Args:
      path: path of the file.
      video: values in [-1, 1], or bytes 0 to 255.
      fps: frames per second.
      quality: encoding quality.
    """
    if not np.isfinite(video).all():
        message = f"video {path}: is not finite (NaN or infinity), so it is not written"
        warnings.warn(message, stacklevel=2)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    try:
        _encode(str(aside), video if video.dtype == np.uint8 else to_uint8(video), fps, quality)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def video_writer(
    path: Path, size: tuple[int, int], rate: float, quality: Quality = Quality()
) -> Iterator[Callable[[UInt8[np.ndarray, "height width 3"]], None]]:
    """Yield a function that appends a frame to an mp4 file.

    Frames are written one by one, so memory does not grow with their number.

    Args:
      path: path of the file, in an existing folder.
      size: height and width in pixels, both even.
      rate: frames per second; the file has 1 to 240.
      quality: encoding quality.
    """
    steady = Fraction(min(max(rate, 1), 240)).limit_denominator(1001)
    with _encoder(str(path), size, steady, quality) as encode:
        yield encode


@contextlib.contextmanager
def preview(
    path: Path, size: tuple[int, int], rate: float, side: int
) -> Iterator[Callable[[UInt8[np.ndarray, "height width 3"]], None]]:
    """Yield a function that appends a frame to a small copy of a video, which browsers play.

    Frames are written one by one, so memory does not grow with their number.

    Args:
      path: path of the mp4 file, in an existing folder.
      size: height and width of the frames in pixels.
      rate: frames per second; the copy has 1 to 240.
      side: maximum of the longer side of the copy in pixels; a smaller video is not enlarged.
    """
    factor = min(side / max(size), 1.0)
    height, width = (max(2 * round(factor * length / 2), 2) for length in size)
    with video_writer(path, (height, width), rate, Quality(23)) as encode:

        def add(frame: UInt8[np.ndarray, "height width 3"]) -> None:
            picture = Image.fromarray(frame)
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            encode(np.asarray(picture))

        yield add


def recoded(
    video: Float[np.ndarray, "frames height width 3"], factor: int
) -> Float[np.ndarray, "frames height width 3"]:
    """Encode and decode a video of even height and width in memory, at a quality factor."""
    buffer = io.BytesIO()
    _encode(buffer, to_uint8(video), 8, Quality(factor, repeatable=True))
    buffer.seek(0)
    return from_uint8(_decode(buffer, "recoded"))


def read_video(path: str | File) -> Float[np.ndarray, "frames height width 3"]:
    """Read the frames of a video file at a constant rate, values in [-1, 1].

    Only the bytes of this file are decoded, even if it names other files.

    Raises:
      UserError: the file is missing, is no video of `CONTAINERS`, or holds no frame.
    """
    return from_uint8(_decode(_bytes(path), path))


def decode_video(
    content: bytes, name: str, most: int
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Decode the bytes of a video file at a constant rate.

    Args:
      content: bytes of the file.
      name: name of the video, for messages.
      most: largest number of pixels of all frames together.

    Raises:
      UserError: the bytes are no video of `CONTAINERS`, hold no frame, or hold too many pixels.
    """
    frames: list[_Frame] = []
    for frame in _frames(io.BytesIO(content), name):
        frames.append(frame)
        if len(frames) * frame.pixels[..., 0].size > most:
            raise UserError(f"video {name}: has over {most} pixels in all frames; send fewer")
    return _at_constant_rate(frames, name)


def read_frames(
    path: str | Path, count: int, size: tuple[int, int], fps: int
) -> Float[np.ndarray, "frames height width 3"]:
    """Read the first frames of a video file, values in [-1, 1].

    Frames are scaled to cover `size` and cropped about their middle. Only the returned frames are
    held in memory.

    Args:
      path: path of the file.
      count: number of frames; fewer are returned if the video is shorter.
      size: height and width in pixels.
      fps: frames per second to sample.

    Raises:
      UserError: the file is missing or no video of `CONTAINERS`.
    """
    frames: list[np.ndarray] = []
    start: list[float] = []

    def due(number: int, time: float | None) -> bool:
        start.extend([time or 0.0] if not start else [])
        return (time or 0.0) - start[0] >= len(frames) / fps - 1e-3

    with _file(path) as file:
        for frame in _frames(file, str(path), due):
            if frame.pixels.size:
                picture = Image.fromarray(frame.pixels)
                covering = ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)
                frames.append(np.asarray(covering))
            if len(frames) == count:
                break
    return from_uint8(np.stack(frames)) if frames else np.zeros((0, *size, 3), np.float32)


def contact_sheet(
    videos: Float[np.ndarray, "rows frames height width 3"], frames: int = 5, scale: int = 1
) -> Image.Image:
    """Draw one picture with a row per video.

    Args:
      videos: values in [-1, 1].
      frames: number of evenly spaced frames per row, from left to right.
      scale: integer magnification.
    """
    columns = np.linspace(0, videos.shape[1] - 1, min(frames, videos.shape[1])).round().astype(int)
    rows = [np.concatenate(list(video[columns]), axis=1) for video in to_uint8(videos)]
    return Image.fromarray(np.concatenate(rows).repeat(scale, 0).repeat(scale, 1))
