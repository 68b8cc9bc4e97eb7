"""Videos on disk: h264 in mp4 through PyAV, written aside and renamed; and contact sheets for people to look at.

In memory a video is float32 [F, H, W, 3] in [-1, 1]. h264 is lossy (4:2:0, quality factor 18), so the score of a file differs a
little from the score of the frames that it was written from; that of a file written as `FINE` (4:4:4, 10) hardly does.
"""

import dataclasses
import io
import os
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import av
import numpy as np
from av.container import InputContainer
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from jax_idgrpo.errors import UserError


@runtime_checkable
class File(Protocol):
    """Bytes with a name: `str` says where they are. A `pathlib.Path` is one."""

    def __hash__(self) -> int: ...

    def read_bytes(self) -> bytes:
        """All of them.

        Raises:
          OSError: they cannot be read.
        """


CONTAINERS = "mov,matroska,avi,gif"
"""FFmpeg's names of what is read: mp4 and QuickTime, webm, and so on; none that names further files (playlists) for it to open."""


def to_uint8(video: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Values in [-1, 1], clipped, as bytes 0 to 255."""
    return np.round((np.clip(np.asarray(video, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


def from_uint8(pixels: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Bytes 0 to 255 as float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1


@dataclasses.dataclass(frozen=True)
class Quality:
    """How h264 keeps a video.

    factor: 0 loses nothing, 51 most. pixels: "yuv420p", which every player shows, or "yuv444p", which keeps colour at full resolution: in
    small faces that is who they are. repeatable: the same frames give the same bytes, by one thread that does not look ahead;
    otherwise they need not (150 times the same clip of 64 x 64 pixels gave 5 different files).
    """

    factor: int = 18
    pixels: str = "yuv420p"
    repeatable: bool = False


FINE = Quality(10, "yuv444p", repeatable=True)


def _encode(target: str | io.BytesIO, pixels: UInt8[np.ndarray, "frames height width 3"], fps: int, quality: Quality) -> None:
    options = {"crf": str(quality.factor), "preset": "fast"}
    if quality.repeatable:
        options |= {"threads": "1", "x264-params": "rc-lookahead=0:mbtree=0:bframes=0"}
    layout = {"movflags": "faststart"} if isinstance(target, str) else {}  # which reads the file again
    with av.open(target, "w", format="mp4", options=layout) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = quality.pixels
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _open(source: io.BytesIO | BinaryIO) -> InputContainer:
    """A video's container, read from its bytes alone."""
    return av.open(source, options={"format_whitelist": CONTAINERS})


def _upright(frame: av.VideoFrame) -> UInt8[np.ndarray, "height width 3"]:
    """Its pixels, turned as a player shows them: telephones store what they film lying on its side."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _decode(source: io.BytesIO) -> list[UInt8[np.ndarray, "height width 3"]]:
    with _open(source) as container:
        return [_upright(frame) for frame in container.decode(video=0)]


def write_video(path: str | Path, video: Float[np.ndarray, "frames height width 3"], fps: int, quality: Quality = Quality()) -> None:
    """Write `video` (values in [-1, 1], even height and width) as h264 at `fps` frames per second.

    The file is written aside and renamed: an interrupted run leaves no half file. Its folder is made when it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    try:
        _encode(str(aside), to_uint8(video), fps, quality)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def recoded(video: Float[np.ndarray, "frames height width 3"], factor: int) -> Float[np.ndarray, "frames height width 3"]:
    """The video as it comes back from a file of that quality factor; no file is written. Even height and width."""
    buffer = io.BytesIO()
    _encode(buffer, to_uint8(video), 8, Quality(factor, repeatable=True))
    buffer.seek(0)
    return from_uint8(np.stack(_decode(buffer)))


def read_video(path: str | File) -> Float[np.ndarray, "frames height width 3"]:
    """The frames of a video file, values in [-1, 1]; decoded from its bytes alone, whatever else it names.

    Raises:
      UserError: the file is missing, is no video of `CONTAINERS`, or holds no frame.
    """
    try:
        frames = _decode(io.BytesIO((Path(path) if isinstance(path, str) else path).read_bytes()))
    except (OSError, IndexError, av.FFmpegError) as error:
        raise UserError(f"video {path}: cannot be read ({type(error).__name__}); pass an mp4 such as `idgrpo sample` writes") from None
    if not frames:
        raise UserError(f"video {path}: holds no frames; write it again")
    return from_uint8(np.stack(frames))


def read_frames(path: str | Path, count: int, size: tuple[int, int], fps: int) -> Float[np.ndarray, "frames height width 3"]:
    """The first `count` frames of a video file at `fps` frames per second, fewer where it is shorter; values in [-1, 1].

    A frame is scaled to cover `size` (height, width), and cut about its middle. No more is held of a long video than is kept.

    Raises:
      UserError: the file is missing or no video of `CONTAINERS`.
    """
    frames: list[np.ndarray] = []
    try:
        with Path(path).open("rb") as file, _open(file) as container:
            start = None
            for frame in container.decode(video=0):
                start = frame.time if start is None else start
                if frame.time - start >= len(frames) / fps - 1e-3:
                    frames.append(np.asarray(ImageOps.fit(Image.fromarray(_upright(frame)), size[::-1], Image.Resampling.LANCZOS)))
                if len(frames) == count:
                    break
    except (OSError, IndexError, av.FFmpegError) as error:
        raise UserError(f"video {path}: cannot be read ({type(error).__name__}); store it again as mp4") from None
    return from_uint8(np.stack(frames)) if frames else np.zeros((0, *size, 3), np.float32)


def contact_sheet(videos: Float[np.ndarray, "rows frames height width 3"], frames: int = 5, scale: int = 1) -> Image.Image:
    """One picture: a row per video, `frames` evenly spaced frames from left to right, `scale` times larger."""
    columns = np.linspace(0, videos.shape[1] - 1, min(frames, videos.shape[1])).round().astype(int)
    rows = [np.concatenate(list(video[columns]), axis=1) for video in to_uint8(videos)]
    return Image.fromarray(np.concatenate(rows).repeat(scale, 0).repeat(scale, 1))
